package localsocket_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/plastron/plastron/internal/localsocket"
)

// Nobody else can connect between bind and chmod, whatever the umask.
func TestBindIsPrivateAtOnce(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(t.TempDir(), "s")
	l, err := localsocket.Bind(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Lstat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}
