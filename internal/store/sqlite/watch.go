package sqlite

import (
	"context"
	"iter"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// A watcher takes at most this much in one round.
const (
	roundRows  = 256
	roundBytes = 1 << 20
)

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		if after.Epoch != s.epoch {
			yield(store.Batch{}, fault.New(fault.Precondition, "epoch_changed", "the store has epoch %s, not %s", s.epoch, after.Epoch))
			return
		}
		for at := after.Revision; ctx.Err() == nil; {
			rows, changed, err := s.next(at)
			if err != nil {
				yield(store.Batch{}, err)
				return
			}
			if len(rows) == 0 {
				select {
				case <-changed:
				case <-ctx.Done():
				}
				continue
			}
			for _, r := range rows {
				b, err := s.batch(r)
				if ctx.Err() != nil || !yield(b, err) || err != nil {
					return
				}
				at = r.rev
			}
		}
	}
}

func (s *Store) batch(r row) (store.Batch, error) {
	writes, err := store.ParseWrites(r.batch)
	if err != nil {
		return store.Batch{}, corrupt("revision %d", r.rev).Because(err)
	}
	return store.Batch{
		Prev:       store.Position{Epoch: s.epoch, Revision: r.prev},
		Position:   store.Position{Epoch: s.epoch, Revision: r.rev},
		WriterTime: time.Unix(0, r.time).UTC(),
		Writes:     writes,
	}, nil
}

// next returns some rows after a revision, or, when there are none yet, a
// channel that is closed when that may have changed.
func (s *Store) next(after uint64) ([]row, <-chan struct{}, error) {
	s.mu.Lock()
	head, changed := s.head, s.changed
	if err := s.watchableLocked(after); err != nil || after == head {
		s.mu.Unlock()
		return nil, changed, err
	}
	if n := head - after; n <= uint64(len(s.recent)) {
		rows := s.recent[len(s.recent)-int(n):]
		rows = slices.Clone(rows[:min(len(rows), roundRows)])
		s.mu.Unlock()
		return rows, nil, nil
	}
	s.mu.Unlock()

	s.files.RLock()
	defer s.files.RUnlock()
	if s.reader == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.closed {
			return nil, nil, store.Closed()
		}
		return nil, nil, fault.New(fault.Unavailable, "store_unavailable", "the store cannot be read now")
	}
	var rows []row
	size := 0
	err := s.reader.rows(after, func(r row) bool {
		if r.rev > head { // not published yet
			return false
		}
		rows = append(rows, r)
		size += len(r.batch)
		return len(rows) < roundRows && size < roundBytes && r.rev < head
	})
	if err == nil && len(rows) > 0 {
		return rows, nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if gone := s.watchableLocked(after); gone != nil {
		return nil, nil, gone // compacted while it was read
	}
	if err == nil {
		err = corrupt("revision %d is missing from the log", after+1)
	}
	return nil, nil, err
}

// watchableLocked returns why a watcher at this revision cannot go on.
func (s *Store) watchableLocked(at uint64) error {
	switch {
	case s.closed:
		return store.Closed()
	case at > s.head:
		return fault.New(fault.Precondition, "position_unknown", "the store is at revision %d and has not reached %d", s.head, at)
	case at < s.compacted:
		return fault.New(fault.Precondition, "compacted", "the log begins after revision %d, %d is gone", s.compacted, at)
	}
	return nil
}

// remember adds the newest row to those that are kept in memory, and drops the
// oldest beyond the limits. The caller holds mu, or is Open.
func (s *Store) remember(r row) {
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
