package registry

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

const (
	visibleWithin = 2 * time.Second // how long Update waits for its own change (R76)
	maxReruns     = 64              // of one closure, after conflicts
	turnAfter     = 3               // conflicts, after which a closure waits for its turn
	maxCollected  = 4 * store.MaxGroup
	backoffFirst  = 50 * time.Millisecond
	backoffMost   = 5 * time.Second
	corruptMost   = time.Minute            // the same when the log makes no sense, and all is loaded each time
	backoffSoon   = 250 * time.Millisecond // after a commit that went well: the store is there
)

// job is a transaction on its way to the commit loop. result has room, so the
// loop never waits for whoever asked.
type job struct {
	txn    store.Txn
	result chan store.Result
}

// Run commits transactions and applies what the log brings, until ctx is done. It
// ends with a fault when newer servers write what this version cannot read.
func (r *Registry) Run(ctx context.Context) error {
	defer close(r.stopped)
	loops, stop := context.WithCancel(ctx)
	defer stop()
	var committing sync.WaitGroup
	committing.Go(func() { r.commit(loops) })
	err := r.watch(loops)
	stop()
	committing.Wait()
	return err
}

// Update runs f over the current state and commits what it asks for, again
// after a conflict, so f may run several times; it must not block or call the
// registry. That something is not there, or is there already, is not said before
// the store has confirmed it: another server's change may not be seen here yet,
// and what it was told must hold (R74). Update returns once this replica shows
// the change: a fault "committed_not_visible" says that it is durable but not
// seen here yet, and comes with its position. A closure that writes nothing
// commits nothing.
func (r *Registry) Update(ctx context.Context, caller string, f func(*Tx) error) (store.Position, error) {
	for run := range maxReruns {
		if run == turnAfter { // those that keep colliding go one after the other
			select {
			case r.turn <- struct{}{}:
				defer func() { <-r.turn }()
			case <-ctx.Done():
				return store.Position{}, fmt.Errorf("wait to commit: %w", ctx.Err())
			}
		}
		r.mu.RLock()
		at := r.state.position
		copied := r.state.copied()
		txn, no := plan(r.state, caller, f)
		r.mu.RUnlock()
		if copied != nil {
			return store.Position{}, copied
		}
		changes := len(txn.Puts) + len(txn.Deletes)
		switch {
		case changes+len(txn.Conditions) > 0:
		case no != nil:
			return store.Position{}, no
		default:
			return at, nil
		}
		result, err := r.submit(ctx, txn)
		if err != nil {
			return store.Position{}, err
		}
		switch {
		case result.Err == nil && no != nil:
			return store.Position{}, no
		case result.Err == nil && changes == 0:
			return at, nil
		case result.Err == nil:
			if !r.waitFor(ctx, result.Position) {
				return result.Position, fault.New(fault.Unavailable, "committed_not_visible",
					"the change is committed at revision %d but not yet visible here", result.Position.Revision).
					Fix("read again in a moment; do not repeat the change")
			}
			r.note(ctx, result.Position, &txn)
			return result.Position, nil
		case fault.KindOf(result.Err) != fault.Conflict:
			return store.Position{}, fmt.Errorf("commit: %w", result.Err)
		case !r.waitFor(ctx, result.Position):
			return store.Position{}, errBehind()
		}
	}
	return store.Position{}, fault.New(fault.Conflict, "too_busy", "others changed the same rows %d times meanwhile", maxReruns).Fix("try again")
}

// submit hands a transaction to the commit loop and waits for its result.
func (r *Registry) submit(ctx context.Context, txn store.Txn) (store.Result, error) {
	j := &job{txn: txn, result: make(chan store.Result, 1)}
	stopped := fault.New(fault.Unavailable, "registry_stopped", "the server is shutting down")
	select {
	case r.jobs <- j:
	case <-r.stopped:
		return store.Result{}, stopped
	case <-ctx.Done():
		return store.Result{}, fmt.Errorf("wait to commit: %w", ctx.Err())
	}
	// Once handed over it may become durable whatever the caller does, and the
	// loop answers every job that it took.
	return <-j.result, nil
}

// Reach waits until this replica shows what was committed, by whichever server: 2 s at
// most, then it fails (R76). A position of another epoch is nothing to wait for.
func (r *Registry) Reach(ctx context.Context, p store.Position) error {
	switch {
	case p.Epoch != r.Position().Epoch:
		return receiptUnknown(p)
	case !r.waitFor(ctx, p):
		return errBehind()
	}
	return nil
}

func errBehind() error {
	return fault.New(fault.Unavailable, "registry_behind", "this server has not yet seen the change that this call would follow").Fix("try again")
}

