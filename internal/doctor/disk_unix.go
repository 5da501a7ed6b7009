//go:build linux || darwin

package doctor

import "golang.org/x/sys/unix"

// room returns what is free on the file system under path, for who is not root.
func room(path string) (bytes, inodes uint64, counted bool, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, false, err
	}
	return uint64(st.Bavail) * uint64(st.Bsize), uint64(st.Ffree), st.Files > 0, nil
}

// writable says why a directory cannot be written to by this user, if it cannot.
func writable(path string) error { return unix.Access(path, unix.W_OK) }
