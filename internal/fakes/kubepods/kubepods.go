// Package kubepods makes what a kubelet and a container runtime make of a pod as
// far as the kernel shows it: control groups, real ones, version 1 and 2, with
// processes in them. What it makes is gone when the test is over.
package kubepods

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience is how long what takes milliseconds is tried.
const patience = time.Minute

// Version is a version of control groups, or both.
type Version uint

// The versions. A hybrid machine has both mounted.
const (
	V1 Version = 1 << iota
	V2
	Hybrid = V1 | V2
)

// Systemd is the path of a container in a pod when the kubelet has the driver
// systemd. runtime is "cri-containerd", "crio" or "docker".
func Systemd(runtime, uid, id string) string {
	return "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice/" + runtime + "-" + id + ".scope"
}

// Cgroupfs is the path when the kubelet has the driver cgroupfs.
func Cgroupfs(uid, id string) string { return "/kubepods/burstable/pod" + uid + "/" + id }

// NewID returns the ID of a container that is nowhere else.
func NewID() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// NewUID returns the UID of a pod that is nowhere else.
func NewUID() string {
	s := NewID()
	return s[:8] + "-" + s[8:12] + "-4" + s[13:16] + "-a" + s[17:20] + "-" + s[20:32]
}

// Group is one control group, in each hierarchy that it was made in.
type Group struct{ dirs []string }

// Make makes the control group at a path, in the version-1 hierarchies memory,
// pids and name=systemd, or in version 2, or in both. It needs root.
func Make(t testing.TB, path string, in Version) *Group {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root to make control groups")
		}
		t.Skip("needs root to make control groups")
	}
	g := &Group{}
	for _, m := range mounts(t) {
		if m.version&in == 0 {
			continue
		}
		dir := filepath.Join(m.dir, path)
		if err := makeAll(dir); err != nil {
			t.Fatalf("make a control group: %v", err)
		}
		t.Cleanup(func() { remove(t, m.dir, dir) })
		g.dirs = append(g.dirs, dir)
	}
	if len(g.dirs) == 0 {
		t.Fatalf("no control groups of version %d are mounted", in)
	}
	return g
}

// Dirs returns the directories of the group, one in each hierarchy.
func (g *Group) Dirs() []string { return g.dirs }

// Command prepares a program that runs in the group from its first instruction.
func (g *Group) Command(name string, args ...string) *exec.Cmd {
	script := ""
	for _, dir := range g.dirs {
		script += "echo $$ > '" + dir + "/cgroup.procs' && "
	}
	return exec.Command("/bin/sh", append([]string{"-c", script + `exec "$@"`, "sh", name}, args...)...)
}

// Start starts a program that does nothing in the group and returns its number.
// It is there when Start returns, and gone when the test is over.
func (g *Group) Start(t testing.TB) int {
	t.Helper()
	cmd := g.Command("/bin/sh", "-c", "echo; read x")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("the process did not start: %v", err)
	}
	return cmd.Process.Pid
}

type mount struct {
	dir     string
	version Version
}

// mounts returns where control groups are mounted, the controllers of version 1
// that need no set-up only.
func mounts(t testing.TB) (found []mount) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		switch {
		case len(f) < 4:
		case f[2] == "cgroup2":
			found = append(found, mount{f[1], V2})
		case f[2] == "cgroup":
			for option := range strings.SplitSeq(f[3], ",") {
				if option == "memory" || option == "pids" || option == "name=systemd" {
					found = append(found, mount{f[1], V1})
					break
				}
			}
		}
	}
	return found
}

// makeAll makes a directory and those above it, which other tests may be making
// and removing at the same time.
func makeAll(dir string) error {
	deadline := time.Now().Add(patience)
	for {
		err := os.MkdirAll(dir, 0o755)
		crossed := errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENODEV)
		if !crossed || time.Now().After(deadline) {
			return err
		}
	}
}

// remove removes a group, with what its processes made below it, and what is
// empty above it. A process that was killed stays in it for a moment.
func remove(t testing.TB, top, dir string) {
	deadline := time.Now().Add(patience)
	for {
		var groups []string
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				groups = append([]string{path}, groups...)
			}
			return nil
		})
		for _, g := range groups {
			kill(g)
			os.Remove(g)
		}
		if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("control group %s is still in use", dir)
			return
		}
		time.Sleep(time.Millisecond)
	}
	for up := filepath.Dir(dir); up != top && os.Remove(up) == nil; up = filepath.Dir(up) {
	}
}

// kill ends what a test left in its own group.
func kill(dir string) {
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return
	}
	for _, f := range strings.Fields(string(text)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill()
			}
		}
	}
}
