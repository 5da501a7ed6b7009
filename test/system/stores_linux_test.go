package system_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
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

// putEtcd writes a key as somebody else would.
func putEtcd(t *testing.T, e *parts.Etcd, key, value string) {
	t.Helper()
	body, err := json.Marshal(map[string][]byte{"key": []byte(key), "value": []byte(value)})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post(e.Endpoints[0]+"/v3/kv/put", "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("etcd: %s", resp.Status)
	}
}

// restoredPostgres goes back to a copy of the database's files while no server runs.
func restoredPostgres(t *testing.T, d *deployment, p *parts.Postgres) {
	copyData := func(from, to string) {
		t.Helper()
		if out, err := exec.Command("cp", "-a", filepath.Join(p.Dir, from), filepath.Join(p.Dir, to)).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v\n%s", err, out)
		}
	}
	again := func() {
		t.Helper()
		if err := p.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	before, _ := d.token()
	d.server.stop(syscall.SIGTERM)
	must(p.Crash())
	copyData("data", "backup")
	again()
	d.startServer()
	d.createEntry("spiffe://example.org/spire/server", "/late", nil, mine())
	d.server.stop(syscall.SIGTERM)
	must(p.Crash())
	must(os.RemoveAll(filepath.Join(p.Dir, "data")))
	must(os.Rename(filepath.Join(p.Dir, "backup"), filepath.Join(p.Dir, "data")))
	again()
	d.startServer()
	if log := d.server.Output(); !strings.Contains(log, "store has a new epoch") || !strings.Contains(log, "reason=restored") {
		t.Errorf("the server does not say that the store was restored:\n%s", log)
	}
	if list := d.run("server", "entry", "show", "-socketPath", d.adminSocket()); strings.Contains(list, "/late") {
		t.Errorf("the store was not restored:\n%s", list)
	}
	other := newDeployment(t)
	other.port = d.port
	other.write("bundle.pem", d.run("server", "bundle", "show", "-socketPath", d.adminSocket()))
	other.write("agent.conf", other.agentConfig(before))
	refused := start(t, exec.Command(plastron, "agent", "run", "-config", other.path("agent.conf")))
	eventually(t, "a token from before to be refused", func() bool { return strings.Contains(refused.Output(), "the join token is unknown") })
	d.createEntry("spiffe://example.org/spire/server", "/after", nil, mine())
	d.waitServed()
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
		restoredPostgres(t, d, p)
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

		// A stranger's write is shown, and takes nobody out of step.
		putEtcd(t, e, "/a/k/stranger", "\x00x")
		d.createEntry("spiffe://example.org/spire/server", "/three", nil, mine())
		eventually(t, "the damage to be in the log", func() bool { return strings.Contains(d.server.Output(), "was not written by Plastron") })
		d.createEntry("spiffe://example.org/spire/server", "/four", nil, mine())
		eventually(t, "all entries to be there", func() bool {
			return strings.Contains(d.run("server", "entry", "count", "-socketPath", d.adminSocket()), "4 registration")
		})
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
	if strings.Contains(string(out), "fail ") || !strings.Contains(string(out), "ok       store_engine") {
		t.Errorf("doctor: %v\n%s", err, out)
	}

	// A restart, by force: the agent goes on, and what was there is there. The doctor
	// finds it without a server, and knows whose it is.
	d.server.stop(syscall.SIGKILL)
	out, err = exec.Command(plastron, "doctor", "-config", d.path("server.conf")).CombinedOutput()
	if strings.Contains(string(out), "fail ") || !strings.Contains(string(out), "ok       store_engine") {
		t.Errorf("doctor without a server: %v\n%s", err, out)
	}
	d.write("other.conf", strings.ReplaceAll(d.read("server.conf"), `"example.org"`, `"other.org"`))
	out, _ = exec.Command(plastron, "doctor", "-config", d.path("other.conf")).CombinedOutput()
	if !strings.Contains(string(out), `but the store of "example.org"`) {
		t.Errorf("doctor of another trust domain:\n%s", out)
	}
	d.startServer()
	d.createEntry(agent, "/two", nil, mine())
	if list := d.run("server", "entry", "show", "-socketPath", d.adminSocket()); !strings.Contains(list, "/one") || !strings.Contains(list, "/two") {
		t.Errorf("entries after a restart:\n%s", list)
	}
	eventually(t, "the agent to follow the server again", func() bool {
		return strings.Contains(d.run("agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket()), "/two")
	})
}
