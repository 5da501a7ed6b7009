package authority

import (
	"bytes"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/svid"
)

const (
	prepareMost  = 30 * 24 * time.Hour
	activateMost = 7 * 24 * time.Hour
	// DefaultRefreshHint goes into a bundle that is made here.
	DefaultRefreshHint = 5 * time.Minute
	// pruneAfter is how long a key stays in the bundle after the last document
	// under it has ended: for validators whose clock is slow.
	pruneAfter = time.Minute
	// MaxLive bounds how many keys of a kind servers put into a bundle, so that one that
	// loses its keys at every restart does not make the bundle unreadable (RG29).
	MaxLive = 90
)

// event is all that a step may depend on.
type event struct {
	Now      time.Time
	Lifetime time.Duration       // of a key that is made now
	MaxWait  time.Duration       // for who is silent
	Bundle   *bundle.Bundle      // the own trust domain's, as committed
	Held     map[string][]byte   // the public key (PKIX) of each key id that the keeper holds
	Made     *registry.Slot      // the intended slot with its key, once that is made
	Ask      *ask                // what an operator wants now, or nil
	Peers    Peers               // with regard to Bundle
	Revoked  []bundle.Revocation // what this server remembers besides the bundle
	Keep     bool                // nothing is removed because its time has ended (R70)
	Hold     bool                // nothing is done but what Ask wants
	Above    *Above              // nil: this server signs its own authorities
	Others   []registry.Slot     // keys of this kind that other servers have
}

// ask is what an operator wants.
type ask struct {
	do    string // askPrepare, askActivate, …
	id    string // of the authority; with askPrepare the prepared one to be replaced, if there is one
	force bool   // askActivate: whoever is not ready
}

const (
	askPrepare  = "prepare"
	askActivate = "activate"
	askTaint    = "taint"
	askRevoke   = "revoke"

	askTaintAbove  = "taint upstream"
	askRevokeAbove = "revoke upstream"
)

// step is what to do next.
type step struct {
	Rule   string          // the rule that applied; "" when there is nothing to do before Due
	Slots  []registry.Slot // to be stored, with Bundle, in one transaction
	Bundle *bundle.Bundle
	Make   *registry.Slot // a key to be made for this slot; nothing is stored
	About  registry.Slot  // the key that an operator's wish was about
	Signs  registry.Slot  // the active key after it, if that may sign; else zero
	Outlook
}

// rule changes slots and bundle, or reports that it does not apply.
type rule struct {
	name  string
	apply func(m *machine) bool
}

// machine is the working state of one step.
type machine struct {
	kind
	event
	slots  []registry.Slot
	make   *registry.Slot
	about  registry.Slot
	passed []Missing // who the step does not wait for any longer
}

// rules are tried in this order; the first that applies is the step.
func rules() []rule {
	return []rule{
		{"purge", (*machine).purge},
		{"adopt", (*machine).adopt},
		{"revoke", (*machine).revoke},
		{"taint", (*machine).taint},
		{"revoke upstream", (*machine).revokeAbove},
		{"taint upstream", (*machine).taintAbove},
		{"retire", (*machine).retire},
		{"drop", (*machine).drop},
		{"ready", (*machine).ready},
		{"activate", (*machine).activate},
		{"publish", (*machine).publishMade},
		{"prune", (*machine).prune}, // before what may have to wait for others
		{"make", (*machine).makeKey},
		{"intend", (*machine).intend},
	}
}

// next decides what to do about one kind of keys. It changes nothing that it is
// given. What an operator asks for and cannot have is an error.
func next(k kind, slots []registry.Slot, e event) (step, error) {
	if err := checkClock(e.Now); err != nil {
		return step{}, err
	}
	m := &machine{kind: k, event: e, slots: slices.Clone(slots)}
	if err := m.checkAsk(); err != nil {
		return step{}, err
	}
	for _, r := range rules() {
		if (!e.Hold || e.Ask.rule() == r.name) && r.apply(m) {
			return step{Rule: r.name, Slots: m.slots, Bundle: m.Bundle, Make: m.make, About: m.about, Signs: m.signs(), Outlook: Outlook{Missing: m.passed}}, nil
		}
	}
	if m.full() && (m.at(registry.SlotActive) < 0 && m.at(registry.SlotPrepared) < 0 || m.asks(askPrepare)) {
		return step{}, fault.New(fault.Exhausted, "authorities_exhausted",
			"there are %d keys of kind %s, no more are added", m.live(), k.name).
			Fix(`keep keys over restarts (KeyManager "disk"), or wait until old ones have ended`)
	}
	return step{Signs: m.signs(), Outlook: m.outlook()}, nil
}

