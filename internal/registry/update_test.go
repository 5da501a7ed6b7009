package registry

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// hooked is the real store with a hand on some of its methods.
type hooked struct {
	store.Store
	commit func([]store.Txn) []store.Result                                       // nil: the store's
	watch  func(context.Context, store.Position) iter.Seq2[store.Batch, error]    // nil: the store's
	load   func(func(string, uint64, []byte) error) (p store.Position, err error) // nil: the store's
}

func (h *hooked) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	if h.commit != nil {
		return h.commit(txns)
	}
	return h.Store.Commit(ctx, txns)
}

func (h *hooked) Watch(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
	if h.watch != nil {
		return h.watch(ctx, after)
	}
	return h.Store.Watch(ctx, after)
}

func (h *hooked) Load(ctx context.Context, f func(string, uint64, []byte) error) (store.Position, error) {
	if h.load != nil {
		return h.load(f)
	}
	return h.Store.Load(ctx, f)
}

func isFault(t testing.TB, err error, kind fault.Kind, reason string) {
	t.Helper()
	if fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Fatalf("got %v (kind %v, reason %q), want kind %v, reason %q", err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
}

func TestEntriesAreUnique(t *testing.T) {
	st := openStore(t, t.TempDir())
	r := start(t, st)
	e := grant("e1", "/spire/agent/a", "/web", "unix:uid:1")
	first := update(t, r, func(tx *Tx) error { return tx.PutEntry(e) })

	twin := e
	twin.ID = "e2"
	_, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutEntry(twin) })
	isFault(t, err, fault.Exists, "entry_exists")

	// The same holds for a change of an entry into another's content (RG: uniqueness on update).
	other := grant("e3", "/spire/agent/a", "/other", "unix:uid:1")
	update(t, r, func(tx *Tx) error { return tx.PutEntry(other) })
	other.SPIFFEID = e.SPIFFEID
	_, err = r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutEntry(other) })
	isFault(t, err, fault.Exists, "entry_exists")

	// The content is free again after a change, and after a deletion.
	moved := e
	moved.SPIFFEID = id("/moved")
	update(t, r, func(tx *Tx) error { return tx.PutEntry(moved) })
	for e, there := range map[*entry.Entry]bool{&e: false, &moved: true} {
		if found := stored(t, st, keyOf(kindContent, hexOf(entry.ContentHash(e)))) != nil; found != there {
			t.Errorf("the content key of %s is stored: %v, want %v", e.SPIFFEID, found, there)
		}
	}
	update(t, r, func(tx *Tx) error { return tx.PutEntry(twin) })
	update(t, r, func(tx *Tx) error { return tx.DeleteEntry("e2") })
	again := update(t, r, func(tx *Tx) error { return tx.PutEntry(e) })
	update(t, r, func(tx *Tx) error {
		for want, hash := range map[string][32]byte{"e1": entry.ContentHash(&e), "": entry.ContentHash(&moved)} {
			got, err := tx.EntryByContent(hash)
			if want == "" {
				isFault(t, err, fault.NotFound, "entry_not_found")
			} else if err != nil || got.ID != want {
				t.Errorf("EntryByContent() = %v, %v, want %s", got.ID, err, want)
			}
		}
		return nil
	})

	// E25, R74: the revision grows over deletion and re-creation.
	update(t, r, func(tx *Tx) error { return tx.DeleteEntry("e1") })
	update(t, r, func(tx *Tx) error { return tx.PutEntry(e) })
	r.View(func(v *Snapshot) {
		if got, _ := v.Entry("e1"); got.Revision <= again.Revision || again.Revision <= first.Revision {
			t.Errorf("revision %d after %v and %v", got.Revision, first, again)
		}
	})
}

