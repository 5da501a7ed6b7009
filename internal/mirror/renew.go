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
	"github.com/plastron/plastron/internal/keys"
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
	// taintSpread is the time over which what a tainted authority signed is replaced (R69).
	taintSpread = 15 * time.Second
	// together is how much earlier than due an SVID is renewed with others that are,
	// or a hundredth of its life if that is shorter: a look at all grants for each
	// would cost more than signing.
	together = 2 * time.Second
	// expiryMargin is how long before its end an SVID is taken away, or a tenth of
	// its life if that is shorter (R35).
	expiryMargin = 5 * time.Second
)

// cert is an X.509-SVID with its key.
type cert struct {
	id              spiffeid.ID
	asked, revision uint64 // of the grant: that we knew, and that the server signed for
	chain, key      []byte
	span
	authority, authName []byte // the authority that signed the last certificate: key id and subject
}

// span is the life of something that ends, by our wall clock as it goes now.
type span struct {
	issuedAt, expiresAt, renewAt time.Time
	notAfter                     time.Time     // as it is written in the document
	ends                         time.Duration // when that is by the clock that cannot be set
}

// lasting returns the life of a document that came at a moment.
func lasting(issuedAt, notAfter time.Time, at moment) span {
	return span{issuedAt: issuedAt, expiresAt: notAfter, notAfter: notAfter, ends: at.boot + notAfter.Sub(at.wall)}
}

// endsWith reports whether the document ends with its grant: no other would last longer,
// so it is not renewed because of the time.
func (s *span) endsWith(e *entry.Entry) bool {
	return !e.ExpiresAt.IsZero() && !s.notAfter.Before(e.ExpiresAt.Truncate(time.Second))
}

// moment is a time by both clocks.
type moment struct {
	wall time.Time
	boot time.Duration // sleep included; it cannot be set
}

// follow fits the life to a wall clock that was set: what is held lives as long as
// it did, so that nothing outlives its end because the clock was put back (R35,
// R107), and never longer than the document says.
func (s *span) follow(at moment) {
	to := at.wall.Add(s.ends - at.boot)
	if to.After(s.notAfter) {
		to = s.notAfter
	}
	by := to.Sub(s.expiresAt)
	s.issuedAt, s.expiresAt, s.renewAt = s.issuedAt.Add(by), to, s.renewAt.Add(by)
}

// follow tells the machine that the wall clock was set.
func (m *machine) follow(at moment) {
	for p := range m.pairs() {
		if p.cert != nil {
			p.cert.follow(at)
		}
	}
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
	facts   map[string]string
	cert    *cert // nil if err is set
	err     error
	refused bool // err is the server's own word
}

