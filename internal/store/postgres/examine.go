package postgres

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Needed is how many sessions a server has open at once at most: one each for
// commits, following, reading, loading and compacting.
const Needed = 5

// wrongClock is from where on it matters that the clocks of two hosts differ.
const wrongClock = 5 * time.Second

// Examine looks at a store as a server would find it, calls each for those of some
// keys that are there, and writes nothing. Its errors are those of Open; of
// fault.NotFound the engine is known.
func (c Config) Examine(ctx context.Context, keys []string, each func(key string, value []byte) error) (found store.Look, err error) {
	s := &Store{config: c, name: "plastron-doctor", log: slog.New(slog.DiscardHandler), limit: defaultLimits()}
	conn, err := s.dial(ctx, "")
	if err != nil {
		return found, err
	}
	defer conn.close()
	ctx, stop := context.WithTimeout(ctx, s.limit.call)
	defer stop()
	if err := s.examine(ctx, conn, &found, keys, each); err != nil {
		return found, explain(ctx, err)
	}
	return found, nil
}

func (s *Store) examine(ctx context.Context, c *session, found *store.Look, keys []string, each func(key string, value []byte) error) error {
	if _, err := c.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").ReadAll(); err != nil { // it ends with the session
		return err
	}
	if err := s.choose(ctx, c); err != nil {
		return err
	}
	found.Engine = fmt.Sprintf("PostgreSQL %s at %s", c.ParameterStatus("server_version"), c.host)
	var err error
	if found.Remarks, err = s.surroundings(ctx, c); err != nil {
		return err
	}
	n, err := s.one(ctx, c, `SELECT (to_regclass($1 || '.plastron_head') IS NOT NULL)::int::bigint`, textParam(s.schema))
	if err != nil {
		return err
	}
	if n == 0 {
		return fault.New(fault.NotFound, "store_not_found", "there is no store in schema %s of the database", s.schema).
			Fix("see whether the configuration names the right place; a first server makes the store")
	}
	format, err := s.one(ctx, c, "SELECT format::bigint FROM "+s.schema+".plastron_head")
	if err != nil {
		return err
	}
	if format > schemaFormat {
		return newerSchema(format)
	}
	rows, err := c.rows(ctx, s.sql.stats, textParam(s.schema))
	if err != nil {
		return err
	}
	var revision int64
	if len(rows) != 1 || len(rows[0]) != 5 || copy(found.Epoch[:], rows[0][0]) != len(found.Epoch) {
		return corrupt("plastron_head is empty")
	}
	if err := numbers([][]byte{rows[0][2], rows[0][4]}, &revision, &found.Bytes); err != nil {
		return err
	}
	found.Revision = uint64(revision)
	for _, key := range keys {
		rows, err := c.rows(ctx, "SELECT value FROM "+s.schema+".plastron_kv WHERE key = $1", bytesParam([]byte(key)))
		if err == nil && len(rows) == 1 {
			err = each(key, rows[0][0])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// one executes a statement that answers one number.
func (s *Store) one(ctx context.Context, c *session, sql string, params ...param) (int64, error) {
	rows, err := c.rows(ctx, sql, params...)
	if err != nil {
		return 0, err
	}
	return int64Of(rows, 0)
}

// surroundings are what a server needs beside its tables.
func (s *Store) surroundings(ctx context.Context, c *session) ([]store.Remark, error) {
	began := time.Now()
	ms, err := s.one(ctx, c, "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
	if err != nil {
		return nil, err
	}
	middle := began.Add(time.Since(began) / 2)
	free, err := s.one(ctx, c, `SELECT least(
		current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
			- coalesce(current_setting('reserved_connections', true)::bigint, 0) - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
		(SELECT rolconnlimit - (SELECT count(*) FROM pg_stat_activity WHERE usename = current_user) FROM pg_roles WHERE rolname = current_user AND rolconnlimit >= 0),
		(SELECT datconnlimit - (SELECT count(*) FROM pg_stat_activity a WHERE a.datname = d.datname) FROM pg_database d WHERE d.datname = current_database() AND datconnlimit >= 0))`)
	if err != nil {
		return nil, err
	}
	p, err := s.config.parse("")
	if err != nil {
		return nil, err
	}
	_, secured := c.Conn().(*tls.Conn)
	return []store.Remark{network(p, c.host, secured), connections(free+1, c.pooled), clock(time.UnixMilli(ms).Sub(middle))}, nil // one is ours
}

// network says who could be between here and the database.
func network(p *pgconn.Config, host string, secured bool) store.Remark {
	r := store.Remark{About: "network"}
	for _, h := range hosts(p, "") {
		if address(h) != host || (h.TLSConfig != nil) != secured {
			continue
		}
		switch {
		case local(h.Host):
			r.Found = "it is on this machine"
		case !secured:
			r.Found, r.Fix = "the connection to "+host+" is not encrypted", "unless nobody else is on that network, add sslmode=verify-full and sslrootcert=FILE to the connection string"
		case h.TLSConfig.InsecureSkipVerify:
			r.Found, r.Fix = "the connection to "+host+" is encrypted, but the name in the database's certificate is not verified", "add sslmode=verify-full and sslrootcert=FILE to the connection string"
		default:
			r.Found = "the connection to " + host + " is encrypted, and the database's name verified"
		}
		break
	}
	return r
}

func connections(free int64, pooled bool) store.Remark {
	switch {
	case pooled:
		return store.Remark{About: "connections", Found: "a pooler hands them out"}
	case free < Needed:
		return store.Remark{About: "connections", Found: fmt.Sprintf("%d more are free, and a server may need %d", max(free, 0), Needed),
			Fix: "raise max_connections, or the limit of the user or database; pg_stat_activity says who has them"}
	}
	return store.Remark{About: "connections", Found: fmt.Sprintf("%d more are free", free)}
}

func clock(ahead time.Duration) store.Remark {
	r := store.Remark{About: "clock", Found: fmt.Sprintf("the database's differs from this one by %s", ahead.Abs().Round(time.Millisecond))}
	if ahead.Abs() >= wrongClock {
		r.Fix = "one of the two hosts keeps wrong time: set both by NTP"
	}
	return r
}
