package workloadapi_test

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

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

// actor plays a process that calls, honestly or not: it takes commands from
// stdin, one a line, and answers each with a line.
func actor() int {
	in := bufio.NewReader(os.Stdin)
	var r *raw
	if fd, err := strconv.Atoi(os.Getenv("WORKLOADAPI_TEST_FD")); err == nil { // inherited
		next, _ := strconv.Atoi(os.Getenv("WORKLOADAPI_TEST_NEXT"))
		if r, err = adopt(fd, next); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	fmt.Println("ok")
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return 0
		}
		said := "ok"
		verb, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch verb {
		case "connect":
			var conn net.Conn
			if conn, err = net.Dial("unix", arg); err == nil {
				r, err = open(conn, 1<<16)
			}
			if err == nil {
				err = r.greeted()
			}
		case "send":
			err = r.call("FetchX509SVID")
		case "read":
			var m *workload.X509SVIDResponse
			if m, said, err = r.answer(); err == nil && m != nil {
				said = "got"
				for _, s := range m.GetSvids() {
					said += " " + s.GetSpiffeId()
				}
			}
		case "setuid":
			id, _ := strconv.Atoi(arg)
			err = errors.Join(syscall.Setresgid(id, id, id), syscall.Setresuid(id, id, id))
		case "exec", "inherit": // go on as another program, or in a child
			var f *os.File
			if f, err = r.Conn.(*net.UnixConn).File(); err != nil {
				break
			}
			env := append(os.Environ(), "WORKLOADAPI_TEST_NEXT="+strconv.Itoa(int(r.next)))
			if verb == "exec" {
				unix.FcntlInt(f.Fd(), unix.F_SETFD, 0)
				err = syscall.Exec(arg, []string{arg}, append(env, "WORKLOADAPI_TEST_FD="+strconv.Itoa(int(f.Fd()))))
				break
			}
			id, _ := strconv.Atoi(arg)
			child := exec.Command("/proc/self/exe")
			child.Stdin, child.Stdout, child.ExtraFiles = os.Stdin, os.Stdout, []*os.File{f}
			child.Env = append(env, "WORKLOADAPI_TEST_FD=3")
			child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(id), Gid: uint32(id), NoSetGroups: id == os.Getuid()}}
			if err = child.Start(); err == nil {
				child.Wait() // it takes the commands from here on
				return 0
			}
		case "pass": // the connection, to whom the test put at the other end of descriptor 3
			var f *os.File
			if f, err = r.Conn.(*net.UnixConn).File(); err == nil {
				err = unix.Sendmsg(3, []byte{byte(r.next)}, unix.UnixRights(int(f.Fd())), nil, 0)
			}
		case "take":
			r, err = take()
		case "bind":
			from, to, _ := strings.Cut(arg, " ")
			err = unix.Mount(from, to, "", unix.MS_BIND, "")
		case "calls": // one after the other, every tenth on a new connection; says how many failed
			var n int
			var path string
			if _, err = fmt.Sscan(arg, &n, &path); err == nil {
				said = strconv.Itoa(calling(n, path))
			}
		case "flood": // for ever
			flood(arg)
		case "exit":
			return 0
		}
		if err != nil {
			said = "failed: " + err.Error()
		}
		fmt.Println(said)
	}
}

// calling makes n calls and returns how many got no message and no answer of the
// kind that a caller without an identity gets. It has one connection at a time, so
// that a failure does not use up what its user may have open.
func calling(n int, path string) (failed int) {
	var r *raw
	leave := func() {}
	defer func() { leave() }()
	for i := range n {
		if i%10 == 0 || r == nil {
			leave()
			conn, err := net.Dial("unix", path)
			if err == nil {
				leave = func() { conn.Close() }
				r, err = open(conn, 1<<16)
			}
			if err != nil {
				failed++
				continue
			}
		}
		err := r.call("FetchX509SVID")
		if err == nil {
			var m *workload.X509SVIDResponse
			var text string
			if m, text, err = r.answer(); err == nil && m == nil && !strings.HasPrefix(text, "no identity issued") {
				err = errors.New(text)
			}
		}
		if err != nil {
			failed++
			r = nil
			continue
		}
		if r.WriteRSTStream(r.next-2, http2.ErrCodeCancel) != nil {
			r = nil
		}
	}
	return failed
}

// flood opens connections and streams as fast as it can and closes none by itself
// but to make room.
func flood(path string) {
	var held []net.Conn
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			held = append(held, conn)
			if r, err := open(conn, 0); err == nil {
				for range 50 {
					if r.call("FetchX509SVID") != nil {
						break
					}
				}
			}
		}
		if len(held) > 1000 {
			for _, c := range held[:500] {
				c.Close()
			}
			held = append(held[:0], held[500:]...)
		}
	}
}

func take() (*raw, error) {
	payload, oob := make([]byte, 1), make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(3, payload, oob, 0)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	return adopt(fds[0], int(payload[0]))
}

func adopt(fd, next int) (*raw, error) {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return &raw{Conn: conn, Framer: http2.NewFramer(conn, conn), next: uint32(next)}, nil
}

// child is an actor as the test sees it.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// start runs a program as an actor.
func start(t *testing.T, program string, uid uint32, change ...func(*exec.Cmd)) *child {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), "WORKLOADAPI_TEST_ROLE=actor")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
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
	t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	c := &child{t: t, cmd: cmd, in: in, out: bufio.NewReader(out)}
	c.hears("ok")
	return c
}

// do sends a command and wants it to work.
func (c *child) do(format string, args ...any) {
	c.t.Helper()
	fmt.Fprintf(c.in, format+"\n", args...)
	c.hears("ok")
}

// hears wants a line that begins so.
func (c *child) hears(want string) {
	c.t.Helper()
	line, err := c.out.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, want) {
		c.t.Fatalf("the process said %q (%v), want %q", line, err, want)
	}
}

// asks makes one call and returns what comes of it.
func (c *child) asks() string {
	c.t.Helper()
	fmt.Fprintln(c.in, "send")
	if line, _ := c.out.ReadString('\n'); line != "ok\n" {
		return strings.TrimSpace(line)
	}
	return c.reads()
}

func (c *child) reads() string {
	c.t.Helper()
	fmt.Fprintln(c.in, "read")
	line, _ := c.out.ReadString('\n')
	return strings.TrimSpace(line)
}

// copyOfSelf is this program where every user can run it.
func copyOfSelf(t *testing.T, dir, name string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}
