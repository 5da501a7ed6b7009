package servers

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Caller is who writes beats, in the batches of the log; the start, the end and
// what is removed of others have callers of their own, for they are on record.
const Caller = "plastron beat"

const (
	startCaller = "plastron start"
	stopCaller  = "plastron stop"
	pruneCaller = "plastron servers"

	gatherWait = 3 * time.Second

	startPatience = 30 * time.Second // with a store that takes nothing

	look = time.Second // while a former life's lease runs out: timers do not count sleep
)

// Config is what the engine works with.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	ID          string // of this server, kept with its data
	Registry    *registry.Registry
	// Shared says that other servers can use the store at the same time.
	Shared bool
	// Lease is for how long this server may sign without its store; MinLease at least.
	Lease   time.Duration
	Place   registry.Place // where its identity is kept, locked by this process
	Version string
	Started time.Time
	// Report says what goes into the row besides; nil: nothing.
	Report func() Report
	// Differs is told when another server is found to hold something else; nil: nobody is.
	Differs func()
	// Intruder is told when a server that is expelled writes all the same; nil: nobody is.
	Intruder func(id string)
	// Boot is a clock that counts a machine's sleep and cannot be set.
	Boot func() time.Duration
	Log  *slog.Logger
}

// Report is what a server says of its agents.
type Report struct {
	Addresses    []string
	Agents       int
	Position     store.Position // at which all this is so
	Acknowledged uint64         // what they all hold but the laggards
	Laggards     []registry.Laggard
	Ends         registry.Ends
	Roster       []uint64 // hashes of those that belong to it, ascending; see registry.AgentHash
}

// Servers turns the machine. All methods may be called concurrently.
type Servers struct {
	cfg  Config
	wake chan struct{} // room for one: something was folded or is asked for

	// mu guards everything below.
	mu      sync.Mutex
	machine *machine
	folded  chan struct{} // closed, and replaced, when a row was folded
	clockOK bool          // as it was logged last
	freshOK bool
}

// New returns an engine that has taken nothing yet.
func New(cfg Config) *Servers {
	instance := make([]byte, 16)
	rand.Read(instance) // never fails (crypto/rand)
	return &Servers{
		cfg: cfg, wake: make(chan struct{}, 1), folded: make(chan struct{}), clockOK: true, freshOK: true,
		machine: newMachine(settings{
			id: cfg.ID, shared: cfg.Shared, lease: max(cfg.Lease, MinLease), instance: instance, began: cfg.Boot(),
		}),
	}
}

// MaySign says why this server may not sign, or nil. It is asked before each signature.
func (s *Servers) MaySign(now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machine.maySign(now, s.cfg.Boot())
}

// MayPrune says why this server may not remove what time has ended, or nil: by
// a clock that is off, or from a state that is old, nothing is removed (R70).
func (s *Servers) MayPrune(now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machine.mayPrune(now, s.cfg.Boot())
}

// Fresh is how long ago this server's view of the trust domain was surely
// complete: since its last own beat that came back from the store.
func (s *Servers) Fresh() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machine.fresh(s.cfg.Boot())
}

// Stale says that the view is too old to grant from what was not granted before, or nil (R77).
func (s *Servers) Stale() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machine.stale(s.cfg.Boot())
}

// LeaseLeft is for how long this server may still sign without its store; limited
// is false with a store that it has for itself.
func (s *Servers) LeaseLeft() (left time.Duration, limited bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(0, s.machine.leaseLeft(s.cfg.Boot())), s.cfg.Shared
}

// Clock is by how much the own clock is ahead, and whose is taken for right.
func (s *Servers) Clock(now time.Time) (ahead time.Duration, by string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.machine.clock(now, s.cfg.Boot())
	return r.ahead, r.by
}

// Others returns what is known of the other servers, by id.
func (s *Servers) Others() []Other {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machine.others(time.Now(), s.cfg.Boot())
}

// Poke has a beat written soon, once a second at most.
func (s *Servers) Poke() {
	s.mu.Lock()
	s.machine.poked = true
	s.mu.Unlock()
	s.stir()
}

