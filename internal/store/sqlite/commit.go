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

// Commit implements store.Store. What was not yet judged when ctx ends is not written.
func (s *Store) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	return s.queue.Commit(ctx, txns)
}

// commitGroup judges the transactions of one group, all on the same state,
// makes those that hold durable in one row, and answers them.
func (s *Store) commitGroup(group []store.Pending) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	cannot := s.usable()
	if cannot == nil && s.revs == nil {
		cannot = s.learn()
	}
	at := store.Position{Epoch: s.epoch, Revision: s.head}
	writes := make([]store.Write, 0, len(group))
	for i := range group {
		p := &group[i]
		err := cannot
		if err == nil {
			err = p.Given()
		}
		if err == nil {
			err = s.revs.judge(p.Txn)
		}
		if err == nil && len(p.Txn.Puts)+len(p.Txn.Deletes) > 0 {
			writes = append(writes, p.Txn.Write())
		} else {
			p.Answer(at, err)
		}
	}
	if len(writes) == 0 {
		return nil
	}
	r := row{
		rev: s.head + 1, prev: s.head, time: time.Now().UnixNano(),
		batch: store.AppendWrites(make([]byte, 0, store.EncodedSize(writes)), writes),
	}
	err := s.append(r, writes)
	if err == nil {
		at.Revision = r.rev
	}
	for i := range group {
		if !group[i].Answered {
			group[i].Answer(at, err)
		}
	}
	return nil // each group finds out for itself whether the files work again
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