// checkClock refuses a clock that was never set (F26): a machine without a
// battery begins in 1970, and every key it has would look as if it were not
// valid yet.
func checkClock(now time.Time) error {
	if now.Before(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)) {
		return fault.New(fault.Unavailable, "clock_not_set", "this machine's clock says %s, so nothing is signed", now.UTC().Format(time.DateOnly)).
			Fix("set the clock")
	}
	return nil
}

// at returns the index of the slot in that state, or -1. Only old ones can be several.
func (m *machine) at(state registry.SlotState) int {
	return slices.IndexFunc(m.slots, func(s registry.Slot) bool { return s.State == state })
}

// usable reports whether a slot's key may sign: the keeper has it, the bundle
// has it, and now is within its life.
func (m *machine) usable(s registry.Slot) bool {
	return len(s.PublicKey) > 0 && bytes.Equal(m.Held[s.KeyID], s.PublicKey) && m.published(m.Bundle, s) &&
		!m.Now.Before(s.NotBefore) && m.Now.Before(s.NotAfter)
}

// signs returns the active key, if it may sign: a rule that comes before retire may
// have left one that may not.
func (m *machine) signs() (s registry.Slot) {
	if i := m.at(registry.SlotActive); i >= 0 && m.usable(m.slots[i]) {
		s = m.slots[i]
	}
	return s
}

// life is how long a key was made for.
func life(s registry.Slot) time.Duration { return s.NotAfter.Sub(s.NotBefore) - svid.Backdate }

func prepareAt(s registry.Slot) time.Time { return s.NotAfter.Add(-min(life(s)/2, prepareMost)) }

func activateAt(s registry.Slot) time.Time { return s.NotAfter.Add(-min(life(s)/6, activateMost)) }

// reached reports whether the time has come.
func (m *machine) reached(t time.Time) bool { return !m.Now.Before(t) }

// retire ends the use of an active key that may not sign any more.
func (m *machine) retire() bool {
	i := m.at(registry.SlotActive)
	if i < 0 || m.usable(m.slots[i]) {
		return false
	}
	m.old(i)
	return true
}

func (m *machine) old(i int) { m.slots[i].State, m.slots[i].RetiredAt = registry.SlotOld, m.Now }

// drop forgets a prepared key that may not sign, of whose life too little is left
// to be worth a change (RG21), whose authority above is not that of now, or that
// an operator wants another for. Nobody has a document under it.
func (m *machine) drop() bool {
	i := m.at(registry.SlotPrepared)
	if i < 0 || m.usable(m.slots[i]) && !m.reached(activateAt(m.slots[i])) && !m.stale(m.slots[i]) &&
		!(m.asks(askPrepare) && m.Ask.id == m.slots[i].AuthorityID) {
		return false
	}
	m.forget(i)
	return true
}

// forget removes a slot, and its key from the bundle. What else of an authority
// above is there because of it becomes the next key's.
func (m *machine) forget(i int) {
	s := m.slots[i]
	m.slots = slices.Delete(m.slots, i, i+1)
	if !s.Upstream || m.name == JWT {
		m.Bundle = m.withdraw(m.Bundle, s)
	}
	if next := m.carrier(); next >= 0 {
		m.slots[next].Given = append(slices.Clip(m.slots[next].Given), s.Given...)
	} else {
		m.Bundle = m.release(m.Bundle, s.Given...)
	}
	if len(s.Root) > 0 {
		m.Bundle = m.release(m.Bundle, s.Root)
	}
}

// ready notes that nobody is waited for any longer. From here on every server
// hands out bundles that hold the key, so that nobody new has to be asked.
func (m *machine) ready() bool {
	i := m.at(registry.SlotPrepared)
	if i < 0 || !m.slots[i].ReadyAt.IsZero() {
		return false
	}
	if missing, _ := m.awaited(m.slots[i]); len(missing) > 0 {
		return false
	}
	m.slots[i].ReadyAt = m.Now
	m.pass(&m.slots[i])
	return true
}

