package parts

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Postgres is a private PostgreSQL cluster. Over its socket everybody is let in,
// over TCP whoever knows the password.
type Postgres struct {
	Dir      string // of the socket, the log and the data
	Port     string
	Password string // of the user plastron
	Programs string // the directory of psql, pg_dump and others

	process *process
}

// StartPostgres makes a cluster and starts it.
func StartPostgres(ctx context.Context) (*Postgres, error) {
	initdb, err := find("initdb", "postgresql", "/usr/lib/postgresql/*/bin")
	if err != nil {
		return nil, err
	}
	dir, err := privateDir()
	if err != nil {
		return nil, err
	}
	p := &Postgres{Dir: dir, Password: "a pass/word%", Programs: filepath.Dir(initdb)}
	if err := p.init(initdb); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	if err := p.Start(ctx); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *Postgres) init(initdb string) (err error) {
	if p.Port, err = freePort(); err != nil {
		return err
	}
	password := filepath.Join(p.Dir, "password")
	if err := os.WriteFile(password, []byte(p.Password+"\n"), 0o644); err != nil {
		return err
	}
	cmd, err := command(p.Dir, p.log(), initdb, "-D", p.data(), "-U", "plastron", "--auth-local=trust",
		"--auth-host=scram-sha-256", "--pwfile="+password, "-N", "--no-instructions", "--locale=C", "--encoding=UTF8")
	if err != nil {
		return err
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, tail(p.log()))
	}
	return nil
}

func (p *Postgres) data() string { return filepath.Join(p.Dir, "data") }
func (p *Postgres) log() string  { return filepath.Join(p.Dir, "log") }

// Start starts the cluster, after Stop or Crash again, and waits until it answers.
func (p *Postgres) Start(ctx context.Context) error {
	cmd, err := command(p.Dir, p.log(), filepath.Join(p.Programs, "postgres"), "-D", p.data(), "-k", p.Dir,
		"-c", "listen_addresses=127.0.0.1", "-p", p.Port, "-c", "max_connections=60")
	if err != nil {
		return err
	}
	if p.process, err = start(cmd); err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(ctx, 120*time.Second)
	defer stop()
	for {
		c, err := pgconn.Connect(ctx, p.URL("postgres"))
		if err == nil {
			return c.Close(ctx)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-p.process.done:
			return fmt.Errorf("postgres ended\n%s", tail(p.log()))
		case <-ctx.Done():
			return fmt.Errorf("postgres does not answer: %w\n%s", err, tail(p.log()))
		}
	}
}

// URL is where a database is, over the socket.
func (p *Postgres) URL(database string) string {
	return fmt.Sprintf("postgres:///%s?host=%s&port=%s&user=plastron", database, url.QueryEscape(p.Dir), p.Port)
}

// NetworkURL is where a database is, over TCP and with a password.
func (p *Postgres) NetworkURL(database, password string) string {
	u := url.URL{Scheme: "postgres", User: url.UserPassword("plastron", password), Host: "127.0.0.1:" + p.Port, Path: "/" + database}
	return u.String()
}

// Exec executes statements in a database.
func (p *Postgres) Exec(ctx context.Context, database, sql string) error {
	c, err := pgconn.Connect(ctx, p.URL(database))
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	_, err = c.Exec(ctx, sql).ReadAll()
	return err
}

// Crash ends the cluster at once, as pg_ctl -m immediate does: no checkpoint, no
// farewell, and the next start recovers.
func (p *Postgres) Crash() error { return p.process.stop(syscall.SIGQUIT) }

// Close ends the cluster and removes it.
func (p *Postgres) Close() error {
	if p.process != nil {
		p.process.stop(syscall.SIGQUIT)
	}
	return os.RemoveAll(p.Dir)
}
