package etcd

import (
	"context"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// request is one call of Commit. The commit loop owns results and left from the
// moment it is taken until done is closed.
type request struct {
	ctx     context.Context
	txns    []store.Txn
	results []store.Result
	left    int  // transactions without a result
	taken   bool // guarded by Store.mu
	done    chan struct{}
}

// Commit implements store.Store. Transactions of concurrent calls share groups.
// When ctx ends before the loop has taken the call, nothing of it is written
// ("canceled"); later, what was not yet sent is not written and the call returns
// at once with "outcome_unknown" for all.
func (s *Store) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	r := &request{ctx: ctx, txns: txns, results: make([]store.Result, len(txns)), done: make(chan struct{})}
	for i := range txns {
		if err := txns[i].Validate(); err != nil {
			r.results[i].Err = err
		} else {
			r.left++
		}
	}
	if r.left == 0 {
		return r.results
	}
	if ctx.Err() != nil {
		return r.refuse(canceled(ctx))
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return r.refuse(closedFault())
	}
	s.queue = append(s.queue, r)
	s.mu.Unlock()
	wake(s.wakeCommit)

	select {
	case <-r.done:
		return r.results
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !r.taken {
		for i, q := range s.queue {
			if q == r {
				s.queue = append(s.queue[:i], s.queue[i+1:]...)
				break
			}
		}
		return r.refuse(canceled(ctx))
	}
	select {
	case <-r.done:
		return r.results
	default: // the loop still writes to r.results: answer with others
		r = &request{txns: txns, results: make([]store.Result, len(txns))}
		return r.refuse(fault.New(fault.Unavailable, "outcome_unknown", "the commit was given up while it was written").
			Fix("look whether it is there before trying again").Because(ctx.Err()))
	}
}

func canceled(ctx context.Context) error {
	return fault.New(fault.Unavailable, "canceled", "the commit was given up, nothing was written").Because(ctx.Err())
}

// refuse gives err to every transaction that has no error of its own.
func (r *request) refuse(err error) []store.Result {
	for i := range r.results {
		if r.results[i].Err == nil {
			r.results[i].Err = err
		}
	}
	return r.results
}

// commitLoop runs until Close; it alone puts w and head.
func (s *Store) commitLoop() {
	for range s.wakeCommit {
		for {
			s.mu.Lock()
			queue, closed := s.queue, s.closed
			s.queue = nil
			for _, r := range queue {
				r.taken = true
			}
			s.mu.Unlock()
			if len(queue) > 0 {
				s.commitAll(queue)
			} else if closed {
				return
			} else {
				break
			}
		}
	}
}

// item is one transaction on its way.
type item struct {
	txn  *store.Txn
	req  *request
	i    int
	done bool // its result is filled in
}

func (it *item) answer(at store.Position, err error) {
	it.req.results[it.i] = store.Result{Position: at, Err: err}
	it.done = true
}

// commitAll commits what was queued, group by group, and answers each call as
// soon as its last transaction has its result.
func (s *Store) commitAll(queue []*request) {
	var txns []store.Txn
	var items []item
	for _, r := range queue {
		for i := range r.txns {
			if r.results[i].Err == nil {
				txns = append(txns, r.txns[i])
				items = append(items, item{txn: &r.txns[i], req: r, i: i})
			}
		}
	}
	var away error // once etcd does not answer, the rest of the queue does not wait for it too
	for len(txns) > 0 {
		n := len(store.Groups(txns[:min(len(txns), store.MaxGroup)])[0])
		n = fits(txns[:n], s.keys, s.limit.request)
		group := items[:n]
		if away == nil {
			away = s.commitGroup(group)
		} else {
			for i := range group {
				group[i].answer(s.position(), away)
			}
		}
		for i := range group {
			if r := group[i].req; true {
				if r.left--; r.left == 0 {
					close(r.done)
				}
			}
		}
		txns, items = txns[n:], items[n:]
	}
}