// What a transaction wrote it reads again; what it deleted is gone for it.
func TestTransactionSeesItself(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	e := grant("e1", "/spire/agent/a", "/web", "unix:uid:1")
	n := agent("a", "n:1")
	update(t, r, func(tx *Tx) error {
		if err := errors.Join(tx.PutEntry(e), tx.PutNode(n), tx.PutToken(Token{Hash: []byte{1}})); err != nil {
			return err
		}
		if got, err := tx.Entry("e1"); err != nil || got.SPIFFEID != e.SPIFFEID {
			t.Errorf("Entry() = %v, %v", got, err)
		}
		if got, err := tx.EntryByContent(entry.ContentHash(&e)); err != nil || got.ID != "e1" {
			t.Errorf("EntryByContent() = %v, %v", got, err)
		}
		if got, err := tx.Node(n.ID); err != nil || got.Current.Serial != n.Current.Serial {
			t.Errorf("Node() = %v, %v", got, err)
		}
		twin := e
		twin.ID = "e2"
		isFault(t, tx.PutEntry(twin), fault.Exists, "entry_exists")
		if err := errors.Join(tx.DeleteEntry("e1"), tx.PutEntry(twin), tx.DeleteNode(n.ID)); err != nil {
			t.Error(err)
		}
		_, err := tx.Entry("e1")
		isFault(t, err, fault.NotFound, "entry_not_found")
		_, err = tx.Node(n.ID)
		isFault(t, err, fault.NotFound, "node_not_found")
		isFault(t, tx.DeleteEntry("e1"), fault.NotFound, "entry_not_found")
		isFault(t, tx.DeleteNode(n.ID), fault.NotFound, "node_not_found")
		return nil
	})
	r.View(func(v *Snapshot) {
		if _, err := v.Entry("e2"); err != nil || v.EntryCount() != 1 || v.NodeCount() != 0 {
			t.Errorf("%v, %d entries, %d nodes, want e2 alone", err, v.EntryCount(), v.NodeCount())
		}
	})
	// A closure that fails, or writes nothing, leaves no trace.
	at := r.Position()
	_, err := r.Update(t.Context(), "test", func(tx *Tx) error { return errors.Join(tx.DeleteEntry("e2"), context.Canceled) })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Update() = %v", err)
	}
	if p := update(t, r, func(tx *Tx) error { _, err := tx.Entry("e2"); return err }); p != at {
		t.Errorf("reading moved the position from %v to %v", at, p)
	}
}

func TestWhatMayNotBeStored(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	for reason, f := range map[string]func(*Tx) error{
		"spiffe_id_reserved": func(tx *Tx) error {
			return tx.PutEntry(grant("e", "/spire/agent/a", "/spire/server", "a:b"))
		}, // R16
		"agent_id_invalid": func(tx *Tx) error { return tx.PutNode(Node{ID: id("/spire/server")}) }, // R16
		"spiffe_id_foreign": func(tx *Tx) error {
			return tx.PutNode(Node{ID: spiffeid.RequireFromString("spiffe://x/spire/agent/a")})
		},
		"token_invalid":     func(tx *Tx) error { return tx.PutToken(Token{}) },
		"authority_invalid": func(tx *Tx) error { return tx.PutAuthority(Authority{Server: "s"}) },
		"server_invalid":    func(tx *Tx) error { return tx.PutServer(Server{}) },
		"value_invalid":     func(tx *Tx) error { return tx.PutServer(Server{ID: "s", Version: "\xff"}) },
	} {
		_, err := r.Update(t.Context(), "test", f)
		isFault(t, err, fault.Invalid, reason)
	}
	// R75: a bundle's sequence never goes back.
	update(t, r, func(tx *Tx) error { return tx.PutBundle(&bundle.Bundle{TrustDomain: td, Sequence: 5}) })
	_, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutBundle(&bundle.Bundle{TrustDomain: td, Sequence: 4}) })
	isFault(t, err, fault.Conflict, "bundle_sequence")
}

