//go:build !linux && !windows

package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// harden is called before a server or an agent opens anything: new files are for
// their owner only, and the keys in memory go into no core file (R48, R114).
func harden() error {
	unix.Umask(0o077)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("keep memory out of core files: %w", err)
	}
	return nil
}
