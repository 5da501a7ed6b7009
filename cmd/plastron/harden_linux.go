package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// harden is called before a server or an agent opens anything: new files are for
// their owner only, and the keys in memory go into no core file and to no other
// process of this user (R48, R114). It is not for commands that start another
// program, which would inherit it.
func harden() error {
	unix.Umask(0o077)
	err := errors.Join(
		unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}),
		unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0),
	)
	if err != nil {
		return fmt.Errorf("keep memory out of core files: %w", err)
	}
	return nil
}
