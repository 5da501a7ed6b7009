package registry

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/store"
)

// typical is entry i of a fleet: 50 workloads on each node, parented to it.
func typical(i int) entry.Entry {
	e := grant(fmt.Sprintf("%08x-9d4f-4c1a-8f52-%012x", uint32(i)*2654435761, i), fmt.Sprintf("/spire/agent/join_token/%032x", i/50),
		fmt.Sprintf("/ns/team-%d/sa/service-%d", i%200, i), fmt.Sprintf("unix:uid:%d", 1000+i%50), fmt.Sprintf("unix:path:/opt/service-%d/bin/server", i%500))
	e.Revision = uint64(i + 1)
	return e
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkEntries folds 100,000 entries into an empty state, as commits.
func BenchmarkEntries(b *testing.B) {
	const n = 100_000
	changes := make([][]byte, n)
	for b.Loop() {
		before := heap()
		s := newState(td)
		var spent time.Duration
		for i := range changes {
			e := typical(i)
			raw, err := seal(entryMessage(&e))
			if err != nil {
				b.Fatal(err)
			}
			batch := store.Batch{Position: store.Position{Revision: uint64(i + 1)},
				Writes: []store.Write{{Changes: []store.Change{{Key: keyOf(kindEntry, e.ID), Value: raw}}}}}
			began := time.Now()
			s.apply(batch, func(*node, touched) {})
			spent += time.Since(began)
		}
		b.ReportMetric(float64(heap()-before)/n, "B/entry")
		b.ReportMetric(float64(spent.Nanoseconds())/1000/n, "µs/entry")
		if s.rows.n != n {
			b.Fatalf("%d entries", s.rows.n)
		}
		runtime.KeepAlive(s)
	}
}
