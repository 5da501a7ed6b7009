package entry

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func grant(name string, age time.Duration, texts ...string) Entry {
	return Entry{ID: name, SPIFFEID: id("/" + name), ParentID: id("/spire/agent/x"), Selectors: sels(texts...), CreatedAt: now.Add(-age)}
}

func TestMatch(t *testing.T) {
	old := grant("old", 3*time.Hour, "unix:uid:1")
	young := grant("young", time.Hour, "unix:uid:1", "unix:gid:2")
	miss := grant("miss", 2*time.Hour, "unix:uid:1", "unix:gid:9")
	far := grant("far", 2*time.Hour, "unix:uid:8", "unix:gid:9")
	ended := grant("ended", 9*time.Hour, "unix:uid:1")
	ended.ExpiresAt = now
	missEnded := grant("miss-ended", 9*time.Hour, "unix:uid:9")
	missEnded.ExpiresAt = now
	stored := grant("stored", 9*time.Hour, "unix:uid:1")
	stored.StoreSVID = true
	alias := grant("alias", 9*time.Hour, "unix:uid:1")
	alias.ParentID = id("/spire/server")
	none := grant("none", 9*time.Hour)
	younger := grant("younger", time.Minute, "unix:uid:1")
	old.Hint, younger.Hint = "h", "h"

	grants := []Entry{younger, young, miss, far, ended, missEnded, stored, alias, none, old}
	facts := Facts{Selectors: []Selector{{"unix", "uid:1"}, {"unix", "gid:2"}, {"unix", "uid:1"}, {"unix", "gid:3"}}}
	matched, trace := Match(grants, facts, now)

	wantMatched := []Matched{{GrantID: "old", ID: id("/old")}, {GrantID: "young", ID: id("/young")}} // oldest first (G10)
	same := cmp.Comparer(func(a, b Matched) bool { return a.GrantID == b.GrantID && a.ID == b.ID })
	if diff := cmp.Diff(wantMatched, matched, same); diff != "" {
		t.Errorf("Match(): %s", diff)
	}
	want := Trace{
		Matched:  wantMatched,
		Shadowed: []Shadowed{{Matched: Matched{GrantID: "younger", ID: id("/younger")}, Hint: "h", By: "old"}}, // E22
		Expired:  []string{"ended"},
		Near: []NearMiss{{GrantID: "miss", ID: id("/miss"), Missing: Selector{"unix", "gid:9"},
			Have: []Selector{{"unix", "gid:2"}, {"unix", "gid:3"}}}},
	}
	sameMiss := cmp.Comparer(func(a, b NearMiss) bool {
		return a.GrantID == b.GrantID && a.ID == b.ID && a.Missing == b.Missing && slices.Equal(a.Have, b.Have)
	})
	if diff := cmp.Diff(want, trace, same, sameMiss); diff != "" {
		t.Errorf("trace: %s", diff)
	}
}

func TestMatchTraceIsBounded(t *testing.T) {
	var grants []Entry
	for i := range 1000 {
		grants = append(grants, grant(fmt.Sprint("g", i), time.Hour, fmt.Sprint("unix:uid:", i+1)))
	}
	if _, trace := Match(grants, Facts{Selectors: sels("unix:uid:0")}, now); len(trace.Near) != maxNearMisses {
		t.Errorf("%d near misses, want %d", len(trace.Near), maxNearMisses)
	}
}

// R46, R47: over random grants and callers, a caller gets exactly what the
// definition says, and never more by showing less.
func TestMatchProperties(t *testing.T) {
	r := rand.New(rand.NewPCG(46, 47))
	pick := func(n int) []string {
		var out []string
		for range n {
			out = append(out, fmt.Sprintf("%c:%d", 'a'+rune(r.IntN(3)), r.IntN(3)))
		}
		return out
	}
	entitled := func(trace Trace) map[string]bool {
		ids := make(map[string]bool)
		for _, m := range trace.Matched {
			ids[m.GrantID] = true
		}
		for _, s := range trace.Shadowed {
			ids[s.GrantID] = true
		}
		return ids
	}
	for round := range 3000 {
		var grants []Entry
		for i := range r.IntN(12) {
			e := grant(fmt.Sprint("g", i), time.Duration(r.IntN(5))*time.Hour, pick(1+r.IntN(3))...)
			e.Selectors, _ = NormalizeSelectors(e.Selectors)
			e.Hint = []string{"", "", "h", "i"}[r.IntN(4)]
			if r.IntN(6) == 0 {
				e.ExpiresAt = now.Add(time.Duration(r.IntN(3)-1) * time.Hour)
			}
			grants = append(grants, e)
		}
		have := sels(pick(r.IntN(6))...)
		matched, trace := Match(grants, Facts{Selectors: have}, now)
		got := entitled(trace)

		for i := range grants { // the definition, by counting
			e, missing := &grants[i], 0
			for _, s := range e.Selectors {
				if !slices.Contains(have, s) {
					missing++
				}
			}
			if want := missing == 0 && !e.Expired(now); got[e.ID] != want {
				t.Fatalf("R46 round %d: grant %v with %v: matched %v, want %v", round, e, have, got[e.ID], want)
			}
			near := slices.ContainsFunc(trace.Near, func(n NearMiss) bool { return n.GrantID == e.ID })
			if want := missing == 1 && !e.Expired(now); near != want {
				t.Fatalf("round %d: grant %v with %v: near %v, want %v", round, e, have, near, want)
			}
		}
		hints := make(map[string]bool)
		for i, m := range matched {
			e := grants[slices.IndexFunc(grants, func(e Entry) bool { return e.ID == m.GrantID })]
			if e.Hint != "" && hints[e.Hint] {
				t.Fatalf("round %d: hint %q is handed out twice", round, e.Hint)
			}
			hints[e.Hint] = true
			if i > 0 {
				before := grants[slices.IndexFunc(grants, func(e Entry) bool { return e.ID == matched[i-1].GrantID })]
				if Oldest(&before, &e) >= 0 {
					t.Fatalf("round %d: %s stands before %s", round, before.ID, e.ID)
				}
			}
		}
		for i := range have {
			less := slices.Delete(slices.Clone(have), i, i+1)
			_, trace := Match(grants, Facts{Selectors: less}, now)
			for id := range entitled(trace) {
				if !got[id] {
					t.Fatalf("R47 round %d: without %v the caller gains %s", round, have[i], id)
				}
			}
		}
	}
}

