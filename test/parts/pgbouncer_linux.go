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

// Pgbouncer is a pooler before a cluster, with transaction pooling: each
// transaction may get another session of the database.
type Pgbouncer struct {
	dir     string
	process *process
}

// StartPgbouncer starts a pooler before p with a few sessions for each database.
func StartPgbouncer(ctx context.Context, p *Postgres) (*Pgbouncer, error) {
	path, err := find("pgbouncer", "pgbouncer", "/usr/sbin")
	if err != nil {
		return nil, err
	}
	dir, err := privateDir()
	if err != nil {
		return nil, err
	}
	b := &Pgbouncer{dir: dir}
	if err := b.configure(p); err != nil {
		b.Close()
		return nil, err
	}
	log := filepath.Join(dir, "log")
	cmd, err := command(dir, log, path, b.config())
	if err == nil {
		b.process, err = start(cmd)
	}
	if err != nil {
		b.process = nil
		b.Close()
		return nil, err
	}
	ctx, stop := context.WithTimeout(ctx, 60*time.Second)
	defer stop()
	for {
		c, err := pgconn.Connect(ctx, b.URL("postgres"))
		if err == nil {
			return b, c.Close(ctx)
		}
		select {
		case <-time.After(20 * time.Millisecond):
			continue
		case <-b.process.done:
		case <-ctx.Done():
		}
		err = fmt.Errorf("pgbouncer does not answer: %w\n%s", err, tail(log))
		b.Close()
		return nil, err
	}
}

func (b *Pgbouncer) config() string { return filepath.Join(b.dir, "ini") }

func (b *Pgbouncer) configure(p *Postgres) error {
	return os.WriteFile(b.config(), fmt.Appendf(nil, `[databases]
* = host=%s port=%s user=plastron
[pgbouncer]
listen_addr =
listen_port = 6432
unix_socket_dir = %s
auth_type = any
pool_mode = transaction
default_pool_size = 5
server_login_retry = 1
`, p.Dir, p.Port, b.dir), 0o644)
}

// Point puts the pooler before another cluster. Its connections stay.
func (b *Pgbouncer) Point(p *Postgres) error {
	if err := b.configure(p); err != nil {
		return err
	}
	return b.process.cmd.Process.Signal(syscall.SIGHUP)
}

// URL is where a database is, through the pooler.
func (b *Pgbouncer) URL(database string) string {
	return fmt.Sprintf("postgres:///%s?host=%s&port=6432&user=plastron", database, url.QueryEscape(b.dir))
}

// Close ends the pooler.
func (b *Pgbouncer) Close() error {
	if b.process != nil {
		b.process.stop(syscall.SIGTERM)
	}
	return os.RemoveAll(b.dir)
}
