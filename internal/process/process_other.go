//go:build !linux

package process

import (
	"context"
	"errors"
	"net"
	"os"

	"github.com/plastron/plastron/internal/fault"
)

var errUnsupported = fault.New(fault.Unsupported, "workload_attestation_unsupported",
	"telling which process calls is offered on Linux only").
	Fix("run the agent on Linux")

type handle struct{}

func peer(*net.UnixConn, Via) (*Process, error) { return nil, errUnsupported }

// Open holds the process with this number.
func Open(int) (*Process, error) { return nil, errUnsupported }

// Listen opens a unix socket whose connections know their process.
func Listen(string, Via) (*Listener, error) { return nil, errUnsupported }

// Adopt listens on a socket that another process has made.
func Adopt(f *os.File, _ Via) (*Listener, error) { return nil, errors.Join(errUnsupported, f.Close()) }

// Check returns nil as long as the process lives and is what it was.
func (p *Process) Check() error { return errUnsupported }

// Wait returns when the process has exited or Close was called.
func (p *Process) Wait() {}

// Close lets go of the process.
func (p *Process) Close() error { return nil }

// Status is what the kernel says about a process's user and groups.
type Status struct {
	UID, GID uint32
	Groups   []uint32
	More     bool
}

// ReadStatus reads the user and groups of a process.
func ReadStatus(int) (Status, error) { return Status{}, errUnsupported }

// Started returns when a process was started, in ticks of the kernel's clock.
func Started(int) (uint64, error) { return 0, errUnsupported }

// ProgramName returns the last part of the path of a process's program.
func ProgramName(int) (string, error) { return "", errUnsupported }

// Programs reads which program a process runs.
type Programs struct{}

// Path returns the path of the program of process pid.
func (*Programs) Path(context.Context, int) (string, error) { return "", errUnsupported }

// SHA256 returns the hash of the program of process pid, in lower-case hex.
func (*Programs) SHA256(context.Context, int, int64) (string, error) { return "", errUnsupported }

// Hashed returns how many files were read and hashed so far.
func (*Programs) Hashed() uint64 { return 0 }

// Room cannot be told here.
func Room() int { return 0 }
