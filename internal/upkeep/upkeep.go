// Package upkeep looks after a store, beside the server that uses it or without
// one: it measures it, proves it, drops what of its log nobody needs, and copies
// it into another. It decides what is kept and in which order things are done;
// what a row means and what is wrong with one is known to registry, how a store
// works to its engine.
//
// What must always hold: nothing of what is live is changed, except by a repair
// that was asked for and follows from the other rows; no server starts on a copy
// before it is whole, nor on what was copied away.
package upkeep

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// What of the log is kept: a watcher that was away for less goes on from where it
// was, one that was away for longer loads everything.
const (
	KeepBatches = 10_000
	KeepAge     = time.Hour
	every       = 10 * time.Minute // with jitter, so that several servers take turns
)

// Config says what is looked after.
type Config struct {
	Store       store.Store
	TrustDomain spiffeid.TrustDomain
	Registry    *registry.Registry // that the server serves from; nil: none is running here
	Intact      func() error       // the engine's own check; nil: it has none
	Trail       string             // path of this server's audit trail
	Log         *slog.Logger
}

// Upkeep looks after one store. Its methods may be called concurrently.
type Upkeep struct {
	Config
	busy sync.Mutex // held by the one Check that is under way
}

// New returns what looks after a store.
func New(c Config) *Upkeep { return &Upkeep{Config: c} }

// Stats is what there is in a store.
type Stats struct {
	store.Stats
	Kinds map[string]Kind
}

// Kind is what there is of one kind of row.
type Kind struct {
	Rows  uint64
	Bytes uint64 // of keys and values
}

// Stats measures the store. It reads every row.
func (u *Upkeep) Stats(ctx context.Context) (Stats, error) {
	out := Stats{Kinds: map[string]Kind{}}
	_, err := u.Store.Load(ctx, func(key string, _ uint64, value []byte) error {
		k := out.Kinds[registry.KindOf(key)]
		k.Rows++
		k.Bytes += uint64(len(key) + len(value))
		out.Kinds[registry.KindOf(key)] = k
		return nil
	})
	if err == nil {
		out.Stats, err = u.Store.Stats(ctx)
	}
	return out, err
}

// Compact drops the log's batches that were written longer ago than age, except
// for the newest keep, and returns up to where the log is gone now. Several
// servers may do it at once: what one has dropped the other finds dropped.
func (u *Upkeep) Compact(ctx context.Context, keep uint64, age time.Duration) (store.Position, error) {
	to, err := u.Store.Compactable(ctx, keep, time.Now().Add(-age))
	if err != nil {
		return store.Position{}, err
	}
	st, err := u.Store.Stats(ctx)
	if err != nil || to <= st.Begin.Revision {
		return st.Begin, err
	}
	if err := u.Store.Compact(ctx, to); err != nil {
		return store.Position{}, err
	}
	return store.Position{Epoch: st.Begin.Epoch, Revision: to}, nil
}
