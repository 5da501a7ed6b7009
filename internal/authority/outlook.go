package authority

import (
	"time"

	"github.com/plastron/plastron/internal/registry"
)

// Outlook is what will happen to the keys of a kind if nothing else happens.
type Outlook struct {
	Next    string    // the rule that applies next; empty: none
	At      time.Time // when, at the latest
	Missing []Missing // who the prepared key waits for
}

// outlook is taken when no rule applies.
func (m *machine) outlook() (o Outlook) {
	at := func(rule string, t time.Time) {
		// Steps see whole seconds.
		if t = t.Add(time.Second - 1).Truncate(time.Second); o.Next == "" || t.Before(o.At) {
			o.Next, o.At = rule, t
		}
	}
	prepared := m.at(registry.SlotPrepared)
	for _, s := range m.slots {
		switch s.State {
		case registry.SlotActive:
			at("retire", s.NotAfter)
			if prepared < 0 && !m.reached(prepareAt(s)) { // reached: the bundle is full
				at("intend", prepareAt(s))
			}
		case registry.SlotPrepared:
			at("drop", activateAt(s))
			if missing, until := m.awaited(s); s.ReadyAt.IsZero() {
				o.Missing = missing
				at("ready", until)
			} else if active := m.at(registry.SlotActive); active >= 0 {
				at("activate", later(activateAt(m.slots[active]), m.spreadAt(s)))
			}
		case registry.SlotOld:
			if m.at(registry.SlotActive) >= 0 && !m.Keep {
				at("prune", s.LastExpiry.Add(pruneAfter))
			}
		}
	}
	return o
}

// latestAt is when a prepared key takes over from an active one whoever is
// missing: half of the time for which documents are cut short has passed.
func latestAt(s registry.Slot) time.Time { return s.NotAfter.Add(-min(life(s)/12, activateMost/2)) }

// StateName is the word for a state.
func StateName(s registry.SlotState) string {
	return [...]string{
		registry.SlotUnspecified: "unspecified", registry.SlotIntended: "intended", registry.SlotPrepared: "prepared",
		registry.SlotActive: "active", registry.SlotOld: "old",
	}[s]
}
