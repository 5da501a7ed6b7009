//go:build unix

package systemd_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/systemd"
)

// TestMain lets the test binary be the service: what it was passed is told by Socket.
func TestMain(m *testing.M) {
	if name, ok := os.LookupEnv("SYSTEMD_TEST_NAME"); ok {
		f, err := systemd.Socket(name)
		switch {
		case err != nil:
			fmt.Print(fault.ReasonOf(err))
		case f == nil:
			fmt.Print("none")
		default:
			l, err := net.FileListener(f)
			if err != nil {
				fmt.Print(err)
				break
			}
			fmt.Print(filepath.Base(l.Addr().String()))
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	files := make([]*os.File, 2)
	for i, name := range []string{"a", "b"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if files[i], err = l.File(); err != nil {
			t.Fatal(err)
		}
		defer files[i].Close()
	}
	for _, c := range []struct{ env, name, want string }{
		{"LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=other:workload", "workload", "b"},
		{"LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=workload:other", "workload", "a"},
		{"LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=other:connection", "workload", "none"},
		{"LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=other:workload", "workload", "none"},
		{"LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=workload:workload", "workload", "socket_ambiguous"},
		{"LISTEN_PID=$$ LISTEN_FDS=x LISTEN_FDNAMES=workload:other", "workload", "none"},
		{"LISTEN_PID=$$ LISTEN_FDS=2", "workload", "none"},
		{"LISTEN_PID=1 LISTEN_FDS=2 LISTEN_FDNAMES=workload:other", "workload", "none"},
		{"LISTEN_FDS=2 LISTEN_FDNAMES=workload:other", "workload", "none"},
	} {
		cmd := exec.Command("/bin/sh", "-c", c.env+` exec "$0"`, os.Args[0]) // the shell's number becomes the program's
		cmd.Env = append(os.Environ(), "SYSTEMD_TEST_NAME="+c.name)
		cmd.ExtraFiles = files
		out, err := cmd.CombinedOutput()
		if err != nil || string(out) != c.want {
			t.Errorf("%s: %s, %v; want %s", c.env, out, err, c.want)
		}
	}
}

func manager(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	t.Setenv("NOTIFY_SOCKET", name)
	return c
}

func hears(t *testing.T, c *net.UnixConn, want string) {
	t.Helper()
	b := make([]byte, 100)
	if n, err := c.Read(b); err != nil || string(b[:n]) != want {
		t.Errorf("the manager heard %q, %v; want %q", b[:n], err, want)
	}
}

func TestNotify(t *testing.T) {
	dir, err := os.MkdirTemp("", "sd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	names := []string{filepath.Join(dir, "n")}
	if _, err := os.Stat("/proc/self"); err == nil { // Linux
		names = append(names, "@plastron-test-"+strconv.Itoa(os.Getpid()))
	}
	for _, name := range names {
		c := manager(t, name)
		if err := systemd.Notify(systemd.Ready); err != nil {
			t.Error(err)
		}
		hears(t, c, "READY=1")
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "nobody"))
	if systemd.Notify(systemd.Ready) == nil {
		t.Error("nobody heard it, and it is no error")
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := systemd.Notify(systemd.Ready); err != nil {
		t.Errorf("without a manager: %v", err)
	}
}

func TestWatchdog(t *testing.T) {
	for _, env := range []string{"", "0", "-1", "x", strings.Repeat("9", 18)} {
		t.Setenv("WATCHDOG_USEC", env)
		systemd.Watchdog(t.Context(), func() { t.Errorf("%q: it was asked for", env) })
	}
	dir, err := os.MkdirTemp("", "sd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	c := manager(t, filepath.Join(dir, "n"))
	t.Setenv("WATCHDOG_USEC", "2000")
	t.Setenv("WATCHDOG_PID", "1")
	systemd.Watchdog(t.Context(), func() { t.Error("asked of another process") })
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	ctx, cancel := context.WithCancel(t.Context())
	looked := make(chan struct{}, 100)
	done := make(chan struct{})
	go func() {
		systemd.Watchdog(ctx, func() {
			select {
			case looked <- struct{}{}:
			default:
			}
		})
		close(done)
	}()
	for range 3 {
		<-looked
		hears(t, c, "WATCHDOG=1")
	}
	cancel()
	<-done
}

// A manager that does not read is given up, and does not stop whom it manages.
func TestManagerThatHangs(t *testing.T) {
	dir, err := os.MkdirTemp("", "sd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "n")
	manager(t, name)
	other, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	raw, err := other.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Write(func(fd uintptr) bool { // until there is room for no more
		for err == nil {
			_, err = syscall.Write(int(fd), []byte("x"))
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if err := systemd.Notify(systemd.Stopping); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Notify() = %v", err)
	}
}
