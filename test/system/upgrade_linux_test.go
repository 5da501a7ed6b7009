package system_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/test/parts"
)

// buildNext builds the program as a later version would be: it knows one format
// more, of which older readers understand nothing, and writes one field more in it.
func buildNext(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	replaced := map[string]string{}
	for name, change := range map[string][2]string{
		"format.go": {"const Format = 1\n", "const Format = 2\n"},
		"codec.go":  {"payload, err := proto.Marshal(m)\n", "payload, err := proto.Marshal(m)\nif format > 1 { payload = append(payload, \"\\xc2\\x3e\\x04next\"...) }\n"}, // field 1000
	} {
		path, err := filepath.Abs(filepath.Join("..", "..", "internal", "registry", name))
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		changed := strings.Replace(string(text), change[0], change[1], 1)
		if name == "format.go" {
			changed = strings.Replace(changed, "{1: 1}", "{1: 1, 2: 2}", 1)
		}
		if changed == string(text) || strings.Count(string(text), change[0]) != 1 {
			t.Fatalf("%s no longer says %q", name, change[0])
		}
		replaced[path] = filepath.Join(dir, name)
		if err := os.WriteFile(replaced[path], []byte(changed), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replaced})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	next := filepath.Join(dir, "plastron-next")
	began := time.Now()
	build := exec.Command("go", "build", "-ldflags=-s -w", "-overlay", filepath.Join(dir, "overlay.json"), "-o", next, "github.com/plastron/plastron/cmd/plastron")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the next version: %v\n%s", err, out)
	}
	t.Logf("built after %v", time.Since(began))
	return next
}

// TestRollingUpgrade runs two versions side by side on one database (R82, R125).
// What only the later one can read is written when the earlier one is gone, and
// from then on that is refused.
func TestRollingUpgrade(t *testing.T) {
	p := startPostgres(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(p.Exec(t.Context(), "postgres", "CREATE DATABASE plastron"))
	next := buildNext(t)
	a, b := newDeployment(t), newDeployment(t)
	b.program = next
	for _, d := range []*deployment{a, b} {
		d.dataStore = postgresBlock(p, "plastron")
	}
	a.startServer()
	b.startServer()

	// An agent that knows both, and an entry from each.
	token, agent := a.token()
	a.writeBundle()
	a.write("agent.conf", strings.NewReplacer(
		fmt.Sprintf("server_address    = %q", a.host), fmt.Sprintf("server_addresses = [\"127.0.0.1:%d\", \"127.0.0.1:%d\"]", a.port, b.port),
		fmt.Sprintf("server_port       = %d", a.port), "",
	).Replace(a.agentConfig(token)))
	a.agent = start(t, exec.Command(plastron, "agent", "run", "-config", a.path("agent.conf")))
	a.waitHealthy("agent")
	served := func(path string) {
		t.Helper()
		eventually(t, "the agent to serve "+path, func() bool {
			out, err := exec.Command(plastron, "agent", "api", "fetch", "x509", "-socketPath", a.workloadSocket()).CombinedOutput()
			return err == nil && strings.Contains(string(out), path)
		})
	}
	format := func(key string) string {
		t.Helper()
		return query(t, p, fmt.Sprintf("SELECT get_byte(value, 1) || '/' || get_byte(value, 3) || (position('next' in encode(value, 'escape')) > 0)::text FROM plastron_kv WHERE key = '%s'", key))
	}
	old := a.createEntry(agent, "/from-old", nil, mine())
	early := b.createEntry(agent, "/from-new", nil, mine())
	served("/from-old")
	served("/from-new")
	// The earlier version changes what the later one wrote, and the other way round.
	a.run("server", "entry", "update", "-socketPath", a.adminSocket(), "-entryID", early.Id, "-hint", "a")
	b.run("server", "entry", "update", "-socketPath", b.adminSocket(), "-entryID", old.Id, "-hint", "b")
	for _, id := range []string{old.Id, early.Id} {
		if got := format("/entry/" + id); got != "1/1false" {
			t.Errorf("while the earlier version lives a row is written as %s", got)
		}
	}
	if got := format("/format"); got != "" {
		t.Errorf("while the earlier version lives the store says %s", got)
	}

	// The earlier one is gone: the later one writes as it can, and reads all.
	a.server.stop(syscall.SIGTERM)
	eventually(t, "the later version to say so", func() bool { return format("/format") == "1/1false" })
	late := b.createEntry(agent, "/late", nil, mine())
	served("/late")
	if got := format("/entry/" + late.Id); got != "2/2true" {
		t.Errorf("after it a row is written as %s", got)
	}
	if got := b.run("server", "entry", "count", "-socketPath", b.adminSocket()); !strings.Contains(got, "3 ") {
		t.Errorf("entries: %s", got)
	}

	// There is no way back, and it says so; but a way forward.
	before := query(t, p, "SELECT rev FROM plastron_head")
	a.launchServer()
	select {
	case <-a.server.done:
	case <-time.After(patience):
		t.Fatal("the earlier version does not end")
	}
	if out := a.server.Output(); a.server.err == nil || strings.Count(out, "Error:") != 1 || !strings.Contains(out, "written in format 2, and this version reads up to 1") {
		t.Errorf("the earlier version: %v\n%s", a.server.err, out)
	}
	if caller := query(t, p, "SELECT count(*) FROM plastron_log WHERE rev > "+before+" AND position('/authority/' in encode(batch, 'escape')) > 0"); caller != "0" {
		t.Errorf("%s changes by the one that was refused", caller)
	}
	a.program = next
	a.startServer()
	a.createEntry(agent, "/last", nil, mine())
	served("/last")
}

// query returns the one value that a statement yields, or nothing.
func query(t *testing.T, p *parts.Postgres, sql string) string {
	t.Helper()
	out, err := exec.Command(filepath.Join(p.Programs, "psql"), "-h", p.Dir, "-p", p.Port, "-U", "plastron", "-d", "plastron", "-tAc", sql).CombinedOutput()
	if err != nil {
		t.Fatalf("psql: %v\n%s", err, out)
	}
	return strings.TrimSpace(string(out))
}
