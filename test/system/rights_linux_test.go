package system_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// threads returns the different values that a process's threads have of a line in
// their status.
func threads(t *testing.T, pid int, key string) []string {
	t.Helper()
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	var values []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // that thread has ended
		}
		for line := range strings.Lines(string(text)) {
			if v, ok := strings.CutPrefix(line, key+":"); ok {
				values = append(values, strings.TrimSpace(v))
			}
		}
	}
	slices.Sort(values)
	return slices.Compact(values)
}

// An agent of root's keeps the capabilities by which it sees programs, if a
// selector needs them, and none besides.
func TestAgentGivesUpCapabilities(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this needs root")
		}
		t.Skip("this needs root")
	}
	const programs = 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_DAC_READ_SEARCH
	d := newDeployment(t)
	d.start()
	for _, c := range []struct {
		discover bool
		want     uint64
	}{{true, programs}, {false, 0}} {
		if !c.discover {
			d.agent.stop(syscall.SIGTERM)
			conf := d.agentConfig("")
			d.write("agent.conf", strings.Replace(conf, "discover_workload_path = true", "discover_workload_path = false", 1))
			d.agent = start(t, exec.Command(plastron, "agent", "run", "-config", d.path("agent.conf")))
			d.waitHealthy("agent")
		}
		want := []string{fmt.Sprintf("%016x", c.want)}
		eventually(t, "only the capabilities that are needed", func() bool {
			pid := d.agent.cmd.Process.Pid
			return slices.Equal(threads(t, pid, "CapEff"), want) && slices.Equal(threads(t, pid, "CapPrm"), want) &&
				slices.Equal(threads(t, pid, "NoNewPrivs"), []string{"1"})
		})
	}
}

// A service manager's socket is served and left, and the manager is told.
func TestUnderAServiceManager(t *testing.T) {
	d := newDeployment(t)
	d.startServer()
	if err := os.MkdirAll(filepath.Dir(d.workloadSocket()), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.workloadSocket(), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
	if err != nil {
		t.Fatal(err)
	}
	passed, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer passed.Close()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: d.path("notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	notify.SetDeadline(time.Now().Add(patience))

	token, _ := d.token()
	d.writeBundle()
	d.write("agent.conf", d.agentConfig(token))
	cmd := exec.Command(plastron, "agent", "run", "-config", d.path("agent.conf"))
	// The shell's number becomes the agent's.
	cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`}, cmd.Args...)
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "LISTEN_FDNAMES=workload", "NOTIFY_SOCKET="+d.path("notify"))
	cmd.ExtraFiles = []*os.File{passed}
	d.agent = start(t, cmd)
	d.waitHealthy("agent")
	hears := func(want string) {
		t.Helper()
		b := make([]byte, 100)
		n, err := notify.Read(b)
		if err != nil || string(b[:n]) != want {
			t.Errorf("the manager heard %q, %v; want %q", b[:n], err, want)
		}
	}
	hears("READY=1")
	d.agent.stop(syscall.SIGTERM)
	hears("STOPPING=1")
	if _, err := os.Stat(d.workloadSocket()); err != nil {
		t.Errorf("the manager's socket is gone: %v", err)
	}
}
