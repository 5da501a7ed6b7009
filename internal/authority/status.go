package authority

import (
	"github.com/plastron/plastron/internal/registry"
)

// Status is the keys of one kind of a server, and what will happen to them.
type Status struct {
	Server, Kind string
	Keys         []Key
	Outlook
	Err error // why there is no outlook
}

// Key is a signing key and how it stands in the bundle.
type Key struct {
	registry.Slot
	Published, Tainted bool
}

// status asks the machine, as if the server's keeper had every key that signs.
func status(k kind, a registry.Authority, e event) Status {
	s := Status{Server: a.Server, Kind: a.Kind}
	e.Held = map[string][]byte{}
	for _, slot := range a.Slots {
		if slot.State != registry.SlotOld {
			e.Held[slot.KeyID] = slot.PublicKey
		}
		published, tainted := k.find(e.Bundle, slot)
		s.Keys = append(s.Keys, Key{slot, published, tainted})
	}
	next, err := next(k, a.Slots, e)
	s.Outlook, s.Err = next.Outlook, err
	if next.Rule != "" { // in this moment
		s.Outlook = Outlook{Next: next.Rule, At: e.Now}
	}
	return s
}
