//go:build linux

package fleet_test

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
)

// An op is one call of the entry API as its client saw it. Every op is about one
// content (parent, SPIFFE ID and selectors), of which there is at most one entry
// at a time; its id may be the client's or the server's. What tells one version
// of an entry from another is its hint, which no two writes share.
type op struct {
	kind    kind
	server  int
	content int
	id      string // asked for; a create without one lets the server choose
	hint    string // that a create or an update writes
	expect  uint64 // an update's condition, or 0

	call, ret time.Duration // since the test began; ret is endless when no answer came
	outcome   outcome
	got       version // of a create (ok, exists), an update (ok) and a read (ok)
	rev       uint64  // where the write is in the log, by its receipt
}

// version is an entry as an answer shows it.
type version struct {
	id, hint string
	rev      uint64
}

type kind int

const (
	create kind = iota
	update
	remove
	read // what one server has in memory
	last // as read, but after all is over and at rest: it must show the newest
)

type outcome int

const (
	ok outcome = iota
	exists
	notFound
	stale   // the condition did not hold
	unknown // it may have happened, or may still
	never   // the answer promises that it did not happen
)

const endless = time.Duration(math.MaxInt64)

func (o op) String() string {
	return fmt.Sprintf("%s content %d id %q hint %q expect %d on server %d, %v to %v: %s %+v at %d",
		[...]string{"create", "update", "delete", "read", "last read"}[o.kind], o.content, o.id, o.hint, o.expect, o.server,
		o.call, o.ret, [...]string{"ok", "exists", "not found", "stale", "unknown", "never"}[o.outcome], o.got, o.rev)
}

// state is what the log says of one content. An id or a revision that no answer
// has told yet is zero.
type state struct {
	present bool
	version
	least uint64 // each later write has a higher revision (R74)
}

// is tells whether the state may be this version, and what is known then.
func (s state) is(v version) (state, bool) {
	if !s.present || s.hint != v.hint || s.id != "" && s.id != v.id || s.rev != 0 && s.rev != v.rev || s.rev == 0 && v.rev <= s.least {
		return s, false
	}
	s.version, s.least = v, v.rev
	return s, true
}

// becomes is the state after a write of a known revision.
func (s state) becomes(present bool, v version, rev uint64) (state, bool) {
	if rev <= s.least || present && v.rev != rev {
		return s, false
	}
	return state{present, v, rev}, true
}

// step is the sequential meaning of the entry API for one content: whether an
// outcome is possible in a state, and the state after it.
func step(s state, o op) (state, bool) {
	mine := s.present && s.id == o.id
	switch o.kind {
	case create:
		switch o.outcome {
		case ok:
			after, can := s.becomes(true, o.got, o.rev)
			return after, can && !s.present && o.got.hint == o.hint && (o.id == "" || o.got.id == o.id)
		case exists:
			return s.is(o.got)
		case unknown:
			if !s.present {
				s = state{true, version{id: o.id, hint: o.hint}, s.least}
			}
			return s, true
		}
	case update:
		switch o.outcome {
		case ok:
			after, can := s.becomes(true, o.got, o.rev)
			return after, can && mine && o.got.hint == o.hint && o.got.id == o.id && (o.expect == 0 || s.rev == o.expect || s.rev == 0 && o.expect > s.least)
		case notFound:
			return s, !mine
		case stale:
			return s, mine && (s.rev == 0 || s.rev != o.expect)
		case unknown:
			if mine && (o.expect == 0 || s.rev == o.expect || s.rev == 0 && o.expect > s.least) {
				s.hint, s.rev = o.hint, 0
			}
			return s, true
		}
	case remove:
		switch o.outcome {
		case ok:
			after, can := s.becomes(false, version{}, o.rev)
			return after, can && mine
		case notFound:
			return s, !mine
		case unknown:
			if mine {
				s = state{least: s.least}
			}
			return s, true
		}
	case last:
		switch o.outcome {
		case ok:
			return s.is(o.got)
		case notFound: // there is no entry of this content
			return s, !s.present
		}
	}
	return s, false // never, and what a call cannot answer
}

