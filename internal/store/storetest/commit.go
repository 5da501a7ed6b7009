package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

func conditions(t *testing.T, open Open) {
	s := opened(t, open)
	first := commit(t, s, put("a", "1"))[0]
	for _, tc := range []struct {
		name string
		txn  store.Txn
		ok   bool
	}{
		{"absent, and it is", when(put("b", "1"), "b", 0), true},
		{"absent, but it is there", when(put("a", "x"), "a", 0), false},
		{"at its revision", when(put("c", "1"), "a", first.Revision), true},
		{"at a later revision", when(put("c", "x"), "a", first.Revision+1), false},
		{"at a revision, but absent", when(put("c", "x"), "z", first.Revision), false},
		{"one of two fails", when(when(put("c", "x"), "a", first.Revision), "b", 0), false},
		{"impossible revision", when(put("c", "x"), "a", 1<<63), false},
		{"largest revision", when(put("c", "x"), "a", 1<<64-1), false},
	} {
		before, at := State(t, s)
		r := s.Commit(t.Context(), []store.Txn{tc.txn})[0]
		if tc.ok && r.Err != nil {
			t.Errorf("%s: %v", tc.name, r.Err)
		}
		if !tc.ok {
			must(t, tc.name, r.Err, fault.Conflict, "")
			if r.Position != at {
				t.Errorf("%s: conflict at %v, the store is at %v", tc.name, r.Position, at)
			}
			after, now := State(t, s)
			same(t, tc.name, before, after)
			if now != at {
				t.Errorf("%s: a refused transaction moved the store from %v to %v", tc.name, at, now)
			}
		}
	}
	commit(t, s, remove("a"))
	must(t, "at its revision before it was deleted", s.Commit(t.Context(), []store.Txn{when(put("d", "x"), "a", first.Revision)})[0].Err, fault.Conflict, "")
	commit(t, s, when(put("d", "1"), "a", 0))
}

