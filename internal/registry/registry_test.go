package registry

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("td")
	created = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	same    = cmp.Options{
		cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }),
		cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b }),
	}
)

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func sel(texts ...string) []entry.Selector {
	var out []entry.Selector
	for _, text := range texts {
		s, err := entry.ParseSelector(text)
		if err != nil {
			panic(err)
		}
		out = append(out, s)
	}
	slices.SortFunc(out, entry.Selector.Compare)
	return out
}

func grant(name, parent, path string, texts ...string) entry.Entry {
	return entry.Entry{ID: name, ParentID: id(parent), SPIFFEID: id(path), Selectors: sel(texts...), CreatedAt: created}
}

func rule(t testing.TB, name, parent, template string, texts ...string) entry.Entry {
	t.Helper()
	r, err := entry.ParseRule(td, template, "", entry.TrustAgent)
	if err != nil {
		t.Fatal(err)
	}
	return entry.Entry{ID: name, ParentID: id(parent), Rule: r, Selectors: sel(texts...), CreatedAt: created}
}

func agent(name string, texts ...string) Node {
	return Node{ID: id("/spire/agent/" + name), AttestationType: "test", Selectors: sel(texts...), AttestedAt: created,
		Current: Credential{Serial: "7", ExpiresAt: created, KeyHash: []byte{1}}}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func openStore(t testing.TB, dir string) *sqlite.Store {
	t.Helper()
	st, err := sqlite.Config{Dir: dir}.Open(t.Context(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return st
}

// start opens a registry over a store and runs it until the test ends.
func start(t testing.TB, st store.Store) *Registry {
	t.Helper()
	r, err := Open(t.Context(), st, td, quiet())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return r
}

func update(t testing.TB, r *Registry, f func(*Tx) error) store.Position {
	t.Helper()
	p, err := r.Update(t.Context(), "test", f)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestUpdateAndView(t *testing.T) {
	dir := t.TempDir()
	st := openStore(t, dir)
	r := start(t, st)
	fed := spiffeid.RequireTrustDomainFromString("partner")
	e := entry.Entry{
		ID: "e1", ParentID: id("/spire/agent/a"), SPIFFEID: id("/web"), Selectors: sel("unix:uid:1", "unix:gid:2"),
		X509TTL: time.Hour, JWTTL: time.Minute, FederatesWith: []spiffeid.TrustDomain{fed}, DNSNames: []string{"b.org", "a.org"},
		Hint: "main", Admin: true, Downstream: true, DisableX509Prefetch: true, JWTIncludeJTI: true,
		CreatedAt: created, ExpiresAt: created.Add(time.Hour), Owner: "shop",
	}
	n := agent("a", "n:1")
	n.Next = Credential{Serial: "8", ExpiresAt: created.Add(time.Hour), KeyHash: []byte{2}}
	n.Lineage, n.CanReattest, n.AgentVersion, n.Evidence, n.Follows = []byte{3}, true, "1.0", []byte{4}, true
	b := &bundle.Bundle{TrustDomain: td, Sequence: 3, RefreshHint: time.Minute,
		X509: []bundle.X509Authority{{ASN1: []byte{1}, Tainted: true}},
		JWT:  []bundle.JWTAuthority{{KeyID: "k", PublicKey: []byte{2}, ExpiresAt: created}}}
	tok := Token{Hash: []byte{1, 2}, ExpiresAt: created, Consumer: []byte{3}, NodeID: "x", Epoch: r.Position().Epoch}
	auth := Authority{Server: "s1", Kind: "x509", Slots: []Slot{{Name: "A", State: SlotActive, AuthorityID: "i", KeyID: "k",
		NotBefore: created, NotAfter: created, Certificate: []byte{1}, PublicKey: []byte{2}, PublishedAt: created, LastExpiry: created,
		Upstream: true, Chain: [][]byte{{3}, {4}}, Root: []byte{5}, Given: [][]byte{{6}}}}}
	down := Downstream{Serial: "7", Caller: "spiffe://example.org/s", EntryID: "e1", Server: "s1", Issuer: "i", AuthorityID: "d", KeyHash: []byte{8}, NotAfter: created}
	srv := Server{ID: "s1", Version: "v", StartedAt: created,
		Instance: []byte{9}, Beat: 7, BeatAt: created.Add(5 * time.Millisecond), Lease: time.Hour, Stopped: true, Up: time.Minute, Reads: Format,
		Place:    Place{Host: "h", DataDir: "/d", BootID: "b", Device: 1, Inode: 2},
		Position: store.Position{Epoch: r.Position().Epoch, Revision: 3}, Digest: [32]byte{4}, Addresses: []string{"h:1"},
		Agents: 5, Acknowledged: 6, Laggards: []Laggard{{Agent: "spiffe://example.org/spire/agent/a", Acknowledged: 2}},
		Ends: Ends{Telling: 3, X509: End{"spiffe://example.org/a", "spiffe://example.org/spire/agent/a", created.Add(time.Millisecond)}}, Asks: 8}
	p := update(t, r, func(tx *Tx) error {
		return errors.Join(tx.PutEntry(e), tx.PutNode(n), tx.PutBundle(b), tx.PutToken(tok), tx.PutAuthority(auth), tx.PutServer(srv), tx.PutDownstream(down))
	})
	e.Revision = p.Revision
	check := func(t *testing.T, r *Registry) {
		r.View(func(v *Snapshot) {
			got, err := v.Entry("e1")
			if diff := cmp.Diff(e, got, same); diff != "" || err != nil {
				t.Errorf("entry: %v %s", err, diff)
			}
			node, err := v.Node(n.ID)
			if diff := cmp.Diff(n, node, same); diff != "" || err != nil {
				t.Errorf("node: %v %s", err, diff)
			}
			bun, err := v.Bundle(td)
			if diff := cmp.Diff(b, bun, same); diff != "" || err != nil {
				t.Errorf("bundle: %v %s", err, diff)
			}
			token, err := v.Token(tok.Hash)
			if diff := cmp.Diff(tok, token); diff != "" || err != nil {
				t.Errorf("token: %v %s", err, diff)
			}
			if diff := cmp.Diff([]Authority{auth}, v.Authorities("s1")); diff != "" {
				t.Errorf("authorities: %s", diff)
			}
			if diff := cmp.Diff([]Downstream{down}, slices.Collect(v.Downstreams())); diff != "" {
				t.Errorf("downstream authorities: %s", diff)
			}
			if diff := cmp.Diff([]Server{srv}, v.Servers()); diff != "" {
				t.Errorf("servers: %s", diff)
			}
			if _, ok := v.AuthorizedEntry(n.ID, "e1"); !ok {
				t.Error("the agent is not granted its entry")
			}
			if v.EntryCount() != 1 || v.NodeCount() != 1 {
				t.Errorf("%d entries and %d nodes, want one each", v.EntryCount(), v.NodeCount())
			}
			for key, err := range v.Unreadable() {
				t.Errorf("%s cannot be read: %v", key, err)
			}
		})
	}
	check(t, r)
	var digest [32]byte
	r.View(func(v *Snapshot) { digest = v.Digest() })
	fresh, err := Open(t.Context(), st, td, quiet())
	if err != nil {
		t.Fatal(err)
	}
	check(t, fresh)
	fresh.View(func(v *Snapshot) {
		if v.Digest() != digest || v.Position() != p { // R78
			t.Errorf("digest %x at %v after loading, was %x at %v", v.Digest(), v.Position(), digest, p)
		}
	})
}
