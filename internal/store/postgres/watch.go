package postgres

import (
	"context"
	"iter"
	"slices"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// roundRows is how many rows a watcher takes in one round.
const roundRows = 256

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		for at := after; ctx.Err() == nil; {
			rows, changed, err := s.next(ctx, at)
			if ctx.Err() != nil {
				return
			}
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
				b, err := r.decode(at.Epoch)
				if ctx.Err() != nil || !yield(b, err) || err != nil {
					return
				}
				at = b.Position
			}
		}
	}
}

// next returns some rows after a position, or, when there are none yet, a
// channel that is closed when that may have changed.
func (s *Store) next(ctx context.Context, after store.Position) ([]row, <-chan struct{}, error) {
	s.mu.Lock()
	if s.epoch == after.Epoch && s.head < after.Revision && !s.closed {
		s.mu.Unlock() // a commit may be ahead of the follower
		if err := s.read(ctx, func(c *session) error { return s.pull(ctx, c) }); err != nil {
			return nil, nil, err
		}
		s.mu.Lock()
	}
	head, changed := s.head, s.changed
	if err := s.watchableLocked(after); err != nil {
		s.mu.Unlock()
		return nil, nil, err
	}
	if after.Revision == head {
		err := s.broken
		s.mu.Unlock()
		return nil, changed, err
	}
	if n := head - after.Revision; n <= uint64(len(s.recent)) {
		rows := s.recent[len(s.recent)-int(n):]
		rows = slices.Clone(rows[:min(len(rows), roundRows)])
		s.mu.Unlock()
		return rows, nil, nil
	}
	s.mu.Unlock()

	var rows []row
	err := s.read(ctx, func(c *session) error {
		now, _, r, err := s.fetch(ctx, c, after.Revision)
		switch {
		case err != nil:
			return err
		case now.epoch != after.Epoch:
			return epochChanged(now.epoch, after.Epoch)
		case after.Revision < now.compacted:
			return compacted(now.compacted, after.Revision)
		case len(r) == 0:
			return corrupt("revision %d is missing from the log", after.Revision+1)
		}
		rows = r
		return chain(r, after.Revision)
	})
	return rows, nil, err
}

// watchableLocked returns why a watcher at this position cannot go on.
func (s *Store) watchableLocked(at store.Position) error {
	switch {
	case s.closed:
		return store.Closed()
	case at.Epoch != s.epoch:
		return epochChanged(s.epoch, at.Epoch)
	case at.Revision > s.head:
		return fault.New(fault.Precondition, "position_unknown", "the store is at revision %d and has not reached %d", s.head, at.Revision)
	case at.Revision < s.compacted:
		return compacted(s.compacted, at.Revision)
	}
	return nil
}

func epochChanged(now, was store.Epoch) error {
	return fault.New(fault.Precondition, "epoch_changed", "the store has epoch %s, not %s", now, was)
}

func compacted(begin, at uint64) error {
	return fault.New(fault.Precondition, "compacted", "the log begins after revision %d, %d is gone", begin, at)
}