// waitFor waits until the position has been applied. It counts ticks: time in which
// the whole machine stood still is one, however long it was.
func (r *Registry) waitFor(ctx context.Context, p store.Position) bool {
	const ticks = 20
	tick := time.NewTicker(visibleWithin / ticks)
	defer tick.Stop()
	for waited := 0; ; {
		r.mu.RLock()
		at, moved := r.state.position, r.moved
		r.mu.RUnlock()
		if at.Epoch == p.Epoch && at.Revision >= p.Revision {
			return true
		}
		if waited == ticks {
			return false
		}
		select {
		case <-moved:
		case <-tick.C:
			waited++
		case <-ctx.Done():
			return false
		}
	}
}

// commit gives the store all transactions that are waiting, together.
func (r *Registry) commit(ctx context.Context) {
	for {
		var taken []*job
		select {
		case j := <-r.jobs:
			taken = append(taken, j)
		case <-ctx.Done():
			return
		}
	collect:
		for len(taken) < maxCollected {
			select {
			case j := <-r.jobs:
				taken = append(taken, j)
			default:
				break collect
			}
		}
		txns := make([]store.Txn, len(taken))
		for i, j := range taken {
			txns[i] = j.txn
		}
		// What was begun is finished, so that nobody is told too little at shutdown (R102).
		for i, result := range r.store.Commit(context.WithoutCancel(ctx), txns) {
			taken[i].result <- result
			if result.Err == nil {
				select {
				case r.answered <- struct{}{}:
				default:
				}
			}
		}
	}
}

// watch applies the log, batch by batch, and loads afresh when it cannot go on
// from where it stands.
func (r *Registry) watch(ctx context.Context) error {
	wait := backoffFirst
	for ctx.Err() == nil {
		err := r.follow(ctx, &wait)
		if ctx.Err() != nil {
			return nil
		}
		most, answered, level := backoffMost, r.answered, slog.LevelWarn
		switch reason := fault.ReasonOf(err); reason {
		case "epoch_changed", "compacted", "position_unknown", "log_hole", "store_corrupt", "state_differs":
			// A batch that makes no sense will not come to make some: what the store
			// holds now counts, and the log from there.
			if reason == "store_corrupt" {
				most, answered, level = corruptMost, nil, slog.LevelError
			}
			r.log.Log(ctx, level, "loading the registry afresh", "position", r.Position().String(), "err", err)
			var s *state
			if s, err = r.load(ctx); err == nil {
				r.replace(s) // the old state served until here (RG9)
				if reason == "epoch_changed" {
					wait = backoffFirst // an outage that came before is over
				}
			}
		}
		if fault.ReasonOf(err) == newerFormat {
			return err
		}
		if err != nil {
			r.log.ErrorContext(ctx, "following the store's log", "err", err, "next", wait.String())
		}
		select {
		case <-time.After(wait/2 + rand.N(wait/2)):
			wait = min(2*wait, most)
		case <-answered:
			wait = backoffSoon
			select {
			case <-time.After(wait):
			case <-ctx.Done():
			}
		case <-ctx.Done():
		}
	}
	return nil
}

// Reload has everything loaded afresh, as if the log could not be followed: other
// servers hold something else at the same position (R78).
func (r *Registry) Reload() {
	select {
	case r.afresh <- struct{}{}:
	default: // it is asked for already
	}
}

// follow applies batches until the store says that it cannot go on, or somebody asks
// for the state to be loaded afresh.
func (r *Registry) follow(ctx context.Context, wait *time.Duration) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	var listening sync.WaitGroup
	listening.Go(func() {
		select {
		case <-r.afresh:
			cancel(fault.New(fault.Precondition, "state_differs", "other servers hold something else at the same position"))
		case <-ended:
		}
	})
	defer func() {
		close(ended)
		listening.Wait() // or what was asked for at this moment would be lost
		if fault.ReasonOf(context.Cause(ctx)) == "state_differs" {
			err = context.Cause(ctx)
		}
		cancel(nil)
	}()
	at := r.Position()
	for b, err := range r.store.Watch(ctx, at) {
		if err != nil {
			return err
		}
		if b.Prev != at || b.Position.Epoch != at.Epoch || b.Position.Revision <= at.Revision {
			return fault.New(fault.Precondition, "log_hole", "the log goes on at %v, after %v, but this is %v", b.Position, b.Prev, at)
		}
		if err := r.fold(b); err != nil {
			return err
		}
		at = b.Position
		*wait = backoffFirst
	}
	return fault.New(fault.Unavailable, "watch_ended", "the store stopped to report changes")
}
