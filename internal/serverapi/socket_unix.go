//go:build unix

package serverapi

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/plastron/plastron/internal/fault"
)

// mine reports whether this user owns the file.
func mine(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// checkParents refuses a path on which another user could put a socket of
// theirs: every directory above it must be root's or ours, and not for others to
// write, unless it keeps them from each other's files as /tmp does (R113).
func checkParents(path string) error {
	unsafe := func(dir string) error {
		return fault.New(fault.Precondition, "socket_dir_unsafe", "other users could replace the socket, because %q is theirs or writable by them", dir).
			Fix("choose a socket path in a directory of your own")
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return err
	}
	// A link of another user's leads wherever that user wants, now or later.
	for link := dir; link != filepath.Dir(link); link = filepath.Dir(link) {
		info, err := os.Lstat(link)
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); info.Mode().Type() == fs.ModeSymlink && (!ok || st.Uid != 0 && !mine(info)) {
			return unsafe(link)
		}
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return err
	}
	for {
		info, err := os.Lstat(dir)
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || st.Uid != 0 && !mine(info) || info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
			return unsafe(dir)
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
		dir = filepath.Dir(dir)
	}
}
