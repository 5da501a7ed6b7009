package upkeep_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/upkeep"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protowire"
)

func refused(t testing.TB, what string, err error, reason string) {
	t.Helper()
	if f, ok := errors.AsType[*fault.Error](err); !ok || f.Reason != reason || f.Remedy == "" {
		t.Fatalf("%s: %v (%s), want %s and what to do", what, err, fault.ReasonOf(err), reason)
	}
}

// does not open says why no server starts on a store.
func doesNotOpen(t testing.TB, st store.Store, reason string) {
	t.Helper()
	_, err := registry.Open(t.Context(), st, td, quiet())
	refused(t, "a server on the store", err, reason)
}

// contents is what a store holds, without the copy's marks.
func contents(t testing.TB, st store.Store) map[string]string {
	t.Helper()
	rows := map[string]string{}
	if _, err := st.Load(t.Context(), func(key string, _ uint64, value []byte) error {
		if !strings.HasPrefix(key, "/copy/") {
			rows[key] = string(value)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return rows
}

func same(t testing.TB, a, b map[string]string) {
	t.Helper()
	if len(a) != len(b) {
		t.Fatalf("%d rows and %d", len(a), len(b))
	}
	for key := range a {
		if a[key] != b[key] {
			t.Fatalf("%s differs", key)
		}
	}
}

// used fills a store as a server does, and stops it. Some values are large.
func used(t testing.TB, st store.Store, n int) {
	t.Helper()
	r := load(t, st)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	fill(t, r, 1)
	for i := 0; i < n; i += 50 {
		update(t, r, func(tx *registry.Tx) (err error) {
			for j := range 50 {
				err = errors.Join(err, tx.PutEntry(grant(fmt.Sprintf("n%d", i+j))))
			}
			return err
		})
	}
	update(t, r, func(tx *registry.Tx) error {
		return errors.Join(tx.PutToken(registry.Token{Hash: []byte{1}, ExpiresAt: time.Now().Add(time.Hour), NodeID: "spiffe://td/spire/agent/join_token/x", Epoch: tx.Epoch()}),
			tx.PutServer(registry.Server{ID: "s1", Stopped: true}))
	})
	var large []store.Put
	for i := range 3 {
		large = append(large, store.Put{Key: fmt.Sprintf("/later/%d", i), Value: newer(600 << 10)})
	}
	if res := st.Commit(t.Context(), []store.Txn{{Puts: large}})[0]; res.Err != nil {
		t.Fatal(res.Err)
	}
	stop()
	<-ended
}

// newer is a value that a newer version wrote.
func newer(size int) []byte {
	return protowire.AppendBytes(protowire.AppendTag([]byte{8, 1, 16, 1}, 3, protowire.BytesType), make([]byte, size))
}

// From each engine to another everything is copied, R21 tokens are void, the copy
// is used and the source is not; until it is taken back.
func TestCopyEngines(t *testing.T) {
	for _, test := range []struct {
		name     string
		from, to func(testing.TB) place
	}{
		{"sqlite to postgres", sqlitePlace, postgresPlace},
		{"sqlite to etcd", sqlitePlace, etcdPlace},
		{"postgres to etcd", postgresPlace, etcdPlace},
		{"etcd to postgres", etcdPlace, postgresPlace},
		{"postgres to sqlite", postgresPlace, sqlitePlace},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			from, to := test.from(t), test.to(t)
			source, target := from.open(t), to.open(t)
			used(t, source, 50)
			want := contents(t, source)
			if !from.shared {
				delete(want, "/server/s1")
			}
			c := upkeep.Copying{TrustDomain: td,
				From: upkeep.Side{Store: source, Place: "the old one", Shared: from.shared},
				To:   upkeep.Side{Store: target, Place: "the new one", Shared: to.shared}}
			done, err := c.Run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			same(t, want, contents(t, target))
			if done.Rows != uint64(len(want)) || done.Written != done.Rows || done.Tokens != 1 || done.From.Epoch == done.To.Epoch {
				t.Errorf("%+v", done)
			}
			doesNotOpen(t, source, "store_copied")
			r := load(t, target)
			run(t, r)
			update(t, r, func(tx *registry.Tx) error {
				token, err := tx.Token([]byte{1})
				if err == nil && token.Epoch == tx.Epoch() {
					t.Error("a join token lives on")
				}
				return errors.Join(err, tx.PutEntry(grant("new")))
			})
			report, err := upkeep.New(upkeep.Config{Store: target, TrustDomain: td, Registry: r, Log: quiet()}).Check(t.Context(), "")
			if err != nil || report.Faults() != 0 {
				t.Errorf("the copy: %+v, %v", report, err)
			}

			_, err = c.Run(t.Context())
			refused(t, "once more", err, "already_copied")
			other := c
			other.To.Store = sqlitePlace(t).open(t)
			_, err = other.Run(t.Context())
			refused(t, "to another place", err, "store_copied")
			if err := c.Undo(t.Context()); err != nil {
				t.Fatal(err)
			}
			load(t, source)
			refused(t, "undone twice", c.Undo(t.Context()), "not_copied")
			_, err = c.Run(t.Context())
			refused(t, "over what is used", err, "target_not_empty")
		})
	}
}

// failing takes some commits and then none, as if the process had been killed.
type failing struct {
	store.Store
	left int
}

func (f *failing) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	if f.left--; f.left < 0 {
		results := make([]store.Result, len(txns))
		for i := range results {
			results[i].Err = errors.New("killed")
		}
		return results
	}
	return f.Store.Commit(ctx, txns)
}

