package registry

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// olds begins the name of a follower that does not know rules; the agent's path follows.
const olds = "old"

// unstored returns a registry without a store; batches are folded by hand.
func unstored() *Registry {
	return &Registry{
		td: td, log: quiet(), state: newState(td), moved: make(chan struct{}),
		followers: make(map[string]map[*Follower]struct{}), woken: make(map[*Follower]struct{}),
	}
}

func sealed(t testing.TB, m proto.Message) []byte {
	t.Helper()
	raw, err := seal(m, oldestFormat)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// history is a trust domain written down twice: folded in a registry, and as
// plain lists from which everything is computed afresh.
type history struct {
	t         testing.TB
	r         *Registry
	revision  uint64
	entries   map[string]entry.Entry // and rules
	nodes     map[string]Node
	bundles   map[string]*bundle.Bundle
	bodies    map[Item][]byte   // what each would be sent as
	keys      map[string]uint64 // key -> revision
	followers map[string]*Follower
	mirrors   map[string]map[Item][]byte // what each agent was sent; below olds, one that knows no rules
}

func newHistory(t testing.TB) *history {
	return &history{t: t, r: unstored(), entries: make(map[string]entry.Entry), nodes: make(map[string]Node),
		bundles: make(map[string]*bundle.Bundle), bodies: make(map[Item][]byte), keys: make(map[string]uint64),
		followers: make(map[string]*Follower), mirrors: make(map[string]map[Item][]byte)}
}

// commit folds one batch of changes and notes them in the lists.
func (h *history) commit(changes ...store.Change) {
	h.revision++
	prev := h.r.Position()
	b := store.Batch{Prev: prev, Position: store.Position{Epoch: prev.Epoch, Revision: h.revision}}
	for _, c := range changes {
		b.Writes = append(b.Writes, store.Write{Changes: []store.Change{c}})
		if c.Deleted {
			delete(h.keys, c.Key)
		} else {
			h.keys[c.Key] = h.revision
		}
	}
	h.r.fold(b)
}

func (h *history) putEntry(e entry.Entry) []store.Change {
	if err := entry.Validate(td, &e, time.Time{}); err != nil {
		h.t.Fatal(err)
	}
	var changes []store.Change
	if old, ok := h.entries[e.ID]; ok {
		changes = h.dropContent(old)
	}
	e.Revision = h.revision + 1
	h.entries[e.ID] = e
	h.bodies[Item{Kind: ItemGrant, ID: e.ID}] = grantBody(&e)
	hash := entry.ContentHash(&e)
	return append(changes,
		store.Change{Key: keyOf(kindOf(&e), e.ID), Value: sealed(h.t, grantMessage(&e))},
		store.Change{Key: keyOf(kindContent, hex.EncodeToString(hash[:])), Value: sealed(h.t, &statev1.EntryContent{EntryId: e.ID})})
}

func (h *history) deleteEntry(id string) []store.Change {
	old := h.entries[id]
	delete(h.entries, id)
	return append(h.dropContent(old), store.Change{Key: keyOf(kindOf(&old), id), Deleted: true})
}

func (h *history) dropContent(e entry.Entry) []store.Change {
	hash := entry.ContentHash(&e)
	return []store.Change{{Key: keyOf(kindContent, hex.EncodeToString(hash[:])), Deleted: true}}
}

func (h *history) putNode(n Node) []store.Change {
	h.nodes[n.ID.Path()] = n
	return []store.Change{{Key: keyOf(kindNode, nodeName(n.ID.Path())), Value: sealed(h.t, nodeMessage(&n))}}
}

func (h *history) deleteNode(path string) []store.Change {
	delete(h.nodes, path)
	return []store.Change{{Key: keyOf(kindNode, nodeName(path)), Deleted: true}}
}

func (h *history) putBundle(b *bundle.Bundle) []store.Change {
	h.bundles[b.TrustDomain.Name()] = b
	h.bodies[Item{Kind: ItemBundle, ID: b.TrustDomain.Name()}] = bundleBody(b)
	return []store.Change{{Key: keyOf(kindBundle, b.TrustDomain.Name()), Value: sealed(h.t, bundleMessage(b))}}
}

func (h *history) deleteBundle(name string) []store.Change {
	delete(h.bundles, name)
	return []store.Change{{Key: keyOf(kindBundle, name), Deleted: true}}
}

// holds computes from the lists what an agent holds; nil if it is unknown or banned.
func (h *history) holds(path string) map[Item][]byte {
	path, old := strings.CutPrefix(path, olds)
	n, ok := h.nodes[path]
	if !ok || n.Banned {
		return nil
	}
	all := slices.Collect(maps.Values(h.entries))
	held := make(map[Item][]byte)
	domains := map[string]bool{td.Name(): true}
	given := entry.Entitled(all, entry.Node{ID: n.ID, Selectors: n.Selectors})
	for i := range all {
		if e := &all[i]; given[e.ID] {
			if item := (Item{Kind: ItemGrant, ID: e.ID}); e.Rule == nil || !old {
				held[item] = h.bodies[item]
			}
			for _, other := range e.FederatesWith {
				domains[other.Name()] = true
			}
		}
	}
	for name := range domains {
		if h.bundles[name] != nil {
			item := Item{Kind: ItemBundle, ID: name}
			held[item] = h.bodies[item]
		}
	}
	return held
}

func hashOf(held map[Item][]byte) [32]byte {
	var sum entry.Sum
	for _, body := range held {
		sum.Add(sumOf(body))
	}
	return sum.Bytes()
}

func equalHoldings(a, b map[Item][]byte) bool {
	return (a == nil) == (b == nil) && maps.EqualFunc(a, b, bytes.Equal)
}

// follow has each agent followed, and mirrored from now on.
func (h *history) follow(paths ...string) {
	for _, path := range paths {
		agent, old := strings.CutPrefix(path, olds)
		h.followers[path] = h.r.Follow(id(agent), !old)
		h.mirrors[path] = nil
		h.resync(path)
	}
}

func (h *history) resync(path string) {
	f := h.followers[path]
	inv := f.Inventory()
	if inv.Gone {
		h.mirrors[path] = nil
		return
	}
	var grants, domains []string
	for _, item := range inv.Items {
		if item.Kind == ItemGrant {
			grants = append(grants, item.ID)
		} else {
			domains = append(domains, item.ID)
		}
	}
	h.mirrors[path] = make(map[Item][]byte)
	for _, body := range f.Bodies(grants, domains) {
		h.receive(path, body)
	}
	for _, item := range inv.Items {
		body := h.mirrors[path][Item{Kind: item.Kind, ID: item.ID}]
		if fingerprint(sumOf(body)) != item.Fingerprint {
			h.t.Fatalf("the fingerprint of %v is not that of its body", item)
		}
	}
}

func (h *history) receive(path string, raw []byte) {
	var body syncv1.Body
	if err := proto.Unmarshal(raw, &body); err != nil {
		h.t.Fatal(err)
	}
	mirror := h.mirrors[path]
	switch b := body.Body.(type) {
	case *syncv1.Body_Grant:
		mirror[Item{Kind: ItemGrant, ID: b.Grant.Id}] = raw
	case *syncv1.Body_GrantRemoved:
		delete(mirror, Item{Kind: ItemGrant, ID: b.GrantRemoved})
	case *syncv1.Body_Bundle:
		mirror[Item{Kind: ItemBundle, ID: b.Bundle.TrustDomain}] = raw
	case *syncv1.Body_BundleRemoved:
		delete(mirror, Item{Kind: ItemBundle, ID: b.BundleRemoved})
	}
}

// woken reports whether an agent's follower was woken, and brings its mirror up to date.
func (h *history) woken(path string) bool {
	f := h.followers[path]
	select {
	case <-f.Wake():
	default:
		return false
	}
	switch d := f.Delta(); {
	case d.Gone:
		h.mirrors[path] = nil
	case d.Resync:
		h.resync(path)
	default:
		for _, body := range d.Bodies {
			h.receive(path, body)
		}
		if got := hashOf(h.mirrors[path]); got != d.Hash {
			h.t.Fatalf("%s holds %x after a delta that says %x", path, got, d.Hash)
		}
	}
	return true
}

// touched reports whether the last batch is remembered as one that affects an agent.
func (h *history) touched(path string) bool {
	for i := range h.r.touches.at(h.revision) {
		agents, err := h.r.Touched(Committed{h.r.Position(), i})
		if err != nil {
			h.t.Fatal(err)
		}
		if slices.Contains(agents, id(strings.TrimPrefix(path, olds))) {
			return true
		}
	}
	return false
}

// check compares everything that can be asked of the registry with the lists.
func (h *history) check() {
	t := h.t
	h.r.View(func(v *Snapshot) {
		var digest entry.Sum
		for key, rev := range h.keys {
			digest.Add(keyHash(key, rev))
		}
		if v.Digest() != digest.Bytes() {
			t.Fatal("the digest is not the sum over the keys")
		}
		for key, err := range v.Unreadable() {
			t.Fatalf("%s: %v", key, err)
		}
		for path := range h.mirrors {
			if strings.HasPrefix(path, olds) {
				continue
			}
			want := h.holds(path)
			got := make(map[string]uint64)
			for e := range v.Authorized(id(path)) {
				if _, twice := got[e.ID]; twice {
					t.Fatalf("%s is granted %s twice", path, e.ID)
				}
				got[e.ID] = e.Revision
			}
			for name, e := range h.entries {
				_, entitled := want[Item{Kind: ItemGrant, ID: name}]
				authorized := v.AuthorizedEntry
				rev, ok := got[name]
				if e.Rule != nil {
					if ok {
						t.Fatalf("the rule %s is among the entries of %s", name, path)
					}
					authorized = v.AuthorizedGrant
				} else if ok != entitled || ok && rev != e.Revision { // R46
					t.Fatalf("%s is granted %s: %v, the oracle says %v", path, name, ok, entitled)
				}
				if len(h.entries) > 100 { // each question walks all that the agent reaches
					continue
				}
				if _, ok := authorized(id(path), name); ok != entitled {
					t.Fatalf("authorized(%s, %s) = %v, the oracle says %v", path, name, ok, entitled)
				}
			}
			wantHash := [32]byte{}
			if want != nil {
				wantHash = hashOf(want)
			}
			if v.Hash(id(path)) != wantHash {
				t.Fatalf("the hash of %s is not that of what it holds", path)
			}
		}
	})
}

// TestHistories runs random histories of a small trust domain in which parents,
// aliases, chains and cycles are likely. After each batch every agent must have
// exactly what the oracle says, its hash must be the one computed afresh, and
// exactly those agents must have been woken whose holdings changed (RG16).
func TestHistories(t *testing.T) {
	histories, steps := 2000, 15
	if testing.Short() {
		histories = 200
	}
	agents := []string{"/spire/agent/a", "/spire/agent/b", "/spire/agent/c", "/spire/agent/d"}
	paths := []string{"/p", "/q", "/r", "/s", "/t"}
	parents := slices.Concat(agents, paths, paths, []string{"/spire/server", "/spire/server", "/spire/server"})
	domains := []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("x"), spiffeid.RequireTrustDomainFromString("y")}

	for seed := range histories {
		r := rand.New(rand.NewPCG(uint64(seed), 16))
		h := newHistory(t)
		pick := func() []entry.Selector {
			out := sel([]string{"n:1", "n:2", "n:3"}[r.IntN(3)])
			if r.IntN(2) == 0 {
				out, _ = entry.NormalizeSelectors(append(out, sel([]string{"n:1", "n:2", "n:3"}[r.IntN(3)])...))
			}
			return out
		}
		change := func() []store.Change {
			switch n := r.IntN(20); {
			case n < 10:
				e := entry.Entry{ID: fmt.Sprint("e", r.IntN(12)), ParentID: id(parents[r.IntN(len(parents))]), SPIFFEID: id(paths[r.IntN(len(paths))]),
					Selectors: pick(), Hint: fmt.Sprint(r.IntN(3)), CreatedAt: created}
				if r.IntN(4) == 0 {
					template := []string{"spiffe://td/u/{a.b}", "spiffe://td/u/{a.c}"}[r.IntN(2)]
					rule, err := entry.ParseRule(td, template, "", entry.TrustAgent)
					if err != nil || e.Alias() {
						return nil
					}
					e.ID, e.SPIFFEID, e.Rule = fmt.Sprint("r", r.IntN(4)), spiffeid.ID{}, rule
				}
				if old, ok := h.entries[e.ID]; ok && r.IntN(3) == 0 { // a change that moves nothing
					old.Hint = e.Hint
					e = old
				}
				if r.IntN(3) == 0 {
					e.FederatesWith = domains[:1+r.IntN(2)]
				}
				for _, other := range h.entries { // contents are unique
					if entry.ContentHash(&other) == entry.ContentHash(&e) && other.ID != e.ID {
						return nil
					}
				}
				if e.SPIFFEID == e.ParentID {
					return nil
				}
				return h.putEntry(e)
			case n < 13:
				if ids := slices.Sorted(maps.Keys(h.entries)); len(ids) > 0 {
					return h.deleteEntry(ids[r.IntN(len(ids))])
				}
				return nil
			case n < 17:
				node := agent(agents[r.IntN(len(agents))][len("/spire/agent/"):])
				node.Banned = r.IntN(6) == 0
				node.Current.Serial = fmt.Sprint(r.IntN(100)) // alone, a renewal
				if old, ok := h.nodes[node.ID.Path()]; ok && r.IntN(3) == 0 {
					node.Selectors, node.Banned = old.Selectors, old.Banned
				} else if r.IntN(4) > 0 {
					node.Selectors = pick()
				}
				return h.putNode(node)
			case n < 18:
				if ps := slices.Sorted(maps.Keys(h.nodes)); len(ps) > 0 {
					return h.deleteNode(ps[r.IntN(len(ps))])
				}
				return nil
			default:
				of := append(domains, td)[r.IntN(3)]
				if h.bundles[of.Name()] != nil && r.IntN(3) == 0 {
					return h.deleteBundle(of.Name())
				}
				return h.putBundle(&bundle.Bundle{TrustDomain: of, Sequence: uint64(r.IntN(3) + 1)})
			}
		}
		h.follow(agents...)
		h.follow(olds+agents[0], olds+agents[1])
		for step := range steps {
			before := make(map[string]map[Item][]byte)
			for path := range h.followers {
				before[path] = h.holds(path)
			}
			var changes []store.Change
			single, n := step > 0 && r.IntN(4) > 0, 1
			if step == 0 {
				n = 15 // something to begin with
			} else if !single {
				n = 4
			}
			seen := make(map[string]bool)
			for range n {
				for _, c := range change() {
					if seen[c.Key] { // later changes of one key win, as a list of distinct keys
						changes = slices.DeleteFunc(changes, func(o store.Change) bool { return o.Key == c.Key })
					}
					seen[c.Key] = true
					changes = append(changes, c)
				}
			}
			if len(changes) == 0 {
				continue
			}
			h.commit(changes...)
			h.check()
			for path := range h.followers {
				after := h.holds(path)
				changed, woken := !equalHoldings(before[path], after), h.woken(path)
				if touched := h.touched(path); touched != woken {
					t.Fatalf("RG16 seed %d step %d: %s is remembered as affected %v, woken %v", seed, step, path, touched, woken)
				}
				// One that knows no rules is woken for them all the same.
				if old := strings.HasPrefix(path, olds); changed && !woken || single && woken && !changed && !old {
					t.Fatalf("RG16 seed %d step %d: %s changed %v, woken %v", seed, step, path, changed, woken)
				}
				if !equalHoldings(h.mirrors[path], after) {
					t.Fatalf("RG16 seed %d step %d: %s holds something else than it should", seed, step, path)
				}
			}
		}
		if seed%10 == 0 {
			h.checkReload()
			h.checkEmptied()
		}
	}
}

