package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/upkeep"
)

// CopyStore copies the store of one configuration into the empty store of
// another. No server runs on either. It goes on record in the audit trail of the
// first.
func CopyStore(ctx context.Context, from, to Config, log *slog.Logger) (done *upkeep.Copied, err error) {
	if from.Server.TrustDomain != to.Server.TrustDomain {
		return nil, fault.New(fault.Invalid, "trust_domain_changed", "the configurations are of the trust domains %q and %q", from.Server.TrustDomain.Name(), to.Server.TrustDomain.Name()).
			Fix("a store keeps its trust domain")
	}
	target, err := New(to, log)
	if err != nil {
		return nil, err
	}
	err = copying(ctx, from, log, func(c upkeep.Copying) (err error) {
		// What this server remembers is of the other store.
		opened, err := target.plan.store.Open(ctx, builtin.StoreEnv{Dir: to.Server.DataDir, Log: log})
		if err != nil {
			return fmt.Errorf("open store to copy to: %w", err)
		}
		defer func() { err = errors.Join(err, opened.Close()) }()
		c.To = side(opened)
		if done, err = c.Run(ctx); err != nil {
			return err
		}
		return recordCopy(from.Server.DataDir, done, log)
	})
	return done, err
}

// UndoCopy lets servers start on a store again that was copied away.
func UndoCopy(ctx context.Context, from Config, log *slog.Logger) error {
	return copying(ctx, from, log, func(c upkeep.Copying) error { return c.Undo(ctx) })
}

func copying(ctx context.Context, from Config, log *slog.Logger, f func(upkeep.Copying) error) error {
	source, err := New(from, log)
	if err != nil {
		return err
	}
	return source.offline(ctx, func(opened builtin.OpenStore, c upkeep.Config) error {
		return f(upkeep.Copying{From: side(opened), TrustDomain: c.TrustDomain})
	})
}

func side(st builtin.OpenStore) upkeep.Side {
	place := st.Kind + " at " + st.Address
	if st.Dir != "" {
		place = st.Kind + " in " + st.Dir
	}
	return upkeep.Side{Store: st, Place: place, Shared: st.Shared}
}

// recordCopy notes a copy in the audit trail, if this machine has the server's.
func recordCopy(dataDir string, done *upkeep.Copied, log *slog.Logger) error {
	path := filepath.Join(dataDir, "audit.log")
	if _, err := os.Lstat(path); err != nil {
		log.WarnContext(context.Background(), "the copy is not on record: there is no audit trail here", "dir", dataDir)
		return nil
	}
	id, err := serverID(dataDir)
	if err != nil {
		return err
	}
	trail, err := audit.Open(audit.Config{Path: path, Server: id, Version: Version, Log: log})
	if err != nil {
		return err
	}
	trail.Note(audit.Change{Caller: "operator", Position: done.From.String(), Key: registry.CopiedAway, Value: done.Digest})
	return trail.Close()
}
