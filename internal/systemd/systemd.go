// Package systemd speaks with the service manager that started this process: it
// takes the sockets that the manager holds for it (sd_listen_fds(3)), and tells
// it how far it is (sd_notify(3)). Without a manager every call does nothing.
//
// What must always hold: nothing is believed that was meant for another process;
// a manager that cannot be reached never stops what it manages.
package systemd

import (
	"context"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// firstFD is the number of the first descriptor that is passed.
const firstFD = 3

// patience is how long a manager may be too busy to read what it is told.
const patience = 5 * time.Second

// Socket returns the socket that the manager holds under a name (FileDescriptorName=
// in the socket unit), or nil. It can be taken once.
func Socket(name string) (*os.File, error) {
	if !meant("LISTEN_PID") {
		return nil, nil
	}
	count, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || count < 1 {
		return nil, nil
	}
	found := -1
	for i, n := range strings.Split(os.Getenv("LISTEN_FDNAMES"), ":") {
		switch {
		case n != name || i >= count:
		case found >= 0:
			return nil, fault.New(fault.Precondition, "socket_ambiguous", "the service manager passes more than one socket named %q", name).
				Fix("leave one ListenStream= in the socket unit")
		default:
			found = firstFD + i
		}
	}
	if found < 0 {
		return nil, nil
	}
	return take(found, name), nil
}

// meant reports whether a variable names this process.
func meant(variable string) bool { return os.Getenv(variable) == strconv.Itoa(os.Getpid()) }

// Notify tells the manager a state: Ready, Stopping or Alive.
func Notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"}) // "@" begins an abstract name in both
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err = conn.Write([]byte(state))
	return err
}

// What a manager can be told.
const (
	Ready    = "READY=1"
	Stopping = "STOPPING=1"
	Alive    = "WATCHDOG=1"
)

// Watchdog tells the manager, as often as it asks for, that the process is alive,
// until ctx is done. alive is called each time before; if it does not return, the
// manager does what it is told to do with a service that hangs. It returns at
// once if the manager does not ask.
func Watchdog(ctx context.Context, alive func()) {
	every := interval()
	if every == 0 {
		return
	}
	ticks := time.NewTicker(every)
	defer ticks.Stop()
	for {
		alive()
		_ = Notify(Alive) // what else could be done about it
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return
		}
	}
}

// interval is half of what the manager waits for.
func interval() time.Duration {
	us, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || us < 2 || us > int64(time.Hour/time.Microsecond)*24 || (os.Getenv("WATCHDOG_PID") != "" && !meant("WATCHDOG_PID")) {
		return 0
	}
	return time.Duration(us) * time.Microsecond / 2
}
