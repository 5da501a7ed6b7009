package sqlite

import (
	"context"
	"database/sql/driver"
	"maps"
	"path/filepath"
	"slices"

	"github.com/plastron/plastron/internal/store"
)

// load fills the map of revisions and finds the end of the log, at Open.
func (s *Store) load(ctx context.Context, m meta) error {
	s.revs = &revisions{seed: newSeed(), of: make(map[[16]byte]uint64)}
	s.folded, s.compacted = m.folded, m.compacted
	s.head = m.folded
	err := s.writer.query("SELECT key, rev FROM kv", func(v []driver.Value) error {
		key, ok := v[0].([]byte)
		rev, ok2 := revision(v[1])
		if !ok || !ok2 {
			return corrupt("a row of the table kv has a column of the wrong kind")
		}
		s.revs.of[s.revs.hash(string(key))] = rev
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	return readTail(ctx, s.writer.conn, m.folded, func(r row, writes []store.Write) {
		s.head = r.rev
		s.tail += r.weight()
		s.revs.apply(r.rev, writes)
		s.remember(r)
	})
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

// Load implements store.Store. f must not call the store.
func (s *Store) Load(ctx context.Context, f func(key string, rev uint64, value []byte) error) (store.Position, error) {
	c, m, err := s.snapshot()
	if err != nil {
		return store.Position{}, err
	}
	defer s.files.RUnlock()
	defer c.close()

	// The tail's changes win over kv, which may already hold some of them.
	at := store.Position{Epoch: s.epoch, Revision: m.folded}
	tail := make(map[string]change)
	err = readTail(ctx, c, m.folded, func(r row, writes []store.Write) {
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
// closes the connection and releases files.
func (s *Store) snapshot() (c *conn, m meta, err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.usable(); err != nil {
		return nil, m, err
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
	return c, m, err
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
