package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"
)

// A server's files are its own whatever umask it is started with, and its memory
// goes into no core file (R48, R113, R114).
func TestServerKeepsItsMemoryAndFilesToItself(t *testing.T) {
	dir, err := os.MkdirTemp("", "pl")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket, logFile := filepath.Join(dir, "admin", "s"), filepath.Join(dir, "log")
	run := fmt.Sprintf("umask 0; ulimit -c unlimited 2>/dev/null; exec plastron server run -trustDomain example.org -dataDir %s -socketPath %s -logFile %s -bindAddress 127.0.0.1 -serverPort 0",
		filepath.Join(dir, "data"), socket, logFile)
	server := exec.Command("sh", "-c", run)
	server.Stderr = os.Stderr
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		server.Process.Signal(syscall.SIGTERM)
		server.Wait()
	}()
	late := time.After(120 * time.Second)
	for _, err := os.Lstat(socket); err != nil; _, err = os.Lstat(socket) {
		select {
		case <-late:
			t.Fatal("the server does not start")
		case <-time.After(10 * time.Millisecond):
		}
	}
	proc := fmt.Sprintf("/proc/%d/", server.Process.Pid)
	for file, want := range map[string]string{
		"status": `(?m)^Umask:\s+0077$`,
		"limits": `(?m)^Max core file size\s+0\s+0\s`,
	} {
		if b, err := os.ReadFile(proc + file); err != nil || !regexp.MustCompile(want).Match(b) {
			t.Errorf("%s does not match %s (%v)", file, want, err)
		}
	}
	if info, err := os.Stat(proc + "fd"); err == nil && os.Getuid() != 0 {
		if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 {
			t.Errorf("other processes of user %d may look into it", owner)
		}
	}
	err = filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil // the server is at work: it replaces files
		}
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has the mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