// check says what is wrong with a history: it must be linearizable for each
// content, with the conditional outcomes and without the reads from memory;
// these must show no less than their server has shown before, and what is older
// than fresh. The longest that a read lagged behind is told in any case.
func check(ops []op, fresh time.Duration) (lag time.Duration, err error) {
	writes, reads := map[int][]op{}, map[int][]op{}
	for _, o := range ops {
		switch {
		case o.outcome == never:
			// It must not show: then nobody can have seen its hint.
		case o.kind == read:
			reads[o.content] = append(reads[o.content], o)
		default:
			writes[o.content] = append(writes[o.content], o)
		}
	}
	for content, of := range writes {
		if err := linearizable(of); err != nil {
			return 0, fmt.Errorf("content %d: %w", content, err)
		}
	}
	for content, of := range reads {
		longest, err := readable(writes[content], of, fresh)
		if err != nil {
			return 0, fmt.Errorf("content %d: %w", content, err)
		}
		lag = max(lag, longest)
	}
	return lag, nil
}

func linearizable(ops []op) error {
	model := porcupine.Model{
		Init: func() any { return state{} },
		Step: func(s, in, _ any) (bool, any) {
			after, can := step(s.(state), in.(op))
			return can, after
		},
	}
	history := make([]porcupine.Operation, len(ops))
	for i, o := range ops {
		history[i] = porcupine.Operation{ClientId: i, Input: o, Call: int64(o.call), Return: int64(o.ret)}
	}
	switch porcupine.CheckOperationsTimeout(model, history, 5*time.Minute) {
	case porcupine.Ok:
		return nil
	case porcupine.Unknown:
		return fmt.Errorf("no verdict on %d calls within five minutes", len(ops))
	}
	text := "not linearizable:"
	for _, o := range sorted(ops) {
		text += "\n\t" + o.String()
	}
	return fmt.Errorf("%s", text)
}

func sorted(ops []op) []op {
	ops = slices.Clone(ops)
	slices.SortFunc(ops, func(a, b op) int { return cmp.Compare(a.call, b.call) })
	return ops
}

// readable checks the reads of one content against its writes and each other. A
// server shows what it has in memory, so that another's write may be missing for
// a while, but it never goes back, and it shows what was written through it.
func readable(writes, reads []op, fresh time.Duration) (lag time.Duration, err error) {
	written := map[string]op{} // by hint
	for _, w := range writes {
		if w.hint != "" {
			written[w.hint] = w
		}
	}
	for _, r := range reads {
		if r.outcome == unknown {
			continue
		}
		if r.outcome == ok {
			w, there := written[r.got.hint]
			if !there || w.call > r.ret || w.rev != 0 && (w.rev != r.got.rev || w.got.id != r.got.id) || r.got.id != r.id {
				return 0, fmt.Errorf("shows what was not written: %v", r)
			}
		}
		// shows tells whether the read is of a state that has seen this revision.
		shows := func(rev uint64) bool {
			if r.outcome == ok {
				return r.got.rev >= rev
			}
			// Not there: some deletion after that revision may be in.
			return slices.ContainsFunc(writes, func(w op) bool {
				return w.kind == remove && w.id == r.id && w.call <= r.ret && (w.outcome == unknown || w.outcome == ok && w.rev >= rev)
			})
		}
		for _, w := range writes {
			if w.outcome != ok || w.rev == 0 || w.ret > r.call || of(w) != r.id || shows(w.rev) {
				continue
			}
			behind := r.call - w.ret
			if w.server == r.server {
				return 0, fmt.Errorf("a server does not show its own write %v: %v", w, r)
			}
			if lag = max(lag, behind); behind > fresh {
				return 0, fmt.Errorf("a server does not show the write %v, %v later: %v", w, behind, r)
			}
		}
		for _, before := range reads {
			if before.server == r.server && before.id == r.id && before.outcome == ok && before.ret <= r.call && !shows(before.got.rev) {
				return 0, fmt.Errorf("a server goes back from %v to %v", before, r)
			}
		}
	}
	return lag, nil
}

// of is the id of the entry that a write changed.
func of(w op) string {
	if w.kind == create {
		return w.got.id
	}
	return w.id
}
