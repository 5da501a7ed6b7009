//go:build linux

package fleet_test

import (
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// rounds is how often a fault comes: several times, or 100 in make soak.
func rounds(few int) int {
	if soak() {
		return 100
	}
	return few
}

// served waits for some calls to succeed, and then for a random moment.
func (w *writers) served() {
	w.f.t.Helper()
	w.more(100)
	<-time.After(rand.N(100 * time.Millisecond))
}

// Under 50 writers, servers, the database and its sessions are killed with
// SIGKILL. No acknowledged write is lost, none is half there, what was deleted
// stays so, all servers hold the same soon after, and attached agents go on.
// R56, R73, R74, R76, R78; FM1, FM19, FM27.
func TestKillsOnPostgres(t *testing.T) {
	t.Parallel()
	f := onPostgres(t)
	f.start(3)
	f.attach(f.servers[0])
	f.attach(f.servers[1])
	stop := f.fetching()
	defer stop()
	w := f.startWriters(50)
	for i := range rounds(3) {
		w.served()
		s := f.servers[i%len(f.servers)]
		s.kill()
		w.more(50) // through the others
		s.start()

		w.served()
		f.killSession()

		w.served()
		if err := f.postgres.KillPostmaster(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := f.postgres.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	w.served()
	w.end(fresh)
	stop()
}

// killSession kills the process of one session that writes. PostgreSQL then ends
// all others as well, and recovers.
func (f *fleet) killSession() {
	f.t.Helper()
	ctx := f.t.Context()
	eventually(f.t, "a session that writes", func() bool {
		c, err := pgconn.Connect(ctx, f.postgres.URL("postgres"))
		if err != nil {
			return false
		}
		defer c.Close(ctx)
		results, err := c.Exec(ctx, "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'plastron-%-w' ORDER BY random() LIMIT 1").ReadAll()
		if err != nil || len(results) == 0 || len(results[0].Rows) == 0 {
			return false
		}
		pid := 0
		for _, digit := range results[0].Rows[0][0] {
			pid = pid*10 + int(digit-'0')
		}
		return syscall.Kill(pid, syscall.SIGKILL) == nil // a child of our postmaster
	})
}

// The same for servers and the members of etcd, the leader and a follower. R73,
// R74, R76, R78.
func TestKillsOnEtcd(t *testing.T) {
	t.Parallel()
	f := onEtcd(t)
	f.start(3)
	f.attach(f.servers[0])
	f.attach(f.servers[1])
	stop := f.fetching()
	defer stop()
	w := f.startWriters(50)
	for i := range rounds(3) {
		w.served()
		s := f.servers[i%len(f.servers)]
		s.kill()
		w.more(50)
		s.start()

		for _, follower := range []int{0, 1} {
			w.served()
			leader, err := f.etcd.Leader(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			member := (leader + follower) % len(f.etcd.Endpoints)
			if err := f.etcd.Kill(member); err != nil {
				t.Fatal(err)
			}
			w.more(50) // with the others
			if err := f.etcd.Start(t.Context(), member); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.served()
	w.end(fresh)
	stop()
}
