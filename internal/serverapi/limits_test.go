package serverapi_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/serverapi"
)

func TestGate(t *testing.T) { // R17, R100
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	g := serverapi.NewGate(1, 3, 100)
	in := func(caller string, at time.Time) error {
		leave, err := g.Enter(caller, at)
		if err == nil {
			leave()
		}
		return err
	}
	for range 3 {
		if err := in("a", now); err != nil {
			t.Fatal(err)
		}
	}
	if err := in("a", now); fault.KindOf(err) != fault.Exhausted {
		t.Errorf("the fourth: %v, want exhausted", err)
	}
	if err := in("b", now); err != nil {
		t.Errorf("another caller: %v", err)
	}
	if err := in("a", now.Add(time.Second)); err != nil {
		t.Errorf("a second later: %v", err)
	}
	if err := in("a", now.Add(time.Second)); err == nil {
		t.Error("one a second means one")
	}
}

func TestGateWidth(t *testing.T) { // R17: bounded, and refused rather than waiting
	g := serverapi.NewGate(0, 0, 2)
	now := time.Now()
	first, err := g.Enter("a", now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Enter("b", now); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Enter("c", now); fault.KindOf(err) != fault.Exhausted {
		t.Errorf("a third at once: %v, want exhausted", err)
	}
	first()
	if _, err := g.Enter("c", now); err != nil {
		t.Errorf("after one left: %v", err)
	}
}

func TestGateTableIsBounded(t *testing.T) { // R98, R106
	g := serverapi.NewGate(1, 2, 1)
	now := time.Now()
	for i := range serverapi.MaxBuckets + 1000 {
		if leave, err := g.Enter(fmt.Sprint(i), now); err == nil {
			leave()
		}
	}
	if n := g.Buckets(); n > serverapi.MaxBuckets {
		t.Errorf("%d buckets, the limit is %d", n, serverapi.MaxBuckets)
	}
	// Who fills up again makes room.
	if leave, err := g.Enter("late", now.Add(time.Minute)); err != nil {
		t.Error(err)
	} else {
		leave()
	}
	if n := g.Buckets(); n != 1 {
		t.Errorf("%d buckets after a quiet minute, want 1", n)
	}
}

func TestAddressKey(t *testing.T) { // R100
	for address, want := range map[string]string{
		"192.0.2.7:1234":              "192.0.2.7",
		"[2001:db8:1:2:3:4:5:6]:1":    "2001:db8:1:2::/64",
		"[2001:db8:1:2:ffff::1]:9999": "2001:db8:1:2::/64",
		"[::ffff:192.0.2.7]:1":        "192.0.2.7",
		"[fe80::1%eth0]:1":            "fe80::/64",
		"local":                       "local",
	} {
		if got := serverapi.AddressKey(address); got != want {
			t.Errorf("AddressKey(%q) = %q, want %q", address, got, want)
		}
	}
}

func TestSocketPath(t *testing.T) {
	dir, err := os.MkdirTemp("", "plastron")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	refused := func(t *testing.T, path, reason string) {
		t.Helper()
		l, err := serverapi.ListenSocket(path)
		if err == nil {
			l.Close()
		}
		if fault.ReasonOf(err) != reason {
			t.Errorf("listen on %s: %v, want %s", path, err, reason)
		}
	}
	t.Run("F8 109 bytes", func(t *testing.T) {
		refused(t, filepath.Join(dir, strings.Repeat("x", 109-len(dir)-1)), "socket_path_invalid")
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
	t.Run("one in use", func(t *testing.T) {
		path := filepath.Join(dir, "used")
		l, err := serverapi.ListenSocket(path)
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
		l, err := serverapi.ListenSocket(path)
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
		l, err := serverapi.ListenSocket(path)
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
		refused(t, filepath.Join(open, "private", "api.sock"), "socket_dir_unsafe")
	})
	t.Run("the directory is made for its owner", func(t *testing.T) {
		path := filepath.Join(dir, "new", "api.sock")
		l, err := serverapi.ListenSocket(path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("mode %v, %v, want 0700", info.Mode(), err)
		}
	})
}
