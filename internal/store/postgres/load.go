package postgres

import (
	"context"

	"github.com/plastron/plastron/internal/store"
)

// Load implements store.Store. It uses a connection of its own, and the
// transaction that sees one snapshot.
func (s *Store) Load(ctx context.Context, f func(key string, rev uint64, value []byte) error) (store.Position, error) {
	if err := s.usable(); err != nil {
		return store.Position{}, err
	}
	c, err := s.connect(ctx, "-l")
	if err != nil {
		return store.Position{}, err
	}
	defer c.close()
	at, err := s.load(ctx, c, f)
	if err != nil {
		return store.Position{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loaded = at.Epoch
	return at, nil
}

func (s *Store) load(ctx context.Context, c *session, f func(key string, rev uint64, value []byte) error) (at store.Position, err error) {
	// It lasts as long as it lasts; a client that is gone is noticed by TCP.
	_, err = c.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL statement_timeout = 0").ReadAll()
	if err != nil {
		return at, explain(ctx, err)
	}
	head, err := c.rows(ctx, s.sql.head)
	if err != nil {
		return at, explain(ctx, err)
	}
	if len(head) != 1 || copy(at.Epoch[:], head[0][0]) != len(at.Epoch) {
		return at, corrupt("plastron_head is empty")
	}
	rev, err := number(head[0][1])
	if err != nil {
		return at, err
	}
	at.Revision = uint64(rev)

	var bad error
	r := c.ExecParams(ctx, s.sql.load, nil, nil, nil, []int16{1})
	for bad == nil && r.NextRow() {
		v := r.Values()
		rev, err := number(v[1])
		if err != nil || v[2] == nil {
			bad = corrupt("a row of plastron_kv makes no sense")
			break
		}
		bad = f(string(v[0]), uint64(rev), v[2][:len(v[2]):len(v[2])])
	}
	if bad != nil {
		c.Conn().Close() // what it still sends is not wanted
		r.Close()
		return at, bad
	}
	if _, err := r.Close(); err != nil {
		return at, explain(ctx, err)
	}
	return at, nil
}

// Compact implements store.Store. What is compacted is said first and forgotten
// after, in short transactions: a reader that sees rows missing sees that too.
func (s *Store) Compact(ctx context.Context, before uint64) error {
	if err := s.usable(); err != nil {
		return err
	}
	c, err := s.connect(ctx, "-c")
	if err != nil {
		return err
	}
	defer c.close()
	// Beyond what the database can count is all of it.
	rows, err := c.rows(ctx, s.sql.compact, numberParam(int64(min(before, 1<<63-1))))
	if err != nil {
		return explain(ctx, err)
	}
	to, err := int64Of(rows, 0)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.compacted = max(s.compacted, uint64(to))
	s.announceLocked()
	s.mu.Unlock()
	for {
		r := c.ExecParams(ctx, s.sql.forget, [][]byte{numberParam(to).value}, []uint32{oidInt8}, []int16{1}, nil).Read()
		if r.Err != nil {
			return explain(ctx, r.Err)
		}
		if r.CommandTag.RowsAffected() == 0 {
			return nil
		}
	}
}

var _ store.Store = (*Store)(nil)
