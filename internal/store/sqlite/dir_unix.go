//go:build unix

package sqlite

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/plastron/plastron/internal/fault"
)

// checkDir refuses a directory that others can change, or replace through one of
// its parents or a link on the way (F10, R113).
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fault.New(fault.Precondition, "not_a_directory", "%s is not a directory", dir)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return writable(dir, info)
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	for _, path := range []string{dir, real} {
		for ; ; path = filepath.Dir(path) {
			info, err := os.Lstat(path)
			if err != nil {
				return err
			}
			if err := checkOwner(path, info); err != nil {
				return err
			}
			if path == filepath.Dir(path) {
				break
			}
		}
	}
	return nil
}

// checkOwner refuses what belongs to neither us nor root, and what others can
// write. In a directory with the sticky bit (/tmp) others can add, not replace.
func checkOwner(path string, info fs.FileInfo) error {
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fault.New(fault.Precondition, "unsafe_permissions", "%s belongs to user %d, who could replace the store", path, st.Uid).
			Fix("use a directory of your own")
	}
	if info.Mode().Type() == fs.ModeSymlink || info.Mode()&fs.ModeSticky != 0 && info.IsDir() {
		return nil
	}
	if info.Mode().Perm()&0o022 != 0 {
		return writable(path, info)
	}
	return nil
}

func writable(path string, info fs.FileInfo) error {
	return fault.New(fault.Precondition, "unsafe_permissions", "%s has mode %04o: others can write it, and so the store", path, info.Mode().Perm()).
		Fix("chmod go-w %s", path)
}

// lockFile reports whether someone else holds the lock.
func lockFile(f *os.File) (held bool, err error) {
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// fileIdentity returns what a copy of the file does not share with it.
func fileIdentity(path string) (uint64, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return uint64(st.Ino), err
}

// syncDir makes the directory's entries durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