// What a server that is gone leaves can be removed, and is then not there.
func TestDeleteServer(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	update(t, r, func(tx *Tx) error {
		return errors.Join(tx.PutServer(Server{ID: "s"}), tx.PutRoster("s", []uint64{1}), tx.PutAuthority(Authority{Server: "s", Kind: "jwt"}))
	})
	update(t, r, func(tx *Tx) error { return errors.Join(tx.DeleteAuthority("s", "jwt"), tx.DeleteServer("s")) })
	r.View(func(v *Snapshot) {
		_, err := v.Server("s")
		isFault(t, err, fault.NotFound, "server_not_found")
		if n := len(v.Servers()) + len(v.Authorities("")) + len(v.s.values[kindRoster]); n != 0 {
			t.Errorf("%d rows are left", n)
		}
	})
	for reason, f := range map[string]func(*Tx) error{
		"server_not_found":    func(tx *Tx) error { return tx.DeleteServer("s") },
		"authority_not_found": func(tx *Tx) error { return tx.DeleteAuthority("s", "jwt") },
	} {
		_, err := r.Update(t.Context(), "test", f)
		isFault(t, err, fault.NotFound, reason)
	}
}

// A closure runs again when what it read was changed meanwhile, and not for
// what it did not read.
func TestConflictRunsAgain(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	update(t, r, func(tx *Tx) error { return tx.PutBundle(&bundle.Bundle{TrustDomain: td, Sequence: 1}) })
	const writers, each = 20, 10
	var runs atomic.Int64
	var all sync.WaitGroup
	for range writers {
		all.Go(func() {
			for range each {
				_, err := r.Update(t.Context(), "test", func(tx *Tx) error {
					runs.Add(1)
					b, err := tx.Bundle(td)
					if err != nil {
						return err
					}
					b.Sequence++
					return tx.PutBundle(b)
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	r.View(func(v *Snapshot) {
		if b, err := v.Bundle(td); err != nil || b.Sequence != 1+writers*each {
			t.Errorf("sequence %d after %d increments (%v)", b.Sequence, writers*each, err)
		}
	})
	t.Logf("%d closures run for %d updates", runs.Load(), writers*each)
}

// E31, R76: many create the same entry at once: one succeeds, the others are
// told, and each sees what it was told. Two registries stand for two servers.
func TestConcurrentCreates(t *testing.T) {
	st := openStore(t, t.TempDir())
	registries := []*Registry{start(t, st), start(t, st)}
	for round := range 20 {
		var made, told atomic.Int64
		var all sync.WaitGroup
		for i := range 10 {
			r := registries[i%2]
			all.Go(func() {
				e := grant(fmt.Sprintf("r%d-%d", round, i), "/spire/agent/a", fmt.Sprint("/w", round), "unix:uid:1")
				_, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutEntry(e) })
				switch {
				case err == nil:
					made.Add(1)
					r.View(func(v *Snapshot) {
						if _, err := v.Entry(e.ID); err != nil {
							t.Errorf("R76: %v after its creation was acknowledged", err)
						}
					})
				case fault.KindOf(err) == fault.Exists:
					told.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		all.Wait()
		if made.Load() != 1 || told.Load() != 9 {
			t.Fatalf("E31: %d creates succeeded and %d were told, want 1 and 9", made.Load(), told.Load())
		}
	}
}

// R74: what another server changed and this one has not seen yet is not the
// reason of a refusal: neither an entry that is gone, nor a token that has been made.
func TestRefusalIsConfirmed(t *testing.T) {
	inner := openStore(t, t.TempDir())
	behind := make(chan struct{}) // closed: the replica catches up
	st := &hooked{Store: inner}
	st.watch = func(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
		return func(yield func(store.Batch, error) bool) {
			for b, err := range inner.Watch(ctx, after) {
				select {
				case <-behind:
				case <-ctx.Done():
					return
				}
				if !yield(b, err) {
					return
				}
			}
		}
	}
	a := start(t, inner)
	e := grant("e1", "/spire/agent/a", "/web", "unix:uid:1")
	update(t, a, func(tx *Tx) error { return tx.PutEntry(e) })
	replica := start(t, st)
	update(t, a, func(tx *Tx) error { return tx.DeleteEntry("e1") })
	update(t, a, func(tx *Tx) error { return tx.PutToken(Token{Hash: []byte{1}}) })

	var once sync.Once
	st.commit = func(txns []store.Txn) []store.Result {
		results := inner.Commit(t.Context(), txns)
		once.Do(func() { close(behind) })
		return results
	}
	e.ID = "e2"
	runs := 0
	if _, err := replica.Update(t.Context(), "test", func(tx *Tx) error { runs++; return tx.PutEntry(e) }); err != nil || runs != 2 {
		t.Errorf("creation after a deletion that was not seen yet: %v after %d runs", err, runs)
	}

	behind, once = make(chan struct{}), sync.Once{}
	update(t, a, func(tx *Tx) error { return tx.PutToken(Token{Hash: []byte{2}}) })
	if _, err := replica.Update(t.Context(), "test", func(tx *Tx) error { _, err := tx.Token([]byte{2}); return err }); err != nil {
		t.Errorf("use of a token that was not seen yet: %v", err)
	}
	_, err := replica.Update(t.Context(), "test", func(tx *Tx) error { _, err := tx.Token([]byte{3}); return err })
	isFault(t, err, fault.NotFound, "token_not_found")

	// A closure that keeps its refusal to itself asks for the same.
	behind, once = make(chan struct{}), sync.Once{}
	update(t, a, func(tx *Tx) error { return tx.DeleteEntry("e2") })
	var last error
	if _, err := replica.Update(t.Context(), "test", func(tx *Tx) error { tx.Confirm(); _, last = tx.Entry("e2"); return nil }); err != nil {
		t.Error(err)
	}
	isFault(t, last, fault.NotFound, "entry_not_found")

	// Nothing is said about what cannot be confirmed.
	st.commit = func(txns []store.Txn) []store.Result {
		return []store.Result{{Err: fault.New(fault.Unavailable, "store_unavailable", "away")}}
	}
	_, err = replica.Update(t.Context(), "test", func(tx *Tx) error { return tx.DeleteEntry("none") })
	isFault(t, err, fault.Unavailable, "store_unavailable")
}

// Both replicas have the same digest at the same position, and subscribers see
// every batch once, in order (R78).
func TestReplicasAgree(t *testing.T) {
	st := openStore(t, t.TempDir())
	a, b := start(t, st), start(t, st)
	announced := make(chan store.Batch, 1000)
	b.Batches(func(batch store.Batch) { announced <- batch })
	from := b.Position()
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			r := a
			if i%2 == 0 {
				r = b
			}
			if _, err := r.Update(t.Context(), fmt.Sprint("caller", i), func(tx *Tx) error {
				return tx.PutEntry(grant(fmt.Sprint("e", i), "/spire/agent/a", fmt.Sprint("/w", i), "unix:uid:1"))
			}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	end := max(a.Position().Revision, b.Position().Revision)
	for _, r := range []*Registry{a, b} {
		if !r.waitFor(t.Context(), store.Position{Epoch: from.Epoch, Revision: end}) {
			t.Fatal("a replica stays behind")
		}
	}
	var digests [2][32]byte
	a.View(func(v *Snapshot) { digests[0] = v.Digest() })
	b.View(func(v *Snapshot) { digests[1] = v.Digest() })
	if digests[0] != digests[1] {
		t.Error("R78: the digests differ at one position")
	}
	callers, batches := make(map[string]int), 0
	for at := from; at.Revision < end; batches++ {
		select {
		case batch := <-announced:
			if batch.Prev != at {
				t.Fatalf("a batch from %v follows %v", batch.Prev, at)
			}
			at = batch.Position
			for _, w := range batch.Writes {
				callers[w.Caller]++
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("no batch was announced after %v", at)
		}
	}
	if len(callers) != 200 {
		t.Errorf("%d callers in the batches, want 200", len(callers))
	}
	t.Logf("200 updates in %d batches", batches)
}

// R76: a change that is durable but does not show in time is not a plain failure.
func TestCommittedNotVisible(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &hooked{Store: openStore(t, t.TempDir())}
		st.watch = func(ctx context.Context, _ store.Position) iter.Seq2[store.Batch, error] {
			return func(func(store.Batch, error) bool) { <-ctx.Done() }
		}
		r := start(t, st)
		began := time.Now()
		p, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutServer(Server{ID: "s"}) })
		isFault(t, err, fault.Unavailable, "committed_not_visible")
		if waited := time.Since(began); waited != visibleWithin || p.Revision == 0 {
			t.Errorf("told after %v, position %v", waited, p)
		}
	})
}

// R76, R80: when the store was away for long, whoever commits first sees it: the
// commit tells the loop that follows the log, which would wait for seconds yet.
func TestVisibleAfterOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := openStore(t, t.TempDir())
		var away atomic.Bool
		away.Store(true)
		var tries atomic.Int64
		st := &hooked{Store: inner}
		st.watch = func(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
			tries.Add(1)
			if away.Load() {
				return func(yield func(store.Batch, error) bool) {
					yield(store.Batch{}, fault.New(fault.Unavailable, "store_unavailable", "away"))
				}
			}
			return inner.Watch(ctx, after)
		}
		r := start(t, st)
		time.Sleep(time.Minute)
		before := tries.Load()
		away.Store(false)
		began := time.Now()
		if _, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutServer(Server{ID: "s"}) }); err != nil {
			t.Errorf("Update() = %v", err)
		}
		if took := time.Since(began); took > time.Second || before > 60 {
			t.Errorf("visible after %v; %d tries in a minute", took, before)
		}
	})
}

func TestUpdateWithoutRun(t *testing.T) {
	r, err := Open(t.Context(), openStore(t, t.TempDir()), td, quiet())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	put := func(tx *Tx) error { return tx.PutServer(Server{ID: "s"}) }
	if _, err := r.Update(ctx, "test", put); !errors.Is(err, context.Canceled) {
		t.Errorf("Update() before Run, given up = %v", err)
	}
	if err := r.Run(ctx); err != nil {
		t.Errorf("Run() = %v", err)
	}
	_, err = r.Update(t.Context(), "test", put)
	isFault(t, err, fault.Unavailable, "registry_stopped")
}

// R80: a store that refuses is said to refuse; reads go on, and writes do when it is back.
func TestStoreUnavailable(t *testing.T) {
	st := &hooked{Store: openStore(t, t.TempDir())}
	r := start(t, st)
	update(t, r, func(tx *Tx) error { return tx.PutServer(Server{ID: "s"}) })
	var full atomic.Bool
	full.Store(true)
	inner := st.Store
	refusing := &hooked{Store: inner, commit: func(txns []store.Txn) []store.Result {
		results := make([]store.Result, len(txns))
		if !full.Load() {
			return inner.Commit(context.Background(), txns)
		}
		for i := range results {
			results[i].Err = fault.New(fault.Unavailable, "disk_full", "no space")
		}
		return results
	}}
	r2 := start(t, refusing)
	_, err := r2.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutServer(Server{ID: "s2"}) })
	isFault(t, err, fault.Unavailable, "disk_full")
	r2.View(func(v *Snapshot) {
		if len(v.Servers()) != 1 {
			t.Error("reads ended with the writes")
		}
	})
	full.Store(false)
	update(t, r2, func(tx *Tx) error { return tx.PutServer(Server{ID: "s2"}) })
}

