package etcd

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/storetest"
)

// lossy is an etcd whose answers to writing transactions are lost, or whose
// requests are, as the test says for each.
type lossy struct {
	clientv3.KV
	mu    sync.Mutex
	fates []fate
	late  func() // the request that was held back
}

type fate int

const (
	served       fate = iota
	answerLost        // applied
	neverArrives      // sent, not applied
	held              // sent, applied when the test calls late
	full              // refused for want of space
	fullApplied       // the same, and applied: etcd does so with the one that takes it over its quota
)

type lossyTxn struct {
	clientv3.Txn
	l    *lossy
	ctx  context.Context
	puts bool
}

// The real transaction outlives the attempt's context, as a request under way does.
func (l *lossy) Txn(ctx context.Context) clientv3.Txn {
	return &lossyTxn{l.KV.Txn(context.WithoutCancel(ctx)), l, ctx, false}
}

func (t *lossyTxn) If(c ...clientv3.Cmp) clientv3.Txn {
	t.Txn = t.Txn.If(c...)
	return t
}

func (t *lossyTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	for _, op := range ops {
		t.puts = t.puts || op.IsPut()
	}
	t.Txn = t.Txn.Then(ops...)
	return t
}

func (t *lossyTxn) Else(ops ...clientv3.Op) clientv3.Txn {
	t.Txn = t.Txn.Else(ops...)
	return t
}

var errLost = errors.New("transport is closing")

func (t *lossyTxn) Commit() (*clientv3.TxnResponse, error) {
	t.l.mu.Lock()
	f := served
	if sent, ok := t.ctx.Value(sentKey{}).(interface{ Store(bool) }); ok && t.puts && len(t.l.fates) > 0 {
		if f, t.l.fates = t.l.fates[0], t.l.fates[1:]; f != served {
			sent.Store(true)
		}
	}
	t.l.mu.Unlock()
	switch f {
	case answerLost:
		if _, err := t.Txn.Commit(); err != nil {
			return nil, err
		}
		return nil, errLost
	case neverArrives:
		return nil, errLost
	case full:
		return nil, rpctypes.ErrNoSpace
	case fullApplied:
		if _, err := t.Txn.Commit(); err != nil {
			return nil, err
		}
		return nil, rpctypes.ErrNoSpace
	case held:
		t.l.late = func() { t.Txn.Commit() }
		return nil, errLost
	}
	return t.Txn.Commit()
}

// R73, R74: whatever is lost on the way, a transaction is applied at most once,
// what is acknowledged is there, and what is refused never comes.
func TestLostAnswers(t *testing.T) {
	for _, tc := range []struct {
		name  string
		fates []fate
	}{
		{"answer lost once", []fate{answerLost}},
		{"request lost once", []fate{neverArrives}},
		{"request, then answer lost", []fate{neverArrives, answerLost}},
		{"answer lost twice", []fate{answerLost, answerLost}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := opened(t, shared(t))
			before := commit(t, s, put("other", "1"))
			l := &lossy{KV: s.client.KV, fates: tc.fates}
			s.client.KV = l
			at := commit(t, s, create("k", "1"))
			rows, now := storetest.State(t, s)
			if rows["k"].Rev != at.Revision || now != at {
				t.Fatalf("acknowledged at %v; the store is at %v and has %v", at, now, rows)
			}
			batches := storetest.Replay(t, s, before, at)
			if len(batches) != 1 {
				t.Fatalf("applied %d times", len(batches))
			}
			must(t, s.Commit(t.Context(), []store.Txn{create("k", "2")})[0].Err, fault.Conflict, "key_changed")
		})
	}
}

// R73: etcd refuses for want of space what it has applied or not, and the answer
// says which it was.
func TestRefusedForSpace(t *testing.T) {
	for _, tc := range []struct {
		name   string
		fates  []fate
		reason string // of the refusal, if it is one
		there  bool
	}{
		{"applied", []fate{fullApplied}, "", true},
		{"not applied", []fate{full}, "store_full", false},
		{"request lost, then applied", []fate{neverArrives, fullApplied}, "", true},
		{"answer lost, then refused", []fate{answerLost, full}, "", true},
		{"request lost, then refused", []fate{neverArrives, full}, "outcome_unknown", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := opened(t, shared(t))
			before := commit(t, s, put("other", "1"))
			s.client.KV = &lossy{KV: s.client.KV, fates: tc.fates}
			r := s.Commit(t.Context(), []store.Txn{create("k", "1")})[0]
			if tc.reason != "" {
				must(t, r.Err, fault.Unavailable, tc.reason)
			} else if r.Err != nil {
				t.Fatal(r.Err)
			}
			rows, now := storetest.State(t, s)
			if tc.there != (rows["k"].Rev != 0) || tc.there && (rows["k"].Rev != r.Position.Revision || now != r.Position) {
				t.Fatalf("answered at %v; the store is at %v and has %v", r.Position, now, rows["k"])
			}
			after := commit(t, s, put("after", ""))
			if batches := storetest.Replay(t, s, before, after); len(batches) != map[bool]int{true: 2, false: 1}[tc.there] {
				t.Fatalf("%d batches", len(batches))
			}
		})
	}
}

func TestOutcomeUnknown(t *testing.T) {
	always := func(f fate) (fates []fate) {
		for range 1000 {
			fates = append(fates, f)
		}
		return fates
	}
	for _, tc := range []struct {
		name  string
		fate  fate
		there bool
	}{
		{"written", answerLost, true},
		{"not written", neverArrives, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := opened(t, shared(t))
			commit(t, s, put("first", ""))
			l := &lossy{KV: s.client.KV, fates: always(tc.fate)}
			s.client.KV = l
			s.limit.commit = 100 * time.Millisecond // only here: all else may take its time
			must(t, s.Commit(t.Context(), []store.Txn{put("k", "1")})[0].Err, fault.Unavailable, "outcome_unknown")
			l.mu.Lock()
			l.fates = nil
			l.mu.Unlock()
			s.limit = patient()
			commit(t, s, put("after", ""))
			if rows, _ := storetest.State(t, s); tc.there != (rows["k"].Rev != 0) {
				t.Fatalf("there: %v", rows["k"])
			}
		})
	}
}

// A request that was overtaken by another attempt, or by the next transaction,
// never comes.
func TestLateRequest(t *testing.T) {
	t.Run("behind its own next attempt", func(t *testing.T) {
		s := opened(t, shared(t))
		l := &lossy{KV: s.client.KV, fates: []fate{held}}
		s.client.KV = l
		commit(t, s, put("k", "1"))
		at := commit(t, s, put("k", "2"))
		l.late()
		if rows, now := storetest.State(t, s); now != at || rows["k"].Value != "2" {
			t.Fatalf("%v at %v, want what was written last, at %v", rows["k"], now, at)
		}
	})
	t.Run("behind a conflict", func(t *testing.T) {
		c := shared(t)
		s, other := opened(t, c), opened(t, c)
		commit(t, s, put("first", ""))
		l := &lossy{KV: s.client.KV, fates: []fate{held}}
		taken := commit(t, other, put("k", "theirs"))
		s.client.KV = l
		must(t, s.Commit(t.Context(), []store.Txn{create("k", "mine")})[0].Err, fault.Conflict, "key_changed")
		gone := commit(t, other, store.Txn{Deletes: []string{"k"}, Conditions: []store.Condition{{Key: "k", Revision: taken.Revision}}})
		l.late() // its condition holds now
		if rows, now := storetest.State(t, s); now != gone || rows["k"].Rev != 0 {
			t.Fatalf("%v at %v: a transaction that was refused came after all", rows["k"], now)
		}
	})
}
