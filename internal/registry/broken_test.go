package registry

import (
	"bytes"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// fields of numbers that no message has yet.
func unknownField(text string) []byte {
	return protowire.AppendString(protowire.AppendTag(nil, 1000, protowire.BytesType), text)
}

func commitRaw(t testing.TB, st *sqlite.Store, puts ...store.Put) {
	t.Helper()
	for _, res := range st.Commit(t.Context(), []store.Txn{{Puts: puts}}) {
		if res.Err != nil {
			t.Fatal(res.Err)
		}
	}
}

func stored(t testing.TB, st *sqlite.Store, key string) []byte {
	t.Helper()
	var found []byte
	if _, err := st.Load(t.Context(), func(k string, _ uint64, value []byte) error {
		if k == key {
			found = bytes.Clone(value)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// R79: rows that cannot be read, or that break a rule, stop neither the start
// nor their neighbours; they are named, can be deleted, and are never served.
func TestBrokenRows(t *testing.T) {
	good := grant("good", "/spire/agent/a", "/good", "u:1")
	reserved := grant("reserved", "/spire/agent/a", "/x", "u:1")
	reservedMessage := entryMessage(&reserved)
	reservedMessage.SpiffeId = "spiffe://td/spire/server" // R16, in the database
	foreign := entryMessage(&good)
	foreign.Id, foreign.SpiffeId = "foreign", "spiffe://other/x"
	self := entryMessage(&good)
	self.Id, self.ParentId = "self", self.SpiffeId
	banned := agent("b")
	readable := grant("newer", "/spire/agent/a", "/newer", "u:1") // were it not for its envelope
	payload, err := proto.Marshal(entryMessage(&readable))
	if err != nil {
		t.Fatal(err)
	}
	newer, err := proto.Marshal(&statev1.Envelope{Format: 2, Reader: 2, Payload: payload})
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string][]byte{
		"/entry/garbage":         []byte("\xff\xff\xff"),
		"/entry/empty":           {},
		"/entry/newer":           newer,
		"/entry/renamed":         sealed(t, entryMessage(&good)),
		"/entry/reserved":        sealed(t, reservedMessage),
		"/entry/foreign":         sealed(t, foreign),
		"/entry/self":            sealed(t, self),
		"/entry/bad id":          sealed(t, &statev1.Entry{Id: "bad id", SpiffeId: "spiffe://td/x", ParentId: "spiffe://td/y"}),
		"/entry-content/xyz":     sealed(t, &statev1.EntryContent{}),
		"/node/spire/agent/x":    sealed(t, nodeMessage(&banned)),
		"/node/spire/server":     sealed(t, &statev1.Node{Id: "spiffe://td/spire/server"}),
		"/bundle/x":              sealed(t, &statev1.Bundle{TrustDomain: "y"}),
		"/token/zz":              sealed(t, &statev1.Token{Epoch: make([]byte, 16)}),
		"/token/00":              sealed(t, &statev1.Token{Epoch: []byte{1}}),
		"/authority/s/x509":      sealed(t, &statev1.Authority{Kind: "jwt"}),
		"/authority/s/jwt":       sealed(t, &statev1.Authority{Kind: "jwt", Slots: []*statev1.Slot{{State: 99}}}),
		"/format":                sealed(t, &statev1.Format{Written: 1, Reader: 99}),
		"/no-such-kind/anything": []byte("\x00"),
	}
	dir := t.TempDir()
	st := openStore(t, dir)
	for key, value := range rows {
		commitRaw(t, st, store.Put{Key: key, Value: value})
	}
	r := start(t, st)
	update(t, r, func(tx *Tx) error { return tx.PutEntry(good) })

	check := func(r *Registry) {
		r.View(func(v *Snapshot) {
			var names []string
			for key, err := range v.Unreadable() {
				if names = append(names, key); err == nil {
					t.Errorf("%s is left aside without a reason", key)
				}
			}
			if len(names) != len(rows) || !slices.IsSorted(names) {
				t.Errorf("left aside: %q, want the %d broken rows", names, len(rows))
			}
			var listed []string
			for e := range v.Entries("") {
				listed = append(listed, e.ID)
			}
			if !slices.Equal(listed, []string{"good"}) || v.NodeCount() != 0 {
				t.Errorf("entries %q and %d nodes are served", listed, v.NodeCount())
			}
		})
	}
	check(r)
	fresh, err := Open(t.Context(), st, td, quiet())
	if err != nil {
		t.Fatal(err)
	}
	check(fresh)
	fresh.View(func(v *Snapshot) {
		r.View(func(w *Snapshot) {
			if v.Digest() != w.Digest() {
				t.Error("the digest does not count the broken rows alike")
			}
		})
	})

	// It may not be written over, only deleted.
	_, err = r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutEntry(grant("newer", "/p", "/q", "u:1")) })
	isFault(t, err, fault.Precondition, "row_unreadable")
	_, err = r.Update(t.Context(), "test", func(tx *Tx) error { _, err := tx.Entry("garbage"); return err })
	isFault(t, err, fault.Precondition, "row_unreadable")
	_, err = r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutNode(agent("x")) })
	isFault(t, err, fault.Precondition, "row_unreadable")
	update(t, r, func(tx *Tx) error { return errors.Join(tx.DeleteEntry("newer"), tx.DeleteNode(id("/spire/agent/x"))) })
	update(t, r, func(tx *Tx) error {
		return errors.Join(tx.PutEntry(grant("newer", "/p", "/q", "u:1")), tx.PutNode(agent("x")))
	})
	r.View(func(v *Snapshot) {
		if v.EntryCount() != 2 || v.NodeCount() != 1 {
			t.Errorf("%d entries and %d nodes after the repair", v.EntryCount(), v.NodeCount())
		}
	})
}