// A copy that is cut off at any commit leaves two stores that no server starts
// on, and goes on when it is run again, also when the source was given back and
// changed meanwhile.
func TestCopyCutOff(t *testing.T) {
	source := sqlitePlace(t).open(t)
	used(t, source, 500) // several commits
	for left := 0; ; left++ {
		to := sqlitePlace(t)
		target := to.open(t)
		cut := &failing{target, left}
		c := upkeep.Copying{TrustDomain: td, From: upkeep.Side{Store: source, Place: "old"}, To: upkeep.Side{Store: cut, Place: "new"}}
		_, err := c.Run(t.Context())
		if err == nil {
			if left < 4 {
				t.Fatalf("only %d commits", left)
			}
			break
		}
		if left > 0 {
			doesNotOpen(t, source, "store_copied")
			doesNotOpen(t, target, "copy_incomplete")
		}
		if left == 2 { // the operator goes back to the old store for a while
			if err := c.Undo(t.Context()); err != nil {
				t.Fatal(err)
			}
			r := load(t, source)
			ctx, stop := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- r.Run(ctx) }()
			update(t, r, func(tx *registry.Tx) error { return errors.Join(tx.DeleteEntry("n1"), tx.PutEntry(grant("later"))) })
			stop()
			<-ended
		}
		c.To.Store = target
		done, err := c.Run(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if left > 2 && done.Written >= done.Rows {
			t.Errorf("cut off after %d commits, and %d of %d rows were written again", left, done.Written, done.Rows)
		}
		load(t, target)
		if err := c.Undo(t.Context()); err != nil {
			t.Fatal(err)
		}
		want := contents(t, source)
		delete(want, "/server/s1")
		same(t, want, contents(t, target))
	}
}

// hesitant does not answer every other commit in time, whether it makes it or not.
type hesitant struct {
	store.Store
	calls, silent int
}

func (h *hesitant) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	h.calls++
	if fill := len(txns[0].Puts) > 1; !fill || h.calls%2 != 0 {
		return h.Store.Commit(ctx, txns)
	}
	if h.silent++; h.silent%2 == 0 {
		h.Store.Commit(ctx, txns)
	}
	results := make([]store.Result, len(txns))
	for i := range results {
		results[i].Err = fault.New(fault.Unavailable, "store_timeout", "no answer")
	}
	return results
}

// A copy goes on when the store was busy for a moment.
func TestCopyToBusyStore(t *testing.T) {
	source, target := sqlitePlace(t).open(t), sqlitePlace(t).open(t)
	used(t, source, 3000)
	busy := &hesitant{Store: target}
	c := upkeep.Copying{TrustDomain: td, From: upkeep.Side{Store: source, Place: "old"}, To: upkeep.Side{Store: busy, Place: "new"}}
	if _, err := c.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if busy.silent < 2 {
		t.Fatalf("%d of %d commits were not answered", busy.silent, busy.calls)
	}
	load(t, target)
	if err := c.Undo(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := contents(t, source)
	delete(want, "/server/s1")
	same(t, want, contents(t, target))
}

// Nothing is copied from under a server, nor over anything.
func TestCopyRefuses(t *testing.T) {
	source, target := postgresPlace(t).open(t), sqlitePlace(t).open(t)
	c := upkeep.Copying{TrustDomain: td, From: upkeep.Side{Store: source, Place: "old", Shared: true}, To: upkeep.Side{Store: target, Place: "new"}}
	_, err := c.Run(t.Context())
	refused(t, "an empty source", err, "trust_domain_changed")
	r := load(t, source)
	run(t, r)
	server := registry.Server{ID: "s1", Lease: time.Minute, BeatAt: time.Now()}
	update(t, r, func(tx *registry.Tx) error { return tx.PutServer(server) })
	_, err = c.Run(t.Context())
	refused(t, "a server that runs", err, "server_runs")
	update(t, r, func(tx *registry.Tx) error { return tx.PutEntry(grant("still")) }) // it was left alone

	server.Stopped = true
	update(t, r, func(tx *registry.Tx) error { return tx.PutServer(server) })
	itself := c
	itself.To.Store = source
	_, err = itself.Run(t.Context())
	refused(t, "onto itself", err, "same_store")
	foreign := c
	foreign.TrustDomain = spiffeid.RequireTrustDomainFromString("other")
	_, err = foreign.Run(t.Context())
	refused(t, "another trust domain", err, "trust_domain_changed")
	used(t, target, 1)
	_, err = c.Run(t.Context())
	refused(t, "a target in use", err, "target_not_empty")

	// A server that was not seen is seen by what it writes.
	late := &meddling{Store: source, t: t}
	c.From.Store, c.To.Store = late, sqlitePlace(t).open(t)
	_, err = c.Run(t.Context())
	refused(t, "a source that changes", err, "source_changed")
	doesNotOpen(t, c.To.Store, "copy_incomplete")
	// And one that goes on in spite of the mark changes nothing.
	waitFor(t, r, func() store.Position { st, _ := source.Stats(t.Context()); return st.End }())
	_, err = r.Update(t.Context(), "test", func(tx *registry.Tx) error { return tx.PutEntry(grant("late")) })
	refused(t, "a server on the source", err, "store_copied")
}

// meddling is a source that somebody writes to after it was read.
type meddling struct {
	store.Store
	t     testing.TB
	loads int
}

func (m *meddling) Load(ctx context.Context, f func(string, uint64, []byte) error) (store.Position, error) {
	at, err := m.Store.Load(ctx, f)
	if m.loads++; m.loads == 2 {
		if res := m.Commit(ctx, []store.Txn{{Puts: []store.Put{{Key: "/later/x", Value: nil}}}})[0]; res.Err != nil {
			m.t.Error(res.Err)
		}
	}
	return at, err
}