// checkReload loads what is stored into a fresh state: it must be the same.
func (h *history) checkReload() {
	fresh := newState(td)
	for _, e := range h.entries {
		fresh.set(keyOf(kindOf(&e), e.ID), e.Revision, sealed(h.t, grantMessage(&e)), nil)
	}
	for path, n := range h.nodes {
		key := keyOf(kindNode, nodeName(path))
		fresh.set(key, h.keys[key], sealed(h.t, nodeMessage(&n)), nil)
	}
	for name, b := range h.bundles {
		key := keyOf(kindBundle, name)
		fresh.set(key, h.keys[key], sealed(h.t, bundleMessage(b)), nil)
	}
	for key, rev := range h.keys {
		if k, _ := split(key); k == kindContent {
			fresh.set(key, rev, sealed(h.t, &statev1.EntryContent{}), nil)
		}
	}
	if fresh.digest != h.r.state.digest {
		h.t.Fatal("a reload has another digest")
	}
	if len(fresh.orphans)+len(h.r.state.orphans) != 0 {
		h.t.Fatal("content keys are left without their entries")
	}
	for path := range h.nodes {
		f := Snapshot{fresh}
		g := Snapshot{h.r.state}
		if f.Hash(id(path)) != g.Hash(id(path)) {
			h.t.Fatalf("after a reload %s has another hash", path)
		}
	}
	for key, rev := range h.keys {
		if fresh.revision(key) != rev || h.r.state.revision(key) != rev {
			h.t.Fatalf("%s is at revision %d, %d after a reload, want %d", key, h.r.state.revision(key), fresh.revision(key), rev)
		}
	}
}

