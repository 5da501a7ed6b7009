// Package publishtest is the contract of a place where bundles are published as
// tests: the test of every plugin calls Run.
package publishtest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/publish"
	"github.com/plastron/plastron/internal/svid"
)

// Bundle has so many roots, new ones each time.
func Bundle(t testing.TB, roots int) *bundle.Bundle {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	b := &bundle.Bundle{TrustDomain: td}
	for range roots {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		root, err := svid.SelfSignedCA(td, key, time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		b = b.WithX509(bundle.X509Authority{ASN1: root})
	}
	return b
}

// Subject is one place with nothing in it.
type Subject struct {
	Place publish.Place
	// Again opens the same place as another server would.
	Again func() publish.Place
	// Holds is what the place has, in the form in which Text writes a bundle.
	Holds func() string
	Text  func(*bundle.Bundle) string
	// Writes counts how often the place was changed.
	Writes func() int
}

// Run holds a place to the contract of publish.Place.
func Run(t *testing.T, newSubject func(t *testing.T) Subject) {
	first, second := Bundle(t, 1), Bundle(t, 2)
	edition := func(b *bundle.Bundle, epoch string, sequence uint64) publish.Edition {
		b = b.Clone()
		b.Sequence = sequence
		return publish.Edition{Bundle: b, Epoch: epoch}
	}
	put := func(t *testing.T, p publish.Place, b *bundle.Bundle, epoch string, sequence uint64) {
		t.Helper()
		if err := p.Publish(t.Context(), edition(b, epoch, sequence)); err != nil {
			t.Fatal(err)
		}
	}
	want := func(t *testing.T, s Subject, b *bundle.Bundle, writes int) {
		t.Helper()
		if s.Holds() != s.Text(b) {
			t.Errorf("the place has %q, want %q", s.Holds(), s.Text(b))
		}
		if n := s.Writes(); n != writes {
			t.Errorf("%d writes, want %d", n, writes)
		}
	}
	t.Run("replaces", func(t *testing.T) {
		s := newSubject(t)
		if s.Place.Name() == "" || s.Place.Name() != s.Again().Name() {
			t.Errorf("the place is named %q and %q", s.Place.Name(), s.Again().Name())
		}
		put(t, s.Place, first, "a", 1)
		want(t, s, first, 1)
		put(t, s.Place, second, "a", 2)
		want(t, s, second, 2)
	})
	t.Run("same edition", func(t *testing.T) {
		s := newSubject(t)
		for range 3 {
			put(t, s.Place, first, "a", 1)
			put(t, s.Again(), first, "a", 1)
		}
		want(t, s, first, 1)
	})
	t.Run("older edition", func(t *testing.T) {
		s := newSubject(t)
		put(t, s.Place, second, "a", 10)
		put(t, s.Again(), first, "a", 9)
		want(t, s, second, 1)
		put(t, s.Again(), first, "a", 11)
		want(t, s, first, 2)
	})
	t.Run("another epoch", func(t *testing.T) { // of a restored store; the sequence tells nothing
		s := newSubject(t)
		put(t, s.Place, second, "a", 10)
		put(t, s.Place, first, "b", 1)
		want(t, s, first, 2)
	})
	t.Run("several servers", func(t *testing.T) {
		s := newSubject(t)
		newest := uint64(8)
		editions := []*bundle.Bundle{first, second, Bundle(t, 3)}
		var group sync.WaitGroup
		for i := range newest + 1 {
			place := s.Again()
			group.Go(func() {
				for place.Publish(t.Context(), edition(editions[i%3], "a", i)) != nil { // as a server tries again
					if t.Context().Err() != nil {
						return
					}
				}
			})
		}
		group.Wait()
		if s.Holds() != s.Text(editions[newest%3]) {
			t.Error("the place does not have the newest edition")
		}
	})
	t.Run("canceled", func(t *testing.T) {
		s := newSubject(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if s.Place.Publish(ctx, edition(first, "a", 1)) == nil {
			t.Error("it succeeds after its context has ended")
		}
	})
}
