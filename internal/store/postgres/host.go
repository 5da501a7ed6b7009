package postgres

import (
	"context"
	"errors"
	"net"
	"slices"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/plastron/plastron/internal/fault"
)

// timeline says which life of which cluster a session is with. A replica that is
// promoted begins one, with the next number.
type timeline struct {
	system string // empty if we may not know
	number int64  // 0 if the server does not tell
}

// before reports whether t is an earlier life of the same cluster: a primary that
// a failover has left behind.
func (t timeline) before(other timeline) bool {
	return t.system == other.system && t.number > 0 && t.number < other.number
}

// hosts returns what the connection string names, the host that was used last
// before the others: one that is out of reach costs a timeout each time.
func hosts(p *pgconn.Config, last string) []*pgconn.FallbackConfig {
	all := append([]*pgconn.FallbackConfig{{Host: p.Host, Port: p.Port, TLSConfig: p.TLSConfig}}, p.Fallbacks...)
	slices.SortStableFunc(all, func(a, b *pgconn.FallbackConfig) int {
		switch aLast, bLast := address(a) == last, address(b) == last; {
		case aLast && !bLast:
			return -1
		case bLast && !aLast:
			return 1
		}
		return 0
	})
	return all
}

func address(h *pgconn.FallbackConfig) string {
	return net.JoinHostPort(h.Host, strconv.Itoa(int(h.Port)))
}

// dial opens a session with the primary. role distinguishes the sessions of one
// store. The first session is with the newest of all that call themselves
// primary, and later ones are never with an older one: the log of a primary that
// was left behind ends where the failover was, and nobody reads what is written
// there.
func (s *Store) dial(ctx context.Context, role string) (*session, error) {
	p, err := s.config.parse(s.name + role)
	if err != nil {
		return nil, err
	}
	if err := s.config.checkSecrets(p); err != nil {
		return nil, err
	}
	s.mu.Lock()
	last := s.host
	s.mu.Unlock()
	var best *session
	var errs []error
	for _, h := range hosts(p, last) {
		if best != nil && (last != "" || best.host == address(h)) {
			continue
		}
		c, err := s.dialHost(ctx, p, h)
		if err == nil {
			err = s.current(c)
		}
		if err != nil {
			if fault.ReasonOf(err) == "database_stale" {
				s.log.WarnContext(ctx, "database has a second primary, which was left behind", "peer", c.host)
			}
			errs = append(errs, err)
			c.close()
			continue
		}
		best.close() // on an earlier timeline
		best = c
	}
	if best == nil {
		return nil, explain(ctx, errors.Join(errs...))
	}
	s.mu.Lock()
	s.host = best.host
	s.mu.Unlock()
	return best, nil
}

// current refuses a session with a primary that was left behind, and remembers
// the newest life that was seen.
func (s *Store) current(c *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.timeline.before(s.newest) {
		if c.timeline.number > 0 {
			s.newest = c.timeline
		}
		return nil
	}
	return fault.New(fault.Unavailable, "database_stale", "the database at %s is on timeline %d, and timeline %d was seen: it is a primary from before a failover", c.host, c.timeline.number, s.newest.number).
		Fix("make it a replica of the new primary (pg_rewind); if it is a backup that is to be used, restart this server")
}

func (s *Store) dialHost(ctx context.Context, p *pgconn.Config, h *pgconn.FallbackConfig) (*session, error) {
	p = p.Copy()
	p.Host, p.Port, p.TLSConfig, p.Fallbacks = h.Host, h.Port, h.TLSConfig, nil
	c := &session{host: address(h)}
	p.OnNotification = func(*pgconn.PgConn, *pgconn.Notification) { c.notified = true }
	p.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { c.warned = c.warned || n.SeverityUnlocalized == "WARNING" }
	var err error
	if c.PgConn, err = pgconn.ConnectConfig(ctx, p); err != nil {
		return nil, err
	}
	ctx, stop := context.WithTimeout(ctx, s.limit.call)
	defer stop()
	if err := s.introduce(ctx, c); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// introduce finds out with whom the session is and makes its settings.
func (s *Store) introduce(ctx context.Context, c *session) error {
	rows, err := c.rows(ctx, "SELECT pg_backend_pid()::bigint")
	if err != nil {
		return err
	}
	pid, err := int64Of(rows, 0)
	if err != nil {
		return err
	}
	c.pooled = pid != int64(c.PID())
	// Servers that only speak like PostgreSQL may not know these functions.
	rows, err = c.rows(ctx, `SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint,
		CASE WHEN has_function_privilege('pg_control_system()', 'EXECUTE') THEN (SELECT system_identifier::text FROM pg_control_system()) ELSE '' END`)
	if err == nil {
		c.timeline.number, err = int64Of(rows, 0)
		if err == nil {
			c.timeline.system = string(rows[0][1])
		}
	} else if refused(err) {
		err = nil
	}
	if err == nil && !c.pooled {
		_, err = c.rows(ctx, s.limit.settings(false))
	}
	return err
}
