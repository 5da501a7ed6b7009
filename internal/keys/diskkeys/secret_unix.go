//go:build unix

package diskkeys

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/plastron/plastron/internal/fault"
)

func errUnsafe(path, what, fix string) error {
	return fault.New(fault.Precondition, "key_file_unsafe", "%s %s", path, what).Fix("%s", fix)
}

// checkPath refuses a key file whose place others could change (R113): every
// directory above it belongs to root or to us and is not writable by others; a
// directory such as /tmp, where only owners may rename, may be above but not
// hold it. A symbolic link on the way must be root's or ours.
func checkPath(path string) error {
	dir := filepath.Dir(path)
	for at := dir; ; at = filepath.Dir(at) {
		if err := checkOwner(at); err != nil {
			return err
		}
		if at == filepath.Dir(at) {
			break
		}
	}
	resolved, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fault.New(fault.Precondition, "key_directory_missing", "the directory %s of the key file cannot be used", dir).
			Fix("create it with mode 0700").Because(err)
	}
	for at := resolved; ; at = filepath.Dir(at) {
		if err := checkOwner(at); err != nil {
			return err
		}
		info, err := os.Lstat(at)
		if err != nil {
			return fmt.Errorf("directory of the key file: %w", err)
		}
		sticky := info.Mode()&fs.ModeSticky != 0 && at != resolved
		if info.Mode().Perm()&0o022 != 0 && !sticky {
			return errUnsafe(at, "holds the key file and is writable by other users", "remove group and other write permission: chmod go-w "+at)
		}
		if at == filepath.Dir(at) {
			return nil
		}
	}
}

func checkOwner(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // said later, with the remedy
	}
	if err != nil {
		return fmt.Errorf("directory of the key file: %w", err)
	}
	if s, ok := info.Sys().(*syscall.Stat_t); !ok || s.Uid != 0 && int(s.Uid) != os.Geteuid() {
		return errUnsafe(path, "lies above the key file and belongs to another user", "put the key file below directories of root or of the server's user")
	}
	return nil
}

// readSecret reads a regular file of ours that nobody else can read. The checks
// are made on the open file, so that it cannot be exchanged in between.
func readSecret(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.EMLINK) {
		return nil, errUnsafe(path, "is a symbolic link", "name the file itself in keys_path")
	}
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return nil, errUnsafe(path, "is not a regular file", "name a file in keys_path")
	case !ok || int(owner.Uid) != os.Geteuid():
		return nil, errUnsafe(path, "belongs to another user", "make the server's user its owner")
	case info.Mode().Perm()&0o077 != 0:
		return nil, errUnsafe(path, fmt.Sprintf("has mode %04o, so that others may read it", info.Mode().Perm()), "chmod 0600 "+path)
	case info.Size() > maxFile:
		return nil, errUnsafe(path, "is larger than 1 MiB", "it is not a key file of ours")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil || len(data) > maxFile {
		return nil, errors.Join(fmt.Errorf("key file %s cannot be read", path), err)
	}
	return data, nil
}
