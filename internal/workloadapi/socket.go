package workloadapi

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/process"
)

// MaxSocketPath is how long a socket's path may be, in bytes: what the kernel
// has room for, less the byte that ends it (F8).
const MaxSocketPath = 107

// socketFile is a socket of ours in the file system. It remembers which file it
// is, so that another one at the same path is left alone.
type socketFile struct {
	path string
	info os.FileInfo
}

// listen creates the socket, connectable by everyone: callers are told apart by
// what they are, not by whom the file lets in. It never removes what it cannot
// show to be a dead socket of ours (R61, F9).
func listen(path string, via process.Via) (*process.Listener, socketFile, error) {
	if err := CheckSocketPath(path); err != nil {
		return nil, socketFile{}, err
	}
	dir := filepath.Dir(path)
	if err := makeDirs(dir); err != nil {
		return nil, socketFile{}, socketFault(path, "its directory cannot be created").Because(err)
	}
	if err := checkDir(dir); err != nil {
		return nil, socketFile{}, err
	}
	if err := clear(path); err != nil {
		return nil, socketFile{}, err
	}
	l, err := process.Listen(path, via)
	if err != nil {
		if fault.KindOf(err) != fault.Internal {
			return nil, socketFile{}, err
		}
		return nil, socketFile{}, socketFault(path, "it cannot be created").Because(err)
	}
	l.SetUnlinkOnClose(false) // socketFile.remove looks first
	info, err := os.Lstat(path)
	if err == nil {
		err = os.Chmod(path, 0o777)
	}
	if err != nil {
		return nil, socketFile{}, errors.Join(socketFault(path, "it cannot be opened to all").Because(err), l.Close())
	}
	return l, socketFile{path: path, info: info}, nil
}

// CheckSocketPath reports whether a socket can be made at path at all.
func CheckSocketPath(path string) error {
	if !filepath.IsAbs(path) {
		return socketFault(path, "it is not an absolute path")
	}
	if len(path) > MaxSocketPath {
		return fault.New(fault.Invalid, "socket_path_too_long", "the socket path has %d bytes, the kernel takes %d", len(path), MaxSocketPath).
			Fix("choose a shorter socket_path")
	}
	return nil
}

func socketFault(path, what string) *fault.Error {
	return fault.New(fault.Precondition, "socket_refused", "the socket %q is not made: %s", path, what)
}

// makeDirs creates the directories that are missing, passable by all whatever the umask.
func makeDirs(dir string) error {
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := makeDirs(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return os.Chmod(dir, 0o755)
}

// checkDir refuses a directory in which others could replace the socket (R113).
func checkDir(dir string) error {
	info, err := os.Lstat(dir)
	switch {
	case err != nil:
		return socketFault(dir, "its directory cannot be looked at").Because(err)
	case !info.IsDir():
		return socketFault(dir, "its directory is a link or a file").Fix("name the real directory")
	case !ours(info):
		return socketFault(dir, "its directory belongs to another user").Fix("choose a directory of the agent's own")
	case info.Mode().Perm()&0o022 != 0 && info.Mode()&os.ModeSticky == 0:
		return socketFault(dir, "others may write to its directory").Fix("chmod go-w " + dir)
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return socketFault(dir, "its directory cannot be looked at").Because(err)
	}
	return errors.Join(checkParents(dir), checkParents(real))
}

// checkParents refuses a directory that others could put another in the place
// of, through what lies above it or a link on the way.
func checkParents(dir string) error {
	for dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		info, err := os.Lstat(dir)
		switch {
		case err != nil:
			return socketFault(dir, "a directory above it cannot be looked at").Because(err)
		case !ours(info):
			return socketFault(dir, "a directory above it belongs to another user").Fix("choose a directory of the agent's own")
		case info.IsDir() && info.Mode().Perm()&0o022 != 0 && info.Mode()&os.ModeSticky == 0:
			return socketFault(dir, "others may write to a directory above it").Fix("chmod go-w " + dir)
		}
	}
	return nil
}

// clear makes room for the socket: a dead one of ours is removed, anything else is refused.
func clear(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return socketFault(path, "it cannot be looked at").Because(err)
	case info.Mode().Type() != os.ModeSocket:
		return socketFault(path, "something that is not a socket is there").Fix("remove it, or choose another socket_path")
	case !ours(info):
		return socketFault(path, "a socket of another user is there").Fix("choose another socket_path")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return fault.New(fault.Precondition, "socket_in_use", "another process serves the socket %q", path).
			Fix("stop it, or choose another socket_path")
	}
	if err := os.Remove(path); err != nil {
		return socketFault(path, "the socket of an earlier run cannot be removed").Because(err)
	}
	return nil
}

// remove removes the socket if it is still the one that was made (W40).
func (f socketFile) remove() error {
	info, err := os.Lstat(f.path)
	if err != nil || !os.SameFile(info, f.info) {
		return nil
	}
	return os.Remove(f.path)
}
