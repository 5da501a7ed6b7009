package mirror

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/x509"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Waits after failures: of a whole batch, and of one grant in it.
const (
	signFloor   = 250 * time.Millisecond
	signCeiling = 15 * time.Second
	// signAway is after how many failures of whole batches the server counts as away.
	signAway     = 2
	grantFloor   = time.Second
	grantCeiling = 5 * time.Minute
	// expiryMargin is how long before its end an SVID is taken away, or a tenth of
	// its life if that is shorter (R35).
	expiryMargin = 5 * time.Second
)

// cert is an X.509-SVID with its key.
type cert struct {
	id                  spiffeid.ID
	asked, revision     uint64 // of the grant: that we knew, and that the server signed for
	chain, key          []byte
	issuedAt, expiresAt time.Time
	renewAt             time.Time
	authority, authName []byte // the authority that signed the last certificate: key id and subject
}

// usable reports whether the SVID may still be handed out.
func (c *cert) usable(now time.Time) bool {
	return c != nil && now.Before(endOf(c.issuedAt, c.expiresAt))
}

// endOf returns when something that expires is no longer handed out.
func endOf(issuedAt, expiresAt time.Time) time.Time {
	return expiresAt.Add(-min(expiryMargin, expiresAt.Sub(issuedAt)/10))
}

// signed is the outcome of a batch.
type signed []signedItem

type signedItem struct {
	grantID string
	cert    *cert // nil if err is set
	err     error
	refused bool // err is the server's own word
}

// verify checks what the server signed before anyone sees it (R36): it chains
// to the roots, names the ID that was asked for, holds the key that was sent,
// and is valid now.
func verify(w want, chain [][]byte, key crypto.Signer, pkcs8 []byte, revision uint64, roots []*x509.Certificate, now time.Time) (*cert, error) {
	id, err := svid.VerifyX509(chain, roots, w.id.TrustDomain(), now)
	if err != nil {
		return nil, skewed(err, chain, roots, w.id.TrustDomain(), now)
	}
	if id != w.id {
		return nil, fault.New(fault.Invalid, "svid_wrong_id", "the server signed %s instead of %s", id, w.id)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(leaf.PublicKey) {
		return nil, fault.New(fault.Invalid, "svid_wrong_key", "the server signed another key for %s", w.id)
	}
	last := leaf
	if len(chain) > 1 {
		if last, err = x509.ParseCertificate(chain[len(chain)-1]); err != nil {
			return nil, err
		}
	}
	return &cert{id: id, asked: w.revision, revision: max(revision, w.revision), chain: bytes.Join(chain, nil), key: pkcs8,
		issuedAt: now, expiresAt: leaf.NotAfter, authority: last.AuthorityKeyId, authName: last.RawIssuer}, nil
}

// skewed says that it is the clock, if what was just signed would have verified
// at the moment at which the server says that it signed it.
func skewed(err error, chain [][]byte, roots []*x509.Certificate, td spiffeid.TrustDomain, now time.Time) error {
	if len(chain) == 0 {
		return err
	}
	leaf, perr := x509.ParseCertificate(chain[0])
	if perr != nil {
		return err
	}
	signed := leaf.NotBefore.Add(svid.Backdate)
	if _, then := svid.VerifyX509(chain, roots, td, signed); then != nil {
		return err
	}
	return reason.Say(reason.ClockSkew, "the server signed at %s, and this machine's clock says %s",
		signed.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)).Because(err)
}

// accept takes over the outcome of a batch, item by item (R59).
func (m *machine) accept(items signed, ev event, dirty map[*group]bool, fx *effects) {
	m.signing, m.signFailures, m.ledger.signing = false, 0, nil
	for i, item := range items {
		g := m.grants[item.grantID]
		if g == nil || !g.usable {
			continue // gone meanwhile
		}
		g.signing = false
		err := item.err
		if err == nil {
			switch found, _ := m.issuer(item.cert); {
			case item.cert.id != g.entry.SPIFFEID:
				err = fault.New(fault.Conflict, "grant_changed", "the grant changed while its SVID was signed")
			case !found:
				err = fault.New(fault.Conflict, "authority_unknown", "the authority is not in the bundle that we hold")
			}
		}
		if err != nil {
			g.failures++
			g.err, g.denied = err, item.refused
			g.notYet = ev.now.Add(backoff(g.failures, grantFloor, grantCeiling, ev.seed, i))
			// What the server refuses stays refused; anything else may mend itself soon,
			// such as a new authority whose bundle is still on its way.
			g.refused = item.refused || g.failures >= 3
			fx.notes = append(fx.notes, note{message: "no X.509-SVID for a grant", id: item.grantID, reason: fault.ReasonOf(err)})
			markGroups(g, dirty) // whoever waits need not wait for this one
			continue
		}
		g.failures, g.notYet, g.refused, g.cert = 0, time.Time{}, false, item.cert
		g.err, g.denied = nil, false
		g.cert.renewAt = ev.now.Add(jitter(g.cert.expiresAt.Sub(ev.now)/2, ev.seed, i))
		markGroups(g, dirty)
	}
}

