package mirror

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
)

// grant is an entry or a rule as the server sent it, and its SVIDs.
type grant struct {
	entry  entry.Entry
	hash   [sha256.Size]byte // of the body
	raw    []byte            // the body, if it is to be kept
	usable bool              // false: malformed; it counts for the sum and for nothing else
	own    pair              // of an entry
	ruled  map[string]*pair  // of a rule: those that are or were lately used, by factsKey
}

// pair is a grant with the facts that fill it, of which an entry needs none: one
// identity and its SVID.
type pair struct {
	grant *grant
	key   string            // of facts
	facts map[string]string // of a rule
	id    spiffeid.ID

	cert     *cert     // nil: none yet, or expired
	signing  bool      // in the batch under way
	failures int       // in a row
	notYet   time.Time // no attempt before
	refused  bool      // the last attempt was refused: nobody waits for it
	denied   bool      // err is the server's own word
	err      error     // of the last attempt; nil: it succeeded, or there was none
	lastUse  time.Time // when it last had a subscriber
	groups   map[*group]bool
}

// factsKey names facts. Every part carries its length,
// so that no two have one key.
func factsKey(facts map[string]string) string {
	var b []byte
	for _, name := range slices.Sorted(maps.Keys(facts)) {
		for _, part := range []string{name, facts[name]} {
			b = binary.AppendUvarint(b, uint64(len(part)))
			b = append(b, part...)
		}
	}
	return string(b)
}

// hold returns a grant that may be used.
func hold(e entry.Entry) *grant {
	g := &grant{entry: e, usable: true}
	if e.Rule == nil {
		g.own = pair{grant: g, id: e.SPIFFEID}
	} else {
		g.ruled = map[string]*pair{}
	}
	return g
}

// pair returns the pair for what a caller has matched.
func (g *grant) pair(matched entry.Matched) *pair {
	if g.entry.Rule == nil {
		return &g.own
	}
	key := factsKey(matched.Facts)
	p := g.ruled[key]
	if p == nil {
		p = &pair{grant: g, key: key, facts: matched.Facts, id: matched.ID}
		g.ruled[key] = p
	}
	return p
}

// find returns the pair with these facts, or nil.
func (g *grant) find(facts map[string]string) *pair {
	switch {
	case g == nil || !g.usable:
		return nil
	case g.entry.Rule == nil:
		return &g.own
	}
	return g.ruled[factsKey(facts)]
}

// adopt takes over the SVIDs of what the grant was before, as far as the
// identities are the same.
func (g *grant) adopt(before *grant) {
	was, is := before.entry.Rule, g.entry.Rule
	switch {
	case !before.usable || !g.usable || (was == nil) != (is == nil):
	case is == nil && before.entry.SPIFFEID == g.entry.SPIFFEID:
		g.own.adopt(&before.own)
	case is != nil && was.Template.Equal(is.Template):
		for key, p := range before.ruled {
			mine := &pair{grant: g, key: key, facts: p.facts, id: p.id}
			mine.adopt(p)
			g.ruled[key] = mine
		}
	}
}

func (p *pair) adopt(before *pair) {
	p.cert, p.signing, p.lastUse = before.cert, before.signing, before.lastUse
}

// serves reports whether the grant may be handed out at all.
func (g *grant) serves(now time.Time) bool {
	return g.usable && !g.entry.Alias() && !g.entry.StoreSVID && !g.entry.Expired(now)
}

// trust is a bundle as the server sent it, with the forms that are handed out.
type trust struct {
	bundle *bundle.Bundle
	hash   [sha256.Size]byte
	raw    []byte // the body, if it is to be kept
	roots  []root
	out    Bundle
}

// root is what recognises the certificates that an authority has signed.
type root struct {
	certificate *x509.Certificate
	tainted     bool
}

// changes is a delta that has been read but not yet applied.
type changes struct {
	grants  map[string]*grant // nil: removed
	bundles map[string]*trust
	sum     entry.Sum // after it
	gone    int       // grants removed
}