// RG9: a registry that cannot follow the log loads afresh; the old state serves
// until the new one is complete, and followers are told to look at everything.
func TestReload(t *testing.T) {
	for _, reason := range []string{"epoch_changed", "compacted", "position_unknown", "store_corrupt"} {
		t.Run(reason, func(t *testing.T) {
			inner := openStore(t, t.TempDir())
			writer := start(t, inner)
			update(t, writer, func(tx *Tx) error {
				return errors.Join(tx.PutNode(agent("a")), tx.PutEntry(grant("old", "/spire/agent/a", "/old", "u:1")))
			})
			st := &hooked{Store: inner}
			broken, loading, proceed := make(chan struct{}), make(chan struct{}), make(chan struct{})
			var watches atomic.Int64
			st.watch = func(ctx context.Context, p store.Position) iter.Seq2[store.Batch, error] {
				if watches.Add(1) > 1 {
					return inner.Watch(ctx, p)
				}
				return func(yield func(store.Batch, error) bool) {
					<-broken
					yield(store.Batch{}, fault.New(fault.Precondition, reason, "cannot go on"))
				}
			}
			r := start(t, st)
			st.load = func(f func(string, uint64, []byte) error) (store.Position, error) {
				close(loading)
				<-proceed
				return inner.Load(context.Background(), f)
			}
			resets := make(chan store.Batch, 1)
			r.Batches(func(b store.Batch) {
				if b.Prev == (store.Position{}) {
					resets <- b
				}
			})
			f := r.Follow(id("/spire/agent/a"), true)
			defer f.Close()
			f.Inventory()
			update(t, writer, func(tx *Tx) error {
				return errors.Join(tx.DeleteEntry("old"), tx.PutEntry(grant("new", "/spire/agent/a", "/new", "u:1")))
			})
			close(broken)
			<-loading
			r.View(func(v *Snapshot) {
				if _, err := v.Entry("old"); err != nil || v.EntryCount() != 1 {
					t.Errorf("while loading: %v, %d entries, want the old state", err, v.EntryCount())
				}
			})
			close(proceed)
			select {
			case b := <-resets:
				if b.Position != writer.Position() || len(b.Writes) != 0 {
					t.Errorf("subscribers got %v", b)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("the registry did not load afresh")
			}
			r.View(func(v *Snapshot) {
				if _, err := v.Entry("new"); err != nil || v.EntryCount() != 1 {
					t.Errorf("after loading: %v, %d entries, want the new state", err, v.EntryCount())
				}
			})
			select {
			case <-f.Wake():
			default:
				t.Error("the follower was not woken")
			}
			if d := f.Delta(); !d.Resync || len(d.Bodies) > 0 {
				t.Errorf("Delta() = %+v, want it to ask for a resync", d)
			}
			update(t, r, func(tx *Tx) error { return tx.PutEntry(grant("later", "/spire/agent/a", "/later", "u:1")) })
			if r.Reloads() != 1 || writer.Reloads() != 0 {
				t.Errorf("%d and %d reloads are counted", r.Reloads(), writer.Reloads())
			}
		})
	}
}

// A wish to load afresh that comes when following ends is heard.
func TestReloadIsNotLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &hooked{Store: openStore(t, t.TempDir())}
		r, err := Open(t.Context(), st, td, quiet())
		if err != nil {
			t.Fatal(err)
		}
		st.watch = func(context.Context, store.Position) iter.Seq2[store.Batch, error] {
			return func(yield func(store.Batch, error) bool) {
				synctest.Wait()
				r.Reload()
				yield(store.Batch{}, fault.New(fault.Unavailable, "store_unavailable", "away"))
			}
		}
		for range 100 {
			wait := backoffFirst
			if err := r.follow(t.Context(), &wait); fault.ReasonOf(err) != "state_differs" {
				t.Fatal(err)
			}
		}
	})
}

