package serverapi_test

import (
	"testing"

	storev1 "github.com/plastron/plastron/api/plastron/store/v1"
	"github.com/plastron/plastron/internal/store"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// R126: a running server's store is checked, repaired, measured and compacted.
func TestStoreCalls(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	r.create(entryUnder(agent.id, "/one"), entryUnder(agent.id, "/two"))
	client := storev1.NewStoreClient(r.admin)
	check := func(repair bool) *storev1.CheckReply {
		t.Helper()
		got, err := client.Check(t.Context(), &storev1.CheckRequest{Repair: repair})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := check(true); got.Faults != 0 || len(got.Repaired) != 0 || got.Rows < 8 || got.Batches == 0 || got.Records == 0 || got.Engine != "sqlite" {
		t.Fatalf("%v", got)
	}
	orphan := "/entry-content/" + "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	if res := r.store.Commit(t.Context(), []store.Txn{{Puts: []store.Put{{Key: orphan, Value: []byte{8, 1, 16, 1}}, {Key: "/\x1b[2J\xff", Value: []byte{8, 1, 16, 1}}}}})[0]; res.Err != nil {
		t.Fatal(res.Err)
	}
	if got := check(false); got.Faults != 1 || len(got.Defects) != 2 || got.Defects[0].Code != "content_orphan" || got.Defects[0].Key != orphan ||
		!got.Defects[0].Repairable || got.Defects[1].Code != "row_unknown" || got.Defects[1].Key != `"/\x1b[2J\xff"` {
		t.Fatalf("%v", got)
	}
	until(t, "the server has seen the row", func() bool { return check(true).Faults == 0 })

	stats, err := client.Stats(t.Context(), &storev1.StatsRequest{})
	if err != nil || stats.Commits != 7 || stats.StartedAt == 0 || stats.Bytes == 0 || stats.Batches == 0 || stats.Oldest == 0 || len(stats.Kinds) < 5 {
		t.Fatalf("%v, %v", stats, err)
	}
	compact, err := client.Compact(t.Context(), &storev1.CompactRequest{Keep: 1})
	if err != nil || compact.Begin.Revision != stats.End.Revision-1 {
		t.Fatalf("%v, %v", compact, err)
	}
	if _, err := client.Compact(t.Context(), &storev1.CompactRequest{AgeSeconds: -1}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a negative age: %v", err)
	}
	if got := check(false); got.Batches != 1 || got.Faults != 0 {
		t.Errorf("%v", got)
	}
}
