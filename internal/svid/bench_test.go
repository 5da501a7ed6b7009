//go:build unix

package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// BenchmarkX509 is issuing from the bytes of a request to the chain; reference
// is what it cannot do without, one verification and one signature (design
// §15: issue at most 1.25 × reference).
func BenchmarkX509(b *testing.B) {
	now := time.Now()
	for _, c := range []struct {
		name string
		leaf crypto.Signer
	}{{"P-256", newEC(b, elliptic.P256())}, {"RSA-2048", newRSA(b, 2048)}} {
		ca := newAuthority(b, newEC(b, elliptic.P256()), now)
		csr := mustCSR(b, c.leaf, nil)
		b.Run(c.name+"/issue", func(b *testing.B) {
			defer reportCPU(b)()
			for b.Loop() {
				key, err := ParseCSR(csr)
				if err != nil {
					b.Fatal(err)
				}
				ca.issue(b, leafOf("spiffe://example.org/ns/default/sa/web", key, now, "web.example.org"))
			}
		})
		b.Run(c.name+"/reference", func(b *testing.B) {
			request, err := x509.ParseCertificateRequest(csr)
			if err != nil {
				b.Fatal(err)
			}
			defer reportCPU(b)()
			for b.Loop() {
				if err := request.CheckSignature(); err != nil {
					b.Fatal(err)
				}
				digest := sha256.Sum256(csr)
				if _, err := ecdsa.SignASN1(rand.Reader, ca.key.(*ecdsa.PrivateKey), digest[:]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkJWT is held against one signature (design §15: at most 3 ×).
func BenchmarkJWT(b *testing.B) {
	now := time.Now()
	key := newEC(b, elliptic.P256())
	issuer, err := NewJWTIssuer("0123456789abcdefghijklmnopqrstuv", key, now.Add(time.Hour))
	if err != nil {
		b.Fatal(err)
	}
	jwt := JWT{ID: spiffeid.RequireFromString("spiffe://example.org/ns/default/sa/web"), Audience: []string{"https://orders.example.org"}, IssuedAt: now, ExpiresAt: now.Add(5 * time.Minute)}
	b.Run("issue", func(b *testing.B) {
		defer reportCPU(b)()
		for b.Loop() {
			p, err := issuer.Prepare(jwt)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := p.Issue(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("reference", func(b *testing.B) {
		defer reportCPU(b)()
		for b.Loop() {
			digest := sha256.Sum256([]byte("message"))
			if _, err := ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkIssueParts shows where the time beyond the cryptography goes.
func BenchmarkIssueParts(b *testing.B) {
	now := time.Now()
	ca := newAuthority(b, newEC(b, elliptic.P256()), now)
	leaf := leafOf("spiffe://example.org/ns/default/sa/web", publicKey(b, newEC(b, elliptic.P256())), now, "web.example.org")
	p, err := ca.issuer.Prepare(leaf)
	if err != nil {
		b.Fatal(err)
	}
	modulus := spkiOf(b, &newRSA(b, 2048).PublicKey)
	issued := ca.issue(b, leaf)
	for name, f := range map[string]func() error{
		"prepare":    func() error { _, err := ca.issuer.Prepare(leaf); return err },
		"RSA policy": func() error { _, err := ParsePublicKey(modulus); return err },
		"lint":       func() error { return ca.issuer.lint(p.tbs, &p.leaf) },
		"reread":     func() error { _, err := x509.ParseCertificate(issued.Chain[0]); return err },
	} {
		b.Run(name, func(b *testing.B) {
			defer reportCPU(b)()
			for b.Loop() {
				if err := f(); err != nil {
					b.Fatal(fmt.Errorf("%s: %w", name, err))
				}
			}
		})
	}
}

// reportCPU adds processor time per operation, which a busy machine disturbs
// less than wall time.
func reportCPU(b *testing.B) func() {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	begin := used()
	return func() { b.ReportMetric(float64(used()-begin)/float64(b.N), "cpu-ns/op") }
}
