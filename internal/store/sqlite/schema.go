package sqlite

import (
	"database/sql/driver"
	"math"
	"sync"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

const (
	databaseName  = "plastron.db"
	schemaVersion = 1
	applicationID = 0x506c7374 // "Plst": says whose file it is
)

// Keys are blobs, so that they are compared byte by byte, whatever they hold
// (R16, R84). log's rows never change once written; kv follows the log.
func schema() []string {
	return []string{
		`CREATE TABLE meta (
			id        INTEGER PRIMARY KEY CHECK (id = 1),
			schema    INTEGER NOT NULL, -- version of this schema
			epoch     BLOB NOT NULL CHECK (length(epoch) = 16),
			folded    INTEGER NOT NULL, -- kv holds the log up to here
			compacted INTEGER NOT NULL  -- log rows up to here are gone
		) STRICT`,
		`CREATE TABLE log (
			rev   INTEGER PRIMARY KEY,
			prev  INTEGER NOT NULL,
			time  INTEGER NOT NULL, -- writer's clock, nanoseconds since 1970
			batch BLOB NOT NULL     -- store.AppendWrites
		) STRICT`,
		`CREATE TABLE kv (
			key   BLOB PRIMARY KEY,
			rev   INTEGER NOT NULL,
			value BLOB -- NULL is the empty value
		) STRICT, WITHOUT ROWID`,
	}
}

// meta is the row of table meta.
type meta struct {
	fresh     bool // made just now
	epoch     store.Epoch
	folded    uint64
	compacted uint64
}

// row is one row of table log.
type row struct {
	rev, prev uint64
	time      int64
	batch     []byte
}

// writer is the one connection that writes.
type writer struct {
	*conn
	begin, commit, rollback *stmt
	insert                  *stmt // into log
	put, del                *stmt // in kv
}

func openWriter(path string) (*writer, error) {
	c, err := openConn(path)
	if err != nil {
		return nil, err
	}
	w := &writer{conn: c}
	var mode string
	err = w.query("PRAGMA journal_mode", func(v []driver.Value) error {
		mode, _ = v[0].(string)
		return nil
	})
	if err == nil && mode != "wal" { // SQLite falls back without a word
		err = fault.New(fault.Precondition, "no_wal", "the file system under %s cannot hold SQLite's WAL", path).
			Fix("put the store on a local disk")
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// prepareSchema makes the tables in an empty database and refuses one that is
// not ours or that is newer. A crash in between leaves the database empty.
func (w *writer) prepareSchema() (meta, error) {
	var app, tables int64
	if err := w.query("PRAGMA application_id", scan(&app)); err != nil {
		return meta{}, err
	}
	if err := w.query("SELECT count(*) FROM sqlite_schema", scan(&tables)); err != nil {
		return meta{}, err
	}
	if tables > 0 && app != applicationID {
		return meta{}, fault.New(fault.Precondition, "foreign_database", "%s belongs to another program", databaseName).
			Fix("give the store a directory of its own")
	}
	m := meta{fresh: tables == 0, epoch: store.NewEpoch()}
	if m.fresh {
		if err := w.createSchema(m.epoch); err != nil {
			return meta{}, err
		}
	} else {
		var err error
		if m, err = readMeta(w.conn); err != nil {
			return meta{}, err
		}
	}
	return m, w.prepareStatements()
}

func (w *writer) createSchema(epoch store.Epoch) error {
	statements := append([]string{"BEGIN IMMEDIATE", "PRAGMA application_id = 1349284724"}, schema()...)
	for _, sql := range statements {
		if err := w.exec(sql); err != nil {
			return err
		}
	}
	insert, err := w.prepare("INSERT INTO meta (id, schema, epoch, folded, compacted) VALUES (1, ?, ?, 0, 0)")
	if err != nil {
		return err
	}
	defer insert.close()
	if err := insert.exec(int64(schemaVersion), epoch[:]); err != nil {
		return err
	}
	return w.exec("COMMIT")
}

func (w *writer) prepareStatements() error {
	for _, p := range []struct {
		stmt **stmt
		sql  string
	}{
		{&w.begin, "BEGIN IMMEDIATE"},
		{&w.commit, "COMMIT"},
		{&w.rollback, "ROLLBACK"},
		{&w.insert, "INSERT INTO log (rev, prev, time, batch) VALUES (?, ?, ?, ?)"},
		{&w.put, "REPLACE INTO kv (key, rev, value) VALUES (?, ?, ?)"},
		{&w.del, "DELETE FROM kv WHERE key = ?"},
	} {
		s, err := w.keep(p.sql)
		if err != nil {
			return err
		}
		*p.stmt = s
	}
	return nil
}

// transaction runs f in one synced transaction.
func (w *writer) transaction(f func() error) error {
	if err := w.begin.exec(); err != nil {
		return err
	}
	err := f()
	if err == nil {
		err = w.commit.exec()
	}
	if err != nil {
		w.rollback.exec() // SQLite may have done it itself; either way nothing is left open
	}
	return err
}

func (w *writer) setMeta(sql string, arg driver.Value) error {
	s, err := w.prepare(sql)
	if err != nil {
		return err
	}
	defer s.close()
	return s.exec(arg)
}

func (w *writer) setEpoch(e store.Epoch) error {
	return w.setMeta("UPDATE meta SET epoch = ?", e[:])
}

// reader is the connection for log rows; lock it to use it.
type reader struct {
	sync.Mutex
	*conn
	after *stmt
}

func openReader(path string) (*reader, error) {
	c, err := openConn(path)
	if err != nil {
		return nil, err
	}
	return &reader{conn: c}, nil
}

const selectLog = "SELECT rev, prev, time, batch FROM log WHERE rev > ? ORDER BY rev"

// rows calls f with the log rows after a revision until it returns false. It
// fails when the rows are not one chain from there.
func (r *reader) rows(after uint64, f func(row) bool) error {
	r.Lock()
	defer r.Unlock()
	if r.after == nil {
		s, err := r.keep(selectLog)
		if err != nil {
			return err
		}
		r.after = s
	}
	return chain(r.after, after, f)
}

// errStop ends a query early.
type errStop struct{}

func (errStop) Error() string { return "stop" }

// chain runs a prepared selectLog.
func chain(s *stmt, after uint64, f func(row) bool) error {
	err := s.query(func(v []driver.Value) error {
		var r row
		if err := r.scan(v); err != nil {
			return err
		}
		if r.prev != after || r.rev != after+1 {
			return corrupt("log row %d follows %d, expected a row that follows %d", r.rev, r.prev, after)
		}
		after = r.rev
		if !f(r) {
			return errStop{}
		}
		return nil
	}, int64(after))
	if err == (errStop{}) {
		return nil
	}
	return err
}

func (r *row) scan(v []driver.Value) error {
	var ok [4]bool
	r.rev, ok[0] = revision(v[0])
	r.prev, ok[1] = revision(v[1])
	r.time, ok[2] = v[2].(int64)
	r.batch, ok[3] = v[3].([]byte)
	if ok != [4]bool{true, true, true, true} {
		return corrupt("log row %v has a column of the wrong kind", v[0])
	}
	return nil
}

func readMeta(c *conn) (meta, error) {
	var m meta
	found := false
	// schema is read by itself first: a newer one may have other columns.
	var version int64
	if err := c.query("SELECT schema FROM meta", scan(&version)); err != nil {
		return m, err
	}
	if version > schemaVersion {
		return m, fault.New(fault.Precondition, "schema_newer", "the store has schema version %d, this program knows %d", version, schemaVersion).
			Fix("use the newer program, or restore a backup from before the upgrade")
	}
	err := c.query("SELECT epoch, folded, compacted FROM meta", func(v []driver.Value) error {
		e, ok0 := v[0].([]byte)
		var ok1, ok2 bool
		m.folded, ok1 = revision(v[1])
		m.compacted, ok2 = revision(v[2])
		found = ok0 && ok1 && ok2 && len(e) == len(m.epoch) && m.compacted <= m.folded
		copy(m.epoch[:], e)
		return nil
	})
	if err == nil && (!found || version != schemaVersion) {
		err = corrupt("the table meta makes no sense")
	}
	return m, err
}

func scan(dest *int64) func([]driver.Value) error {
	return func(v []driver.Value) error {
		*dest, _ = v[0].(int64)
		return nil
	}
}

// revision reads a revision from a column.
func revision(v driver.Value) (uint64, bool) {
	n, ok := v.(int64)
	return uint64(n), ok && n >= 0 && n < math.MaxInt64
}
