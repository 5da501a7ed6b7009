package serverapi_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// below is a downstream server: an identity with an entry that says so.
type below struct {
	*rig
	id    spiffeid.ID
	entry *spiretypes.Entry
	conn  *grpc.ClientConn
}

func newBelow(t *testing.T, edit func(*spiretypes.Entry), options ...option) *below {
	t.Helper()
	r := newRig(t, options...)
	e := entryUnder(r.agent().id, "/nested")
	e.Downstream = true
	if edit != nil {
		edit(e)
	}
	b := &below{rig: r, id: spiffeid.RequireFromPath(td, "/nested"), entry: r.create(e)[0]}
	h := r.identity(b.id, time.Now().Add(time.Hour))
	b.conn = r.connect(&h)
	return b
}

func (b *below) ask(key crypto.Signer, ttl time.Duration) (*svidv1.NewDownstreamX509CAResponse, error) {
	b.t.Helper()
	csr, err := svid.NewAuthorityCSR(td, key)
	if err != nil {
		b.t.Fatal(err)
	}
	return svidv1.NewSVIDClient(b.conn).NewDownstreamX509CA(b.t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: int32(ttl / time.Second)})
}

// chain asks for an authority and holds it to what an engine below accepts.
func (b *below) chain(key *ecdsa.PrivateKey, ttl time.Duration) svid.Chain {
	b.t.Helper()
	resp, err := b.ask(key, ttl)
	if err != nil {
		b.t.Fatal(err)
	}
	chain, err := svid.CheckChain(resp.CaCertChain, resp.X509Authorities, svid.ChainRules{TrustDomain: td, Key: key.Public(), Ours: true, Now: time.Now()})
	if err != nil {
		b.t.Fatal(err)
	}
	return chain
}

func TestNewDownstreamX509CA(t *testing.T) { // R13
	b := newBelow(t, nil)
	chain := b.chain(newKey(t), 10*time.Minute)
	c, err := x509.ParseCertificate(chain.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(c.PermittedURIDomains) != 1 || c.PermittedURIDomains[0] != td.Name() || !c.PermittedDNSDomainsCritical {
		t.Errorf("name constraint %v, critical %v", c.PermittedURIDomains, c.PermittedDNSDomainsCritical)
	}
	if c.MaxPathLen != 5 || len(c.URIs) != 1 || c.URIs[0].String() != td.IDString() || c.Subject.OrganizationalUnit[0] != "DOWNSTREAM-1" {
		t.Errorf("path length %d, names %v, subject %v", c.MaxPathLen, c.URIs, c.Subject)
	}
	// The wish counts down to a second, and up to ca_ttl (30 minutes here).
	for wish, want := range map[time.Duration]time.Duration{10 * time.Minute: 10 * time.Minute, 0: 30 * time.Minute, 1000 * time.Hour: 30 * time.Minute} {
		if left := time.Until(b.chain(newKey(t), wish).NotAfter); left > want || left < want-time.Minute {
			t.Errorf("asked for %v, it lives for %v", wish, left)
		}
	}
	// On record, in the trail and in the store (R14).
	if n := countInTrail(t, b.rig, `"kind":"x509-ca"`, b.id.String(), b.entry.Id, c.SerialNumber.String()); n != 1 {
		t.Errorf("%d records in the audit trail, want 1", n)
	}
	b.registry.View(func(s *registry.Snapshot) {
		n := 0
		for d := range s.Downstreams() {
			n++
			if d.Caller != b.id.String() || d.EntryID != b.entry.Id || d.Server != "s1" || d.AuthorityID == "" {
				t.Errorf("the row %+v", d)
			}
		}
		if n != 4 {
			t.Errorf("%d rows, want 4", n)
		}
	})
	if n := b.api.Downstream(time.Now()); n != 4 {
		t.Errorf("%d live authorities, want 4", n)
	}
	if n := b.api.Downstream(time.Now().Add(11 * time.Minute)); n != 2 {
		t.Errorf("%d live authorities later, want 2", n)
	}
}

func TestDownstreamEndsWithItsEntry(t *testing.T) { // R8
	b := newBelow(t, func(e *spiretypes.Entry) { e.ExpiresAt = time.Now().Add(5 * time.Minute).Unix() })
	if left := time.Until(b.chain(newKey(t), 0).NotAfter); left > 5*time.Minute {
		t.Errorf("it lives for %v, longer than its entry", left)
	}
	// The right is looked up anew for each call (R124).
	if _, err := entryv1.NewEntryClient(b.admin).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{b.entry.Id}}); err != nil {
		t.Fatal(err)
	}
	_, err := b.ask(newKey(t), 0)
	wantCode(t, "without the entry", err, codes.PermissionDenied, "not_allowed")
}

