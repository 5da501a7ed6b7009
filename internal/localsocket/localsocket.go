// Package localsocket makes the Unix sockets on which the server and the agent
// are reached from their own host, and says who is at the other end.
//
// What must always hold: nothing is removed that is not a dead socket of this
// user (R61); no other user could put a socket in the place of one of ours,
// through whatever lies above it (R113); a private socket lets in its owner only.
package localsocket

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// MaxPath is how long a socket's path may be, in bytes: what the kernel has room
// for, less the byte that ends it (F8).
const MaxPath = 107

// Access is whom a socket lets in: the mode of its file, and of the directories
// that are made for it.
type Access struct{ socket, dirs fs.FileMode }

// Private lets in the owner and root.
func Private() Access { return Access{0o600, 0o700} }

// Public lets in everybody: callers are told apart by what they are.
func Public() Access { return Access{0o777, 0o755} }

// Bound is what a socket can be of: *net.UnixListener, or what holds one.
type Bound interface {
	net.Listener
	SetUnlinkOnClose(bool)
}

// Listener is a listener that remembers which file it made, so that another one
// at the same path is left alone.
type Listener struct {
	net.Listener
	path string
	made fs.FileInfo
}

// Listen makes a socket. Missing directories are made whatever the umask, what an
// earlier run left behind is removed, and anything else in the way is left alone
// and refused (F9).
func Listen(path string, to Access, bind func(path string) (Bound, error)) (*Listener, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err == nil {
		err = makeDirs(dir, to.dirs)
	}
	if err != nil {
		return nil, refused(path, "its directory cannot be made").Because(err)
	}
	if err := CheckDir(dir); err != nil {
		return nil, err
	}
	if err := clear(path); err != nil {
		return nil, err
	}
	l, err := bind(path)
	if err != nil {
		if fault.KindOf(err) != fault.Internal {
			return nil, err
		}
		return nil, refused(path, "it cannot be made").Because(err)
	}
	l.SetUnlinkOnClose(false) // Close looks first
	made, err := os.Lstat(path)
	if err == nil {
		err = os.Chmod(path, to.socket)
	}
	if err != nil {
		return nil, errors.Join(refused(path, "its mode cannot be set").Because(err), l.Close())
	}
	return &Listener{l, path, made}, nil
}

// Adopt takes over a listener that a service manager has made, with the file that
// it has in the file system: that file is the manager's.
func Adopt(l net.Listener) *Listener { return &Listener{Listener: l, path: l.Addr().String()} }

// Bind is the plain way to bind. Only the owner can connect before Listen has set
// the mode, whatever the umask: who came in that moment would be an operator.
func Bind(path string) (Bound, error) {
	l, err := (&net.ListenConfig{Control: ownersOnly}).Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// Path returns where the socket is.
func (l *Listener) Path() string { return l.path }

// Close stops listening and removes the socket, unless another's is there by now (W40).
func (l *Listener) Close() error {
	err := l.Listener.Close()
	if l.made == nil {
		return err
	}
	if now, statErr := os.Lstat(l.path); statErr == nil && os.SameFile(now, l.made) {
		err = errors.Join(err, os.Remove(l.path))
	}
	return err
}

// CheckPath says whether a socket can have this path at all.
func CheckPath(path string) error {
	if path == "" || len(path) > MaxPath {
		return fault.New(fault.Invalid, "socket_path_invalid", "the socket path %q has %d bytes; it must have 1 to %d", path, len(path), MaxPath).
			Fix("choose a shorter path")
	}
	return nil
}

func refused(path, what string) *fault.Error {
	return fault.New(fault.Precondition, "socket_refused", "the socket %q is not made: %s", path, what)
}

// makeDirs makes the directories that are missing.
func makeDirs(dir string, mode fs.FileMode) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := makeDirs(filepath.Dir(dir), mode); err != nil {
		return err
	}
	if err := os.Mkdir(dir, mode); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	return os.Chmod(dir, mode)
}

// clear makes room: a dead socket of ours is removed, anything else is refused.
func clear(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return refused(path, "it cannot be looked at").Because(err)
	case info.Mode().Type() != fs.ModeSocket || !mine(info):
		return fault.New(fault.Precondition, "socket_path_taken", "%q is in the way and is not a socket of this user", path).
			Fix("remove it or choose another socket path")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
	}
	// Who has too much to do to let us in lives.
	if err == nil || errors.Is(err, syscall.EAGAIN) || errors.Is(err, os.ErrDeadlineExceeded) {
		return fault.New(fault.Precondition, "socket_in_use", "another process listens on %q", path).
			Fix("stop it or choose another socket path")
	}
	if err := os.Remove(path); err != nil {
		return refused(path, "the socket of an earlier run cannot be removed").Because(err)
	}
	return nil
}
