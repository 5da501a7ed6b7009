package system_test

import (
	"os"
	"os/exec"
	"os/user"
	"regexp"
	"strings"
	"testing"
)

// One command, and a process holds a verified identity. The time is printed, not
// asserted.
func TestDevShowsAVerifiedIdentity(t *testing.T) {
	t.Parallel()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "p")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cmd := exec.Command(plastron, "dev", "--", "true")
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "XDG_RUNTIME_DIR=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("plastron dev -- true: %v\n%s", err, out)
	}
	for _, want := range []string{"fetched its own identity through that socket and verified it", "spiffe://dev.local/user/" + me.Username + "/plastron\n", "selector unix:uid:" + me.Uid,
		"./web would get spiffe://dev.local/user/" + me.Username + "/web.", "Programs of one interpreter\nshare an ID"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("dev did not print %q:\n%s", want, out)
		}
	}
	ready := regexp.MustCompile(`ready in ([0-9.]+) s`).FindSubmatch(out)
	if ready == nil {
		t.Fatalf("dev did not print how long it took:\n%s", out)
	}
	t.Logf("ready in %s s", ready[1])
	if left, _ := os.ReadDir(dir); len(left) > 1 { // the directory of this user may stay, empty
		t.Errorf("left behind: %v", left)
	}
	if status := exec.Command(plastron, "dev", "--", "sh", "-c", "exit 7"); status.Run() == nil || status.ProcessState.ExitCode() != 7 {
		t.Errorf("dev ended with %d, want its command's 7", status.ProcessState.ExitCode())
	}
}
