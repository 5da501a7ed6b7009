package registry

// table maps hashes to handles by open addressing; what a handle stands for,
// and whether two are equal, the caller knows. A slot holds the upper half of
// the hash and the handle; handle 0 is none.
type table struct {
	slots []uint64
	n     int
}

// find returns the handle with this hash for which same holds, or 0.
func (t *table) find(hash uint64, same func(handle uint32) bool) uint32 {
	if len(t.slots) == 0 {
		return 0
	}
	mask := len(t.slots) - 1
	for i := int(hash>>32) & mask; t.slots[i] != 0; i = (i + 1) & mask {
		if t.slots[i]>>32 == hash>>32 && same(uint32(t.slots[i])) {
			return uint32(t.slots[i])
		}
	}
	return 0
}

// insert adds a handle that is not in the table.
func (t *table) insert(hash uint64, handle uint32) {
	if 4*(t.n+1) > 3*len(t.slots) {
		old := t.slots
		t.slots = make([]uint64, max(16, 2*len(old)))
		for _, s := range old {
			if s != 0 {
				t.place(s)
			}
		}
	}
	t.place(hash>>32<<32 | uint64(handle))
	t.n++
}

func (t *table) place(slot uint64) {
	mask := len(t.slots) - 1
	i := int(slot>>32) & mask
	for t.slots[i] != 0 {
		i = (i + 1) & mask
	}
	t.slots[i] = slot
}

// remove takes a handle out.
func (t *table) remove(hash uint64, handle uint32) {
	mask := len(t.slots) - 1
	i := int(hash>>32) & mask
	for t.slots[i] != hash>>32<<32|uint64(handle) {
		if t.slots[i] == 0 {
			panic("registry: removing a handle that is not in its table")
		}
		i = (i + 1) & mask
	}
	// Close the gap: move back each follower that its own place allows.
	for j := (i + 1) & mask; t.slots[j] != 0; j = (j + 1) & mask {
		home := int(t.slots[j]>>32) & mask
		if (j-home)&mask >= (j-i)&mask {
			t.slots[i] = t.slots[j]
			i = j
		}
	}
	t.slots[i] = 0
	t.n--
}
