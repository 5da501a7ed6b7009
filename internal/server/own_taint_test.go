package server

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// R69: the server's own certificate is replaced as soon as its authority is tainted
// or gone, and not for any other change of the bundle.
func TestOwnCertificateOfATaintedAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := spiffeid.RequireTrustDomainFromString("example.org")
		now := time.Now()
		authority := func() (bundle.X509Authority, *svid.X509Issuer) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			root, err := svid.SelfSignedCA(td, key, now.Add(-time.Hour), now.Add(24*time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			issuer, err := svid.NewX509Issuer([][]byte{root}, key)
			if err != nil {
				t.Fatal(err)
			}
			return bundle.X509Authority{ASN1: root}, issuer
		}
		first, issuer := authority()
		second, next := authority()
		var active atomic.Pointer[svid.X509Issuer]
		active.Store(issuer)
		var held atomic.Pointer[bundle.Bundle]
		held.Store((&bundle.Bundle{TrustDomain: td}).WithX509(first))
		log := slog.New(slog.DiscardHandler)
		trail, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "audit.log"), Server: "s", Log: log})
		if err != nil {
			t.Fatal(err)
		}
		defer trail.Close()
		o := &ownSVID{trustDomain: td, life: lifetime.Set{X509: time.Hour}, audit: trail, log: log, wake: make(chan struct{}, 1), look: make(chan struct{}, 1),
			issuer: func(time.Time) (*svid.X509Issuer, error) { return active.Load(), nil },
			bundle: func() (*bundle.Bundle, error) { return held.Load(), nil }}
		if err := o.rotate(now); err != nil {
			t.Fatal(err)
		}
		go o.run(t.Context())
		serial := func() string {
			c, err := o.certificate()
			if err != nil {
				t.Fatal(err)
			}
			return c.Leaf.SerialNumber.String()
		}
		before := serial()
		change := func(b *bundle.Bundle, key string) {
			held.Store(b)
			if changesBundle(store.Batch{Writes: []store.Write{{}, {Changes: []store.Change{{Key: key}}}}}, td) {
				o.changed()
			}
			synctest.Wait()
		}
		active.Store(next)
		change(held.Load().WithX509(second), "/bundle/example.org")
		change(held.Load(), "/bundle/other.org")
		if serial() != before {
			t.Error("the certificate is replaced, and its authority is good")
		}
		first.Tainted = true
		change(held.Load().WithX509(first), "/bundle/example.org")
		tainted := serial()
		if tainted == before {
			t.Error("the certificate of a tainted authority is shown")
		}
		third, renewed := authority()
		change((&bundle.Bundle{TrustDomain: td}).WithX509(third), "/bundle/example.org")
		if serial() == tainted {
			t.Error("the certificate of an authority that is gone is shown")
		}
		// What signed it was gone as well, and is replaced a moment later.
		gone := serial()
		time.Sleep(5 * time.Second)
		if serial() != gone {
			t.Error("one certificate after the other is issued while nothing better can sign")
		}
		active.Store(renewed)
		time.Sleep(2 * ownRetry)
		if !o.trusted(time.Now()) {
			t.Error("the certificate of an authority that is gone is shown, and there is a better one")
		}
		if !changesBundle(store.Batch{}, td) {
			t.Error("what is loaded afresh is not looked at")
		}
	})
}
