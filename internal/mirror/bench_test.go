package mirror

import (
	"fmt"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// large is a machine that holds n grants, as many of them with an SVID as its cache has room for.
func large(n, cacheSize int, now time.Time) *machine {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	m := newMachine(td, cacheSize, "bench")
	for i := range n {
		id := fmt.Sprintf("grant-%06d", i)
		g := hold(entry.Entry{
			ID: id, SPIFFEID: spiffeid.RequireFromPathf(td, "/w%d", i), ParentID: spiffeid.RequireFromPath(td, "/spire/agent/a"),
			Selectors: []entry.Selector{{Type: "unix", Value: fmt.Sprintf("path:/opt/service-%d", i)}, {Type: "unix", Value: "uid:1000"}},
		})
		if i < m.cacheSize {
			g.own.cert = &cert{span: span{issuedAt: now, expiresAt: now.Add(time.Hour), renewAt: now.Add(30 * time.Minute)}}
		}
		m.grants[id] = g
	}
	return m
}

// BenchmarkStep is one step in which nothing is due, with 10,000 grants: with
// room for all of their SVIDs, and for a tenth.
func BenchmarkStep(b *testing.B) {
	for _, cacheSize := range []int{10_000, 1000} {
		b.Run(fmt.Sprint("cache=", cacheSize), func(b *testing.B) {
			now := time.Unix(1e9, 0)
			m := large(10_000, cacheSize, now)
			for b.Loop() {
				now = now.Add(time.Microsecond)
				m.step(event{now: now, what: tick{}})
			}
		})
	}
}

// BenchmarkJoin is a subscriber that comes and goes, with 10,000 grants.
func BenchmarkJoin(b *testing.B) {
	now := time.Unix(1e9, 0)
	m := large(10_000, 1000, now)
	selectors := []entry.Selector{{Type: "unix", Value: "path:/opt/service-77"}, {Type: "unix", Value: "uid:1000"}, {Type: "unix", Value: "user:web"}}
	for b.Loop() {
		g := m.join(entry.Facts{Selectors: selectors}, now)
		if len(g.matched) != 1 {
			b.Fatalf("%d grants match", len(g.matched))
		}
		m.leave(g, now)
	}
}

// BenchmarkWhy is the reason for a process that 10,000 grants nearly fit, or none.
func BenchmarkWhy(b *testing.B) {
	now := time.Unix(1e9, 0)
	m := large(10_000, 1000, now)
	m.synced = true
	for name, uid := range map[string]string{"near": "uid:1000", "far": "uid:1"} {
		facts := entry.Facts{Selectors: []entry.Selector{{Type: "unix", Value: "path:/opt/other"}, {Type: "unix", Value: uid}, {Type: "unix", Value: "user:web"}}}
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if m.why(facts, now).Reason == nil {
					b.Fatal("there is no reason")
				}
			}
		})
	}
}
