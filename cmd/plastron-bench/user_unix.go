//go:build unix

package main

import (
	"os/exec"
	"syscall"
)

// becomeUser lets a command run as another user.
func becomeUser(cmd *exec.Cmd, uid, gid uint32) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	return nil
}
