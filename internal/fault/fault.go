// Package fault is how every part of Plastron says that something went wrong.
//
// A fault has a kind (what class of failure it is, which the wires map to a
// gRPC status), a stable reason code (what scripts and dashboards match on), a
// message (what happened) and a remedy (what to do). An error that holds no
// fault is internal: its text is logged and never shown to a caller.
package fault

import (
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"
)

// Kind is the class of a failure.
type Kind uint8

// The kinds. The zero Kind is Internal, so that an error that says nothing
// about itself is never shown to a caller.
const (
	Internal        Kind = iota // a bug or an unexpected failure of ours
	Invalid                     // the request itself is wrong and will stay wrong
	NotFound                    // the thing named does not exist
	Exists                      // the thing to create exists already
	Conflict                    // someone else changed it first; read again and retry
	Precondition                // the system is not in the state that this needs
	Denied                      // known caller, not allowed
	Unauthenticated             // unknown caller
	Exhausted                   // over a limit; retry later or ask for less
	Unavailable                 // not now; retry later
	Unsupported                 // not offered here
)

// String returns the kind's lower-case name, as it appears in logs.
func (k Kind) String() string {
	names := [...]string{"internal", "invalid", "not_found", "exists", "conflict", "precondition",
		"denied", "unauthenticated", "exhausted", "unavailable", "unsupported"}
	if int(k) < len(names) {
		return names[k]
	}
	return "internal"
}

// Error is a failure that may be shown to whoever caused it. It never holds a
// secret, and no data of another caller.
type Error struct {
	Kind    Kind
	Reason  string // stable, lower case with underscores: "selector_mismatch"
	Message string // one sentence: what happened, naming the field or thing
	Remedy  string // one sentence: what to do; may be empty
	Err     error  // the cause, for logs only; may be nil

	After time.Duration // try again not sooner than this; 0: not said
}

// Error returns the message, the remedy and the cause.
func (e *Error) Error() string {
	s := e.Message
	if e.Remedy != "" {
		s += "; " + e.Remedy
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is a fault of the same kind and, if target names a
// reason, of the same reason. So errors.Is(err, &fault.Error{Kind: fault.NotFound}) works.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Kind == e.Kind && (t.Reason == "" || t.Reason == e.Reason)
}

// Fix returns a copy of e that carries a remedy.
func (e *Error) Fix(format string, args ...any) *Error {
	c := *e
	c.Remedy = fmt.Sprintf(format, args...)
	return &c
}

// Because returns a copy of e that carries a cause for the log.
func (e *Error) Because(err error) *Error {
	c := *e
	c.Err = err
	return &c
}

// NotBefore returns a copy of e that says how long to wait before trying again.
func (e *Error) NotBefore(after time.Duration) *Error {
	c := *e
	c.After = after
	return &c
}

// New returns a fault of the given kind, reason and message.
func New(kind Kind, reason, format string, args ...any) *Error {
	return &Error{Kind: kind, Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// KindOf returns the kind of the first fault in err's chain, or Internal.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// ReasonOf returns the reason of the first fault in err's chain, or "internal".
func ReasonOf(err error) string {
	if e, ok := errors.AsType[*Error](err); ok && e.Reason != "" {
		return e.Reason
	}
	return "internal"
}

// Passing reports whether what failed may succeed when it is simply done again.
func Passing(err error) bool {
	kind := KindOf(err)
	return kind == Conflict || kind == Unavailable
}

// MessageOf returns the message of the first fault in err's chain, or a text
// that gives nothing away.
func MessageOf(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Message
	}
	return "internal error; the log has the details"
}

// Words returns what err says to whoever looks after this machine: what was
// wrapped around its first fault and that fault's message, and what to do. Causes
// are left out. An error that holds no fault is its own text.
func Words(err error) (text, remedy string) {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return err.Error(), ""
	}
	around, cut := strings.CutSuffix(err.Error(), e.Error())
	if !cut {
		around = ""
	}
	return around + e.Message, e.Remedy
}

// Sentence returns Words in one.
func Sentence(err error) string {
	text, remedy := Words(err)
	if remedy != "" {
		text += "; " + remedy
	}
	return text
}

// AfterOf returns how long to wait before trying again, as the first fault in
// err's chain says, or 0.
func AfterOf(err error) time.Duration {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.After
	}
	return 0
}

// Panicked is the reason of a failure that was a panic. Any is a bug (R99).
const Panicked = "panic"

// Contain runs f and makes a panic a failure of f alone, with the stack as its
// cause. What works on bytes from outside, and is in nobody's call, runs in it: a
// panic of a goroutine ends the process else.
func Contain(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = New(Internal, Panicked, "internal error; the log has the details").Because(fmt.Errorf("%v\n%s", p, debug.Stack()))
		}
	}()
	return f()
}
