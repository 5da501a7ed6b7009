package mirror

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"slices"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"google.golang.org/protobuf/proto"
)

// keptFormat changes with kept: another one is refused.
const keptFormat = 1

// kept is what a mirror hands over to the next life of its agent. It holds
// workloads' keys: whoever stores it seals it.
type kept struct {
	Format      int
	TrustDomain string
	Position    []byte   // of the server's log
	Bodies      [][]byte // as the server sent them
	SVIDs       []keptSVID
	Tokens      []keptToken
}

type keptSVID struct {
	Grant             string
	Facts             map[string]string `json:",omitempty"`
	Asked, Revision   uint64
	Chain, Key        []byte
	IssuedAt, LastUse time.Time
}

type keptToken struct {
	Grant    string
	Facts    map[string]string `json:",omitempty"`
	Audience []string
	Revision uint64
	Token    string
	IssuedAt time.Time
	Used     time.Time
}

// Restored counts what was taken over from an earlier life.
type Restored struct {
	Grants, X509SVIDs, JWTSVIDs int
	// Left is how many SVIDs of both kinds were left out: expired, of an authority
	// that is not trusted any more, or not verifiable.
	Left int
}

// keep collects what is to be kept. Its bytes are shared and never change.
func (m *machine) keep(t *tokens) (kept, error) {
	k := kept{Format: keptFormat, TrustDomain: m.td.Name()}
	var err error
	if k.Position, err = proto.Marshal(m.position); err != nil {
		return kept{}, err
	}
	for _, g := range m.grants {
		k.Bodies = append(k.Bodies, g.raw)
	}
	for _, b := range m.bundles {
		k.Bodies = append(k.Bodies, b.raw)
	}
	for p := range m.pairs() {
		if c := p.cert; c != nil {
			k.SVIDs = append(k.SVIDs, keptSVID{Grant: p.grant.entry.ID, Facts: p.facts, Asked: c.asked, Revision: c.revision,
				Chain: c.chain, Key: c.key, IssuedAt: c.issuedAt, LastUse: p.lastUse})
		}
	}
	for _, a := range t.asked {
		if tok := a.token; tok != nil {
			k.Tokens = append(k.Tokens, keptToken{Grant: a.grantID, Facts: a.facts, Audience: a.audience, Revision: tok.of.revision,
				Token: tok.text, IssuedAt: tok.issuedAt, Used: a.used})
		}
	}
	return k, nil
}

// restore takes over what an earlier life has kept, all of it checked as if it
// came from the server (R36). trusted is the own trust domain's bundle as it is
// known from elsewhere: what it does not hold any more is not trusted (R55).
func (m *machine) restore(data []byte, trusted *bundle.Bundle, t *tokens, at moment, seed uint64) (Restored, error) {
	now := at.wall
	var k kept
	var r Restored
	if err := json.Unmarshal(data, &k); err != nil {
		return r, fault.New(fault.Invalid, "kept_malformed", "it cannot be read")
	}
	if k.Format != keptFormat || k.TrustDomain != m.td.Name() {
		return r, fault.New(fault.Invalid, "kept_foreign", "it is of format %d for the trust domain %q", k.Format, k.TrustDomain)
	}
	position := &syncv1.Position{}
	if err := proto.Unmarshal(k.Position, position); err != nil {
		return r, fault.New(fault.Invalid, "kept_malformed", "its position cannot be read")
	}
	fx := &effects{}
	c := m.stage(k.Bodies, fx)
	own := c.bundles[m.td.Name()]
	if own == nil || trusted == nil {
		return r, fault.New(fault.Invalid, "kept_malformed", "it holds no bundle of the trust domain")
	}
	if own.narrow(trusted) {
		// The server is asked for it again: by its hash it is none that a server has.
		c.sum.Sub(own.hash)
		own.hash = sha256.Sum256(nil)
		c.sum.Add(own.hash)
	}
	m.commit(c, event{now: now, seed: seed}, map[*group]bool{}, fx)
	m.position, m.synced, m.now = position, true, now
	r.Grants = len(m.grants)
	for i, s := range k.SVIDs {
		if m.restoreSVID(s, at, seed, i) {
			r.X509SVIDs++
		} else {
			r.Left++
		}
	}
	for i, s := range k.Tokens {
		if m.restoreToken(s, t, at, seed, i) {
			r.JWTSVIDs++
		} else {
			r.Left++
		}
	}
	return r, nil
}

