package registry

import (
	"fmt"
	"testing"
	"unsafe"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
)

func quietWake(t *testing.T, f *Follower) {
	t.Helper()
	select {
	case <-f.Wake():
		t.Fatal("the follower was woken")
	default:
	}
}

func woken(t *testing.T, f *Follower) {
	t.Helper()
	select {
	case <-f.Wake():
	default:
		t.Fatal("the follower was not woken")
	}
}

func bodyOf(t *testing.T, raw []byte) *syncv1.Body {
	t.Helper()
	var b syncv1.Body
	if err := proto.Unmarshal(raw, &b); err != nil {
		t.Fatal(err)
	}
	return &b
}

// One change for many agents is marshalled once: all get the very same bytes.
func TestBodiesAreShared(t *testing.T) {
	h := newHistory(t)
	var followers []*Follower
	var changes []store.Change
	for i := range 100 {
		n := agent(fmt.Sprint("a", i), "n:1")
		changes = append(changes, h.putNode(n)...)
		followers = append(followers, h.r.Follow(n.ID, true))
	}
	changes = append(changes, h.putEntry(grant("alias", "/spire/server", "/all", "n:1"))...)
	h.commit(changes...)
	for _, f := range followers {
		f.Inventory()
	}
	h.commit(h.putEntry(grant("before", "/all", "/b", "u:1"))...)
	for _, f := range followers {
		woken(t, f)
		f.Inventory() // instead of a delta: it says all, and nothing is pending any more
		if d := f.Delta(); len(d.Bodies) != 0 {
			t.Fatalf("after an inventory %d bodies are pending", len(d.Bodies))
		}
	}
	partner := spiffeid.RequireTrustDomainFromString("partner")
	e := grant("e", "/all", "/w", "u:1")
	e.FederatesWith = []spiffeid.TrustDomain{partner}
	h.commit(append(append(h.putEntry(e), h.putBundle(&bundle.Bundle{TrustDomain: td, Sequence: 1})...),
		h.putBundle(&bundle.Bundle{TrustDomain: partner, Sequence: 1})...)...)

	var first [][]byte
	for i, f := range followers {
		woken(t, f)
		d := f.Delta()
		if len(d.Bodies) != 3 {
			t.Fatalf("follower %d got %d bodies, want the grant and two bundles", i, len(d.Bodies))
		}
		if i == 0 {
			first = d.Bodies
		}
		for j, body := range d.Bodies {
			if unsafe.SliceData(body) != unsafe.SliceData(first[j]) {
				t.Fatalf("follower %d has its own copy of body %d", i, j)
			}
		}
	}
	// Removals are shared, too.
	h.commit(h.deleteEntry("e")...)
	a, b := followers[0].Delta(), followers[1].Delta()
	if len(a.Bodies) != 2 || len(b.Bodies) != 2 || unsafe.SliceData(a.Bodies[0]) != unsafe.SliceData(b.Bodies[0]) {
		t.Fatalf("%d and %d bodies, want one shared removal of the grant and one of the bundle", len(a.Bodies), len(b.Bodies))
	}
	if got := bodyOf(t, a.Bodies[0]).GetGrantRemoved(); got != "e" {
		t.Errorf("the first body removes grant %q", got)
	}
	if got := bodyOf(t, a.Bodies[1]).GetBundleRemoved(); got != "partner" {
		t.Errorf("the second body removes bundle %q", got)
	}
}

func TestDeltaChains(t *testing.T) {
	h := newHistory(t)
	n := agent("a", "n:1")
	h.commit(h.putNode(n)...)
	f := h.r.Follow(n.ID, true)
	at := f.Delta()
	if at.Position != h.r.Position() || at.Hash != hashOf(h.holds(n.ID.Path())) || len(at.Bodies) != 0 {
		t.Fatalf("the first Delta() = %+v", at)
	}
	for i := range 5 {
		h.commit(h.putEntry(grant(fmt.Sprint("e", i), "/spire/agent/a", fmt.Sprint("/w", i), "u:1"))...)
		h.commit(h.putEntry(grant("other", "/spire/agent/b", fmt.Sprint("/w", i), "u:1"))...)
		d := f.Delta()
		if d.Previous != at.Position || d.Position != h.r.Position() || len(d.Bodies) != 1 {
			t.Fatalf("Delta() = %+v, want one body from %v to %v", d, at.Position, h.r.Position())
		}
		if g := bodyOf(t, d.Bodies[0]).GetGrant(); g.GetId() != fmt.Sprint("e", i) || g.GetRevision() != h.entries[g.GetId()].Revision {
			t.Fatalf("the body is of %v", g)
		}
		at = d
	}
	// Many changes of one item are one body, and a slow follower holds no more than a mark.
	for range 50 {
		e := h.entries["e0"]
		e.Hint += "h"
		h.commit(h.putEntry(e)...)
	}
	if d := f.Delta(); len(d.Bodies) != 1 || len(bodyOf(t, d.Bodies[0]).GetGrant().GetHint()) != 50 {
		t.Errorf("50 changes of one entry are %d bodies", len(d.Bodies))
	}
}