// R74: no two successes saw the same revision, whoever else is writing.
func linearizable(t *testing.T, open Open) {
	s := opened(t, open)
	const writers, each = 16, 20
	at := commit(t, s, put("counter", "0"))[0]
	type step struct{ saw, made uint64 }
	steps := make([][]step, writers)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rev := at.Revision
			for len(steps[w]) < each {
				own := fmt.Sprintf("own/%d", w)
				txn := when(put("counter", fmt.Sprint(w, len(steps[w]))), "counter", rev)
				txn.Puts = append(txn.Puts, store.Put{Key: own, Value: []byte{byte(len(steps[w]))}})
				r := s.Commit(context.Background(), []store.Txn{txn})[0]
				switch {
				case r.Err == nil:
					steps[w] = append(steps[w], step{rev, r.Position.Revision})
					rev = r.Position.Revision
				case fault.KindOf(r.Err) == fault.Conflict:
					// Learn the counter's revision as a registry would: from the log.
					rev = latest(s, "counter", at, r.Position, rev)
				default:
					t.Errorf("writer %d: %v", w, r.Err)
					return
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	all := slices.Concat(steps...)
	slices.SortFunc(all, func(a, b step) int { return int(a.made) - int(b.made) })
	rev := at.Revision
	for i, st := range all {
		if st.saw != rev {
			t.Fatalf("step %d saw revision %d, the one before it made %d", i, st.saw, rev)
		}
		rev = st.made
	}
	rows, _ := State(t, s)
	if len(all) != writers*each || rows["counter"].Rev != rev {
		t.Fatalf("%d steps, last at %d; the store says %d", len(all), rev, rows["counter"].Rev)
	}
}

// latest returns the revision of a key's last write up to a position.
func latest(s store.Store, key string, from, to store.Position, rev uint64) uint64 {
	if to == from {
		return from.Revision
	}
	for b, err := range s.Watch(context.Background(), store.Position{Epoch: to.Epoch, Revision: rev}) {
		if err != nil {
			break
		}
		for _, w := range b.Writes {
			for _, c := range w.Changes {
				if c.Key == key {
					rev = b.Position.Revision
				}
			}
		}
		if b.Position.Revision >= to.Revision {
			break
		}
	}
	return rev
}

func revisionsFollowOrder(t *testing.T, open Open) {
	s := opened(t, open)
	_, at := State(t, s)
	if at.Revision != 0 || at.Epoch == (store.Epoch{}) {
		t.Fatalf("an empty store is at %v", at)
	}
	var txns []store.Txn
	for i := range 300 {
		txns = append(txns, put(fmt.Sprintf("k%d", i%7), fmt.Sprint(i))) // each conflicts with the 7th before
	}
	last := uint64(0)
	seen := map[int]uint64{}
	for i, p := range commit(t, s, txns...) {
		if p.Revision < last || p.Epoch != at.Epoch {
			t.Fatalf("transaction %d is at %v, the one before at revision %d", i, p, last)
		}
		if before, ok := seen[i-7]; ok && p.Revision <= before {
			t.Fatalf("transaction %d is at %v, not after the one it overwrites at %d", i, p, before)
		}
		last = p.Revision
		seen[i] = p.Revision
	}
	rows, end := State(t, s)
	if end.Revision != last {
		t.Fatalf("the store is at %v, the last commit at %d", end, last)
	}
	for i := 293; i < 300; i++ {
		if key := fmt.Sprintf("k%d", i%7); rows[key].Value != fmt.Sprint(i) || rows[key].Rev != seen[i] {
			t.Errorf("%s = %v, want the value %d of revision %d", key, rows[key], i, seen[i])
		}
	}
}

func conflictFailsOne(t *testing.T, open Open) {
	s := opened(t, open)
	commit(t, s, put("taken", "1"))
	txns := []store.Txn{
		put("a", "1"),
		when(put("b", "1"), "taken", 0),
		put("c", "1"),
		put("", "1"),
		when(put("a", "2"), "a", 0), // judged after the first
		put("d", "1"),
	}
	results := s.Commit(t.Context(), txns)
	if len(results) != len(txns) {
		t.Fatalf("%d results for %d transactions", len(results), len(txns))
	}
	must(t, "condition", results[1].Err, fault.Conflict, "")
	must(t, "empty key", results[3].Err, fault.Invalid, "")
	must(t, "second on a", results[4].Err, fault.Conflict, "")
	if results[4].Position.Revision < results[0].Position.Revision {
		t.Errorf("the conflict with %v was judged at %v", results[0].Position, results[4].Position)
	}
	rows, _ := State(t, s)
	want := map[string]string{"taken": "1", "a": "1", "c": "1", "d": "1"}
	got := map[string]string{}
	for key, row := range rows {
		got[key] = row.Value
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("store holds %v, want %v", got, want)
	}
}

// R16, R84: what goes in comes out, byte for byte.
func byteExact(t *testing.T, open Open) {
	s := opened(t, open)
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	keys := []string{"a", "A", "a ", " a", "a\x00", "a\x00b", "\x00", "\xff\xfe", "é", "e\u0301", "ß", "ss", "SS", "ı", "i", "I", "0", "00", "1e0", "'", "\"", "%", "_", "\\", "\r\n", string(all),
		strings.Repeat("k", store.MaxKey), strings.Repeat("k", store.MaxKey-1) + "l"}
	values := []string{"", "\x00", string(all), "é", strings.Repeat("v", store.MaxValue), "'; DROP TABLE log; --"}
	want := map[string]Row{}
	for i, key := range keys {
		value := values[i%len(values)]
		at := commit(t, s, when(put(key, value), key, 0))[0]
		want[key] = Row{at.Revision, value}
	}
	check := func(s store.Store) {
		t.Helper()
		got, at := State(t, s)
		same(t, "loaded", want, got)
		replayed := map[string]Row{}
		for _, b := range Replay(t, s, store.Position{Epoch: at.Epoch}, at) {
			Apply(replayed, b)
		}
		same(t, "replayed", want, replayed)
	}
	check(s)
	for _, value := range values {
		at := commit(t, s, put("value", value))[0]
		want["value"] = Row{at.Revision, value}
		check(s)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	check(opened(t, open))
}

// R74: revisions grow over delete and re-create.
func deleteAndCreate(t *testing.T, open Open) {
	s := opened(t, open)
	last := uint64(0)
	for i := range 5 {
		made := commit(t, s, when(put("k", fmt.Sprint(i)), "k", 0))[0]
		if made.Revision <= last {
			t.Fatalf("made again at %d, after %d", made.Revision, last)
		}
		rows, _ := State(t, s)
		if rows["k"].Rev != made.Revision {
			t.Fatalf("loaded at %d, committed at %d", rows["k"].Rev, made.Revision)
		}
		gone := commit(t, s, when(remove("k"), "k", made.Revision))[0]
		last = gone.Revision
		if rows, _ := State(t, s); len(rows) != 0 {
			t.Fatalf("deleted, but there is %v", rows)
		}
	}
	commit(t, s, remove("never there"), remove("k"))
}

func limits(t *testing.T, open Open) {
	s := opened(t, open)
	ok := put(strings.Repeat("k", store.MaxKey), strings.Repeat("v", store.MaxValue))
	commit(t, s, ok)
	_, at := State(t, s)
	for name, txn := range map[string]store.Txn{
		"key":       put(strings.Repeat("k", store.MaxKey+1), ""),
		"value":     put("k", strings.Repeat("v", store.MaxValue+1)),
		"empty key": put("", "v"),
		"condition": when(put("k", ""), strings.Repeat("k", store.MaxKey+1), 0),
		"twice":     {Puts: []store.Put{{Key: "k"}}, Deletes: []string{"k"}},
		"caller":    {Caller: strings.Repeat("c", store.MaxCaller+1), Deletes: []string{"k"}},
	} {
		must(t, name, s.Commit(t.Context(), []store.Txn{txn})[0].Err, fault.Invalid, "")
	}
	if _, now := State(t, s); now != at {
		t.Fatalf("refused transactions moved the store from %v to %v", at, now)
	}
	// More than a group's worth of bytes in one transaction is allowed.
	large := store.Txn{}
	for i := range 5 {
		large.Puts = append(large.Puts, store.Put{Key: fmt.Sprint(i), Value: make([]byte, store.MaxValue)})
	}
	commit(t, s, large)
	if rows, _ := State(t, s); len(rows) != 6 {
		t.Fatalf("%d keys, want 6", len(rows))
	}
	if got := s.Commit(t.Context(), nil); len(got) != 0 {
		t.Fatalf("Commit(nothing) = %v", got)
	}
}

// A transaction that changes nothing is judged, and adds nothing to the log.
func writeNothing(t *testing.T, open Open) {
	s := opened(t, open)
	at := commit(t, s, put("a", "1"))[0]
	if got := commit(t, s, when(store.Txn{}, "a", at.Revision), store.Txn{}); got[0] != at || got[1] != at {
		t.Errorf("transactions without changes at %v, the store is at %v", got, at)
	}
	must(t, "condition alone", s.Commit(t.Context(), []store.Txn{when(store.Txn{}, "a", 0)})[0].Err, fault.Conflict, "")
	if _, now := State(t, s); now != at {
		t.Errorf("moved from %v to %v", at, now)
	}
}

// Each of 1,000 writers commits at the same time; all end up in the log once, and
// most of them together with others.
func thousandWriters(t *testing.T, open Open) {
	s := opened(t, open)
	_, begin := State(t, s)
	const writers, before = 1000, 300
	results := make([]store.Result, writers)
	var start, done sync.WaitGroup
	start.Add(1)
	for w := range writers {
		done.Go(func() {
			start.Wait()
			key := fmt.Sprintf("w%04d", w)
			results[w] = s.Commit(context.Background(), []store.Txn{when(put(key, key), key, 0)})[0]
		})
	}
	// They come while the store is busy with others, however fast it is: with groups
	// of one, since all write the same key.
	done.Go(func() {
		for _, r := range s.Commit(context.Background(), slices.Repeat([]store.Txn{put("same", "")}, before)) {
			if r.Err != nil {
				t.Errorf("Commit() = %v", r.Err)
			}
		}
	})
	for _, err := range s.Watch(limited(t), begin) {
		if err != nil {
			t.Error(err)
		}
		break
	}
	start.Done()
	done.Wait()
	rows, end := State(t, s)
	for w, r := range results {
		key := fmt.Sprintf("w%04d", w)
		if r.Err != nil || rows[key] != (Row{r.Position.Revision, key}) {
			t.Fatalf("writer %d: %v at %v, the store has %v", w, r.Err, r.Position, rows[key])
		}
	}
	batches := Replay(t, s, begin, end)
	n := 0
	for _, b := range batches {
		n += len(b.Writes)
		if len(b.Writes) > store.MaxGroup {
			t.Errorf("a group of %d", len(b.Writes))
		}
	}
	t.Logf("%d writers in %d groups", writers, len(batches)-before)
	if n != before+writers || len(batches)-before > writers/2 {
		t.Fatalf("%d writes in %d groups", n, len(batches))
	}
}

func cancel(t *testing.T, open Open) {
	s := opened(t, open)
	at := commit(t, s, put("a", "1"), put("a", "2"), put("b", "2"))[2]
	gone, stop := context.WithCancel(t.Context())
	stop()
	r := s.Commit(gone, []store.Txn{put("c", "3")})[0]
	must(t, "Commit(canceled)", r.Err, fault.Unavailable, "")
	if !errors.Is(r.Err, context.Canceled) {
		t.Errorf("Commit(canceled) = %v, does not say so", r.Err)
	}
	if rows, now := State(t, s); now != at || len(rows) != 2 {
		t.Errorf("a canceled commit left %v at %v", rows, now)
	}
	if _, err := s.Load(gone, func(string, uint64, []byte) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("Load(canceled) = %v", err)
	}
	broken := errors.New("no more")
	if _, err := s.Load(t.Context(), func(string, uint64, []byte) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("Load(f fails) = %v", err)
	}
	for b, err := range s.Watch(gone, store.Position{Epoch: at.Epoch}) {
		t.Errorf("Watch(canceled) yields %v, %v", b, err)
	}
	ctx, stop := context.WithCancel(limited(t))
	n := 0
	for _, err := range s.Watch(ctx, store.Position{Epoch: at.Epoch}) { // ends while it waits
		if err != nil {
			t.Errorf("Watch = %v", err)
		}
		if n++; n == 2 {
			go stop()
		}
	}
	stop()
	if n != 2 {
		t.Errorf("Watch yielded %d batches, want 2", n)
	}

	// Cancel commits at any moment: each is there whole or not at all, and what
	// was acknowledged is there.
	rnd := random(t)
	var wg sync.WaitGroup
	results := make([]store.Result, 300)
	for i := range results {
		ctx, stop := context.WithCancel(limited(t))
		wg.Go(func() {
			txn := put(fmt.Sprintf("x%d/1", i), "1")
			txn.Puts = append(txn.Puts, store.Put{Key: fmt.Sprintf("x%d/2", i), Value: []byte("2")})
			results[i] = s.Commit(ctx, []store.Txn{txn})[0]
		})
		if rnd.IntN(2) == 0 {
			wg.Go(stop)
		} else {
			defer stop()
		}
	}
	wg.Wait()
	commit(t, s, put("last", "")) // whatever was under way is decided before this
	rows, _ := State(t, s)
	for i, r := range results {
		_, one := rows[fmt.Sprintf("x%d/1", i)]
		_, two := rows[fmt.Sprintf("x%d/2", i)]
		if unknown := fault.ReasonOf(r.Err) == "outcome_unknown"; one != two || !unknown && one != (r.Err == nil) {
			t.Errorf("transaction %d: %v, keys there %t and %t", i, r.Err, one, two)
		}
		if r.Err != nil {
			must(t, "Commit", r.Err, fault.Unavailable, "")
		}
	}
}

func closeStore(t *testing.T, open Open) {
	s := open(t)
	at := commit(t, s, put("a", "1"))[0]
	watcher := make(chan error, 1)
	waiting := make(chan struct{})
	var once sync.Once
	ctx := limited(t)
	go func() {
		var last error
		for _, err := range s.Watch(ctx, store.Position{Epoch: at.Epoch}) {
			once.Do(func() { close(waiting) })
			last = err
		}
		watcher <- last
	}()
	<-waiting
	var wg sync.WaitGroup
	results := make([]store.Result, 100)
	for i := range results {
		wg.Go(func() {
			results[i] = s.Commit(context.Background(), []store.Txn{put(fmt.Sprint(i), "1")})[0]
		})
	}
	if err := s.Close(); err != nil {
		t.Fatalf("Close() = %v", err)
	}
	wg.Wait()
	err := <-watcher
	must(t, "Watch during Close", err, fault.Unavailable, "closed")
	if err := s.Close(); err != nil {
		t.Errorf("second Close() = %v", err)
	}
	must(t, "Commit after Close", s.Commit(t.Context(), []store.Txn{put("b", "1")})[0].Err, fault.Unavailable, "closed")
	_, err = s.Load(t.Context(), func(string, uint64, []byte) error { return nil })
	must(t, "Load after Close", err, fault.Unavailable, "closed")
	must(t, "Compact after Close", s.Compact(t.Context(), 1), fault.Unavailable, "closed")
	_, err = s.Stats(t.Context())
	must(t, "Stats after Close", err, fault.Unavailable, "closed")
	_, err = s.Compactable(t.Context(), 0, time.Now())
	must(t, "Compactable after Close", err, fault.Unavailable, "closed")
	for _, err := range s.Watch(t.Context(), at) {
		must(t, "Watch after Close", err, fault.Unavailable, "closed")
	}
	rows, _ := State(t, opened(t, open))
	for i, r := range results { // R102: acknowledged or refused, and truly so
		_, there := rows[fmt.Sprint(i)]
		if r.Err != nil {
			must(t, "Commit during Close", r.Err, fault.Unavailable, "closed")
		}
		if there != (r.Err == nil) {
			t.Errorf("commit %d = %v, there: %t", i, r.Err, there)
		}
	}
}

// R73: what was acknowledged is there after a clean end, at the same position.
func reopen(t *testing.T, open Open) {
	s := open(t)
	_, begin := State(t, s)
	var want map[string]Row
	var at store.Position
	for i := range 4 {
		for j := range 30 {
			commit(t, s, put(fmt.Sprintf("k%d", j), fmt.Sprint(i, j)), remove(fmt.Sprintf("k%d", j/2)))
		}
		want, at = State(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t)
		got, now := State(t, s)
		same(t, "reopened", want, got)
		if now != at {
			t.Fatalf("reopened at %v, closed at %v", now, at)
		}
		replayed := map[string]Row{}
		for _, b := range Replay(t, s, begin, at) {
			Apply(replayed, b)
		}
		same(t, "replayed", want, replayed)
	}
	for key, row := range want {
		must(t, "condition after reopening", s.Commit(t.Context(), []store.Txn{when(put(key, "x"), key, row.Rev+1)})[0].Err, fault.Conflict, "")
		next := commit(t, s, when(put(key, "x"), key, row.Rev))[0]
		if next.Epoch != at.Epoch || next.Revision <= at.Revision {
			t.Fatalf("committed at %v, reopened at %v", next, at)
		}
		at = next
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
