package registry

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/store"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
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

// BenchmarkLoad opens a registry over a store of 100,000 entries.
func BenchmarkLoad(b *testing.B) {
	const n = 100_000
	st := openStore(b, b.TempDir())
	for i := 0; i < n; i += 1000 {
		var txn store.Txn
		for j := i; j < i+1000; j++ {
			e := typical(j)
			hash := entry.ContentHash(&e)
			txn.Puts = append(txn.Puts, store.Put{Key: keyOf(kindEntry, e.ID), Value: sealed(b, entryMessage(&e))},
				store.Put{Key: keyOf(kindContent, hexOf(hash)), Value: sealed(b, &statev1.EntryContent{EntryId: e.ID})})
		}
		if res := st.Commit(b.Context(), []store.Txn{txn}); res[0].Err != nil {
			b.Fatal(res[0].Err)
		}
	}
	for b.Loop() {
		r, err := Open(b.Context(), st, td, quiet())
		if err != nil {
			b.Fatal(err)
		}
		r.View(func(v *Snapshot) {
			if v.EntryCount() != n {
				b.Fatalf("%d entries", v.EntryCount())
			}
		})
	}
}

// BenchmarkCount counts by a filter that no index helps, among 100,000 entries.
func BenchmarkCount(b *testing.B) {
	s := newState(td)
	for i := range 100_000 {
		e := typical(i)
		s.putEntry(&e, nil, entry.ContentHash(&e), [32]byte{}, nil)
	}
	v, hint := Snapshot{s}, "none"
	for b.Loop() {
		if n := v.Count(Filter{Hint: &hint}); n != 0 {
			b.Fatal(n)
		}
	}
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
			raw, err := seal(entryMessage(&e), oldestFormat)
			if err != nil {
				b.Fatal(err)
			}
			batch := store.Batch{Position: store.Position{Revision: uint64(i + 1)},
				Writes: []store.Write{{Changes: []store.Change{{Key: keyOf(kindEntry, e.ID), Value: raw}}}}}
			began := time.Now()
			s.apply(batch, func(*node, touched) {}, func(store.Write) {})
			spent += time.Since(began)
		}
		b.ReportMetric(float64(heap()-before)/n, "B/entry")
		b.ReportMetric(float64(spent.Nanoseconds())/1000/n, "µs/entry")
		if s.rows.entries.n != n {
			b.Fatalf("%d entries", s.rows.entries.n)
		}
		runtime.KeepAlive(s)
	}
}
