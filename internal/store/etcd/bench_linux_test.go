package etcd

import (
	"context"
	"fmt"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/store"
)

// BenchmarkCommit makes entries as a registry does: two keys each, one of them a
// create-if-absent, and beside it a bare loop that puts the same keys and values
// in transactions of the same number. One operation is one entry.
func BenchmarkCommit(b *testing.B) {
	value := make([]byte, 500)
	entry := func(n int) (string, string, string) {
		id := fmt.Sprintf("%08x-0000-4000-8000-%012x", uint32(n)*2654435761, n)
		return "/entry/" + id, "/entry-content/" + id, id
	}
	for _, batch := range []int{1, 50} {
		b.Run(fmt.Sprintf("batch=%d/store", batch), func(b *testing.B) {
			s := opened(b, shared(b))
			b.ResetTimer()
			for n := 0; n < b.N; {
				var txns []store.Txn
				for ; len(txns) < batch; n++ {
					key, content, id := entry(n)
					txns = append(txns, store.Txn{
						Caller:     "admin",
						Conditions: []store.Condition{{Key: content}},
						Puts:       []store.Put{{Key: key, Value: value}, {Key: content, Value: []byte(id)}},
					})
				}
				for _, r := range s.Commit(context.Background(), txns) {
					if r.Err != nil {
						b.Fatal(r.Err)
					}
				}
			}
		})
		b.Run(fmt.Sprintf("batch=%d/bare", batch), func(b *testing.B) {
			s := opened(b, shared(b))
			b.ResetTimer()
			for n := 0; n < b.N; {
				var ops []clientv3.Op
				for ; len(ops) < 2*batch; n++ {
					key, content, id := entry(n)
					ops = append(ops, clientv3.OpPut(s.keys.live+key, string(value)), clientv3.OpPut(s.keys.live+content, id))
				}
				if _, err := s.client.Txn(context.Background()).Then(ops...).Commit(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
