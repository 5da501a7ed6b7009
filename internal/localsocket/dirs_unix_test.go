//go:build unix

package localsocket_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/localsocket"
)

// A directory above the socket's, or one through which a link on the way leads,
// is as good as the socket's own for who wants to put another in its place (R113).
func TestCheckDir(t *testing.T) {
	base, real := t.TempDir(), t.TempDir()
	open := filepath.Join(base, "open")
	if err := os.MkdirAll(filepath.Join(open, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	link(t, real, filepath.Join(open, "link"))                     // replaceable if open is writable
	link(t, "open/link", filepath.Join(base, "far"))               // leads through it, relative
	link(t, "loop", filepath.Join(base, "loop"))                   // leads nowhere
	link(t, filepath.Join(base, "x"), filepath.Join(base, "gone")) // likewise
	check := func(name, want string) {
		t.Helper()
		if err := localsocket.CheckDir(filepath.Join(base, name)); fault.ReasonOf(err) != want && (err != nil || want != "") {
			t.Errorf("%s: %v, want the reason %q", name, err, want)
		}
	}
	check("loop", "socket_refused")
	check("gone", "socket_refused")
	for mode, want := range map[os.FileMode]string{0o755: "", 0o777: "socket_dir_unsafe", 0o775: "socket_dir_unsafe", 0o777 | os.ModeSticky: ""} {
		if err := os.Chmod(open, mode); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"open", "open/dir", "open/link", "far"} {
			check(name, want)
		}
	}
	if os.Getuid() != 0 {
		return // only root can make a file another user's
	}
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"open/link", "open"} {
		if err := os.Lchown(filepath.Join(base, name), 12345, 12345); err != nil {
			t.Fatal(err)
		}
		check(name, "socket_dir_unsafe")
		check("far", "socket_dir_unsafe")
		if err := os.Lchown(filepath.Join(base, name), 0, 0); err != nil {
			t.Fatal(err)
		}
	}
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}
