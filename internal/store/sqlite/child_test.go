package sqlite_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
)

// The test binary, started again with these variables, is a child that a test
// kills, traces or starves.
const (
	childMode = "PLASTRON_STORE_CHILD"
	childDir  = "PLASTRON_STORE_DIR"
)

func TestMain(m *testing.M) {
	modes := map[string]func(dir string) error{
		"crash": childCrash, "crash-small": childCrashSmall, "once": childOnce, "steps": childSteps, "hold": childHold,
	}
	mode := os.Getenv(childMode)
	if mode == "" {
		os.Exit(m.Run())
	}
	if err := modes[mode](os.Getenv(childDir)); err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
}

// deadline is how long a test waits for what should take milliseconds.
const deadline = 3 * time.Minute

// child is a started child process.
type child struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string // closed at the end of its output
}

// start runs the binary as a child; before is what to run it under, if anything.
func start(t *testing.T, mode, dir string, before ...string) *child {
	t.Helper()
	args := append(before, os.Args[0])
	c := &child{cmd: exec.Command(args[0], args[1:]...), lines: make(chan string, 100)}
	c.cmd.Env = append(os.Environ(), childMode+"="+mode, childDir+"="+dir)
	c.cmd.Stderr = t.Output()
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.cmd.Process.Kill() })
	go func() {
		defer close(c.lines)
		for r := bufio.NewReader(out); ; {
			line, err := r.ReadString('\n')
			if err != nil { // a line without its end was cut off by the kill
				return
			}
			c.lines <- strings.TrimSpace(line)
		}
	}()
	return c
}

// next waits for the child's next line.
func (c *child) next(t *testing.T) string {
	t.Helper()
	select {
	case line, ok := <-c.lines:
		if !ok {
			t.Fatal("the child ended early")
		}
		return line
	case <-time.After(deadline):
		t.Fatal("the child says nothing")
	}
	return ""
}

// kill ends the child with SIGKILL and returns the lines it had written.
func (c *child) kill(t *testing.T) (rest []string) {
	t.Helper()
	c.cmd.Process.Kill()
	for line := range c.lines {
		rest = append(rest, line)
	}
	err := c.cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.Exited() {
		t.Fatalf("the child was not ended by the kill: %v", err)
	}
	return rest
}

// missing ends a test that lacks a part of the machine: in CI that is a failure.
func missing(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

const crashWriters = 50

func childCrash(dir string) error      { return crash(dir, sqlite.Config.Open) }
func childCrashSmall(dir string) error { return crash(dir, sqlite.OpenSmall) }

// crash writes with 50 goroutines until it is killed. Transaction n of writer w
// writes three keys and counts in a fourth; "w n" is printed once it is
// acknowledged.
func crash(dir string, open sqlite.OpenFunc) error {
	s, err := open(sqlite.Config{Dir: dir}, context.Background(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	type last struct {
		n   int
		rev uint64
	}
	lasts := make(map[string]last)
	_, err = s.Load(context.Background(), func(key string, rev uint64, value []byte) error {
		if strings.HasPrefix(key, "last/") {
			n, err := strconv.Atoi(string(value))
			lasts[key] = last{n, rev}
			return err
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Println("open")
	failed := make(chan error)
	var wg sync.WaitGroup
	for w := range crashWriters {
		wg.Go(func() {
			key := fmt.Sprintf("last/%d", w)
			for at := lasts[key]; ; {
				at.n++
				txn := store.Txn{
					Caller:     fmt.Sprint(w),
					Conditions: []store.Condition{{Key: key, Revision: at.rev}},
					Puts:       []store.Put{{Key: key, Value: strconv.AppendInt(nil, int64(at.n), 10)}},
				}
				for part := range 3 {
					k := fmt.Sprintf("%d/%d/%d", w, at.n, part)
					txn.Conditions = append(txn.Conditions, store.Condition{Key: k})
					txn.Puts = append(txn.Puts, store.Put{Key: k, Value: make([]byte, 10+w*at.n%900)})
				}
				if at.n > 20 { // so that the store does not grow without end
					txn.Deletes = append(txn.Deletes, fmt.Sprintf("%d/%d/0", w, at.n-20), fmt.Sprintf("%d/%d/1", w, at.n-20), fmt.Sprintf("%d/%d/2", w, at.n-20))
				}
				r := s.Commit(context.Background(), []store.Txn{txn})[0]
				if r.Err != nil {
					failed <- r.Err
					return
				}
				at.rev = r.Position.Revision
				os.Stdout.WriteString(fmt.Sprintf("%d %d\n", w, at.n))
			}
		})
	}
	return <-failed
}

// once commits one transaction between two lines of output.
func childOnce(dir string) error {
	s, err := sqlite.Config{Dir: dir}.Open(context.Background(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	os.Stdout.WriteString("begin\n")
	r := s.Commit(context.Background(), []store.Txn{{Puts: []store.Put{{Key: "k", Value: []byte("v")}}}})[0]
	if r.Err != nil {
		return r.Err
	}
	os.Stdout.WriteString("reply\n")
	return s.Close()
}

// steps commits the key that each line of input names, and answers with the
// outcome, until the input ends.
func childSteps(dir string) error {
	s, err := sqlite.Config{Dir: dir}.Open(context.Background(), slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	fmt.Println("open")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		r := s.Commit(context.Background(), []store.Txn{{Puts: []store.Put{{Key: in.Text(), Value: []byte("v")}}}})[0]
		if r.Err != nil {
			fmt.Println(fault.KindOf(r.Err), fault.ReasonOf(r.Err))
		} else {
			fmt.Println("ok", r.Position.Revision)
		}
	}
	return s.Close()
}

// hold opens the store and keeps it.
func childHold(dir string) error {
	_, err := sqlite.Config{Dir: dir}.Open(context.Background(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	fmt.Println("open")
	io.Copy(io.Discard, os.Stdin)
	return nil
}
