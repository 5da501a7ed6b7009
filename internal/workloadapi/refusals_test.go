package workloadapi

import (
	"fmt"
	"testing"
	"time"
)

// R104: the first at once, the rest as a number now and then, each kind apart.
func TestRefusalsDue(t *testing.T) {
	r := newRefusals()
	now := time.Now()
	a := refusal{1, "no_grant"}
	if r.due(a, now) != 1 || r.due(refusal{2, "no_grant"}, now) != 1 || r.due(refusal{1, "not_synced"}, now) != 1 {
		t.Error("the first of a kind is not logged")
	}
	for range 1000 {
		if n := r.due(a, now.Add(refusalEvery-1)); n != 0 {
			t.Fatalf("logged again, as %d", n)
		}
	}
	if n := r.due(a, now.Add(refusalEvery)); n != 1001 {
		t.Errorf("%d refusals are said, want 1001", n)
	}
	for i := range 10 * maxRefusals {
		r.due(refusal{int64(i), fmt.Sprint(i)}, now)
		if len(r.seen) > maxRefusals {
			t.Fatal("the table has no bound")
		}
	}
}
