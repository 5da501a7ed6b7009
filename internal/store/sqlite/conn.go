package sqlite

import (
	"context"
	"database/sql/driver"
	"errors"
	"io"
	"net/url"
	"path/filepath"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/plastron/plastron/internal/fault"
)

// conn is one connection, used by one goroutine at a time. It speaks to the
// driver directly: database/sql would add its pool, locks and conversions to
// every commit.
type conn struct {
	c    driver.Conn
	kept []*stmt
}

// openConn opens the database with the settings that every connection needs.
// Checkpoints are made by the fold loop only, never inside a commit.
func openConn(path string) (*conn, error) {
	return openWith(path, url.Values{
		"_defensive": {"1"},
		"_pragma": {
			"busy_timeout(5000)", "journal_mode(wal)", "synchronous(full)", "wal_autocheckpoint(0)",
			"journal_size_limit(67108864)", "cell_size_check(1)", "trusted_schema(0)", "temp_store(memory)",
			"fullfsync(1)", "checkpoint_fullfsync(1)", "cache_size(-8192)",
		},
	})
}

func openWith(path string, settings url.Values) (*conn, error) {
	p := filepath.ToSlash(path)
	if !strings.HasPrefix(p, "/") { // C:\dir
		p = "/" + p
	}
	u := url.URL{Scheme: "file", Path: p, RawQuery: settings.Encode()}
	var d sqlite.Driver
	c, err := d.Open(u.String())
	if err != nil {
		return nil, describe(err)
	}
	return &conn{c: c}, nil
}

// close finalizes the kept statements first: SQLite would otherwise keep the
// connection, its files and its locks for as long as they live.
func (c *conn) close() error {
	for _, s := range c.kept {
		s.close()
	}
	return c.c.Close()
}

// exec runs one statement without parameters.
func (c *conn) exec(sql string) error {
	s, err := c.prepare(sql)
	if err != nil {
		return err
	}
	defer s.close()
	return s.exec()
}

// query runs one statement and calls f with each row.
func (c *conn) query(sql string, f func(row []driver.Value) error, args ...driver.Value) error {
	s, err := c.prepare(sql)
	if err != nil {
		return err
	}
	defer s.close()
	return s.query(f, args...)
}

// stmt is a prepared statement. Who prepared it closes it.
type stmt struct {
	s    driver.Stmt
	args []driver.NamedValue
}

func (c *conn) prepare(sql string) (*stmt, error) {
	s, err := c.c.Prepare(sql)
	if err != nil {
		return nil, describe(err)
	}
	return &stmt{s: s}, nil
}

// keep prepares a statement that lives as long as the connection.
func (c *conn) keep(sql string) (*stmt, error) {
	s, err := c.prepare(sql)
	if err == nil {
		c.kept = append(c.kept, s)
	}
	return s, err
}

func (s *stmt) close() error { return s.s.Close() }

func (s *stmt) exec(args ...driver.Value) error {
	_, err := s.s.(driver.StmtExecContext).ExecContext(context.Background(), s.bind(args))
	return describe(err)
}

// query calls f with each row. The row's slice is used again for the next one,
// the values in it are not.
func (s *stmt) query(f func(row []driver.Value) error, args ...driver.Value) error {
	rows, err := s.s.(driver.StmtQueryContext).QueryContext(context.Background(), s.bind(args))
	if err != nil {
		return describe(err)
	}
	defer rows.Close()
	dest := make([]driver.Value, len(rows.Columns()))
	for {
		if err := rows.Next(dest); err == io.EOF {
			return nil
		} else if err != nil {
			return describe(err)
		}
		if err := f(dest); err != nil {
			return err
		}
	}
}

func (s *stmt) bind(args []driver.Value) []driver.NamedValue {
	s.args = s.args[:0]
	for i, a := range args {
		s.args = append(s.args, driver.NamedValue{Ordinal: i + 1, Value: a})
	}
	return s.args
}

// describe gives the failures that an operator can act on their fault; others
// stay as they are.
func describe(err error) error {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return err
	}
	switch e.Code() & 0xff { // the rest of the code is detail
	case sqlite3.SQLITE_FULL:
		return fault.New(fault.Unavailable, "disk_full", "the disk that holds the store is full").
			Fix("free some space; nothing needs a restart").Because(err)
	case sqlite3.SQLITE_IOERR:
		return fault.New(fault.Unavailable, "disk_error", "a disk operation of the store failed").Because(err)
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return corrupt("SQLite cannot read it").Because(err)
	case sqlite3.SQLITE_READONLY:
		return fault.New(fault.Unavailable, "read_only", "the disk that holds the store cannot be written").Because(err)
	case sqlite3.SQLITE_BUSY:
		return fault.New(fault.Unavailable, "busy", "another program has locked the store's database").
			Fix("end programs that write plastron.db; reading it is no harm").Because(err)
	}
	return err
}

func corrupt(format string, args ...any) *fault.Error {
	return fault.New(fault.Precondition, "store_corrupt", "the store's database is damaged: "+format, args...).
		Fix("restore it from a backup: see docs/store.md")
}

// isReason reports whether err's fault has the reason.
func isReason(err error, reason string) bool { return err != nil && fault.ReasonOf(err) == reason }
