package unix

import (
	"errors"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/workload"
	"github.com/plastron/plastron/internal/workload/workloadtest"
)

func TestContract(t *testing.T) {
	for _, c := range []*Config{{}, {DiscoverWorkloadPath: true}, {DiscoverWorkloadPath: true, WorkloadSizeLimit: -1}} {
		workloadtest.Run(t, func(t *testing.T) workload.Attestor {
			a, err := c.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return a
		})
	}
}

func open(t *testing.T, c Config) *Attestor {
	t.Helper()
	a, err := c.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a.(*Attestor)
}

func sleeper(t *testing.T, cred *syscall.Credential) (pid int, bin string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "unix")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	b, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	bin = filepath.Join(dir, "a:b")
	if err := os.WriteFile(bin, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd.Process.Pid, bin
}

func has(a workload.Attested, value string) bool {
	return slices.Contains(a.Selectors, entry.Selector{Type: "unix", Value: value})
}

func omitted(a workload.Attested, key string) bool {
	return slices.ContainsFunc(a.Omitted, func(s string) bool { return strings.HasPrefix(s, "unix:"+key+" ") })
}

func TestSelectors(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	pid, bin := sleeper(t, nil)
	a, err := open(t, Config{DiscoverWorkloadPath: true}).Attest(t.Context(), pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"uid:" + me.Uid, "user:" + me.Username, "gid:" + me.Gid, "path:" + bin} {
		if !has(a, want) {
			t.Errorf("no selector unix:%s in %v", want, a.Selectors)
		}
	}
	if i := slices.IndexFunc(a.Selectors, func(s entry.Selector) bool { return strings.HasPrefix(s.Value, "sha256:") }); i < 0 || len(a.Selectors[i].Value) != 7+64 {
		t.Errorf("no hash in %v", a.Selectors)
	}
	facts := func() {
		t.Helper()
		group, err := user.LookupGroupId(me.Gid)
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{"uid": me.Uid, "user": me.Username, "gid": me.Gid, "group": group.Name, "program": "a:b"} {
			if got := a.Facts["unix."+name]; got != want {
				t.Errorf("the fact unix.%s is %q, want %q", name, got, want)
			}
		}
	}
	facts()

	a, err = open(t, Config{}).Attest(t.Context(), pid)
	facts() // the program's name is known without discovery, which is about its path
	if err != nil || slices.ContainsFunc(a.Selectors, func(s entry.Selector) bool {
		return strings.HasPrefix(s.Value, "path:") || strings.HasPrefix(s.Value, "sha256:")
	}) {
		t.Errorf("without discovery: %v, %v", a.Selectors, err)
	}
	a, err = open(t, Config{DiscoverWorkloadPath: true, WorkloadSizeLimit: 10}).Attest(t.Context(), pid)
	if err != nil || !omitted(a, "sha256") || !has(a, "path:"+bin) {
		t.Errorf("over the size limit: %+v, %v", a, err)
	}
}

