package lifetime

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestResolve(t *testing.T) {
	const h = time.Hour
	for _, c := range []struct {
		name   string
		wish   Wish
		want   Set
		faults int
	}{
		{"nothing named", Wish{}, Set{0, 24 * h, h, 5 * time.Minute, h}, 0},
		{"agents live as long as SVIDs", Wish{X509: 2 * h}, Set{0, 24 * h, 2 * h, 5 * time.Minute, 2 * h}, 0},
		{"without a promise nothing is refused", Wish{CA: h, X509: 2 * h}, Set{0, h, 2 * h, 5 * time.Minute, 2 * h}, 0},
		{"one number", Wish{Outage: 8 * h}, Set{8 * h, 240 * h, 20 * h, 20 * h, 20 * h}, 0},
		{"longer is allowed", Wish{Outage: 8 * h, X509: 30 * h}, Set{8 * h, 360 * h, 30 * h, 20 * h, 20 * h}, 0},
		{"seconds", Wish{Outage: time.Second}, Set{time.Second, 36 * time.Second, 3 * time.Second, 3 * time.Second, 3 * time.Second}, 0},
		{"the most", Wish{Outage: MostOutage}, Set{MostOutage, 1008 * h, 84 * h, 84 * h, 84 * h}, 0},
		{"SVIDs too short", Wish{Outage: 8 * h, X509: h}, Set{8 * h, 240 * h, h, 20 * h, 20 * h}, 1},
		{"all too short", Wish{Outage: 8 * h, X509: h, JWT: h, Agent: h}, Set{8 * h, 12 * h, h, h, h}, 3},
		{"authority too short", Wish{Outage: 8 * h, CA: 24 * h}, Set{8 * h, 24 * h, 20 * h, 20 * h, 20 * h}, 1},
		{"SVIDs that no authority spares", Wish{Outage: 8 * h, X509: 100 * h}, Set{8 * h, 1200 * h, 100 * h, 20 * h, 20 * h}, 1},
		{"more than can be promised", Wish{Outage: MostOutage + 1}, Set{MostOutage + 1, 0, h, 5 * time.Minute, 0}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, faults := c.wish.Resolve()
			if got != c.want || len(faults) != c.faults {
				t.Errorf("got %+v with %d faults %v, want %+v with %d", got, len(faults), faults, c.want, c.faults)
			}
			for _, err := range faults {
				if fault.KindOf(err) != fault.Invalid {
					t.Errorf("%v is not a fault of what was named", err)
				}
			}
		})
	}
}

// Whatever is accepted keeps the promise: a leaf that is renewed late, and under
// an authority that is replaced as late as can be, always has that much left and
// never outlives who signed it (R8).
func TestNothingIsShorterThanPromised(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	id := spiffeid.RequireFromPath(td, "/a")
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	r := rand.New(rand.NewPCG(1, 2))
	random := func(least, most time.Duration) time.Duration {
		return (least + time.Duration(r.Float64()*float64(most-least))).Truncate(time.Second)
	}
	kept := 0
	for range 8000 {
		w := Wish{Outage: random(2*time.Second, MostOutage)}
		for _, life := range []*time.Duration{&w.CA, &w.X509, &w.JWT, &w.Agent} {
			if r.IntN(2) == 0 {
				*life = random(time.Second, 40*w.Outage)
			}
		}
		s, faults := w.Resolve()
		entry := time.Duration(0)
		if r.IntN(2) == 0 {
			entry = random(time.Second, 4*s.X509)
		}
		if len(faults) > 0 || s.CheckGrant(entry, entry) != nil {
			continue
		}
		kept++
		life := s.X509
		if entry != 0 {
			life = entry
		}
		for _, life := range []time.Duration{life, s.JWT, s.Agent} {
			// The last moment at which the old authority signs, and any before it.
			caEnd := start.Add(s.CA)
			at := caEnd.Add(-min(s.CA/12, Most))
			if r.IntN(2) == 0 {
				at = start.Add(random(0, at.Sub(start)))
			}
			end := at.Add(life)
			if end.After(caEnd) {
				end = caEnd
			}
			renewed := at.Add(time.Duration((0.45 + 0.1*r.Float64()) * float64(end.Sub(at))))
			if left := end.Sub(renewed); left < w.Outage {
				t.Fatalf("%+v: only %v is left of what was signed %v before its authority's end", s, left, caEnd.Sub(at))
			}
		}
		if kept%20 != 0 {
			continue // real certificates take a while
		}
		ca, err := svid.SelfSignedCA(td, caKey, start.Add(-svid.Backdate), start.Add(s.CA))
		if err != nil {
			t.Fatal(err)
		}
		issuer, err := svid.NewX509Issuer([][]byte{ca}, caKey)
		if err != nil {
			t.Fatal(err)
		}
		leafKey, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		spki, err := x509.MarshalPKIXPublicKey(leafKey.Public())
		if err != nil {
			t.Fatal(err)
		}
		public, err := svid.ParsePublicKey(spki)
		if err != nil {
			t.Fatal(err)
		}
		at := start.Add(random(0, s.CA))
		p, err := issuer.Prepare(svid.Leaf{ID: id, Key: public, NotBefore: at.Add(-svid.Backdate), NotAfter: at.Add(life)})
		if err != nil {
			t.Fatal(err)
		}
		if end := start.Add(s.CA); p.NotAfter().After(end) || at.Add(life).Before(end) && p.NotAfter().Before(at.Add(life).Truncate(time.Second)) {
			t.Fatalf("%+v: signed %v before the authority's end for %v, it ends %v after it", s, end.Sub(at), life, p.NotAfter().Sub(end))
		}
	}
	if kept < 300 {
		t.Fatalf("only %d sets were accepted", kept)
	}
}

func TestDecide(t *testing.T) {
	got := Decide([]Limit{{"a", time.Hour}, {"b", time.Minute}, {"c", time.Minute}})
	if got[0].Name != "b" || got[2].Name != "a" {
		t.Errorf("got %v", got)
	}
}
