package mirror

import (
	"time"

	"github.com/plastron/plastron/internal/entry"
)

// Limits on asking the server whether an entry that does not reach this agent
// fits a process. Whoever is refused may cause it, so it is bounded here as well
// as there.
const (
	hintWait      = time.Second
	hintLife      = 10 * time.Second // of an answer
	hintRate      = 1                // per second
	hintBurst     = 20
	maxHints      = 1024
	maxHintSelect = 256 // selectors in one question
)

// hints remembers what the server said.
type hints struct {
	held   map[string]hint // by the selectors' group key
	tokens float64
	filled time.Time
}

// recent remembers for a moment why callers got what they got, so that one that
// calls all the time does not have every grant looked at each time. It is void as
// soon as anything has happened.
type recent struct {
	held  map[string]Why // by the callers' group key
	at    time.Time
	steps uint64 // of the machine
}

const recentLife = time.Second

// current returns what is remembered and still holds; what is put there is remembered.
func (r *recent) current(steps uint64, now time.Time) map[string]Why {
	if r.held == nil || steps != r.steps || due(r.at.Add(recentLife), now, recentLife) || len(r.held) >= maxHints {
		r.held, r.at, r.steps = map[string]Why{}, now, steps
	}
	return r.held
}

type hint struct {
	code string
	at   time.Time
}

func newHints() *hints { return &hints{held: map[string]hint{}, tokens: hintBurst} }

// find returns what the server said lately of these selectors.
func (h *hints) find(key string, now time.Time) (code string, found bool) {
	got, ok := h.held[key]
	if !ok || due(got.at.Add(hintLife), now, hintLife) {
		return "", false
	}
	return got.code, true
}

// ask reports whether one more question may be asked now.
func (h *hints) ask(selectors []entry.Selector, now time.Time) bool {
	if len(selectors) == 0 || len(selectors) > maxHintSelect {
		return false
	}
	h.tokens = min(hintBurst, h.tokens+max(now.Sub(h.filled), 0).Seconds()*hintRate)
	h.filled = now
	if h.tokens < 1 {
		return false
	}
	h.tokens--
	return true
}

// keep remembers an answer. An empty one says that there is nothing to say, or
// that the server could not be asked.
func (h *hints) keep(key, code string, now time.Time) {
	if len(h.held) >= maxHints {
		clear(h.held)
	}
	h.held[key] = hint{code: code, at: now}
}
