package workloadapi_test

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/workloadapi"
)

// R61, F8, F9, W40: what is not a dead socket of ours is never removed.
func TestSocketFile(t *testing.T) {
	dir := shortDir(t)
	try := func(path string) error {
		s, err := workloadapi.Open(workloadapi.Config{SocketPath: path, Log: slog.New(slog.DiscardHandler)})
		if err == nil {
			s.Close()
		}
		return err
	}
	reason := func(name string, err error, want string) {
		t.Helper()
		if fault.ReasonOf(err) != want {
			t.Errorf("%s: %v, want reason %s", name, err, want)
		}
	}
	long := filepath.Join(dir, strings.Repeat("x", 108-len(dir)-1))
	reason("108 bytes", try(long), "socket_path_too_long")
	if err := try(long[:107]); err != nil {
		t.Errorf("107 bytes: %v", err)
	}
	reason("relative", try("s"), "socket_refused")

	file := filepath.Join(dir, "file")
	os.WriteFile(file, []byte("precious"), 0o600)
	link := filepath.Join(dir, "link")
	os.Symlink(filepath.Join(dir, "elsewhere"), link)
	sub := filepath.Join(dir, "dir")
	os.Mkdir(sub, 0o755)
	for _, path := range []string{file, link, sub} {
		reason(path, try(path), "socket_refused")
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("%s was removed", path)
		}
	}
	if os.Getuid() == 0 {
		foreign := filepath.Join(dir, "foreign")
		l, err := net.Listen("unix", foreign)
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
		os.Chown(foreign, 4711, 4711)
		reason("foreign socket", try(foreign), "socket_refused")
		theirs := filepath.Join(dir, "theirs")
		os.Mkdir(theirs, 0o755)
		os.Chown(theirs, 4711, 4711)
		reason("foreign directory", try(filepath.Join(theirs, "s")), "socket_refused")
	}
	open := filepath.Join(dir, "open")
	os.Mkdir(open, 0o777)
	os.Chmod(open, 0o777)
	reason("directory that others may write", try(filepath.Join(open, "s")), "socket_refused")

	live := filepath.Join(dir, "live")
	s, err := workloadapi.Open(workloadapi.Config{SocketPath: live, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	reason("in use", try(live), "socket_in_use")
	if info, err := os.Stat(live); err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	// Something else took its place: closing leaves that alone.
	os.Remove(live)
	os.WriteFile(live, []byte("precious"), 0o600)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(live); string(b) != "precious" {
		t.Error("a file that took the socket's place was removed")
	}
	// A dead socket of an earlier run is replaced; missing directories are made, passable.
	dead := filepath.Join(dir, "made", "deeper", "s")
	if err := try(dead); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if err := try(dead); err != nil {
		t.Errorf("over the socket of an earlier run: %v", err)
	}
	if info, err := os.Stat(filepath.Dir(dead)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("directory mode %v, %v", info.Mode(), err)
	}
}
