package process_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/process"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary play the processes that call: PROCESS_TEST_ROLE
// names what it does instead of running tests.
func TestMain(m *testing.M) {
	if role := os.Getenv("PROCESS_TEST_ROLE"); role != "" {
		os.Exit(play(role))
	}
	os.Exit(m.Run())
}

// play acts on commands from stdin, one a line, and answers each with a line.
func play(role string) int {
	switch role {
	case "caller":
		return caller()
	case "inheritor":
		// Holds a socket that it was given as descriptor 3.
		in := bufio.NewReader(os.Stdin)
		f := os.NewFile(3, "inherited")
		fmt.Println("ready")
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return 0
			}
			if line == "write\n" {
				f.Write([]byte("x"))
			}
			fmt.Println("ok")
		}
	case "donor":
		return donor()
	case "pidreuse":
		return pidReuse()
	case "idle":
		fmt.Println("ready")
		io.Copy(io.Discard, os.Stdin)
		return 0
	}
	return 2
}

func caller() int {
	in := bufio.NewReader(os.Stdin)
	var conn *net.UnixConn
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return 0
		}
		verb, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch verb {
		case "connect":
			conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: arg, Net: "unix"})
		case "write":
			_, err = conn.Write([]byte("x"))
		case "sendfd":
			_, _, err = conn.WriteMsgUnix([]byte("x"), syscall.UnixRights(0, 1, 2), nil)
		case "name":
			err = os.WriteFile("/proc/self/comm", []byte("a) b\n(c"), 0)
		case "setgid":
			err = syscall.Setgid(12345)
		case "setuid":
			err = syscall.Setresuid(-1, 12345, -1)
		case "exec":
			// Keeps the socket over the exec.
			f, ferr := conn.File()
			if ferr == nil {
				unix.FcntlInt(f.Fd(), unix.F_SETFD, 0)
			}
			fmt.Println("ok")
			err = errors.Join(ferr, syscall.Exec(arg, []string{arg, "1000"}, os.Environ()))
		case "exit":
			return 0
		}
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println("ok")
	}
}

type child struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// start runs the test binary, or another program, in a role.
func start(t testing.TB, role string, change ...func(*exec.Cmd)) *child {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "PROCESS_TEST_ROLE="+role)
	cmd.Stderr = os.Stderr
	for _, c := range change {
		c(cmd)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	return c
}

// do sends a command and waits until it was done.
func (c *child) do(format string, args ...any) {
	c.t.Helper()
	fmt.Fprintf(c.in, format+"\n", args...)
	c.line("ok")
}

func (c *child) line(want string) {
	c.t.Helper()
	line, err := c.out.ReadString('\n')
	if err != nil || strings.TrimSpace(line) != want {
		c.t.Fatalf("child said %q (%v), want %q", line, err, want)
	}
}

func vias() map[string]process.Via {
	return map[string]process.Via{"so_peerpidfd": process.PeerPIDFD, "pidfd_open": process.PIDFDOpen}
}

// eachVia runs a test over both ways of finding the peer. The one that a kernel
// older than 6.5 lacks is fatal in CI.
func eachVia(t *testing.T, f func(t *testing.T, via process.Via)) {
	for name, via := range vias() {
		t.Run(name, func(t *testing.T) {
			if via == process.PeerPIDFD && !hasPeerPIDFD() {
				if os.Getenv("CI") == "true" {
					t.Fatal("this kernel has no SO_PEERPIDFD")
				}
				t.Skip("this kernel has no SO_PEERPIDFD")
			}
			f(t, via)
		})
	}
}

func hasPeerPIDFD() bool {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	fd, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err == nil {
		unix.Close(fd)
	}
	return err == nil
}

func listen(t testing.TB, via process.Via) (*process.Listener, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "plp")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := process.Listen(path, via)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	os.Chmod(path, 0o777)
	return l, path
}

func accept(t testing.TB, l *process.Listener) *process.Conn {
	t.Helper()
	l.SetDeadline(time.Now().Add(30 * time.Second))
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*process.Conn)
}

func wantReason(t testing.TB, err error, reason string) {
	t.Helper()
	if fault.ReasonOf(err) != reason || fault.KindOf(err) != fault.Denied {
		t.Fatalf("got %v (%s, %s), want denied with reason %s", err, fault.KindOf(err), fault.ReasonOf(err), reason)
	}
}

