package storetest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// model drives a store and a map with the same random transactions, and reopens
// and compacts the store in between. They must agree on every result, on every
// state and on every batch.
func model(t *testing.T, open Open) {
	r := random(t)
	s := open(t)
	defer func() { s.Close() }()
	rows, at := State(t, s)
	begin := at // the oldest position that can be watched
	states := map[uint64]map[string]Row{at.Revision: maps.Clone(rows)}
	for round := range 120 {
		switch r.IntN(12) {
		case 0:
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t)
		case 1:
			to := begin.Revision + uint64(r.IntN(int(at.Revision-begin.Revision)+1))
			if err := s.Compact(t.Context(), to); err != nil {
				t.Fatal(err)
			}
			for states[to] == nil { // revisions need not be dense
				to++
			}
			begin.Revision = to
		}
		txns := make([]store.Txn, 1+r.IntN(30))
		for i := range txns {
			txns[i] = randomTxn(r, rows, round*100+i)
		}
		results := s.Commit(t.Context(), txns)
		for i, res := range results {
			want := judge(rows, txns[i])
			if want != nil && fault.KindOf(res.Err) != *want || want == nil && res.Err != nil {
				t.Fatalf("round %d, transaction %d %+v = %v, want kind %v", round, i, txns[i], res.Err, want)
			}
			if res.Err != nil || len(txns[i].Puts)+len(txns[i].Deletes) == 0 {
				continue
			}
			if res.Position.Revision < at.Revision || res.Position.Epoch != at.Epoch {
				t.Fatalf("round %d, transaction %d at %v, the one before at %v", round, i, res.Position, at)
			}
			at = res.Position
			Apply(rows, store.Batch{Position: at, Writes: []store.Write{txns[i].Write()}})
			states[at.Revision] = maps.Clone(rows)
		}
		if round%10 == 0 {
			got, now := State(t, s)
			same(t, "loaded", rows, got)
			if now != at {
				t.Fatalf("loaded at %v, committed at %v", now, at)
			}
			replayed := maps.Clone(states[begin.Revision])
			for _, b := range Replay(t, s, begin, at) {
				Apply(replayed, b)
				same(t, fmt.Sprintf("replayed to %v", b.Position), states[b.Position.Revision], replayed)
			}
		}
	}
}

// judge returns the kind of error that a transaction must get, or nil.
func judge(rows map[string]Row, txn store.Txn) *fault.Kind {
	kind := fault.Invalid
	if txn.Validate() != nil {
		return &kind
	}
	for _, c := range txn.Conditions {
		if rows[c.Key].Rev != c.Revision {
			kind = fault.Conflict
			return &kind
		}
	}
	return nil
}

// randomTxn makes transactions most of which hold: few keys, conditions mostly
// on what the model says when the list is made.
func randomTxn(r *rand.Rand, rows map[string]Row, n int) store.Txn {
	key := func() string { return fmt.Sprintf("/k/%c%d", 'a'+rune(r.IntN(26)), r.IntN(9)) }
	txn := store.Txn{Caller: fmt.Sprint("caller ", r.IntN(3))}
	for range r.IntN(4) {
		txn.Puts = append(txn.Puts, store.Put{Key: key(), Value: fmt.Append(nil, n, r.Uint32())})
	}
	for range r.IntN(2) {
		txn.Deletes = append(txn.Deletes, key())
	}
	for range r.IntN(3) {
		k := key()
		rev := rows[k].Rev
		if r.IntN(10) == 0 {
			rev += uint64(r.IntN(3))
		}
		txn.Conditions = append(txn.Conditions, store.Condition{Key: k, Revision: rev})
	}
	if len(txn.Puts) > 0 && r.IntN(10) == 0 {
		txn.Puts[0].Value = make([]byte, r.IntN(store.MaxValue/4))
	}
	return txn
}
