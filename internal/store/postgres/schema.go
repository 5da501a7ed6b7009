package postgres

import (
	"context"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

const (
	schemaFormat  = 1
	oldestVersion = 120000
	creationLock  = 0x506c7374726f6e // "Plstron": advisory lock of those who create or change the tables
)

// Keys are bytea, so that they are compared byte by byte, whatever the
// database's locale (R16, R84). log's rows never change once written. The head
// row is written by every commit: the room around it keeps that cheap.
const schema = `
	CREATE TABLE {s}.plastron_head (
		one       boolean PRIMARY KEY DEFAULT true CHECK (one),
		format    integer NOT NULL,
		epoch     bytea NOT NULL CHECK (length(epoch) = 16),
		rev       bigint NOT NULL,
		compacted bigint NOT NULL,
		origin    text NOT NULL
	) WITH (fillfactor = 10);
	CREATE TABLE {s}.plastron_log (
		rev   bigint PRIMARY KEY,
		prev  bigint NOT NULL,
		time  bigint NOT NULL,
		id    bytea NOT NULL,
		batch bytea NOT NULL
	);
	CREATE TABLE {s}.plastron_kv (
		key   bytea PRIMARY KEY,
		rev   bigint NOT NULL,
		value bytea NOT NULL
	)`

// statements are the SQL of one store, with the schema's name in it.
type statements struct {
	commit, lock, fetch, find, touch, head, load, epoch, compact, forget, stats, compactable string
}

func newStatements(schema string) statements {
	in := func(sql string) string { return strings.ReplaceAll(sql, "{s}", schema) }
	return statements{
		commit: in(commitSQL),
		lock:   in("SELECT FROM {s}.plastron_head FOR UPDATE"),
		fetch: in(`SELECT h.epoch, h.rev, h.compacted, l.rev, l.prev, l.time, l.id, l.batch FROM {s}.plastron_head h
			LEFT JOIN (SELECT rev, prev, time, id, CASE WHEN rev > $1 THEN batch END AS batch
				FROM {s}.plastron_log WHERE rev >= $1 ORDER BY rev LIMIT 64) l ON true ORDER BY l.rev`),
		find:    in("SELECT rev, batch FROM {s}.plastron_log WHERE rev > $1 AND id = $2"),
		touch:   in("UPDATE {s}.plastron_head SET rev = rev"),
		head:    in("SELECT epoch, rev FROM {s}.plastron_head"),
		load:    in("SELECT key, rev, value FROM {s}.plastron_kv ORDER BY key"),
		epoch:   in("UPDATE {s}.plastron_head SET epoch = $2 WHERE epoch = $1"),
		compact: in("UPDATE {s}.plastron_head SET compacted = greatest(compacted, least($1, rev)) RETURNING compacted"),
		forget: in(`DELETE FROM {s}.plastron_log WHERE rev IN
			(SELECT rev FROM {s}.plastron_log WHERE rev <= $1 ORDER BY rev LIMIT 256)`),
		stats: in(`SELECT epoch, compacted, rev, coalesce((SELECT time FROM {s}.plastron_log l WHERE l.rev = compacted + 1), 0),
			pg_total_relation_size(($1 || '.plastron_head')::regclass) + pg_total_relation_size(($1 || '.plastron_log')::regclass)
				+ pg_total_relation_size(($1 || '.plastron_kv')::regclass) FROM {s}.plastron_head`),
		compactable: in(`SELECT rev FROM {s}.plastron_log WHERE rev <= (SELECT rev FROM {s}.plastron_head) - $1 AND time < $2
			ORDER BY rev DESC LIMIT 1`),
	}
}

// found is the database as Open leaves it.
type found struct {
	Opened
	epoch          store.Epoch
	rev, compacted uint64
	id             []byte // of the log row at rev, nil if there is none
}

// prepare looks at the database and creates the tables if there are none, all in
// one transaction and one process at a time.
func (s *Store) prepare(ctx context.Context, c *session) (f found, err error) {
	ctx, stop := context.WithTimeout(ctx, 4*s.limit.call)
	defer stop()
	do := func(sql string) {
		if err == nil {
			_, err = c.Exec(ctx, sql).ReadAll()
		}
	}
	do("BEGIN ISOLATION LEVEL READ COMMITTED")
	do(s.limit.settings(true))
	do("SET LOCAL lock_timeout = '15s'; SET LOCAL statement_timeout = '15s'; SET LOCAL idle_in_transaction_session_timeout = '15s'")
	if err == nil {
		_, err = c.rows(ctx, "SELECT pg_advisory_xact_lock($1)", numberParam(creationLock))
	}
	if err != nil {
		return f, err
	}
	if err := s.choose(ctx, c); err != nil {
		return f, err
	}
	exists, err := c.rows(ctx, `SELECT (to_regclass($1 || '.plastron_head') IS NOT NULL)::int::bigint`, textParam(s.schema))
	if err != nil {
		return f, err
	}
	n, err := int64Of(exists, 0)
	if err != nil {
		return f, err
	}
	if n == 0 && s.config.Existing {
		return f, fault.New(fault.NotFound, "store_not_found", "there is no store in schema %s of the database", s.schema).
			Fix("see whether the configuration names the right place")
	}
	if n == 0 {
		do(strings.ReplaceAll(schema, "{s}", s.schema))
		if err != nil {
			return f, err
		}
	}
	if err := s.settle(ctx, c, n == 0, &f); err != nil {
		return f, err
	}
	do("COMMIT")
	return f, err
}

// choose finds the schema and refuses one that is not for us.
func (s *Store) choose(ctx context.Context, c *session) error {
	rows, err := c.rows(ctx, `SELECT quote_ident(current_schema()), current_setting('server_version_num')::bigint,
		(to_regclass(quote_ident(current_schema()) || '.registered_entries') IS NOT NULL
			OR to_regclass(quote_ident(current_schema()) || '.attested_node_entries') IS NOT NULL)::int::bigint`)
	if err != nil {
		return err
	}
	var version, spire int64
	if len(rows) == 1 && len(rows[0]) == 3 {
		err = numbers(rows[0][1:], &version, &spire)
	}
	switch {
	case err != nil:
		return err
	case version < oldestVersion:
		return fault.New(fault.Precondition, "database_too_old", "the database is PostgreSQL %d, the oldest that works is %d", version/10000, oldestVersion/10000).
			Fix("upgrade it")
	case len(rows[0][0]) == 0:
		return fault.New(fault.Precondition, "database_privilege", "the search path names no schema that exists and that the database user may use").
			Fix("create a schema for it: CREATE SCHEMA plastron AUTHORIZATION the user, and put it first in the user's search path")
	case spire != 0:
		return fault.New(fault.Precondition, "spire_database", "schema %s holds SPIRE's tables and is left untouched", rows[0][0]).
			Fix("name a database or schema of its own in the connection string")
	}
	s.schema = string(rows[0][0])
	s.sql = newStatements(s.schema)
	return nil
}

// settle reads the head row, makes it when the tables are new, and draws a new
// epoch when the tables have come from elsewhere.
func (s *Store) settle(ctx context.Context, c *session, fresh bool, f *found) error {
	// The system's identifier may be hidden from us, and is left out then.
	origins, err := c.rows(ctx, `SELECT concat_ws('/',
		CASE WHEN has_function_privilege('pg_control_system()', 'EXECUTE') THEN (SELECT system_identifier::text FROM pg_control_system()) ELSE '' END,
		(SELECT oid::text FROM pg_database WHERE datname = current_database()), ($1 || '.plastron_head')::regclass::oid::text)`, textParam(s.schema))
	if err != nil {
		return err
	}
	if len(origins) != 1 {
		return corrupt("its origin is not known")
	}
	origin := string(origins[0][0])
	if fresh {
		f.Opened, f.epoch = Opened{NewEpoch: true, Reason: "created"}, store.NewEpoch()
		_, err := c.rows(ctx, strings.ReplaceAll("INSERT INTO {s}.plastron_head VALUES (true, $1, $2, 0, 0, $3)", "{s}", s.schema),
			numberParam(schemaFormat), bytesParam(f.epoch[:]), textParam(origin))
		return err
	}
	rows, err := c.rows(ctx, strings.ReplaceAll("SELECT format::bigint, rev, compacted, epoch, origin FROM {s}.plastron_head FOR UPDATE", "{s}", s.schema))
	if err != nil {
		return err
	}
	var format, rev, compacted int64
	if len(rows) != 1 {
		return corrupt("plastron_head has %d rows", len(rows))
	}
	if err := numbers(rows[0], &format, &rev, &compacted); err != nil {
		return err
	}
	if format > schemaFormat {
		return newerSchema(format)
	}
	if format < 1 || rev < compacted || compacted < 0 || copy(f.epoch[:], rows[0][3]) != len(f.epoch) {
		return corrupt("plastron_head makes no sense")
	}
	f.rev, f.compacted = uint64(rev), uint64(compacted)
	// The other tables are looked at now, not at the first commit.
	newest, err := c.rows(ctx, s.sql.fetch, numberParam(rev))
	if err != nil {
		return err
	}
	if len(newest) > 0 && len(newest[0]) > 6 {
		f.id = newest[0][6]
	}
	if _, err := c.rows(ctx, s.sql.load+" LIMIT 0"); err != nil {
		return err
	}
	lost := f.epoch == s.config.Seen.Epoch && f.rev < s.config.Seen.Revision
	if string(rows[0][4]) == origin && !lost {
		return nil
	}
	f.Opened, f.epoch = Opened{NewEpoch: true, Reason: "restored"}, store.NewEpoch()
	_, err = c.rows(ctx, strings.ReplaceAll("UPDATE {s}.plastron_head SET epoch = $1, origin = $2", "{s}", s.schema), bytesParam(f.epoch[:]), textParam(origin))
	return err
}

func corrupt(format string, args ...any) *fault.Error {
	return fault.New(fault.Precondition, "store_corrupt", "the store's database is damaged: "+format, args...).
		Fix("restore it from a backup: see docs/store.md")
}

func newerSchema(format int64) *fault.Error {
	return fault.New(fault.Precondition, "schema_newer", "the database is of format %d, this program reads up to %d", format, schemaFormat).
		Fix("use the newer version of Plastron that wrote it")
}
