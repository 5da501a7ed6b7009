package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"syscall"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/reason"
	"golang.org/x/sys/unix"
)

// Limits on what is read from /proc. Sizes are in bytes.
const (
	maxStat   = 4 << 10
	maxStatus = 1 << 20 // 65,536 groups of up to 11 digits each fit (W24)
	maxGroups = 1024    // supplementary groups that are looked at
	maxFDs    = 4096    // descriptors of a peer that are looked through

	maxSpareFDs = 512 // of our own descriptors that are not for connections
)

// handle is a pidfd in the runtime's poller, so that waiting costs no thread.
type handle struct{ *os.File }

// Listen opens a unix socket whose connections know their process.
func Listen(path string, via Via) (*Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		// Accepted sockets inherit this, so that there is no moment in which bytes
		// arrive without the name of their writer (W16).
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
		return errors.Join(cerr, err)
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	return &Listener{UnixListener: l.(*net.UnixListener), Via: via}, nil
}

// Adopt listens on a socket that another process has made. It takes over f.
func Adopt(f *os.File, via Via) (*Listener, error) {
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	unixl, ok := l.(*net.UnixListener)
	var listens, passes int
	if ok {
		var raw syscall.RawConn
		if raw, err = unixl.SyscallConn(); err == nil {
			err = raw.Control(func(fd uintptr) {
				listens, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
				passes, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED)
			})
		}
	}
	if !ok || err != nil || listens == 0 || passes == 0 {
		l.Close()
		return nil, fault.New(fault.Precondition, "socket_refused",
			"the socket that was passed is not one that listens, by a path, and tells who writes").
			Fix("set ListenStream= to a path, and PassCredentials=yes, in the socket unit").Because(err)
	}
	return &Listener{UnixListener: unixl, Via: via}, nil
}

// peer finds the process that connected c. The steps, in this order:
//
//  1. the kernel's record of the connecting process: number, user, group;
//  2. a pidfd on it, by SO_PEERPIDFD (which cannot name another process) or by
//     its number;
//  3. what it is: start time, user, program;
//  4. by number only: proof that this process holds the other end of the
//     socket, since the number may have passed on between 1 and 2;
//  5. the pidfd still lives, so that all that was read belongs to it.
func peer(c *net.UnixConn, via Via) (*Process, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("reach the socket: %w", err)
	}
	var (
		cred  *unix.Ucred
		fd    = -1
		exact bool
		perr  error
	)
	err = raw.Control(func(s uintptr) {
		if cred, perr = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); perr != nil {
			return
		}
		if cred.Pid <= 0 {
			perr = reason.PeerUnresolvable // W18
			return
		}
		if via != PIDFDOpen {
			fd, perr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
			if perr == nil || via == PeerPIDFD || !errors.Is(perr, unix.ENOPROTOOPT) {
				exact = true
				return
			}
		}
		fd, perr = unix.PidfdOpen(int(cred.Pid), 0)
	})
	if err = errors.Join(err, perr); err != nil {
		return nil, openFault(err)
	}
	p, err := hold(int(cred.Pid), fd)
	if err != nil {
		return nil, err
	}
	p.UID, p.GID, p.exact = cred.Uid, cred.Gid, exact
	if !exact {
		if err := holdsPeer(raw, p.PID); err != nil {
			p.Close()
			return nil, err
		}
	}
	if err := p.Check(); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// Open holds the process with this number, whoever it is. Its user and group
// are those that it has now.
func Open(pid int) (*Process, error) {
	if pid <= 0 {
		return nil, reason.PeerGone
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, openFault(err)
	}
	p, err := hold(pid, fd)
	if err != nil {
		return nil, err
	}
	st, err := ReadStatus(pid)
	if err == nil {
		p.UID, p.GID = st.UID, st.GID
		err = p.Check()
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func openFault(err error) error {
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODATA):
		return reason.PeerGone // EINVAL: the number belongs to a thread, its process is gone
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENOPROTOOPT):
		return fault.New(fault.Unsupported, "pidfd_unsupported", "the kernel cannot hold a process by descriptor").
			Fix("use Linux 5.3 or newer, and allow pidfd_open in the agent's seccomp filter").Because(err)
	case fault.KindOf(err) != fault.Internal:
		return err
	}
	return fmt.Errorf("hold the calling process: %w", err)
}