// Gather has the live servers write their rows anew, and returns once they are here:
// within two seconds as a rule, three at most. It costs nobody anything but then.
func (s *Servers) Gather(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, gatherWait)
	defer cancel()
	s.mu.Lock()
	before := map[string]uint64{}
	for id, p := range s.machine.peers {
		if s.machine.alive(p, s.cfg.Boot()) {
			before[id] = p.row.Beat
		}
	}
	if len(before) > 0 {
		s.machine.asks++
		s.machine.poked = true
	}
	s.mu.Unlock()
	s.stir()
	for {
		s.mu.Lock()
		folded := s.folded
		maps.DeleteFunc(before, func(id string, beat uint64) bool {
			p := s.machine.peers[id]
			return p == nil || p.row.Beat != beat
		})
		s.mu.Unlock()
		if len(before) == 0 {
			return
		}
		select {
		case <-folded:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Servers) stir() {
	select {
	case s.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// Start takes the row of this server, or refuses (R68). It may have to wait for
// the lease of a former life. The registry must be running. Nothing may be
// signed before Start has returned.
func (s *Servers) Start(ctx context.Context) error {
	s.cfg.Registry.Batches(s.batch)
	s.reload()
	if err := s.take(ctx); err != nil {
		return err
	}
	return s.hear(ctx)
}

// take waits until the identity is free and writes the first beat.
func (s *Servers) take(ctx context.Context) error {
	told := false
	var failing time.Time // since when
	for {
		row := s.row(s.cfg.ID)
		s.mu.Lock()
		v := s.machine.judge(row, s.cfg.Place, s.cfg.Boot())
		waiting := s.machine.maySign(time.Now(), s.cfg.Boot())
		s.mu.Unlock()
		wait := v.until - s.cfg.Boot()
		switch {
		case v.err != nil:
			return v.err
		case v.until == 0:
			err := s.beat(ctx, startCaller)
			switch {
			case err == nil:
				return nil
			case fault.ReasonOf(err) == "server_row_moved":
				continue
			case fault.ReasonOf(err) == "server_expelled":
				return err
			case !s.cfg.Shared:
				// Holding the store is the lease; what is granted is signed without the row.
				s.cfg.Log.WarnContext(ctx, "the row of this server is not written", "err", err)
				s.Poke()
				return nil
			case !fault.Passing(err) || !failing.IsZero() && time.Since(failing) >= startPatience:
				return fmt.Errorf("take the identity of this server: %w", err)
			case failing.IsZero(): // a busy store, or one that fails over, ends no start
				failing = time.Now()
				s.cfg.Log.WarnContext(ctx, "beat not written", "err", err)
			}
			wait = look
		case !told:
			told = true
			s.cfg.Log.WarnContext(ctx, "waiting for the lease of a former life to end", "id", s.cfg.ID, "err", waiting)
		}
		if err := s.pause(ctx, min(look, wait)); err != nil {
			return fmt.Errorf("wait for the lease of a former life: %w", err)
		}
	}
}

// hear waits for the clocks of the other servers.
func (s *Servers) hear(ctx context.Context) error {
	for {
		s.mu.Lock()
		wait := s.machine.hearing(s.cfg.Boot())
		s.mu.Unlock()
		if wait == 0 {
			return s.MaySign(time.Now())
		}
		if err := s.pause(ctx, wait); err != nil {
			return fmt.Errorf("wait for the other servers: %w", err)
		}
	}
}

// pause waits until something happens, or for a while.
func (s *Servers) pause(ctx context.Context, most time.Duration) error {
	timer := time.NewTimer(max(most, time.Millisecond))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-s.wake:
	case <-timer.C:
	}
	return nil
}

// Run writes beats and removes what vanished servers left, until ctx is done or
// another process has taken over the identity of this server.
func (s *Servers) Run(ctx context.Context) error {
	for {
		s.tell(ctx)
		s.mu.Lock()
		out := s.machine.rival != nil || s.machine.expelled != nil
		act, wait := s.machine.due(s.cfg.Boot())
		s.mu.Unlock()
		switch {
		case ctx.Err() != nil:
			return nil
		case out:
			return s.MaySign(time.Now())
		case act == write:
			if err := s.beat(ctx, Caller); err != nil && ctx.Err() == nil {
				s.cfg.Log.WarnContext(ctx, "beat not written", "err", err)
			}
		case act == evict:
			s.evict(ctx)
		case act == clear:
			if err := s.prune(ctx); err != nil && ctx.Err() == nil {
				s.cfg.Log.WarnContext(ctx, "what vanished servers left is not removed", "err", err)
			}
		default:
			_ = s.pause(ctx, wait)
		}
	}
}

// Stop gives the right to sign back, so that whoever comes next need not wait.
// It comes after the last signature.
func (s *Servers) Stop(ctx context.Context) error {
	s.mu.Lock()
	s.machine.stopped = true
	taken := s.machine.first != 0 && s.machine.rival == nil && s.machine.expelled == nil
	s.mu.Unlock()
	if !taken {
		return nil
	}
	if err := s.beat(ctx, stopCaller); err != nil && fault.ReasonOf(err) != "committed_not_visible" {
		return fmt.Errorf("give the lease back: %w", err)
	}
	return nil
}

// beat writes the row once.
func (s *Servers) beat(ctx context.Context, caller string) error {
	// First, so that what happens after the report was made asks for another beat.
	s.mu.Lock()
	s.machine.try(s.cfg.Boot())
	s.mu.Unlock()
	say := registry.Server{Version: s.cfg.Version, StartedAt: s.cfg.Started, Place: s.cfg.Place, Reads: registry.Format}
	var r Report
	if s.cfg.Report != nil {
		r = s.cfg.Report()
		say.Addresses, say.Agents, say.Acknowledged = r.Addresses, r.Agents, r.Acknowledged
		say.Ends = r.Ends
		say.Laggards = r.Laggards[:min(len(r.Laggards), registry.MaxLaggards)]
	}
	_, err := s.cfg.Registry.Update(ctx, caller, func(tx *registry.Tx) error {
		if err := tx.StillIn(s.cfg.ID); err != nil {
			return err
		}
		stored, err := optional(tx.Server(s.cfg.ID))
		if err != nil {
			return err
		}
		snap := tx.Snapshot()
		say.Position, say.Digest = snap.Position(), snap.Digest()
		if say.Position.Epoch != r.Position.Epoch { // of what was acknowledged, nothing is known now
			say.Acknowledged, say.Laggards = 0, nil
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		say.Asks = s.machine.asks
		row, err := s.machine.next(stored, say, time.Now(), s.cfg.Boot())
		if err != nil {
			return err
		}
		if s.cfg.Report == nil {
			return tx.PutServer(row)
		}
		return errors.Join(tx.PutServer(row), tx.PutRoster(s.cfg.ID, r.Roster))
	})
	if err == nil {
		s.fold(s.row(s.cfg.ID), false) // the watch may not have come to it yet
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.machine.tried(err)
	return err
}

// row returns the row of a server as it is now, or nil.
func (s *Servers) row(id string) (row *registry.Server) {
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		if found, err := snap.Server(id); err == nil {
			row = &found
		}
	})
	return row
}

// fold takes note of a row.
func (s *Servers) fold(row *registry.Server, live bool) {
	if row == nil {
		return
	}
	s.mu.Lock()
	s.machine.fold(row, s.cfg.Boot(), live)
	close(s.folded)
	s.folded = make(chan struct{})
	s.mu.Unlock()
	s.stir()
}

// batch takes note of what the log brings. It is called by the registry.
func (s *Servers) batch(b store.Batch) {
	if len(b.Writes) == 0 { // loaded afresh
		s.reload()
		return
	}
	for _, w := range b.Writes {
		for _, c := range w.Changes {
			if strings.HasPrefix(c.Key, "/expelled/") {
				s.learn()
			} else if name, ok := strings.CutPrefix(c.Key, "/authority/"); ok && !c.Deleted {
				s.wrote(name)
			}
			if id, ok := strings.CutPrefix(c.Key, "/server/"); ok && !c.Deleted {
				s.fold(s.row(id), true)
			} else if ok {
				s.mu.Lock()
				s.machine.forget(id)
				s.mu.Unlock()
			}
		}
	}
	s.note()
}

// reload takes note of everything, after a load.
func (s *Servers) reload() {
	s.learn()
	var rows []registry.Server
	s.cfg.Registry.View(func(snap *registry.Snapshot) { rows = snap.Servers() })
	s.mu.Lock()
	s.machine.unlearn()
	for id := range s.machine.peers {
		if !slices.ContainsFunc(rows, func(r registry.Server) bool { return r.ID == id }) {
			s.machine.forget(id)
		}
	}
	s.mu.Unlock()
	for i := range rows {
		s.fold(&rows[i], false)
	}
	s.note()
}

// note remembers the digest at the position that was reached.
func (s *Servers) note() {
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.machine.past.note(snap.Position(), snap.Digest())
	})
}

