package sqlite

import (
	"bytes"
	"testing"

	"github.com/plastron/plastron/internal/store"
)

// FuzzParseMark: only what append made is believed, all else is no mark.
func FuzzParseMark(f *testing.F) {
	m := mark{epoch: store.Epoch{1, 2, 3}, revision: 1 << 40, file: 77}
	valid := m.append(nil)
	if got := parseMark(valid); got == nil || *got != m {
		f.Fatalf("parseMark(append(%v)) = %v", m, got)
	}
	for i := range valid { // any one bit that is wrong is noticed
		for bit := range 8 {
			broken := bytes.Clone(valid)
			broken[i] ^= 1 << bit
			if parseMark(broken) != nil {
				f.Fatalf("bit %d of byte %d changed, and it is believed", bit, i)
			}
		}
	}
	f.Add(valid)
	f.Add(valid[:20])
	f.Add(append(valid, 0))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if m := parseMark(b); m != nil && !bytes.Equal(m.append(nil), b) {
			t.Fatalf("%x is read as %+v", b, *m)
		}
	})
}
