package nodes_test

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A round of pruning looks at all entries under the registry's lock, so it must
// build none that stays; what has ended goes.
func TestPruneCostsNothingForWhatStays(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	st, err := sqlite.Config{Dir: t.TempDir()}.Open(t.Context(), log)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	td := spiffeid.RequireTrustDomainFromString("td")
	reg, err := registry.Open(t.Context(), st, td, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- reg.Run(ctx) }()
	defer func() { cancel(); <-done }()

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

	engine := nodes.New(nodes.Config{TrustDomain: td, Registry: reg, Log: log})
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
