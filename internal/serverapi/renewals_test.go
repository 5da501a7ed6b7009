package serverapi

import (
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// What was signed is remembered until it ends, or for as long as the server may
// go on without its store; the memory is bounded (R77).
func TestRenewals(t *testing.T) {
	r := newRenewals(time.Hour)
	agent := func(i int) spiffeid.ID {
		return spiffeid.RequireFromString(fmt.Sprint("spiffe://example.org/spire/agent/", i))
	}
	web, db := pairOf("web", nil), pairOf("db", nil)
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	r.note(agent(1), web, now.Add(5*time.Minute), now)
	r.note(agent(2), web, now.Add(5*time.Hour), now)
	for _, tt := range []struct {
		agent int
		what  pair
		after time.Duration
		want  bool
	}{
		{1, web, time.Hour - time.Second, true},
		{1, web, time.Hour, false},
		{2, web, 5*time.Hour - time.Second, true},
		{2, web, 5 * time.Hour, false},
		{1, db, 0, false},
		{3, web, 0, false},
		{1, pairOf("web", map[string]string{"unix.user": "a"}), 0, false},
	} {
		if got := r.has(agent(tt.agent), tt.what, now.Add(tt.after)); got != tt.want {
			t.Errorf("agent %d after %v: %v, want %v", tt.agent, tt.after, got, tt.want)
		}
	}
	r.max = 5000
	for i := range 3 * r.max { // all alive
		r.note(agent(i), db, now, now)
		if len(r.until) > r.max {
			t.Fatalf("%d pairs are remembered", len(r.until))
		}
		if !r.has(agent(i), db, now) {
			t.Fatalf("pair %d is not remembered", i)
		}
	}
	later := now.Add(24 * time.Hour) // all ended
	for i := range 3000 {
		r.note(agent(i), db, later, later)
	}
	if len(r.until) > 3000 {
		t.Errorf("%d pairs are remembered, and 3000 have not ended", len(r.until))
	}
}
