package mirror

import (
	"fmt"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// While the server is away a caller is given what there is, at once: nothing
// else is on its way (R56). Those who wait already hear of it.
func TestNobodyWaitsForAServerThatIsAway(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	selectors := []entry.Selector{{Type: "unix", Value: "uid:1"}}
	now := time.Unix(1_800_000_000, 0)
	m := newMachine(td, 10, "test")
	m.synced = true
	for i := range 2 {
		id := fmt.Sprint("g", i)
		m.grants[id] = hold(entry.Entry{
			ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), ParentID: spiffeid.RequireFromPath(td, "/spire/agent/a"), Selectors: selectors,
		})
	}
	m.grants["g0"].own.cert = &cert{id: m.grants["g0"].entry.SPIFFEID, span: span{issuedAt: now, expiresAt: now.Add(time.Hour), renewAt: now.Add(30 * time.Minute)}}
	m.bundles[td.Name()] = &trust{bundle: &bundle.Bundle{TrustDomain: td}}
	g := m.join(entry.Facts{Selectors: selectors}, now)

	pending := func(want int) {
		t.Helper()
		if v := m.view(g, now); v.Pending != want || len(v.Identities) != 1 {
			t.Errorf("%d pending and %d identities, want %d and 1", v.Pending, len(v.Identities), want)
		}
	}
	if fx := m.step(event{now: now, what: tick{}}); len(fx.sign) != 1 {
		t.Fatalf("%d SVIDs are signed, want 1", len(fx.sign))
	}
	pending(1)
	woken := 0
	for range signAway {
		fx := m.step(event{now: now, what: signFailed{}})
		woken += len(fx.wake)
		now = now.Add(signCeiling)
		m.step(event{now: now, what: tick{}})
	}
	pending(0)
	if woken != 1 {
		t.Errorf("those who wait were woken %d times, want once", woken)
	}
	m.step(event{now: now, what: connected{}})
	pending(1)
}
