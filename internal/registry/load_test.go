package registry

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// A load shares its rows out; the state is that of the rows one by one, with
// broken ones in every part left aside (R79).
func TestLoadInParts(t *testing.T) {
	const n = 3*partRows + 7
	st := openStore(t, t.TempDir())
	want, broken := newState(td), 0
	var puts []store.Put
	for i := range n {
		e := typical(i)
		value := sealed(t, entryMessage(&e))
		if i%100 == 0 {
			value, broken = []byte("\xff\xff"), broken+1
		}
		hash := entry.ContentHash(&e)
		puts = append(puts, store.Put{Key: keyOf(kindEntry, e.ID), Value: value},
			store.Put{Key: keyOf(kindContent, hexOf(hash)), Value: sealed(t, &statev1.EntryContent{EntryId: e.ID})})
	}
	// It comes first, and its part is filled again and again after it.
	own := &bundle.Bundle{TrustDomain: td, Sequence: 3, X509: []bundle.X509Authority{{ASN1: []byte("the own root")}}}
	puts = append(puts, store.Put{Key: keyOf(kindBundle, td.Name()), Value: sealed(t, bundleMessage(own))})
	node := agent("join_token/" + fmt.Sprintf("%032x", 0))
	puts = append(puts, store.Put{Key: keyOf(kindNode, nodeName(node.ID.Path())), Value: sealed(t, nodeMessage(&node))},
		store.Put{Key: keyOf(kindTrustDomain, ""), Value: sealed(t, serverMessage(td, &Server{}))})
	commitRaw(t, st, puts...)
	if _, err := st.Load(t.Context(), func(key string, rev uint64, value []byte) error {
		want.set(key, rev, value, nil)
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	r, err := Open(t.Context(), st, td, quiet())
	if err != nil {
		t.Fatal(err)
	}
	r.View(func(v *Snapshot) {
		if v.Digest() != want.digest.Bytes() || v.EntryCount() != n-broken || len(v.s.bad) != broken || len(v.s.orphans) != broken {
			t.Errorf("%d entries, %d broken rows and %d contents without an entry, want %d, %d and %d and the digest of all",
				v.EntryCount(), len(v.s.bad), len(v.s.orphans), n-broken, broken, broken)
		}
		h, _ := want.live(node.ID)
		if v.Hash(node.ID) != want.hash(h, true) {
			t.Error("the agent holds something else than the rows say")
		}
		got, err := v.Bundle(td)
		if diff := cmp.Diff(own, got); err != nil || diff != "" {
			t.Errorf("Bundle() = %v: -want +got\n%s", err, diff)
		}
		for _, row := range puts {
			if k, _ := split(row.Key); k == kindContent && v.s.revision(row.Key) != 1 {
				t.Errorf("%q is at revision %d, want 1", row.Key, v.s.revision(row.Key))
			}
		}
	})
}

// failing is a store that breaks in the middle of a load.
type failing struct{ store.Store }

func (failing) Load(_ context.Context, f func(string, uint64, []byte) error) (store.Position, error) {
	for i := range partRows + 1 {
		if err := f(fmt.Sprint("/entry/", i), 1, nil); err != nil {
			return store.Position{}, err
		}
	}
	return store.Position{}, errBroken
}

var errBroken = errors.New("the disk is gone")

func TestLoadFails(t *testing.T) {
	if _, err := Open(t.Context(), failing{}, td, quiet()); !errors.Is(err, errBroken) {
		t.Errorf("Open() = %v, want the store's failure", err)
	}
}

// A store that is away or busy for a while when a server starts ends no start; one
// that stays away ends it, and so does at once what does not pass.
func TestOpenInsists(t *testing.T) {
	busy := fault.New(fault.Unavailable, "busy", "not now")
	for _, tt := range []struct {
		loads, commits int // so many fail
		err, want      error
	}{
		{7, 7, busy, nil},
		{1000, 0, busy, busy},
		{0, 1000, busy, busy},
		{1, 0, errBroken, errBroken},
		{0, 1, errBroken, errBroken},
	} {
		synctest.Test(t, func(t *testing.T) {
			st := openStore(t, t.TempDir())
			trying := &hooked{Store: st, load: func(f func(string, uint64, []byte) error) (store.Position, error) {
				if tt.loads--; tt.loads >= 0 {
					return store.Position{}, tt.err
				}
				return st.Load(t.Context(), f)
			}, commit: func(txns []store.Txn) []store.Result {
				if tt.commits--; tt.commits >= 0 {
					return []store.Result{{Err: tt.err}}
				}
				return st.Commit(t.Context(), txns)
			}}
			began := time.Now()
			_, err := Open(t.Context(), trying, td, quiet())
			if took := time.Since(began); !errors.Is(err, tt.want) || took > beginWithin+2*time.Second || tt.err == errBroken && took != 0 {
				t.Errorf("Open() = %v after %v, want %v", err, took, tt.want)
			}
		})
	}
}
