package postgres

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
// ("canceled"); later, what was not yet sent is not written and the call
// returns at once with "outcome_unknown" for all.
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
	if err := ctx.Err(); err != nil {
		return r.refuse(canceled(err))
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
		return r.refuse(canceled(ctx.Err()))
	}
	select {
	case <-r.done:
		return r.results
	default: // the loop still writes to r.results: answer with others
		r = &request{results: make([]store.Result, len(txns))}
		for i := range txns {
			r.results[i].Err = txns[i].Validate()
		}
		return r.refuse(unknown(ctx.Err()))
	}
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

func canceled(cause error) error {
	return fault.New(fault.Unavailable, "canceled", "the commit was given up, nothing was written").Because(cause)
}

func unknown(cause error) error {
	return fault.New(fault.Unavailable, "outcome_unknown", "the database did not answer while the change was written").
		Fix("look whether it is there before trying again").Because(cause)
}

// commitLoop runs until Close; it alone uses the writer.
func (s *Store) commitLoop() {
	defer func() { s.writer.close() }()
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

// slot is where the outcome of one transaction goes.
type slot struct {
	req *request
	i   int
}

func (to slot) result() *store.Result { return &to.req.results[to.i] }

// commitAll commits what was queued, group by group, and answers each call as
// soon as its last transaction has its result.
func (s *Store) commitAll(queue []*request) {
	var txns []store.Txn
	var slots []slot
	for _, r := range queue {
		for i := range r.txns {
			if r.results[i].Err == nil {
				txns = append(txns, r.txns[i])
				slots = append(slots, slot{r, i})
			}
		}
	}
	var away error // once the database does not answer, the rest of the queue does not wait for it too
	for _, group := range store.Groups(txns) {
		if away == nil {
			away = s.commitGroup(group, slots[:len(group)])
		} else {
			for _, to := range slots[:len(group)] {
				to.result().Err = away
			}
		}
		for _, to := range slots[:len(group)] {
			if to.req.left--; to.req.left == 0 {
				close(to.req.done)
			}
		}
		slots = slots[len(group):]
	}
}

// commitGroup sends the transactions of one group whose callers still wait, and
// fills in the results. It returns an error when the database does not answer.
func (s *Store) commitGroup(txns []store.Txn, slots []slot) error {
	var live []store.Txn
	var to []slot
	for i := range txns {
		if err := slots[i].req.ctx.Err(); err != nil {
			slots[i].result().Err = canceled(err)
			continue
		}
		live = append(live, txns[i])
		to = append(to, slots[i])
	}
	if len(live) == 0 {
		return nil
	}
	g := newGroup(live)
	err := s.write(g)
	for i := range live {
		*to[i].result() = g.results[i]
		if err != nil {
			*to[i].result() = store.Result{Position: g.at, Err: err}
		}
	}
	switch fault.ReasonOf(err) {
	case "":
		wake(s.wakeFollow) // for those whom no notification reaches
	case "database_unreachable":
		return err
	case "outcome_unknown":
		return fault.New(fault.Unavailable, "database_unreachable", "the database does not answer; nothing was written").
			Fix("see whether it runs and can be reached").Because(err)
	}
	return nil
}
