package serverapi

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// maxSocketPath is what a socket address holds, its closing zero byte included.
const maxSocketPath = 108

// CheckSocketPath says whether path fits a socket address (F8).
func CheckSocketPath(path string) error {
	if path == "" || len(path) >= maxSocketPath {
		return fault.New(fault.Invalid, "socket_path_invalid", "the socket path %q has %d bytes; it must have 1 to %d", path, len(path), maxSocketPath-1).
			Fix("choose a shorter path")
	}
	return nil
}

// socket is a listener on a path that only its owner can use.
type socket struct {
	*net.UnixListener
	path string
	made os.FileInfo
}

// listenSocket makes the socket, in a directory made 0700 if it is missing. What
// a server that was killed left behind is removed; anything else in the way is
// left alone and refused (F9).
func listenSocket(path string) (*socket, error) {
	if err := CheckSocketPath(path); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if err := checkParents(path); err != nil {
		return nil, err
	}
	if err := clearSocket(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	made, err := os.Lstat(path)
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return &socket{l, path, made}, nil
}

// Close stops listening and removes the path, unless it is another's by now.
func (s *socket) Close() error {
	err := s.UnixListener.Close()
	if now, statErr := os.Lstat(s.path); statErr == nil && os.SameFile(now, s.made) {
		err = errors.Join(err, os.Remove(s.path))
	}
	return err
}

func clearSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket || !mine(info) {
		return fault.New(fault.Precondition, "socket_path_taken", "%q is in the way and is not a socket of this user", path).
			Fix("remove it or choose another socket path")
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return fault.New(fault.Precondition, "socket_in_use", "another process listens on %q", path).
			Fix("stop it or choose another socket path")
	}
	return os.Remove(path)
}
