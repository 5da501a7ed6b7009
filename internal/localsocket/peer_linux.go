package localsocket

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Tells is whether the kernel is asked who opened a connection.
const Tells = true

// PeerOf says who opened a connection.
func PeerOf(c net.Conn) (p Peer) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return p
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return p
	}
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			p = Peer{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid, Known: true}
		}
	})
	return p
}