// A row that becomes unreadable while it is held is served no more.
func TestRowBecomesUnreadable(t *testing.T) {
	h := newHistory(t)
	n := agent("a")
	h.commit(append(h.putNode(n), h.putEntry(grant("e", "/spire/agent/a", "/w", "u:1"))...)...)
	f := h.r.Follow(n.ID, true)
	f.Inventory()
	h.commit(store.Change{Key: "/entry/e", Value: []byte("\xff")})
	woken(t, f)
	if d := f.Delta(); len(d.Bodies) != 1 || bodyOf(t, d.Bodies[0]).GetGrantRemoved() != "e" {
		t.Errorf("Delta() = %+v, want the grant removed", d)
	}
	h.commit(h.putEntry(grant("e", "/spire/agent/a", "/w", "u:1"))...)
	h.mirrors[n.ID.Path()] = nil
	h.check()
}

// What a newer version wrote beside what we know survives our changes, in the
// message and in the parts of it that we keep.
func TestUnknownFieldsSurvive(t *testing.T) {
	st := openStore(t, t.TempDir())
	e := grant("e", "/spire/agent/a", "/w", "u:1")
	n := agent("a")
	b := &bundle.Bundle{TrustDomain: td, Sequence: 1, X509: []bundle.X509Authority{{ASN1: []byte{1}}, {ASN1: []byte{2}}}, JWT: []bundle.JWTAuthority{{KeyID: "k"}}}
	em, nm, bm := entryMessage(&e), nodeMessage(&n), bundleMessage(b)
	for text, m := range map[string]proto.Message{"entry": em, "node": nm, "credential": nm.Current, "bundle": bm, "root two": bm.X509Authorities[1], "key": bm.JwtAuthorities[0]} {
		m.ProtoReflect().SetUnknown(unknownField("news of the " + text))
	}
	commitRaw(t, st, store.Put{Key: "/entry/e", Value: sealed(t, em)}, store.Put{Key: "/node/spire/agent/a", Value: sealed(t, nm)}, store.Put{Key: "/bundle/td", Value: sealed(t, bm)})

	for range 2 { // once as loaded, once as followed
		r := start(t, st)
		update(t, r, func(tx *Tx) error {
			e, err := tx.Entry("e")
			if err != nil {
				return err
			}
			e.Hint += "h"
			n, err := tx.Node(n.ID)
			if err != nil {
				return err
			}
			n.AgentVersion += "1"
			b, err := tx.Bundle(td)
			if err != nil {
				return err
			}
			b = b.WithX509(bundle.X509Authority{ASN1: []byte{byte(b.Sequence + 2)}})
			b.X509[0], b.X509[1] = b.X509[1], b.X509[0]
			return errors.Join(tx.PutEntry(e), tx.PutNode(n), tx.PutBundle(b))
		})
		update(t, r, func(tx *Tx) error {
			e, err := tx.Entry("e")
			if err != nil {
				return err
			}
			e.Hint += "i"
			return tx.PutEntry(e)
		})
	}
	for key, texts := range map[string][]string{"/entry/e": {"entry"}, "/node/spire/agent/a": {"node", "credential"}, "/bundle/td": {"bundle", "root two", "key"}} {
		value := stored(t, st, key)
		for _, text := range texts {
			if n := bytes.Count(value, unknownField("news of the "+text)); n != 1 {
				t.Errorf("%s holds the news of the %s %d times", key, text, n)
			}
		}
	}
	var env statev1.Envelope
	if err := proto.Unmarshal(stored(t, st, "/entry/e"), &env); err != nil || env.Format != Format || env.Reader != uint32(readerOf(Format)) {
		t.Errorf("the envelope says format %d for readers of %d (%v)", env.Format, env.Reader, err)
	}
}

