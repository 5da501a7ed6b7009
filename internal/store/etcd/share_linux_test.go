package etcd

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/storetest"
)

// R74, R78: 1,000 writers over two open stores, with as many rivals for some of
// the keys: each key is made once, and both see the same log.
func TestTwoStores(t *testing.T) {
	c := shared(t)
	stores := []*Store{opened(t, c), opened(t, c)}
	_, begin := storetest.State(t, stores[0])
	const writers = 1000
	results := make([]store.Result, writers)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			key := fmt.Sprintf("own/%d", w)
			if w%10 < 2 {
				key = fmt.Sprintf("rivals/%d", w/10)
			}
			results[w] = stores[w%2].Commit(context.Background(), []store.Txn{create(key, fmt.Sprint(w))})[0]
		})
	}
	wg.Wait()
	rows, end := storetest.State(t, stores[0])
	won := 0
	for w, r := range results {
		switch {
		case r.Err == nil:
			won++
		case fault.KindOf(r.Err) != fault.Conflict || w%10 >= 2:
			t.Fatalf("writer %d: %v", w, r.Err)
		case r.Position.Revision > end.Revision:
			t.Fatalf("writer %d: conflict at %v, the store is at %v", w, r.Position, end)
		}
	}
	if won != writers*9/10 || len(rows) != won {
		t.Fatalf("%d made, %d there, want %d", won, len(rows), writers*9/10)
	}
	one, two := storetest.Replay(t, stores[0], begin, end), storetest.Replay(t, stores[1], begin, end)
	if diff := cmp.Diff(one, two); diff != "" {
		t.Fatalf("the two stores tell different logs:\n%s", diff)
	}
	replayed := make(map[string]storetest.Row)
	for _, b := range one {
		storetest.Apply(replayed, b)
	}
	if diff := cmp.Diff(rows, replayed); diff != "" {
		t.Fatal(diff)
	}
	t.Logf("%d transactions in %d batches", won, len(one))
}

// Servers that start at once make one store.
func TestCreatedOnce(t *testing.T) {
	c := shared(t)
	stores := make([]*Store, 8)
	var wg sync.WaitGroup
	for i := range stores {
		wg.Go(func() { stores[i] = opened(t, c) })
	}
	wg.Wait()
	created := 0
	for _, s := range stores {
		if s.Opened.NewEpoch {
			created++
		}
		if s.position() != stores[0].position() {
			t.Errorf("%v and %v", s.position(), stores[0].position())
		}
	}
	if created != 1 {
		t.Errorf("%d created it", created)
	}
}

// What others do in the same etcd does not concern the store: neither their keys
// nor their compactions beyond its last batch.
func TestForeignWrites(t *testing.T) {
	c := shared(t)
	s, other := opened(t, c), opened(t, c)
	at := commit(t, s, put("k", "1"))
	var now int64
	for i := range 10 {
		resp, err := s.client.Put(t.Context(), strings.TrimSuffix(c.Prefix, "/")+"0", fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		now = resp.Header.Revision
	}
	if _, err := s.client.Compact(t.Context(), now); err != nil {
		t.Fatal(err)
	}
	if _, got := storetest.State(t, s); got != at {
		t.Fatalf("moved from %v to %v", at, got)
	}
	next := make(chan store.Position, 1)
	ctx, stop := context.WithCancel(limited(t))
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for b, err := range s.Watch(ctx, at) {
			if err != nil {
				t.Errorf("Watch = %v", err)
			}
			next <- b.Position
			return
		}
	})
	if want, got := commit(t, other, put("k", "2")), <-next; want != got {
		t.Fatalf("seen at %v, committed at %v", got, want)
	}
}

// A watcher behind a compaction is told so, and can load and go on.
func TestCompactedByOthers(t *testing.T) {
	s := opened(t, shared(t))
	first := commit(t, s, put("k", "1"))
	var last store.Position
	for range 5 {
		last = commit(t, s, put("k", "2"))
	}
	stalled, entered := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { // in the middle of the log while it is compacted: no hole
		at := first
		for b, err := range s.Watch(limited(t), first) {
			if err != nil || b.Prev != at {
				t.Errorf("%v follows %v: %v", b.Position, at, err)
				return
			}
			if at = b.Position; b.Prev == first {
				close(entered)
				<-stalled
			}
			if b.Writes[0].Caller == "end" {
				return
			}
		}
	})
	<-entered
	if _, err := s.client.Compact(t.Context(), int64(last.Revision)); err != nil {
		t.Fatal(err)
	}
	for _, err := range s.Watch(limited(t), first) {
		must(t, err, fault.Precondition, "compacted")
	}
	_, at := storetest.State(t, s)
	end := put("k", "3")
	end.Caller = "end"
	close(stalled)
	commit(t, s, end)
	for b, err := range s.Watch(limited(t), at) {
		if err != nil || string(b.Writes[0].Changes[0].Value) != "3" {
			t.Fatalf("after loading: %v, %v", b, err)
		}
		break
	}
}

