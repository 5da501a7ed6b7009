package sqlite

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/plastron/plastron/internal/fault"
)

// prepareDir makes the directory and refuses one that others can change.
func prepareDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("store directory: %w", err)
	}
	return checkDir(dir)
}

// prepareDatabase makes an empty file, private from the start, or checks the one
// that is there. A database that is remembered but not there is not replaced by
// an empty one: that would forget every ban and registration without a word.
func prepareDatabase(dir string, remembered *mark) error {
	path := filepath.Join(dir, databaseName)
	info, err := os.Lstat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if remembered != nil && (err != nil || info.Size() == 0) {
		return fault.New(fault.Precondition, "database_missing", "%s is missing or empty, but was at revision %d", path, remembered.revision).
			Fix("restore it from a backup, or remove %s to begin with an empty store", filepath.Join(dir, positionName))
	}
	f, err := openPrivate(path)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return syncDir(dir)
}

// openPrivate opens a file of ours for reading and writing, and makes it if it
// is missing. It refuses a link, and a file that others can write.
func openPrivate(path string) (*os.File, error) {
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() {
		return nil, fault.New(fault.Precondition, "unsafe_permissions", "%s is not a regular file", path)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		err = checkOwner(path, info)
	}
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = f.Chmod(0o600) // others could read it; a backup that was put back, most likely
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// dirLock is the open lock file.
type dirLock struct{ f *os.File }

// lockDir takes the directory for this process (F13). The lock is the
// kernel's and goes with the process; the file stays, with the last pid.
func lockDir(dir string) (*dirLock, error) {
	f, err := openPrivate(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	held, err := lockFile(f)
	if err != nil || held {
		b, _ := io.ReadAll(io.LimitReader(f, 20))
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("lock store directory: %w", err)
		}
		owner := "another process"
		if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			owner = fmt.Sprintf("process %d", pid)
		}
		return nil, fault.New(fault.Precondition, "store_in_use", "the store in %s is in use by %s", dir, owner).
			Fix("stop that process, or give this one a directory of its own")
	}
	// On a full disk the lock holds all the same; only its owner is not named.
	if f.Truncate(0) == nil {
		f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return &dirLock{f}, nil
}

func (l *dirLock) release() error {
	if l == nil {
		return nil
	}
	return l.f.Close()
}
