//go:build linux

package sqlite_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/store/storetest"
)

// A kill cannot show a missing sync: what the kernel holds survives it. So look
// at the system calls (R73): every write to the WAL is followed by a sync of it
// before the reply is written, and position is written before the reply too.
func TestSyncedBeforeReply(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		missing(t, "strace is not installed")
	}
	trace := filepath.Join(t.TempDir(), "trace")
	c := start(t, "once", t.TempDir(), strace, "-f", "-y", "-o", trace, "-e", "trace=write,pwrite64,fsync,fdatasync")
	if line := c.next(t); line != "begin" {
		t.Fatalf("child says %q", line)
	}
	if line := c.next(t); line != "reply" {
		t.Fatalf("child says %q", line)
	}
	if err := c.cmd.Wait(); err != nil {
		t.Fatalf("child: %v", err)
	}
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	if err := syncedBeforeReply(string(text)); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}

	// The same trace without its syncs, or with a failed one, must not pass.
	if syncedBeforeReply(regexp.MustCompile(`(?m)^.*sync\(.*$`).ReplaceAllString(string(text), "")) == nil {
		t.Error("a trace without syncs passes")
	}
	if syncedBeforeReply(regexp.MustCompile(`(sync.*) = 0`).ReplaceAllString(string(text), "$1 = -1 EIO")) == nil {
		t.Error("a trace whose syncs failed passes")
	}
}

func syncedBeforeReply(trace string) error {
	call := regexp.MustCompile(`^(\d+) +(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)$`)
	path := regexp.MustCompile(`^\d+<([^>]*)>`)
	unfinished := map[string]string{} // thread → path of its call under way
	begun, written, synced, noted := false, false, false, false
	for line := range strings.Lines(trace) {
		m := call.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		thread, name, rest := m[1], m[2], m[3]
		file, starts, ends := "", true, !strings.Contains(rest, "<unfinished")
		if strings.Contains(line, "resumed>") {
			file, starts = unfinished[thread], false
		} else if p := path.FindStringSubmatch(rest); p != nil {
			file = p[1]
		}
		if !ends {
			unfinished[thread] = file
		}
		good := ends && !strings.Contains(rest, "= -1")
		isSync := name == "fsync" || name == "fdatasync"
		switch {
		case starts && name == "write" && strings.Contains(rest, `"begin\n"`):
			begun = true
		case starts && name == "write" && strings.Contains(rest, `"reply\n"`):
			if !begun || !written || !synced || !noted {
				return fmt.Errorf("replied with begun %t, WAL written %t, synced since %t, position written %t", begun, written, synced, noted)
			}
			return nil
		case !begun:
		case strings.HasSuffix(file, "-wal") && strings.Contains(name, "write"):
			written, synced = true, false
		case strings.HasSuffix(file, "-wal") && isSync && good:
			synced = true
		case strings.HasSuffix(file, "/position") && name == "pwrite64" && good:
			noted = synced // after the sync: position never runs ahead of the disk
		}
	}
	return errors.New("no reply")
}

// R80: a full disk refuses clearly, leaves nothing half, and is over as soon as
// there is room, without a restart.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		missing(t, "mounting a small disk needs root")
	}
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=8m,mode=0700"); err != nil {
		missing(t, fmt.Sprintf("mount: %v", err))
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	ballast := filepath.Join(mount, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]sqlite.OpenFunc{"default": sqlite.Config.Open, "small": sqlite.OpenSmall} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(mount, name)
			t.Cleanup(func() {
				os.RemoveAll(dir)
				if err := os.WriteFile(ballast, make([]byte, 3<<20), 0o600); err != nil {
					t.Error(err)
				}
			})
			s, err := open(sqlite.Config{Dir: dir}, t.Context(), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { s.Close() }()
			want := make(map[string]storetest.Row)
			refused := 0
			write := func(i int) error {
				value := strings.Repeat("v", 60000+i)
				txn := store.Txn{}
				for part := range 2 {
					txn.Puts = append(txn.Puts, store.Put{Key: fmt.Sprintf("%d/%d", i, part), Value: []byte(value)})
				}
				r := s.Commit(t.Context(), []store.Txn{txn})[0]
				if r.Err == nil {
					want[fmt.Sprintf("%d/0", i)] = storetest.Row{Rev: r.Position.Revision, Value: value}
					want[fmt.Sprintf("%d/1", i)] = storetest.Row{Rev: r.Position.Revision, Value: value}
				}
				return r.Err
			}
			i := 0
			for ; refused < 5; i++ {
				if i == 1000 {
					t.Fatal("the disk does not fill")
				}
				if err := write(i); err != nil {
					refused++
					if fault.KindOf(err) != fault.Unavailable || fault.ReasonOf(err) != "disk_full" {
						t.Fatalf("a full disk is reported as %v (%s)", err, fault.ReasonOf(err))
					}
				}
			}
			got, _ := storetest.State(t, s) // reads go on
			if len(got) != len(want) {
				t.Fatalf("%d keys, want %d", len(got), len(want))
			}
			if err := os.Truncate(ballast, 0); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			for err := write(i); err != nil; err = write(i) {
				if time.Since(begin) > deadline {
					t.Fatalf("still refused although there is room: %v", err)
				}
			}
			t.Logf("%d commits, works again after %v", i, time.Since(begin).Round(time.Microsecond))
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = openDir(t, dir)
			got, _ = storetest.State(t, s)
			if len(got) != len(want) || s.Opened.NewEpoch {
				t.Fatalf("%d keys after reopening, want %d; new epoch: %t", len(got), len(want), s.Opened.NewEpoch)
			}
			for key, row := range want {
				if got[key] != row {
					t.Fatalf("%s is of revision %d, want %d", key, got[key].Rev, row.Rev)
				}
			}
		})
	}
}