func TestEntitled(t *testing.T) {
	node := Node{ID: id("/spire/agent/x"), Selectors: sels("a:1", "b:2")}
	e := func(name, parent, spiffeID string, texts ...string) Entry {
		return Entry{ID: name, ParentID: id(parent), SPIFFEID: id(spiffeID), Selectors: sels(texts...)}
	}
	entries := []Entry{
		e("direct", "/spire/agent/x", "/w", "u:1"),
		e("below", "/w", "/w2", "u:1"),
		e("deeper", "/w2", "/w3", "u:1"),
		e("other", "/spire/agent/y", "/o", "u:1"),
		e("below-other", "/o", "/o2", "u:1"),
		e("alias", "/spire/server", "/group", "a:1"),
		e("in-group", "/group", "/g", "u:1"),
		e("alias-miss", "/spire/server", "/group2", "a:1", "c:3"),
		e("in-group2", "/group2", "/g2", "u:1"),
		e("cycle-1", "/group", "/c", "u:1"), // E10
		e("cycle-2", "/c", "/group", "u:1"),
		e("prefix", "/grou", "/p", "u:1"), // S49
		e("case", "/Group", "/q", "u:1"),  // S48
	}
	want := map[string]bool{"direct": true, "below": true, "deeper": true, "in-group": true, "cycle-1": true, "cycle-2": true}
	if diff := cmp.Diff(want, Entitled(entries, node)); diff != "" {
		t.Errorf("Entitled(): %s", diff)
	}
}

// E11: a chain of a thousand grants ends, and is followed to its end.
func TestEntitledChain(t *testing.T) {
	var entries []Entry
	for i := range 1000 {
		parent := fmt.Sprint("/d", i-1)
		if i == 0 {
			parent = "/spire/agent/x"
		}
		entries = append(entries, Entry{ID: fmt.Sprint("e", i), ParentID: id(parent), SPIFFEID: id(fmt.Sprint("/d", i)), Selectors: sels("u:1")})
	}
	slices.Reverse(entries)
	if got := Entitled(entries, Node{ID: id("/spire/agent/x")}); len(got) != 1000 {
		t.Errorf("E11: %d of 1,000 grants reached", len(got))
	}
}

// R47 for nodes: an agent that loses a selector is never given more.
func TestEntitledIsMonotone(t *testing.T) {
	r := rand.New(rand.NewPCG(47, 1))
	paths := []string{"/a", "/b", "/c", "/d", "/e"}
	for round := range 2000 {
		var entries []Entry
		for i := range r.IntN(15) {
			parent := append(paths, "/spire/server", "/spire/server", "/spire/agent/x")[r.IntN(len(paths)+3)]
			e := Entry{ID: fmt.Sprint(i), ParentID: id(parent), SPIFFEID: id(paths[r.IntN(len(paths))])}
			e.Selectors, _ = NormalizeSelectors(sels(strings.Split("s:1 s:2 s:3", " ")[:1+r.IntN(3)]...))
			entries = append(entries, e)
		}
		have := sels("s:1", "s:2", "s:3")
		all := Entitled(entries, Node{ID: id("/spire/agent/x"), Selectors: have})
		for i := range have {
			less := slices.Delete(slices.Clone(have), i, i+1)
			for id := range Entitled(entries, Node{ID: id("/spire/agent/x"), Selectors: less}) {
				if !all[id] {
					t.Fatalf("round %d: without %v the agent gains %s", round, have[i], id)
				}
			}
		}
	}
}

// Both ways of saying what is missing agree, also of lists with something twice.
func TestSubset(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		list := func(most int) (out []Selector) {
			for range r.IntN(most) {
				out = append(out, Selector{Type: string(rune('a' + r.IntN(2))), Value: string(rune('a' + r.IntN(5)))})
			}
			slices.SortFunc(out, Selector.Compare)
			return out
		}
		required, have := list(4), list(12)
		want := slices.IndexFunc(required, func(s Selector) bool { return !slices.Contains(have, s) })
		if want < 0 {
			want = len(required)
		}
		if got := firstMissing(required, have); got != want || Subset(required, have) != (want == len(required)) {
			t.Fatalf("firstMissing(%v, %v) = %d, want %d", required, have, got, want)
		}
	}
}

// R98: what a trace holds does not grow with what a caller shows.
func TestSameKindIsBounded(t *testing.T) {
	var have []Selector
	for i := range 1000 {
		have = append(have, Selector{Type: "k8s", Value: fmt.Sprintf("pod-label:k%03d:v", i)})
	}
	if got := SameKind(Selector{Type: "k8s", Value: "pod-label:x:y"}, have); len(got) != maxSameKind || got[0] != have[0] {
		t.Errorf("%d of a kind", len(got))
	}
}
