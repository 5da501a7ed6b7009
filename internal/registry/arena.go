package registry

import "encoding/binary"

// arena holds variable-sized bytes outside the garbage collector's sight: big
// chunks without pointers, cut into blocks of fixed classes. A freed block is
// kept in a list of its class and used again, so memory follows the largest
// use of each class; a reload starts afresh.
type arena struct {
	chunks [][]byte
	end    int // first unused byte of the last chunk
	free   [arenaClasses]ref
}

// ref is the place of a block, in units; 0 is none.
type ref uint32

const (
	arenaUnit    = 16
	arenaChunk   = 1 << 20 // the largest block, too; a stored value is not longer
	arenaSmall   = 1024    // up to here classes are one unit apart, then they double
	arenaClasses = arenaSmall/arenaUnit + 10
)

// class returns the class of n bytes and the size of its blocks.
func (a *arena) class(n int) (class, size int) {
	if n <= arenaSmall {
		class = max(n+arenaUnit-1, arenaUnit) / arenaUnit
		return class - 1, class * arenaUnit
	}
	class, size = arenaSmall/arenaUnit, 2*arenaSmall
	for size < n {
		class, size = class+1, 2*size
	}
	return class, size
}

// put copies the parts, one after the other, into a block. No bytes need no block.
func (a *arena) put(parts ...string) ref {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if n == 0 {
		return 0
	}
	class, size := a.class(n)
	r := a.free[class]
	if r != 0 {
		a.free[class] = ref(binary.LittleEndian.Uint32(a.at(r, 4)))
	} else {
		if len(a.chunks) == 0 {
			a.chunks = append(a.chunks, make([]byte, arenaChunk))
			a.end = arenaUnit // so that no block is at 0
		}
		if a.end+size > arenaChunk {
			a.chunks = append(a.chunks, make([]byte, arenaChunk))
			a.end = 0
		}
		r = ref(((len(a.chunks)-1)*arenaChunk + a.end) / arenaUnit)
		a.end += size
	}
	b := a.at(r, n)
	for _, p := range parts {
		b = b[copy(b, p):]
	}
	return r
}

// at returns the first n bytes of a block. They change when the block is freed.
func (a *arena) at(r ref, n int) []byte {
	if n == 0 {
		return nil
	}
	off := int(r) * arenaUnit
	in := off % arenaChunk
	return a.chunks[off/arenaChunk][in : in+n : in+n]
}

// drop frees a block that was put with n bytes in all.
func (a *arena) drop(r ref, n int) {
	if n == 0 {
		return
	}
	class, _ := a.class(n)
	binary.LittleEndian.PutUint32(a.at(r, 4), uint32(a.free[class]))
	a.free[class] = r
}