// R37: who calls is told by the socket, both ways, and looked at again.
func TestPeer(t *testing.T) {
	eachVia(t, func(t *testing.T, via process.Via) {
		l, path := listen(t, via)
		c := start(t, "caller")
		c.do("name") // W21
		c.do("connect %s", path)
		conn := accept(t, l)
		p, err := conn.Peer()
		if err != nil {
			t.Fatal(err)
		}
		if p.PID != c.cmd.Process.Pid || int(p.UID) != os.Getuid() || int(p.GID) != os.Getgid() {
			t.Errorf("peer is pid %d uid %d gid %d", p.PID, p.UID, p.GID)
		}
		c.do("write")
		if _, err := conn.Read(make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
		if err := conn.Check(); err != nil {
			t.Fatal(err)
		}
	})
}

// R38, W13, W14: the parent (this test) has not waited yet, so the caller is a zombie.
func TestExitIsNoticed(t *testing.T) {
	eachVia(t, func(t *testing.T, via process.Via) {
		l, path := listen(t, via)
		c := start(t, "caller")
		c.do("connect %s", path)
		conn := accept(t, l)
		p, err := conn.Peer()
		if err != nil {
			t.Fatal(err)
		}
		gone := make(chan struct{})
		go func() { p.Wait(); close(gone) }()
		select {
		case <-gone:
			t.Fatal("Wait returned although the process lives")
		default:
		}
		fmt.Fprintln(c.in, "exit")
		<-gone
		wantReason(t, conn.Check(), "peer_gone")
	})
}

func TestWaitEndsOnClose(t *testing.T) {
	l, path := listen(t, process.Auto)
	c := start(t, "caller")
	c.do("connect %s", path)
	conn := accept(t, l)
	p, _ := conn.Peer()
	gone := make(chan struct{})
	go func() { p.Wait(); close(gone) }()
	conn.Close()
	<-gone
	wantReason(t, conn.Check(), "peer_gone")
}

// R40, W15
func TestExecIsNoticed(t *testing.T) {
	eachVia(t, func(t *testing.T, via process.Via) {
		l, path := listen(t, via)
		c := start(t, "caller")
		c.do("connect %s", path)
		conn := accept(t, l)
		if err := conn.Check(); err != nil {
			t.Fatal(err)
		}
		c.do("exec /bin/sleep")
		err := eventually(t, func() error {
			err := conn.Check()
			if fault.ReasonOf(err) == "peer_gone" { // while exec ends the other threads, the process looks gone
				return nil
			}
			return err
		})
		wantReason(t, err, "peer_changed")
	})
}

// eventually calls f until it fails.
func eventually(t testing.TB, f func() error) error {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for {
		if err := f(); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("nothing was noticed")
		}
	}
}

// W19
func TestChangeOfUserIsNoticed(t *testing.T) {
	needRoot(t)
	eachVia(t, func(t *testing.T, via process.Via) {
		for verb, reason := range map[string]string{"setgid": "peer_changed", "setuid": "peer_setuid"} {
			l, path := listen(t, via)
			c := start(t, "caller")
			c.do("connect %s", path)
			conn := accept(t, l)
			c.do(verb)
			wantReason(t, conn.Check(), reason)
		}
	})
}

// W16: the connector lives on, another process writes.
func TestForeignSender(t *testing.T) {
	eachVia(t, func(t *testing.T, via process.Via) {
		l, path := listen(t, via)
		client, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		conn := accept(t, l)
		if err := conn.Check(); err != nil {
			t.Fatal(err)
		}
		f, err := client.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		other := start(t, "inheritor", func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{f} })
		other.line("ready")
		fmt.Fprintln(other.in, "write")
		if _, err := conn.Read(make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
		wantReason(t, conn.Check(), "peer_foreign_sender")
	})
}

