package system_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/plastron/plastron/test/parts"
)

// need skips a test whose part is not installed; not in CI.
func need(t testing.TB, err error) {
	t.Helper()
	if _, missing := errors.AsType[*parts.MissingError](err); missing && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func startPostgres(t testing.TB) *parts.Postgres {
	t.Helper()
	p, err := parts.StartPostgres(t.Context())
	need(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

// postgresBlock is the DataStore block for a database, reached over TCP with the password.
func postgresBlock(p *parts.Postgres, database string) string {
	return fmt.Sprintf(`DataStore "sql" { plugin_data { database_type = "postgres" connection_string = %q } }`, p.NetworkURL(database, p.Password))
}

func startEtcd(t testing.TB) *parts.Etcd {
	t.Helper()
	e, err := parts.StartEtcd(t.Context(), 1)
	need(t, err)
	t.Cleanup(func() { e.Close() })
	return e
}

func etcdBlock(e *parts.Etcd, prefix string) string {
	return fmt.Sprintf(`DataStore "etcd" { plugin_data { endpoints = [%q] prefix = %q } }`, e.Endpoints[0], prefix)
}

// TestSharedStores runs a server and an agent over each store that several
// servers can share: entries, restarts, status, health, and a backup that is
// noticed though no server ran while it was restored (R21).
func TestSharedStores(t *testing.T) {
	t.Run("postgres", func(t *testing.T) {
		p := startPostgres(t)
		if err := p.Exec(context.Background(), "postgres", "CREATE DATABASE plastron"); err != nil {
			t.Fatal(err)
		}
		d := newDeployment(t)
		d.dataStore = postgresBlock(p, "plastron")
		sharedStore(t, d, "postgres at 127.0.0.1:"+p.Port+"/plastron")
		for _, secret := range []string{p.Password, "a%20pass", "pass%2Fword"} {
			if text := d.server.Output(); strings.Contains(text, secret) {
				t.Errorf("the password is in the log:\n%s", text)
			}
		}
	})
	t.Run("etcd", func(t *testing.T) {
		e := startEtcd(t)
		d := newDeployment(t)
		d.dataStore = etcdBlock(e, "/a/")
		sharedStore(t, d, "etcd at "+e.Endpoints[0]+"/a/")
	})
}

func sharedStore(t *testing.T, d *deployment, where string) {
	agent := d.start()
	d.createEntry(agent, "/one", nil, mine())
	d.waitServed()
	if status := d.run("server", "status", "-socketPath", d.adminSocket()); !strings.Contains(status, where) {
		t.Errorf("status does not say %q:\n%s", where, status)
	}
	d.run("server", "validate", "-config", d.path("server.conf"))
	out, err := exec.Command(plastron, "doctor", "-config", d.path("server.conf")).CombinedOutput() // may warn of the disk
	if strings.Contains(string(out), "fail ") {
		t.Errorf("doctor: %v\n%s", err, out)
	}

	// A restart, by force: the agent goes on, and what was there is there.
	d.server.stop(syscall.SIGKILL)
	d.startServer()
	d.createEntry(agent, "/two", nil, mine())
	if list := d.run("server", "entry", "show", "-socketPath", d.adminSocket()); !strings.Contains(list, "/one") || !strings.Contains(list, "/two") {
		t.Errorf("entries after a restart:\n%s", list)
	}
	eventually(t, "the agent to follow the server again", func() bool {
		return strings.Contains(d.run("agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket()), "/two")
	})
}
