package mirror

import (
	"crypto/x509"
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

// R69: of 10,000 SVIDs of a tainted authority the soonest to end come first, all are
// under way within the spread, and what is due meanwhile and ends sooner goes before.
func TestTaintedInTurn(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	now := time.Unix(1_800_000_000, 0)
	const n = 10_000
	m := newMachine(td, n, "test")
	m.synced = true
	m.bundles[td.Name()] = &trust{bundle: &bundle.Bundle{TrustDomain: td}, roots: []root{
		{certificate: &x509.Certificate{RawSubject: []byte("old")}, tainted: true}, {certificate: &x509.Certificate{RawSubject: []byte("new")}}}}
	for i := range n {
		id := fmt.Sprintf("g%05d", i)
		m.grants[id] = hold(entry.Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}})
		left := time.Hour + time.Duration(i*7%n)*time.Second
		m.grants[id].own.cert = &cert{authName: []byte("old"), span: span{issuedAt: now, expiresAt: now.Add(left), renewAt: now.Add(left / 2)}}
	}
	due := &m.grants["g00000"].own // due anyway, of another authority, and ends before all others
	due.cert = &cert{authName: []byte("new"), span: span{issuedAt: now.Add(-time.Hour), expiresAt: now.Add(time.Minute), renewAt: now.Add(5 * time.Second)}}
	ev := event{now: now, seed: 1, what: tick{}}
	m.checkIssuers(ev)
	signed, renewed := map[string]bool{}, time.Time{}
	last := time.Duration(0)
	for len(signed) < n {
		if ev.now.After(now.Add(taintSpread + time.Second)) {
			t.Fatalf("after %v %d of %d are under way", taintSpread, len(signed), n)
		}
		fx := m.step(ev)
		for _, w := range fx.sign {
			p := &m.grants[w.grantID].own
			if p == due {
				renewed = ev.now
			} else if left := p.cert.expiresAt.Sub(now); left < last {
				t.Fatalf("%s ends in %v, after one that ends in %v", w.grantID, left, last)
			} else {
				last = left
			}
			signed[w.grantID] = true
			p.cert = &cert{authName: []byte("new"), span: span{issuedAt: ev.now, expiresAt: ev.now.Add(time.Hour), renewAt: ev.now.Add(time.Hour / 2)}}
			p.signing = false
		}
		m.signing = false
		ev.now = ev.now.Add(500 * time.Millisecond)
	}
	if late := renewed.Sub(now.Add(5 * time.Second)); late > time.Second {
		t.Errorf("what was due was renewed %v late", late)
	}
}
