package servers

import "github.com/plastron/plastron/internal/store"

// past remembers what the state was like lately: servers that were at one
// position had one digest (R78).
type past struct {
	at   [256]moment
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
