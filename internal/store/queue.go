package store

import (
	"context"
	"slices"
	"sync"

	"github.com/plastron/plastron/internal/fault"
)

// Queue gathers the calls of an engine's Commit for the one loop that writes them,
// group by group. Its methods but Run may be called concurrently.
type Queue struct {
	wake chan struct{} // capacity 1

	// mu guards what follows.
	mu      sync.Mutex
	waiting []*call
	closed  bool
}

// call is one call of Commit. The loop owns results and left from the moment it is
// taken until done is closed.
type call struct {
	ctx     context.Context
	txns    []Txn
	results []Result
	left    int  // transactions without a result
	taken   bool // guarded by Queue.mu
	done    chan struct{}
}

// NewQueue returns an empty queue.
func NewQueue() *Queue { return &Queue{wake: make(chan struct{}, 1)} }

// Closed is the fault of every call after Close.
func Closed() error { return fault.New(fault.Unavailable, "closed", "the store is closed") }

// Commit is Store.Commit. Transactions of concurrent calls share groups. When ctx
// ends before the loop has taken the call, nothing of it is written ("canceled");
// later, what was not yet judged is not written and the call returns at once with
// "outcome_unknown" for all.
func (q *Queue) Commit(ctx context.Context, txns []Txn) []Result {
	c := newCall(ctx, txns)
	if c.left == 0 {
		return c.results
	}
	if err := c.given(); err != nil {
		return c.refuse(err)
	}
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return c.refuse(Closed())
	}
	q.waiting = append(q.waiting, c)
	q.mu.Unlock()
	q.poke()

	select {
	case <-c.done:
		return c.results
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if !c.taken {
		q.waiting = slices.DeleteFunc(q.waiting, func(w *call) bool { return w == c })
		return c.refuse(c.given())
	}
	select {
	case <-c.done:
		return c.results
	default: // the loop still writes to c.results: answer with others
		return newCall(ctx, txns).refuse(fault.New(fault.Unavailable, "outcome_unknown", "the commit was given up while it was written").
			Fix("look whether it is there before trying again").Because(ctx.Err()))
	}
}

// Close refuses calls from now on; Run ends when it has answered those before.
func (q *Queue) Close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.poke()
}

func (q *Queue) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// Pending is one transaction that Run hands out.
type Pending struct {
	Txn      *Txn
	Answered bool
	call     *call
	i        int
}

// Answer fills in the result.
func (p *Pending) Answer(at Position, err error) {
	p.call.results[p.i] = Result{Position: at, Err: err}
	p.Answered = true
}

// Given is a fault ("canceled") if whoever asked waits no longer.
func (p *Pending) Given() error { return p.call.given() }

// Run hands groups to commit until Close, and tells each call as soon as its last
// transaction has its result. commit answers every transaction of its group; an
// error says that the engine does not answer, so that what else was waiting gets
// that error at once instead of waiting for it, too. fits, which may be nil, says
// how many transactions of a group, one at least, can be committed together.
func (q *Queue) Run(fits func([]Txn) int, commit func([]Pending) error) {
	for range q.wake {
		for {
			q.mu.Lock()
			calls, closed := q.waiting, q.closed
			q.waiting = nil
			for _, c := range calls {
				c.taken = true
			}
			q.mu.Unlock()
			if len(calls) > 0 {
				commitAll(calls, fits, commit)
			} else if closed {
				return
			} else {
				break
			}
		}
	}
}

func commitAll(calls []*call, fits func([]Txn) int, commit func([]Pending) error) {
	var txns []Txn
	var all []Pending
	for _, c := range calls {
		for i := range c.txns {
			if c.results[i].Err == nil {
				txns = append(txns, c.txns[i])
				all = append(all, Pending{Txn: &c.txns[i], call: c, i: i})
			}
		}
	}
	var away error
	for len(txns) > 0 {
		n := len(Groups(txns[:min(len(txns), MaxGroup)])[0])
		if fits != nil {
			n = fits(txns[:n])
		}
		group := all[:n]
		if away == nil {
			away = commit(group)
		} else {
			for i := range group {
				group[i].Answer(Position{}, away)
			}
		}
		for i := range group {
			c := group[i].call
			if c.left--; c.left == 0 {
				close(c.done)
			}
		}
		txns, all = txns[n:], all[n:]
	}
}

// newCall judges each transaction by itself.
func newCall(ctx context.Context, txns []Txn) *call {
	c := &call{ctx: ctx, txns: txns, results: make([]Result, len(txns)), done: make(chan struct{})}
	for i := range txns {
		if err := txns[i].Validate(); err != nil {
			c.results[i].Err = err
		} else {
			c.left++
		}
	}
	return c
}

func (c *call) given() error {
	if err := c.ctx.Err(); err != nil {
		return fault.New(fault.Unavailable, "canceled", "the commit was given up, nothing was written").Because(err)
	}
	return nil
}

// refuse gives err to every transaction that has no error of its own.
func (c *call) refuse(err error) []Result {
	for i := range c.results {
		if c.results[i].Err == nil {
			c.results[i].Err = err
		}
	}
	return c.results
}
