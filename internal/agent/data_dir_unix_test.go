//go:build unix

package agent

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/internal/fault"
)

// The data directory says which servers are trusted: it is refused where others
// could replace it (R113, F10).
func TestDataDirThatOthersCouldReplace(t *testing.T) {
	open := func(t *testing.T, path, reason string) {
		t.Helper()
		dir, err := openDataDir(path, slog.New(slog.DiscardHandler))
		if err == nil {
			dir.Close()
		}
		if fault.ReasonOf(err) != reason && (err != nil || reason != "") {
			t.Errorf("openDataDir(%q) = %v, want the reason %q", path, err, reason)
		}
	}
	t.Run("ours", func(t *testing.T) { open(t, filepath.Join(t.TempDir(), "data"), "") })
	t.Run("below a directory that all may write", func(t *testing.T) {
		base := t.TempDir()
		if err := os.Chmod(base, 0o777); err != nil {
			t.Fatal(err)
		}
		open(t, filepath.Join(base, "data"), "data_dir_unsafe")
		if err := os.Chmod(base, 0o777|os.ModeSticky); err != nil {
			t.Fatal(err)
		}
		open(t, filepath.Join(base, "data"), "")
	})
	t.Run("through a link of another user", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("only root can make a file another user's")
		}
		base := t.TempDir()
		link := filepath.Join(base, "link")
		if err := os.Symlink(t.TempDir(), link); err != nil {
			t.Fatal(err)
		}
		open(t, filepath.Join(link, "data"), "")
		if err := os.Lchown(link, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		open(t, filepath.Join(link, "data"), "data_dir_unsafe")
	})
}
