//go:build unix

package secretfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/plastron/plastron/internal/fault"
)

const maxLinks = 16

func errUnsafe(path, what, fix string) error {
	return fault.New(fault.Precondition, "key_file_unsafe", "%s %s", path, what).Fix("%s", fix)
}

// CheckPlace refuses a key file whose place others could change: every directory
// above it belongs to root or to us and is not writable by others; a directory
// such as /tmp, where only owners may rename, may be above but not hold it. A
// symbolic link on the way must be root's or ours.
func CheckPlace(path string) error { return checkDirs(filepath.Dir(path), false) }

func checkDirs(dir string, stickyHolds bool) error {
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
		sticky := info.Mode()&fs.ModeSticky != 0 && (stickyHolds || at != resolved)
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

// ReadOwn reads a regular file of ours, of at most limit bytes, that nobody else
// can read. Its place is checked by CheckPlace.
func ReadOwn(path string, limit int64) ([]byte, error) { return read(path, limit, false) }

// ReadGiven reads a file that somebody else may have put there for us, such as
// an orchestrator: it, and the links that lead to it, are ours or root's, and its
// place is safe. Root may give it to a group of ours to read.
func ReadGiven(path string, limit int64) ([]byte, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	for range maxLinks {
		target, err := os.Readlink(path)
		if err != nil { // not a link, or not there, which reading tells
			if err := CheckPlace(path); err != nil {
				return nil, err
			}
			return read(path, limit, true)
		}
		if err := errors.Join(checkOwner(path), checkDirs(filepath.Dir(path), true)); err != nil {
			return nil, err
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = target
	}
	return nil, errUnsafe(path, "is behind too many symbolic links", "name the file itself")
}

// Mounted reports whether a kubelet has put a file where it is, into a volume of a
// Secret, a ConfigMap or projected tokens: beside it is the link, root's, by which a
// kubelet exchanges all files of a volume at once.
func Mounted(path string) bool {
	info, err := os.Lstat(filepath.Join(filepath.Dir(path), "..data"))
	if err != nil || info.Mode()&fs.ModeSymlink == 0 {
		return false
	}
	s, ok := info.Sys().(*syscall.Stat_t)
	return ok && s.Uid == 0
}

// read makes the checks on the open file, so that it cannot be exchanged in between.
func read(path string, limit int64, given bool) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.EMLINK) {
		return nil, errUnsafe(path, "is a symbolic link", "name the file itself")
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
	roots := given && ok && owner.Uid == 0
	others := fs.FileMode(0o077)
	if roots && ours(int(owner.Gid)) {
		others = 0o037
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, errUnsafe(path, "is not a regular file", "name a file")
	case !ok || int(owner.Uid) != os.Geteuid() && !roots:
		return nil, errUnsafe(path, "belongs to another user", "make the server's user its owner")
	case info.Mode().Perm()&others != 0:
		return nil, errUnsafe(path, fmt.Sprintf("has mode %04o, so that others may read or write it", info.Mode().Perm()), "chmod 0600 "+path)
	case info.Size() > limit:
		return nil, errUnsafe(path, fmt.Sprintf("is larger than %d KiB", limit>>10), "it is not a key file")
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil || int64(len(data)) > limit {
		return nil, errors.Join(fmt.Errorf("key file %s cannot be read", path), err)
	}
	return data, nil
}

// ours reports whether we are in a group.
func ours(group int) bool {
	groups, err := os.Getgroups()
	return group == os.Getegid() || err == nil && slices.Contains(groups, group)
}
