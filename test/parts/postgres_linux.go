package parts

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
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

	settings []string
	port     *Port
	process  *process
}

// StartPostgres makes a cluster and starts it, with settings (name=value) that
// it keeps when it is started again.
func StartPostgres(ctx context.Context, settings ...string) (*Postgres, error) {
	initdb, err := find("initdb", "postgresql", "/usr/lib/postgresql/*/bin")
	if err != nil {
		return nil, err
	}
	dir, err := privateDir()
	if err != nil {
		return nil, err
	}
	p := &Postgres{Dir: dir, Password: "a pass/word%", Programs: filepath.Dir(initdb), settings: settings}
	if err := p.init(initdb); err != nil {
		p.Close()
		return nil, err
	}
	if err := p.Start(ctx); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// reserve gives the cluster its port.
func (p *Postgres) reserve() (err error) {
	if p.port, err = ReservePort(); err == nil {
		p.Port = strconv.Itoa(p.port.Number)
	}
	return err
}

func (p *Postgres) init(initdb string) error {
	if err := p.reserve(); err != nil {
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
	args := []string{"-D", p.data(), "-k", p.Dir, "-c", "listen_addresses=127.0.0.1", "-p", p.Port, "-c", "max_connections=60"}
	for _, s := range p.settings {
		args = append(args, "-c", s)
	}
	cmd, err := command(p.Dir, p.log(), filepath.Join(p.Programs, "postgres"), args...)
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

// URLs names several clusters as one database's hosts: whichever is the primary.
func URLs(database string, clusters ...*Postgres) string {
	var hosts, ports []string
	for _, p := range clusters {
		hosts, ports = append(hosts, p.Dir), append(ports, p.Port)
	}
	return fmt.Sprintf("host=%s port=%s dbname=%s user=plastron target_session_attrs=read-write",
		strings.Join(hosts, ","), strings.Join(ports, ","), database)
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

// Replica copies the running cluster and starts the copy, which streams from it
// under this name: a synchronous replica if synchronous_standby_names has it.
func (p *Postgres) Replica(ctx context.Context, name string) (*Postgres, error) {
	dir, err := privateDir()
	if err != nil {
		return nil, err
	}
	r := &Postgres{Dir: dir, Password: p.Password, Programs: p.Programs}
	if err = r.reserve(); err == nil {
		var cmd *exec.Cmd
		source := fmt.Sprintf("host=%s port=%s user=plastron application_name=%s", p.Dir, p.Port, name)
		cmd, err = command(dir, r.log(), filepath.Join(p.Programs, "pg_basebackup"), "-d", source, "-D", r.data(), "-R", "-X", "stream", "-c", "fast", "--no-sync")
		if err == nil {
			err = cmd.Run()
		}
	}
	if err == nil {
		err = r.Start(ctx)
	} else {
		err = fmt.Errorf("pg_basebackup: %w\n%s", err, tail(r.log()))
	}
	if err == nil {
		err = p.Until(ctx, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND application_name = '"+name+"'")
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// Backup copies the running cluster's files, as pg_basebackup does.
func (p *Postgres) Backup(ctx context.Context) error {
	cmd, err := command(p.Dir, p.log(), filepath.Join(p.Programs, "pg_basebackup"), "-h", p.Dir, "-p", p.Port, "-U", "plastron",
		"-D", p.backup(), "-X", "stream", "-c", "fast", "--no-sync")
	if err != nil {
		return err
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("pg_basebackup: %w\n%s", err, tail(p.log()))
	}
	return nil
}

// Restore ends the cluster and starts it again with the files of the backup.
func (p *Postgres) Restore(ctx context.Context) error {
	if err := p.Crash(); err != nil {
		return err
	}
	if err := os.RemoveAll(p.data()); err != nil {
		return err
	}
	if err := os.Rename(p.backup(), p.data()); err != nil {
		return err
	}
	return p.Start(ctx)
}

func (p *Postgres) backup() string { return filepath.Join(p.Dir, "backup") }

// Sent waits until every replica has all that is committed.
func (p *Postgres) Sent(ctx context.Context) error {
	return p.Until(ctx, "SELECT count(*) FROM pg_stat_replication HAVING min(flush_lsn) >= pg_current_wal_flush_lsn()")
}

// Forget drops the settings that StartPostgres was given, for the next Start.
func (p *Postgres) Forget() { p.settings = nil }

// Until waits until a query answers something else than 0.
func (p *Postgres) Until(ctx context.Context, sql string) error {
	ctx, stop := context.WithTimeout(ctx, 120*time.Second)
	defer stop()
	c, err := pgconn.Connect(ctx, p.URL("postgres"))
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	for {
		r := c.ExecParams(ctx, sql, nil, nil, nil, nil).Read()
		if r.Err != nil || len(r.Rows) > 0 && string(r.Rows[0][0]) != "0" {
			return r.Err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", sql, ctx.Err())
		}
	}
}

// Promote makes a replica the primary of a new timeline, and returns when it is.
func (p *Postgres) Promote(ctx context.Context) error {
	return p.Exec(ctx, "postgres", "SELECT pg_promote(true, 60)")
}

// Kill ends all of the cluster's processes with SIGKILL.
func (p *Postgres) Kill() error {
	if err := p.signal(syscall.SIGKILL); err != nil {
		return err
	}
	return p.process.stop(syscall.SIGKILL)
}

// Freeze stops all of the cluster's processes where they stand.
func (p *Postgres) Freeze() error { return p.signal(syscall.SIGSTOP) }

// Thaw lets them go on.
func (p *Postgres) Thaw() error {
	if err := p.signal(syscall.SIGCONT); err != nil {
		return err
	}
	return p.process.cmd.Process.Signal(syscall.SIGCONT)
}

// signal sends a signal to each of the cluster's processes but the first, which
// is stopped, so that it starts no more of them. They have groups of their own.
func (p *Postgres) signal(signal syscall.Signal) error {
	pid := p.process.cmd.Process.Pid
	if err := freeze(pid); err != nil {
		return err
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	for child := range strings.FieldsSeq(string(children)) {
		switch pid, no := strconv.Atoi(child); {
		case no != nil:
		case signal == syscall.SIGSTOP:
			err = errors.Join(err, freeze(pid))
		default:
			syscall.Kill(pid, signal)
		}
	}
	return err
}

// Crash ends the cluster at once, as pg_ctl -m immediate does: no checkpoint, no
// farewell, and the next start recovers.
func (p *Postgres) Crash() error { return p.process.stop(syscall.SIGQUIT) }

// MoveLog moves the write-ahead log to another directory of the cluster's user,
// and starts the cluster again.
func (p *Postgres) MoveLog(ctx context.Context, dir string) error {
	if err := p.process.stop(syscall.SIGINT); err != nil {
		return err
	}
	from, to := filepath.Join(p.data(), "pg_wal"), filepath.Join(dir, "pg_wal")
	cmd, err := command(p.Dir, p.log(), "cp", "-r", from, to)
	if err != nil {
		return err
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("copy pg_wal: %w", err)
	}
	if err := os.RemoveAll(from); err != nil {
		return err
	}
	if err := os.Symlink(to, from); err != nil {
		return err
	}
	return p.Start(ctx)
}

// KillPostmaster ends the first process with SIGKILL, and returns when the sessions that it
// leaves behind have noticed: before that it cannot start again.
func (p *Postgres) KillPostmaster(ctx context.Context) error {
	if err := p.process.stop(syscall.SIGKILL); err != nil {
		return err
	}
	for {
		left := false
		dirs, err := filepath.Glob("/proc/[0-9]*/cwd") // all of them run in the data directory
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			if cwd, err := os.Readlink(dir); err == nil && cwd == p.data() {
				left = true
			}
		}
		if !left {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("sessions of the killed postgres go on: %w", ctx.Err())
		}
	}
}

// Close ends the cluster and removes it.
func (p *Postgres) Close() error {
	if p.process != nil {
		p.process.stop(syscall.SIGQUIT)
	}
	if p.port != nil {
		p.port.Release()
	}
	return os.RemoveAll(p.Dir)
}
