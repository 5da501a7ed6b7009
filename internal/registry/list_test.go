package registry

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// naive is what a filter means.
func naive(f Filter, e *entry.Entry) bool {
	set := func(m Match, have, want []string) bool {
		in := 0
		for _, v := range have {
			if slices.Contains(want, v) {
				in++
			}
		}
		return [...]bool{
			MatchExact:    in == len(have) && in == len(want),
			MatchSubset:   in == len(have) && in > 0,
			MatchSuperset: in == len(want),
			MatchAny:      in > 0,
		}[m]
	}
	texts := func(sels []entry.Selector) (out []string) {
		for _, s := range sels {
			out = append(out, s.String())
		}
		return out
	}
	return (f.SPIFFEID == nil || e.SPIFFEID == *f.SPIFFEID) &&
		(f.ParentID == nil || e.ParentID == *f.ParentID) &&
		(f.Selectors == nil || set(f.Selectors.Match, texts(e.Selectors), texts(f.Selectors.Selectors))) &&
		(f.FederatesWith == nil || set(f.FederatesWith.Match, names(e.FederatesWith), names(f.FederatesWith.Domains))) &&
		(f.Hint == nil || e.Hint == *f.Hint) &&
		(f.Owner == "" || e.Owner == f.Owner) &&
		(f.Downstream == nil || e.Downstream == *f.Downstream)
}

func TestFilters(t *testing.T) {
	r := rand.New(rand.NewPCG(86, 1))
	one := func(from ...string) string { return from[r.IntN(len(from))] }
	some := func(from ...string) []string {
		r.Shuffle(len(from), func(i, j int) { from[i], from[j] = from[j], from[i] })
		return from[:1+r.IntN(len(from))]
	}
	domains := func(names ...string) (out []spiffeid.TrustDomain) {
		slices.Sort(names)
		for _, name := range names {
			out = append(out, spiffeid.RequireTrustDomainFromString(name))
		}
		return out
	}
	for round := range 60 {
		h := newHistory(t)
		for i := range []int{0, 3, 40, 300}[round%4] {
			e := grant(fmt.Sprintf("e%03d", r.IntN(500)), one("/spire/agent/a", "/spire/agent/b", "/spire/server", "/p"), fmt.Sprint(one("/w", "/W", "/w/a", "/wa", "/"+fmt.Sprint(i))),
				some("s:1", "s:2", "s:3", "s:4")...)
			e.Owner = one("", "h", "shop")
			e.Hint, e.Downstream = one("", "h", "g"), !e.Alias() && r.IntN(4) == 0
			if r.IntN(2) == 0 {
				e.FederatesWith = domains(some("x", "y", "z")...)
			}
			h.commit(h.putEntry(e)...)
		}
		sorted := slices.SortedFunc(maps.Values(h.entries), func(a, b entry.Entry) int {
			if a.ID < b.ID {
				return -1
			}
			return 1
		})
		for range 60 {
			var f Filter
			if r.IntN(4) == 0 {
				path := id(one("/w", "/W", "/w/a", "/wa", "/none")) // S48, S49
				f.SPIFFEID = &path
			}
			if r.IntN(4) == 0 {
				parent := id(one("/spire/agent/a", "/spire/server", "/p", "/none"))
				f.ParentID = &parent
			}
			if r.IntN(3) == 0 {
				f.Selectors = &SelectorFilter{Match(r.IntN(4)), sel(some("s:1", "s:2", "s:3", "s:9")...)}
			}
			if r.IntN(3) == 0 {
				f.FederatesWith = &DomainFilter{Match(r.IntN(4)), domains(some("x", "y", "other")...)}
			}
			if r.IntN(4) == 0 {
				hint := one("", "h", "none")
				f.Hint = &hint
			}
			if r.IntN(4) == 0 {
				downstream := r.IntN(2) == 0
				f.Downstream = &downstream
			}
			if r.IntN(4) == 0 {
				f.Owner = one("h", "shop", "none")
			}
			var want []string
			for i := range sorted {
				if naive(f, &sorted[i]) {
					want = append(want, sorted[i].ID)
				}
			}
			h.r.View(func(v *Snapshot) {
				if got := v.Count(f); got != len(want) {
					t.Fatalf("round %d: Count(%+v) = %d, want %d", round, f, got, len(want))
				}
				var got []string
				for after, limit := "", r.IntN(5); ; {
					page := v.List(f, after, limit)
					for _, e := range page {
						got = append(got, e.ID)
					}
					if limit > 0 && len(page) > limit {
						t.Fatalf("a page of at most %d holds %d", limit, len(page))
					}
					if limit == 0 || len(page) < limit {
						break
					}
					after = page[len(page)-1].ID
				}
				if !slices.Equal(got, want) {
					t.Fatalf("round %d: List(%+v) = %v, want %v", round, f, got, want)
				}
			})
		}
	}
}