// Of a transaction with more conditions than one request compares it is not said that a
// condition failed because others wrote something else meanwhile.
func TestWideBesideOthers(t *testing.T) {
	c := shared(t)
	s, other := opened(t, c), opened(t, c)
	var wide store.Txn
	for i := range 2 * maxOps {
		wide.Puts = append(wide.Puts, store.Put{Key: fmt.Sprintf("wide/%d", i), Value: []byte("v")})
	}
	at := commit(t, s, wide)
	for _, p := range wide.Puts {
		wide.Conditions = append(wide.Conditions, store.Condition{Key: p.Key, Revision: at.Revision})
	}
	ctx, stop := context.WithCancel(t.Context())
	var writing sync.WaitGroup
	writing.Go(func() {
		for ctx.Err() == nil {
			if r := other.Commit(ctx, []store.Txn{put("else", "x")})[0]; r.Err != nil && ctx.Err() == nil {
				t.Error(r.Err)
			}
		}
	})
	defer writing.Wait()
	defer stop()
	for range 10 {
		r := s.Commit(t.Context(), []store.Txn{wide})[0]
		if r.Err != nil {
			must(t, r.Err, fault.Conflict, "store_moved")
			continue
		}
		for i := range wide.Conditions {
			wide.Conditions[i].Revision = r.Position.Revision
		}
	}
	wide.Conditions[7].Revision--
	must(t, s.Commit(t.Context(), []store.Txn{wide})[0].Err, fault.Conflict, "key_changed")
}

// Values that are too large for a request leave nothing behind that nobody needs.
func TestParts(t *testing.T) {
	s := opened(t, shared(t))
	big := store.Txn{Caller: "test"}
	for i := range 5 {
		big.Puts = append(big.Puts, store.Put{Key: fmt.Sprint(i), Value: make([]byte, store.MaxValue)})
	}
	count := func() int64 {
		t.Helper()
		resp, err := s.client.Get(t.Context(), s.keys.parts, clientv3.WithPrefix(), clientv3.WithKeysOnly())
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range resp.Kvs {
			if kv.Lease != 0 {
				t.Errorf("%s is on a lease", kv.Key)
			}
		}
		return resp.Count
	}
	at := commit(t, s, big)
	if n := count(); n != 5 {
		t.Errorf("%d parts", n)
	}
	big.Conditions = []store.Condition{{Key: "4"}}
	must(t, s.Commit(t.Context(), []store.Txn{big})[0].Err, fault.Conflict, "key_changed")
	if n := count(); n != 5 {
		t.Errorf("%d parts after a conflict", n)
	}
	at = commit(t, s, store.Txn{Deletes: []string{"0", "1"}, Conditions: []store.Condition{{Key: "0", Revision: at.Revision}}})
	if err := s.Compact(t.Context(), at.Revision); err != nil {
		t.Fatal(err)
	}
	if n := count(); n != 3 {
		t.Errorf("%d parts after compaction", n)
	}
	rows, _ := storetest.State(t, s)
	if len(rows) != 3 || len(rows["4"].Value) != store.MaxValue {
		t.Errorf("%d keys", len(rows))
	}

	// More conditions than can be compared, and more keys than one level holds.
	wide := store.Txn{Caller: "test"}
	for i := range 3000 {
		key := fmt.Sprintf("w%04d", i)
		wide.Puts = append(wide.Puts, store.Put{Key: key, Value: []byte("v")})
		wide.Conditions = append(wide.Conditions, store.Condition{Key: key})
	}
	at = commit(t, s, wide)
	must(t, s.Commit(t.Context(), []store.Txn{wide})[0].Err, fault.Conflict, "key_changed")
	if rows, now := storetest.State(t, s); len(rows) != 3003 || now != at {
		t.Errorf("%d keys at %v", len(rows), now)
	}
	names := store.Txn{}
	for i := range 2000 {
		names.Deletes = append(names.Deletes, fmt.Sprintf("%01000d", i))
	}
	must(t, s.Commit(t.Context(), []store.Txn{names})[0].Err, fault.Invalid, "txn_too_large")
}

// R21, R75: what cannot be the same store any more has a new epoch, for those
// that open it and for those that have it open.
func TestEpochs(t *testing.T) {
	c := shared(t)
	s := opened(t, c)
	at := commit(t, s, put("k", "1"))
	resp, err := s.client.Get(t.Context(), s.keys.meta)
	if err != nil {
		t.Fatal(err)
	}
	again := func(seen store.Position) *Store {
		c := c
		c.Seen = seen
		return opened(t, c)
	}
	if o := again(at).Opened; o.NewEpoch {
		t.Fatalf("opened at %v: %+v", at, o)
	}
	if o := again(store.Position{Epoch: at.Epoch, Revision: at.Revision + 1}).Opened; o != (Opened{true, "restored"}) {
		t.Fatalf("opened with more than there is: %+v", o)
	}
	for _, err := range s.Watch(limited(t), at) {
		must(t, err, fault.Precondition, "epoch_changed")
	}
	must(t, s.Commit(t.Context(), []store.Txn{put("k", "2")})[0].Err, fault.Unavailable, "epoch_changed")
	if _, now := storetest.State(t, s); now.Epoch == at.Epoch {
		t.Fatalf("loaded at %v", now)
	}
	// R76: who loads in the new epoch follows it from there, whether or not
	// anything has been written since.
	for range 2 {
		_, from := storetest.State(t, s)
		to := commit(t, s, put("k", "2"))
		storetest.Replay(t, s, from, to)
	}
	elsewhere := meta{s.position().Epoch, resp.Header.ClusterId + 1}
	if _, err := s.client.Put(t.Context(), s.keys.meta, elsewhere.text()); err != nil {
		t.Fatal(err)
	}
	if o := again(s.position()).Opened; o != (Opened{true, "copied"}) {
		t.Fatalf("opened with another cluster's id: %+v", o)
	}
}

