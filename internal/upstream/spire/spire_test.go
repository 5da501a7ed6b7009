package spire

import (
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
)

// What the server above says counts unless a replica lags, also of one that was
// restored and came to the same sequence with other content.
func TestTake(t *testing.T) {
	a, now := &Authority{}, time.Now()
	for _, c := range []struct {
		name     string
		after    time.Duration
		sequence uint64
		root     string // what it says
		want     string
		version  uint64
	}{
		{"first", 0, 5, "a", "a", 1},
		{"the same", time.Second, 5, "a", "a", 1},
		{"another", time.Second, 6, "b", "b", 2},
		{"a replica that lags", time.Second, 5, "a", "b", 2},
		{"restored, and changed since", time.Second, 6, "c", "c", 3},
		{"restored", laggedFor, 4, "a", "a", 4},
	} {
		now = now.Add(c.after)
		got := a.take(&bundle.Bundle{Sequence: c.sequence, X509: []bundle.X509Authority{{ASN1: []byte(c.root)}}}, now)
		if string(got.Roots[0].ASN1) != c.want || got.Version != c.version {
			t.Errorf("%s: %s, version %d, want %s, %d", c.name, got.Roots[0].ASN1, got.Version, c.want, c.version)
		}
	}
}
