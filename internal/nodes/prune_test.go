package nodes_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// openRegistry runs a registry on an empty store.
func openRegistry(t *testing.T) *registry.Registry {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	st, err := sqlite.Config{Dir: t.TempDir()}.Open(t.Context(), log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	reg, err := registry.Open(t.Context(), st, agentID.TrustDomain(), log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- reg.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return reg
}

// A round of pruning looks at all entries under the registry's lock, so it must
// build none that stays; what has ended goes.
func TestPruneCostsNothingForWhatStays(t *testing.T) {
	reg, ctx, td := openRegistry(t), t.Context(), agentID.TrustDomain()
	const stay = 2000
	now := time.Now().UTC().Truncate(time.Second)
	put := func(from, to int, expires time.Time) {
		t.Helper()
		for ; from < to; from += 100 {
			_, err := reg.Update(ctx, "test", func(tx *registry.Tx) error {
				for i := from; i < min(from+100, to); i++ {
					e := entry.Entry{
						ID: fmt.Sprintf("e%05d", i), SPIFFEID: spiffeid.RequireFromPath(td, fmt.Sprintf("/w%d", i)), ParentID: agentID,
						Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}, CreatedAt: now.Add(-time.Hour), ExpiresAt: expires,
					}
					if err := tx.PutEntry(e); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	put(0, stay/2, now.Add(time.Hour))
	put(stay/2, stay, time.Time{})
	put(stay, stay+700, now.Add(-time.Second))

	engine := nodes.New(nodes.Config{TrustDomain: td, Registry: reg, Log: slog.New(slog.DiscardHandler)})
	if err := engine.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	reg.View(func(s *registry.Snapshot) {
		if n := s.EntryCount(); n != stay {
			t.Errorf("%d entries are left, want %d", n, stay)
		}
	})
	allocs := testing.AllocsPerRun(5, func() {
		if err := engine.Prune(ctx); err != nil {
			t.Error(err)
		}
	})
	if allocs > stay/10 {
		t.Errorf("pruning nothing made %.0f allocations for %d entries that stay", allocs, stay)
	}
}

// A rule that ended goes as an entry does; the others stay.
func TestPruneRules(t *testing.T) {
	reg, td := openRegistry(t), agentID.TrustDomain()
	now := time.Now().UTC().Truncate(time.Second)
	_, err := reg.Update(t.Context(), "test", func(tx *registry.Tx) error {
		for id, end := range map[string]time.Time{"ended": now.Add(-time.Second), "later": now.Add(time.Hour), "never": {}} {
			rule, err := entry.ParseRule(td, "spiffe://td/"+id+"/{unix.user}", "", entry.TrustAgent)
			if err != nil {
				return err
			}
			e := entry.Entry{ID: id, Rule: rule, ParentID: agentID, Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}, CreatedAt: now.Add(-time.Hour), ExpiresAt: end}
			if err := tx.PutRule(e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := nodes.New(nodes.Config{TrustDomain: td, Registry: reg, Log: slog.New(slog.DiscardHandler)}).Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	reg.View(func(s *registry.Snapshot) {
		var left []string
		for e := range s.Rules("") {
			left = append(left, e.ID)
		}
		if fmt.Sprint(left) != "[later never]" {
			t.Errorf("left: %v", left)
		}
	})
}

// What is known of authorities below ours goes when they end; JWT keys that
// downstream servers published leave the bundle some time after, those of a
// server's own life cycle do not (R13, R65).
func TestPruneDownstream(t *testing.T) {
	reg, td := openRegistry(t), agentID.TrustDomain()
	now := time.Now().UTC().Truncate(time.Second)
	key := func(id string, end time.Time) bundle.JWTAuthority {
		return bundle.JWTAuthority{KeyID: id, PublicKey: []byte(id), ExpiresAt: end}
	}
	_, err := reg.Update(t.Context(), "test", func(tx *registry.Tx) error {
		long := now.Add(-2 * time.Hour)
		return errors.Join(
			tx.PutDownstream(registry.Downstream{Serial: "1", NotAfter: now.Add(-time.Second)}),
			tx.PutDownstream(registry.Downstream{Serial: "2", NotAfter: now.Add(time.Hour)}),
			tx.PutBundle(&bundle.Bundle{TrustDomain: td, Sequence: 5, JWT: []bundle.JWTAuthority{
				key("own", long), key("ended", long), key("just ended", now.Add(-time.Minute)), key("live", now.Add(time.Hour)), {KeyID: "no end", PublicKey: []byte("x")},
			}}),
			tx.PutAuthority(registry.Authority{Server: "s", Kind: "jwt", Slots: []registry.Slot{{Name: "A", State: registry.SlotOld, AuthorityID: "own", PublicKey: []byte("own")}}}))
	})
	if err != nil {
		t.Fatal(err)
	}
	engine := nodes.New(nodes.Config{TrustDomain: td, Registry: reg, Log: slog.New(slog.DiscardHandler)})
	for range 2 {
		if err := engine.Prune(t.Context()); err != nil {
			t.Fatal(err)
		}
		reg.View(func(s *registry.Snapshot) {
			var serials, keys []string
			for d := range s.Downstreams() {
				serials = append(serials, d.Serial)
			}
			b, err := s.Bundle(td)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range b.JWT {
				keys = append(keys, k.KeyID)
			}
			if fmt.Sprint(serials) != "[2]" || fmt.Sprint(keys) != "[own just ended live no end]" || b.Sequence != 6 {
				t.Errorf("left: authorities %v, keys %v, at sequence %d", serials, keys, b.Sequence)
			}
		})
	}
}

// By a clock that is off nothing is removed (R70).
func TestPruneRefused(t *testing.T) {
	reg, td := openRegistry(t), agentID.TrustDomain()
	token := registry.Token{Hash: []byte{1}, ExpiresAt: time.Now().Add(-time.Hour)}
	if _, err := reg.Update(t.Context(), "test", func(tx *registry.Tx) error { return tx.PutToken(token) }); err != nil {
		t.Fatal(err)
	}
	off := fault.New(fault.Unavailable, "clock_off", "it is off")
	var refuse error = off
	engine := nodes.New(nodes.Config{TrustDomain: td, Registry: reg, Log: slog.New(slog.DiscardHandler), MayPrune: func(time.Time) error { return refuse }})
	left := func() (left bool) {
		reg.View(func(s *registry.Snapshot) { _, err := s.Token(token.Hash); left = err == nil })
		return left
	}
	if err := engine.Prune(t.Context()); !errors.Is(err, off) || !left() {
		t.Errorf("Prune() = %v, the token is left: %v", err, left())
	}
	refuse = nil
	if err := engine.Prune(t.Context()); err != nil || left() {
		t.Errorf("Prune() = %v, the token is left: %v", err, left())
	}
}
