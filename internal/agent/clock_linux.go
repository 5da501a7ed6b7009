package agent

import (
	"time"

	"golang.org/x/sys/unix"
)

// bootClock counts the time since the machine started, its sleep included. It
// cannot be set.
func bootClock() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // every kernel that has pidfds has it
	return time.Duration(ts.Nano())
}
