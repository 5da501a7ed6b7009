package registry

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// populate makes n nodes with an entry each, an alias over every tenth of them
// and an entry below it, and an entry that federates with x.
func populate(h *history, n int) {
	var changes []store.Change
	for i := range n {
		node := agent(fmt.Sprint("a", i), fmt.Sprint("rack:", i/10), "all:yes")
		changes = append(changes, h.putNode(node)...)
		changes = append(changes, h.putEntry(grant(fmt.Sprint("e", i), node.ID.Path(), fmt.Sprint("/w", i), "u:1"))...)
		if i%10 == 0 {
			changes = append(changes, h.putEntry(grant(fmt.Sprint("alias", i/10), "/spire/server", fmt.Sprint("/rack", i/10), fmt.Sprint("rack:", i/10), "all:yes"))...)
			changes = append(changes, h.putEntry(grant(fmt.Sprint("below", i/10), fmt.Sprint("/rack", i/10), fmt.Sprint("/r", i/10), "u:1"))...)
		}
	}
	h.commit(changes...)
}

// The work of a change follows from the agents that it affects, not from what
// exists: ten times the trust domain, and not one visit more.
func TestWorkIsProportionalToAffected(t *testing.T) {
	x := spiffeid.RequireTrustDomainFromString("x")
	federating := func(h *history) []store.Change {
		e := grant("fed", "/rack0", "/fed", "u:1")
		e.FederatesWith = []spiffeid.TrustDomain{x}
		return h.putEntry(e)
	}
	steps := []struct {
		name     string
		affected int
		change   func(h *history) []store.Change
	}{
		{"create below one agent", 1, func(h *history) []store.Change { return h.putEntry(grant("new", "/spire/agent/a5", "/new", "u:1")) }},
		{"change it", 1, func(h *history) []store.Change {
			e := h.entries["new"]
			e.Hint = "h"
			return h.putEntry(e)
		}},
		{"delete it", 1, func(h *history) []store.Change { return h.deleteEntry("new") }},
		{"create below an alias", 10, func(h *history) []store.Change { return h.putEntry(grant("new", "/rack3", "/new", "u:1")) }},
		{"federate below an alias", 10, federating},
		{"the federated bundle", 10, func(h *history) []store.Change { return h.putBundle(&bundle.Bundle{TrustDomain: x, Sequence: 1}) }},
		{"a new alias", 10, func(h *history) []store.Change {
			return h.putEntry(grant("alias", "/spire/server", "/rack4", "rack:7", "all:yes"))
		}},
		{"delete the alias", 10, func(h *history) []store.Change { return h.deleteEntry("alias") }},
		{"an entry for nobody", 0, func(h *history) []store.Change { return h.putEntry(grant("none", "/nobody", "/none", "u:1")) }},
		{"another rack for a node", 1, func(h *history) []store.Change { return h.putNode(agent("a5", "rack:8", "all:yes")) }},
		{"a ban", 1, func(h *history) []store.Change { n := agent("a6"); n.Banned = true; return h.putNode(n) }},
	}
	visits := make(map[string][]int)
	for _, size := range []int{100, 1000} {
		h := newHistory(t)
		populate(h, size)
		for _, step := range steps {
			changes := step.change(h)
			touchedAgents := make(map[string]bool)
			s := h.r.state
			s.reach.visits = 0
			h.revision++
			s.apply(store.Batch{Position: store.Position{Revision: h.revision}, Writes: []store.Write{{Changes: changes}}},
				func(n *node, _ touched) { touchedAgents[n.path] = true }, func(store.Write) {})
			if len(touchedAgents) != step.affected {
				t.Errorf("%s: %d agents are affected, want %d", step.name, len(touchedAgents), step.affected)
			}
			visits[step.name] = append(visits[step.name], s.reach.visits)
		}
	}
	for _, step := range steps {
		small, big := visits[step.name][0], visits[step.name][1]
		if small != big {
			t.Errorf("%s: %d visits among 100 nodes, %d among 1,000", step.name, small, big)
		}
		if limit := 20 + 12*step.affected; big > limit {
			t.Errorf("%s: %d visits for %d affected agents, want at most %d", step.name, big, step.affected, limit)
		}
		t.Logf("%-26s %3d affected, %3d visits", step.name, step.affected, big)
	}
}