// activate lets the prepared key sign: when it is ready and nothing else signs,
// when it is ready and the time has come, or when an operator wants it.
func (m *machine) activate() bool {
	i, active := m.at(registry.SlotPrepared), m.at(registry.SlotActive)
	if i < 0 {
		return false
	}
	s := &m.slots[i]
	asked := m.asks(askActivate) && m.Ask.id == s.AuthorityID
	switch ready := !s.ReadyAt.IsZero(); {
	case asked && m.Ask.force:
		if !ready {
			m.pass(s)
		}
	case !ready:
		return false
	case active < 0, asked, m.stale(m.slots[active]), m.reached(later(activateAt(m.slots[active]), m.spreadAt(*s))):
	default:
		return false
	}
	if active >= 0 {
		m.old(active)
	}
	// Everything under a key ends with it at the latest: that is the promise
	// which pruning keeps.
	s.State, s.ActivatedAt, s.LastExpiry = registry.SlotActive, m.Now, s.NotAfter
	m.about = *s
	return true
}

// still returns the key that was made, while its slot still waits for it: a
// publication whose outcome was not known may have used it up.
func still(made *registry.Slot, slots []registry.Slot) *registry.Slot {
	if made != nil && slices.ContainsFunc(slots, func(s registry.Slot) bool {
		return s.State == registry.SlotIntended && s.KeyID == made.KeyID
	}) {
		return made
	}
	return nil
}

// publishMade takes the intended key, which now exists, into the bundle.
func (m *machine) publishMade() bool {
	i := m.at(registry.SlotIntended)
	if i < 0 || m.Made == nil {
		return false
	}
	m.slots[i] = *m.Made
	m.slots[i].State, m.slots[i].PublishedAt = registry.SlotPrepared, m.Now
	m.Bundle = m.publish(m.Bundle.Forgotten(m.Now), m.slots[i])
	m.about = m.slots[i]
	return true
}

// makeKey asks for the intended key. A key that an earlier life of the process
// made under this id, but did not publish, is replaced.
func (m *machine) makeKey() bool {
	i := m.at(registry.SlotIntended)
	if i < 0 {
		return false
	}
	s := m.slots[i]
	s.NotBefore, s.NotAfter = m.Now.Add(-svid.Backdate), m.Now.Add(m.Lifetime)
	s.Upstream = m.nested()
	m.make = &s
	return true
}

// slotNames are the two that the keys of a kind take in turn. An old slot keeps
// its name, its private key may be gone.
func slotNames() [2]string { return [2]string{"A", "B"} }

// intend claims the key id that the active key does not use.
func (m *machine) intend() bool {
	active := m.at(registry.SlotActive)
	if m.at(registry.SlotPrepared) >= 0 || m.full() {
		return false
	}
	name := slotNames()[0]
	if active >= 0 {
		s := m.slots[active]
		if !m.reached(prepareAt(s)) && !m.asks(askPrepare) && !m.stale(s) {
			return false
		}
		if s.Name == name {
			name = slotNames()[1]
		}
	}
	m.slots = append(m.slots, registry.Slot{Name: name, State: registry.SlotIntended, KeyID: m.key + "-" + name})
	return true
}

func (m *machine) full() bool { return m.live() >= MaxLive }

func (m *machine) live() int {
	if m.name == X509 && m.nested() {
		return len(m.slots) // none of these is in the bundle, and the roots that are, are not ours
	}
	return m.count(m.Bundle, slices.Concat(m.slots, m.Others))
}

// prune forgets an old key after the last document under it. Without an active
// key nothing is pruned: time alone never empties a bundle.
func (m *machine) prune() bool {
	if m.at(registry.SlotActive) < 0 || m.Keep {
		return false
	}
	i := slices.IndexFunc(m.slots, func(s registry.Slot) bool {
		return s.State == registry.SlotOld && m.reached(s.LastExpiry.Add(pruneAfter))
	})
	if i < 0 {
		return false
	}
	m.forget(i)
	return true
}
