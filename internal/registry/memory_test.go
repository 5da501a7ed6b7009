package registry

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/entry"
)

func TestArena(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	var a arena
	type block struct {
		ref  ref
		want []byte
	}
	var held []block
	sizes := []int{1, 15, 16, 17, 100, 1023, 1024, 1025, 5000, 70_000, arenaChunk}
	for step := range 4000 {
		if len(held) > 40 || step > 3000 && len(held) > 0 {
			i := r.IntN(len(held))
			a.drop(held[i].ref, len(held[i].want))
			held = slices.Delete(held, i, i+1)
		} else {
			n := sizes[r.IntN(len(sizes))]
			if n > 5000 && r.IntN(8) > 0 {
				n = 48
			}
			want := bytes.Repeat([]byte{byte(step)}, n)
			held = append(held, block{a.put(string(want[:n/2]), string(want[n/2:])), want})
			if held[len(held)-1].ref == 0 {
				t.Fatal("a block is at 0")
			}
		}
		if step%50 == 0 {
			for _, b := range held {
				if !bytes.Equal(a.at(b.ref, len(b.want)), b.want) {
					t.Fatalf("step %d: a block of %d bytes was written over", step, len(b.want))
				}
			}
		}
	}
	if a.put() != 0 || a.put("", "") != 0 {
		t.Error("no bytes take a block")
	}
}

// Churn of a bounded set takes bounded memory (R106).
func TestArenaIsReused(t *testing.T) {
	h := newHistory(t)
	var chunks int
	for round := range 30 {
		for i := range 200 {
			e := grant(fmt.Sprint("e", i), "/spire/agent/a", fmt.Sprintf("/w%d/x%s", i, strings.Repeat("x", round*7%50)), fmt.Sprint("u:", i))
			e.Hint = fmt.Sprint(round, i, strings.Repeat("h", 1000))
			h.commit(h.putEntry(e)...)
		}
		if round == 20 {
			chunks = len(h.r.state.rows.arena.chunks)
		}
	}
	if got := len(h.r.state.rows.arena.chunks); got != chunks {
		t.Errorf("the arena grew from %d to %d chunks while it held the same", chunks, got)
	}
}

func TestTable(t *testing.T) {
	for _, bits := range []uint64{1, 4, 64} { // few hashes, so that many collide
		r := rand.New(rand.NewPCG(bits, 2))
		var tab table
		held := make(map[uint32]uint64)
		for step := range 20_000 {
			handle := uint32(1 + r.IntN(300))
			if hash, ok := held[handle]; ok {
				tab.remove(hash, handle)
				delete(held, handle)
			} else {
				hash := r.Uint64() & (1<<(bits-1)*2 - 1) << (64 - bits)
				tab.insert(hash, handle)
				held[handle] = hash
			}
			if step%500 == 0 {
				for handle, hash := range held {
					if tab.find(hash, func(h uint32) bool { return h == handle }) != handle {
						t.Fatalf("%d bits, step %d: %d is lost", bits, step, handle)
					}
				}
				if tab.n != len(held) || tab.find(0, func(uint32) bool { return false }) != 0 {
					t.Fatalf("the table counts %d of %d", tab.n, len(held))
				}
			}
		}
	}
}

func TestOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	var o order
	at := func(key uint32) func(uint32) int { return func(h uint32) int { return int(h) - int(key) } }
	held := make(map[uint32]bool)
	for step := range 60_000 {
		key := uint32(1 + r.IntN(4000))
		if step > 40_000 && !held[key] {
			continue // shrink, so that blocks are joined
		}
		if held[key] {
			o.remove(at(key))
			delete(held, key)
		} else {
			o.insert(key, at(key))
			held[key] = true
		}
		if step%3000 == 0 || step > 59_900 {
			from := uint32(r.IntN(4000))
			want := slices.Sorted(maps.Keys(held))
			want = slices.DeleteFunc(want, func(k uint32) bool { return k < from })
			if got := slices.Collect(o.from(at(from))); !slices.Equal(got, want) {
				t.Fatalf("step %d: %d handles from %d, want %d", step, len(got), from, len(want))
			}
			for _, b := range o.blocks {
				if len(b) == 0 || len(b) > blockMax {
					t.Fatalf("a block holds %d", len(b))
				}
			}
		}
	}
}

func TestSets(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	s := newSets(&arena{})
	uses := make(map[string]int)
	handles := make(map[string]uint32)
	values := make(map[string][]entry.Selector)
	for step := range 5000 {
		var sels []entry.Selector
		for range 1 + r.IntN(3) {
			sels = append(sels, sel(fmt.Sprint("t:", r.IntN(6)), fmt.Sprint("t-u:", r.IntN(3)))[r.IntN(2)])
		}
		sels, err := entry.NormalizeSelectors(sels)
		if err != nil {
			t.Fatal(err)
		}
		key := fmt.Sprint(sels)
		if uses[key] > 0 && r.IntN(2) == 0 {
			s.release(handles[key])
			uses[key]--
			continue
		}
		h := s.intern(sels)
		if uses[key] > 0 && handles[key] != h {
			t.Fatalf("step %d: %s has the sets %d and %d", step, key, handles[key], h)
		}
		uses[key]++
		handles[key], values[key] = h, sels
		for key, n := range uses {
			if n == 0 {
				continue
			}
			if got := s.selectors(handles[key]); !slices.Equal(got, values[key]) {
				t.Fatalf("step %d: set %s is %v", step, key, got)
			}
			for _, sel := range values[key] {
				sym := s.texts.find(sel.String())
				if !slices.Contains(slices.Collect(s.holding(sym)), handles[key]) {
					t.Fatalf("step %d: %v does not know set %s", step, sel, key)
				}
			}
		}
	}
}