// A batch that does not follow on the last one is not applied.
func TestHoleInTheLog(t *testing.T) {
	inner := openStore(t, t.TempDir())
	st := &hooked{Store: inner}
	var watches atomic.Int64
	st.watch = func(ctx context.Context, p store.Position) iter.Seq2[store.Batch, error] {
		if watches.Add(1) > 1 {
			return inner.Watch(ctx, p)
		}
		return func(yield func(store.Batch, error) bool) {
			late := store.Position{Epoch: p.Epoch, Revision: p.Revision + 2}
			yield(store.Batch{Prev: store.Position{Epoch: p.Epoch, Revision: p.Revision + 1}, Position: late,
				Writes: []store.Write{{Changes: []store.Change{{Key: "/x", Value: []byte("x")}}}}}, nil)
		}
	}
	r := start(t, st)
	update(t, r, func(tx *Tx) error { return tx.PutServer(Server{ID: "s"}) })
	r.View(func(v *Snapshot) {
		for key := range v.Unreadable() {
			t.Errorf("the change of %s beyond a hole was applied", key)
		}
	})
}

// R122
func TestOtherTrustDomain(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other")
	st := openStore(t, t.TempDir())
	if _, err := Open(t.Context(), st, td, quiet()); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), st, other, quiet())
	isFault(t, err, fault.Precondition, "trust_domain_changed")
	if _, err := Open(t.Context(), st, td, quiet()); err != nil {
		t.Errorf("the store's own trust domain is refused: %v", err)
	}

	for name, put := range map[string]store.Put{
		"a server's row": {Key: "/server/s", Value: sealed(t, serverMessage(other, &Server{ID: "s"}))},
		"a bundle alone": {Key: "/bundle/other", Value: sealed(t, bundleMessage(&bundle.Bundle{TrustDomain: other}))},
	} {
		t.Run(name, func(t *testing.T) {
			st := openStore(t, t.TempDir())
			if res := st.Commit(t.Context(), []store.Txn{{Puts: []store.Put{put}}}); res[0].Err != nil {
				t.Fatal(res[0].Err)
			}
			_, err := Open(t.Context(), st, td, quiet())
			isFault(t, err, fault.Precondition, "trust_domain_changed")
			if _, err := Open(t.Context(), st, other, quiet()); err != nil {
				t.Errorf("the store's own trust domain is refused: %v", err)
			}
		})
	}
}

