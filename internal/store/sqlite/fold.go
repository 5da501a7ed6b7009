package sqlite

import (
	"context"
	"database/sql/driver"
	"maps"
	"slices"

	"github.com/plastron/plastron/internal/store"
)

// foldLoop runs until Close. A round is due when the log's tail or the WAL has
// grown past its limit; nothing happens while nothing is written.
func (s *Store) foldLoop() {
	failing := false
	for range s.wakeFold {
		s.mu.Lock()
		closed, fold, copyWAL := s.closed, s.tail >= s.limit.fold, s.unchecked >= s.limit.checkpoint
		upTo := s.head
		s.mu.Unlock()
		if closed {
			return
		}
		var err error
		if fold {
			err = s.fold(context.Background(), upTo)
		}
		if err == nil && (copyWAL || fold) {
			err = s.checkpoint()
		}
		if err != nil {
			s.fail(err)
			if !failing { // once, not at every commit until it works again
				s.log.Error("store fold", "dir", s.dir, "err", err)
			}
		}
		failing = err != nil
	}
}

// fold brings kv up to a revision, or further. It reads a bounded part of the
// log at a time, keeps the last change of each key, and writes those in key
// order in short transactions; commits go in between. Only the last of them
// moves meta.folded. Until then kv holds some keys from before and some from
// after, which does no harm: whoever reads kv lays every row after folded over
// it, and that gives one state whichever of the two a key had.
func (s *Store) fold(ctx context.Context, upTo uint64) error {
	s.folding.Lock()
	defer s.folding.Unlock()
	for {
		s.mu.Lock()
		from, head := s.folded, s.head
		s.mu.Unlock()
		if from >= upTo {
			return nil
		}
		tail := make(map[string]change)
		to, weight := from, 0
		err := s.readLog(from, func(r row, writes []store.Write) bool {
			if r.rev > head {
				return false
			}
			overlay(tail, r.rev, writes)
			to, weight = r.rev, weight+r.weight()
			return weight < s.limit.fold
		})
		if err != nil {
			return err
		}
		if to == from {
			return corrupt("revision %d is missing from the log", from+1)
		}
		keys := slices.Sorted(maps.Keys(tail))
		for done := false; !done; {
			n := s.chunk(keys, tail)
			done = n == len(keys)
			folded := from
			if done {
				folded = to
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := s.foldChunk(keys[:n], tail, folded, weight); err != nil {
				return err
			}
			keys = keys[n:]
		}
	}
}

// chunk returns how many of the keys one transaction takes.
func (s *Store) chunk(keys []string, tail map[string]change) int {
	size := 0
	for i, key := range keys {
		if size += len(key) + len(tail[key].Value); i == s.limit.foldChunk || i > 0 && size > s.limit.foldBytes {
			return i
		}
	}
	return len(keys)
}

// foldChunk writes some keys, and how far kv is now if that changed.
func (s *Store) foldChunk(keys []string, tail map[string]change, folded uint64, weight int) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.ready(); err != nil {
		return err
	}
	err := s.writer.transaction(func() error {
		for _, key := range keys {
			c := tail[key]
			var err error
			if c.Deleted {
				err = s.writer.del.exec([]byte(key))
			} else {
				err = s.writer.put.exec([]byte(key), int64(c.rev), nullable(c.Value))
			}
			if err != nil {
				return err
			}
		}
		if folded == s.folded {
			return nil
		}
		return s.writer.setMeta("UPDATE meta SET folded = ?", int64(folded))
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unchecked += len(keys) * 4096
	if folded != s.folded {
		s.folded = folded
		if s.tail -= weight; folded == s.head {
			s.tail = 0 // whatever a failed round left in the count
		}
	}
	return nil
}

// nullable stores the empty value as NULL: the driver makes no other difference.
func nullable(value []byte) driver.Value {
	if len(value) == 0 {
		return nil
	}
	return value
}

// readLog calls f with the log rows after a revision until it returns false.
func (s *Store) readLog(after uint64, f func(row, []store.Write) bool) error {
	s.files.RLock()
	defer s.files.RUnlock()
	if s.reader == nil {
		return store.Closed()
	}
	var bad error
	err := s.reader.rows(after, func(r row) bool {
		writes, err := store.ParseWrites(r.batch)
		if err != nil {
			bad = corrupt("revision %d", r.rev).Because(err)
			return false
		}
		return f(r, writes)
	})
	if bad != nil {
		return bad
	}
	return err
}

// checkpoint copies the WAL into the database while commits go on, then the
// little that came meanwhile, between two commits: only when all of it is copied
// does the next commit begin the WAL anew.
func (s *Store) checkpoint() error {
	if err := s.copyWAL(); err != nil {
		return err
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.copyWAL(); err != nil {
		return err
	}
	s.mu.Lock()
	s.unchecked = 0
	s.mu.Unlock()
	return nil
}

func (s *Store) copyWAL() error {
	s.files.RLock()
	defer s.files.RUnlock()
	if s.keeper == nil {
		return store.Closed()
	}
	return s.keeper.exec("PRAGMA wal_checkpoint(PASSIVE)")
}

// Compact implements store.Store. A revision past the end means all of the log.
func (s *Store) Compact(ctx context.Context, before uint64) error {
	s.mu.Lock()
	before = min(before, s.head)
	skip, closed := before <= s.compacted, s.closed
	s.mu.Unlock()
	if closed {
		return store.Closed()
	}
	if skip {
		return nil
	}
	err := s.fold(ctx, before)
	if err == nil {
		err = s.compact(ctx, before)
	}
	if err != nil && ctx.Err() == nil {
		s.fail(err)
	}
	return err
}

// compact tells the watchers first, then deletes rows in short transactions. If
// it is cut off, the next call deletes what it left.
func (s *Store) compact(ctx context.Context, before uint64) error {
	step := func(f func() error) error {
		s.writing.Lock()
		defer s.writing.Unlock()
		if err := s.ready(); err != nil {
			return err
		}
		return f()
	}
	var first int64
	err := step(func() error {
		if err := s.writer.setMeta("UPDATE meta SET compacted = max(compacted, ?)", int64(before)); err != nil {
			return err
		}
		s.mu.Lock()
		s.compacted = max(s.compacted, before)
		s.announceLocked()
		s.mu.Unlock()
		return s.writer.query("SELECT coalesce(min(rev), 0) FROM log", scan(&first))
	})
	for at := uint64(first); err == nil && at <= before; {
		if err := ctx.Err(); err != nil {
			return err
		}
		at = min(at+roundRows, before+1)
		err = step(func() error { return s.writer.setMeta("DELETE FROM log WHERE rev < ?", int64(at)) })
	}
	return err
}
