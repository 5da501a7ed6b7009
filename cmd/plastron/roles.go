package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/server"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// roles are the loops that run in this process.
type roles struct {
	ctx    context.Context
	cancel context.CancelFunc
	group  sync.WaitGroup
	failed chan struct{} // closed when a role ended by itself

	mu  sync.Mutex
	err error
}

func newRoles(ctx context.Context) *roles {
	ctx, cancel := context.WithCancel(ctx)
	return &roles{ctx: ctx, cancel: cancel, failed: make(chan struct{})}
}

// start runs a role until stop, and waits until it is ready.
func (r *roles) start(ctx context.Context, ready <-chan struct{}, run func(context.Context) error) error {
	r.group.Go(func() {
		err := run(r.ctx)
		if r.ctx.Err() != nil && errors.Is(err, context.Canceled) {
			err = nil // as it was told
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		select {
		case <-r.failed:
		default:
			if r.ctx.Err() == nil {
				close(r.failed)
			}
		}
		r.err = errors.Join(r.err, err)
	})
	select {
	case <-ready:
		return nil
	case <-r.failed:
		return r.stop()
	case <-ctx.Done():
		return fault.New(fault.Unavailable, "interrupted", "interrupted before everything was up")
	}
}

// startServer runs the server of dev and returns where agents connect.
func (r *roles) startServer(ctx context.Context, o devOptions, dir, socket string, log *slog.Logger) (*net.TCPAddr, error) {
	cfg := server.Default()
	set := &cfg.Server
	set.TrustDomain.TrustDomain = spiffeid.RequireTrustDomainFromString(devTrustDomain)
	set.BindAddress, set.BindPort, set.SocketPath = "127.0.0.1", 0, socket
	set.DataDir = filepath.Join(dir, "server")
	set.DefaultX509SVIDTTL, set.CATTL = config.Duration(o.x509TTL), config.Duration(o.caTTL)
	s, err := server.New(cfg, log)
	if err != nil {
		return nil, err
	}
	if err := r.start(ctx, s.Ready(), s.Run); err != nil {
		return nil, err
	}
	return s.Addr().(*net.TCPAddr), nil
}

// startAgent runs the agent of dev. It recognises the server by the bundle and
// joins with the token, like any agent.
func (r *roles) startAgent(ctx context.Context, dir, socket string, server *net.TCPAddr, token string, trust *bundle.Bundle, log *slog.Logger) error {
	roots := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(roots, trust.MarshalPEM(), 0o600); err != nil {
		return err
	}
	unix, err := config.Parse("plastron dev", []byte("discover_workload_path = true"))
	if err != nil {
		return err
	}
	cfg := agent.Default()
	set := &cfg.Agent
	set.TrustDomain.TrustDomain = trust.TrustDomain
	set.ServerAddress, set.ServerPort = server.IP.String(), server.Port
	set.DataDir, set.SocketPath = filepath.Join(dir, "agent"), socket
	set.TrustBundlePath, set.JoinToken = roots, token
	cfg.Plugins = []config.Plugin{
		{Type: "KeyManager", Name: "memory"},
		{Type: "NodeAttestor", Name: "join_token"},
		{Type: "WorkloadAttestor", Name: "unix", Data: unix},
	}
	a, err := agent.New(cfg, log)
	if err != nil {
		return err
	}
	return r.start(ctx, a.Ready(), a.Run)
}

// stop ends all roles and returns why one failed, if one did.
func (r *roles) stop() error {
	r.cancel()
	r.group.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}
