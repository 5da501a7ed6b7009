package registry

import "iter"

// order keeps handles sorted by a key that the caller knows, in blocks of at
// most blockMax. Each method takes a function that compares the key of a handle
// with the key meant: negative if the handle's is smaller.
type order struct {
	blocks [][]uint32 // none is empty
}

const blockMax = 512

// seek returns the place of the first handle that is not smaller.
func (o *order) seek(compare func(handle uint32) int) (block, at int) {
	lo, hi := 0, len(o.blocks)
	if hi > 0 {
		if last := o.blocks[hi-1]; compare(last[len(last)-1]) < 0 { // so it is with each row of a load
			return hi, 0
		}
	}
	for lo < hi { // the first block whose last handle is not smaller
		mid := (lo + hi) / 2
		if b := o.blocks[mid]; compare(b[len(b)-1]) < 0 {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == len(o.blocks) {
		return lo, 0
	}
	b, from, to := o.blocks[lo], 0, len(o.blocks[lo])
	for from < to {
		mid := (from + to) / 2
		if compare(b[mid]) < 0 {
			from = mid + 1
		} else {
			to = mid
		}
	}
	return lo, from
}

// insert adds a handle whose key is not in the order.
func (o *order) insert(handle uint32, compare func(handle uint32) int) {
	i, at := o.seek(compare)
	if i == len(o.blocks) { // after everything: fill the last block, then begin another
		if i == 0 || len(o.blocks[i-1]) == blockMax {
			o.blocks = append(o.blocks, make([]uint32, 0, blockMax))
			i++
		}
		o.blocks[i-1] = append(o.blocks[i-1], handle)
		return
	}
	if len(o.blocks[i]) == blockMax {
		half := append(make([]uint32, 0, blockMax), o.blocks[i][blockMax/2:]...)
		o.blocks[i] = o.blocks[i][:blockMax/2]
		o.blocks = append(o.blocks, nil)
		copy(o.blocks[i+2:], o.blocks[i+1:])
		o.blocks[i+1] = half
		if at > blockMax/2 {
			i, at = i+1, at-blockMax/2
		}
	}
	b := append(o.blocks[i], 0)
	copy(b[at+1:], b[at:])
	b[at] = handle
	o.blocks[i] = b
}

// remove takes out the handle that compares equal; there is one.
func (o *order) remove(compare func(handle uint32) int) {
	i, at := o.seek(compare)
	b := o.blocks[i]
	o.blocks[i] = append(b[:at], b[at+1:]...)
	// Join with a neighbour once both fit well into one.
	for _, j := range []int{i, i - 1} {
		if j >= 0 && j+1 < len(o.blocks) && len(o.blocks[j])+len(o.blocks[j+1]) <= blockMax/2 {
			o.blocks[j] = append(o.blocks[j], o.blocks[j+1]...)
			o.blocks = append(o.blocks[:j+1], o.blocks[j+2:]...)
			return
		}
	}
	if len(o.blocks[i]) == 0 {
		o.blocks = append(o.blocks[:i], o.blocks[i+1:]...)
	}
}

// from yields the handles from the first that is not smaller.
func (o *order) from(compare func(handle uint32) int) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		i, at := o.seek(compare)
		for ; i < len(o.blocks); i, at = i+1, 0 {
			for _, h := range o.blocks[i][at:] {
				if !yield(h) {
					return
				}
			}
		}
	}
}
