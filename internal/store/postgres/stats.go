package postgres

import (
	"context"
	"time"

	"github.com/plastron/plastron/internal/store"
)

// Stats implements store.Store.
func (s *Store) Stats(ctx context.Context) (st store.Stats, err error) {
	err = s.read(ctx, func(c *session) error {
		limited, stop := context.WithTimeout(ctx, s.limit.call)
		defer stop()
		rows, err := c.rows(limited, s.sql.stats, textParam(s.schema))
		if err != nil {
			return explain(ctx, err)
		}
		var begin, end, oldest, bytes int64
		if len(rows) != 1 || len(rows[0]) != 5 || copy(st.Begin.Epoch[:], rows[0][0]) != len(st.Begin.Epoch) {
			return corrupt("plastron_head is empty")
		}
		if err := numbers(rows[0][1:], &begin, &end, &oldest, &bytes); err != nil {
			return err
		}
		st.Engine, st.Bytes, st.Batches = "postgres", bytes, uint64(end-begin)
		st.End = store.Position{Epoch: st.Begin.Epoch, Revision: uint64(end)}
		st.Begin.Revision = uint64(begin)
		if oldest != 0 {
			st.Oldest = time.Unix(0, oldest).UTC()
		}
		return nil
	})
	return st, err
}

// Compactable implements store.Store.
func (s *Store) Compactable(ctx context.Context, keep uint64, before time.Time) (rev uint64, err error) {
	err = s.read(ctx, func(c *session) error {
		limited, stop := context.WithTimeout(ctx, s.limit.call)
		defer stop()
		rows, err := c.rows(limited, s.sql.compactable, numberParam(int64(min(keep, 1<<62))), numberParam(before.UnixNano()))
		if err != nil {
			return explain(ctx, err)
		}
		if len(rows) == 0 {
			return nil
		}
		n, err := int64Of(rows, 0)
		rev = uint64(n)
		return err
	})
	return rev, err
}
