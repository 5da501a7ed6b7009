package machine

import (
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Uptime is how long the machine has been running, its sleep included. It cannot
// be set.
func Uptime() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // every kernel that has pidfds has it
	return time.Duration(ts.Nano())
}

// BootID tells this run of the kernel from all others; empty: not known.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
