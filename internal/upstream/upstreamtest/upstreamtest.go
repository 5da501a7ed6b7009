// Package upstreamtest is the contract of an upstream authority as tests: every
// upstream's own test calls Run.
package upstreamtest

import (
	"bytes"
	"context"
	"crypto/x509"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/internal/upstream"
)

// patience is how long an event that takes milliseconds is awaited.
const patience = 30 * time.Second

// TrustDomain is the one that Run asks for.
func TrustDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString("example.org")
}

// Env is what a server would lend.
func Env() upstream.Env {
	return upstream.Env{TrustDomain: TrustDomain(), Log: slog.New(slog.DiscardHandler)}
}

// Run holds an upstream to the contract of upstream.Authority. newConfig returns
// the configuration of one that works and lets authorities live for an hour.
func Run(t *testing.T, newConfig func(t *testing.T) upstream.Config) {
	t.Run("key types", func(t *testing.T) {
		a := open(t, newConfig(t))
		for _, kind := range []keys.Type{keys.ECP256, keys.ECP384, keys.RSA2048, keys.RSA4096} {
			chain := Mint(t, a, kind, time.Hour)
			if left := time.Until(chain.NotAfter); left < time.Minute || left > time.Hour+time.Minute {
				t.Errorf("%s: asked for an hour, it lives for %v", kind, left)
			}
		}
	})
	t.Run("lifetime", func(t *testing.T) {
		a := open(t, newConfig(t))
		if left := time.Until(Mint(t, a, keys.ECP256, 10*time.Minute).NotAfter); left > 10*time.Minute {
			t.Errorf("asked for 10 minutes, it lives for %v", left)
		}
		if left := time.Until(Mint(t, a, keys.ECP256, 1000*24*time.Hour).NotAfter); left < time.Minute || left > 400*24*time.Hour {
			t.Errorf("asked for 1000 days, it lives for %v", left) // cut, not refused
		}
	})
	t.Run("malformed request", func(t *testing.T) { // R3
		a := open(t, newConfig(t))
		csr := CSR(t, newKey(t, keys.ECP256))
		csr[len(csr)-1] ^= 1
		for name, csr := range map[string][]byte{"none": nil, "garbage": {1, 2}, "wrong signature": csr} {
			if m, err := a.Mint(t.Context(), upstream.Request{CSR: csr, TTL: time.Hour}); err == nil {
				t.Errorf("%s: Mint() = %d certificates", name, len(m.Chain))
			}
		}
	})
	t.Run("unique", func(t *testing.T) {
		a := open(t, newConfig(t))
		seen := map[string]bool{}
		for range 3 {
			c, err := x509.ParseCertificate(Mint(t, a, keys.ECP256, time.Hour).Certificates[0])
			if err != nil {
				t.Fatal(err)
			}
			seen[c.SerialNumber.String()], seen[c.Subject.String()] = true, true
		}
		if len(seen) != 6 { // RG28
			t.Error("two authorities have one serial number or one subject")
		}
	})
	t.Run("concurrent", func(t *testing.T) {
		a := open(t, newConfig(t))
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				if _, err := a.Mint(t.Context(), upstream.Request{CSR: CSR(t, newKey(t, keys.ECP256)), TTL: time.Hour}); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	})
	t.Run("watch", func(t *testing.T) {
		a := open(t, newConfig(t))
		minted, err := a.Mint(t.Context(), upstream.Request{CSR: CSR(t, newKey(t, keys.ECP256)), TTL: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		got := false
		for trust, err := range a.Watch(ctx) {
			if err != nil {
				t.Fatal(err)
			}
			got = true
			if trust.Version == 0 || trust.Version < minted.Trust.Version {
				t.Errorf("version %d after %d", trust.Version, minted.Trust.Version)
			}
			if !bytes.Equal(trust.Roots[0].ASN1, minted.Trust.Roots[0].ASN1) {
				t.Error("Watch and Mint name different roots")
			}
			break // and it lets go
		}
		if !got {
			t.Error("Watch yields nothing at once")
		}
		ended, stop := context.WithCancel(t.Context())
		stop()
		for range a.Watch(ended) {
			t.Error("Watch goes on after its context has ended")
			break
		}
	})
	t.Run("canceled", func(t *testing.T) {
		a := open(t, newConfig(t))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := a.Mint(ctx, upstream.Request{CSR: CSR(t, newKey(t, keys.ECP256)), TTL: time.Hour}); err == nil {
			t.Error("Mint with a canceled context succeeds")
		}
	})
	t.Run("publish", func(t *testing.T) {
		a, ok := open(t, newConfig(t)).(upstream.Publisher)
		if !ok {
			return // it has no JWT keys
		}
		spki := PublicKey(t, newKey(t, keys.ECP256)).SPKI
		key := bundle.JWTAuthority{KeyID: "0123456789abcdefghij0123456789ab", PublicKey: spki, ExpiresAt: time.Now().Add(time.Hour).UTC().Truncate(time.Second)}
		for range 2 { // again is as good
			trust, err := a.PublishJWT(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			found := false
			for _, k := range trust.JWT {
				found = found || k.KeyID == key.KeyID && bytes.Equal(k.PublicKey, spki)
			}
			if !found {
				t.Error("the answer does not hold the key")
			}
		}
		other := key
		other.PublicKey = PublicKey(t, newKey(t, keys.ECP256)).SPKI
		if _, err := a.PublishJWT(t.Context(), other); err == nil {
			t.Error("a key id is taken over by another key")
		}
	})
}

// Mint asks for an authority and holds the answer to what the engine accepts.
func Mint(t testing.TB, a upstream.Authority, kind keys.Type, ttl time.Duration) svid.Chain {
	t.Helper()
	key := newKey(t, kind)
	m, err := a.Mint(t.Context(), upstream.Request{CSR: CSR(t, key), TTL: ttl})
	if err != nil {
		t.Fatalf("Mint(%s) = %v", kind, err)
	}
	var roots [][]byte
	for _, r := range m.Trust.Roots {
		roots = append(roots, r.ASN1)
	}
	chain, err := svid.CheckChain(m.Chain, roots, svid.ChainRules{TrustDomain: TrustDomain(), Key: key.Public(), Ours: true, Now: time.Now()})
	if err != nil {
		t.Fatalf("what was minted for %s: %v", kind, err)
	}
	return chain
}

// CSR is what the engine asks with.
func CSR(t testing.TB, key keys.Private) []byte {
	t.Helper()
	csr, err := svid.NewAuthorityCSR(TrustDomain(), key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// PublicKey is a key as requests carry it.
func PublicKey(t testing.TB, key keys.Private) svid.PublicKey {
	t.Helper()
	csr, err := svid.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	public, err := svid.ParseCSR(csr)
	if err != nil {
		t.Fatal(err)
	}
	return public
}

func open(t *testing.T, c upstream.Config) upstream.Authority {
	t.Helper()
	a, err := c.Open(t.Context(), Env())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t testing.TB, kind keys.Type) keys.Private {
	t.Helper()
	key, err := keys.NewPrivate(kind)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
