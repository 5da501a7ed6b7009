//go:build unix

package workloadapi

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/internal/fault"
)

// A directory above the socket's is as good as its own for who wants to put
// another socket in its place (R113).
func TestSocketBelowADirectoryOfOthers(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "public")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for mode, reason := range map[os.FileMode]string{0o755: "", 0o777: "socket_refused", 0o777 | os.ModeSticky: ""} {
		if err := os.Chmod(base, mode); err != nil {
			t.Fatal(err)
		}
		if err := checkDir(dir); fault.ReasonOf(err) != reason && (err != nil || reason != "") {
			t.Errorf("below %v: %v, want the reason %q", mode, err, reason)
		}
	}
	if os.Getuid() != 0 {
		return // only root can make a file another user's
	}
	if err := os.Chown(base, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if err := checkDir(dir); fault.ReasonOf(err) != "socket_refused" {
		t.Errorf("below a directory of another user: %v", err)
	}
}
