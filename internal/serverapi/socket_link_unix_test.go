//go:build unix

package serverapi_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/serverapi"
)

// A link of another user on the way to the admin socket is refused: that user
// could lead operators, who show it their join tokens, elsewhere (R113).
func TestAdminSocketThroughAForeignLink(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make a file another user's")
	}
	base, err := os.MkdirTemp("", "pl")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(base)
	link := filepath.Join(base, "l")
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	for owner, reason := range map[int]string{0: "", 12345: "socket_dir_unsafe"} {
		if err := os.Lchown(link, owner, owner); err != nil {
			t.Fatal(err)
		}
		s, err := serverapi.ListenSocket(filepath.Join(link, "d", "s"))
		if err == nil {
			s.Close()
		}
		if fault.ReasonOf(err) != reason && (err != nil || reason != "") {
			t.Errorf("link of %d: %v, want the reason %q", owner, err, reason)
		}
	}
}