func TestPendingIsBounded(t *testing.T) {
	for name, one := range map[string]bool{"one by one": true, "one alias": false} {
		t.Run(name, func(t *testing.T) {
			h := newHistory(t)
			n := agent("a", "n:1")
			h.commit(h.putNode(n)...)
			parent := "/group"
			if one {
				parent = "/spire/agent/a"
			}
			f := h.r.Follow(n.ID, true)
			for i := range maxPending + 1 {
				if one && i == maxPending {
					if f.resync || len(f.pending) != maxPending {
						t.Fatalf("after %d changes %d are pending, resync %v", i, len(f.pending), f.resync)
					}
				}
				h.commit(h.putEntry(grant(fmt.Sprint("e", i), parent, fmt.Sprint("/w", i), "u:1"))...)
			}
			if !one {
				quietWake(t, f)
				h.commit(h.putEntry(grant("alias", "/spire/server", "/group", "n:1"))...)
			}
			woken(t, f)
			if d := f.Delta(); !d.Resync || len(d.Bodies) != 0 || len(f.pending) != 0 {
				t.Fatalf("Delta() asks for a resync: %v; %d bodies, %d pending", d.Resync, len(d.Bodies), len(f.pending))
			}
			inv := f.Inventory()
			if len(inv.Items) != maxPending+1 || inv.Hash != hashOf(h.holds(n.ID.Path())) {
				t.Fatalf("%d items in the inventory", len(inv.Items))
			}
			if d := f.Delta(); len(d.Bodies) != 0 || d.Previous != inv.Position {
				t.Errorf("what the inventory said is said again: %d bodies", len(d.Bodies))
			}
			h.commit(h.putEntry(grant("last", parent, "/last", "u:1"))...)
			if d := f.Delta(); d.Resync || len(d.Bodies) != 1 || d.Previous != inv.Position {
				t.Errorf("after the inventory Delta() = resync %v, %d bodies from %v", d.Resync, len(d.Bodies), d.Previous)
			}
		})
	}
}

// R30: a ban or a deletion ends what an agent gets, at once; a return begins anew.
func TestGone(t *testing.T) {
	for name, end := range map[string]func(*history, Node) []store.Change{
		"ban":    func(h *history, n Node) []store.Change { n.Banned = true; return h.putNode(n) },
		"delete": func(h *history, n Node) []store.Change { return h.deleteNode(n.ID.Path()) },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHistory(t)
			n := agent("a", "n:1")
			h.commit(append(h.putNode(n), h.putEntry(grant("e", "/spire/agent/a", "/w", "u:1"))...)...)
			f := h.r.Follow(n.ID, true)
			f.Inventory()
			h.commit(end(h, n)...)
			woken(t, f)
			if d := f.Delta(); !d.Gone || len(d.Bodies) != 0 || d.Hash != ([32]byte{}) {
				t.Errorf("Delta() = %+v", d)
			}
			if inv := f.Inventory(); !inv.Gone || len(inv.Items) != 0 {
				t.Errorf("Inventory() = %+v", inv)
			}
			if bodies := f.Bodies([]string{"e"}, []string{"td"}); len(bodies) != 0 {
				t.Errorf("Bodies() = %d bodies", len(bodies))
			}
			h.r.View(func(v *Snapshot) {
				if _, ok := v.AuthorizedEntry(n.ID, "e"); ok {
					t.Error("the agent is still granted its entry")
				}
				for range v.Authorized(n.ID) {
					t.Error("the agent is still granted an entry")
				}
			})
			h.commit(h.putEntry(grant("e2", "/spire/agent/a", "/w2", "u:1"))...)
			quietWake(t, f) // nothing more is for it
			h.commit(h.putNode(n)...)
			woken(t, f)
			if d := f.Delta(); !d.Resync || d.Gone {
				t.Errorf("after its return Delta() = %+v", d)
			}
		})
	}
	t.Run("unknown", func(t *testing.T) {
		if d := newHistory(t).r.Follow(id("/spire/agent/a"), true).Delta(); !d.Gone {
			t.Errorf("Delta() of an unknown agent = %+v", d)
		}
	})
}

