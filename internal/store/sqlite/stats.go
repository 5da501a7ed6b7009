package sqlite

import (
	"context"
	"database/sql/driver"
	"time"

	"github.com/plastron/plastron/internal/store"
)

// Stats implements store.Store.
func (s *Store) Stats(context.Context) (store.Stats, error) {
	s.mu.Lock()
	begin, end := s.compacted, s.head
	s.mu.Unlock()
	st := store.Stats{
		Engine: "sqlite", Bytes: s.Size(), Batches: end - begin,
		Begin: store.Position{Epoch: s.epoch, Revision: begin}, End: store.Position{Epoch: s.epoch, Revision: end},
	}
	var oldest int64
	if err := s.ask("SELECT coalesce(min(time), 0) FROM log WHERE rev = ?", &oldest, begin+1); err != nil {
		return store.Stats{}, err
	}
	if oldest != 0 {
		st.Oldest = time.Unix(0, oldest).UTC()
	}
	return st, nil
}

// Compactable implements store.Store.
func (s *Store) Compactable(_ context.Context, keep uint64, before time.Time) (uint64, error) {
	s.mu.Lock()
	end, closed := s.head, s.closed
	s.mu.Unlock()
	if closed {
		return 0, store.Closed()
	}
	if end < keep {
		return 0, nil
	}
	var rev int64
	err := s.ask("SELECT rev FROM log WHERE rev <= ? AND time < ? ORDER BY rev DESC LIMIT 1", &rev, end-keep, uint64(before.UnixNano()))
	return uint64(rev), err
}

// ask reads one number; it stays as it is if there is no row.
func (s *Store) ask(sql string, to *int64, args ...uint64) error {
	s.files.RLock()
	defer s.files.RUnlock()
	if s.reader == nil {
		return store.Closed()
	}
	s.reader.Lock()
	defer s.reader.Unlock()
	values := make([]driver.Value, len(args))
	for i, a := range args {
		values[i] = int64(a)
	}
	return s.reader.query(sql, scan(to), values...)
}
