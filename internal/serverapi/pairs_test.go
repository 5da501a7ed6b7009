package serverapi

import (
	"fmt"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestPairsAreBounded(t *testing.T) {
	p := newPairs(3)
	one, other := spiffeid.RequireFromString("spiffe://td/spire/agent/1"), spiffeid.RequireFromString("spiffe://td/spire/agent/2")
	now := time.Unix(1e9, 0)
	user := func(name string) pair { return pairOf("r", map[string]string{"unix.user": name}) }
	take := func(agent spiffeid.ID, what pair, life time.Duration, reason string) {
		t.Helper()
		err := p.take(agent, what, now.Add(life), now)
		if err == nil && reason != "" || err != nil && (fault.ReasonOf(err) != reason || fault.KindOf(err) != fault.Exhausted) {
			t.Errorf("take() = %v, want %q", err, reason)
		}
	}
	take(one, user("a"), time.Hour, "")
	take(one, user("b"), time.Minute, "")
	take(one, user("c"), time.Hour, "")
	take(one, user("d"), time.Hour, "rule_pairs_exhausted")
	take(one, pairOf("r2", map[string]string{"unix.user": "a"}), time.Hour, "rule_pairs_exhausted")
	take(one, user("a"), time.Hour, "")                     // renewed
	take(one, user("a"), time.Second, "")                   // an SVID that ends earlier does not free the pair
	take(other, user("d"), time.Hour, "")                   // its neighbour has room of its own
	now = now.Add(time.Minute)                              // b has ended
	take(one, user("d"), 2*time.Hour, "")                   //
	take(one, user("b"), time.Hour, "rule_pairs_exhausted") //
	now = now.Add(61 * time.Minute)                         // all but d
	take(one, user("e"), time.Hour, "")                     //
	if len(p.until) != 1 || len(p.until[one]) != 2 {        // nothing is kept of what has ended
		t.Errorf("held: %v", p.until)
	}
	now = now.Add(-24 * time.Hour) // the clock is put back (R107): what lives goes on living
	take(one, user("f"), time.Hour, "")
	take(one, user("g"), time.Hour, "rule_pairs_exhausted")
}

// Different rules and facts are different pairs, whatever characters they hold.
func TestPairOfIsInjective(t *testing.T) {
	seen := map[pair]string{}
	for rule, all := range map[string][]map[string]string{
		"r":  {{}, {"a.b": "c"}, {"a.b": "cd.e"}, {"a.b": "c", "d.e": ""}, {"a.b": "c", "d.e": "f"}, {"a.b": "cd", "e": "f"}},
		"ra": {{}, {".b": "c"}, {"a.b": "c"}},
	} {
		for _, facts := range all {
			text := fmt.Sprint(rule, facts)
			if was, again := seen[pairOf(rule, facts)]; again {
				t.Errorf("%s and %s are one pair", text, was)
			}
			seen[pairOf(rule, facts)] = text
		}
	}
}
