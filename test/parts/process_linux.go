package parts

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// process is a program that was started.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// unprivileged returns the user for programs that refuse to be root, nil if the
// test is not root itself.
func unprivileged() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("nobody")
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// privateDir makes a directory with a short path, for that user.
func privateDir() (string, error) {
	dir, err := os.MkdirTemp("", "p")
	if err != nil {
		return "", err
	}
	if c, err := unprivileged(); err != nil {
		return "", err
	} else if c != nil {
		return dir, os.Chown(dir, int(c.Uid), int(c.Gid))
	}
	return dir, nil
}

// command prepares a program that writes to a log and runs in dir, as that user.
func command(dir, log, path string, args ...string) (*exec.Cmd, error) {
	credential, err := unprivileged()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: credential}
	if cmd.Stdout, err = os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644); err != nil {
		return nil, err
	}
	cmd.Stderr = cmd.Stdout
	return cmd, nil
}

// start starts a program that ends when the test does, however that ends.
func start(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the signal comes when the thread ends that started it
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
			close(p.done)
		}
	}()
	return p, <-started
}

// stop sends a signal and waits for the end; what does not end is killed.
func (p *process) stop(signal os.Signal) error {
	p.cmd.Process.Signal(signal)
	select {
	case <-p.done:
		return nil
	case <-time.After(60 * time.Second):
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
		return fmt.Errorf("%s did not end", p.cmd.Path)
	}
}

// freeze stops a process where it stands. It returns when all threads stand: the
// signal alone lets them go on until one of them has taken it.
func freeze(pid int) error {
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	for begin := time.Now(); !stands(pid); <-time.After(time.Millisecond) {
		if time.Since(begin) > 60*time.Second {
			return fmt.Errorf("process %d goes on after SIGSTOP", pid)
		}
	}
	return nil
}

// stands reports whether no thread of a process runs, or will before SIGCONT.
func stands(pid int) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, path := range threads {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// The state follows the name, which may hold anything.
		_, rest, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
		if len(rest) == 0 || bytes.IndexByte([]byte("TtZX"), rest[0]) < 0 {
			return false
		}
	}
	return true
}