func TestDownstreamRefusals(t *testing.T) {
	b := newBelow(t, nil)
	call := func(csr []byte, ttl int32) error {
		_, err := svidv1.NewSVIDClient(b.conn).NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: ttl})
		return err
	}
	good, err := svid.NewAuthorityCSR(td, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := svid.NewAuthorityCSR(spiffeid.RequireTrustDomainFromString("foreign.test"), newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	broken := append([]byte(nil), good...)
	broken[len(broken)-1] ^= 1
	wantCode(t, "no CSR", call(nil, 0), codes.InvalidArgument, "csr_invalid")
	wantCode(t, "a CSR that proves nothing", call(broken, 0), codes.InvalidArgument, "csr_signature_invalid") // R3
	wantCode(t, "another trust domain", call(foreign, 0), codes.InvalidArgument, "csr_trust_domain")          // X509-3.2-d
	wantCode(t, "a negative TTL", call(good, -1), codes.InvalidArgument, "ttl_invalid")

	// R4: neither a key of ours, nor one that another authority has, in either direction.
	taken := newKey(t)
	if _, err := b.ask(taken, 0); err != nil {
		t.Fatal(err)
	}
	until(t, "the key is known", func() bool { return reasonOf(call(csrOf(t, taken), 0)) == "key_of_authority" })
	named, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: uris(t, "spiffe://example.org/w")}, taken)
	if err != nil {
		t.Fatal(err)
	}
	_, err = svidv1.NewSVIDClient(b.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: named})
	wantCode(t, "an SVID for the key of an authority below", err, codes.InvalidArgument, "key_of_authority")
}

func csrOf(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	csr, err := svid.NewAuthorityCSR(td, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// R100: a downstream server gets what rotation needs, and not an endless number.
func TestDownstreamIsLimited(t *testing.T) {
	b := newBelow(t, nil)
	key := newKey(t)
	csr := csrOf(t, key)
	b.ask(key, 0)
	for i := range 200 {
		_, err := svidv1.NewSVIDClient(b.conn).NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: -1})
		if reasonOf(err) == "rate_limited" {
			return
		}
		if i == 199 {
			t.Errorf("200 calls in a row: %v", err)
		}
	}
}

// A record that cannot be written, in the store or with strict audit in the
// trail, means no authority.
func TestNoDownstreamWithoutRecord(t *testing.T) { // R14
	b := newBelow(t, nil)
	b.store.away.Store(true)
	_, err := b.ask(newKey(t), 0)
	wantCode(t, "without a store", err, codes.Unavailable, "store_unavailable")
	b.store.away.Store(false)
	if _, err := b.ask(newKey(t), 0); err != nil {
		t.Errorf("with the store back: %v", err)
	}
}

