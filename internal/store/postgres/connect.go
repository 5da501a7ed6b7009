package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/plastron/plastron/internal/fault"
)

// maxString bounds a connection string.
const maxString = 16 << 10

// parse reads the connection string and the files that it names.
func (c Config) parse(name string) (*pgconn.Config, error) {
	if c.ConnectionString == "" || len(c.ConnectionString) > maxString {
		return nil, fault.New(fault.Invalid, "connection_string_invalid", "connection_string has %d bytes; it must have 1 to %d", len(c.ConnectionString), maxString).
			Fix("write it as postgres://USER:PASSWORD@HOST:5432/DATABASE?sslmode=verify-full&sslrootcert=FILE")
	}
	p, err := pgconn.ParseConfig(c.ConnectionString)
	if err != nil {
		// Without the cause: where the string is wrong nobody knows which part of it is the password.
		return nil, fault.New(fault.Invalid, "connection_string_invalid", "the connection string is not one that PostgreSQL's clients understand, or a file that it names cannot be read").
			Fix("write it as postgres://USER:PASSWORD@HOST:5432/DATABASE?sslmode=verify-full&sslrootcert=FILE, with special characters in the password percent-encoded")
	}
	if unescaped(c.ConnectionString, p) {
		return nil, fault.New(fault.Invalid, "connection_string_invalid", "the connection string has parts that look like the rest of a password").
			Fix("percent-encode special characters of the password in a URL (/ is %%2F, ? is %%3F, # is %%23, @ is %%40), or put it in quotes in the form key='value'")
	}
	plain, secured := map[string]bool{}, map[string]bool{}
	note := func(host string, tls bool) {
		if tls {
			secured[host] = true
		} else {
			plain[host] = true
		}
	}
	note(p.Host, p.TLSConfig != nil)
	for _, f := range p.Fallbacks {
		note(f.Host, f.TLSConfig != nil)
	}
	for host := range plain {
		if secured[host] && !local(host) {
			return nil, fault.New(fault.Invalid, "connection_may_be_plain", "the connection to the database at %s would fall back to plain text when TLS fails", host).
				Fix("add sslmode=verify-full and sslrootcert=FILE to the connection string, or sslmode=disable if the network is trusted")
		}
	}
	if p.ConnectTimeout <= 0 || p.ConnectTimeout > 5*time.Second {
		p.ConnectTimeout = 5 * time.Second
	}
	dialer := net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 2 * time.Second, Interval: time.Second, Count: 3},
		Control:         userTimeout,
	}
	p.DialFunc = dialer.DialContext
	// Only what can be written: among several hosts that is the primary.
	p.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	p.RuntimeParams["application_name"] = name
	return p, nil
}

// unescaped tells strings whose password was cut by a character with a meaning:
// its rest would be taken for a database, a setting or nothing, and show up in
// errors.
func unescaped(text string, p *pgconn.Config) bool {
	if _, rest, url := strings.Cut(text, "://"); url {
		at := strings.IndexAny(rest, "/?#")
		if at >= 0 && strings.Contains(rest[at:], "@") || strings.Contains(rest, "#") {
			return true
		}
	}
	for key := range p.RuntimeParams {
		if strings.Trim(strings.ToLower(key), "abcdefghijklmnopqrstuvwxyz0123456789_.") != "" {
			return true
		}
	}
	return false
}

// Address says where the database is: hosts, ports and its name, no secret.
// It is empty if the connection string is not valid.
func (c Config) Address() string {
	p, err := c.parse("")
	if err != nil {
		return ""
	}
	var names []string
	for _, h := range hosts(p, "") {
		if name := address(h); !slices.Contains(names, name) { // each is there with TLS and without
			names = append(names, name)
		}
	}
	return strings.Join(names, ",") + "/" + p.Database
}

// local tells hosts that no network lies before.
func local(host string) bool {
	if strings.HasPrefix(host, "/") || strings.HasPrefix(host, "@") || host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}

// tcpTimeout is how long what was sent may stay unacknowledged, at both ends.
const tcpTimeout = 5 * time.Second

// settings are made for each session, or, behind a pooler, for each transaction.
// Nobody holds a lock for longer than they allow. Statements are planned once for
// a session, since that takes longer than what they do; and as for large tables
// from the start, by index, because a plan does not see a table grow.
func (l limits) settings(local bool) string {
	set := func(name, value string) string { return fmt.Sprintf("set_config('%s', %s, %t)", name, value, local) }
	limit := func(name string, d time.Duration) string { return set(name, fmt.Sprintf("'%d'", d.Milliseconds())) }
	return "SELECT " + strings.Join([]string{
		limit("statement_timeout", l.statement),
		limit("lock_timeout", l.lock),
		limit("idle_in_transaction_session_timeout", l.idle),
		limit("tcp_user_timeout", tcpTimeout),
		set("plan_cache_mode", "'force_generic_plan'"),
		set("enable_seqscan", "'off'"),
		set("enable_hashjoin", "'off'"),
		set("enable_mergejoin", "'off'"),
		set("jit", "'off'"),
		// R73: what is acknowledged survives a crash, and a failover to a
		// synchronous replica, whatever the database's default.
		set("synchronous_commit", "CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on' ELSE current_setting('synchronous_commit') END"),
	}, ", ")
}

