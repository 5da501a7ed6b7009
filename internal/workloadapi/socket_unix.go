//go:build unix

package workloadapi

import (
	"os"
	"syscall"
)

// ours reports whether a file belongs to us or to root, who may do anything anyway.
func ours(info os.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && (int(st.Uid) == os.Geteuid() || st.Uid == 0)
}
