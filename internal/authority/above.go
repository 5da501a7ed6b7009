package authority

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/internal/upstream"
)

// taintWait is how long a root that is tainted above is not marked here while
// something below it still signs: what was replaced would be below it again.
const taintWait = time.Minute

// Above is what is known of the authority above.
type Above struct {
	Publishes bool // it passes JWT keys on
	Known     bool // it has said what it trusts:
	Trust     upstream.Trust
	// TaintedSince is since when roots, by their DER, are known to be tainted.
	TaintedSince map[string]time.Time
}

// nested reports whether keys of this kind are the business of an authority above.
func (m *machine) nested() bool { return m.Above != nil && (m.name == X509 || m.Above.Publishes) }

// rootAbove returns a root as the authority above has it.
func (m *machine) rootAbove(der []byte) (bundle.X509Authority, bool) {
	i := slices.IndexFunc(m.Above.Trust.Roots, func(a bundle.X509Authority) bool { return bytes.Equal(a.ASN1, der) })
	if i < 0 {
		return bundle.X509Authority{}, false
	}
	return m.Above.Trust.Roots[i], true
}

// stale reports whether a key that may sign should not for long: the authority
// above is another one now, or does not want its root to be used any more.
func (m *machine) stale(s registry.Slot) bool {
	switch {
	case s.Upstream != m.nested():
		return true
	case !s.Upstream || m.name != X509 || !m.Above.Known:
		return false
	}
	root, there := m.rootAbove(s.Root)
	return !there || root.Tainted && slices.ContainsFunc(m.Above.Trust.Roots, func(a bundle.X509Authority) bool { return !a.Tainted })
}

// carrier returns the index of the key because of which the rest of what the
// authority above trusts is in the bundle, or -1.
func (m *machine) carrier() int {
	for _, state := range []registry.SlotState{registry.SlotPrepared, registry.SlotActive, registry.SlotOld} {
		for i := len(m.slots) - 1; i >= 0; i-- {
			if m.slots[i].State == state && m.slots[i].Upstream {
				return i
			}
		}
	}
	return -1
}

// needed reports whether something of the authority above has to stay in the
// bundle whatever that says now: a key of some server depends on it, or another
// server has it from there.
func (m *machine) needed(name []byte) bool {
	names := func(list [][]byte) bool {
		return slices.ContainsFunc(list, func(n []byte) bool { return bytes.Equal(n, name) })
	}
	if slices.ContainsFunc(m.Others, func(s registry.Slot) bool {
		return names(s.Given) || bytes.Equal(s.Root, name) || bytes.Equal(s.Certificate, name) || m.name == JWT && s.AuthorityID == string(name)
	}) {
		return true
	}
	return slices.ContainsFunc(m.slots, func(s registry.Slot) bool {
		return names(s.Given) || bytes.Equal(s.Root, name) || !s.Upstream && (bytes.Equal(s.Certificate, name) || m.name == JWT && s.AuthorityID == string(name))
	})
}

// release takes out of the bundle what nothing needs any more.
func (m *machine) release(b *bundle.Bundle, names ...[]byte) *bundle.Bundle {
	for _, name := range names {
		switch {
		case m.needed(name):
		case m.name == JWT:
			b = b.WithoutJWT(string(name))
		default:
			b = b.WithoutX509(name)
		}
	}
	return b
}

// adopt brings the bundle in step with what the authority above trusts. Its roots
// come in at once. One that it has dropped goes when nothing depends on it, or
// for ever if it was tainted before: then it was revoked. A JWT key that it has
// dropped goes at once, ours too.
func (m *machine) adopt() bool {
	if !m.nested() || !m.Above.Known {
		return false
	}
	carrier := m.carrier()
	if carrier < 0 {
		return false
	}
	before, b := slices.Clone(m.slots), m.Bundle
	var given, were [][]byte
	for i, s := range m.slots {
		were = append(were, s.Given...)
		m.slots[i].Given = nil
	}
	if m.name == JWT {
		for _, k := range m.Above.Trust.JWT {
			if !b.IsRevoked(sha256.Sum256(k.PublicKey)) {
				b, given = b.WithJWT(k), append(given, []byte(k.KeyID))
			}
		}
	} else {
		for _, root := range m.Above.Trust.Roots {
			if hash, ok := keyHash(root.ASN1); !ok || b.IsRevoked(hash) {
				continue
			}
			root.Tainted = root.Tainted && m.mayTaint(root.ASN1)
			b, given = b.WithX509(root), append(given, root.ASN1)
		}
		b = m.revokeGone(b)
	}
	m.slots[carrier].Given = given
	b = m.release(b, were...)
	same := b.Equal(m.Bundle) && slices.Equal(b.Revoked, m.Bundle.Revoked)
	for i := range m.slots {
		same = same && slices.EqualFunc(m.slots[i].Given, before[i].Given, bytes.Equal)
	}
	if same {
		m.slots = before
		return false
	}
	b.Sequence = m.Bundle.Sequence // one act, one step (R75)
	if !b.Equal(m.Bundle) {
		b.Sequence++
	}
	m.Bundle = b
	return true
}