// A newer format that our readers understand is read.
func TestNewerFormatForOurReaders(t *testing.T) {
	h := newHistory(t)
	e := grant("e", "/spire/agent/a", "/w", "u:1")
	payload, err := proto.Marshal(entryMessage(&e))
	if err != nil {
		t.Fatal(err)
	}
	value, err := proto.Marshal(&statev1.Envelope{Format: 2, Reader: 1, Payload: payload, Mac: []byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	h.commit(store.Change{Key: "/entry/e", Value: value})
	if h.r.state.rows.entries.n != 1 {
		t.Errorf("the entry was not read: %v", h.r.state.bad)
	}
}

// A content key that lost its entry, or an entry that lost its key, is repaired
// by the next write and never blocks one.
func TestContentKeysHeal(t *testing.T) {
	st := openStore(t, t.TempDir())
	e, bare := grant("e", "/spire/agent/a", "/w", "u:1"), grant("bare", "/spire/agent/a", "/bare", "u:1")
	hash := entry.ContentHash(&e)
	key := keyOf(kindContent, hex.EncodeToString(hash[:]))
	twin := e
	twin.ID = "twin"
	commitRaw(t, st, store.Put{Key: key, Value: sealed(t, &statev1.EntryContent{EntryId: "gone"})},
		store.Put{Key: "/entry/bare", Value: sealed(t, entryMessage(&bare))})
	r := start(t, st)
	update(t, r, func(tx *Tx) error { return tx.PutEntry(e) })
	_, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutEntry(twin) })
	isFault(t, err, fault.Exists, "entry_exists")
	bare.Hint = "h"
	update(t, r, func(tx *Tx) error { return tx.PutEntry(bare) })
	if stored(t, st, keyOf(kindContent, hexOf(entry.ContentHash(&bare)))) == nil {
		t.Error("the entry's content key was not written again")
	}
	update(t, r, func(tx *Tx) error { return errors.Join(tx.DeleteEntry("e"), tx.DeleteEntry("bare")) })
	if stored(t, st, key) != nil {
		t.Error("the content key outlived its entry")
	}
}

func hexOf(h [32]byte) string { return hex.EncodeToString(h[:]) }

// A SPIFFE ID of any legal length works as a node's (ID-2.3-a).
func TestLongNodeID(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	for _, size := range []int{1000, 1018, 1019, 1020, 1500, 2048} {
		prefix := "/spire/agent/t/"
		n := agent("x")
		n.ID = id(prefix + strings.Repeat("n", size-len("spiffe://td")-len(prefix)))
		update(t, r, func(tx *Tx) error { return tx.PutNode(n) })
		update(t, r, func(tx *Tx) error {
			got, err := tx.Node(n.ID)
			if err == nil && got.ID != n.ID {
				t.Errorf("the node of %d bytes is %s", size, got.ID)
			}
			got.AgentVersion = "2"
			return errors.Join(err, tx.PutNode(got))
		})
		update(t, r, func(tx *Tx) error { return tx.DeleteNode(n.ID) })
	}
	r.View(func(v *Snapshot) {
		if v.NodeCount() != 0 {
			t.Errorf("%d nodes are left", v.NodeCount())
		}
	})
}

// Whatever bytes the store holds under whatever keys: nothing panics, other
// rows stand, and the digest counts each key.
func FuzzStoredRow(f *testing.F) {
	e := grant("e", "/spire/agent/a", "/w", "u:1")
	n := agent("a", "n:1")
	f.Add("/entry/e", sealed(f, entryMessage(&e)))
	f.Add("/node/spire/agent/a", sealed(f, nodeMessage(&n)))
	f.Add("/bundle/td", sealed(f, bundleMessage(&bundle.Bundle{TrustDomain: td})))
	f.Add("/token/00", sealed(f, tokenMessage(&Token{})))
	f.Add("/authority/s/jwt", sealed(f, authorityMessage(&Authority{Server: "s", Kind: "jwt"})))
	f.Add("/downstream/7", sealed(f, downstreamMessage(&Downstream{Serial: "7", NotAfter: created})))
	f.Add("/server/s", sealed(f, serverMessage(td, &Server{ID: "s"})))
	f.Add("/trust-domain", sealed(f, serverMessage(td, &Server{})))
	f.Add("/entry-content/"+strings.Repeat("0", 64), sealed(f, &statev1.EntryContent{}))
	f.Add("/node//", []byte{})
	f.Add("", []byte{1})
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		s := newState(td)
		neighbour := grant("neighbour", "/spire/agent/a", "/neighbour", "u:1")
		s.set("/entry/neighbour", 1, sealed(t, entryMessage(&neighbour)), nil)
		s.set("/node/spire/agent/a", 1, sealed(t, nodeMessage(&n)), nil)
		before := s.digest
		was := s.revision(key)
		s.set(key, 2, value, func(*node, touched) {})
		if s.revision(key) != 2 {
			t.Fatalf("the key is at revision %d", s.revision(key))
		}
		if key != "/entry/neighbour" && s.rows.find("neighbour") == 0 {
			t.Fatal("the neighbour is gone")
		}
		v := Snapshot{s}
		for range v.Entries("") {
		}
		for range v.Nodes("") {
		}
		for range v.Bundles() {
		}
		v.Authorities("")
		v.Servers()
		for range v.Tokens() {
		}
		for range v.Authorized(n.ID) {
		}
		s.delete(key, func(*node, touched) {})
		if s.revision(key) != 0 || was == 0 && s.digest != before {
			t.Fatal("the key left something behind")
		}
	})
}
