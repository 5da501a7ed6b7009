package sqlite

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql/driver"
	"time"

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
// ("canceled"); later, what was not yet judged is not written and the call
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
		return r.refuse(fault.New(fault.Unavailable, "canceled", "the commit was given up, nothing was written").Because(err))
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
		return r.refuse(fault.New(fault.Unavailable, "canceled", "the commit was given up, nothing was written").Because(ctx.Err()))
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

// refuse gives err to every transaction that has no error of its own.
func (r *request) refuse(err error) []store.Result {
	for i := range r.results {
		if r.results[i].Err == nil {
			r.results[i].Err = err
		}
	}
	return r.results
}

// commitLoop runs until Close; it alone appends to the log.
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

// slot is where the outcome of one transaction goes.
type slot struct {
	req *request
	i   int
}

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
	for _, group := range store.Groups(txns) {
		s.commitGroup(group, slots)
		for _, to := range slots[:len(group)] {
			if to.req.left--; to.req.left == 0 {
				close(to.req.done)
			}
		}
		slots = slots[len(group):]
	}
}

// commitGroup judges the transactions of one group, all on the same state,
// makes those that hold durable in one row, and fills in the results.
func (s *Store) commitGroup(txns []store.Txn, slots []slot) {
	s.writing.Lock()
	defer s.writing.Unlock()
	cannot := s.usable()
	if cannot == nil && s.revs == nil {
		cannot = s.learn()
	}
	at := store.Position{Epoch: s.epoch, Revision: s.head}
	writes := make([]store.Write, 0, len(txns))
	for i := range txns {
		result := &slots[i].req.results[slots[i].i]
		result.Position = at
		if result.Err = cannot; result.Err != nil {
			continue
		}
		if err := slots[i].req.ctx.Err(); err != nil {
			result.Err = fault.New(fault.Unavailable, "canceled", "the commit was given up, nothing was written").Because(err)
		} else if result.Err = s.revs.judge(&txns[i]); result.Err == nil && len(txns[i].Puts)+len(txns[i].Deletes) > 0 {
			result.Position.Revision++ // until now; a mark that it is in the row
			writes = append(writes, txns[i].Write())
		}
	}
	if len(writes) == 0 {
		return
	}
	r := row{
		rev: s.head + 1, prev: s.head, time: time.Now().UnixNano(),
		batch: store.AppendWrites(make([]byte, 0, store.EncodedSize(writes)), writes),
	}
	if err := s.append(r, writes); err != nil {
		for i := range txns {
			if result := &slots[i].req.results[slots[i].i]; result.Position.Revision == r.rev {
				*result = store.Result{Position: at, Err: err}
			}
		}
	}
}

// append makes a row durable and publishes it. After an error the row is not in
// the log, unless the reason is "outcome_unknown".
func (s *Store) append(r row, writes []store.Write) error {
	err := s.writer.insert.exec(int64(r.rev), int64(r.prev), r.time, r.batch)
	if err == nil {
		s.publish(r, writes)
		return nil
	}
	if isReason(err, "disk_full") || isReason(err, "busy") {
		return err // SQLite has rolled it back: no row, no sync that could have failed
	}
	s.log.Error("store write failed, reopening", "dir", s.dir, "revision", r.rev, "err", err)
	s.broken, s.pending = err, &r
	if again := s.reopen(); again != nil {
		return fault.New(fault.Unavailable, "outcome_unknown", "the store failed while it was written, and is not readable").
			Fix("look whether the change is there once the store works again").Because(err)
	}
	if s.head == r.rev {
		return nil
	}
	return fault.New(fault.Unavailable, "not_written", "the store could not be written; nothing of the change is there").
		Fix("try again").Because(err)
}

// publish makes a durable row visible: to later conditions, watchers and Open.
func (s *Store) publish(r row, writes []store.Write) {
	if err := s.position.write(r.rev); err != nil {
		s.log.Error("store position not written", "dir", s.dir, "revision", r.rev, "err", err)
	}
	s.revs.apply(r.rev, writes)
	s.mu.Lock()
	s.head = r.rev
	s.tail += r.weight()
	s.unchecked += len(r.batch) + 2*4096
	s.remember(r)
	s.announceLocked()
	if s.tail >= s.limit.fold || s.unchecked >= s.limit.checkpoint {
		wake(s.wakeFold)
	}
	s.mu.Unlock()
}

// usable returns nil when the open files may be used, and first tries to bring
// that about. The caller holds writing.
func (s *Store) usable() error {
	if s.broken != nil {
		return s.reopen()
	}
	return s.ready()
}

// resolve decides, from the log itself, whether the row whose write failed is
// in. The caller holds writing and has just reopened the files.
func (s *Store) resolve(m meta) error {
	var head int64
	if err := s.writer.query("SELECT coalesce(max(rev), 0) FROM log", scan(&head)); err != nil {
		return err
	}
	now := max(uint64(head), m.compacted)
	p := s.pending
	if m.epoch == s.epoch && now == s.head {
		s.pending = nil // not in
		return nil
	}
	same := false
	if m.epoch == s.epoch && p != nil && now == p.rev {
		err := s.writer.query("SELECT rev, prev, time, batch FROM log WHERE rev = ?", func(v []driver.Value) error {
			var r row
			err := r.scan(v)
			same = r.prev == p.prev && r.time == p.time && bytes.Equal(r.batch, p.batch)
			return err
		}, head)
		if err != nil {
			return err
		}
	}
	if !same {
		return fault.New(fault.Unavailable, "store_changed", "the store's log ends at revision %d and not where this process left it, at %d", now, s.head).
			Fix("see whether another program writes plastron.db, then restart")
	}
	writes, err := store.ParseWrites(p.batch)
	if err != nil {
		return err
	}
	s.pending = nil
	s.publish(*p, writes)
	return nil
}

// revisions maps each live key to the revision that wrote it. A key stands there
// as 128 bits of its hash, salted per process so that nobody can prepare two
// keys that collide; that takes a third of the memory and no pointers.
type revisions struct {
	seed [8]byte
	of   map[[16]byte]uint64
	buf  []byte
}

func newRevisions() *revisions {
	r := &revisions{of: make(map[[16]byte]uint64)}
	rand.Read(r.seed[:]) // never fails (crypto/rand)
	return r
}

func (r *revisions) hash(key string) (h [16]byte) {
	r.buf = append(append(r.buf[:0], r.seed[:]...), key...)
	sum := sha256.Sum256(r.buf)
	copy(h[:], sum[:])
	return h
}

// judge returns a conflict if one of the transaction's conditions does not hold.
func (r *revisions) judge(t *store.Txn) error {
	for i := range t.Conditions {
		c := &t.Conditions[i]
		if at := r.of[r.hash(c.Key)]; at != c.Revision {
			return fault.New(fault.Conflict, "key_changed", "key %q is at revision %d, expected %d", c.Key, at, c.Revision).
				Fix("read it again and retry")
		}
	}
	return nil
}

func (r *revisions) apply(rev uint64, writes []store.Write) {
	for i := range writes {
		for j := range writes[i].Changes {
			if c := &writes[i].Changes[j]; c.Deleted {
				delete(r.of, r.hash(c.Key))
			} else {
				r.of[r.hash(c.Key)] = rev
			}
		}
	}
}
