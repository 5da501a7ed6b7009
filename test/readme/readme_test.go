// Package readme_test does what README.md tells a newcomer to do.
package readme_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is far more than anything in the README takes; most of it goes into a first build.
const patience = 15 * time.Minute

// block is one fenced block: sh is run, text must then be in what was printed.
type block struct {
	line           int
	language, text string
}

// TestReadme runs every block, in order, in one shell, in a copy of the tree.
func TestReadme(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("openssl is not installed")
	}
	root := copyTree(t)
	blocks := read(t, filepath.Join(root, "README.md"))
	session := startShell(t, root)
	ran := 0
	for _, b := range blocks {
		switch {
		case b.language == "text":
			session.expect(t, b)
			continue
		case b.language != "sh":
			t.Fatalf("README.md:%d: a block of %q is neither run (sh) nor compared (text)", b.line, b.language)
		case b.text == "make dev\n":
			for _, export := range startDev(t, root) {
				session.do(t, block{line: b.line, text: export + "\n"})
			}
		case b.text == "make test\n": // it would run this test again
			session.do(t, block{line: b.line, text: "make -n test\n"})
		default:
			session.do(t, b)
		}
		ran++
	}
	if ran < 8 {
		t.Errorf("only %d blocks were run", ran)
	}
}

func read(t *testing.T, path string) []block {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var blocks []block
	open := false
	line := 0
	for l := range strings.Lines(string(text)) {
		line++
		language, fence := strings.CutPrefix(strings.TrimSpace(l), "```")
		switch {
		case fence && !open:
			blocks = append(blocks, block{line: line + 1, language: language})
			open = true
		case fence:
			open = false
		case open:
			blocks[len(blocks)-1].text += l
		}
	}
	return blocks
}

// copyTree copies the module, without what is built or recorded, to a short path.
func copyTree(t *testing.T) string {
	t.Helper()
	to, err := os.MkdirTemp("", "rd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(to) })
	from := filepath.Join("..", "..")
	err = filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case name == ".git" || name == "bin" || name == "tmp":
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, name), 0o755)
		case !d.Type().IsRegular():
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, name), content, info.Mode())
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// environment is ours, with a temporary directory of its own below root, so that
// nothing is left behind and no other plastron is met.
func environment(root string) []string {
	temp := filepath.Join(root, "t")
	_ = os.MkdirAll(temp, 0o700)
	return append(os.Environ(), "TMPDIR="+temp, "XDG_RUNTIME_DIR=", "CGO_ENABLED=0")
}

// startDev runs make dev in the background and returns the export lines it prints.
func startDev(t *testing.T, root string) []string {
	t.Helper()
	command := exec.Command("make", "dev")
	command.Dir, command.Env = root, environment(root)
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var log output
	pipe, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	command.Stderr = &log
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-command.Process.Pid, syscall.SIGINT) // as Ctrl-C does
		_ = command.Wait()
		if left, _ := filepath.Glob(filepath.Join(root, "t", "plastron-*")); len(left) > 0 {
			t.Errorf("Ctrl-C left %v", left)
		}
		if t.Failed() {
			t.Logf("make dev printed:\n%s", log.String())
		}
	})
	exports := make(chan []string, 1)
	go func() {
		var found []string
		scanner := bufio.NewScanner(pipe)
		for scanner.Scan() {
			fmt.Fprintln(&log, scanner.Text())
			if strings.HasPrefix(scanner.Text(), "export ") {
				if found = append(found, scanner.Text()); len(found) == 2 {
					exports <- found
				}
			}
		}
	}()
	select {
	case found := <-exports:
		return found
	case <-time.After(patience):
		t.Fatalf("make dev was not ready in %v; it printed:\n%s", patience, log.String())
		return nil
	}
}

// shell is the newcomer's second terminal.
type shell struct {
	in   io.Writer
	out  output
	done int // commands so far
}

func startShell(t *testing.T, root string) *shell {
	t.Helper()
	s := &shell{}
	command := exec.Command("bash")
	command.Dir, command.Env = root, environment(root)
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Stdout, command.Stderr = &s.out, &s.out
	in, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.in = in
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-command.Process.Pid, syscall.SIGTERM) // the programs in the background too
		_ = syscall.Kill(-command.Process.Pid, syscall.SIGKILL)
		_ = command.Wait()
		if t.Failed() {
			t.Logf("the shell printed:\n%s", s.out.String())
		}
	})
	return s
}

// do runs a block and waits for its end. Its last command must succeed.
func (s *shell) do(t *testing.T, b block) {
	t.Helper()
	s.done++
	mark := fmt.Sprintf("-- block %d ended with", s.done)
	ended := regexp.MustCompile(mark + ` \d+\n`)
	if _, err := fmt.Fprintf(s.in, "{ %s}</dev/null\necho \"%s $?\"\n", b.text, mark); err != nil {
		t.Fatal(err)
	}
	if !s.out.wait(ended.MatchString) {
		t.Fatalf("README.md:%d: the block did not end", b.line)
	}
	if !strings.Contains(s.out.String(), mark+" 0\n") {
		t.Fatalf("README.md:%d: the block failed:\n%s", b.line, b.text)
	}
}

// expect waits until every line of the block has been printed.
func (s *shell) expect(t *testing.T, b block) {
	t.Helper()
	for line := range strings.Lines(b.text) {
		pattern := regexp.MustCompile(strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(line)), "…", ".*"))
		if !s.out.wait(pattern.MatchString) {
			t.Errorf("README.md:%d: never printed: %s", b.line, line)
		}
	}
}

// output collects what a program prints and lets others wait for it.
type output struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{}
}

// Write adds to the output.
func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.changed != nil {
		close(o.changed)
		o.changed = nil
	}
	return o.text.Write(b)
}

// String returns what was printed so far.
func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// wait waits until the output satisfies the condition.
func (o *output) wait(satisfied func(string) bool) bool {
	deadline := time.After(patience)
	for {
		o.mu.Lock()
		text := o.text.String()
		if o.changed == nil {
			o.changed = make(chan struct{})
		}
		changed := o.changed
		o.mu.Unlock()
		if satisfied(text) {
			return true
		}
		select {
		case <-changed:
		case <-deadline:
			return false
		}
	}
}
