// Package parts starts outside programs for tests: private ones, on a free port
// and in a directory of their own, that end with the test. It decides where a
// program is looked for and as whom it runs; what is tested with it is the
// business of the test.
package parts

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
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

// freePort asks the kernel for a port on the loopback interface.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port), nil
}

// tail returns the end of a log.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-4000):])
}
