package logging

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/plastron/plastron/internal/fault"
)

// Level is from how serious an event on there is a log, in the words and the
// order of SPIRE. Nothing is more serious than an error here, so Fatal and
// Panic log nothing; and nothing less than debug, so Trace is Debug.
type Level uint8

// The levels. The zero Level is none.
const (
	Panic Level = iota + 1
	Fatal
	Error
	Warn
	Info
	Debug
	Trace
)

func names() []string {
	return []string{"", "panic", "fatal", "error", "warning", "info", "debug", "trace"}
}

// Valid reports whether it is one of the levels.
func (l Level) Valid() bool { return l >= Panic && l <= Trace }

// String returns the name as SPIRE prints it.
func (l Level) String() string {
	if !l.Valid() {
		return "unspecified"
	}
	return names()[l]
}

// ParseLevel reads the name of a level, in any case.
func ParseLevel(text string) (Level, error) {
	name := strings.ToLower(text)
	if name == "warn" {
		name = "warning"
	}
	if at := slices.Index(names(), name); at > 0 {
		return Level(at), nil
	}
	return 0, fault.New(fault.Invalid, "log_level", "log_level: %q is none of PANIC, FATAL, ERROR, WARN, INFO, DEBUG, TRACE", text)
}

// threshold is the least serious event that is logged.
func (l Level) threshold() slog.Level {
	return slog.LevelError + 4*slog.Level(Error) - 4*slog.Level(l)
}

// Dial turns a log up and down while it is in use.
type Dial struct {
	launch Level
	now    atomic.Uint32
}

// Level implements slog.Leveler.
func (d *Dial) Level() slog.Level { return d.Current().threshold() }

// Current is the level now.
func (d *Dial) Current() Level { return Level(d.now.Load()) }

// Launch is the level that was configured.
func (d *Dial) Launch() Level { return d.launch }

// Set changes the level, which must be valid.
func (d *Dial) Set(l Level) { d.now.Store(uint32(l)) }

// handler is a handler that knows its dial, and what it has lost.
type handler struct {
	slog.Handler
	dial   *Dial
	losses *losses // nil: nothing is counted
}

// losses counts the events that a log's file did not take. The first of them is
// told instead on standard error, and their number by the file when it takes
// events again (F25).
type losses struct {
	instead slog.Handler
	count   atomic.Int64
}

// Handle implements slog.Handler.
func (h handler) Handle(ctx context.Context, r slog.Record) error {
	if h.losses == nil {
		return h.Handler.Handle(ctx, r)
	}
	if n := h.losses.count.Swap(0); n > 0 {
		told := slog.NewRecord(r.Time, slog.LevelWarn, "log events lost", 0)
		told.Add("count", n)
		if h.Handler.Handle(ctx, told) != nil {
			h.losses.count.Add(n + 1)
			return nil
		}
	}
	err := h.Handler.Handle(ctx, r)
	if err != nil && h.losses.count.Add(1) == 1 {
		told := slog.NewRecord(r.Time, slog.LevelError, "log file not written", 0)
		told.Add("err", err)
		return h.losses.instead.Handle(ctx, told)
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.Handler = h.Handler.WithAttrs(attrs)
	return h
}

// WithGroup implements slog.Handler.
func (h handler) WithGroup(name string) slog.Handler {
	h.Handler = h.Handler.WithGroup(name)
	return h
}

// DialOf returns what turns a logger up and down that Open has made, or that was
// derived from one; of another, a dial that turns nothing.
func DialOf(log *slog.Logger) *Dial {
	if h, ok := log.Handler().(handler); ok {
		return h.dial
	}
	d := &Dial{launch: Info}
	d.Set(Info)
	return d
}
