package etcd

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/storetest"
)

// examine looks at a store for the first of some keys, which is there.
func examine(t *testing.T, c Config, keys ...string) (store.Look, map[string]store.Remark) {
	t.Helper()
	got := ""
	found, err := c.examine(t.Context(), patient(), keys, func(key string, _ []byte) error { got = key; return nil })
	if err != nil || len(keys) > 0 && got != keys[0] {
		t.Fatalf("Examine() = %+v, %v", found, err)
	}
	remarks := map[string]store.Remark{}
	for _, r := range found.Remarks {
		remarks[r.About] = r
	}
	return found, remarks
}

func TestExamine(t *testing.T) {
	c := shared(t)
	found, err := c.examine(t.Context(), patient(), []string{"/a"}, nil)
	must(t, err, fault.NotFound, "store_not_found")
	if found.Engine != "etcd at "+c.Address() || len(found.Remarks) != 2 {
		t.Errorf("without a store: %+v", found)
	}
	s := opened(t, c)
	commit(t, s, put("/a", "1"))
	at := commit(t, s, put("/b", "2"))
	keys := map[string]string{}
	found, err = c.examine(t.Context(), patient(), []string{"/a", "/none", "/b"}, func(key string, value []byte) error { keys[key] = string(value); return nil })
	if err != nil || found.Position != at || found.Bytes == 0 {
		t.Errorf("%+v, %v, want %v", found, err, at)
	}
	if d := cmp.Diff(map[string]string{"/a": "1", "/b": "2"}, keys); d != "" {
		t.Error(d)
	}
	for _, r := range found.Remarks {
		if r.Fix != "" {
			t.Errorf("%+v", r)
		}
	}
	if _, now := storetest.State(t, s); now != at { // nothing was written
		t.Errorf("at %v, was at %v", now, at)
	}
	if _, err := s.client.Put(t.Context(), s.keys.meta, `{"plastron_store":99}`); err != nil {
		t.Fatal(err)
	}
	_, err = c.examine(t.Context(), patient(), nil, nil)
	must(t, err, fault.Precondition, "schema_newer")
}

func TestJudgeMembers(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name   string
		got    store.Remark
		wrong  bool
		expect string
	}{
		{"well", judgeMembers(3, nil, nil, 10*mib, 100*mib), false, "all 3 answer and have a leader; 10 MiB on disk"},
		{"no quota told", judgeMembers(1, nil, nil, 90*mib, 0), false, "all 1 answer and have a leader; 90 MiB on disk"},
		{"nearly full", judgeMembers(3, nil, nil, 81*mib, 100*mib), true, "81 of the 100 MiB that etcd may take are used"},
		{"no leader", judgeMembers(3, nil, []string{"a"}, 0, 0), true, "a of 3 have no leader, or no vote yet"},
		{"away", judgeMembers(3, []string{"a", "b"}, []string{"c"}, 0, 0), true, "2 of 3 do not answer: a, b"},
	} {
		if c.got.Found != c.expect || (c.got.Fix != "") != c.wrong {
			t.Errorf("%s: %+v", c.name, c.got)
		}
	}
}
