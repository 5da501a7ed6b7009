package serverapi

import (
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// localPeer says who opened the admin socket, for the audit trail: the kernel's
// word on user, group and process at the time of the connection.
func localPeer(c net.Conn) string {
	if h, ok := c.(*held); ok {
		c = h.Conn
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return "local"
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return "local"
	}
	name := "local"
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			name = fmt.Sprintf("local uid=%d gid=%d pid=%d", cred.Uid, cred.Gid, cred.Pid)
		}
	})
	return name
}

// setUserTimeout ends a connection whose peer acknowledges nothing.
func setUserTimeout(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(tcpUserTimeout.Milliseconds()))
	})
}