// checkEmptied deletes everything: nothing may be left behind.
func (h *history) checkEmptied() {
	for name := range h.entries {
		h.commit(h.deleteEntry(name)...)
	}
	for path := range h.nodes {
		h.commit(h.deleteNode(path)...)
	}
	for name := range h.bundles {
		h.commit(h.deleteBundle(name)...)
	}
	s := h.r.state
	left := map[string]int{
		"entries": s.rows.entries.n, "ids": s.rows.entries.table.n, "contents": s.rows.content.n, "order": len(s.rows.entries.order.blocks),
		"rules": s.rows.rules.n, "rule ids": s.rows.rules.table.n, "rule order": len(s.rows.rules.order.blocks),
		"paths": s.rows.paths.table.n, "words": s.rows.words.table.n, "sets": s.rows.sets.table.n, "selectors": s.rows.sets.texts.table.n,
		"groups": len(s.reach.groups), "aliases": len(s.reach.aliases), "filed": len(s.reach.filed), "showing": len(s.reach.showing),
		"at": len(s.reach.at), "naming": len(s.reach.naming), "nodes": len(s.nodes.byPath), "node order": len(s.nodes.order.blocks),
		"orphans": len(s.orphans), "bodies": len(s.bodies), "bad": len(s.bad), "keys": len(h.keys),
	}
	maps.DeleteFunc(left, func(_ string, n int) bool { return n == 0 })
	if len(left) > 0 || s.digest != (entry.Sum{}) {
		h.t.Fatalf("after everything was deleted there is left: %s", cmp.Diff(map[string]int{}, left))
	}
	for sym, head := range s.rows.named {
		if head != 0 {
			h.t.Fatalf("path %d still leads to an entry", sym)
		}
	}
}