// issuer finds the authority that signed c in the own bundle.
func (m *machine) issuer(c *cert) (found, tainted bool) {
	own := m.own()
	if own == nil {
		return false, false
	}
	tainted = true
	for _, r := range own.roots {
		if bytes.Equal(r.certificate.RawSubject, c.authName) && (len(c.authority) == 0 || bytes.Equal(r.certificate.SubjectKeyId, c.authority)) {
			found = true
			tainted = tainted && r.tainted
		}
	}
	return found, found && tainted
}

// checkIssuers follows a change of the own bundle: an SVID without its
// authority goes (R58), one of a tainted authority is replaced at once, and what
// failed because the bundle was behind is tried again.
func (m *machine) checkIssuers(now time.Time) {
	for _, g := range m.grants {
		g.notYet = time.Time{}
		if g.cert == nil {
			continue
		}
		switch found, tainted := m.issuer(g.cert); {
		case !found:
			g.cert = nil
		case tainted:
			g.cert.renewAt = now
		}
	}
}

// expire takes away what ends: SVIDs shortly before their time, and grants from
// those who matched them.
func (m *machine) expire(now time.Time, dirty map[*group]bool) {
	for _, g := range m.grants {
		if g.cert != nil && !g.cert.usable(now) {
			g.cert = nil
			markGroups(g, dirty)
		}
		if len(g.groups) > 0 && !g.serves(now) {
			for group := range g.groups {
				m.rematch(group, now)
				dirty[group] = true
			}
		}
	}
}

// plan decides what to have signed now and when to look again.
func (m *machine) plan(ev event, fx *effects) {
	now := ev.now
	m.next = now.Add(statusInterval)
	soon := func(t time.Time) {
		if !t.IsZero() && t.After(now) && t.Before(m.next) {
			m.next = t
		}
	}
	wanted := m.wanted(now)
	var needs []*grant
	for _, g := range wanted {
		soon(g.entry.ExpiresAt)
		if g.cert != nil {
			soon(endOf(g.cert.issuedAt, g.cert.expiresAt))
			// A revision below the one asked for is of a server that was restored, or of another.
			if g.cert.asked <= g.entry.Revision && g.entry.Revision <= g.cert.revision && !due(g.cert.renewAt, now, g.cert.expiresAt.Sub(g.cert.issuedAt)) {
				soon(g.cert.renewAt)
				continue
			}
		}
		if g.signing {
			continue
		}
		if !due(g.notYet, now, grantCeiling) {
			soon(g.notYet)
			continue
		}
		needs = append(needs, g)
	}
	soon(m.statusAt)
	if len(needs) == 0 || m.signing || m.own() == nil {
		return
	}
	if !due(m.signNotYet, now, signCeiling) {
		soon(m.signNotYet)
		return
	}
	slices.SortFunc(needs, func(a, b *grant) int {
		return cmp.Or(byUrgency(a)-byUrgency(b), byExpiry(a, b), entry.Oldest(&a.entry, &b.entry))
	})
	for _, g := range needs[:min(len(needs), maxBatch)] {
		g.signing = true
		fx.sign = append(fx.sign, want{grantID: g.entry.ID, id: g.entry.SPIFFEID, revision: g.entry.Revision})
	}
	m.signing = true
}

// byUrgency ranks a grant: someone waits for it; it is new; it is due for renewal.
func byUrgency(g *grant) int {
	switch {
	case g.cert == nil && len(g.groups) > 0:
		return 0
	case g.cert == nil:
		return 1
	}
	return 2
}

func byExpiry(a, b *grant) int {
	if a.cert == nil || b.cert == nil {
		return 0
	}
	return a.cert.expiresAt.Compare(b.cert.expiresAt)
}

// wanted returns the grants that should have an SVID: all with a subscriber,
// and as many others as the cache has room for, the lately used first. The
// SVIDs of the rest are given up.
func (m *machine) wanted(now time.Time) []*grant {
	var used, idle []*grant
	for _, g := range m.grants {
		switch {
		case !g.serves(now):
			g.cert = nil
		case len(g.groups) > 0:
			g.lastUse = now
			used = append(used, g)
		case g.entry.DisableX509Prefetch: // what it has is kept until it ends
		default:
			idle = append(idle, g)
		}
	}
	if room := max(m.cacheSize-len(used), 0); len(idle) > room {
		slices.SortFunc(idle, func(a, b *grant) int {
			return cmp.Or(b.lastUse.Compare(a.lastUse), entry.Oldest(&a.entry, &b.entry))
		})
		for _, g := range idle[room:] {
			g.cert = nil
		}
		idle = idle[:room]
	}
	return append(used, idle...)
}
