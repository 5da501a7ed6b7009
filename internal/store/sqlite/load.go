package sqlite

import (
	"context"
	"database/sql/driver"
	"maps"
	"path/filepath"
	"slices"

	"github.com/plastron/plastron/internal/store"
)

// findEnd finds the end of the log, at Open, and checks that its tail is one
// chain. It reads no batches and no keys: the first Load or Commit does.
func (s *Store) findEnd(m meta) error {
	s.folded, s.compacted, s.head = m.folded, m.compacted, m.folded
	return s.writer.query(`SELECT count(*), coalesce(min(rev), 0), coalesce(max(rev), 0), coalesce(sum(prev <> rev - 1), 0), coalesce(sum(length(batch)), 0)
		FROM log WHERE rev > ?`, func(v []driver.Value) error {
		var n [5]int64
		for i := range n {
			n[i], _ = v[i].(int64)
		}
		count, first, last, loose, size := n[0], n[1], n[2], n[3], n[4]
		if count == 0 {
			return nil
		}
		if uint64(first) != m.folded+1 || last-first+1 != count || loose != 0 {
			return corrupt("the log after revision %d has a hole", m.folded)
		}
		s.head = uint64(last)
		s.tail = int(size + count*rowWeight)
		return nil
	}, int64(m.folded))
}

// learn fills the map of revisions for a commit that comes before any Load. The
// caller holds writing.
func (s *Store) learn() error {
	revs := newRevisions()
	err := s.writer.query("SELECT key, rev FROM kv", func(v []driver.Value) error {
		key, ok := v[0].([]byte)
		rev, ok2 := revision(v[1])
		if !ok || !ok2 {
			return corrupt("a row of the table kv has a column of the wrong kind")
		}
		revs.of[revs.hash(string(key))] = rev
		return nil
	})
	if err == nil {
		err = readTail(context.Background(), s.writer.conn, s.folded, func(r row, writes []store.Write) {
			revs.apply(r.rev, writes)
		})
	}
	if err != nil {
		return unusable(err)
	}
	s.revs = revs
	return nil
}

// readTail calls f with each log row after a revision.
func readTail(ctx context.Context, c *conn, after uint64, f func(row, []store.Write)) error {
	log, err := c.prepare(selectLog)
	if err != nil {
		return err
	}
	defer log.close()
	var bad error
	err = chain(log, after, func(r row) bool {
		var writes []store.Write
		if writes, bad = store.ParseWrites(r.batch); bad != nil {
			bad = corrupt("revision %d", r.rev).Because(bad)
		} else if bad = ctx.Err(); bad == nil {
			f(r, writes)
		}
		return bad == nil
	})
	if bad != nil {
		return bad
	}
	return err
}

// Load implements store.Store.
func (s *Store) Load(ctx context.Context, f func(key string, rev uint64, value []byte) error) (store.Position, error) {
	c, m, revs, err := s.snapshot()
	if err != nil {
		return store.Position{}, err
	}
	at, err := s.read(ctx, c, m, func(key string, rev uint64, value []byte) error {
		if revs != nil {
			revs.of[revs.hash(key)] = rev
		}
		return f(key, rev, value)
	})
	c.close()
	s.files.RUnlock()
	if err != nil {
		return store.Position{}, err
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.revs == nil { // then nothing was committed since the snapshot
		s.revs = revs
	}
	return at, nil
}

// read calls f with what a snapshot holds.
func (s *Store) read(ctx context.Context, c *conn, m meta, f func(key string, rev uint64, value []byte) error) (store.Position, error) {
	// The tail's changes win over kv, which may already hold some of them.
	at := store.Position{Epoch: s.epoch, Revision: m.folded}
	tail := make(map[string]change)
	err := readTail(ctx, c, m.folded, func(r row, writes []store.Write) {
		at.Revision = r.rev
		overlay(tail, r.rev, writes)
	})
	if err != nil {
		return store.Position{}, err
	}
	newer := slices.Sorted(maps.Keys(tail))
	emit := func(key string) error {
		if c := tail[key]; !c.Deleted {
			return f(key, c.rev, c.Value)
		}
		return nil
	}
	err = c.query("SELECT key, rev, value FROM kv ORDER BY key", func(v []driver.Value) error {
		k, ok := v[0].([]byte)
		rev, ok2 := revision(v[1])
		value, ok3 := v[2].([]byte)
		if !ok || !ok2 || !ok3 && v[2] != nil {
			return corrupt("a row of the table kv has a column of the wrong kind")
		}
		if value == nil {
			value = []byte{}
		}
		key := string(k)
		for len(newer) > 0 && newer[0] < key {
			if err := emit(newer[0]); err != nil {
				return err
			}
			newer = newer[1:]
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if len(newer) > 0 && newer[0] == key {
			return nil // its turn comes with the next key
		}
		return f(key, rev, value)
	})
	for _, key := range newer {
		if err == nil {
			err = emit(key)
		}
	}
	if err != nil {
		return store.Position{}, err
	}
	return at, nil
}

// snapshot opens a connection that sees one state of the database, and that
// state is published: no row is between the disk and the watchers. The caller
// closes the connection and then releases files. If revs is not nil nobody has
// filled the map of revisions yet, and the caller may.
func (s *Store) snapshot() (c *conn, m meta, revs *revisions, err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.usable(); err != nil {
		return nil, m, nil, err
	}
	if s.revs == nil {
		revs = newRevisions()
	}
	s.files.RLock()
	if c, err = openConn(filepath.Join(s.dir, databaseName)); err == nil {
		if err = c.exec("BEGIN"); err == nil {
			m, err = readMeta(c) // the first read fixes the state
		}
		if err != nil {
			c.close()
		}
	}
	if err != nil {
		s.files.RUnlock()
	}
	return c, m, revs, err
}

// change is the newest change of one key.
type change struct {
	store.Change
	rev uint64
}

// overlay lays the writes of one row over those of the rows before.
func overlay(tail map[string]change, rev uint64, writes []store.Write) {
	for i := range writes {
		for _, c := range writes[i].Changes {
			tail[c.Key] = change{c, rev}
		}
	}
}
