package servers

import (
	"bytes"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/registry"
)

const (
	// pruneAfter is how long an authority stays in the bundle after the last
	// document under it has ended: for validators whose clock is slow.
	pruneAfter = time.Minute
	// forgetAfter is how long the row of a server that is gone stays, once nothing
	// else of it is left.
	forgetAfter = time.Hour
	pruneEvery  = 5 * time.Minute
)

// gone reports whether a server can surely sign no more: it ended in order, its
// lease has run out, it never had a row and so no lease, or the store is held by
// this process alone. row is the one that is stored now.
func (m *machine) gone(id string, row *registry.Server, boot time.Duration) bool {
	if id == m.id || row == nil || row.Stopped || !m.shared {
		return id != m.id
	}
	p := m.peers[id]
	return p != nil && p.row.Beat == row.Beat && bytes.Equal(p.row.Instance, row.Instance) && boot > p.ends()
}

// forgotten reports whether the row of a server that is gone can be removed.
func (m *machine) forgotten(id string, boot time.Duration) bool {
	p := m.peers[id]
	return p != nil && boot-p.seen > forgetAfter
}

// mayPrune says why this server may not remove what time has ended, or nil.
func (m *machine) mayPrune(now time.Time, boot time.Duration) error {
	if err := m.maySign(now, boot); err != nil {
		return err
	}
	if err := m.stale(boot); err != nil {
		return err
	}
	return m.checkClock(now, boot, maxSkewHere)
}

// estate is what a server that is gone has left.
type estate struct {
	row         *registry.Server // nil: it has none
	authorities []registry.Authority
	bundle      *bundle.Bundle
}

// settlement is what of it nobody needs any more.
type settlement struct {
	bundle *bundle.Bundle // without the authorities
	kinds  []string       // of the authorities
	row    bool
}

func (s *settlement) empty() bool { return len(s.kinds) == 0 && !s.row }

// settle decides what of an estate can be removed. The row goes last.
func (m *machine) settle(id string, e estate, now time.Time, boot time.Duration) settlement {
	s := settlement{bundle: e.bundle}
	if m.mayPrune(now, boot) != nil || !m.gone(id, e.row, boot) {
		return s
	}
	for _, a := range e.authorities {
		if left, ok := withdraw(s.bundle, a, now); ok {
			s.bundle, s.kinds = left, append(s.kinds, a.Kind)
		}
	}
	s.row = e.row != nil && len(e.authorities) == len(s.kinds) && m.forgotten(id, boot)
	return s
}

// withdraw returns the bundle without the keys of an authority that nobody uses
// any more. It reports false while a document under them may be valid, if it
// does not know the kind, or if no key would be left: time alone never empties a
// bundle.
func withdraw(b *bundle.Bundle, a registry.Authority, now time.Time) (*bundle.Bundle, bool) {
	for _, s := range a.Slots {
		end := s.NotAfter // nothing under it outlives it
		if s.State == registry.SlotOld && !s.LastExpiry.IsZero() {
			end = s.LastExpiry
		}
		if now.Before(end.Add(pruneAfter)) {
			return b, false
		}
	}
	left := b
	switch a.Kind {
	case "x509":
		for _, s := range a.Slots {
			left = left.WithoutX509(s.Certificate)
		}
		return left, len(left.X509) > 0 || len(b.X509) == 0
	case "jwt":
		for _, s := range a.Slots {
			left = left.WithoutJWT(s.AuthorityID)
		}
		return left, len(left.JWT) > 0 || len(b.JWT) == 0
	}
	return b, false
}