// stage reads bodies, the later of two about one thing being the one that
// counts. The machine is left as it is.
func (m *machine) stage(bodies [][]byte, fx *effects) *changes {
	c := &changes{grants: map[string]*grant{}, bundles: map[string]*trust{}, sum: m.sum}
	for _, raw := range bodies {
		var body syncv1.Body
		if err := proto.Unmarshal(raw, &body); err != nil {
			// What it was cannot be told; the sum will show it.
			fx.notes = append(fx.notes, note{message: "the server sent a body that cannot be read", reason: "body_malformed"})
			continue
		}
		hash := sha256.Sum256(raw)
		if !m.keeps {
			raw = nil
		}
		switch b := body.GetBody().(type) {
		case *syncv1.Body_Grant:
			g, err := m.newGrant(b.Grant)
			if err != nil {
				fx.notes = append(fx.notes, note{message: "the server sent a malformed grant", id: b.Grant.GetId(), reason: err.Error()})
			}
			g.hash, g.raw = hash, raw
			m.stageGrant(c, b.Grant.GetId(), g)
		case *syncv1.Body_GrantRemoved:
			m.stageGrant(c, b.GrantRemoved, nil)
		case *syncv1.Body_Bundle:
			t, bad := m.newTrust(b.Bundle)
			for _, reason := range bad {
				fx.notes = append(fx.notes, note{message: "the server sent a malformed key", id: b.Bundle.GetTrustDomain(), reason: reason})
			}
			t.hash, t.raw = hash, raw
			m.stageBundle(c, b.Bundle.GetTrustDomain(), t)
		case *syncv1.Body_BundleRemoved:
			m.stageBundle(c, b.BundleRemoved, nil)
		}
	}
	return c
}

func (m *machine) stageGrant(c *changes, id string, g *grant) {
	before, staged := c.grants[id]
	if !staged {
		before = m.grants[id]
	}
	if before != nil {
		c.sum.Sub(before.hash)
	}
	if g != nil {
		c.sum.Add(g.hash)
	}
	c.grants[id] = g
}

func (m *machine) stageBundle(c *changes, td string, t *trust) {
	before, staged := c.bundles[td]
	if !staged {
		before = m.bundles[td]
	}
	if before != nil {
		c.sum.Sub(before.hash)
	}
	if t != nil {
		c.sum.Add(t.hash)
	}
	c.bundles[td] = t
}

// stageUnlisted removes what we hold and a complete inventory does not list.
func (m *machine) stageUnlisted(c *changes) {
	for id := range m.grants {
		_, listed := m.inventory.grants[id]
		if _, staged := c.grants[id]; !listed && !staged {
			m.stageGrant(c, id, nil)
		}
	}
	for td := range m.bundles {
		_, listed := m.inventory.bundles[td]
		if _, staged := c.bundles[td]; !listed && !staged {
			m.stageBundle(c, td, nil)
		}
	}
	for _, g := range c.grants {
		if g == nil {
			c.gone++
		}
	}
}

// commit applies changes. An SVID outlives a change of its grant as long as the
// identity is the same; it is replaced as soon as the new one is there.
func (m *machine) commit(c *changes, ev event, dirty map[*group]bool, fx *effects) {
	m.sum, fx.changed = c.sum, true
	for _, id := range slices.Sorted(maps.Keys(c.grants)) {
		before, after := m.grants[id], c.grants[id]
		if after == nil {
			delete(m.grants, id)
		} else {
			m.grants[id] = after
		}
		if before != nil {
			fx.narrowed = true
			if after != nil {
				after.adopt(before)
			}
		}
		m.regroup(id, after, ev.now, dirty)
	}
	for _, td := range slices.Sorted(maps.Keys(c.bundles)) {
		before, after := m.bundles[td], c.bundles[td]
		if after == nil {
			delete(m.bundles, td)
		} else {
			m.bundles[td] = after
		}
		fx.keysGone = fx.keysGone || lostKeys(before, after)
		fx.narrowed = fx.narrowed || before != nil
		if td == m.td.Name() && after != nil {
			fx.own = after.bundle
			m.checkIssuers(ev)
		}
		for _, g := range m.groups {
			if td == m.td.Name() || g.federates[td] {
				dirty[g] = true
			}
		}
	}
}

// lostKeys reports whether a JWT key of before is gone from after, or tainted.
func lostKeys(before, after *trust) bool {
	if before == nil {
		return false
	}
	for _, old := range before.bundle.JWT {
		if after == nil || !slices.ContainsFunc(after.bundle.JWT, func(a bundle.JWTAuthority) bool {
			return a.KeyID == old.KeyID && (old.Tainted || !a.Tainted)
		}) {
			return true
		}
	}
	return false
}