// E10, E11: a chain of a thousand grants below an alias, closed to a cycle, is
// followed to its end and ends.
func TestDeepChain(t *testing.T) {
	const depth = 1000
	h := newHistory(t)
	n := agent("a", "n:1")
	changes := append(h.putNode(n), h.putEntry(grant("alias", "/spire/server", "/d0", "n:1"))...)
	for i := range depth {
		changes = append(changes, h.putEntry(grant(fmt.Sprint("e", i), fmt.Sprint("/d", i), fmt.Sprint("/d", i+1), "u:1"))...)
	}
	changes = append(changes, h.putEntry(grant("back", fmt.Sprint("/d", depth), "/d0", "u:1"))...)
	h.mirrors[n.ID.Path()] = nil
	h.commit(changes...)
	h.check()

	f := h.r.Follow(n.ID, true)
	h.r.state.reach.visits = 0
	h.commit(h.putEntry(grant("end", fmt.Sprint("/d", depth), "/end", "u:1"))...)
	if v := h.r.state.reach.visits; v > 5*depth {
		t.Errorf("a change at the end of the chain took %d visits", v)
	}
	if d := f.Delta(); len(d.Bodies) != 1 || d.Hash != hashOf(h.holds(n.ID.Path())) {
		t.Errorf("%d bodies", len(d.Bodies))
	}
	// Without the alias the cycle still hangs together, but no agent reaches it.
	h.commit(h.deleteEntry("alias")...)
	h.check()
	h.commit(h.putEntry(grant("alias", "/spire/server", "/d500", "n:1"))...)
	h.check()
	h.commit(h.deleteEntry("back")...)
	h.check()
	if got := len(h.holds(n.ID.Path())); got != depth-500+1 {
		t.Errorf("the agent holds %d grants of the rest of the chain", got)
	}
}

// What a banned node could reach is what it reached: by its own path, by aliases that
// it shows all selectors of, and from there on.
func TestReachableOfABannedNode(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	node := agent("a", "x:rack:7", "x:row:1")
	update(t, r, func(tx *Tx) error {
		for _, e := range []entry.Entry{
			grant("own", "/spire/agent/a", "/own", "unix:uid:1"),
			grant("alias", "/spire/server", "/rack", "x:rack:7", "x:row:1"),
			grant("not", "/spire/server", "/other", "x:rack:7", "x:row:2"),
			grant("racked", "/rack", "/racked", "unix:uid:1"),
			grant("deep", "/racked", "/deep", "unix:uid:1"),
			grant("foreign", "/other", "/foreign", "unix:uid:1"),
		} {
			if err := tx.PutEntry(e); err != nil {
				return err
			}
		}
		return errors.Join(tx.PutNode(node), tx.PutNode(agent("b", "x:row:2")))
	})
	reachable := func(path string) (ids []string) {
		r.View(func(v *Snapshot) {
			for e := range v.Reachable(id(path)) {
				ids = append(ids, e.ID)
			}
		})
		slices.Sort(ids)
		return ids
	}
	want := []string{"deep", "own", "racked"}
	if got := reachable("/spire/agent/a"); !slices.Equal(got, want) {
		t.Errorf("Reachable() = %v, want %v", got, want)
	}
	node.Banned = true
	update(t, r, func(tx *Tx) error { return tx.PutNode(node) })
	if got := reachable("/spire/agent/a"); !slices.Equal(got, want) {
		t.Errorf("banned: Reachable() = %v, want %v", got, want)
	}
	if got := reachable("/spire/agent/none"); got != nil {
		t.Errorf("of nobody: %v", got)
	}
}
