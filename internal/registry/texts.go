package registry

import "hash/maphash"

// texts interns strings: equal ones share a symbol, which counts its users.
// Symbol 0 is none; symbols are used again after their last user has gone.
type texts struct {
	arena *arena
	seed  maphash.Seed
	rows  []text
	free  []uint32
	table table
}

type text struct {
	ref  ref
	size uint32
	uses uint32
}

func newTexts(a *arena) texts {
	return texts{arena: a, seed: maphash.MakeSeed(), rows: make([]text, 1)}
}

// find returns the symbol of s, or 0.
func (t *texts) find(s string) uint32 {
	return t.table.find(maphash.String(t.seed, s), func(sym uint32) bool { return string(t.bytes(sym)) == s })
}

// intern returns the symbol of s and counts one user more.
func (t *texts) intern(s string) uint32 {
	sym := t.find(s)
	if sym == 0 {
		if n := len(t.free); n > 0 {
			sym, t.free = t.free[n-1], t.free[:n-1]
		} else {
			sym = uint32(len(t.rows))
			t.rows = append(t.rows, text{})
		}
		t.rows[sym] = text{ref: t.arena.put(s), size: uint32(len(s))}
		t.table.insert(maphash.String(t.seed, s), sym)
	}
	t.rows[sym].uses++
	return sym
}

// release counts one user less and forgets the symbol after the last one.
func (t *texts) release(sym uint32) {
	row := &t.rows[sym]
	if row.uses--; row.uses > 0 {
		return
	}
	t.table.remove(maphash.Bytes(t.seed, t.bytes(sym)), sym)
	t.arena.drop(row.ref, int(row.size))
	*row = text{}
	t.free = append(t.free, sym)
}

// users returns how many use a symbol; symbol 0 has none.
func (t *texts) users(sym uint32) int { return int(t.rows[sym].uses) }

func (t *texts) bytes(sym uint32) []byte { return t.arena.at(t.rows[sym].ref, int(t.rows[sym].size)) }

func (t *texts) string(sym uint32) string { return string(t.bytes(sym)) }
