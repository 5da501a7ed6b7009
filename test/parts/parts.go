// Package parts starts outside programs for tests: private ones, on a free port
// and in a directory of their own, that end with the test. It decides where a
// program is looked for and as whom it runs; what is tested with it is the
// business of the test.
package parts

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
)

// MissingError says that a program is not installed.
type MissingError struct{ Program, Package string }

func (e *MissingError) Error() string {
	return fmt.Sprintf("needs %s: apt-get install %s", e.Program, e.Package)
}

// find looks for a program in PLASTRON_PARTS, some directories (patterns; of
// several matches the last) and the search path.
func find(program, pkg string, dirs ...string) (string, error) {
	if dir := os.Getenv("PLASTRON_PARTS"); dir != "" {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	for _, dir := range dirs {
		paths, _ := filepath.Glob(filepath.Join(dir, program))
		for _, path := range slices.Backward(paths) {
			if _, err := exec.LookPath(path); err == nil {
				return path, nil
			}
		}
	}
	if path, err := exec.LookPath(program); err == nil {
		return path, nil
	}
	return "", &MissingError{program, pkg}
}

// Port is a TCP port of the loopback interface that is free, and stays free for
// whoever reserved it: what listens there may end and start again.
type Port struct {
	Number int
	held   net.PacketConn
}

// ReservePort finds a port. The kernel gives none below 32768 to those who ask for
// any, and among tests the one has it that holds the UDP port of that number.
func ReservePort() (*Port, error) {
	for {
		number := 10000 + rand.IntN(22000)
		address := fmt.Sprintf("127.0.0.1:%d", number)
		held, err := net.ListenPacket("udp", address)
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp", address)
		if err == nil {
			l.Close()
			return &Port{number, held}, nil
		}
		held.Close()
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, err
		}
	}
}

// Release lets others have the port.
func (p *Port) Release() { p.held.Close() }

// tail returns the end of a log.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-4000):])
}
