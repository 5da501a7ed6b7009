package servers

import (
	"fmt"
	"testing"

	"github.com/plastron/plastron/internal/registry"
)

// What is asked before each signature, with ten live servers.
func BenchmarkMaySign(b *testing.B) {
	m, boot := newTestMachine("m", "i", 0), BeatEvery
	m.judge(nil, here(), boot)
	row, err := m.next(nil, registry.Server{}, noon(), boot)
	if err != nil {
		b.Fatal(err)
	}
	m.fold(&row, boot, true)
	for i := range 9 {
		m.fold(&registry.Server{ID: fmt.Sprint("o", i), Instance: []byte("x"), Beat: 1, BeatAt: noon(), Up: BeatEvery}, boot, true)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := m.maySign(noon(), boot); err != nil {
			b.Fatal(err)
		}
	}
}
