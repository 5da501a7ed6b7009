package agent

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// bootID tells this boot of the kernel from all others.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// isMemory reports whether what is written to a directory stays in memory, as far
// as the machine does not swap.
func isMemory(dir string) (bool, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return false, err
	}
	return s.Type == unix.TMPFS_MAGIC || s.Type == unix.RAMFS_MAGIC, nil
}
