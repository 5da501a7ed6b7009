// Package storetest is the contract of package store as tests. Every engine's
// test calls Run with real stores; what differs between engines (how one is
// restored, what a full disk does) is tested beside the engine.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Open opens one store; it may be called again once the store it returned before
// is closed, and then opens the same one.
type Open func(t *testing.T) store.Store

// Run checks an engine. create prepares a new, empty store for one test.
func Run(t *testing.T, create func(t *testing.T) Open) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, open Open)
	}{
		{"Conditions", conditions},
		{"ConditionsAreLinearizable", linearizable},
		{"RevisionsFollowOrder", revisionsFollowOrder},
		{"ConflictFailsOneTransaction", conflictFailsOne},
		{"KeysAndValuesByteExact", byteExact},
		{"DeleteAndCreateAgain", deleteAndCreate},
		{"Limits", limits},
		{"WriteNothing", writeNothing},
		{"WatchWithoutHoleOrDuplicate", watchComplete},
		{"WatchBehindCompaction", watchCompacted},
		{"Stats", stats},
		{"WatchOtherEpochAndFuture", watchForeign},
		{"LoadThenWatch", loadThenWatch},
		{"Cancel", cancel},
		{"Close", closeStore},
		{"Reopen", reopen},
		{"ThousandWriters", thousandWriters},
		{"Model", model},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, create(t)) })
	}
}

// deadline is how long anything may take before a test gives up: far more than
// it ever takes.
const deadline = 3 * time.Minute

// random returns a source whose seed is printed, and set by STORETEST_SEED.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("STORETEST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("STORETEST_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("STORETEST_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// opened opens the store and closes it at the end of the test.
func opened(t *testing.T, open Open) store.Store {
	t.Helper()
	s := open(t)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return s
}

func limited(t *testing.T) context.Context {
	ctx, stop := context.WithTimeout(t.Context(), deadline)
	t.Cleanup(stop)
	return ctx
}

// Put, Delete and Create are transactions of one key.
func put(key, value string) store.Txn {
	return store.Txn{Caller: "test", Puts: []store.Put{{Key: key, Value: []byte(value)}}}
}

func remove(key string) store.Txn { return store.Txn{Caller: "test", Deletes: []string{key}} }

// when adds a condition.
func when(t store.Txn, key string, rev uint64) store.Txn {
	t.Conditions = append(t.Conditions, store.Condition{Key: key, Revision: rev})
	return t
}

// commit commits transactions that must succeed and returns their positions.
func commit(t testing.TB, s store.Store, txns ...store.Txn) []store.Position {
	t.Helper()
	var at []store.Position
	for i, r := range s.Commit(context.Background(), txns) {
		if r.Err != nil {
			t.Fatalf("Commit: transaction %d: %v", i, r.Err)
		}
		at = append(at, r.Position)
	}
	return at
}

// must checks the kind and reason of an error; an empty reason is any.
func must(t testing.TB, what string, err error, kind fault.Kind, reason string) {
	t.Helper()
	if !errors.Is(err, &fault.Error{Kind: kind, Reason: reason}) {
		t.Fatalf("%s = %v (%s, %s), want %s, %s", what, err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
}

// Row is one live key.
type Row struct {
	Rev   uint64
	Value string
}

// State loads the whole store, and fails unless the keys come in byte order.
func State(t testing.TB, s store.Store) (map[string]Row, store.Position) {
	t.Helper()
	rows := make(map[string]Row)
	last, first := "", true
	at, err := s.Load(context.Background(), func(key string, rev uint64, value []byte) error {
		if !first && key <= last {
			return fmt.Errorf("key %q after %q", key, last)
		}
		last, first = key, false
		if value == nil {
			return fmt.Errorf("key %q has a nil value", key)
		}
		rows[key] = Row{rev, string(value)}
		return nil
	})
	if err != nil {
		t.Fatalf("Load() = %v", err)
	}
	return rows, at
}

// Apply lays a batch over a state.
func Apply(rows map[string]Row, b store.Batch) {
	for _, w := range b.Writes {
		for _, c := range w.Changes {
			if c.Deleted {
				delete(rows, c.Key)
			} else {
				rows[c.Key] = Row{b.Position.Revision, string(c.Value)}
			}
		}
	}
}

// Replay collects the batches after one position up to another, and fails unless
// they are one chain.
func Replay(t testing.TB, s store.Store, after, to store.Position) []store.Batch {
	t.Helper()
	var batches []store.Batch
	if after == to {
		return nil
	}
	ctx, stop := context.WithTimeout(context.Background(), deadline)
	defer stop()
	at := after
	for b, err := range s.Watch(ctx, after) {
		if err != nil {
			t.Fatalf("Watch(%v) after %v = %v", after, at, err)
		}
		if b.Prev != at || b.Position.Epoch != at.Epoch || b.Position.Revision <= at.Revision {
			t.Fatalf("Watch: batch %v follows %v, the one before was %v", b.Position, b.Prev, at)
		}
		if b.WriterTime.IsZero() || len(b.Writes) == 0 {
			t.Fatalf("Watch: batch %v without a time or without writes", b.Position)
		}
		at = b.Position
		batches = append(batches, b)
		if at == to {
			return batches
		}
		if at.Revision > to.Revision {
			t.Fatalf("Watch: batch %v, past %v", at, to)
		}
	}
	t.Fatalf("Watch: ended at %v, before %v", at, to)
	return nil
}

// same compares two states.
func same(t testing.TB, what string, want, got map[string]Row) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("%s: -want +got\n%s", what, diff)
	}
}
