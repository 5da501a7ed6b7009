package logging_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/slogtest"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/logging"
)

func open(t *testing.T, s logging.Settings, w *bytes.Buffer) *logging.Log {
	t.Helper()
	l, err := s.Open(w)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestHandler(t *testing.T) {
	var out bytes.Buffer
	l := open(t, logging.Settings{Format: "JSON"}, &out)
	err := slogtest.TestHandler(l.Handler(), func() (events []map[string]any) {
		for line := range strings.Lines(out.String()) {
			var event map[string]any
			if err := json.Unmarshal([]byte(line), &event); err != nil {
				t.Fatal(err)
			}
			events = append(events, event)
		}
		return events
	})
	if err != nil {
		t.Error(err)
	}
}

// Each level lets through what is as serious or more, at once, also through
// loggers that were derived before.
func TestDial(t *testing.T) {
	var out bytes.Buffer
	l := open(t, logging.Settings{Level: "warn"}, &out)
	derived := l.With("dir", "x")
	dial := logging.DialOf(derived)
	if dial.Current() != logging.Warn || dial.Launch() != logging.Warn {
		t.Errorf("current %v, launch %v, want warning", dial.Current(), dial.Launch())
	}
	for level, want := range map[logging.Level]string{
		logging.Panic: "", logging.Fatal: "", logging.Error: "E", logging.Warn: "WE", logging.Info: "IWE", logging.Debug: "DIWE", logging.Trace: "DIWE",
	} {
		dial.Set(level)
		out.Reset()
		derived.Debug("D")
		derived.Info("I")
		derived.Warn("W")
		derived.Error("E")
		got := ""
		for line := range strings.Lines(out.String()) {
			_, rest, _ := strings.Cut(line, "msg=")
			got += rest[:1]
		}
		if got != want {
			t.Errorf("at %v: %q, want %q", level, got, want)
		}
	}
	if dial.Launch() != logging.Warn {
		t.Errorf("the launch level has become %v", dial.Launch())
	}
	other := logging.DialOf(slog.New(slog.DiscardHandler))
	if other.Set(logging.Trace); other.Launch() != logging.Info {
		t.Error("a logger of somebody else has no level")
	}
}

func TestLevelNames(t *testing.T) {
	for text, want := range map[string]string{
		"PANIC": "panic", "fatal": "fatal", "Error": "error", "WARN": "warning", "warning": "warning", "INFO": "info", "DEBUG": "debug", "trace": "trace",
	} {
		if level, err := logging.ParseLevel(text); err != nil || level.String() != want || !level.Valid() {
			t.Errorf("ParseLevel(%q) = %v, %v", text, level, err)
		}
	}
	for _, text := range []string{"", "loud", "unspecified", "warn ", "info\n"} {
		if level, err := logging.ParseLevel(text); fault.ReasonOf(err) != "log_level" || level.Valid() {
			t.Errorf("ParseLevel(%q) = %v, %v", text, level, err)
		}
	}
}

func TestSettings(t *testing.T) {
	err := logging.Settings{Level: "LOUD", Format: "xml"}.Validate()
	if err == nil || !strings.Contains(err.Error(), `"LOUD" is none of`) || !strings.Contains(err.Error(), `"xml" is neither`) {
		t.Errorf("Validate() = %v, want both faults", err)
	}
	dir := t.TempDir()
	_, err = logging.Settings{File: filepath.Join(dir, "none", "log"), Level: "LOUD"}.Open(nil)
	if fault.ReasonOf(err) != "log_level" {
		t.Errorf("Open() = %v", err)
	}
	if _, err = (logging.Settings{File: filepath.Join(dir, "none", "log")}).Open(nil); fault.ReasonOf(err) != "log_file" { // F25
		t.Errorf("Open() = %v", err)
	}
	var out bytes.Buffer
	open(t, logging.Settings{Source: true}, &out).Info("x")
	if !strings.Contains(out.String(), "logging_test.go:") {
		t.Errorf("no place in the code: %s", out.String())
	}
}

// What outsiders put into an event stays in its line (R104).
func TestOneLinePerEvent(t *testing.T) {
	hostile := "a\nlevel=ERROR msg=forged\r\n{\"level\":\"ERROR\"}\x1b[2J\u2028\x00\xff"
	for _, format := range []string{"text", "json"} {
		var out bytes.Buffer
		open(t, logging.Settings{Format: format}, &out).Info("call refused", "caller", hostile, "err", errors.New(hostile))
		text := strings.TrimSuffix(out.String(), "\n")
		if strings.ContainsAny(text, "\n\r\x1b\x00") {
			t.Errorf("%s: %q", format, text)
		}
	}
}

// A file that is moved away is followed by a new one, without a lost or a torn line.
func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := logging.Settings{File: path, Format: "json"}.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	const writers, events, turns = 4, 500, 10
	var group sync.WaitGroup
	for range writers {
		group.Go(func() {
			for i := range events {
				l.Info("event", "count", i)
			}
		})
	}
	for range turns {
		old, err := os.CreateTemp(filepath.Dir(path), "old-*")
		if err != nil {
			t.Fatal(err)
		}
		old.Close()
		if err := os.Rename(path, old.Name()); err != nil {
			t.Fatal(err)
		}
		if err := l.Reopen(); err != nil {
			t.Fatal(err)
		}
	}
	group.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*"))
	if err != nil || len(names) != turns+1 {
		t.Fatalf("%d files, %v", len(names), err)
	}
	lines := 0
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for scan := bufio.NewScanner(f); scan.Scan(); lines++ {
			if !json.Valid(scan.Bytes()) {
				t.Errorf("torn: %s", scan.Text())
			}
		}
		if info, err := f.Stat(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want 0600", name, info.Mode(), err)
		}
	}
	if lines != writers*events {
		t.Errorf("%d lines, want %d", lines, writers*events)
	}
}

func TestReopenFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "logs")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := logging.Settings{File: filepath.Join(dir, "log")}.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	moved := dir + ".old"
	if err := os.Rename(dir, moved); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Reopen() = %v", err)
	}
	l.Info("still there")
	text, err := os.ReadFile(filepath.Join(moved, "log"))
	if err != nil || !strings.Contains(string(text), "still there") {
		t.Errorf("%q, %v", text, err)
	}
	if err := (&logging.Log{}).Reopen(); err != nil {
		t.Errorf("Reopen() without a file = %v", err)
	}
}
