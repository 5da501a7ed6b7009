//go:build linux

package fleet_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/test/parts"
)

// others is how long the others may take to commit when one server is frozen: ten
// times what is promised, since tests run on busy machines. How long it took is told.
const others = 10 * 5 * time.Second

// A server is frozen at any moment of its commits, by SIGSTOP: the others commit
// within 5 s, and let go it catches up and repeats nothing. FM7.
func TestFrozenServer(t *testing.T) {
	t.Parallel()
	for name, on := range map[string]func(testing.TB) *fleet{"postgres": onPostgres, "etcd": onEtcd} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := on(t)
			f.start(3)
			f.attach(f.servers[0])
			stop := f.fetching()
			defer stop()
			w := f.startWriters(50)
			var longest time.Duration
			for i := range rounds(6) {
				w.served()
				s := f.servers[i%len(f.servers)]
				if err := s.proc.Signal(syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				longest = max(longest, f.commits(s))
				if err := s.proc.Signal(syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("longest commit of the others %v", longest.Round(time.Millisecond))
			w.served()
			w.end(fresh)
			stop()
		})
	}
}

// commits has every server but one commit, and returns how long the slowest took.
func (f *fleet) commits(frozen *server) time.Duration {
	f.t.Helper()
	began := time.Now()
	took := make([]time.Duration, len(f.servers))
	var all sync.WaitGroup
	for i, s := range f.servers {
		if s == frozen {
			continue
		}
		all.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := s.create(ctx, fmt.Sprintf("/beside/%d", rand.Int64()), nobody, "uid:4242"); err != nil {
				f.t.Errorf("%s, while %s is frozen: %v", s.name, frozen.name, err)
			}
			took[i] = time.Since(began)
		})
	}
	all.Wait()
	slowest := took[0]
	for _, t := range took {
		slowest = max(slowest, t)
	}
	if slowest > others {
		f.t.Errorf("while %s was frozen a commit took %v", frozen.name, slowest)
	}
	return slowest
}

// The same with the freeze where it hurts most: as the last byte of a commit has
// left, before the answer is read. strace stops the server as it writes to the
// database, many times.
func TestFrozenInMidCommit(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		missing(t, &parts.MissingError{Program: "strace", Package: "strace"})
	}
	f := onPostgres(t)
	f.start(3)
	w := f.startWriters(50)
	w.served()
	s := f.servers[0]
	trace := filepath.Join(t.TempDir(), "trace")
	tracer, err := parts.StartProgram(exec.Command(strace, "-f", "-qq", "-e", "signal=none", "-s", "300", "-o", trace, "-e", "trace=write",
		"-e", "inject=write:signal=SIGSTOP:when=20+20", "-p", fmt.Sprint(s.proc.Pid())))
	if err != nil {
		t.Fatal(err)
	}
	let := func() { s.proc.Signal(syscall.SIGCONT) }
	defer let()
	defer tracer.Stop(syscall.SIGINT)
	inCommit, stops := 0, 0
	var longest time.Duration
	for deadline := time.Now().Add(5 * patience); inCommit < rounds(3); stops++ {
		eventually(t, "the server is frozen", func() bool {
			select {
			case <-tracer.Done():
				t.Fatalf("strace ended: %s", tracer.Output())
			default:
			}
			return s.stopped()
		})
		if last := lastWrite(t, trace); strings.Contains(last, "plastron_commit") {
			inCommit++
			longest = max(longest, f.commits(s))
		}
		let()
		if time.Now().After(deadline) {
			t.Fatalf("stopped %d times, %d of them in mid-commit", stops, inCommit)
		}
	}
	if err := tracer.Stop(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	let()
	t.Logf("frozen %d times, %d of them in mid-commit; longest commit of the others %v", stops, inCommit, longest.Round(time.Millisecond))
	w.served()
	w.end(fresh)
}

// stopped tells whether the process is stopped, by a signal or under strace.
func (s *server) stopped() bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.proc.Pid()))
	if err != nil {
		return false
	}
	rest := stat[bytes.LastIndexByte(stat, ')')+1:]
	fields := bytes.Fields(rest)
	return len(fields) > 0 && (fields[0][0] == 'T' || fields[0][0] == 't')
}

// lastWrite is the last line of a trace.
func lastWrite(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}