// The program's name stays when its file is replaced, is that of the file and not
// of a link to it or of the first argument, and is lost when it does not read as a line.
func TestProgramName(t *testing.T) {
	pid, bin := sleeper(t, nil)
	name := func(pid int) string {
		t.Helper()
		a, err := open(t, Config{}).Attest(t.Context(), pid)
		if err != nil {
			t.Fatal(err)
		}
		if (a.Facts["unix.program"] == "") != omitted(a, "program") {
			t.Errorf("facts %v, omitted %q", a.Facts, a.Omitted)
		}
		return a.Facts["unix.program"]
	}
	if err := os.Remove(bin); err != nil {
		t.Fatal(err)
	}
	if got := name(pid); got != "a:b" {
		t.Errorf("after the file was removed: %q", got)
	}
	dir := t.TempDir()
	run := func(path, first string) int {
		t.Helper()
		cmd := &exec.Cmd{Path: path, Args: []string{first, "1000"}}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		return cmd.Process.Pid
	}
	link := filepath.Join(dir, "link")
	b, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"real", "two\nlines"} {
		if err := os.WriteFile(filepath.Join(dir, file), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("real", link); err != nil {
		t.Fatal(err)
	}
	if got := name(run(link, "sshd")); got != "real" {
		t.Errorf("through a link, under another name: %q", got)
	}
	if got := name(run(filepath.Join(dir, "two\nlines"), "x")); got != "" {
		t.Errorf("two lines: %q", got)
	}
}

// A user without a name loses only the name; groups likewise.
func TestNumbersWithoutNames(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root")
		}
		t.Skip("this test needs root")
	}
	pid, _ := sleeper(t, &syscall.Credential{Uid: 987654, Gid: 987655, Groups: []uint32{987656, 0}})
	a, err := open(t, Config{}).Attest(t.Context(), pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"uid:987654", "gid:987655", "supplementary_gid:987656", "supplementary_gid:0", "supplementary_group:root"} {
		if !has(a, want) {
			t.Errorf("no selector unix:%s in %v", want, a.Selectors)
		}
	}
	for _, key := range []string{"user", "group", "supplementary_group"} {
		if !omitted(a, key) {
			t.Errorf("nothing says why %s is missing: %q", key, a.Omitted)
		}
	}
	if _, ok := a.Facts["unix.user"]; ok {
		t.Errorf("facts %v", a.Facts)
	}
}

// R43, E44: no name passes for another fact.
func TestNamesAreUnambiguous(t *testing.T) {
	a := open(t, Config{})
	for name, want := range map[string]string{
		"a:b": "user:a:b", "uid:0": "user:uid:0", "x\nuid:0": "", "": "", "\x00": "", "\xff": "", "é": "user:é",
		strings.Repeat("x", entry.MaxSelectorValue): "",
	} {
		a.users = newNames(func(string) (string, error) { return name, nil })
		got, err := a.Attest(t.Context(), os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case want != "" && !has(got, want):
			t.Errorf("%q: no %s in %v", name, want, got.Selectors)
		case want == "" && !omitted(got, "user"):
			t.Errorf("%q: not left out: %v", name, got.Selectors)
		}
		if !has(got, "uid:"+strconv.Itoa(os.Getuid())) {
			t.Errorf("%q: the number is lost", name)
		}
	}
}

// W25: a database that does not answer costs the names and nothing else.
func TestSlowDatabase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, Config{})
		release := make(chan struct{})
		a.users = newNames(func(string) (string, error) { <-release; return "", errors.New("too late") })
		a.groups = a.users
		got, err := a.Attest(t.Context(), os.Getpid())
		if err != nil || !has(got, "uid:"+strconv.Itoa(os.Getuid())) || !omitted(got, "user") || !omitted(got, "group") {
			t.Errorf("%+v, %v", got, err)
		}
		close(release)
	})
}

// R62: a name is asked for once in a few seconds; that there is none, each time.
func TestNamesAreRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, Config{})
		asked, gone := 0, false
		a.users = newNames(func(string) (string, error) {
			if asked++; gone {
				return "", errors.New("no such user")
			}
			return "alice", nil
		})
		for _, step := range []struct {
			wait  time.Duration
			gone  bool
			asked int
			name  bool
		}{
			{0, false, 1, true},
			{0, true, 1, true},
			{nameLife - 1, true, 1, true},
			{1, true, 2, false},
			{0, true, 3, false},
			{0, false, 4, true},
		} {
			gone = step.gone
			<-time.After(step.wait)
			got, err := a.Attest(t.Context(), os.Getpid())
			if err != nil || asked != step.asked || has(got, "user:alice") != step.name {
				t.Errorf("%+v: asked %d times, %v, %v", step, asked, got.Selectors, err)
			}
		}
	})
}

// BenchmarkAttest is what a request pays once.
func BenchmarkAttest(b *testing.B) {
	a, err := (&Config{}).Open(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.Attest(b.Context(), os.Getpid()); err != nil {
			b.Fatal(err)
		}
	}
}