// connect opens a session for a store that is open: whatever is wrong now was
// right before and may be so again.
func (s *Store) connect(ctx context.Context, role string) (*session, error) {
	c, err := s.dial(ctx, role)
	if err != nil {
		return nil, unusable(err)
	}
	return c, nil
}

// unusable tells a caller that the store does not work now, whatever the cause.
func unusable(err error) error {
	f, ok := errors.AsType[*fault.Error](err)
	if ok && f.Kind == fault.Unavailable {
		return f
	}
	reason := "store_unavailable"
	if ok {
		reason = f.Reason
	}
	return fault.New(fault.Unavailable, reason, "the store cannot be used").
		Fix("see to the failure named in the server's log; the next use tries again").Because(err)
}

// rows executes one statement and returns its rows, in binary format.
func (c *session) rows(ctx context.Context, sql string, params ...param) ([][][]byte, error) {
	values, oids, formats := split(params)
	r := c.ExecParams(ctx, sql, values, oids, formats, []int16{1}).Read()
	return r.Rows, r.Err
}

// explain turns what pgconn or the database said into a fault. It keeps the
// cause; neither holds the password.
func explain(ctx context.Context, err error) error {
	if f, ok := errors.AsType[*fault.Error](err); ok {
		return f
	}
	if ctx.Err() == context.Canceled {
		return fault.New(fault.Unavailable, "canceled", "the request to the database was given up").Because(ctx.Err())
	}
	pg, ok := errors.AsType[*pgconn.PgError](err)
	var f *fault.Error
	switch {
	case errors.Is(err, pgconn.ErrReadOnlyConnection) || ok && pg.Code == "25006":
		f = fault.New(fault.Unavailable, "database_read_only", "the database can only be read: it is a replica, or was made read-only").
			Fix("name the primary, or all hosts, in the connection string; see default_transaction_read_only")
	case !ok:
		f = fault.New(fault.Unavailable, "database_unreachable", "the database does not answer").
			Fix("see whether it runs, and whether host, port and TLS settings of the connection string are right")
	case strings.HasPrefix(pg.Code, "28"):
		f = fault.New(fault.Precondition, "database_login", "the database refuses the login").
			Fix("see to user and password in the connection string, and to pg_hba.conf")
	case pg.Code == "3D000":
		f = fault.New(fault.Precondition, "database_unknown", "there is no such database").
			Fix("create it, or correct the name in the connection string")
	case pg.Code == "42501":
		f = fault.New(fault.Precondition, "database_privilege", "the database user lacks a privilege").
			Fix("make it the owner of a schema of its own: CREATE SCHEMA plastron AUTHORIZATION the user, and put it first in the search path")
	case pg.Code == "42P01" || pg.Code == "42P07" || pg.Code == "42703" || pg.Code == "42883" || pg.Code == "42804":
		f = fault.New(fault.Precondition, "schema_foreign", "the tables named plastron_head, plastron_log and plastron_kv are not those of Plastron").
			Fix("use a schema or database of its own")
	case pg.Code == "53100":
		f = fault.New(fault.Unavailable, "disk_full", "the database's disk is full").
			Fix("make room on it; nothing of the change was written")
	case strings.HasPrefix(pg.Code, "57P0"):
		f = fault.New(fault.Unavailable, "database_unreachable", "the database is starting or going down").Fix("wait, or see its log")
	case pg.Code == "53300":
		f = fault.New(fault.Unavailable, "database_unreachable", "the database takes no more connections now").
			Fix("wait, or raise max_connections")
	case pg.Code == "55P03" || pg.Code == "57014" || pg.Code == "40001" || pg.Code == "40P01":
		f = fault.New(fault.Unavailable, "database_busy", "another session holds the database's lock for too long").
			Fix("look for a stalled session in pg_stat_activity; then try again")
	case pg.Code == "25P03":
		f = fault.New(fault.Unavailable, "database_busy", "the database ended the session, for nothing was done in it for too long").
			Fix("see whether the database or this machine stood still; then try again")
	default:
		f = fault.New(fault.Unavailable, "database_failed", "the database failed").Fix("see its log; then try again")
	}
	return f.Because(err)
}

// refused reports whether the database itself said no: then the transaction is
// not, and will not be, committed. It says nothing definite when it goes down.
func refused(err error) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return ok && pg.SeverityUnlocalized == "ERROR"
}
