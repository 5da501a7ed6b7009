package process_test

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/process"
	"golang.org/x/sys/unix"
)

// pidReuse plays the agent, the attacker and the victim in a pid namespace of
// its own, where it can name the number of the next process. In each trial the
// attacker connects, leaves its socket to a helper and exits; then a victim is
// started under the attacker's number. Half of the trials accept the connection
// before the victim starts and ask afterwards, the other half accept afterwards.
// Any answer but a refusal is wrong.
func pidReuse() int {
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		fmt.Println("mount /proc:", err)
		return 1
	}
	via, _ := strconv.Atoi(os.Getenv("PROCESS_TEST_VIA"))
	path := filepath.Join(os.Getenv("PROCESS_TEST_DIR"), "s")
	l, err := process.Listen(path, process.Via(via))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if os.Getenv("PROCESS_TEST_FOREIGN") != "" {
		fmt.Println("listening")
		c, err := l.Accept()
		if err != nil {
			fmt.Println(err)
			return 1
		}
		_, err = c.(*process.Conn).Peer()
		fmt.Println(fault.ReasonOf(err))
		return 0
	}
	trials, _ := strconv.Atoi(os.Getenv("PROCESS_TEST_TRIALS"))
	wrong := 0
	for i := range trials {
		bad, err := pidReuseTrial(l, path, i%2 == 0)
		for errors.Is(err, errTaken) {
			bad, err = pidReuseTrial(l, path, i%2 == 0)
		}
		if err != nil {
			fmt.Println(err)
			return 1
		}
		if bad {
			wrong++
		}
	}
	fmt.Printf("reused %d wrong %d\n", trials, wrong)
	return 0
}

func pidReuseTrial(l *process.Listener, path string, acceptFirst bool) (wrong bool, err error) {
	// The attacker's number does not matter; its socket stays open here, as it
	// would with a helper that it gave it to.
	attacker, keep, err := connectAs(path)
	if err != nil {
		return false, err
	}
	defer keep.Close()
	var conn net.Conn
	if acceptFirst {
		if conn, err = l.Accept(); err != nil {
			return false, err
		}
		defer conn.Close()
		if _, perr := conn.(*process.Conn).Peer(); perr != nil {
			return false, fmt.Errorf("a living peer was refused: %w", perr)
		}
	}
	pid := attacker.Process.Pid
	attacker.Process.Kill()
	attacker.Wait()
	victim, err := startAs(pid)
	if err != nil {
		if !acceptFirst { // the next trial begins with nobody waiting
			if conn, err := l.Accept(); err == nil {
				conn.Close()
			}
		}
		return false, err
	}
	defer func() { victim.Process.Kill(); victim.Wait() }()
	if !acceptFirst {
		if conn, err = l.Accept(); err != nil {
			return false, err
		}
		defer conn.Close()
	}
	return conn.(*process.Conn).Check() == nil, nil
}

// connectAs starts a process that connects to path and hands its socket back.
func connectAs(path string) (*exec.Cmd, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs := os.NewFile(uintptr(fds[1]), "theirs")
	defer unix.Close(fds[0])
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "PROCESS_TEST_ROLE=donor", "PROCESS_TEST_PATH="+path)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return nil, nil, err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(fds[0], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, nil, fmt.Errorf("no socket from the donor: %w", err)
	}
	got, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, nil, err
	}
	return cmd, os.NewFile(uintptr(got[0]), "kept"), nil
}

// donor connects, gives its socket away on descriptor 3 and stays.
func donor() int {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: os.Getenv("PROCESS_TEST_PATH"), Net: "unix"})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	f, err := c.File()
	if err != nil {
		return 1
	}
	if err := unix.Sendmsg(3, []byte("x"), unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
		return 1
	}
	select {}
}

// errTaken says that a number cannot be had again: a thread of this process, which
// the runtime has started meanwhile, has it and stays.
var errTaken = errors.New("a thread of ours has the number")

// startAs starts a process under a given number.
func startAs(pid int) (*exec.Cmd, error) {
	for range 100 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", strconv.AppendInt(nil, int64(pid-1), 10), 0); err != nil {
			return nil, err
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "PROCESS_TEST_ROLE=idle")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		if err != nil {
			return nil, err
		}
		in, err := cmd.StdinPipe()
		if err != nil {
			return nil, err
		}
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			return nil, err
		}
		if cmd.Process.Pid == pid {
			return cmd, nil
		}
		in.Close() // somebody took the number first
		cmd.Wait()
		if _, err := os.Stat(fmt.Sprint("/proc/self/task/", pid)); err == nil {
			return nil, errTaken
		}
	}
	return nil, fmt.Errorf("number %d could not be had again", pid)
}