// verify checks what the server signed before anyone sees it (R36): it chains
// to the roots, names the ID that was asked for, holds the key that was sent,
// and is valid now.
func verify(w want, chain [][]byte, key crypto.Signer, pkcs8 []byte, revision uint64, roots []*x509.Certificate, at moment) (*cert, error) {
	id, err := svid.VerifyX509(chain, roots, w.id.TrustDomain(), at.wall)
	if err != nil {
		return nil, skewed(err, chain, roots, w.id.TrustDomain(), at.wall)
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
		span: lasting(at.wall, leaf.NotAfter, at), authority: last.AuthorityKeyId, authName: last.RawIssuer}, nil
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
		p := m.grants[item.grantID].find(item.facts)
		if p == nil {
			continue // gone meanwhile
		}
		p.signing = false
		err := item.err
		if err == nil {
			switch found, _ := m.issuer(item.cert); {
			case item.cert.id != p.id:
				err = fault.New(fault.Conflict, "grant_changed", "the grant changed while its SVID was signed")
			case !found:
				err = fault.New(fault.Conflict, "authority_unknown", "the authority is not in the bundle that we hold")
			}
		}
		if err != nil {
			p.failures++
			p.err, p.denied = err, item.refused
			// What the server refuses stays refused; anything else may mend itself soon,
			// such as a new authority whose bundle is still on its way, or facts of which
			// the server could not tell whether they are true.
			passing := fault.ReasonOf(err) == entry.FactsUnavailable
			ceiling := grantCeiling
			if passing {
				ceiling = signCeiling
			}
			p.notYet = ev.now.Add(backoff(p.failures, grantFloor, ceiling, ev.seed, i))
			p.refused = item.refused && !passing || p.failures >= 3
			fx.notes = append(fx.notes, note{message: "no X.509-SVID for a grant", id: item.grantID, reason: fault.ReasonOf(err)})
			markGroups(p, dirty) // whoever waits need not wait for this one
			continue
		}
		p.failures, p.notYet, p.refused, p.cert = 0, time.Time{}, false, item.cert
		p.err, p.denied, fx.changed = nil, false, true
		p.cert.renewAt = ev.now.Add(jitter(p.cert.expiresAt.Sub(ev.now)/2, ev.seed, i))
		if p.cert.endsWith(&p.grant.entry) {
			p.cert.renewAt = p.cert.expiresAt
		}
		markGroups(p, dirty)
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
// authority goes (R58), those of a tainted authority are replaced soon, and what
// failed because the bundle was behind is tried again.
func (m *machine) checkIssuers(ev event) {
	var tainted []*pair
	for p := range m.pairs() {
		p.notYet = time.Time{}
		if p.cert == nil {
			continue
		}
		switch found, bad := m.issuer(p.cert); {
		case !found:
			p.cert = nil
		case bad:
			tainted = append(tainted, p)
		}
	}
	// The soonest to end first, and not all agents in the same moment.
	slices.SortFunc(tainted, func(a, b *pair) int { return cmp.Or(byExpiry(a, b), byAge(a, b)) })
	for i, p := range tainted {
		at := ev.now.Add(time.Duration(float64(taintSpread) * (float64(i) + fraction(ev.seed, i)) / float64(len(tainted))))
		if at.Before(p.cert.renewAt) {
			p.cert.renewAt = at
		}
	}
}

// expire takes away what ends: SVIDs shortly before their time, and grants from
// those who matched them.
func (m *machine) expire(now time.Time, dirty map[*group]bool) {
	for p := range m.pairs() {
		if p.cert != nil && !p.cert.usable(now) {
			p.cert = nil
			markGroups(p, dirty)
		}
		if len(p.groups) > 0 && !p.grant.serves(now) {
			for group := range p.groups {
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
	var needs, early []*pair
	m.first[0] = end{}
	for _, p := range m.wanted(now) {
		e := &p.grant.entry
		soon(e.ExpiresAt)
		if p.cert != nil {
			until := endOf(p.cert.issuedAt, p.cert.expiresAt)
			soon(until)
			if !p.cert.endsWith(e) {
				m.first[0].add(p.id, until)
			}
			// A revision below the one asked for is of a server that was restored, or of another.
			life := p.cert.expiresAt.Sub(p.cert.issuedAt)
			if p.cert.asked <= e.Revision && e.Revision <= p.cert.revision && !due(p.cert.renewAt, now, life) {
				if !m.signing { // else the end of the batch is what comes next
					soon(p.cert.renewAt)
				}
				if !p.signing && due(p.notYet, now, grantCeiling) && p.cert.renewAt.Sub(now) <= min(together, life/100) {
					early = append(early, p)
				}
				continue
			}
		}
		if p.signing {
			continue
		}
		if !due(p.notYet, now, grantCeiling) {
			soon(p.notYet)
			continue
		}
		needs = append(needs, p)
	}
	soon(m.statusDue(now))
	if len(needs) == 0 || m.signing || m.own() == nil {
		return
	}
	if !due(m.signNotYet, now, m.signWait) {
		soon(m.signNotYet)
		return
	}
	needs = append(needs, early...)
	slices.SortFunc(needs, func(a, b *pair) int {
		return cmp.Or(byUrgency(a)-byUrgency(b), byExpiry(a, b), byAge(a, b))
	})
	for _, p := range needs[:min(len(needs), m.batchSize())] {
		p.signing = true
		fx.sign = append(fx.sign, want{grantID: p.grant.entry.ID, facts: p.facts, id: p.id, revision: p.grant.entry.Revision})
	}
	m.signing = true
}

// batchSize is how many SVIDs are signed by one call: of RSA keys fewer, so that
// whoever waits does not wait for many to be made.
func (m *machine) batchSize() int {
	if m.keyType == keys.RSA2048 {
		return maxRSABatch
	}
	return maxBatch
}

// byUrgency ranks a pair: someone waits for it; it is new; it is due for renewal.
func byUrgency(p *pair) int {
	switch {
	case p.cert == nil && len(p.groups) > 0:
		return 0
	case p.cert == nil:
		return 1
	}
	return 2
}

func byExpiry(a, b *pair) int {
	if a.cert == nil || b.cert == nil {
		return 0
	}
	return a.cert.expiresAt.Compare(b.cert.expiresAt)
}

func byAge(a, b *pair) int {
	return cmp.Or(entry.Oldest(&a.grant.entry, &b.grant.entry), cmp.Compare(a.key, b.key))
}

// wanted returns the pairs that should have an SVID: all with a subscriber, and
// as many other entries as the cache has room for, the lately used first. What is
// signed only on demand, by a rule or an entry that says so, takes part in the
// room, but is renewed only while someone uses it. The SVIDs of the rest are given
// up: no more are held than cacheSize, or than have a subscriber if these are more.
func (m *machine) wanted(now time.Time) []*pair {
	var used, idle []*pair
	for p := range m.pairs() {
		e := &p.grant.entry
		switch {
		case !p.grant.serves(now):
			p.giveUp()
		case len(p.groups) > 0:
			p.lastUse = now
			used = append(used, p)
		case e.Rule != nil && p.cert == nil && due(p.notYet, now, grantCeiling):
			p.giveUp()
		case e.DisableX509Prefetch && p.cert == nil:
		default:
			idle = append(idle, p)
		}
	}
	if room := max(m.cacheSize-len(used), 0); len(idle) > room {
		slices.SortFunc(idle, func(a, b *pair) int { return cmp.Or(b.lastUse.Compare(a.lastUse), byAge(a, b)) })
		for _, p := range idle[room:] {
			p.giveUp()
		}
		idle = idle[:room]
	}
	m.full = len(used)+len(idle) > m.cacheSize
	idle = slices.DeleteFunc(idle, func(p *pair) bool { return p.grant.entry.Rule != nil || p.grant.entry.DisableX509Prefetch })
	return append(used, idle...)
}

// giveUp forgets the SVID, and of a rule the pair, unless its outcome is awaited.
func (p *pair) giveUp() {
	p.cert = nil
	if p.grant.entry.Rule != nil && !p.signing && len(p.groups) == 0 {
		delete(p.grant.ruled, p.key)
	}
}
