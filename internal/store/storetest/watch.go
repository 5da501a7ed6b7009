package storetest

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// R78: several watchers, some from the start and some from the middle, some slow,
// see every commit of many writers once and in order.
func watchComplete(t *testing.T, open Open) {
	s := opened(t, open)
	_, begin := State(t, s)
	const writers, each = 20, 30
	positions := make(map[string]store.Position) // value written → position
	var mu sync.Mutex
	var writing, watching sync.WaitGroup
	ctx := limited(t)
	end := make(chan store.Position) // closed when last is set
	var last store.Position

	watch := func(after store.Position) {
		watching.Go(func() {
			at := after
			seen := make(map[string]store.Position)
			for b, err := range s.Watch(ctx, after) {
				if err != nil || b.Prev != at {
					t.Errorf("after %v: batch %v follows %v: %v", at, b.Position, b.Prev, err)
					return
				}
				at = b.Position
				for _, w := range b.Writes {
					for _, c := range w.Changes {
						if _, twice := seen[string(c.Value)]; twice {
							t.Errorf("%q seen twice", c.Value)
						}
						seen[string(c.Value)] = b.Position
					}
				}
				if w := b.Writes[0]; w.Caller == "end" {
					break
				}
			}
			<-end
			if at != last {
				t.Errorf("watcher ended at %v, the log at %v", at, last)
			}
			mu.Lock()
			defer mu.Unlock()
			for value, p := range positions {
				if got, ok := seen[value]; p.Revision > after.Revision && (!ok || got != p) {
					t.Errorf("%q was committed at %v and seen at %v", value, p, got)
				}
			}
		})
	}
	for range 3 {
		watch(begin)
	}
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				value := fmt.Sprintf("%d.%d", w, i)
				r := s.Commit(context.Background(), []store.Txn{put(fmt.Sprint(w%5, i%3, w), value)})[0]
				if r.Err != nil {
					t.Errorf("Commit: %v", r.Err)
					return
				}
				mu.Lock()
				positions[value] = r.Position
				mu.Unlock()
				if i == each/2 && w%4 == 0 {
					watch(r.Position)
				}
			}
		})
	}
	writing.Wait()
	txn := put("end", "end")
	txn.Caller = "end"
	last = commit(t, s, txn)[0]
	close(end)
	watching.Wait()
}

// What is said of the log is what a watcher finds there.
func stats(t *testing.T, open Open) {
	s := opened(t, open)
	check := func(begin store.Position, batches int) {
		t.Helper()
		_, end := State(t, s)
		got, err := s.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got.Engine == "" || got.Bytes <= 0 || got.Begin != begin || got.End != end || got.Batches != uint64(batches) {
			t.Fatalf("Stats() = %+v, want %d batches after %v up to %v", got, batches, begin, end)
		}
		log := Replay(t, s, got.Begin, end)
		switch {
		case len(log) != batches:
			t.Fatalf("%d batches in the log, want %d", len(log), batches)
		case batches == 0 && !got.Oldest.IsZero() || batches > 0 && !got.Oldest.Equal(log[0].WriterTime):
			t.Fatalf("Stats() = %+v, the log is %v", got, log)
		}
	}
	compactable := func(keep uint64, before time.Time, want uint64) {
		t.Helper()
		if got, err := s.Compactable(t.Context(), keep, before); err != nil || got != want {
			t.Fatalf("Compactable(%d, %v) = %d, %v, want %d", keep, before, got, err, want)
		}
	}
	_, begin := State(t, s)
	ever := time.Now().Add(24 * time.Hour)
	check(begin, 0)
	compactable(0, ever, 0)
	var at []store.Position
	for i := range 30 {
		at = append(at, commit(t, s, put(fmt.Sprintf("k%d", i%3), fmt.Sprint(i)))...)
	}
	check(begin, 30)
	log := Replay(t, s, begin, at[29])
	compactable(0, ever, at[29].Revision)
	compactable(10, ever, at[19].Revision)
	compactable(29, ever, at[0].Revision)
	compactable(30, ever, 0)
	compactable(math.MaxUint64, ever, 0)
	compactable(0, log[0].WriterTime, 0)
	compactable(5, log[12].WriterTime, at[11].Revision)
	if err := s.Compact(t.Context(), at[19].Revision); err != nil {
		t.Fatal(err)
	}
	check(at[19], 10)
	compactable(10, ever, 0)
	compactable(9, ever, at[20].Revision)
	if err := s.Compact(t.Context(), at[29].Revision); err != nil {
		t.Fatal(err)
	}
	check(at[29], 0)
	compactable(0, ever, 0)
}

