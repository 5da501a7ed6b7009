//go:build unix

package localsocket

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/plastron/plastron/internal/fault"
)

// mine reports whether this user owns the file.
func mine(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// trusted reports whether the file is the owner's or root's, who may do anything anyway.
func trusted(info fs.FileInfo, owner int) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && (st.Uid == 0 || int(st.Uid) == owner)
}

// ownersOnly sets the mode that a socket's file will have when it is made. Where
// that cannot be told beforehand, Listen's change comes a moment later.
func ownersOnly(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { _ = syscall.Fchmod(int(fd), 0o600) })
}

// maxLinks is how many symbolic links the kernel follows.
const maxLinks = 40

// CheckDir refuses a directory in which another user could put a socket of
// theirs: it, all above it and all links on the way must be root's or ours, and
// not for others to write, unless they keep users from each other's files as
// /tmp does (R113).
func CheckDir(dir string) error { return checkDir(dir, os.Geteuid()) }

// CheckDirOf is CheckDir in the place of the user who owns a file there.
func CheckDirOf(dir string, file fs.FileInfo) error {
	if st, ok := file.Sys().(*syscall.Stat_t); ok {
		return checkDir(dir, int(st.Uid))
	}
	return CheckDir(dir)
}

func checkDir(dir string, owner int) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	at, links := "/", 0
	rest := strings.Split(dir, "/")
	for {
		info, err := os.Lstat(at)
		if err != nil {
			return refused(at, "it cannot be looked at").Because(err)
		}
		link := info.Mode().Type() == fs.ModeSymlink
		if !trusted(info, owner) || !link && info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
			return fault.New(fault.Precondition, "socket_dir_unsafe", "other users could replace the socket, because %q is theirs or writable by them", at).
				Fix("choose a socket path in a directory of your own, or take the others' right to write away")
		}
		switch {
		case link:
			target, err := os.Readlink(at)
			if links++; err != nil || links > maxLinks {
				return refused(at, "the link cannot be followed").Because(err)
			}
			rest = append(strings.Split(target, "/"), rest...)
			if at = filepath.Dir(at); filepath.IsAbs(target) {
				at = "/"
			}
		case len(rest) == 0:
			return nil
		}
		if len(rest) > 0 {
			at, rest = filepath.Join(at, rest[0]), rest[1:]
		}
	}
}
