package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/upkeep"
)

// Offline opens the store of a configured server without running one and gives
// it to f. A store that does not exist is not made.
func Offline(ctx context.Context, cfg Config, log *slog.Logger, f func(*upkeep.Upkeep) error) error {
	s, err := New(cfg, log)
	if err != nil {
		return err
	}
	return s.offline(ctx, func(opened builtin.OpenStore, c upkeep.Config) error { return f(upkeep.New(c)) })
}

// OfflineRepair is Offline for a repair: what is written goes on record in this
// server's audit trail.
func OfflineRepair(ctx context.Context, cfg Config, log *slog.Logger, f func(*upkeep.Upkeep) error) error {
	s, err := New(cfg, log)
	if err != nil {
		return err
	}
	return s.offline(ctx, func(opened builtin.OpenStore, c upkeep.Config) (err error) {
		reg, err := registry.Open(ctx, opened, c.TrustDomain, log)
		if err != nil {
			return err
		}
		id, err := serverID(cfg.Server.DataDir)
		if err != nil {
			return err
		}
		runs := false
		reg.View(func(snap *registry.Snapshot) {
			for _, one := range snap.Servers() {
				runs = runs || one.ID == id && one.Live(time.Now())
			}
		})
		if runs {
			return fault.New(fault.Precondition, "server_runs", "this server runs, or ran until a moment ago, and its admin socket does not answer").
				Fix("repair while it answers, or stop it first")
		}
		trail, err := audit.Open(audit.Config{Path: c.Trail, Server: id, Version: Version, Log: log})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, trail.Close()) }()
		reg.Batches(recordBatches(trail))
		running, stop := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- reg.Run(running) }()
		defer func() {
			stop()
			err = errors.Join(err, <-ended)
		}()
		c.Registry = reg
		return f(upkeep.New(c))
	})
}

func (s *Server) offline(ctx context.Context, f func(builtin.OpenStore, upkeep.Config) error) (err error) {
	opened, err := s.openStore(ctx, true)
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	defer func() { err = errors.Join(err, opened.Close()) }()
	return f(opened, upkeep.Config{
		Store: opened, TrustDomain: s.cfg.Server.TrustDomain.TrustDomain, Intact: opened.Check,
		Trail: filepath.Join(s.cfg.Server.DataDir, "audit.log"), Log: s.log,
	})
}
