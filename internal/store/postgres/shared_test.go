//go:build linux

package postgres_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/storetest"
)

// deadline is how long anything may take before a test gives up.
const deadline = 5 * time.Minute

func limited(t testing.TB) context.Context {
	ctx, stop := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(stop)
	return ctx
}

func create(key, value string) store.Txn {
	return store.Txn{
		Caller:     "test",
		Conditions: []store.Condition{{Key: key}},
		Puts:       []store.Put{{Key: key, Value: []byte(value)}},
	}
}

func commit(t testing.TB, s *postgres.Store, txn store.Txn) store.Position {
	t.Helper()
	r := s.Commit(context.Background(), []store.Txn{txn})[0]
	if r.Err != nil {
		t.Fatalf("Commit() = %v", r.Err)
	}
	return r.Position
}

func must(t testing.TB, what string, err error, kind fault.Kind, reason string) {
	t.Helper()
	if fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Fatalf("%s = %v (%s, %s), want %s, %s", what, err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
}

// agree fails unless all stores load the same, and the log from begin gives it too.
func agree(t testing.TB, begin store.Position, stores ...*postgres.Store) map[string]storetest.Row {
	t.Helper()
	want, at := storetest.State(t, stores[0])
	for i, s := range stores {
		got, now := storetest.State(t, s)
		if diff := cmp.Diff(want, got); diff != "" || now != at {
			t.Fatalf("store %d at %v, the first at %v: -first +this\n%s", i, now, at, diff)
		}
		rows := map[string]storetest.Row{}
		for _, b := range storetest.Replay(t, s, begin, at) {
			storetest.Apply(rows, b)
		}
		if diff := cmp.Diff(want, rows); diff != "" {
			t.Fatalf("store %d: log and snapshot differ: -snapshot +log\n%s", i, diff)
		}
	}
	return want
}

// R74, R78: of two stores on one database each has 500 writers; watchers on both,
// begun before and in between, see each batch once and in order, and two writers
// of one key never both succeed.
func TestThousandWritersOnTwoStores(t *testing.T) {
	url := cluster.URL(database(t))
	a, b := opened(t, url), opened(t, url)
	_, begin := storetest.State(t, a)
	const writers = 1000
	results := make([]store.Result, writers)
	shared := make([]store.Result, writers)
	var writing, watching sync.WaitGroup
	ctx := limited(t)
	watch := func(s *postgres.Store, after store.Position) {
		watching.Go(func() {
			at := after
			for batch, err := range s.Watch(ctx, after) {
				if err != nil || batch.Prev != at || batch.Position.Revision != at.Revision+1 {
					t.Errorf("after %v: %v follows %v, %v", at, batch.Position, batch.Prev, err)
					return
				}
				at = batch.Position
				if batch.Writes[0].Caller == "end" {
					return
				}
			}
			t.Errorf("watcher ended at %v", at)
		})
	}
	for _, s := range []*postgres.Store{a, b} {
		watch(s, begin)
		watch(s, begin)
	}
	for w := range writers {
		s, other := a, b
		if w%2 == 1 {
			s, other = b, a
		}
		writing.Go(func() {
			results[w] = s.Commit(context.Background(), []store.Txn{create(fmt.Sprintf("own/%d", w), "1")})[0]
			shared[w] = s.Commit(context.Background(), []store.Txn{create(fmt.Sprintf("shared/%d", w/2), fmt.Sprint(w))})[0]
			if w%100 == 0 && results[w].Err == nil {
				watch(other, results[w].Position) // it may not have been told of it yet
			}
		})
	}
	writing.Wait()
	end := create("end", "")
	end.Caller = "end"
	commit(t, a, end)
	watching.Wait()
	rows := agree(t, begin, a, b)
	for w, r := range results {
		key := fmt.Sprintf("own/%d", w)
		if r.Err != nil || rows[key].Rev != r.Position.Revision {
			t.Fatalf("writer %d: %v at %v, the store has %v", w, r.Err, r.Position, rows[key])
		}
	}
	for w := 0; w < writers; w += 2 {
		one, two := shared[w], shared[w+1]
		won := w
		if one.Err != nil {
			one, two, won = two, one, w+1
		}
		if one.Err != nil {
			t.Fatalf("neither of two creators succeeded: %v, %v", one.Err, two.Err)
		}
		must(t, "the second creator", two.Err, fault.Conflict, "key_changed")
		want := storetest.Row{Rev: one.Position.Revision, Value: fmt.Sprint(won)}
		if got := rows[fmt.Sprintf("shared/%d", w/2)]; got != want {
			t.Fatalf("store has %v, want %v", got, want)
		}
	}
}

// Ten processes that open an empty database at once agree on one epoch.
func TestCreatedOnce(t *testing.T) {
	url := cluster.URL(database(t))
	stores := make([]*postgres.Store, 10)
	var wg sync.WaitGroup
	for i := range stores {
		wg.Go(func() {
			var err error
			if stores[i], err = postgres.OpenPatient(postgres.Config{ConnectionString: url}, limited(t), logger(t)); err != nil {
				t.Errorf("Open() = %v", err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	created := 0
	_, want := storetest.State(t, stores[0])
	for _, s := range stores {
		if s.Opened.NewEpoch {
			created++
		}
		if _, at := storetest.State(t, s); at != want {
			t.Errorf("at %v, another at %v", at, want)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if created != 1 {
		t.Errorf("%d of them created it", created)
	}
}

// stalled locks the head in a session of its own.
func stalled(t *testing.T, name string) *pgconn.PgConn {
	t.Helper()
	c, err := pgconn.Connect(limited(t), cluster.URL(name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(context.Background()) })
	if _, err := c.Exec(limited(t), "BEGIN; SELECT * FROM plastron_head FOR UPDATE").ReadAll(); err != nil {
		t.Fatal(err)
	}
	return c
}

// Someone else's transaction holds the head's lock. Reading goes on; a commit
// waits, and is written once the lock is free; when that takes too long it is
// refused and not written. R87.
func TestStalledTransaction(t *testing.T) {
	name := database(t)
	a, b := opened(t, cluster.URL(name)), opened(t, cluster.URL(name))
	_, begin := storetest.State(t, a)
	commit(t, a, create("before", ""))

	c := stalled(t, name)
	done := make(chan store.Result, 2)
	for i, s := range []*postgres.Store{a, b} {
		go func() { done <- s.Commit(context.Background(), []store.Txn{create(fmt.Sprint("waits", i), "")})[0] }()
	}
	await(t, name, "SELECT count(*) = 2 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name LIKE 'plastron-%-w' AND datname = current_database()")
	// Longer than one wait for the lock: it is asked for again.
	await(t, name, "SELECT now() - xact_start > interval '3 s' FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = current_database()")
	if rows := agree(t, begin, a, b); len(rows) != 1 {
		t.Fatalf("%d rows while the lock is held", len(rows))
	}
	if _, err := c.Exec(limited(t), "COMMIT").ReadAll(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if r := <-done; r.Err != nil {
			t.Fatalf("Commit() = %v", r.Err)
		}
	}

	hasty, err := postgres.OpenHasty(postgres.Config{ConnectionString: cluster.URL(name)}, limited(t), logger(t))
	if err != nil {
		t.Fatal(err)
	}
	defer hasty.Close()
	c = stalled(t, name)
	r := hasty.Commit(context.Background(), []store.Txn{create("refused", "")})[0]
	must(t, "Commit", r.Err, fault.Unavailable, "database_busy")
	if _, err := c.Exec(limited(t), "COMMIT").ReadAll(); err != nil {
		t.Fatal(err)
	}
	commit(t, a, create("after", ""))
	if _, there := agree(t, begin, a, b)["refused"]; there {
		t.Error("what was refused is written")
	}
}

// await waits until a query in a database is true.
func await(t testing.TB, name, sql string) {
	t.Helper()
	ctx := limited(t)
	c, err := pgconn.Connect(ctx, cluster.URL(name))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(context.Background())
	for {
		results, err := c.Exec(ctx, sql).ReadAll()
		if err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		if rows := results[0].Rows; len(rows) == 1 && string(rows[0][0]) == "t" {
			return
		}
		if _, err := c.Exec(ctx, "SELECT pg_sleep(0.02)").ReadAll(); err != nil {
			t.Fatal(err)
		}
	}
}

// A store that ends before what a server remembers was restored while no server
// ran (R21): one epoch is drawn, and by the first server that comes only.
func TestSeen(t *testing.T) {
	name := database(t)
	s := open(t, cluster.URL(name))
	_, at := storetest.State(t, s)
	for range 3 {
		at = commit(t, s, create(fmt.Sprint(at.Revision), ""))
	}
	s.Close()
	seen := func(p store.Position) (postgres.Opened, store.Position) {
		t.Helper()
		s, err := postgres.OpenPatient(postgres.Config{ConnectionString: cluster.URL(name), Seen: p}, t.Context(), logger(t))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		_, now := storetest.State(t, s)
		return s.Opened, now
	}
	for _, p := range []store.Position{{}, at, {Epoch: at.Epoch, Revision: at.Revision - 1}, {Epoch: store.NewEpoch(), Revision: 99}} {
		if opened, now := seen(p); opened.NewEpoch || now != at {
			t.Errorf("remembering %v: %+v at %v, want %v as it was", p, opened, now, at)
		}
	}
	ahead := store.Position{Epoch: at.Epoch, Revision: at.Revision + 1}
	opened, now := seen(ahead)
	if opened != (postgres.Opened{NewEpoch: true, Reason: "restored"}) || now.Epoch == at.Epoch || now.Revision != at.Revision {
		t.Errorf("remembering %v: %+v at %v", ahead, opened, now)
	}
	if opened, again := seen(ahead); opened.NewEpoch || again != now {
		t.Errorf("the second server: %+v at %v, want %v", opened, again, now)
	}
}