// R122: of servers of two trust domains that come to an empty store at the same
// moment, one domain's get it, and the other's are told so.
func TestTrustDomainsRace(t *testing.T) {
	domains := []spiffeid.TrustDomain{td, spiffeid.RequireTrustDomainFromString("other")}
	for range 20 {
		st := openStore(t, t.TempDir())
		errs := make([]error, 8)
		begin := make(chan struct{})
		var servers sync.WaitGroup
		for i := range errs {
			servers.Go(func() {
				<-begin
				_, errs[i] = Open(t.Context(), st, domains[i%2], quiet())
			})
		}
		close(begin)
		servers.Wait()
		winner := 0
		if errs[0] != nil {
			winner = 1
		}
		for i, err := range errs {
			if i%2 == winner && err != nil {
				t.Errorf("server %d, of the domain that has the store: %v", i, err)
			} else if i%2 != winner {
				isFault(t, err, fault.Precondition, "trust_domain_changed")
			}
		}
	}
}

// Readers of every kind beside writers: under the race detector this shows that
// reading writes nothing.
func TestReadersBesideWriters(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	x := spiffeid.RequireTrustDomainFromString("x")
	var agents []spiffeid.ID
	update(t, r, func(tx *Tx) error {
		for i := range 8 {
			n := agent(fmt.Sprint("a", i), "n:1")
			agents = append(agents, n.ID)
			if err := tx.PutNode(n); err != nil {
				return err
			}
		}
		return errors.Join(tx.PutEntry(grant("alias", "/spire/server", "/all", "n:1")), tx.PutBundle(&bundle.Bundle{TrustDomain: td, Sequence: 1}))
	})
	stop := make(chan struct{})
	var readers, writers sync.WaitGroup
	for _, id := range agents {
		readers.Go(func() {
			f := r.Follow(id, true)
			defer f.Close()
			for {
				select {
				case <-stop:
					return
				case <-f.Wake():
				}
				if d := f.Delta(); d.Resync {
					inv := f.Inventory()
					f.Bodies([]string{inv.Items[0].ID}, []string{"td"})
				}
				r.View(func(v *Snapshot) {
					v.Hash(id)
					v.AuthorizedEntry(id, "e1")
					v.List(Filter{ParentID: &id}, "", 3)
					for range v.Authorized(id) {
					}
				})
			}
		})
	}
	for w := range 4 {
		writers.Go(func() {
			for i := range 25 {
				e := grant(fmt.Sprint("e", w), "/all", fmt.Sprintf("/w%d/%d", w, i), "u:1")
				e.FederatesWith = []spiffeid.TrustDomain{x}
				if _, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutEntry(e) }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
}
