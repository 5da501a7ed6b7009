package servers

import (
	"slices"
	"time"

	"github.com/plastron/plastron/internal/store"
)

// past remembers what the state was like lately: servers that were at one
// position had one digest (R78).
type past struct {
	at   [1024]moment
	next int
}

type moment struct {
	position store.Position
	digest   [32]byte
}

func (p *past) note(position store.Position, digest [32]byte) {
	p.at[p.next%len(p.at)] = moment{position, digest}
	p.next++
}

func (p *past) digest(position store.Position) ([32]byte, bool) {
	for _, m := range p.at {
		if m.position == position && position != (store.Position{}) {
			return m.digest, true
		}
	}
	return [32]byte{}, false
}

// differing returns the servers of which nobody was told yet that they held something
// else than this one at the same position.
func (m *machine) differing() (ids []string) {
	for id, p := range m.peers {
		if p.differs && !p.told {
			p.told = true
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// strays reports whether what this server holds is to be loaded afresh: as many of the
// live servers hold something else as hold the same. It is true once a minute at most,
// and then asks anew what the others hold.
func (m *machine) strays(boot time.Duration) bool {
	same, other := 1, 0
	for _, p := range m.peers {
		switch {
		case !m.alive(p, boot) || !p.compared:
		case p.differs:
			other++
		default:
			same++
		}
	}
	if other < same || m.healed != 0 && boot-m.healed < healEvery {
		return false
	}
	m.healed = boot
	return true
}

// unlearn forgets all comparisons, since the state is another.
func (m *machine) unlearn() {
	m.past = past{}
	for _, p := range m.peers {
		p.compared, p.differs, p.told = false, false, false
	}
}
