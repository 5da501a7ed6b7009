package builtin

import (
	"context"
	"path/filepath"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/diskkeys"
	"github.com/plastron/plastron/internal/keys/memkeys"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/nodeattest/k8spsat"
	"github.com/plastron/plastron/internal/nodeattest/x509pop"
	"github.com/plastron/plastron/internal/workload"
	"github.com/plastron/plastron/internal/workload/docker"
	"github.com/plastron/plastron/internal/workload/k8s"
	"github.com/plastron/plastron/internal/workload/unix"
)

// AgentKeeper is a kind of keeper for the agent's own key.
type AgentKeeper struct {
	Name, Doc string
	New       func() keys.Config
}

// AgentKeepers are the agent's KeyManager plugins.
func AgentKeepers() []AgentKeeper {
	return []AgentKeeper{
		{"disk", "keys in a file of the agent's user, so that it survives a restart", func() keys.Config { return new(AgentDiskKeys) }},
		{"memory", "keys in memory; every restart needs a new attestation", func() keys.Config { return new(memkeys.Config) }},
	}
}

// AgentDiskKeys is diskkeys with the agent's way to name the file.
type AgentDiskKeys struct {
	// Directory is where keys.json lies. It must be writable by the agent's user only.
	// Default: data_dir, which the agent fills in.
	Directory string `hcl:"directory"`
}

// Open implements keys.Config.
func (c *AgentDiskKeys) Open(ctx context.Context) (keys.Keeper, error) {
	if c.Directory == "" {
		return nil, fault.New(fault.Invalid, "config_invalid", "directory: must be set")
	}
	return (&diskkeys.Config{Path: filepath.Join(c.Directory, "keys.json")}).Open(ctx)
}

// ProverConfig is the agent's half of a node attestor, configured.
type ProverConfig interface {
	// Prover returns the prover. token is the join token given to the agent, or empty.
	Prover(token string) (nodeattest.Prover, error)
}

// NodeProver is a way for an agent to prove its node.
type NodeProver struct {
	Name, Doc string
	New       func() ProverConfig
}

// NodeProvers are the agent's NodeAttestor plugins.
func NodeProvers() []NodeProver {
	return []NodeProver{
		{jointoken.Name, "a secret that works once", func() ProverConfig { return new(joinTokenProver) }},
		{x509pop.Name, "a certificate that the node has, and a signature with its key", func() ProverConfig { return new(x509pop.AgentConfig) }},
		{k8spsat.Name, "the service-account token of the agent's pod in a Kubernetes cluster", func() ProverConfig { return new(k8spsat.AgentConfig) }},
	}
}

type joinTokenProver struct{}

// Prover implements ProverConfig.
func (*joinTokenProver) Prover(text string) (nodeattest.Prover, error) {
	if text == "" {
		return nil, fault.New(fault.Precondition, "join_token_missing", "this node has to attest and no join token was given").
			Fix("make one with 'plastron server token generate' and set join_token or join_token_file")
	}
	token, err := jointoken.Parse(text)
	if err != nil {
		return nil, err
	}
	return jointoken.Prover{Token: token}, nil
}

// WorkloadConfig opens a workload attestor; a plugin's decoded configuration is its factory.
type WorkloadConfig interface {
	Open(ctx context.Context) (workload.Attestor, error)
}

// WorkloadAttestor is a way to prove a local process.
type WorkloadAttestor struct {
	Name, Doc string
	New       func() WorkloadConfig
}

// WorkloadAttestors are the agent's WorkloadAttestor plugins.
func WorkloadAttestors() []WorkloadAttestor {
	return []WorkloadAttestor{
		{"unix", "user, groups and program of a process, from the kernel", func() WorkloadConfig { return new(unix.Config) }},
		{"k8s", "pod and container of a process, from the kernel and the node's kubelet", func() WorkloadConfig { return new(k8s.Config) }},
		{"docker", "container of a process and what it was started as, from the kernel and Docker or podman", func() WorkloadConfig { return new(docker.Config) }},
	}
}