func watchCompacted(t *testing.T, open Open) {
	s := opened(t, open)
	_, begin := State(t, s)
	var at []store.Position
	for i := range 40 {
		at = append(at, commit(t, s, put(fmt.Sprintf("k%d", i%3), fmt.Sprint(i)))...)
	}
	want, end := State(t, s)
	if err := s.Compact(t.Context(), at[19].Revision); err != nil {
		t.Fatalf("Compact() = %v", err)
	}
	check := func(s store.Store) {
		t.Helper()
		got, now := State(t, s)
		same(t, "after compaction", want, got)
		if now != end {
			t.Fatalf("compaction moved the store from %v to %v", end, now)
		}
		for _, p := range []store.Position{begin, at[0], at[18]} {
			for _, err := range s.Watch(limited(t), p) {
				must(t, fmt.Sprintf("Watch(%v)", p), err, fault.Precondition, "compacted")
			}
		}
		for _, p := range []store.Position{at[19], at[30], end} {
			Replay(t, s, p, end)
		}
	}
	check(s)
	for range 2 { // again, and less than before: nothing happens
		if err := s.Compact(t.Context(), at[10].Revision); err != nil {
			t.Fatal(err)
		}
	}
	check(s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = opened(t, open)
	check(s)

	// All of it, and more: the next commit follows the last.
	if err := s.Compact(t.Context(), end.Revision+1000); err != nil {
		t.Fatal(err)
	}
	for _, err := range s.Watch(limited(t), at[38]) {
		must(t, "Watch", err, fault.Precondition, "compacted")
	}
	next := commit(t, s, put("next", ""))[0]
	if next.Revision <= end.Revision {
		t.Fatalf("committed at %v after compaction at %v", next, end)
	}
	if b := Replay(t, s, end, next); len(b) != 1 {
		t.Fatalf("%d batches after the end", len(b))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, now := State(t, opened(t, open)); now != next {
		t.Fatalf("reopened at %v, closed at %v", now, next)
	}
}

func watchForeign(t *testing.T, open Open) {
	s := opened(t, open)
	at := commit(t, s, put("a", "1"))[0]
	for _, tc := range []struct {
		name   string
		after  store.Position
		reason string
	}{
		{"zero", store.Position{}, "epoch_changed"},
		{"other epoch", store.Position{Epoch: store.NewEpoch(), Revision: at.Revision}, "epoch_changed"},
		{"next revision", store.Position{Epoch: at.Epoch, Revision: at.Revision + 1}, "position_unknown"},
		{"far future", store.Position{Epoch: at.Epoch, Revision: 1<<64 - 1}, "position_unknown"},
	} {
		n := 0
		for _, err := range s.Watch(limited(t), tc.after) {
			must(t, tc.name, err, fault.Precondition, tc.reason)
			n++
		}
		if n != 1 {
			t.Errorf("%s: %d errors", tc.name, n)
		}
	}
}

// RG3, R78: a snapshot and the batches after its position give the state, while
// others write.
func loadThenWatch(t *testing.T, open Open) {
	s := opened(t, open)
	seed := random(t)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for w := range 4 {
		r := rand.New(rand.NewPCG(seed.Uint64(), uint64(w)))
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				txn := put(fmt.Sprintf("k%03d", r.IntN(200)), fmt.Sprint(r.Uint64()))
				if r.IntN(3) == 0 {
					txn = remove(fmt.Sprintf("k%03d", r.IntN(200)))
				}
				if err := s.Commit(context.Background(), []store.Txn{txn})[0].Err; err != nil {
					t.Errorf("Commit: %v", err)
					return
				}
			}
		})
	}
	type snapshot struct {
		rows map[string]Row
		at   store.Position
	}
	var snapshots []snapshot
	for range 30 {
		rows, at := State(t, s)
		snapshots = append(snapshots, snapshot{rows, at})
		// A position that Load returned can be watched at once.
		ctx, done := context.WithCancel(limited(t))
		for b, err := range s.Watch(ctx, at) {
			if err != nil || b.Prev != at {
				t.Fatalf("Watch after Load at %v: %v follows %v, %v", at, b.Position, b.Prev, err)
			}
			break
		}
		done()
	}
	close(stop)
	wg.Wait()
	want, end := State(t, s)
	for _, snap := range snapshots {
		for _, b := range Replay(t, s, snap.at, end) {
			Apply(snap.rows, b)
		}
		same(t, fmt.Sprintf("snapshot at %v and what follows", snap.at), want, snap.rows)
	}
}
