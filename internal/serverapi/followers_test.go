package serverapi

import (
	"log/slog"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// emptyRegistry returns one of an empty store that nobody writes to.
func emptyRegistry(t *testing.T) *registry.Registry {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	st, err := sqlite.Config{Dir: t.TempDir()}.Open(t.Context(), log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	reg, err := registry.Open(t.Context(), st, spiffeid.RequireTrustDomainFromString("example.org"), log)
	if err != nil {
		t.Fatal(err)
	}
	return reg
}

// What an agent owes is counted from the first change that it was sent until it
// has acknowledged the last.
func TestAttached(t *testing.T) {
	reg := emptyRegistry(t)
	s := &Server{followers: NewFollowers("s1", reg)}
	f := s.followers
	at := func(revision uint64) store.Position { return store.Position{Revision: revision} }
	begin := time.Now()
	is := func(when string, after time.Duration, agents, behind int, longest time.Duration) {
		t.Helper()
		if a, b, l := s.Attached(begin.Add(after)); a != agents || b != behind || l != longest {
			t.Errorf("%s: %d, %d, %v, want %d, %d, %v", when, a, b, l, agents, behind, longest)
		}
	}
	is("nobody", 0, 0, 0, 0)
	joins := func(name string) *following {
		id := spiffeid.RequireFromString("spiffe://example.org/spire/agent/" + name)
		return f.join(id, begin.Add(time.Hour), reg.Follow(id, true))
	}
	one, two := joins("one"), joins("two")
	is("joined", 0, 2, 0, 0)
	f.owe(one, at(5), begin)
	f.owe(two, at(5), begin.Add(time.Second))
	f.owe(one, at(6), begin.Add(2*time.Second))
	is("sent", 3*time.Second, 2, 2, 3*time.Second)
	if _, settled, _ := f.acknowledge(one, at(5), 0, begin.Add(3*time.Second)); settled {
		t.Error("the older of two changes settles both")
	}
	if took, settled, _ := f.acknowledge(one, at(6), 0, begin.Add(4*time.Second)); !settled || took != 4*time.Second {
		t.Errorf("acknowledged: %v, %v", took, settled)
	}
	is("one has it", 4*time.Second, 2, 1, 3*time.Second)
	if _, settled, _ := f.acknowledge(one, at(6), 0, begin); settled {
		t.Error("nothing was owed")
	}
	f.leave(two, begin)
	is("two is gone", 4*time.Second, 1, 0, 0)
}

// The right to a stream is looked at again when something was written that it rests
// on, or its certificate has ended, and else the stream is left alone. R124.
func TestRecheckWakesOnlyWhomItConcerns(t *testing.T) {
	c := newCrowd(t, 3)
	rows := []*following{c.attach(0), c.attach(1), c.f.join(c.id(2), c.now.Add(-time.Second), c.reg.Follow(c.id(2), true))}
	woken := func(when string, want ...bool) {
		t.Helper()
		c.f.recheckAll()
		for i, row := range rows {
			if got := len(row.recheck) > 0; got != want[i] {
				t.Errorf("%s: stream %d is woken: %v, want %v", when, i, got, want[i])
			}
			for len(row.recheck) > 0 {
				<-row.recheck
			}
		}
	}
	woken("all are new", true, true, true)
	woken("nothing was written", false, false, true)
	c.grant(0, "web")
	c.update(func(tx *registry.Tx) error {
		return tx.PutBundle(&bundle.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("other.test")})
	})
	woken("what they are granted is no matter", false, false, true)
	c.update(func(tx *registry.Tx) error {
		n, err := tx.Node(c.id(1))
		if err != nil {
			return err
		}
		return tx.PutNode(n)
	})
	woken("its node was written", false, true, true)
	c.update(func(tx *registry.Tx) error { return tx.PutBundle(&bundle.Bundle{TrustDomain: c.id(0).TrustDomain()}) })
	woken("the own bundle was written", true, true, true)
	c.update(func(tx *registry.Tx) error { return tx.DeleteNode(c.id(0)) })
	woken("its node was deleted", true, false, true)
	c.f.leave(rows[1], c.now)
	woken("it has left", false, false, true)
	for _, row := range []*following{rows[0], rows[2]} {
		c.f.leave(row, c.now)
	}
}
