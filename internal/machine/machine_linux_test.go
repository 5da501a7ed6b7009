package machine

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fault"
)

// A lock is held against everybody, this process included, and ends with its holder.
func TestLockFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l, err := LockFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LockFile(path); fault.ReasonOf(err) != "locked" || !strings.Contains(err.Error(), "process ") {
		t.Errorf("a second LockFile() = %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0], "-test.run=^TestHold$")
	child.Env = append(os.Environ(), "PLASTRON_TEST_HOLD="+path)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := LockFile(path); fault.ReasonOf(err) != "locked" {
		t.Errorf("LockFile() while another process has it = %v", err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	in.Close()
	if l, err = LockFile(path); err != nil {
		t.Errorf("LockFile() after its holder was killed = %v", err)
	} else if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// TestHold is the other process of TestLockFile.
func TestHold(t *testing.T) {
	path := os.Getenv("PLASTRON_TEST_HOLD")
	if path == "" {
		return
	}
	l, err := LockFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	os.Stdout.WriteString("x")
	os.Stdin.Read(make([]byte, 1))
}

func TestWhere(t *testing.T) {
	dir := t.TempDir()
	other := filepath.Join(dir, "other")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	device, inode, err := Directory(dir)
	if d, i, e := Directory(filepath.Join(other, "..")); err != nil || e != nil || d != device || i != inode || inode == 0 {
		t.Errorf("one directory is %d:%d and %d:%d (%v, %v)", device, inode, d, i, err, e)
	}
	if _, i, err := Directory(other); err != nil || i == inode {
		t.Errorf("another directory is the same (%v)", err)
	}
	if id := BootID(); len(id) != 36 || id != BootID() {
		t.Errorf("BootID() = %q", BootID())
	}
	if a, b := Uptime(), Uptime(); a <= 0 || b < a {
		t.Errorf("Uptime() = %v, then %v", a, b)
	}
}