// hold takes over fd, a pidfd on pid.
func hold(pid, fd int) (*Process, error) {
	// The runtime polls a descriptor only if it does not block.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("poll a pidfd: %w", err)
	}
	p := &Process{PID: pid, handle: &handle{os.NewFile(uintptr(fd), "pidfd")}}
	st, err := readStat(pid)
	if err != nil {
		p.Close()
		return nil, err
	}
	p.start, p.exe = st.start, readExeID(pid)
	return p, nil
}

// Check returns nil as long as the process lives and is what it was: same
// start, user, group and program. A zombie does not live (R38), nor does a
// process whose first thread is gone (W20).
func (p *Process) Check() error {
	who, known := p.credentials()
	exe := readExeID(p.PID)
	if !known || !exe.Known { // the program of a process whose first thread is gone is not told
		st, err := readStat(p.PID)
		switch {
		case err != nil:
			return err
		case st.state == 'Z', st.state == 'X', st.state == 'x':
			return reason.PeerGone
		case st.start != p.start:
			return reason.PeerGone // the number has passed on
		}
	}
	if !known {
		var err error
		if who, err = ReadStatus(p.PID); err != nil {
			return err
		}
	}
	// Judged only after the pidfd has shown that all of it is this process's.
	if err := p.alive(); err != nil {
		return err
	}
	switch {
	case who.setuid:
		return errSetuid // W19
	case who.UID != p.UID, who.GID != p.GID, exe != p.exe:
		return errChanged // W19, R40
	}
	return nil
}

// credentials asks the pidfd itself, where the kernel can tell (Linux 6.13), which
// costs a tenth of reading /proc.
func (p *Process) credentials() (Status, bool) {
	if !p.exact {
		return Status{}, false
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_CREDS}
	var err error
	if cerr := p.control(func(fd uintptr) { err = unix.IoctlPidfdInfo(int(fd), &info) }); cerr != nil {
		return Status{}, false
	}
	return Status{
		UID: info.Euid, GID: info.Egid,
		setuid: info.Ruid != info.Euid || info.Euid != info.Suid || info.Rgid != info.Egid || info.Egid != info.Sgid,
	}, err == nil && info.Mask&unix.PIDFD_INFO_CREDS != 0 && int(info.Pid) == p.PID
}

func (p *Process) alive() error {
	exited := true // also when the handle is closed
	err := p.control(func(fd uintptr) { exited = readable(fd) })
	if err != nil || exited {
		return reason.PeerGone
	}
	return nil
}

func (p *Process) control(f func(fd uintptr)) error {
	raw, err := p.handle.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(f)
}

// Wait returns when the process has exited or Close was called.
func (p *Process) Wait() {
	raw, err := p.handle.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(readable) // fails only when closed
}

// Close lets go of the process.
func (p *Process) Close() error { return p.handle.Close() }

// readable reports whether fd is: a pidfd is so once its process has exited.
func readable(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		return err != nil || n > 0
	}
}

// Read reads like net.Conn and notices bytes that a process other than the
// peer wrote (W16). The control buffer holds the writer's name and nothing
// else, so descriptors that a peer passes are dropped by the kernel.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	var oob [32]byte
	n, oobn, _, _, err := c.socket.ReadMsgUnix(b, oob[:unix.CmsgSpace(unix.SizeofUcred)])
	if errors.Is(err, io.EOF) { // it comes wrapped here
		return 0, io.EOF
	}
	if err != nil {
		return 0, err // n is -1 then
	}
	if c.peer != nil {
		pid, ok := writer(oob[:oobn])
		if !ok || pid != c.peer.PID {
			c.foreign.Store(true)
		}
	}
	return n, nil
}

func writer(oob []byte) (pid int, ok bool) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) != 1 {
		return 0, false
	}
	cred, err := unix.ParseUnixCredentials(&msgs[0])
	if err != nil {
		return 0, false
	}
	return int(cred.Pid), true
}

// Room returns how many connections the process has descriptors for, two each,
// when a part is left for everything else; 0: it cannot be told.
func Room() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	most := int(min(limit.Cur, 1<<30))
	return (most - min(most/4, maxSpareFDs)) / 2
}

type stat struct {
	state byte
	start uint64
}

