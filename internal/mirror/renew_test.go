package mirror

import (
	"fmt"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/keys"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Of more SVIDs than one call signs, what ends soonest is renewed first.
func TestSoonestEndFirst(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	now := time.Unix(1_800_000_000, 0)
	for keyType, batch := range map[keys.Type]int{keys.ECP256: maxBatch, keys.RSA2048: maxRSABatch} {
		m := newMachine(td, 2*maxBatch, "test")
		m.keyType, m.synced = keyType, true
		m.bundles[td.Name()] = &trust{bundle: &bundle.Bundle{TrustDomain: td}}
		const n = maxBatch + 100
		for i := range n {
			id := fmt.Sprintf("g%04d", i)
			m.grants[id] = hold(entry.Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}})
			left := time.Duration(1+(i*7)%n) * time.Minute // each another
			m.grants[id].own.cert = &cert{span: span{issuedAt: now.Add(-24 * time.Hour), expiresAt: now.Add(left), renewAt: now.Add(-time.Minute)}}
		}
		fx := m.step(event{now: now, what: tick{}})
		if len(fx.sign) != batch {
			t.Fatalf("%s: %d are signed, want %d", keyType, len(fx.sign), batch)
		}
		for i, w := range fx.sign {
			if left := m.grants[w.grantID].own.cert.expiresAt.Sub(now); left != time.Duration(i+1)*time.Minute {
				t.Fatalf("%s: number %d ends in %v", keyType, i, left)
			}
		}
	}
}