// inject makes system calls of a running process fail until stop is called.
func inject(t *testing.T, c *child, args ...string) (stop func()) {
	t.Helper()
	strace, err := exec.LookPath("strace")
	if err != nil {
		missing(t, "strace is not installed")
	}
	ready := make(chan bool, 1)
	cmd := exec.Command(strace, append([]string{"-f", "-p", fmt.Sprint(c.cmd.Process.Pid)}, args...)...)
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		text := ""
		for buf := make([]byte, 4096); ; {
			n, err := out.Read(buf)
			if text += string(buf[:n]); len(text) < 4096 && strings.Contains(text, "attached") {
				select {
				case ready <- true:
				default:
				}
			}
			if err != nil {
				break
			}
		}
		close(ready)
	}()
	select {
	case ok := <-ready:
		if !ok {
			missing(t, "strace cannot attach")
		}
	case <-time.After(deadline):
		t.Fatal("strace says nothing")
	}
	return func() {
		cmd.Process.Signal(os.Interrupt) // detaches
		<-done
		cmd.Wait()
	}
}

// R81: after a failed sync nothing is built on what the kernel may have dropped.
// Here only syncs of the WAL fail: the store writes it to a new file, which it
// can sync, finds its row there and may acknowledge it.
func TestFailedSyncOfTheWAL(t *testing.T) {
	dir := t.TempDir()
	c := start(t, "steps", dir)
	c.expect(t, "", "open")
	c.expect(t, "first", "ok 1")
	stop := inject(t, c, "-P", filepath.Join(dir, "plastron.db-wal"), "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO")
	c.expect(t, "second", "ok 2")
	c.expect(t, "third", "ok 3")
	stop()
	c.expect(t, "fourth", "ok 4")
	c.kill(t)
	checkKeys(t, dir, "first", "second", "third", "fourth")
}

// R80, R81: when no sync works the commit's outcome is unknown and later ones are
// refused; once syncs work again the store goes on by itself, and the log says
// what became of the first.
func TestFailedSyncOfEverything(t *testing.T) {
	dir := t.TempDir()
	c := start(t, "steps", dir)
	c.expect(t, "", "open")
	c.expect(t, "first", "ok 1")
	stop := inject(t, c, "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO")
	c.expect(t, "unknown", "unavailable outcome_unknown")
	c.expect(t, "refused", "unavailable store_unavailable")
	stop()
	begin := time.Now()
	c.say(t, "again")
	line := c.next(t)
	if !strings.HasPrefix(line, "ok ") {
		t.Fatalf("after the fault is gone: %s", line)
	}
	t.Logf("works again after %v, %s", time.Since(begin).Round(time.Millisecond), line)
	c.kill(t)
	want := []string{"again", "first"}
	if line == "ok 3" { // the unknown one is in, as revision 2
		want = append(want, "unknown")
	}
	checkKeys(t, dir, want...)
}

// A write that fails is not a full disk: the files are opened again, and nothing
// of it is there.
func TestFailedWrite(t *testing.T) {
	dir := t.TempDir()
	c := start(t, "steps", dir)
	c.expect(t, "", "open")
	c.expect(t, "first", "ok 1")
	stop := inject(t, c, "-P", filepath.Join(dir, "plastron.db-wal"), "-e", "trace=pwrite64", "-e", "inject=pwrite64:error=EIO")
	c.expect(t, "second", "unavailable not_written")
	stop()
	c.expect(t, "third", "ok 2")
	c.kill(t)
	checkKeys(t, dir, "first", "third")
}

func (c *child) say(t *testing.T, line string) {
	t.Helper()
	if _, err := fmt.Fprintln(c.in, line); err != nil {
		t.Fatal(err)
	}
}

func (c *child) expect(t *testing.T, say, want string) {
	t.Helper()
	if say != "" {
		c.say(t, say)
	}
	if line := c.next(t); line != want {
		t.Fatalf("after %q the child says %q, want %q", say, line, want)
	}
}

// checkKeys opens the store that a killed process left and compares its keys.
func checkKeys(t *testing.T, dir string, want ...string) {
	t.Helper()
	s := openDir(t, dir)
	defer s.Close()
	rows, at := storetest.State(t, s)
	for _, key := range want {
		if _, ok := rows[key]; !ok {
			t.Errorf("%q is not there", key)
		}
	}
	if len(rows) != len(want) || s.Opened.NewEpoch {
		t.Errorf("the store holds %v, want %q; new epoch: %t", rows, want, s.Opened.NewEpoch)
	}
	storetest.Replay(t, s, store.Position{Epoch: at.Epoch}, at)
	if r := s.Commit(context.Background(), []store.Txn{{Puts: []store.Put{{Key: "more"}}}})[0]; r.Err != nil {
		t.Error(r.Err)
	}
}
