package localsocket_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/localsocket"
)

func private(path string) (*localsocket.Listener, error) {
	return localsocket.Listen(path, localsocket.Private(), localsocket.Bind)
}

// R61, W40: what is not a dead socket of ours is never removed.
func TestListen(t *testing.T) {
	dir, err := os.MkdirTemp("", "plastron")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	refused := func(t *testing.T, path, reason string) {
		t.Helper()
		l, err := private(path)
		if err == nil {
			l.Close()
		}
		if fault.ReasonOf(err) != reason {
			t.Errorf("listen on %s: %v, want %s", path, err, reason)
		}
	}
	t.Run("F8 108 bytes", func(t *testing.T) {
		long := filepath.Join(dir, strings.Repeat("x", 108-len(dir)-1))
		refused(t, long, "socket_path_invalid")
		refused(t, "", "socket_path_invalid")
		l, err := private(long[:107])
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	})
	t.Run("F9 a file", func(t *testing.T) {
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, path, "socket_path_taken")
		if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
			t.Errorf("the file afterwards: %q, %v", b, err)
		}
	})
	t.Run("F9 a directory", func(t *testing.T) {
		path := filepath.Join(dir, "dir")
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		refused(t, path, "socket_path_taken")
	})
	t.Run("F9 a link", func(t *testing.T) {
		target, path := filepath.Join(dir, "target"), filepath.Join(dir, "link")
		other, err := net.Listen("unix", target)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
		refused(t, path, "socket_path_taken")
		if _, err := os.Lstat(target); err != nil {
			t.Errorf("the link's target is gone: %v", err)
		}
	})
	t.Run("F9 a socket of another user", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("only root can make a file another user's")
		}
		path := filepath.Join(dir, "foreign")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		if err := os.Chown(path, 4711, 4711); err != nil {
			t.Fatal(err)
		}
		refused(t, path, "socket_path_taken")
	})
	t.Run("one in use", func(t *testing.T) {
		path := filepath.Join(dir, "used")
		l, err := private(path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		refused(t, path, "socket_in_use")
	})
	t.Run("one left behind", func(t *testing.T) {
		path := filepath.Join(dir, "stale")
		old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		old.SetUnlinkOnClose(false)
		old.Close() // as after kill -9
		l, err := private(path)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
		}
		l.Close()
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Close: %v, want it gone", err)
		}
	})
	t.Run("another's by now is not removed", func(t *testing.T) {
		path := filepath.Join(dir, "swapped")
		l, err := private(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		l.Close()
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("Close removed what is not its own: %v", err)
		}
	})
	t.Run("R113 a directory that others can write", func(t *testing.T) {
		open := filepath.Join(dir, "open")
		if err := os.Mkdir(open, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(open, 0o777); err != nil {
			t.Fatal(err)
		}
		refused(t, filepath.Join(open, "api.sock"), "socket_dir_unsafe")
		refused(t, filepath.Join(open, "private", "api.sock"), "socket_dir_unsafe")
	})
	t.Run("directories are made for whom it lets in", func(t *testing.T) {
		for name, want := range map[string]struct {
			to           localsocket.Access
			socket, dirs os.FileMode
		}{"private": {localsocket.Private(), 0o600, 0o700}, "public": {localsocket.Public(), 0o777, 0o755}} {
			path := filepath.Join(dir, name, "deeper", "s")
			l, err := localsocket.Listen(path, want.to, localsocket.Bind)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			for at, mode := range map[string]os.FileMode{path: want.socket, filepath.Dir(path): want.dirs, filepath.Dir(filepath.Dir(path)): want.dirs} {
				if info, err := os.Stat(at); err != nil || info.Mode().Perm() != mode {
					t.Errorf("%s: mode %v, %v, want %v", at, info.Mode(), err, mode)
				}
			}
		}
	})
}
