package registry

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Each change is remembered with exactly the agents that it affects.
func TestTouched(t *testing.T) {
	partner := spiffeid.RequireTrustDomainFromString("partner")
	h := newHistory(t)
	for name, selector := range map[string]string{"a": "rack:1", "b": "rack:1", "c": "rack:2"} {
		h.commit(h.putNode(agent(name, selector))...)
	}
	alias := grant("alias", "/spire/server", "/rack", "rack:1")
	for _, step := range []struct {
		name   string
		change func() []store.Change
		want   string
	}{
		{"an entry below one agent", func() []store.Change { return h.putEntry(grant("one", "/spire/agent/a", "/one", "u:1")) }, "[a]"},
		{"an entry below no agent", func() []store.Change { return h.putEntry(grant("shared", "/rack", "/shared", "u:1")) }, "[]"},
		{"an alias to it", func() []store.Change { return h.putEntry(alias) }, "[a b]"},
		{"change the entry", func() []store.Change {
			e := h.entries["shared"]
			e.FederatesWith = []spiffeid.TrustDomain{partner}
			return h.putEntry(e)
		}, "[a b]"},
		{"the bundle that it names", func() []store.Change { return h.putBundle(&bundle.Bundle{TrustDomain: partner, Sequence: 1}) }, "[a b]"},
		{"the same bundle again", func() []store.Change { return h.putBundle(h.bundles["partner"]) }, "[]"},
		{"the own bundle", func() []store.Change { return h.putBundle(&bundle.Bundle{TrustDomain: td, Sequence: 1}) }, "[a b c]"},
		{"move the alias", func() []store.Change {
			moved := alias
			moved.Selectors = sel("rack:2")
			return h.putEntry(moved)
		}, "[a b c]"},
		{"a renewal", func() []store.Change {
			n := agent("c", "rack:2")
			n.Current.Serial = "7"
			return h.putNode(n)
		}, "[]"},
		{"an agent that shows other selectors", func() []store.Change { return h.putNode(agent("b", "rack:2")) }, "[b]"},
		{"a ban", func() []store.Change {
			n := agent("c", "rack:2")
			n.Banned = true
			return h.putNode(n)
		}, "[c]"},
		{"for the rest", func() []store.Change { e := h.entries["shared"]; e.Hint = "h"; return h.putEntry(e) }, "[b]"},
		{"delete the entry", func() []store.Change { return h.deleteEntry("shared") }, "[b]"},
		{"forget the banned agent", func() []store.Change { return h.deleteNode("/spire/agent/c") }, "[]"},
		{"forget an agent", func() []store.Change { return h.deleteNode("/spire/agent/a") }, "[a]"},
	} {
		changes := step.change()
		h.revision++
		at := store.Position{Revision: h.revision}
		h.r.fold(store.Batch{Prev: h.r.Position(), Position: at, Writes: []store.Write{{Changes: changes}}})
		if got := touchedNames(t, h.r, Committed{Position: at}); got != step.want {
			t.Errorf("%s: affects %s, want %s", step.name, got, step.want)
		}
	}
}

func touchedNames(t *testing.T, r *Registry, c Committed) string {
	t.Helper()
	agents, err := r.Touched(c)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, id := range agents {
		names = append(names, id.Path()[len("/spire/agent/"):])
	}
	slices.Sort(names)
	return fmt.Sprint(names)
}

// Transactions that share a batch are told apart.
func TestTouchedByOneOfABatch(t *testing.T) {
	st := openStore(t, t.TempDir())
	r := start(t, st)
	const n = 200
	for i := range n {
		update(t, r, func(tx *Tx) error { return tx.PutNode(agent(fmt.Sprint(i))) })
	}
	var wait sync.WaitGroup
	for i := range n {
		wait.Go(func() {
			var made []Committed
			ctx := Noting(t.Context(), func(c Committed) { made = append(made, c) })
			_, err := r.Update(ctx, "test", func(tx *Tx) error {
				return tx.PutEntry(grant(fmt.Sprint("e", i), fmt.Sprint("/spire/agent/", i), "/x", "u:1"))
			})
			if err != nil || len(made) != 1 {
				t.Errorf("Update() = %v, noted %v", err, made)
				return
			}
			if got, want := touchedNames(t, r, made[0]), fmt.Sprintf("[%d]", i); got != want {
				t.Errorf("%v affects %s, want %s", made[0], got, want)
			}
		})
	}
	wait.Wait()

	// Nothing written, nothing noted.
	ctx := Noting(t.Context(), func(c Committed) { t.Errorf("noted %v", c) })
	if _, err := r.Update(ctx, "test", func(*Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

// What is remembered has a bound, and what is not is said to be unknown.
func TestTouchedIsBounded(t *testing.T) {
	h := newHistory(t)
	h.commit(h.putNode(agent("a"))...)
	for i := range keptBatches + 10 {
		h.commit(h.putBundle(&bundle.Bundle{TrustDomain: td, Sequence: uint64(i + 1)})...)
	}
	at := func(revision uint64) Committed {
		return Committed{Position: store.Position{Revision: revision}}
	}
	if n := len(h.r.touches.batches); n != keptBatches {
		t.Errorf("%d batches are kept, want %d", n, keptBatches)
	}
	for name, c := range map[string]Committed{
		"too old": at(11), "not yet": at(h.revision + 1), "another epoch": {Position: store.Position{Epoch: store.NewEpoch(), Revision: h.revision}},
	} {
		_, err := h.r.Touched(c)
		if fault.ReasonOf(err) != "receipt_unknown" {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, revision := range []uint64{12, h.revision} {
		if got := touchedNames(t, h.r, at(revision)); got != "[a]" {
			t.Errorf("revision %d affects %s", revision, got)
		}
	}
	h.r.replace(h.r.state) // as after a gap in the log
	if _, err := h.r.Touched(at(h.revision)); fault.ReasonOf(err) != "receipt_unknown" {
		t.Errorf("after loading afresh: %v", err)
	}
}

func TestTouchesOfManyAgentsAreBounded(t *testing.T) {
	var many touches
	agents := make([]node, 1<<16)
	for i := range agents {
		agents[i].path = fmt.Sprint("/spire/agent/", i)
	}
	for revision := range uint64(40) {
		for i := range agents {
			many.add(&agents[i])
			many.add(&agents[i])
		}
		many.wrote(store.Write{})
		many.folded(revision + 1)
	}
	if many.agents > keptTouches || len(many.batches) != keptTouches/len(agents) || many.after != 40-uint64(len(many.batches)) {
		t.Errorf("%d agents in %d batches after %d", many.agents, len(many.batches), many.after)
	}
}

func FuzzParseCommitted(f *testing.F) {
	f.Add(Committed{Position: store.Position{Epoch: store.NewEpoch(), Revision: 42}, Write: 3}.String())
	for _, text := range []string{"", "..", "00.1.1", "00000000000000000000000000000000.1.-1", "00000000000000000000000000000000.+1.1"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if c, err := ParseCommitted(text); err == nil && (c.String() != text || c.Write < 0) {
			t.Errorf("%q is read as %v", text, c)
		}
	})
}
