package postgres

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// row is one row of plastron_log.
type row struct {
	rev, prev uint64
	time      int64
	id, batch []byte
}

// state is the head row.
type state struct {
	epoch          store.Epoch
	rev, compacted uint64
}

// follow keeps the newest rows in memory until Close.
func (s *Store) follow() {
	const first, most = 100 * time.Millisecond, 2 * time.Second
	wait := first
	for s.life.Err() == nil {
		err := s.followOnce(func() { wait = first })
		if s.life.Err() != nil {
			return
		}
		s.lost(unusable(err))
		s.log.Warn("store is not followed", "err", err)
		select {
		case <-time.After(wait/2 + rand.N(wait/2)):
			wait = min(2*wait, most)
		case <-s.wakeFollow: // a commit went well, so this may as well
			wait = first
			select {
			case <-time.After(wait):
			case <-s.life.Done():
			}
		case <-s.life.Done():
		}
	}
}

// followOnce follows over one connection until it fails.
func (s *Store) followOnce(works func()) error {
	c, err := s.connect(s.life, "-f")
	if err != nil {
		return err
	}
	defer c.close()
	if !c.pooled {
		if _, err := c.rows(s.life, "LISTEN plastron_log"); err != nil {
			return explain(s.life, err)
		}
	}
	for {
		c.notified = false
		if err := s.pull(s.life, c); err != nil {
			return err
		}
		works()
		if c.notified {
			continue // while it was reading
		}
		if c.pooled {
			select {
			case <-s.wakeFollow:
			case <-time.After(s.limit.poll):
			case <-s.life.Done():
				return s.life.Err()
			}
			continue
		}
		ctx, stop := context.WithTimeout(s.life, s.limit.look)
		err := c.WaitForNotification(ctx)
		stop()
		if err != nil && (s.life.Err() != nil || c.IsClosed() || ctx.Err() == nil) {
			return explain(s.life, err)
		}
	}
}

// lost tells the watchers that they may be behind.
func (s *Store) lost(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = err
	s.announceLocked()
}

// pull reads the rows after the newest that is known, until there are none.
func (s *Store) pull(ctx context.Context, c *session) error {
	s.pulling.Lock()
	defer s.pulling.Unlock()
	for {
		if err := s.current(c); err != nil {
			return err
		}
		s.mu.Lock()
		epoch, head, id := s.epoch, s.head, s.headID
		s.mu.Unlock()
		now, at, rows, err := s.fetch(ctx, c, head)
		if err != nil {
			return err
		}
		same := id == nil || head <= now.compacted || at != nil && string(at.id) == string(id)
		switch {
		case now.epoch == epoch && (now.rev < head || !same):
			// What was once there is not, or is something else: the database was
			// taken back in time under our feet.
			if err := s.renew(ctx, c, epoch); err != nil {
				return err
			}
			continue
		case now.epoch != epoch:
			s.log.Warn("store has a new epoch", "reason", "replaced", "epoch", now.epoch.String(), "revision", now.rev)
			s.mu.Lock()
			s.epoch, s.head, s.headID, s.compacted = now.epoch, now.rev, nil, now.compacted
			s.recent, s.recentLen, s.broken = nil, 0, nil
			s.announceLocked()
			s.mu.Unlock()
			return nil
		}
		if err := chain(rows, head); err != nil && head >= now.compacted {
			return err
		}
		s.mu.Lock()
		if head < now.compacted && len(rows) > 0 && rows[0].prev != head {
			s.recent, s.recentLen = nil, 0 // others have compacted what we have not seen
		}
		if at != nil && s.headID == nil {
			s.headID = at.id
		}
		news := len(rows) > 0 || s.compacted != now.compacted || s.broken != nil
		s.compacted, s.broken = max(s.compacted, now.compacted), nil
		for _, r := range rows {
			s.rememberLocked(r)
		}
		if len(rows) == 0 && s.head < now.rev { // all of it was compacted
			s.head, s.headID, s.recent, s.recentLen = now.rev, nil, nil, 0
			news = true
		}
		if news {
			s.announceLocked()
		}
		caught := s.head >= now.rev
		s.mu.Unlock()
		if caught {
			return nil
		}
	}
}

