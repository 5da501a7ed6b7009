package workloadapi

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// Bounds on what is remembered of refusals.
const (
	refusalEvery = 10 * time.Minute
	maxRefusals  = 1024
	maxReasons   = 100 // some come from the server
)

// refusals counts refused calls by reason, and sees to it that each distinct
// refusal is logged once, and again now and then for as long as it goes on, with
// how often it happened (R104).
type refusals struct {
	mu   sync.Mutex // guards everything below
	by   map[string]uint64
	seen map[refusal]*tally
}

// refusal is what makes one distinct: who is refused, and why.
type refusal struct {
	uid    int64
	reason string
}

type tally struct {
	count  int // since it was last logged
	logged time.Time
}

func newRefusals() *refusals {
	return &refusals{by: map[string]uint64{}, seen: map[refusal]*tally{}}
}

// count takes note of how a call ended, and returns that.
func (r *refusals) count(err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	reason := fault.ReasonOf(err)
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.by[reason]; !known && len(r.by) >= maxReasons {
		reason = "other"
	}
	r.by[reason]++
	return err
}

// reasons returns how many calls were refused for each reason.
func (r *refusals) reasons() map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.by)
}

// due returns how many refusals a line written now stands for; 0: write none.
func (r *refusals) due(what refusal, now time.Time) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.seen[what]
	if t == nil {
		if len(r.seen) >= maxRefusals {
			r.seen = map[refusal]*tally{}
		}
		t = &tally{}
		r.seen[what] = t
	}
	if t.count++; !t.logged.IsZero() && now.Sub(t.logged) < refusalEvery {
		return 0
	}
	n := t.count
	t.count, t.logged = 0, now
	return n
}
