package process

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Right is a capability that looking at other users' processes takes.
type Right uint

// The rights.
const (
	SeePrograms  Right = 1 << unix.CAP_SYS_PTRACE      // which program a process runs
	ReadPrograms Right = 1 << unix.CAP_DAC_READ_SEARCH // the program's file, wherever it is
)

// Has reports whether this process has all of some rights.
func Has(want Right) bool {
	data, err := capabilities()
	return err == nil && Right(data[0].Effective)&want == want
}

// KeepOnly gives up every capability but some rights, for all threads and for
// good. Where /proc or the kernel shows other users' processes only to who has
// SeePrograms, that is kept in any case. A program that is built with cgo cannot
// (errors.ErrUnsupported).
func KeepOnly(keep Right) error {
	if hidesProcesses() || !namesPeers() {
		keep |= SeePrograms
	}
	data, err := capabilities()
	if err != nil {
		return err
	}
	for i := range data {
		mask := uint32(uint64(keep) >> (32 * i))
		data[i].Effective &= mask
		data[i].Permitted &= mask
		data[i].Inheritable &= mask
	}
	// No program is started, and none that were could have more.
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno == syscall.ENOTSUP {
		return fmt.Errorf("this program was built with cgo, and then it cannot: %w", errno)
	} else if errno != 0 {
		return fmt.Errorf("give up what programs add: %w", errno)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&header)
	pin.Pin(&data[0])
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0); errno != 0 {
		return fmt.Errorf("give up capabilities: %w", errno)
	}
	return nil
}

func capabilities() (data [2]unix.CapUserData, err error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&header, &data[0]); err != nil {
		return data, fmt.Errorf("read the capabilities: %w", err)
	}
	return data, nil
}

// namesPeers reports whether the kernel has SO_PEERPIDFD. Without, who calls is
// proved by its descriptors, which take SeePrograms (holdsPeer).
func namesPeers() bool {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	fd, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return !errors.Is(err, unix.ENOPROTOOPT)
	}
	unix.Close(fd)
	return true
}

// hidesProcesses reports whether /proc is mounted with hidepid.
func hidesProcesses() bool {
	text, err := os.ReadFile("/proc/self/mountinfo")
	return err != nil || hidden(text)
}

// hidden looks for the option in what mountinfo says of /proc (proc(5)).
func hidden(mountinfo []byte) bool {
	lines := bufio.NewScanner(bytes.NewReader(mountinfo))
	hides := false
	for lines.Scan() { // of several on one place the last counts
		mount, options, _ := strings.Cut(lines.Text(), " - ")
		if f := strings.Fields(mount); len(f) < 5 || f[4] != "/proc" {
			continue
		}
		_, value, found := strings.Cut(options, "hidepid=")
		value, _, _ = strings.Cut(value, ",")
		hides = found && value != "0" && value != "off"
	}
	return hides || lines.Err() != nil
}
