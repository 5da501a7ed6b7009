//go:build unix

package systemd

import (
	"os"
	"syscall"
)

func take(fd int, name string) *os.File {
	syscall.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), name)
}
