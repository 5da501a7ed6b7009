package process

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"github.com/plastron/plastron/internal/reason"
	"golang.org/x/sys/unix"
)

// holdsPeer proves that process pid holds the other end of the socket. Where
// the kernel does not let us look (its descriptors, or the sockets of another
// network namespace) it proves only that the other end is not closed: then a
// process that connected, gave its socket away and exited before we looked
// could be taken for the next holder of its number. SO_PEERPIDFD has no such gap.
func holdsPeer(raw syscall.RawConn, pid int) error {
	var (
		st      unix.Stat_t
		hangup  bool
		statErr error
	)
	err := raw.Control(func(s uintptr) {
		statErr = unix.Fstat(int(s), &st)
		fds := []unix.PollFd{{Fd: int32(s), Events: unix.POLLRDHUP}}
		n, perr := unix.Poll(fds, 0)
		hangup = perr == nil && n > 0
	})
	if err = errors.Join(err, statErr); err != nil {
		return fmt.Errorf("look at the socket: %w", err)
	}
	if hangup {
		return reason.PeerGone
	}
	ino, ok := peerInode(uint32(st.Ino))
	if !ok {
		return nil
	}
	return holdsSocket(pid, ino)
}

// holdsSocket looks for the socket among the descriptors of process pid.
func holdsSocket(pid int, ino uint32) error {
	dir, err := os.Open("/proc/" + strconv.Itoa(pid) + "/fd")
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return nil
		}
		return reason.PeerGone
	}
	defer dir.Close()
	want := "socket:[" + strconv.FormatUint(uint64(ino), 10) + "]"
	for seen := 0; seen < maxFDs; {
		names, err := dir.Readdirnames(256)
		for _, name := range names {
			var b [64]byte
			n, err := unix.Readlinkat(int(dir.Fd()), name, b[:])
			if err == nil && string(b[:n]) == want {
				return nil
			}
		}
		if err != nil {
			break
		}
		seen += len(names)
	}
	return errForeignSender
}

// Numbers of sock_diag(7) and its unix_diag part.
const (
	sockDiagByFamily = 20
	udiagShowPeer    = 0x4
	unixDiagPeer     = 2
	sizeofUdiagReq   = 24
	sizeofUdiagMsg   = 16
)

// peerInode asks the kernel which socket the accepted socket ino is connected to.
func peerInode(ino uint32) (uint32, bool) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return 0, false
	}
	defer unix.Close(fd)
	req := make([]byte, unix.SizeofNlMsghdr+sizeofUdiagReq)
	ne := binary.NativeEndian
	ne.PutUint32(req[0:], uint32(len(req)))
	ne.PutUint16(req[4:], sockDiagByFamily)
	ne.PutUint16(req[6:], unix.NLM_F_REQUEST)
	r := req[unix.SizeofNlMsghdr:]
	r[0] = unix.AF_UNIX
	ne.PutUint32(r[4:], ^uint32(0)) // any state
	ne.PutUint32(r[8:], ino)
	ne.PutUint32(r[12:], udiagShowPeer)
	ne.PutUint64(r[16:], ^uint64(0)) // no cookie
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, false
	}
	// The answer to a request for one socket is ready when sendto returns.
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT)
	if err != nil {
		return 0, false
	}
	return parsePeer(buf[:n])
}

func parsePeer(b []byte) (uint32, bool) {
	ne := binary.NativeEndian
	if len(b) < unix.SizeofNlMsghdr+sizeofUdiagMsg || ne.Uint16(b[4:]) != sockDiagByFamily {
		return 0, false // also an error answer: a socket of another network namespace
	}
	b = b[unix.SizeofNlMsghdr+sizeofUdiagMsg : min(len(b), int(ne.Uint32(b)))]
	for len(b) >= 4 {
		size, kind := int(ne.Uint16(b)), ne.Uint16(b[2:])
		if size < 4 || size > len(b) {
			break
		}
		if kind == unixDiagPeer && size == 8 {
			return ne.Uint32(b[4:]), true
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return 0, false
}
