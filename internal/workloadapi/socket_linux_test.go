package workloadapi_test

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/workloadapi"
	"golang.org/x/sys/unix"
)

// The socket is open to everybody, and its directory passable: callers are told
// apart by what they are.
func TestSocketFile(t *testing.T) {
	path := filepath.Join(shortDir(t), "made", "deeper", "s")
	open := func() (*workloadapi.Server, error) {
		return workloadapi.Open(workloadapi.Config{SocketPath: path, Log: slog.New(slog.DiscardHandler)})
	}
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(); fault.ReasonOf(err) != "socket_in_use" {
		t.Errorf("a second one: %v, want socket_in_use", err)
	}
	for at, mode := range map[string]os.FileMode{path: 0o777, filepath.Dir(path): 0o755} {
		if info, err := os.Stat(at); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, %v, want %v", at, info.Mode(), err, mode)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("after Close: %v, want it gone", err)
	}
}

// A socket that a service manager made is served where it is, left alone at the
// end, and refused if its callers could not be told apart or expect it elsewhere.
func TestPassedSocket(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	passed := func() *os.File {
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	try := func(path string, f *os.File) error {
		s, err := workloadapi.Open(workloadapi.Config{SocketPath: path, Passed: f, Log: slog.New(slog.DiscardHandler)})
		if err == nil {
			s.Close()
		}
		return err
	}
	if err := try(path, passed()); fault.ReasonOf(err) != "socket_refused" {
		t.Errorf("without PassCredentials: %v", err)
	}
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
	if err != nil {
		t.Fatal(err)
	}
	if err := try(path+"x", passed()); fault.ReasonOf(err) != "socket_refused" {
		t.Errorf("elsewhere: %v", err)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	if err := try(path, null); err == nil {
		t.Error("a file that is no socket was taken")
	}
	r := newRig(t, func(c *workloadapi.Config) { c.SocketPath, c.Passed = path, passed() })
	r.grant("a", "/a")
	if err := calls(r.dial())["FetchX509SVID"](r.ctx()); err != nil {
		t.Error(err)
	}
	if err := try(path, passed()); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error("the manager's socket was removed")
	}
}
