package system_test

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/plastron/plastron/test/parts"
)

// A backup is what a test restores: the tools that an engine has for it.
type backup struct {
	name    string
	save    func(t *testing.T)
	restore func(t *testing.T, d *deployment) // the servers are stopped
}

// restoredStore backs up under a running server, goes on, restores while none
// runs and goes on again. The server notices, join tokens of before are void
// (R21), what came after the backup is gone, a ban of after it too, and agents go on
// without attesting again (R75, R83 in part).
func restoredStore(t *testing.T, d *deployment, backups []backup) {
	agent := d.start()
	d.createEntry(agent, "/kept", nil, mine())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream := d.watchX509(ctx)
	next(t, stream, "the first message", func(r received) bool { return len(r.ids) == 1 })
	for _, b := range backups {
		unused, _ := d.token()
		b.save(t)
		d.createEntry(agent, "/lost", nil, mine())
		next(t, stream, "both identities", func(r received) bool { return len(r.ids) == 2 })
		before := d.run("server", "status", "-socketPath", d.adminSocket(), "-output", "json")
		d.server.stop(syscall.SIGTERM)
		b.restore(t, d)
		d.startServer()
		if log := d.server.Output(); !strings.Contains(log, "store has a new epoch") {
			t.Errorf("%s: the server does not say that the store was restored:\n%s", b.name, log)
		}
		next(t, stream, "what was there at the backup", func(r received) bool { return len(r.ids) == 1 })
		if now := d.run("server", "status", "-socketPath", d.adminSocket(), "-output", "json"); epochOf(t, now) == epochOf(t, before) {
			t.Errorf("%s: the epoch is as it was", b.name)
		}
		d.run("server", "db", "check", "-config", d.path("server.conf"))
		other := newDeployment(t)
		other.port, other.server = d.port, d.server
		other.write("bundle.pem", d.run("server", "bundle", "show", "-socketPath", d.adminSocket()))
		if said := other.runAgentExpectingRefusal(unused); !strings.Contains(said, "token") {
			t.Errorf("%s: a token of before:\n%s", b.name, said)
		}
	}
	if out := d.agent.Output(); strings.Count(out, "msg=attested") != 1 {
		t.Errorf("the agent attested again:\n%s", out)
	}
}

func epochOf(t *testing.T, status string) string {
	t.Helper()
	_, rest, found := strings.Cut(status, `"position":{"epoch":"`)
	if !found {
		t.Fatalf("no position in %s", status)
	}
	return rest[:32]
}

// TestBackups restores each shared store with the tools of its engine.
func TestBackups(t *testing.T) {
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		p := startPostgres(t)
		for _, sql := range []string{"CREATE DATABASE plastron", "CREATE DATABASE elsewhere"} {
			if err := p.Exec(context.Background(), "postgres", sql); err != nil {
				t.Fatal(err)
			}
		}
		d := newDeployment(t)
		d.dataStore = postgresBlock(p, "plastron")
		dump := d.path("dump")
		tool := func(t *testing.T, name string, args ...string) {
			t.Helper()
			cmd := exec.Command(filepath.Join(p.Programs, name), append([]string{"-h", p.Dir, "-p", p.Port, "-U", "plastron"}, args...)...)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", name, err, out)
			}
		}
		save := func(t *testing.T) { tool(t, "pg_dump", "-Fc", "-f", dump, "plastron") }
		restoredStore(t, d, []backup{
			{"pg_restore over the same database", save, func(t *testing.T, _ *deployment) {
				tool(t, "pg_restore", "--clean", "--if-exists", "-d", "plastron", dump)
			}},
			{"pg_basebackup", func(t *testing.T) {
				if err := p.Backup(t.Context()); err != nil {
					t.Fatal(err)
				}
			}, func(t *testing.T, _ *deployment) {
				if err := p.Restore(t.Context()); err != nil {
					t.Fatal(err)
				}
			}},
			{"pg_restore into another database", save, func(t *testing.T, d *deployment) {
				tool(t, "pg_restore", "-d", "elsewhere", dump)
				d.dataStore = postgresBlock(p, "elsewhere")
			}},
		})
	})
	t.Run("etcd", func(t *testing.T) {
		t.Parallel()
		e := startEtcd(t)
		d := newDeployment(t)
		d.dataStore = etcdBlock(e, "/plastron/")
		saved := func(e *parts.Etcd, name string) func(t *testing.T) {
			return func(t *testing.T) { need(t, e.Save(name)) }
		}
		restored := func(name, token string) func(*testing.T, *deployment) {
			return func(t *testing.T, _ *deployment) {
				if err := e.Restore(t.Context(), name, token); err != nil {
					t.Fatal(err)
				}
			}
		}
		restoredStore(t, d, []backup{
			{"a snapshot, with another cluster token", saved(e, "one"), restored("one", "another")},
			{"a snapshot, with the same token again", saved(e, "two"), restored("two", "another")},
		})
	})
}