// renew draws a new epoch in place of one that has lived twice.
func (s *Store) renew(ctx context.Context, c *session, old store.Epoch) error {
	epoch := store.NewEpoch()
	ctx, stop := context.WithTimeout(ctx, s.limit.call)
	defer stop()
	_, err := c.rows(ctx, s.sql.epoch, bytesParam(old[:]), bytesParam(epoch[:]))
	if err != nil {
		return explain(ctx, err)
	}
	s.log.Error("store has lost revisions that it had acknowledged", "epoch", old.String())
	return nil
}

// rememberLocked adds the newest row to those that are kept in memory, and drops
// the oldest beyond the limits.
func (s *Store) rememberLocked(r row) {
	s.head, s.headID = r.rev, r.id
	s.recent = append(s.recent, r)
	s.recentLen += len(r.batch)
	drop := 0
	for len(s.recent)-drop > 1 && (len(s.recent)-drop > s.limit.recentRows || s.recentLen > s.limit.recentBytes) {
		s.recentLen -= len(s.recent[drop].batch)
		drop++
	}
	clear(s.recent[:drop])
	s.recent = s.recent[drop:]
}

// fetch reads, in one snapshot, the head, the row at a revision (without its
// batch; nil if it is not there) and some rows after it.
func (s *Store) fetch(ctx context.Context, c *session, after uint64) (now state, at *row, rows []row, err error) {
	limited, stop := context.WithTimeout(ctx, s.limit.call)
	defer stop()
	if !c.pooled && !c.prepared {
		if _, err := c.Prepare(limited, "plastron_fetch", s.sql.fetch, nil); err != nil {
			return now, nil, nil, explain(ctx, err)
		}
		c.prepared = true
	}
	var r *pgconn.Result
	values, oids, formats := split([]param{revisionParam(after)})
	if c.prepared {
		r = c.ExecPrepared(limited, "plastron_fetch", values, formats, []int16{1}).Read()
	} else {
		r = c.ExecParams(limited, s.sql.fetch, values, oids, formats, []int16{1}).Read()
	}
	answer, err := r.Rows, r.Err
	if err != nil {
		return now, nil, nil, explain(ctx, err)
	}
	for _, columns := range answer {
		var rev, compacted, lrev, prev, when int64
		if len(columns) != 8 || copy(now.epoch[:], columns[0]) != len(now.epoch) {
			return now, nil, nil, corrupt("plastron_head has no epoch")
		}
		if err := numbers(columns[1:], &rev, &compacted, &lrev, &prev, &when); err != nil {
			return now, nil, nil, err
		}
		now.rev, now.compacted = uint64(rev), uint64(compacted)
		switch r := (row{rev: uint64(lrev), prev: uint64(prev), time: when, id: columns[6], batch: columns[7]}); {
		case columns[3] == nil: // no row
		case r.rev == after:
			at = &r
		default:
			rows = append(rows, r)
		}
	}
	if len(answer) == 0 {
		return now, nil, nil, corrupt("plastron_head is empty")
	}
	return now, at, rows, nil
}

// chain refuses rows that do not follow one another.
func chain(rows []row, after uint64) error {
	for _, r := range rows {
		if r.prev != after || r.rev <= after {
			return corrupt("revision %d follows %d, expected %d", r.rev, r.prev, after)
		}
		after = r.rev
	}
	return nil
}

// read runs f with the shared connection for reading.
func (s *Store) read(ctx context.Context, f func(c *session) error) error {
	s.reading.Lock()
	defer s.reading.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	for again := false; ; again = true {
		fresh := s.reader == nil || s.reader.IsClosed()
		if fresh {
			c, err := s.connect(ctx, "-r")
			if err != nil {
				return err
			}
			s.reader = c
		}
		err := f(s.reader)
		if err == nil || fault.KindOf(err) != fault.Unavailable {
			return err
		}
		s.reader.close()
		s.reader = nil
		if fresh || again || ctx.Err() != nil {
			return err
		}
		// It had gone stale while nobody used it.
	}
}

// batch turns a row into what watchers get.
func (r *row) decode(epoch store.Epoch) (store.Batch, error) {
	writes, err := store.ParseWrites(r.batch)
	if err != nil {
		return store.Batch{}, corrupt("revision %d", r.rev).Because(fmt.Errorf("plastron_log: %w", err))
	}
	return store.Batch{
		Prev:       store.Position{Epoch: epoch, Revision: r.prev},
		Position:   store.Position{Epoch: epoch, Revision: r.rev},
		WriterTime: time.Unix(0, r.time).UTC(),
		Writes:     writes,
	}, nil
}