func TestCloseFollower(t *testing.T) {
	h := newHistory(t)
	a, b := h.r.Follow(id("/spire/agent/a"), true), h.r.Follow(id("/spire/agent/a"), true)
	a.Close()
	a.Close()
	h.commit(h.putNode(agent("a"))...)
	quietWake(t, a)
	woken(t, b)
	b.Close()
	if len(h.r.followers) != 0 {
		t.Errorf("%d followers are left", len(h.r.followers))
	}
}

// What an agent asks for is answered only if it is granted (R46).
func TestBodiesOfOthers(t *testing.T) {
	h := newHistory(t)
	h.commit(append(append(h.putNode(agent("a")), h.putEntry(grant("mine", "/spire/agent/a", "/w", "u:1"))...),
		append(h.putEntry(grant("theirs", "/spire/agent/b", "/w2", "u:1")), h.putBundle(&bundle.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("x")})...)...)...)
	f := h.r.Follow(id("/spire/agent/a"), true)
	bodies := f.Bodies([]string{"theirs", "mine", "none"}, []string{"x", "td", "none"})
	if len(bodies) != 1 || bodyOf(t, bodies[0]).GetGrant().GetId() != "mine" {
		t.Errorf("%d bodies, want the agent's own grant alone", len(bodies))
	}
}

// A body holds every field of an entry or of a rule, and of a bundle.
func TestBodyIsComplete(t *testing.T) {
	e := grant("e", "/spire/agent/a", "/w", "u:1", "u:2")
	e.Revision, e.X509TTL, e.JWTTL = 7, 1e9, 2e9
	e.FederatesWith, e.DNSNames, e.Hint = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("x")}, []string{"d.org"}, "h"
	e.Admin, e.Downstream, e.StoreSVID, e.DisableX509Prefetch, e.JWTIncludeJTI = true, true, true, true, true
	e.ExpiresAt, e.Owner = created.Add(1e9), "o"
	b := bundle.Bundle{TrustDomain: td, Sequence: 1, RefreshHint: 1e9, X509: []bundle.X509Authority{{ASN1: []byte{1}, Tainted: true}},
		JWT: []bundle.JWTAuthority{{KeyID: "k", PublicKey: []byte{1}, ExpiresAt: created, Tainted: true}}}
	grantMessage, bundleMessage := bodyOf(t, grantBody(&e)).GetGrant(), bodyOf(t, bundleBody(&b)).GetBundle()
	// What is a rule's own is written for one, and for nothing else.
	ruled := rule(t, "r", "/spire/agent/a", "spiffe://td/u/{a.b}", "u:1")
	ruleBody := bodyOf(t, grantBody(&ruled)).GetGrant()
	if grantMessage.IdTemplate+grantMessage.IdPrefix+grantMessage.Trust+ruleBody.SpiffeId != "" {
		t.Errorf("an entry's body: %v; a rule's: %v", grantMessage, ruleBody)
	}
	grantMessage.IdTemplate, grantMessage.IdPrefix, grantMessage.Trust = ruleBody.IdTemplate, ruleBody.IdPrefix, ruleBody.Trust
	ruled.X509TTL, ruled.JWTTL, ruled.FederatesWith, ruled.Hint, ruled.ExpiresAt, ruled.Owner = e.X509TTL, e.JWTTL, e.FederatesWith, e.Hint, e.ExpiresAt, e.Owner
	for _, m := range []proto.Message{ruleMessage(&ruled), grantMessage, bundleMessage, bundleMessage.X509Authorities[0], bundleMessage.JwtAuthorities[0], entryMessage(&e)} {
		fields := m.ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			if !m.ProtoReflect().Has(fields.Get(i)) {
				t.Errorf("%s is not written", fields.Get(i).FullName())
			}
		}
	}
}
