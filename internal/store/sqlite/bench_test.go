package sqlite_test

import (
	"context"
	"fmt"
	"log/slog"
	"testing"

	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
)

// BenchmarkCommit makes entries as a registry does: two keys each, one of them a
// create-if-absent. One operation is one transaction.
func BenchmarkCommit(b *testing.B) {
	for _, batch := range []int{1, 50, 500} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			s, err := sqlite.Config{Dir: b.TempDir()}.Open(b.Context(), slog.New(slog.DiscardHandler))
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			value := make([]byte, 500)
			for n := 0; n < b.N; {
				var txns []store.Txn
				for ; len(txns) < batch; n++ {
					id := fmt.Sprintf("%08x-0000-4000-8000-%012x", uint32(n)*2654435761, n)
					txns = append(txns, store.Txn{
						Caller:     "admin",
						Conditions: []store.Condition{{Key: "/entry/" + id}, {Key: "/entry-content/" + id}},
						Puts:       []store.Put{{Key: "/entry/" + id, Value: value}, {Key: "/entry-content/" + id, Value: []byte(id)}},
					})
				}
				for _, r := range s.Commit(context.Background(), txns) {
					if r.Err != nil {
						b.Fatal(r.Err)
					}
				}
			}
			b.StopTimer()
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkRestart opens and loads a store of 100,000 entries (200,000 keys),
// most of them folded.
func BenchmarkRestart(b *testing.B) {
	dir := b.TempDir()
	s, err := sqlite.Config{Dir: dir}.Open(b.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	value := make([]byte, 500)
	for n := 0; n < 100_000; {
		var txns []store.Txn
		for ; len(txns) < store.MaxGroup; n++ {
			id := fmt.Sprintf("%08x-0000-4000-8000-%012x", uint32(n)*2654435761, n)
			txns = append(txns, store.Txn{Puts: []store.Put{{Key: "/entry/" + id, Value: value}, {Key: "/entry-content/" + id, Value: []byte(id)}}})
		}
		for _, r := range s.Commit(b.Context(), txns) {
			if r.Err != nil {
				b.Fatal(r.Err)
			}
		}
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s, err := sqlite.Config{Dir: dir}.Open(b.Context(), slog.New(slog.DiscardHandler))
		if err != nil {
			b.Fatal(err)
		}
		keys := 0
		_, err = s.Load(b.Context(), func(string, uint64, []byte) error { keys++; return nil })
		if err != nil || keys < 200_000 {
			b.Fatal(keys, err)
		}
		b.StopTimer()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
