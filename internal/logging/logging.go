// Package logging makes the log of a process: where it goes, how it looks, and
// from which level on. What is logged is decided where it happens.
//
// What must always hold: one event is one line, whatever is in it (R104); an
// event is written whole or not at all, also while the file is replaced.
package logging

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// Settings are the keys of a role's log, wherever the role keeps them. The zero
// Settings log text from info on.
type Settings struct {
	File   string // empty: the fallback given to Open
	Level  string
	Format string // text or json
	Source bool   // with the place in the code
}

// Validate reports every fault at once and opens nothing.
func (s Settings) Validate() error {
	var faults []error
	if _, err := ParseLevel(s.Level); err != nil && s.Level != "" {
		faults = append(faults, err)
	}
	switch strings.ToLower(s.Format) {
	case "", "text", "json":
	default:
		faults = append(faults, fault.New(fault.Invalid, "log_format", "log_format: %q is neither text nor json", s.Format))
	}
	return errors.Join(faults...)
}

// Log is a log that can be turned up and down, and whose file can be replaced.
type Log struct {
	*slog.Logger
	file *file // nil: it goes elsewhere
}

// Open makes the log; without a file it goes to fallback.
func (s Settings) Open(fallback io.Writer) (*Log, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	level := Info
	if s.Level != "" {
		level, _ = ParseLevel(s.Level)
	}
	l, stderr := &Log{}, fallback
	if s.File != "" {
		l.file = &file{path: s.File}
		if err := l.file.open(); err != nil { // F25
			return nil, fault.New(fault.Invalid, "log_file", "log_file: %v", err).Fix("name a file that this user may write to")
		}
		fallback = l.file
	}
	dial := &Dial{launch: level}
	dial.Set(level)
	options := &slog.HandlerOptions{Level: dial, AddSource: s.Source}
	form := func(w io.Writer) slog.Handler {
		if strings.EqualFold(s.Format, "json") {
			return slog.NewJSONHandler(w, options)
		}
		return slog.NewTextHandler(w, options)
	}
	h := handler{Handler: form(fallback), dial: dial}
	if l.file != nil && stderr != nil {
		h.losses = &losses{instead: form(stderr)}
	}
	l.Logger = slog.New(h)
	return l, nil
}

// Reopen opens the file anew, for whoever has moved the old one away. If that
// fails, the old one stays in use. Without a file it does nothing.
func (l *Log) Reopen() error {
	if l.file == nil {
		return nil
	}
	return l.file.open()
}

// Close closes the file.
func (l *Log) Close() error {
	if l.file == nil {
		return nil
	}
	l.file.mu.Lock()
	defer l.file.mu.Unlock()
	return l.file.current.Close()
}

// file is a log file that is opened anew now and then.
type file struct {
	path string

	mu      sync.Mutex // guards what follows
	current *os.File
	stuck   bool // the last write failed
	torn    bool // the last line is not whole
}

// open does not wait: a FIFO that nobody reads is refused (F25).
func (f *file) open() error {
	next, err := os.OpenFile(f.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.current != nil {
		err = f.current.Close()
	}
	f.current, f.stuck, f.torn = next, false, false
	return err
}

// Write implements io.Writer. It waits a moment at most for a pipe whose reader
// is slow, since everything else waits meanwhile.
func (f *file) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	wait := time.Second
	if f.stuck {
		wait = time.Millisecond
	}
	f.current.SetWriteDeadline(time.Now().Add(wait)) // what cannot have one, such as a disk's file, needs none
	line := b
	if f.torn {
		line = append([]byte("\n"), b...)
	}
	n, err := f.current.Write(line)
	f.stuck = err != nil
	if n > 0 {
		f.torn = n < len(line)
	}
	return len(b), err
}