func TestPublishJWTAuthority(t *testing.T) {
	b := newBelow(t, nil)
	key := jwtKey(t, "nested-key", time.Now().Add(time.Hour))
	publish := func(k *spiretypes.JWTKey) (*bundlev1.PublishJWTAuthorityResponse, error) {
		return bundlev1.NewBundleClient(b.conn).PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: k})
	}
	var sequence uint64
	for range 2 { // again changes nothing (R75)
		resp, err := publish(key)
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, k := range resp.JwtAuthorities {
			ids = append(ids, k.KeyId)
		}
		if len(ids) != 2 || ids[1] != key.KeyId { // ours is the first
			t.Errorf("the keys %v", ids)
		}
		got, err := bundlev1.NewBundleClient(b.admin).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if len(got.JwtAuthorities) != 2 || sequence != 0 && got.SequenceNumber != sequence {
			t.Errorf("%d keys in the bundle at sequence %d, was %d", len(got.JwtAuthorities), got.SequenceNumber, sequence)
		}
		sequence = got.SequenceNumber
	}
	other := jwtKey(t, key.KeyId, time.Now().Add(time.Hour))
	again := jwtKey(t, "other-id", time.Now().Add(time.Hour))
	again.PublicKey = key.PublicKey
	var root []byte
	b.registry.View(func(s *registry.Snapshot) { root = s.Authorities("s1")[1].Slots[0].PublicKey })
	for name, c := range map[string]struct {
		edit   func(k *spiretypes.JWTKey)
		of     *spiretypes.JWTKey
		code   codes.Code
		reason string
	}{
		"none":                      {of: nil, code: codes.InvalidArgument, reason: "authority_invalid"},
		"no key id":                 {of: key, edit: func(k *spiretypes.JWTKey) { k.KeyId = "" }, code: codes.InvalidArgument, reason: "authority_invalid"},
		"R104 key id for terminals": {of: key, edit: func(k *spiretypes.JWTKey) { k.KeyId = "a\x1b[2J" }, code: codes.InvalidArgument, reason: "authority_invalid"},
		"no end":                    {of: key, edit: func(k *spiretypes.JWTKey) { k.ExpiresAt = 0 }, code: codes.InvalidArgument, reason: "authority_invalid"},
		"ended":                     {of: key, edit: func(k *spiretypes.JWTKey) { k.ExpiresAt = 1 }, code: codes.InvalidArgument, reason: "authority_invalid"},
		"ten years":                 {of: key, edit: func(k *spiretypes.JWTKey) { k.ExpiresAt += 10 * 366 * 86400 }, code: codes.InvalidArgument, reason: "authority_invalid"},
		"tainted":                   {of: key, edit: func(k *spiretypes.JWTKey) { k.Tainted = true }, code: codes.InvalidArgument, reason: "authority_tainted"},
		"not a key":                 {of: key, edit: func(k *spiretypes.JWTKey) { k.PublicKey = []byte{1} }, code: codes.InvalidArgument, reason: "authority_invalid"},
		"key id of another":         {of: other, code: codes.AlreadyExists, reason: "key_id_taken"},
		"key with another id":       {of: again, code: codes.AlreadyExists, reason: "key_of_authority"},
		"X.509 authority's key":     {of: key, edit: func(k *spiretypes.JWTKey) { k.KeyId, k.PublicKey = "x", root }, code: codes.InvalidArgument, reason: "key_of_authority"},
	} {
		k := c.of
		if c.edit != nil {
			k = &spiretypes.JWTKey{KeyId: k.KeyId, PublicKey: k.PublicKey, ExpiresAt: k.ExpiresAt}
			c.edit(k)
		}
		_, err := publish(k)
		wantCode(t, name, err, c.code, c.reason)
	}
}

func jwtKey(t *testing.T, id string, end time.Time) *spiretypes.JWTKey {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	return &spiretypes.JWTKey{KeyId: id, PublicKey: spki, ExpiresAt: end.Unix()}
}

// A key is known above us before it is known here, and nobody's key comes back
// that was revoked.
func TestPublishPassesOn(t *testing.T) {
	var passed []string
	refuse := true
	elsewhere := jwtKey(t, "elsewhere", time.Now().Add(time.Hour))
	b := newBelow(t, nil, func(c *serverapi.Config, _ *nodes.Config) {
		c.PublishJWT = func(_ context.Context, k bundle.JWTAuthority) ([]bundle.JWTAuthority, error) {
			passed = append(passed, k.KeyID)
			if refuse {
				return nil, fault.New(fault.Unavailable, "upstream_away", "nobody answers above us")
			}
			return []bundle.JWTAuthority{k, {KeyID: elsewhere.KeyId, PublicKey: elsewhere.PublicKey, ExpiresAt: time.Unix(elsewhere.ExpiresAt, 0)}}, nil
		}
	})
	key := jwtKey(t, "nested-key", time.Now().Add(time.Hour))
	publish := func() (*bundlev1.PublishJWTAuthorityResponse, error) {
		return bundlev1.NewBundleClient(b.conn).PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: key})
	}
	_, err := publish()
	wantCode(t, "while nobody is above us", err, codes.Unavailable, "upstream_away")
	keys := func() (ids []string) {
		got, err := bundlev1.NewBundleClient(b.admin).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range got.JwtAuthorities {
			ids = append(ids, k.KeyId)
		}
		return ids
	}
	if ids := keys(); len(ids) != 1 {
		t.Errorf("a key that is not known above us is known here: %v", ids)
	}
	refuse = false
	if _, err := publish(); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(keys()[1:], " "); got != "nested-key elsewhere" || fmt.Sprint(passed) != "[nested-key nested-key]" {
		t.Errorf("the bundle has %s, passed on were %v", got, passed)
	}
	_, err = b.registry.Update(t.Context(), "test", func(tx *registry.Tx) error {
		own, err := tx.Bundle(td)
		if err != nil {
			return err
		}
		public, err := svid.ParsePublicKey(key.PublicKey)
		if err != nil {
			return err
		}
		return tx.PutBundle(own.WithRevoked(bundle.Revocation{KeyHash: public.Hash}))
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = publish()
	wantCode(t, "a revoked key", err, codes.FailedPrecondition, "authority_revoked") // R69
}
