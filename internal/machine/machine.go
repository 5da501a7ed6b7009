// Package machine is what a process learns of the machine that it runs on: how
// long that has been running, which boot this is, which directory a path names,
// and whether another process has locked a file. What follows from it is decided
// by the callers.
package machine

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/plastron/plastron/internal/fault"
)

// Lock is a file that this process holds alone. The lock is the kernel's and
// ends with the process; the file stays, with the last holder's pid.
type Lock struct{ f *os.File }

// LockFile takes a file for this process, and makes it (0600) if it is missing.
// It fails with fault.Precondition, "locked", if another process has it.
func LockFile(path string) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	held, err := lock(f)
	if err != nil || held {
		b, _ := io.ReadAll(io.LimitReader(f, 20))
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		owner := "another process"
		if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			owner = fmt.Sprintf("process %d", pid)
		}
		return nil, fault.New(fault.Precondition, "locked", "%s is held by %s", path, owner)
	}
	// On a full disk the lock holds all the same; only its owner is not named.
	if f.Truncate(0) == nil {
		f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return &Lock{f}, nil
}

// Close gives the lock back.
func (l *Lock) Close() error { return l.f.Close() }
