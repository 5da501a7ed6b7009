package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/plastron/plastron/internal/fault"
)

// devDir is where one plastron dev keeps its state: BASE/N, guarded by the lock
// of BASE/N.lock. BASE is short, since sockets lie below it, and is this user's
// alone. A lock that nobody holds marks what a killed dev has left.
type devDir struct {
	path string
	lock *os.File
}

// openDevDir makes a directory with a free number, and clears what killed ones
// have left.
func openDevDir() (*devDir, error) {
	base, err := devBase()
	if err != nil {
		return nil, err
	}
	clearDevDirs(base)
	for n := 1; n < 1000; n++ {
		path := filepath.Join(base, strconv.Itoa(n))
		lock, err := lockDevDir(base, path)
		if err != nil {
			return nil, err
		}
		if lock == nil {
			continue // another dev lives there
		}
		if err := errors.Join(os.RemoveAll(path), os.Mkdir(path, 0o700)); err != nil {
			lock.Close()
			return nil, err
		}
		return &devDir{path: path, lock: lock}, nil
	}
	return nil, fault.New(fault.Exhausted, "dev_dirs", "a thousand instances of plastron dev run already in %s", base)
}

// Close removes the directory, and the base if it is empty then.
func (d *devDir) Close() error {
	err := errors.Join(os.RemoveAll(d.path), os.Remove(d.lock.Name()), d.lock.Close())
	_ = os.Remove(filepath.Dir(d.path)) // fails while another dev uses it
	return err
}

// devBase returns the directory of this user's instances. One that belongs to
// somebody else, or that others may write to, is refused: they could put a
// socket of their own in our place.
func devBase() (string, error) {
	var candidates []string
	if runtime := os.Getenv("XDG_RUNTIME_DIR"); runtime != "" && privateDir(runtime) == nil {
		candidates = append(candidates, filepath.Join(runtime, "plastron"))
	}
	user := fmt.Sprintf("plastron-%d", os.Getuid())
	candidates = append(candidates, filepath.Join(os.TempDir(), user), filepath.Join("/tmp", user))
	for _, base := range candidates {
		if len(filepath.Join(base, "999", "agent", "api.sock")) > maxSocketPath {
			continue
		}
		if err := os.Mkdir(base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", fault.New(fault.Invalid, "dev_dir", "%v", err).Fix("set TMPDIR to a short directory that you may write to")
		}
		if err := privateDir(base); err != nil {
			return "", fault.New(fault.Invalid, "dev_dir", "%s: %v", base, err).Fix("remove it, or set TMPDIR to another short directory")
		}
		return base, nil
	}
	return "", fault.New(fault.Invalid, "dev_dir", "the path of the temporary directory is too long for a socket").Fix("set TMPDIR to a short directory")
}

// privateDir checks that path is a directory of this user that nobody else may enter.
func privateDir(path string) error {
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return errors.New("it is not a directory")
	case !ownedByUs(info):
		return errors.New("it belongs to another user")
	case info.Mode().Perm()&0o077 != 0:
		return errors.New("other users may enter it")
	}
	return nil
}

// lockDevDir takes the lock of the instance at path, or returns nil if a living
// one holds it.
func lockDevDir(base, path string) (*os.File, error) {
	for {
		lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
		if errors.Is(err, fs.ErrNotExist) { // the last dev has just removed the base
			if err := os.Mkdir(base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		if !lockFile(lock) {
			return nil, lock.Close()
		}
		// Its owner may have removed the file between our open and our lock; then
		// the lock guards nothing.
		held, err1 := lock.Stat()
		named, err2 := os.Stat(path + ".lock")
		if err1 == nil && err2 == nil && os.SameFile(held, named) {
			return lock, nil
		}
		lock.Close()
	}
}

// clearDevDirs removes the instances whose lock nobody holds. It touches only
// directories that are named by a number.
func clearDevDirs(base string) {
	entries, _ := os.ReadDir(base)
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil || !e.IsDir() {
			continue
		}
		path := filepath.Join(base, e.Name())
		if lock, err := lockDevDir(base, path); err == nil && lock != nil {
			_ = os.RemoveAll(path) // a later start tries again
			_ = os.Remove(lock.Name())
			lock.Close()
		}
	}
}
