package parts

import (
	"bytes"
	"os/exec"
	"sync"
	"syscall"
)

// Program is one of our own programs under test. It ends when the test does,
// however that ends.
type Program struct {
	process *process

	mu  sync.Mutex
	out bytes.Buffer
}

// StartProgram starts a command in a process group of its own.
func StartProgram(cmd *exec.Cmd) (_ *Program, err error) {
	p := &Program{}
	cmd.Stdout, cmd.Stderr = p, p
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.process, err = start(cmd)
	return p, err
}

// Write collects what the program prints.
func (p *Program) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

// Output is what the program has printed so far.
func (p *Program) Output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// Pid is the program's process id.
func (p *Program) Pid() int { return p.process.cmd.Process.Pid }

// Done is closed when the program has ended.
func (p *Program) Done() <-chan struct{} { return p.process.done }

// Signal sends a signal; a program that has ended takes none.
func (p *Program) Signal(signal syscall.Signal) error { return p.process.cmd.Process.Signal(signal) }

// Stop sends a signal and waits for the end. What does not end in a minute is
// killed, which is an error.
func (p *Program) Stop(signal syscall.Signal) error { return p.process.stop(signal) }
