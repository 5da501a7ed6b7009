// Package builtin is the table of what is linked in: for each seam, every
// plugin with its name in configuration files, one line that says what it is
// (the line in the documentation), and its configuration, which is its factory.
package builtin

import (
	"context"

	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/diskkeys"
	"github.com/plastron/plastron/internal/keys/memkeys"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/nodeattest/k8spsat"
	"github.com/plastron/plastron/internal/nodeattest/x509pop"
	"github.com/plastron/plastron/internal/publish"
	"github.com/plastron/plastron/internal/publish/k8sbundle"
	"github.com/plastron/plastron/internal/upstream"
	"github.com/plastron/plastron/internal/upstream/diskca"
	"github.com/plastron/plastron/internal/upstream/spire"
)

// KeyManager is a keeper of private keys.
type KeyManager struct {
	Name string
	Doc  string
	New  func() keys.Config
}

// KeyManagers returns the keepers.
func KeyManagers() []KeyManager {
	return []KeyManager{
		{"disk", "keys in one file that only the server's user can read", func() keys.Config { return new(diskkeys.Config) }},
		{"memory", "keys in memory: new authorities after each start", func() keys.Config { return new(memkeys.Config) }},
	}
}

// Upstream is a kind of authority above.
type Upstream struct {
	Name string
	Doc  string
	New  func() upstream.Config
}

// Upstreams returns the kinds of authorities above. Without one a server signs
// its own.
func Upstreams() []Upstream {
	return []Upstream{
		{"disk", "a CA whose certificate and key are files, such as one of a corporate PKI", func() upstream.Config { return new(diskca.Config) }},
		{"spire", "another server of the trust domain, Plastron's or SPIRE's, known by an agent on this machine", func() upstream.Config { return new(spire.Config) }},
	}
}

// Notifier is a kind of place where the bundle is published.
type Notifier struct {
	Name string
	Doc  string
	New  func() publish.Config
}

// Notifiers returns the kinds of places.
func Notifiers() []Notifier {
	return []Notifier{
		{"k8sbundle", "the X.509 roots as PEM in ConfigMaps of Kubernetes clusters", func() publish.Config { return new(k8sbundle.Config) }},
	}
}

// VerifierConfig opens the server's half of a node attestor.
type VerifierConfig interface {
	Open(ctx context.Context, env nodeattest.Env) (nodeattest.Verifier, error)
}

// NodeAttestor is a way to prove a node.
type NodeAttestor struct {
	Name string
	Doc  string
	New  func() VerifierConfig // the server's half
}

// NodeAttestors returns the node attestors.
func NodeAttestors() []NodeAttestor {
	return []NodeAttestor{
		{jointoken.Name, "a secret that works once", func() VerifierConfig { return new(jointoken.Config) }},
		{x509pop.Name, "a certificate that the node has, and a signature with its key", func() VerifierConfig { return new(x509pop.Config) }},
		{k8spsat.Name, "the service-account token of the agent's pod in a Kubernetes cluster", func() VerifierConfig { return new(k8spsat.Config) }},
	}
}
