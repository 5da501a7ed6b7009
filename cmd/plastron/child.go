package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"

	"github.com/plastron/plastron/internal/fault"
)

// supervise runs a command with this program's own input and output, passes on
// the signals that come meanwhile, and returns the command's status. If failed is
// closed the command is asked to end, since what it depends on is gone.
func (p *program) supervise(argv, environment []string, failed <-chan struct{}) error {
	command := exec.Command(argv[0], argv[1:]...)
	command.Stdin, command.Stdout, command.Stderr = p.stdin, p.stdout, p.stderr
	command.Env = environment
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, passedOn()...) // before the start, so that none is lost
	defer signal.Stop(signals)
	if err := command.Start(); err != nil {
		return p.notStarted(argv[0], err)
	}
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	for {
		select {
		case s := <-signals:
			if !sentByTerminal(s) { // the terminal has sent it to the command as well
				_ = command.Process.Signal(s) // it may have ended just now
			}
		case <-failed:
			failed = nil
			_ = command.Process.Signal(os.Interrupt)
		case err := <-ended:
			return statusOf(command.ProcessState, err)
		}
	}
}

// notStarted says why a command could not be started; the status is a shell's.
func (p *program) notStarted(name string, err error) error {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		err = path.Err
	}
	if run, ok := errors.AsType[*exec.Error](err); ok {
		err = run.Err
	}
	p.report(fault.New(fault.Invalid, "command_not_started", "the command %q cannot be started: %v", name, err))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
		return exitStatus(exitNotFound)
	}
	return exitStatus(exitNotStarted)
}

// statusOf turns the end of a command into our own.
func statusOf(state *os.ProcessState, err error) error {
	if state == nil {
		return fmt.Errorf("wait for the command: %w", err)
	}
	if signal, ok := endedBySignal(state); ok {
		return exitStatus(128 + signal)
	}
	if code := state.ExitCode(); code != 0 {
		return exitStatus(code)
	}
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		return fmt.Errorf("copy the command's input or output: %w", err)
	}
	return nil
}
