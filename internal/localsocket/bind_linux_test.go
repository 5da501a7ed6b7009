package localsocket_test

import (
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/plastron/plastron/internal/fault"
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

// One whose process has too much to do to let anybody in is not a dead one.
func TestBusySocketIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for err == nil { // until there is no room for one more
		var c net.Conn
		if c, err = net.Dial("unix", path); err == nil {
			defer c.Close()
		}
	}
	if l, err := private(path); fault.ReasonOf(err) != "socket_in_use" {
		t.Errorf("Listen() = %v, %v", l, err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket of a living process: %v", err)
	}
}