// tell logs when the clock or the view becomes bad or good, and mends what others hold
// differently.
func (s *Servers) tell(ctx context.Context) {
	now := time.Now()
	s.mu.Lock()
	clock, stale := s.machine.checkClock(now, s.cfg.Boot(), maxSkew), s.machine.stale(s.cfg.Boot())
	clockTurned, freshTurned := s.clockOK != (clock == nil), s.freshOK != (stale == nil)
	s.clockOK, s.freshOK = clock == nil, stale == nil
	differing, strays := s.machine.differing(), s.machine.strays(s.cfg.Boot())
	s.mu.Unlock()
	for _, id := range differing {
		s.cfg.Log.ErrorContext(ctx, "another server holds something else at the same position", "id", id)
		if s.cfg.Differs != nil {
			s.cfg.Differs()
		}
	}
	if strays { // R78
		s.cfg.Registry.Reload()
	}
	switch {
	case clockTurned && clock != nil:
		s.cfg.Log.ErrorContext(ctx, "the clock is off", "reason", fault.ReasonOf(clock), "err", clock)
	case clockTurned:
		s.cfg.Log.InfoContext(ctx, "the clock is right again")
	}
	switch {
	case freshTurned && stale != nil:
		s.cfg.Log.ErrorContext(ctx, "the state is stale", "reason", fault.ReasonOf(stale), "err", stale)
	case freshTurned:
		s.cfg.Log.InfoContext(ctx, "the state is fresh again")
	}
}