// A connection that breaks ends reads with an error and no bytes, as callers of
// net.Conn rely on: end of file, and a reset because something was left unread.
func TestReadAfterTheEnd(t *testing.T) {
	for _, unread := range []bool{false, true} {
		l, path := listen(t, process.Auto)
		client, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		conn := accept(t, l)
		if unread {
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		client.Close()
		if n, err := conn.Read(make([]byte, 10)); n != 0 || err == nil || (err == io.EOF) == unread {
			t.Errorf("unread %v: Read() = %d, %v", unread, n, err)
		}
	}
}

// Descriptors that a caller passes do not pile up here (R50).
func TestPassedDescriptorsAreDropped(t *testing.T) {
	l, path := listen(t, process.Auto)
	c := start(t, "caller")
	c.do("connect %s", path)
	conn := accept(t, l)
	before := countFDs(t)
	for range 20 {
		c.do("sendfd")
		if _, err := conn.Read(make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Check(); err != nil {
		t.Error(err)
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

// RG73: the descriptor count is flat over connections, refused ones included.
func TestNoDescriptorLeak(t *testing.T) {
	eachVia(t, func(t *testing.T, via process.Via) {
		l, path := listen(t, via)
		before := countFDs(t)
		for range 200 {
			client, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			conn, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if err := conn.(*process.Conn).Check(); err != nil {
				t.Fatal(err)
			}
			client.Close()
			conn.Close()
		}
		for range 200 { // the fallback refuses a closed other end
			client, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			client.Close()
			conn, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
		}
		if after := countFDs(t); after != before {
			t.Errorf("%d descriptors open, %d before", after, before)
		}
	})
}

func countFDs(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// W18: a peer outside our pid namespace has no number here. The listener runs in
// a namespace of its own, the caller is this test.
func TestPeerOfAnotherPIDNamespace(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	c := start(t, "pidreuse", func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "PROCESS_TEST_DIR="+dir, "PROCESS_TEST_FOREIGN=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	})
	c.line("listening")
	conn, err := net.Dial("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c.line("peer_unresolvable")
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root")
		}
		t.Skip("this test needs root")
	}
}

// M11, R39: pid numbers are forced to repeat in a pid namespace of our own. See pidReuse.
func TestForcedPIDReuse(t *testing.T) {
	needRoot(t)
	trials := 300
	if s := os.Getenv("PLASTRON_PID_TRIALS"); s != "" { // the soak asks for 10,000
		trials, _ = strconv.Atoi(s)
	}
	eachVia(t, func(t *testing.T, via process.Via) {
		c := start(t, "pidreuse", func(cmd *exec.Cmd) {
			cmd.Env = append(cmd.Env, "PROCESS_TEST_DIR="+t.TempDir(),
				"PROCESS_TEST_VIA="+strconv.Itoa(int(via)), "PROCESS_TEST_TRIALS="+strconv.Itoa(trials))
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
		})
		c.line(fmt.Sprintf("reused %d wrong 0", trials))
	})
}

func TestPath(t *testing.T) {
	dir := t.TempDir()
	var progs process.Programs
	for _, name := range []string{"plain", "real (deleted)"} { // W23
		bin := filepath.Join(dir, name)
		copyFile(t, "/bin/sleep", bin)
		cmd := exec.Command(bin, "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		got, err := progs.Path(t.Context(), cmd.Process.Pid)
		if err != nil || got != bin {
			t.Errorf("Path() = %q, %v, want %q", got, err, bin)
		}
		// Replaced: another file now bears the name (W22).
		if err := os.Rename(copyFile(t, "/bin/sleep", bin+".new"), bin); err != nil {
			t.Fatal(err)
		}
		if got, err := progs.Path(t.Context(), cmd.Process.Pid); fault.ReasonOf(err) != "program_path_unproven" {
			t.Errorf("replaced: Path() = %q, %v", got, err)
		}
		os.Remove(bin)
		if got, err := progs.Path(t.Context(), cmd.Process.Pid); fault.ReasonOf(err) != "program_path_unproven" {
			t.Errorf("deleted: Path() = %q, %v", got, err)
		}
		// The hash is still that of what runs.
		if _, err := progs.SHA256(t.Context(), cmd.Process.Pid, 0); err != nil {
			t.Error(err)
		}
	}
}

// R45: a path in a mount namespace that the workload made itself names nothing.
func TestPathInForeignMountNamespace(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	evil, good := filepath.Join(dir, "evil"), filepath.Join(dir, "good")
	copyFile(t, "/bin/sleep", evil)
	copyFile(t, "/bin/sleep", good)
	cmd := exec.Command("unshare", "-m", "sh", "-c", `mount --bind "$0" "$1" && exec "$1" 1000`, evil, good)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	eventually(t, func() error {
		if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid)); link == good {
			return errors.New("runs")
		}
		return nil
	})
	var progs process.Programs
	if got, err := progs.Path(t.Context(), cmd.Process.Pid); fault.ReasonOf(err) != "program_path_unproven" {
		t.Errorf("Path() = %q, %v", got, err)
	}
}

// R62: a 1 GiB program that calls 1,000 times, often at once, is hashed once.
func TestHashedOnce(t *testing.T) {
	bin := copyFile(t, "/bin/sleep", filepath.Join(t.TempDir(), "big"))
	if err := os.Truncate(bin, 1<<30); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var progs process.Programs
	sums := make(chan string, 1000)
	for range 1000 {
		go func() {
			s, err := progs.SHA256(t.Context(), cmd.Process.Pid, 0)
			if err != nil {
				s = err.Error()
			}
			sums <- s
		}()
	}
	first := <-sums
	if len(first) != 64 {
		t.Fatalf("SHA256() = %q", first)
	}
	for range 999 {
		if s := <-sums; s != first {
			t.Fatalf("SHA256() = %q, before %q", s, first)
		}
	}
	if n := progs.Hashed(); n != 1 {
		t.Errorf("hashed %d times", n)
	}
	// W22: over the limit it is not read at all.
	if _, err := progs.SHA256(t.Context(), cmd.Process.Pid, 1<<30-1); fault.ReasonOf(err) != "program_too_large" {
		t.Errorf("over the limit: %v", err)
	}
}

func copyFile(t testing.TB, from, to string) string {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return to
}

// BenchmarkCheck is what a request pays three times.
func BenchmarkCheck(b *testing.B) {
	l, path := listen(b, process.Auto)
	c, err := net.Dial("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	conn := accept(b, l)
	for b.Loop() {
		if err := conn.Check(); err != nil {
			b.Fatal(err)
		}
	}
}