// readStat reads /proc/PID/stat.
func readStat(pid int) (stat, error) {
	b, err := readProc(pid, "stat", maxStat)
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// parseStat reads the fields after the command name. The name is chosen by the
// process and may hold anything but NUL, parentheses and newlines included, so
// the last ')' ends it (W21).
func parseStat(b []byte) (stat, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return stat{}, errors.New("/proc/PID/stat holds no command name")
	}
	// Field 3 is the state, field 22 the start time (proc(5)).
	f := bytes.Fields(b[i+1:])
	if len(f) < 20 || len(f[0]) != 1 {
		return stat{}, errors.New("/proc/PID/stat is cut short")
	}
	start, err := strconv.ParseUint(string(f[19]), 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("start time in /proc/PID/stat: %w", err)
	}
	return stat{state: f[0][0], start: start}, nil
}

// Started returns when a process was started, in ticks of the kernel's clock. No
// two processes have number and start in common.
func Started(pid int) (uint64, error) {
	st, err := readStat(pid)
	return st.start, err
}

// Status is what the kernel says about a process's user and groups.
type Status struct {
	UID, GID uint32 // effective
	Groups   []uint32
	More     bool // Groups is not all of them
	setuid   bool // real, effective and saved are not all one
}

// ReadStatus reads the user and groups of a process. At most 1024
// supplementary groups are returned.
func ReadStatus(pid int) (Status, error) {
	b, err := readProc(pid, "status", maxStatus)
	if err != nil {
		return Status{}, err
	}
	return parseStatus(b)
}

func parseStatus(b []byte) (Status, error) {
	var (
		st   Status
		seen int
	)
	for line := range bytes.Lines(b) {
		if seen == 3 {
			break
		}
		// The command name stands in the first line; its newlines are escaped there.
		key, rest, _ := bytes.Cut(line, []byte(":\t"))
		switch string(key) {
		case "Uid", "Gid":
			ids, _, err := parseIDs(rest, 4)
			if err != nil || len(ids) != 4 {
				return Status{}, fmt.Errorf("/proc/PID/status: bad %s line", key)
			}
			st.setuid = st.setuid || ids[0] != ids[1] || ids[1] != ids[2]
			if string(key) == "Uid" {
				st.UID = ids[1]
			} else {
				st.GID = ids[1]
			}
			seen++
		case "Groups":
			var err error
			if st.Groups, st.More, err = parseIDs(rest, maxGroups); err != nil {
				return Status{}, err
			}
			seen++
		}
	}
	if seen != 3 {
		return Status{}, errors.New("/proc/PID/status lacks Uid, Gid or Groups")
	}
	return st, nil
}

func parseIDs(b []byte, limit int) (ids []uint32, more bool, err error) {
	for f := range bytes.FieldsSeq(b) {
		if len(ids) == limit {
			return ids, true, nil
		}
		n, err := strconv.ParseUint(string(f), 10, 32)
		if err != nil {
			return nil, false, fmt.Errorf("/proc/PID/status: %w", err)
		}
		ids = append(ids, uint32(n))
	}
	return ids, false, nil
}

// readProc reads a file of /proc/PID by bare system calls: os.File would ask the
// poller first, and the calls of one request add up.
func readProc(pid int, name string, limit int) ([]byte, error) {
	b, err := readFile("/proc/"+strconv.Itoa(pid)+"/"+name, limit)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return nil, reason.PeerGone
	}
	if err != nil {
		return nil, fmt.Errorf("read what the kernel says of process %d: %w", pid, err)
	}
	return b, nil
}

// readFile reads at most limit bytes of a file that does not block.
func readFile(path string, limit int) ([]byte, error) {
	fd, err := again(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 2<<10) // holds what the kernel says of almost every process
	for len(b) < limit {
		b = slices.Grow(b, 1)
		n, err := again(func() (int, error) { return unix.Read(fd, b[len(b):min(cap(b), limit)]) })
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		b = b[:len(b)+n]
	}
	return b, nil
}

// again repeats a system call that a signal interrupted.
func again(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}

// readExeID names the program of a process without asking the file system it
// lies on, which may hang (W22).
func readExeID(pid int) exeID {
	var x unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, exePath(pid), unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &x)
	if err != nil {
		return exeID{}
	}
	return exeID{Known: true, Dev: unix.Mkdev(x.Dev_major, x.Dev_minor), Ino: x.Ino}
}

func exePath(pid int) string { return "/proc/" + strconv.Itoa(pid) + "/exe" }
