package authority

import (
	"crypto/sha256"
	"slices"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
)

// asks reports whether an operator wants this.
func (m *machine) asks(do string) bool { return m.Ask != nil && m.Ask.do == do }

// named returns the index of the slot of an authority, or -1.
func (m *machine) named(id string) int {
	return slices.IndexFunc(m.slots, func(s registry.Slot) bool { return s.AuthorityID == id && id != "" })
}

// rule is the one that fulfils what is asked for.
func (a *ask) rule() string {
	if a.do == askPrepare {
		return "publish"
	}
	return a.do
}

// withdraws reports whether trust is taken away, not given.
func (a *ask) withdraws() bool { return a != nil && (a.do == askTaint || a.do == askRevoke) }

// checkAsk refuses what an operator wants and the state of the keys does not allow.
func (m *machine) checkAsk() error {
	switch {
	case m.Ask == nil:
		return nil
	case m.Ask.do == askPrepare && m.at(registry.SlotActive) < 0:
		return fault.New(fault.Unavailable, "authority_unavailable", "the server is initializing: it has no active %s authority", m.name).Fix("try again in a moment")
	case m.Ask.do == askPrepare:
		return nil
	case m.Ask.do == askTaintAbove, m.Ask.do == askRevokeAbove:
		return m.checkAbove()
	case m.Ask.id == "":
		return fault.New(fault.Invalid, "authority_id_missing", "no authority ID provided")
	}
	i := m.named(m.Ask.id)
	if i < 0 && m.Ask.do == askRevoke && m.foreign() >= 0 {
		return m.checkForeign()
	}
	if i < 0 {
		return fault.New(fault.Invalid, "authority_unknown", "%q is no %s authority of this server", m.Ask.id, m.name).
			Fix("see the command show; ask the server that has it")
	}
	state := m.slots[i].State
	switch {
	case m.Ask.do == askActivate && state == registry.SlotActive:
		return nil // done
	case m.Ask.do == askActivate && state != registry.SlotPrepared:
		return fault.New(fault.Precondition, "authority_not_prepared", "%q is old; only a prepared authority can be activated", m.Ask.id).Fix("prepare one")
	case m.Ask.do == askActivate && !m.Ask.force:
		return m.checkReady(i)
	case m.Ask.do == askActivate:
		return nil
	case state != registry.SlotOld:
		return fault.New(fault.Invalid, "authority_in_use", "only an old authority can be %s, and %q is %s", past(m.Ask.do), m.Ask.id, StateName(state)).
			Fix("prepare and activate another one first")
	}
	if m.name == X509 && m.slots[i].Upstream {
		return fault.New(fault.Precondition, "authority_of_upstream", "%q is signed by an upstream authority, whose root is in the bundle, not it", m.Ask.id).
			Fix("taint or revoke the upstream authority, by its subject key identifier")
	}
	switch found, tainted := m.find(m.Bundle, m.slots[i]); {
	case m.Ask.do == askTaint && !found:
		return fault.New(fault.Precondition, "authority_not_published", "%q is not in the bundle", m.Ask.id).Fix("nothing is to be done: nobody accepts what it signed")
	case m.Ask.do == askRevoke && found && !tainted:
		return notTainted(m.Ask.id)
	}
	return nil
}

func notTainted(id string) error {
	return fault.New(fault.Precondition, "authority_not_tainted", "only a tainted authority can be revoked, and %q is not tainted", id).
		Fix("taint it, and give agents a minute to replace what it signed: one that has not is no longer let in")
}

// checkReady refuses to activate a key that others have to get first.
func (m *machine) checkReady(i int) error {
	s := m.slots[i]
	if missing, until := m.awaited(s); s.ReadyAt.IsZero() && len(missing) > 0 {
		return notReady(s.AuthorityID, missing, until, m.Now)
	}
	return nil
}

func past(do string) string {
	if do == askTaint {
		return "tainted"
	}
	return "revoked"
}

// foreign returns the index in the bundle of the JWT key that is asked for and
// none of this server's, or -1.
func (m *machine) foreign() int {
	if m.name != JWT {
		return -1
	}
	return slices.IndexFunc(m.Bundle.JWT, func(a bundle.JWTAuthority) bool { return a.KeyID == m.Ask.id })
}

func (m *machine) checkForeign() error {
	if a := m.Bundle.JWT[m.foreign()]; !a.Tainted {
		return notTainted(a.KeyID)
	}
	return nil
}

// taint marks an old key, so that all replace what is under it.
func (m *machine) taint() bool {
	if !m.asks(askTaint) {
		return false
	}
	s := m.slots[m.named(m.Ask.id)]
	if !m.published(m.Bundle, s) {
		return false
	}
	m.Bundle, m.about = m.mark(m.Bundle, s), s
	return true
}

// revoke takes an old key out of the bundle for ever.
func (m *machine) revoke() bool {
	if !m.asks(askRevoke) {
		return false
	}
	if i := m.named(m.Ask.id); i >= 0 {
		s := m.slots[i]
		m.Bundle = m.Bundle.WithRevoked(bundle.Revocation{KeyHash: sha256.Sum256(s.PublicKey), Until: s.NotAfter.Add(pruneAfter)})
		m.about = s
		m.forget(i)
		return true
	}
	if i := m.foreign(); i >= 0 {
		a := m.Bundle.JWT[i]
		r := bundle.Revocation{KeyHash: sha256.Sum256(a.PublicKey)}
		if !a.ExpiresAt.IsZero() {
			r.Until = a.ExpiresAt.Add(pruneAfter)
		}
		m.Bundle = m.Bundle.WithRevoked(r)
		m.about = registry.Slot{AuthorityID: a.KeyID, PublicKey: a.PublicKey, NotAfter: a.ExpiresAt, State: registry.SlotOld}
		return true
	}
	return false
}

// purge takes out of the bundle what this server remembers as revoked: the store
// was restored to a time before that (R69).
func (m *machine) purge() bool {
	var missing []bundle.Revocation
	for _, r := range m.Revoked {
		if !m.Bundle.IsRevoked(r.KeyHash) && (r.Until.IsZero() || m.Now.Before(r.Until)) {
			missing = append(missing, r)
		}
	}
	if len(missing) == 0 {
		return false
	}
	m.Bundle = m.Bundle.WithRevoked(missing...)
	return true
}
