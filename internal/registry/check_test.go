package registry

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// paper is a store as it is written down: the rows, and the log that says why.
type paper struct {
	rows  map[string]storedValue
	log   []store.Batch
	epoch store.Epoch
}

type storedValue struct {
	revision uint64
	value    []byte
}

func (s *paper) head() store.Position {
	return store.Position{Epoch: s.epoch, Revision: uint64(len(s.log))}
}

// put commits a row; delete commits that it goes.
func (s *paper) put(t testing.TB, key string, m proto.Message) {
	value := sealed(t, m)
	s.commit(store.Change{Key: key, Value: value})
	s.rows[key] = storedValue{s.head().Revision, value}
}

func (s *paper) delete(key string) {
	s.commit(store.Change{Key: key, Deleted: true})
	delete(s.rows, key)
}

func (s *paper) commit(changes ...store.Change) {
	at := store.Position{Epoch: s.epoch, Revision: uint64(len(s.log) + 1)}
	s.log = append(s.log, store.Batch{Prev: s.head(), Position: at, Writes: []store.Write{{Caller: "test", Changes: changes}}})
}

func (s *paper) putGrant(t testing.TB, e entry.Entry) (content string) {
	hash := entry.ContentHash(&e)
	content = "/entry-content/" + hex.EncodeToString(hash[:])
	s.put(t, keyOf(kindOf(&e), e.ID), grantMessage(&e))
	s.put(t, content, &statev1.EntryContent{EntryId: e.ID})
	return content
}

func (s *paper) check(begin uint64) []Defect {
	c := NewCheck(td)
	c.After(store.Position{Epoch: s.epoch, Revision: begin})
	for _, key := range slices.Sorted(maps.Keys(s.rows)) {
		c.Row(key, s.rows[key].revision, s.rows[key].value)
	}
	for _, b := range s.log[begin:] {
		c.Batch(b)
	}
	return c.Defects(s.head())
}

// whole is a store without a defect.
func whole(t testing.TB) *paper {
	s := &paper{rows: map[string]storedValue{}, epoch: store.NewEpoch()}
	s.put(t, "/trust-domain", serverMessage(td, &Server{}))
	node := agent("a", "u:1")
	s.put(t, "/node/spire/agent/a", nodeMessage(&node))
	web := grant("web", "/spire/agent/a", "/web", "u:1")
	web.FederatesWith = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other")}
	s.putGrant(t, web)
	s.putGrant(t, grant("below", "/web", "/below", "u:2"))
	s.putGrant(t, grant("alias", "/spire/server", "/group", "u:1"))
	s.putGrant(t, grant("gone", "/spire/agent/a", "/gone", "u:9"))
	s.putGrant(t, rule(t, "ruled", "/group", "spiffe://td/of/{unix.user}", "u:1"))
	s.putGrant(t, grant("deeper", "/of/alice", "/deeper", "u:3"))
	s.put(t, "/bundle/other", bundleMessage(&bundle.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("other"), Sequence: 3}))
	s.put(t, "/token/00", &statev1.Token{NodeId: "spiffe://td/spire/agent/join_token/x", Epoch: make([]byte, 16)})

	ca, public := testCA(t)
	slot := &statev1.Slot{Name: "A", State: statev1.Slot_STATE_ACTIVE, AuthorityId: "ca", Certificate: ca, PublicKey: public}
	jwt := &statev1.Slot{Name: "A", State: statev1.Slot_STATE_PREPARED, AuthorityId: "kid", PublicKey: public}
	s.put(t, "/authority/s/x509", &statev1.Authority{Kind: "x509", Slots: []*statev1.Slot{slot, {Name: "B", State: statev1.Slot_STATE_INTENDED}}})
	s.put(t, "/authority/s/jwt", &statev1.Authority{Kind: "jwt", Slots: []*statev1.Slot{jwt}})
	own := &bundle.Bundle{TrustDomain: td}
	own = own.WithX509(bundle.X509Authority{ASN1: ca})
	s.put(t, "/bundle/td", bundleMessage(own))
	own = own.WithJWT(bundle.JWTAuthority{KeyID: "kid", PublicKey: public})
	s.put(t, "/bundle/td", bundleMessage(own))

	for key := range maps.Clone(s.rows) { // what was and is no more
		if strings.HasSuffix(key, "/gone") {
			s.delete(key)
		}
	}
	gone := grant("gone", "/spire/agent/a", "/gone", "u:9")
	hash := entry.ContentHash(&gone)
	s.delete("/entry-content/" + hex.EncodeToString(hash[:]))
	return s
}

