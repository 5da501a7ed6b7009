// Command plastron is the whole product in one program: server, agent, and the
// tools around them. This package decides how commands are spelled and how
// results and errors look to a person; the work is done in internal.
//
// Whatever goes wrong ends in one error that says what happened, why, and what
// to do; a wrong flag or configuration is found before anything is started or
// written. Started under the name spire-server or spire-agent, the program
// takes that tool's verbs directly.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	stopping := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup asks to outlive the terminal
		stopping = append(stopping, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), stopping...)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends us at once
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// Exit codes. run and dev with a command end with the command's own status
// instead, 128+n if signal n ended it.
const (
	exitOK         = 0
	exitFailed     = 1   // whatever failed, wrong flags and configuration included
	exitWarned     = 2   // status: the agent serves what it has, but is not in step with its server; doctor: warnings only
	exitChanges    = 2   // apply -dry-run: there is something to change
	exitNotInForce = 3   // -wait: the change is made, but not every agent holds it
	exitNotStarted = 126 // the command of run or dev cannot be executed
	exitNotFound   = 127 // the command of run or dev does not exist
)

// program is what a command sees of the world.
type program struct {
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer
	start  time.Time
}

// exitStatus ends the program with a status and without an error message.
type exitStatus int

func (exitStatus) Error() string { return "exit status" }

// run executes one command line, argv[0] included, and returns its exit code.
func run(ctx context.Context, argv []string, stdin io.Reader, stdout, stderr io.Writer) int {
	p := &program{stdin: stdin, stdout: stdout, stderr: stderr, start: time.Now()}
	root := p.root()
	args := argv[1:]
	switch strings.TrimSuffix(filepath.Base(argv[0]), ".exe") {
	case "spire-server":
		args = append([]string{"server"}, args...)
	case "spire-agent":
		args = append([]string{"agent"}, args...)
	}
	args, err := normalize(root, args)
	if err == nil {
		root.SetArgs(args)
		err = root.ExecuteContext(ctx)
	}
	if err == nil {
		return exitOK
	}
	if status, ok := errors.AsType[exitStatus](err); ok {
		return int(status)
	}
	p.report(err)
	return exitFailed
}