func TestRefusals(t *testing.T) {
	refuse := func(t *testing.T, c Config, kind fault.Kind, reason string) {
		t.Helper()
		s, err := c.open(t.Context(), slog.New(slog.DiscardHandler), patient())
		if err == nil {
			s.Close()
		}
		must(t, err, kind, reason)
	}
	admin := opened(t, shared(t)).client
	tell := func(t *testing.T, key, value string) {
		t.Helper()
		if _, err := admin.Put(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("foreign keys", func(t *testing.T) {
		c := shared(t)
		tell(t, c.Prefix+"x", "")
		refuse(t, c, fault.Precondition, "store_foreign")
	})
	t.Run("foreign meta", func(t *testing.T) {
		c := shared(t)
		tell(t, c.Prefix+"meta", "hello")
		refuse(t, c, fault.Precondition, "store_foreign")
	})
	t.Run("newer", func(t *testing.T) {
		c := shared(t)
		tell(t, c.Prefix+"meta", `{"plastron_store":2}`)
		refuse(t, c, fault.Precondition, "schema_newer")
	})
	t.Run("damaged meta", func(t *testing.T) {
		c := shared(t)
		tell(t, c.Prefix+"meta", `{"plastron_store":1,"epoch":"00"}`)
		refuse(t, c, fault.Precondition, "store_corrupt")
	})
	t.Run("prefix", func(t *testing.T) {
		c := shared(t)
		c.Prefix = "plastron"
		refuse(t, c, fault.Invalid, "bad_prefix")
	})
	t.Run("nobody there", func(t *testing.T) {
		refuse(t, Config{Endpoints: []string{"http://127.0.0.1:1"}}, fault.Unavailable, "store_unreachable")
	})
	t.Run("not there", func(t *testing.T) {
		c := shared(t)
		c.Existing = true
		refuse(t, c, fault.NotFound, "store_not_found")
		c.Existing = false
		opened(t, c) // nothing was left behind
		c.Existing = true
		opened(t, c)
	})
	t.Run("nowhere", func(t *testing.T) { refuse(t, Config{}, fault.Invalid, "no_endpoints") })
	t.Run("mixed", func(t *testing.T) {
		refuse(t, Config{Endpoints: []string{"http://a:1", "https://a:1"}}, fault.Invalid, "mixed_endpoints")
		refuse(t, Config{Endpoints: []string{"http://a:1"}, CAFile: "x"}, fault.Invalid, "mixed_endpoints")
		refuse(t, Config{Endpoints: []string{"http://a:1"}, Username: "u"}, fault.Invalid, "login_incomplete")
		refuse(t, Config{Endpoints: []string{"http://a:1"}, PasswordFile: "f"}, fault.Invalid, "login_incomplete")
	})
	t.Run("https where there is none", func(t *testing.T) {
		c := shared(t)
		refuse(t, Config{Endpoints: []string{"https" + c.Endpoints[0][len("http"):]}}, fault.Unavailable, "store_tls")
	})
	t.Run("removed while open", func(t *testing.T) {
		s := opened(t, shared(t))
		at := commit(t, s, put("k", "1"))
		if _, err := admin.Delete(t.Context(), s.keys.prefix, clientv3.WithPrefix()); err != nil {
			t.Fatal(err)
		}
		must(t, s.Commit(t.Context(), []store.Txn{put("k", "2")})[0].Err, fault.Unavailable, "store_missing")
		for _, err := range s.Watch(limited(t), at) {
			must(t, err, fault.Unavailable, "store_missing")
		}
	})
	t.Run("written by hand", func(t *testing.T) {
		s := opened(t, shared(t))
		at := commit(t, s, put("k", "1"))
		tell(t, s.keys.live+"k", "\x00evil")
		for _, err := range s.Watch(limited(t), at) {
			must(t, err, fault.Precondition, "store_corrupt")
		}
		// Who loads has it, and may go on from there.
		if got, now := storetest.State(t, s); now != at || string(got["k"].Value) != "evil" {
			t.Fatalf("loaded %v at %v", got, now)
		}
		next := commit(t, s, put("other", "2"))
		for b, err := range s.Watch(limited(t), at) {
			if err != nil || b.Prev != at || b.Position != next {
				t.Errorf("after it: %v, %v", b, err)
			}
			break
		}
	})
}