// newGrant reads a grant. With an error it returns one that is not usable.
func (m *machine) newGrant(p *syncv1.Grant) (*grant, error) {
	bad := &grant{}
	var id spiffeid.ID
	var rule *entry.Rule
	var err error
	if p.GetIdTemplate() == "" {
		id, err = identity.ParseWorkload(m.td, p.GetSpiffeId())
	} else {
		rule, err = entry.ParseRule(m.td, p.GetIdTemplate(), p.GetIdPrefix(), p.GetTrust())
	}
	if err != nil {
		return bad, err
	}
	parent, err := identity.ParseMember(m.td, p.GetParentId())
	if err != nil {
		return bad, err
	}
	if p.GetId() == "" || len(p.GetId()) > entry.MaxID || len(p.GetHint()) > entry.MaxHint ||
		len(p.GetFederatesWith()) > entry.MaxFederatesWith || len(p.GetDnsNames()) > entry.MaxDNSNames {
		return bad, fault.New(fault.Invalid, "grant_malformed", "its id, hint or a list is too long or missing")
	}
	e := entry.Entry{
		ID: strings.Clone(p.GetId()), Revision: p.GetRevision(), SPIFFEID: id, ParentID: parent, Rule: rule,
		X509TTL: time.Duration(p.GetX509SvidTtl()) * time.Second, JWTTL: time.Duration(p.GetJwtSvidTtl()) * time.Second,
		DNSNames: p.GetDnsNames(), Hint: p.GetHint(), Admin: p.GetAdmin(), Downstream: p.GetDownstream(), StoreSVID: p.GetStoreSvid(),
		DisableX509Prefetch: p.GetDisableX509SvidPrefetch(), JWTIncludeJTI: p.GetJwtSvidIncludeJti(),
		CreatedAt: time.Unix(p.GetCreatedAt(), 0).UTC(),
	}
	if p.GetExpiresAt() != 0 {
		e.ExpiresAt = time.Unix(p.GetExpiresAt(), 0).UTC()
	}
	for _, s := range p.GetSelectors() {
		e.Selectors = append(e.Selectors, entry.Selector{Type: s.GetType(), Value: s.GetValue()})
	}
	// Without a selector a grant would match every caller.
	if e.Selectors, err = entry.NormalizeSelectors(e.Selectors); err != nil {
		return bad, err
	}
	for _, name := range p.GetFederatesWith() {
		td, err := identity.ParseTrustDomain(name)
		if err != nil {
			return bad, err
		}
		e.FederatesWith = append(e.FederatesWith, td)
	}
	if rule != nil { // it gives more than one ID, so more can be wrong with it
		if err := entry.Validate(m.td, &e, time.Time{}); err != nil {
			return bad, err
		}
	}
	return hold(e), nil
}

// newTrust reads a bundle. A key that cannot be read is left out alone, so that
// clients, who refuse a whole message for one bad key, never see it.
func (m *machine) newTrust(p *syncv1.Bundle) (*trust, []string) {
	td, err := identity.ParseTrustDomain(p.GetTrustDomain())
	if err != nil {
		return &trust{bundle: &bundle.Bundle{}}, []string{err.Error()}
	}
	var bad []string
	t := &trust{bundle: &bundle.Bundle{TrustDomain: td, Sequence: p.GetSequence(), RefreshHint: time.Duration(p.GetRefreshHint()) * time.Second}}
	for i, a := range p.GetX509Authorities() {
		if _, err := x509.ParseCertificate(a.GetAsn1()); err != nil {
			bad = append(bad, fmt.Sprintf("X.509 authority %d: %v", i, err))
			continue
		}
		t.bundle.X509 = append(t.bundle.X509, bundle.X509Authority{ASN1: a.GetAsn1(), Tainted: a.GetTainted()})
	}
	for _, a := range p.GetJwtAuthorities() {
		_, err := x509.ParsePKIXPublicKey(a.GetPublicKey())
		if err != nil || a.GetKeyId() == "" {
			bad = append(bad, fmt.Sprintf("JWT authority %q cannot be read", a.GetKeyId()))
			continue
		}
		key := bundle.JWTAuthority{KeyID: a.GetKeyId(), PublicKey: a.GetPublicKey(), Tainted: a.GetTainted()}
		if a.GetExpiresAt() != 0 {
			key.ExpiresAt = time.Unix(a.GetExpiresAt(), 0).UTC()
		}
		t.bundle.JWT = append(t.bundle.JWT, key)
	}
	t.take(t.bundle)
	return t, bad
}

// take makes the forms of a bundle whose certificates can be read.
func (t *trust) take(b *bundle.Bundle) {
	t.bundle, t.roots = b, nil
	t.out = Bundle{TrustDomain: b.TrustDomain, X509: b.X509DER(), JWKS: b.MarshalJWKS(), Keys: b}
	for _, a := range b.X509 {
		if c, err := x509.ParseCertificate(a.ASN1); err == nil {
			t.roots = append(t.roots, root{certificate: c, tainted: a.Tainted})
		}
	}
}

// goodKey reports whether tokens of that key may be handed out.
func (t *trust) goodKey(keyID string) bool {
	return slices.ContainsFunc(t.bundle.JWT, func(a bundle.JWTAuthority) bool { return a.KeyID == keyID && !a.Tainted })
}

// empty reports whether a bundle holds no trust domain, because it was malformed.
func (t *trust) empty() bool { return t.bundle.TrustDomain == spiffeid.TrustDomain{} }
