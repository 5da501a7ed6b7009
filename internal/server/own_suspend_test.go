package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A server that was suspended past the end of its certificate has a new one as
// soon as somebody asks, not when a timer that stood still says so (R57, R107).
func TestOwnCertificateAfterASuspend(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	root, err := svid.SelfSignedCA(td, key, now.Add(-time.Hour), now.Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := svid.NewX509Issuer([][]byte{root}, key)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	trail, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "audit.log"), Server: "s", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	defer trail.Close()
	o := &ownSVID{trustDomain: td, life: lifetime.Set{X509: time.Hour}, audit: trail, log: log, wake: make(chan struct{}, 1),
		issuer: func(time.Time) (*svid.X509Issuer, error) { return issuer, nil }}
	if err := o.rotate(now); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- o.run(ctx) }()
	defer func() { cancel(); <-done }()

	o.mu.Lock()
	// As after a suspend: ended, and the timer far from due.
	o.begin, o.end = time.Now().Add(2*time.Hour), time.Now().Add(-time.Second)
	o.mu.Unlock()
	if _, err := o.certificate(); fault.ReasonOf(err) != "server_certificate_expired" {
		t.Fatalf("certificate() = %v with one that has ended", err)
	}
	look, late := time.NewTicker(time.Millisecond), time.After(30*time.Second)
	defer look.Stop()
	for {
		if _, err := o.certificate(); err == nil {
			return
		}
		select {
		case <-look.C:
		case <-late:
			t.Fatal("there is no new certificate")
		}
	}
}
