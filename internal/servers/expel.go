package servers

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/registry"
)

// evictAgain is when an eviction is tried again that this server could not make.
const evictAgain = time.Second

// expel takes note of the servers that are expelled.
func (m *machine) expel(all []registry.Expulsion, boot time.Duration) {
	for _, x := range all {
		if x.Server == m.id {
			m.expelled = &x
			continue
		}
		if known, ok := m.outcasts[x.Server]; !ok || !known.RevokeAt.Equal(x.RevokeAt) {
			m.outcasts[x.Server], m.evictAt = x, boot
			m.forget(x.Server)
		}
	}
}

func (m *machine) outcast(id string) bool {
	_, is := m.outcasts[id]
	return is
}

// banish decides what becomes of the estate of a server that is expelled: its row goes
// at once, its authorities are tainted, so that all replace what is under them, and
// once that has had its time they leave the bundle for ever (R69). A key that it
// published since has nothing under it that anyone could need. Below an upstream the
// root stays, for it is others' too.
func banish(x registry.Expulsion, e estate, now time.Time) (s settlement, changed bool) {
	b := e.bundle
	s = settlement{bundle: b, row: e.row != nil}
	over := !now.Before(x.RevokeAt)
	for _, a := range e.authorities {
		for _, slot := range a.Slots {
			switch {
			case len(slot.PublicKey) == 0: // it was never made
			case over, slot.PublishedAt.After(x.At):
				s.bundle = s.bundle.WithRevoked(bundle.Revocation{KeyHash: sha256.Sum256(slot.PublicKey), Until: slot.NotAfter.Add(pruneAfter)})
			default:
				s.bundle = taint(s.bundle, a.Kind, slot)
			}
		}
		if over {
			s.kinds = append(s.kinds, a.Kind)
		}
	}
	if len(b.X509) > 0 && len(s.bundle.X509) == 0 || len(b.JWT) > 0 && len(s.bundle.JWT) == 0 {
		s.bundle, s.kinds = b, nil // somebody else has to have a key first
	}
	return s, s.row || len(s.kinds) > 0 || s.bundle.Sequence != b.Sequence || !slices.Equal(s.bundle.Revoked, b.Revoked)
}

// taint marks a key that is in the bundle.
func taint(b *bundle.Bundle, kind string, slot registry.Slot) *bundle.Bundle {
	switch kind {
	case "x509":
		for _, a := range b.X509 {
			if bytes.Equal(a.ASN1, slot.Certificate) {
				a.Tainted = true
				return b.WithX509(a)
			}
		}
	case "jwt":
		for _, k := range b.JWT {
			if k.KeyID == slot.AuthorityID && bytes.Equal(k.PublicKey, slot.PublicKey) {
				k.Tainted = true
				return b.WithJWT(k)
			}
		}
	}
	return b
}

// nextEviction is when to look at the outcasts again, given those of which authorities
// are left.
func nextEviction(left []registry.Expulsion, now time.Time, boot time.Duration) time.Duration {
	var next time.Duration
	for _, x := range left {
		if at := boot + max(x.RevokeAt.Sub(now), evictAgain); next == 0 || at < next {
			next = at
		}
	}
	return next
}