func testCA(t testing.TB) (der, public []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if der, err = svid.SelfSignedCA(td, key, created, created.Add(24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if public, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		t.Fatal(err)
	}
	return der, public
}

// R126: each defect is seeded and named, and a store without one has none.
func TestCheck(t *testing.T) {
	webKey := func() string {
		web := grant("web", "/spire/agent/a", "/web", "u:1")
		hash := entry.ContentHash(&web)
		return "/entry-content/" + hex.EncodeToString(hash[:])
	}()
	bundleOf := func(t testing.TB, s *paper) *bundle.Bundle {
		payload, err := unseal(s.rows["/bundle/td"].value)
		if err != nil {
			t.Fatal(err)
		}
		b, err := readBundle("td", payload)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, test := range []struct {
		code, key string // "" is none
		remark    bool
		repair    bool
		seed      func(t testing.TB, s *paper)
	}{
		{seed: func(testing.TB, *paper) {}},
		{code: "row_unreadable", key: "/entry/web2", seed: func(t testing.TB, s *paper) {
			s.put(t, "/entry/web2", &statev1.Entry{Id: "other"})
		}},
		{code: "row_unreadable", key: "/token/zz", seed: func(t testing.TB, s *paper) {
			s.put(t, "/token/zz", &statev1.Token{Epoch: make([]byte, 16)})
		}},
		{code: "row_unreadable", key: "/node/spire/agent/b", seed: func(t testing.TB, s *paper) {
			s.put(t, "/node/spire/agent/b", &statev1.Node{Id: "spiffe://td/spire/agent/c"})
		}},
		{code: "row_unknown", key: "/later/x", remark: true, seed: func(t testing.TB, s *paper) {
			s.put(t, "/later/x", &statev1.Server{})
		}},
		{code: "copy_incomplete", key: CopyingHere, seed: func(t testing.TB, s *paper) {
			s.put(t, CopyingHere, &statev1.Copy{Epoch: make([]byte, 16), Place: "there"})
		}},
		{code: "store_copied", key: CopiedAway, remark: true, seed: func(t testing.TB, s *paper) {
			s.put(t, CopiedAway, &statev1.Copy{Epoch: make([]byte, 16), Place: "there"})
		}},
		{code: "trust_domain_changed", key: "/trust-domain", seed: func(t testing.TB, s *paper) {
			s.put(t, "/trust-domain", &statev1.Server{TrustDomain: "other"})
		}},
		{code: "owner_missing", key: "/trust-domain", seed: func(t testing.TB, s *paper) { s.delete("/trust-domain") }},
		{code: "content_missing", key: webKey, repair: true, seed: func(t testing.TB, s *paper) { s.delete(webKey) }},
		{code: "content_wrong", key: webKey, repair: true, seed: func(t testing.TB, s *paper) {
			s.put(t, webKey, &statev1.EntryContent{EntryId: "below"})
		}},
		{code: "content_orphan", key: "/entry-content/" + strings.Repeat("ab", 32), repair: true, seed: func(t testing.TB, s *paper) {
			s.put(t, "/entry-content/"+strings.Repeat("ab", 32), &statev1.EntryContent{EntryId: "web"})
		}},
		{code: "content_twice", key: "/entry/web2", seed: func(t testing.TB, s *paper) {
			second := grant("web2", "/spire/agent/a", "/web", "u:1")
			s.put(t, "/entry/web2", entryMessage(&second))
		}},
		{code: "id_twice", key: "/rule/web", seed: func(t testing.TB, s *paper) {
			s.putGrant(t, rule(t, "web", "/group", "spiffe://td/for/{unix.user}", "u:1"))
		}},
		{code: "parent_missing", remark: true, seed: func(t testing.TB, s *paper) {
			s.putGrant(t, grant("lost", "/spire/agent/nobody", "/lost", "u:1"))
		}},
		{code: "alias_unmatched", key: "/entry/lonely", remark: true, seed: func(t testing.TB, s *paper) {
			s.putGrant(t, grant("lonely", "/spire/server", "/lonely", "u:1", "u:7"))
		}},
		{code: "federated_missing", key: "/bundle/other", remark: true, seed: func(t testing.TB, s *paper) { s.delete("/bundle/other") }},
		{code: "token_wrong", key: "/token/01", seed: func(t testing.TB, s *paper) {
			s.put(t, "/token/01", &statev1.Token{NodeId: "spiffe://td/web", Epoch: make([]byte, 16)})
		}},
		{code: "bundle_missing", key: "/bundle/td", seed: func(t testing.TB, s *paper) { s.delete("/bundle/td") }},
		{code: "authority_unpublished", key: "/authority/s2/x509", seed: func(t testing.TB, s *paper) {
			ca, public := testCA(t)
			s.put(t, "/authority/s2/x509", &statev1.Authority{Kind: "x509", Slots: []*statev1.Slot{
				{Name: "A", State: statev1.Slot_STATE_ACTIVE, Certificate: ca, PublicKey: public}}})
		}},
		{code: "authority_unpublished", key: "/authority/s2/jwt", seed: func(t testing.TB, s *paper) { // another key under a published name
			_, public := testCA(t)
			s.put(t, "/authority/s2/jwt", &statev1.Authority{Kind: "jwt", Slots: []*statev1.Slot{
				{Name: "A", State: statev1.Slot_STATE_PREPARED, AuthorityId: "kid", PublicKey: public}}})
		}},
		{code: "authority_tainted", key: "/authority/s/x509", remark: true, seed: func(t testing.TB, s *paper) {
			b := bundleOf(t, s)
			b.X509[0].Tainted, b.Sequence = true, b.Sequence+1
			s.put(t, "/bundle/td", bundleMessage(b))
		}},
		{code: "authority_states", key: "/authority/s/jwt", seed: func(t testing.TB, s *paper) {
			public := bundleOf(t, s).JWT[0].PublicKey
			slot := func(name string) *statev1.Slot {
				return &statev1.Slot{Name: name, State: statev1.Slot_STATE_ACTIVE, AuthorityId: "kid", PublicKey: public}
			}
			s.put(t, "/authority/s/jwt", &statev1.Authority{Kind: "jwt", Slots: []*statev1.Slot{slot("A"), slot("B")}})
		}},
		{code: "bundle_key_unowned", key: "/bundle/td", seed: func(t testing.TB, s *paper) { // R63, T29
			ca, _ := testCA(t)
			s.put(t, "/bundle/td", bundleMessage(bundleOf(t, s).WithX509(bundle.X509Authority{ASN1: ca})))
		}},
		{seed: func(t testing.TB, s *paper) { // below an upstream the bundle holds its roots and keys, and not ours
			root, public := testCA(t)
			other, _ := testCA(t)
			ca, _ := testCA(t)
			s.put(t, "/authority/s2/x509", &statev1.Authority{Kind: "x509", Slots: []*statev1.Slot{{Name: "A", State: statev1.Slot_STATE_ACTIVE,
				Certificate: ca, PublicKey: public, Upstream: true, Root: root, Given: [][]byte{other, []byte("above")}}}})
			s.put(t, "/bundle/td", bundleMessage(bundleOf(t, s).WithX509(bundle.X509Authority{ASN1: root}).WithX509(bundle.X509Authority{ASN1: other}).
				WithJWT(bundle.JWTAuthority{KeyID: "above", PublicKey: public})))
		}},
		{code: "bundle_key_unowned", key: "/bundle/td", remark: true, seed: func(t testing.TB, s *paper) {
			_, public := testCA(t)
			s.put(t, "/bundle/td", bundleMessage(bundleOf(t, s).WithJWT(bundle.JWTAuthority{KeyID: "nested", PublicKey: public})))
		}},
		{code: "bundle_sequence", key: "/bundle/td", seed: func(t testing.TB, s *paper) { // R75
			b := bundleOf(t, s)
			b.Sequence--
			s.put(t, "/bundle/td", bundleMessage(b))
		}},
		{code: "bundle_sequence", key: "/bundle/td", seed: func(t testing.TB, s *paper) {
			b := bundleOf(t, s)
			b.RefreshHint += time.Second
			s.put(t, "/bundle/td", bundleMessage(b))
		}},
		{seed: func(t testing.TB, s *paper) { // another trust domain's are numbered as it likes
			other := &bundle.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("other"), Sequence: 3, RefreshHint: time.Minute}
			s.put(t, "/bundle/other", bundleMessage(other))
		}},
		{code: "bundle_key_revoked", key: "/bundle/td", seed: func(t testing.TB, s *paper) { // R69
			b := bundleOf(t, s)
			b.Revoked = []bundle.Revocation{{KeyHash: sha256.Sum256(b.JWT[0].PublicKey)}}
			s.put(t, "/bundle/td", bundleMessage(b))
		}},
		{code: "bundle_key_revoked", key: "/bundle/td", seed: func(t testing.TB, s *paper) {
			b := bundleOf(t, s)
			b.Revoked = []bundle.Revocation{{KeyHash: sha256.Sum256(b.Roots()[0].RawSubjectPublicKeyInfo)}}
			s.put(t, "/bundle/td", bundleMessage(b))
		}},
		{code: "revision_wrong", seed: func(t testing.TB, s *paper) {
			s.rows["/token/00"] = storedValue{1000, s.rows["/token/00"].value}
			delete(s.rows, "/token/00")
			s.commit(store.Change{Key: "/token/00", Value: nil})
			s.rows["/entry/web"] = storedValue{s.head().Revision + 5, s.rows["/entry/web"].value}
		}},
		{code: "row_lost", key: "/token/00", seed: func(t testing.TB, s *paper) { delete(s.rows, "/token/00") }},
		{code: "row_not_in_log", key: "/token/01", seed: func(t testing.TB, s *paper) {
			s.rows["/token/01"] = storedValue{4, s.rows["/token/00"].value}
		}},
		{code: "row_not_as_log", key: "/token/00", seed: func(t testing.TB, s *paper) { // another value
			value := sealed(t, &statev1.Token{NodeId: "spiffe://td/spire/agent/x", Epoch: make([]byte, 16)})
			s.rows["/token/00"] = storedValue{s.rows["/token/00"].revision, value}
		}},
		{code: "row_not_as_log", key: "/token/00", seed: func(t testing.TB, s *paper) { // older than the log has it
			was := s.rows["/token/00"]
			s.put(t, "/token/00", &statev1.Token{NodeId: "spiffe://td/spire/agent/x", Epoch: make([]byte, 16)})
			s.rows["/token/00"] = was
		}},
		{code: "row_not_in_log", key: "/token/00", seed: func(t testing.TB, s *paper) { // deleted, and there
			was := s.rows["/token/00"]
			s.delete("/token/00")
			s.rows["/token/00"] = was
		}},
		{code: "log_broken", seed: func(t testing.TB, s *paper) { s.log[4].Prev.Revision-- }},
		{code: "log_broken", key: "/token/00", seed: func(t testing.TB, s *paper) {
			s.delete("/token/00")
			last := &s.log[len(s.log)-1]
			last.Writes = append(last.Writes, last.Writes[0])
		}},
	} {
		t.Run(test.code, func(t *testing.T) {
			s := whole(t)
			test.seed(t, s)
			found := s.check(0)
			if test.code == "" {
				if len(found) > 0 {
					t.Fatalf("a whole store: %+v", found)
				}
				return
			}
			for _, d := range found {
				if d.Found == "" || d.Fix == "" && d.Code != "row_unknown" || strings.Contains(d.Found, "%!") {
					t.Errorf("says too little: %+v", d)
				}
			}
			if i := slices.IndexFunc(found, func(d Defect) bool {
				return d.Code == test.code && d.Key == test.key && d.Remark == test.remark && d.Repair == test.repair
			}); i < 0 {
				t.Fatalf("found %+v", found)
			}
		})
	}
}

// A log that begins later proves less, and makes up nothing.
func TestCheckShortLog(t *testing.T) {
	s := whole(t)
	for begin := range uint64(len(s.log)) + 1 {
		if found := s.check(begin); len(found) > 0 {
			t.Errorf("after %d: %+v", begin, found)
		}
	}
	// A row from before that the log deletes.
	was := s.rows["/token/00"]
	s.delete("/token/00")
	s.rows["/token/00"] = was
	if found := s.check(was.revision); len(found) != 1 || found[0].Code != "row_not_as_log" {
		t.Errorf("a deleted row that is there: %+v", found)
	}
}

// What can be mended without a decision is mended by ordinary commits, and by
// those alone.
func TestRepairContents(t *testing.T) {
	st := openStore(t, t.TempDir())
	s := whole(t)
	for _, e := range []entry.Entry{grant("one", "/spire/agent/a", "/one", "u:1"), grant("two", "/spire/agent/a", "/two", "u:1")} {
		s.put(t, "/entry/"+e.ID, entryMessage(&e)) // without a content
	}
	s.put(t, "/entry-content/"+strings.Repeat("ab", 32), &statev1.EntryContent{EntryId: "nobody"})
	below := grant("below", "/web", "/below", "u:2")
	hash := entry.ContentHash(&below)
	s.put(t, "/entry-content/"+hex.EncodeToString(hash[:]), &statev1.EntryContent{EntryId: "web"})
	s.put(t, "/entry-content/xyz", &statev1.EntryContent{}) // cannot be read: for somebody to decide
	for key, row := range s.rows {
		commitRaw(t, st, store.Put{Key: key, Value: row.value})
	}
	r := start(t, st)
	batches := make(chan store.Batch, 1)
	r.Batches(func(b store.Batch) { batches <- b })
	check := func() []Defect {
		c := NewCheck(td)
		at, err := st.Load(t.Context(), func(key string, rev uint64, value []byte) error {
			c.Row(key, rev, value)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return c.Defects(at)
	}
	before := check()
	mended, err := r.RepairContents(t.Context(), "operator", before)
	if err != nil || mended != 4 {
		t.Fatalf("mended %d of %+v: %v", mended, before, err)
	}
	if after := check(); len(after) != 1 || after[0].Code != "row_unreadable" {
		t.Errorf("after the repair: %+v", after)
	}
	if b := <-batches; len(b.Writes) != 1 || b.Writes[0].Caller != "operator" {
		t.Errorf("committed %+v", b)
	}
	// The entries keep what they are, and are unique again.
	if _, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutEntry(grant("three", "/spire/agent/a", "/one", "u:1")) }); err == nil {
		t.Error("a second entry of one content was made")
	}
}
