package postgres

import (
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// userTimeout makes the kernel give a connection up when the other end is silent.
func userTimeout(network, _ string, raw syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var err error
	if e := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(tcpTimeout.Milliseconds()))
	}); e != nil {
		return e
	}
	return err
}