// prune removes what servers that are gone have left and nobody needs any more.
func (s *Servers) prune(ctx context.Context) error {
	estates := map[string]estate{}
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		own, err := snap.Bundle(s.cfg.TrustDomain)
		if err != nil {
			return // there are no authorities
		}
		for _, r := range snap.Servers() {
			estates[r.ID] = estate{row: &r, bundle: own}
		}
		for _, a := range snap.Authorities("") {
			e := estates[a.Server]
			e.authorities, e.bundle = append(e.authorities, a), own
			estates[a.Server] = e
		}
	})
	delete(estates, s.cfg.ID)
	s.mu.Lock()
	s.machine.looked = s.cfg.Boot()
	for id, e := range estates { // without asking the store
		if left := s.machine.settle(id, e, time.Now(), s.cfg.Boot()); left.empty() {
			delete(estates, id)
		}
	}
	s.mu.Unlock()
	var errs []error
	for id := range estates {
		if _, err := s.cfg.Registry.Update(ctx, pruneCaller, func(tx *registry.Tx) error { return s.remove(tx, id) }); err != nil {
			errs = append(errs, fmt.Errorf("server %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// remove removes what one server left, its authorities and the change of the
// bundle in one transaction, on condition that the server does not come back.
func (s *Servers) remove(tx *registry.Tx, id string) error {
	e, err := s.estateOf(tx, id)
	if err != nil {
		return err
	}
	s.mu.Lock()
	left := s.machine.settle(id, e, time.Now(), s.cfg.Boot())
	s.mu.Unlock()
	for _, kind := range left.kinds {
		if err := tx.DeleteAuthority(id, kind); err != nil {
			return err
		}
	}
	if left.row {
		if err := tx.DeleteServer(id); err != nil {
			return err
		}
		if err := tx.DeleteRoster(id); err != nil && fault.KindOf(err) != fault.NotFound {
			return err
		}
	}
	if left.bundle.Sequence == e.bundle.Sequence {
		return nil
	}
	return tx.PutBundle(left.bundle)
}

func optional[T any](row T, err error) (*T, error) {
	switch {
	case err == nil:
		return &row, nil
	case fault.KindOf(err) == fault.NotFound:
		return nil, nil
	}
	return nil, err
}