// restoreSVID takes over one X.509-SVID, if it may still be handed out.
func (m *machine) restoreSVID(s keptSVID, at moment, seed uint64, n int) bool {
	now := at.wall
	id, e, ok := m.gives(s.Grant, s.Facts, now)
	if !ok || s.IssuedAt.After(now) {
		return false
	}
	if _, named, _ := e.Grants(s.Facts); len(named) != len(s.Facts) {
		return false
	}
	key, keyType, err := keys.ParsePrivate(s.Key)
	if err != nil {
		return false
	}
	certificates, err := x509.ParseCertificates(s.Chain)
	if err != nil {
		return false
	}
	var chain [][]byte
	for _, c := range certificates {
		chain = append(chain, c.Raw)
	}
	c, err := verify(want{grantID: s.Grant, id: id, revision: s.Asked}, chain, key, s.Key, s.Revision, m.own().bundle.Roots(), at)
	if err != nil {
		return false
	}
	c.issuedAt = s.IssuedAt
	c.renewAt = c.issuedAt.Add(jitter(c.expiresAt.Sub(c.issuedAt)/2, seed, n))
	if keyType != m.keyType {
		c.renewAt = now // the configuration has changed
	}
	if found, tainted := m.issuer(c); !found || tainted || !c.usable(now) {
		return false
	}
	p := m.grants[s.Grant].pair(entry.Matched{GrantID: s.Grant, ID: id, Facts: s.Facts})
	p.cert, p.lastUse = c, s.LastUse
	return true
}

// restoreToken takes over one JWT-SVID, if it may still be handed out.
func (m *machine) restoreToken(s keptToken, t *tokens, at moment, seed uint64, n int) bool {
	now := at.wall
	id, e, ok := m.gives(s.Grant, s.Facts, now)
	if !ok || e.JWTIncludeJTI || s.Revision != e.Revision || s.IssuedAt.After(now) || s.Used.After(now) {
		return false
	}
	tok := &token{text: s.Token, of: subject{id, s.Revision}}
	claims, err := verifyJWT(tok, m.own(), s.Audience, now)
	if err != nil || claims.ID != id || audienceKey(claims.Audience) != audienceKey(s.Audience) || !m.goodKey(tok.keyID) {
		return false
	}
	tok.span = lasting(s.IssuedAt, claims.Expiry, at)
	tok.renewAt = tok.issuedAt.Add(jitter(tok.expiresAt.Sub(tok.issuedAt)/2, seed, n))
	if !tok.usable(tok.of, now) {
		return false
	}
	t.keep(s.Grant, s.Facts, s.Audience, tok, s.Used)
	return true
}

// narrow takes out of a bundle what another does not hold, and marks what is
// tainted there. It reports whether something changed.
func (t *trust) narrow(to *bundle.Bundle) bool {
	narrowed := t.bundle.Clone()
	narrowed.X509 = nil
	for _, a := range t.bundle.X509 {
		i := slices.IndexFunc(to.X509, func(b bundle.X509Authority) bool { return bytes.Equal(a.ASN1, b.ASN1) })
		if i >= 0 {
			a.Tainted = a.Tainted || to.X509[i].Tainted
			narrowed.X509 = append(narrowed.X509, a)
		}
	}
	narrowed.JWT = nil
	for _, a := range t.bundle.JWT {
		i := slices.IndexFunc(to.JWT, func(b bundle.JWTAuthority) bool { return a.KeyID == b.KeyID && bytes.Equal(a.PublicKey, b.PublicKey) })
		if i >= 0 {
			a.Tainted = a.Tainted || to.JWT[i].Tainted
			narrowed.JWT = append(narrowed.JWT, a)
		}
	}
	if narrowed.Equal(t.bundle) {
		return false
	}
	t.take(narrowed)
	return true
}
