package sqlite

import (
	"context"
	"database/sql/driver"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Examined says what Examine found.
type Examined struct {
	Bytes    int64          // on disk
	Open     bool           // some process has it open, or ended without closing it
	Position store.Position // unless Open
}

// Examine looks at a store that no process has open, writes nothing, not even
// locks, and calls f for each live key. One that is open is left alone: its log
// is not in the database alone, and only who holds it knows where it ends.
func Examine(ctx context.Context, dir string, f func(key string, value []byte) error) (found Examined, err error) {
	path := filepath.Join(dir, databaseName)
	if _, err := os.Lstat(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return found, fault.New(fault.NotFound, "store_not_found", "there is no store in %s", dir)
		}
		return found, fault.New(fault.Precondition, "store_unreadable", "the store in %s cannot be looked at", dir).Because(err)
	}
	found.Bytes, found.Open = size(dir)
	if found.Open {
		return found, nil
	}
	c, err := openWith(path, url.Values{
		"immutable":  {"1"}, // not one file is made beside the database
		"_defensive": {"1"},
		"_pragma":    {"query_only(1)", "cell_size_check(1)", "trusted_schema(0)", "temp_store(memory)"},
	})
	if err != nil {
		return found, err
	}
	defer c.close()
	var app int64
	if err := c.query("PRAGMA application_id", scan(&app)); err != nil {
		return found, err
	}
	if app != applicationID {
		return found, fault.New(fault.Precondition, "foreign_database", "%s belongs to another program", path).
			Fix("give the store a directory of its own")
	}
	if err := c.check(); err != nil {
		return found, err
	}
	m, err := readMeta(c)
	if err != nil {
		return found, err
	}
	found.Position, err = (&Store{epoch: m.epoch}).read(ctx, c, m, func(key string, _ uint64, value []byte) error { return f(key, value) })
	return found, err
}

// Size returns how many bytes the store takes on disk.
func (s *Store) Size() int64 {
	n, _ := size(s.dir)
	return n
}

func size(dir string) (bytes int64, open bool) {
	for _, suffix := range []string{"", "-wal"} {
		if info, err := os.Stat(filepath.Join(dir, databaseName+suffix)); err == nil {
			bytes += info.Size()
			open = open || suffix != "" && info.Size() > 0
		}
	}
	return bytes, open
}

// Check reads the whole store, beside all that goes on, and says whether it is intact.
func (s *Store) Check() error {
	if !s.checking.TryLock() {
		return fault.New(fault.Exhausted, "check_under_way", "the store is being checked already").Fix("try again later")
	}
	defer s.checking.Unlock()
	c, _, _, err := s.snapshot()
	if err != nil {
		return err
	}
	defer s.files.RUnlock()
	defer c.close()
	return c.check()
}

// check looks at every page of what the connection sees.
func (c *conn) check() error {
	return c.query("PRAGMA quick_check(1)", func(r []driver.Value) error {
		if what, ok := r[0].(string); !ok || what != "ok" {
			return corrupt("%v", r[0])
		}
		return nil
	})
}
