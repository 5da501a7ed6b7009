//go:build unix

package logging_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/logging"
)

// F25: a full disk costs events and is told on standard error once.
func TestFullDisk(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("there is no /dev/full")
	}
	var instead bytes.Buffer
	l := open(t, logging.Settings{File: "/dev/full"}, &instead)
	for range 10 {
		l.Info("event")
	}
	if text := instead.String(); strings.Count(text, "\n") != 1 || !strings.Contains(text, "log file not written") || !strings.Contains(text, "no space left") {
		t.Errorf("standard error has %q, want one line", text)
	}
}

// F25: a FIFO without a reader is refused at once; with one that stops reading
// events are lost, and their number is told when it reads again.
func TestFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (logging.Settings{File: path}).Open(io.Discard); fault.ReasonOf(err) != "log_file" {
		t.Fatalf("Open() without a reader = %v", err)
	}
	reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	var instead bytes.Buffer
	l := open(t, logging.Settings{File: path}, &instead)
	began, events := time.Now(), 0
	for ; events < 100_000 && instead.Len() == 0; events++ {
		l.Info("event", "dir", strings.Repeat("x", 1000))
	}
	const more = 100
	for range more {
		l.Info("event")
	}
	if took := time.Since(began); instead.Len() == 0 || took > 30*time.Second {
		t.Fatalf("after %d events and %v: %q", events, took, instead.String())
	}
	// It reads again: each event is there, in a line of its own, or counted.
	got := make([]byte, 1<<20)
	n, err := reader.Read(got)
	if err != nil {
		t.Fatal(err)
	}
	l.Info("event")
	m, err := reader.Read(got[n:])
	if err != nil {
		t.Fatal(err)
	}
	there, lost := 0, 0
	for line := range strings.Lines(string(got[:n+m])) {
		_, count, told := strings.Cut(line, `msg="log events lost" count=`)
		switch {
		case told:
			c, err := strconv.Atoi(strings.TrimSpace(count))
			if err != nil {
				t.Error(err)
			}
			lost += c
		case strings.HasPrefix(line, "time=") && strings.Contains(line, "msg=event") && strings.HasSuffix(line, "\n"):
			there++
		default:
			t.Errorf("torn: %q", line)
		}
	}
	if lost == 0 || there+lost != events+more+1 {
		t.Errorf("%d events are there and %d are counted as lost, of %d", there, lost, events+more+1)
	}
}
