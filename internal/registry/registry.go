// Package registry is the trust domain in memory: every entry, node, token,
// bundle and signing key, folded from the store's log of changes. It answers
// all reads, plans transactions, knows which agents a change affects and tells
// their followers. What may be written is decided by its callers (the engines
// and the wires), except for what must hold in every row: valid entries, unique
// contents, one trust domain per store.
//
// What must always hold: the state is the fold of the log up to its position,
// nothing more and nothing less; a reader sees one position; a row that cannot
// be read disturbs no other.
//
// plan, apply and all that they use are pure: only run.go and load.go have loops.
package registry

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Registry is the trust domain in memory. Its methods may be called concurrently.
type Registry struct {
	store store.Store
	td    spiffeid.TrustDomain
	log   *slog.Logger

	jobs     chan *job     // to the commit loop
	stopped  chan struct{} // closed when Run has ended
	turn     chan struct{} // room for one: held by an update that others keep colliding with
	answered chan struct{} // room for one: a commit went well, so following the log may as well
	afresh   chan struct{} // room for one: all is to be loaded again

	bodies  bodyCache
	reloads atomic.Uint64

	// mu guards what is below: many readers, and the watch loop as the writer.
	mu        sync.RWMutex
	state     *state
	moved     chan struct{}                     // closed and replaced when the position moves
	followers map[string]map[*Follower]struct{} // by agent path
	woken     map[*Follower]struct{}            // by the batch that is being applied
	touches   touches
	batches   []func(store.Batch)
}

// Open loads everything from the store. A store that belongs to another trust
// domain is refused (R122); one that is away or busy is asked again for half a
// minute. Changes are seen and made only while Run runs.
func Open(ctx context.Context, st store.Store, td spiffeid.TrustDomain, log *slog.Logger) (*Registry, error) {
	r := &Registry{
		store: st, td: td, log: log,
		jobs: make(chan *job), stopped: make(chan struct{}), turn: make(chan struct{}, 1),
		answered: make(chan struct{}, 1), afresh: make(chan struct{}, 1),
		moved:     make(chan struct{}),
		followers: make(map[string]map[*Follower]struct{}),
		woken:     make(map[*Follower]struct{}),
	}
	s, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	r.state = s
	r.touches.forget(s.position.Revision)
	return r, nil
}

// foreign says whose store this is, if not ours.
func (s *state) foreign() error {
	for _, bad := range s.bad {
		if fault.ReasonOf(bad.err) == "trust_domain_changed" {
			return bad.err
		}
	}
	// Nothing names the owner, but bundles are there: the own one is the first
	// that a server writes.
	bundles := s.values[kindBundle]
	if s.claimed() || len(bundles) == 0 {
		return nil
	}
	if _, own := bundles[s.td.Name()]; own {
		return nil
	}
	for name := range bundles {
		return foreignStore(name, s.td)
	}
	return nil
}

// claimed reports whether it is written down which trust domain this is.
func (s *state) claimed() bool {
	_, claimed := s.values[kindTrustDomain][""]
	return claimed
}

// claim writes down which trust domain the store belongs to.
func (r *Registry) claim(ctx context.Context) error {
	raw, err := seal(serverMessage(r.td, &Server{}), oldestFormat)
	if err != nil {
		return err
	}
	key := prefixOf(kindTrustDomain)
	result := r.store.Commit(ctx, []store.Txn{{
		Caller:     "registry",
		Conditions: []store.Condition{{Key: key}},
		Puts:       []store.Put{{Key: key, Value: raw}},
	}})[0]
	if result.Err != nil && fault.KindOf(result.Err) != fault.Conflict {
		return fmt.Errorf("claim the store: %w", result.Err)
	}
	return nil
}

// View calls f with the current state. f must be short and must not call the
// registry: writers wait for it.
func (r *Registry) View(f func(*Snapshot)) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	f(&Snapshot{r.state})
}

// Position returns how far the log has been applied.
func (r *Registry) Position() store.Position {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.state.position
}

// Reloads counts how often everything was loaded anew since Open.
func (r *Registry) Reloads() uint64 { return r.reloads.Load() }

// Batches calls f with every batch from now on, in order, after it was applied;
// it is the watch loop that calls, so f must be quick. When the registry had to
// load afresh, because it could not follow the log, f gets a batch without
// writes whose Prev is zero.
func (r *Registry) Batches(f func(store.Batch)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.batches = append(r.batches, f)
}

// fold applies a batch and tells who is affected.
func (r *Registry) fold(b store.Batch) error {
	r.mu.Lock()
	r.state.apply(b, r.observe, r.touches.wrote)
	r.touches.folded(b.Position.Revision)
	r.announceLocked()
	batches, err := r.batches, r.state.newer()
	r.mu.Unlock()
	for _, f := range batches {
		f(b)
	}
	return err
}

// replace puts a freshly loaded state into the place of the current one.
func (r *Registry) replace(s *state) {
	r.reloads.Add(1)
	r.mu.Lock()
	r.state = s
	r.touches.forget(s.position.Revision)
	for _, of := range r.followers {
		for f := range of {
			f.look()
			r.woken[f] = struct{}{}
		}
	}
	r.announceLocked()
	batches := r.batches
	r.mu.Unlock()
	for _, f := range batches {
		f(store.Batch{Position: s.position})
	}
}

// announceLocked wakes those who wait for the position or for changes.
func (r *Registry) announceLocked() {
	close(r.moved)
	r.moved = make(chan struct{})
	for f := range r.woken {
		f.notify()
	}
	clear(r.woken)
}
