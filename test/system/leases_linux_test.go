package system_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sharing returns a server of the same trust domain, on the same store, with a
// data directory of its own.
func (d *deployment) sharing() *deployment {
	d.t.Helper()
	other := newDeployment(d.t)
	other.dataStore, other.serverOptions = d.dataStore, d.serverOptions
	return other
}

// copyDataDir gives a server the identity of another.
func (d *deployment) copyDataDir(from *deployment) {
	d.t.Helper()
	if err := os.RemoveAll(d.path("server")); err != nil {
		d.t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", from.path("server"), d.path("server")).CombinedOutput(); err != nil {
		d.t.Fatalf("cp: %v\n%s", err, out)
	}
}

// ends waits until the server has ended, which it does with an error.
func (d *deployment) ends() string {
	d.t.Helper()
	select {
	case <-d.server.done:
	case <-time.After(patience):
		d.t.Fatalf("the server does not end\n%s", d.server.Output())
	}
	if d.server.err == nil {
		d.t.Error("the server ended as if all were well")
	}
	return d.server.Output()
}

// mints reports whether the server signs what its operator asks for.
func (d *deployment) mints() bool {
	out, err := exec.Command(plastron, "server", "x509", "mint", "-spiffeID", "spiffe://example.org/minted", "-socketPath", d.adminSocket()).CombinedOutput()
	return err == nil && strings.Contains(string(out), "CERTIFICATE")
}

// TestOneIdentity has several processes claim to be one server (R68): who copies
// a data directory is refused while the original lives, a server that stops in
// order hands over at once, one that was killed goes on at once in its place, and
// nobody follows it elsewhere before its lease has run out.
func TestOneIdentity(t *testing.T) {
	p := startPostgres(t)
	if err := p.Exec(context.Background(), "postgres", "CREATE DATABASE plastron"); err != nil {
		t.Fatal(err)
	}
	original := newDeployment(t)
	original.dataStore = postgresBlock(p, "plastron")
	original.startServer()
	clone := original.sharing()

	// The original lives.
	clone.copyDataDir(original)
	clone.launchServer()
	said := clone.ends()
	for _, text := range []string{"in use by another process", original.path("server"), clone.path("server"), "server-id"} {
		if !strings.Contains(said, text) {
			t.Errorf("the clone does not say %q:\n%s", text, said)
		}
	}
	if !original.mints() {
		t.Error("the original signs no more")
	}

	// It is killed: in its place it goes on at once, elsewhere nobody does.
	original.server.stop(syscall.SIGKILL)
	clone.launchServer()
	eventually(t, "the clone to wait for the lease", func() bool {
		return strings.Contains(clone.server.Output(), "waiting for the lease of a former life")
	})
	original.startServer()
	if !original.mints() {
		t.Error("the original does not sign after it was killed and started again")
	}
	if said := clone.ends(); !strings.Contains(said, "in use by another process") {
		t.Errorf("the waiting clone says:\n%s", said)
	}

	// It stops in order: whoever has its identity goes on at once.
	original.server.stop(syscall.SIGTERM)
	clone.copyDataDir(original)
	clone.startServer()
	if !clone.mints() {
		t.Error("who follows in order does not sign")
	}
	clone.server.stop(syscall.SIGTERM)
}

// shifted builds a plastron with a clock that says another time, where beats are
// written and judged: those files read time.Now with something added. The
// machine's clock is never set.
func shifted(t *testing.T, by time.Duration) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-f", "{{$d := .Dir}}{{range .GoFiles}}{{$d}}/{{.}}\n{{end}}", "github.com/plastron/plastron/internal/servers", "github.com/plastron/plastron/internal/server").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	dir := t.TempDir()
	replace := map[string]string{}
	for i, path := range strings.Fields(string(out)) {
		src, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(src), "time.Now()", fmt.Sprintf("time.Now().Add(%d)", by))
		if text == string(src) {
			continue
		}
		replace[path] = filepath.Join(dir, fmt.Sprint(i)+".go")
		if err := os.WriteFile(replace[path], []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	file, program := filepath.Join(dir, "overlay.json"), filepath.Join(dir, "plastron")
	if err := os.WriteFile(file, overlay, 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-overlay", file, "-o", program, "github.com/plastron/plastron/cmd/plastron")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return program
}

// TestWrongClock starts a second server a minute off: it refuses and names both
// clocks, and the first goes on (R108).
func TestWrongClock(t *testing.T) {
	program := shifted(t, time.Minute)
	p := startPostgres(t)
	if err := p.Exec(context.Background(), "postgres", "CREATE DATABASE plastron"); err != nil {
		t.Fatal(err)
	}
	first := newDeployment(t)
	first.dataStore = postgresBlock(p, "plastron")
	first.startServer()
	second := first.sharing()
	second.launchWith(program)
	said := second.ends()
	if !strings.Contains(said, "this machine's clock says") || !strings.Contains(said, "but by that of server") {
		t.Errorf("the second server says:\n%s", said)
	}
	if !first.mints() {
		t.Error("the first signs no more")
	}
	if text := first.run("server", "bundle", "show", "-socketPath", first.adminSocket()); strings.Count(text, "BEGIN CERTIFICATE") != 1 {
		t.Errorf("the second left something in the bundle:\n%s", text)
	}
}
