package registry

import (
	"encoding/binary"
	"hash/maphash"
	"iter"
	"slices"

	"github.com/plastron/plastron/internal/entry"
)

// sets interns selector sets and knows, for each selector, the sets that hold
// it. Set 0 is none.
type sets struct {
	texts   texts // the selectors' text
	seed    maphash.Seed
	rows    []set
	members []member
	holds   []holder // by selector symbol
	freeSet []uint32
	freeMem uint32 // list by nextInSet
	table   table
}

type set struct {
	first uint32 // its members, in the order of their selectors' text
	uses  uint32
	rows  uint32 // head of the list of entries with this set
}

type member struct {
	set, selector        uint32
	nextInSet            uint32
	nextOfSel, prevOfSel uint32
}

// holder is the list of the members that are one selector.
type holder struct {
	first uint32
	n     uint32
}

func newSets(a *arena) sets {
	return sets{texts: newTexts(a), seed: maphash.MakeSeed(), rows: make([]set, 1), members: make([]member, 1)}
}

// intern returns the set of these selectors, which are sorted and without
// duplicates, and counts one user more.
func (s *sets) intern(sels []entry.Selector) uint32 {
	syms := make([]uint32, len(sels))
	for i, sel := range sels {
		syms[i] = s.texts.intern(sel.String())
	}
	if h := s.find(syms); h != 0 {
		for _, sym := range syms {
			s.texts.release(sym)
		}
		s.rows[h].uses++
		return h
	}
	var h uint32
	if n := len(s.freeSet); n > 0 {
		h, s.freeSet = s.freeSet[n-1], s.freeSet[:n-1]
	} else {
		h = uint32(len(s.rows))
		s.rows = append(s.rows, set{})
	}
	s.rows[h] = set{uses: 1}
	for _, sym := range slices.Backward(syms) {
		s.rows[h].first = s.join(h, sym, s.rows[h].first)
	}
	s.table.insert(s.hash(syms), h)
	return h
}

// join makes a member before next and puts it into its selector's list.
func (s *sets) join(h, sym, next uint32) uint32 {
	m := s.freeMem
	if m != 0 {
		s.freeMem = s.members[m].nextInSet
	} else {
		m = uint32(len(s.members))
		s.members = append(s.members, member{})
	}
	if n := int(sym) + 1; n > len(s.holds) {
		s.holds = append(s.holds, make([]holder, n-len(s.holds))...)
	}
	by := &s.holds[sym]
	s.members[m] = member{set: h, selector: sym, nextInSet: next, nextOfSel: by.first}
	s.members[by.first].prevOfSel = m
	by.first = m
	by.n++
	return m
}

// release counts one user less and forgets the set after the last one.
func (s *sets) release(h uint32) {
	if s.rows[h].uses--; s.rows[h].uses > 0 {
		return
	}
	s.table.remove(s.hash(s.symbols(h)), h)
	for m := s.rows[h].first; m != 0; {
		gone := s.members[m]
		by := &s.holds[gone.selector]
		by.n--
		if gone.prevOfSel == 0 {
			by.first = gone.nextOfSel
		} else {
			s.members[gone.prevOfSel].nextOfSel = gone.nextOfSel
		}
		s.members[gone.nextOfSel].prevOfSel = gone.prevOfSel
		s.texts.release(gone.selector)
		s.members[m] = member{nextInSet: s.freeMem}
		s.freeMem = m
		m = gone.nextInSet
	}
	s.members[0] = member{} // the end of every list; its links mean nothing
	s.rows[h] = set{}
	s.freeSet = append(s.freeSet, h)
}

func (s *sets) find(syms []uint32) uint32 {
	return s.table.find(s.hash(syms), func(h uint32) bool {
		m := s.rows[h].first
		for _, sym := range syms {
			if m == 0 || s.members[m].selector != sym {
				return false
			}
			m = s.members[m].nextInSet
		}
		return m == 0
	})
}

func (s *sets) hash(syms []uint32) uint64 {
	b := make([]byte, 0, 64)
	for _, sym := range syms {
		b = binary.LittleEndian.AppendUint32(b, sym)
	}
	return maphash.Bytes(s.seed, b)
}

// symbols returns the selectors of a set, in the order of their text.
func (s *sets) symbols(h uint32) []uint32 {
	var syms []uint32
	for m := s.rows[h].first; m != 0; m = s.members[m].nextInSet {
		syms = append(syms, s.members[m].selector)
	}
	return syms
}

// selectors returns the selectors of a set, sorted.
func (s *sets) selectors(h uint32) []entry.Selector {
	var sels []entry.Selector
	for m := s.rows[h].first; m != 0; m = s.members[m].nextInSet {
		sels = append(sels, s.selector(s.members[m].selector))
	}
	return sels
}

func (s *sets) selector(sym uint32) entry.Selector {
	text := s.texts.string(sym)
	for i := range len(text) {
		if text[i] == ':' { // a type holds no colon
			return entry.Selector{Type: text[:i], Value: text[i+1:]}
		}
	}
	panic("registry: interned selector without a type")
}

// holding yields the sets that hold a selector.
func (s *sets) holding(sym uint32) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		if int(sym) >= len(s.holds) {
			return
		}
		for m := s.holds[sym].first; m != 0; m = s.members[m].nextOfSel {
			if !yield(s.members[m].set) {
				return
			}
		}
	}
}

// holders returns how many sets hold a selector.
func (s *sets) holders(sym uint32) int {
	if int(sym) >= len(s.holds) {
		return 0
	}
	return int(s.holds[sym].n)
}