func TestForeignFilter(t *testing.T) {
	h := newHistory(t)
	h.commit(h.putEntry(grant("e", "/spire/agent/a", "/w", "u:1"))...)
	foreign := spiffeid.RequireFromString("spiffe://other/w")
	h.r.View(func(v *Snapshot) {
		if n := v.Count(Filter{SPIFFEID: &foreign}); n != 0 {
			t.Errorf("the ID of another trust domain finds %d entries", n)
		}
	})
}

// R86: what is there during a whole scan is listed exactly once, whatever comes
// and goes meanwhile; so it is for nodes.
func TestScanUnderWrites(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	const stable = 300
	put := func(name string) {
		update(t, r, func(tx *Tx) error {
			if err := tx.PutNode(agent(name)); err != nil {
				return err
			}
			return tx.PutEntry(grant(name, "/spire/agent/a", "/"+name, "u:1"))
		})
	}
	update(t, r, func(tx *Tx) error {
		for i := range stable {
			if err := tx.PutNode(agent(fmt.Sprintf("s%04d", i*10))); err != nil {
				return err
			}
			if err := tx.PutEntry(grant(fmt.Sprintf("s%04d", i*10), "/spire/agent/a", fmt.Sprint("/", i), "u:1")); err != nil {
				return err
			}
		}
		return nil
	})
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(86, uint64(w)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				name := fmt.Sprintf("s%04d", rnd.IntN(300)*10+1+w)
				put(name)
				update(t, r, func(tx *Tx) error {
					if err := tx.DeleteNode(id("/spire/agent/" + name)); err != nil {
						return err
					}
					return tx.DeleteEntry(name)
				})
			}
		})
	}
	began := time.Now()
	for scan := range 30 {
		entries, nodes := make(map[string]int), make(map[string]int)
		for after := ""; ; {
			var page []entry.Entry
			r.View(func(v *Snapshot) { page = v.List(Filter{}, after, 7) })
			if len(page) == 0 {
				break
			}
			for _, e := range page {
				entries[e.ID]++
			}
			after = page[len(page)-1].ID
		}
		for after := ""; ; {
			var last string
			r.View(func(v *Snapshot) {
				n := 0
				for node := range v.Nodes(after) {
					last = node.ID.String()
					nodes[last]++
					if n++; n == 7 {
						break
					}
				}
			})
			if last == "" {
				break
			}
			after = last
		}
		for i := range stable {
			name := fmt.Sprintf("s%04d", i*10)
			if entries[name] != 1 || nodes[id("/spire/agent/"+name).String()] != 1 {
				t.Fatalf("R86 scan %d: %s was listed %d times, its node %d times", scan, name, entries[name], nodes[id("/spire/agent/"+name).String()])
			}
		}
		for name, n := range entries {
			if n != 1 {
				t.Fatalf("R86 scan %d: %s was listed %d times", scan, name, n)
			}
		}
	}
	close(stop)
	writers.Wait()
	t.Logf("30 scans in %v", time.Since(began))
}