// mayTaint reports whether a root that is tainted above can be marked here:
// nothing below it signs any more, or has had the time to be replaced.
func (m *machine) mayTaint(root []byte) bool {
	signs := func(s registry.Slot) bool {
		return bytes.Equal(s.Root, root) && (s.State == registry.SlotActive || s.State == registry.SlotPrepared)
	}
	if !slices.ContainsFunc(m.slots, signs) && !slices.ContainsFunc(m.Others, signs) {
		return true
	}
	since, known := m.Above.TaintedSince[string(root)]
	return known && m.reached(since.Add(taintWait))
}

// revokeGone takes roots out of a bundle for ever that were tainted and that the
// authority above does not have any more.
func (m *machine) revokeGone(b *bundle.Bundle) *bundle.Bundle {
	for _, s := range m.slots {
		if !s.Upstream {
			continue
		}
		i := slices.IndexFunc(b.X509, func(a bundle.X509Authority) bool { return a.Tainted && bytes.Equal(a.ASN1, s.Root) })
		if _, there := m.rootAbove(s.Root); i >= 0 && !there {
			b = b.WithRevoked(revocationOf(s.Root))
		}
	}
	return b
}

// alarmLevel is the percent of a key's life of which less is left, as operators
// are told: 50, 25 or 10; 0: more is.
func alarmLevel(left, life time.Duration) int {
	for _, percent := range []int{10, 25, 50} {
		if left <= life/100*time.Duration(percent) {
			return percent
		}
	}
	return 0
}

func keyHash(der []byte) ([sha256.Size]byte, bool) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return [sha256.Size]byte{}, false
	}
	return sha256.Sum256(c.RawSubjectPublicKeyInfo), true
}

// revocationOf is what is remembered of a root that goes.
func revocationOf(der []byte) bundle.Revocation {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return bundle.Revocation{} // not of ours: what has no key is no authority
	}
	return bundle.Revocation{KeyHash: sha256.Sum256(c.RawSubjectPublicKeyInfo), Until: c.NotAfter.Add(pruneAfter)}
}

// below returns the index of the key below the root that is asked for by its
// subject key identifier, in that state, or -1.
func (m *machine) below(states ...registry.SlotState) int {
	return slices.IndexFunc(m.slots, func(s registry.Slot) bool {
		return s.Upstream && slices.Contains(states, s.State) && svid.CertificateID(s.Root) == m.Ask.id
	})
}

// checkAbove refuses what an operator wants of the authority above's root.
func (m *machine) checkAbove() error {
	old := m.below(registry.SlotOld)
	switch {
	case m.carrier() < 0:
		return fault.New(fault.Precondition, "upstream_not_configured", "upstream authority is not configured").
			Fix("use localauthority: this server signs its own X.509 authorities")
	case m.Ask.id == "":
		return fault.New(fault.Invalid, "authority_id_missing", "no subject key identifier of an upstream authority is given")
	case m.below(registry.SlotActive, registry.SlotPrepared) >= 0:
		return fault.New(fault.Precondition, "authority_in_use", "the upstream authority %q is in use: what signs here leads to it", m.Ask.id).
			Fix("replace it above, and wait until this server has an authority under the new one")
	case old < 0:
		return fault.New(fault.Invalid, "authority_unknown", "%q is no upstream authority that an old authority of this server leads to", m.Ask.id).Fix("see the command show")
	}
	i := slices.IndexFunc(m.Bundle.X509, func(a bundle.X509Authority) bool { return bytes.Equal(a.ASN1, m.slots[old].Root) })
	switch {
	case i < 0:
		return fault.New(fault.Precondition, "authority_not_published", "the upstream authority %q is not in the bundle", m.Ask.id).
			Fix("nothing is to be done: nobody accepts what it signed")
	case m.Ask.do == askRevokeAbove && !m.Bundle.X509[i].Tainted:
		return notTainted(m.Ask.id)
	}
	return nil
}

// taintAbove marks a root of the authority above, so that all replace what is under it.
func (m *machine) taintAbove() bool {
	if !m.asks(askTaintAbove) {
		return false
	}
	s := m.slots[m.below(registry.SlotOld)]
	b := m.Bundle.WithX509(bundle.X509Authority{ASN1: s.Root, Tainted: true})
	if b.Equal(m.Bundle) {
		return false
	}
	m.Bundle, m.about = b, s
	return true
}

// revokeAbove takes a root of the authority above out of the bundle for ever.
func (m *machine) revokeAbove() bool {
	if !m.asks(askRevokeAbove) {
		return false
	}
	s := m.slots[m.below(registry.SlotOld)]
	m.Bundle, m.about = m.Bundle.WithRevoked(revocationOf(s.Root)), s
	return true
}
