// Package k8spsat proves a node of a Kubernetes cluster by the projected
// service-account token of the agent's pod. Both halves are here; the message is
// the one that SPIRE's agents and servers send.
//
// The server verifies a token in one of two ways, for each cluster the one that is
// configured: the cluster's API server reviews it, and shows the pod and its node;
// or the public keys of the cluster's issuer do, and then what the token says is
// all that is known.
//
// What must always hold: a token counts for the one cluster that it names, for the
// audience and the service accounts that are configured for that, byte by byte;
// names that come from outside become part of an address only if Kubernetes allows
// them (kube); of a pod and a node it is the UIDs that count, never the names.
package k8spsat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/strictjson"
)

// Name is the attestor's name in configuration, IDs and selectors.
const Name = "k8s_psat"

// Sizes in bytes. A token of a size that is accepted fits into a payload.
const (
	maxPayload = 20 << 10
	maxCluster = 255
	maxToken   = 16 << 10
)

// attestation is the message.
type attestation struct {
	Cluster string `json:"cluster"`
	Token   string `json:"token"`
}

func malformed(what string, err error) error {
	return fault.New(fault.Invalid, "k8s_psat_malformed", "the k8s_psat message is malformed: %s", what).Because(err)
}

func parseAttestation(data []byte) (attestation, error) {
	if len(data) > maxPayload {
		return attestation{}, malformed("it is too large", nil)
	}
	o, err := strictjson.Object(data)
	if err != nil {
		return attestation{}, malformed("it is not a JSON object", err)
	}
	var a attestation
	var okCluster, okToken bool
	a.Cluster, okCluster = o["cluster"].(string)
	a.Token, okToken = o["token"].(string)
	if len(o) != 2 || !okCluster || !okToken || a.Cluster == "" || a.Token == "" || len(a.Cluster) > maxCluster {
		return attestation{}, malformed("it does not have a cluster and a token, and nothing else", nil)
	}
	return a, nil
}

// AgentConfig is the agent's half.
type AgentConfig struct {
	// Cluster is the name by which the server knows the cluster. Required.
	Cluster string `hcl:"cluster"`
	// TokenPath is the file with the projected token. It is read again at each
	// attestation. Default: /var/run/secrets/tokens/spire-agent.
	TokenPath string `hcl:"token_path"`
}

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c *AgentConfig) Validate() error { return checkCluster(c.Cluster) }

// Prover reads the token. It needs no join token.
func (c *AgentConfig) Prover(string) (nodeattest.Prover, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	path := c.TokenPath
	if path == "" {
		path = "/var/run/secrets/tokens/spire-agent"
	}
	token, err := readToken(path)
	if err != nil {
		return nil, fault.New(fault.Precondition, "k8s_psat_unreadable", "the token in %q cannot be used to attest this node: %v", path, err).
			Fix("mount a projected volume with a serviceAccountToken there").Because(err)
	}
	return Prover{c.Cluster, token}, nil
}

func readToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	token := strings.TrimSpace(string(data))
	switch {
	case err != nil:
		return "", err
	case len(data) > maxToken:
		return "", fmt.Errorf("it is larger than %d KiB", maxToken>>10)
	case token == "":
		return "", errors.New("it is empty")
	}
	return token, nil
}

// Prover is the agent's half: it shows its token. It prints as its name.
type Prover struct{ cluster, token string }

// String keeps the secret out of messages.
func (Prover) String() string { return "k8spsat.Prover" }

// GoString keeps the secret out of %#v.
func (Prover) GoString() string { return "k8spsat.Prover" }

// Payload implements nodeattest.Prover.
func (p Prover) Payload(context.Context) ([]byte, error) {
	return json.Marshal(attestation{p.cluster, p.token})
}

// Answer implements nodeattest.Prover. Nothing is ever asked.
func (Prover) Answer(context.Context, []byte) ([]byte, error) {
	return nil, malformed("there is no challenge in it", nil)
}
