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
		{"nothing named", Wish{}, Set{0, 24 * h, h, 5 * time.Minute, h, Wish{}}, 0},
		{"agents live as long as SVIDs", Wish{X509: 2 * h}, Set{0, 24 * h, 2 * h, 5 * time.Minute, 2 * h, Wish{}}, 0},
		{"without a promise nothing is refused", Wish{CA: h, X509: 2 * h}, Set{0, h, 2 * h, 5 * time.Minute, 2 * h, Wish{}}, 0},
		{"one number", Wish{Outage: 8 * h}, Set{8 * h, 240 * h, 20 * h, 20 * h, 20 * h, Wish{}}, 0},
		{"longer is allowed", Wish{Outage: 8 * h, X509: 30 * h}, Set{8 * h, 360 * h, 30 * h, 20 * h, 20 * h, Wish{}}, 0},
		{"the least", Wish{Outage: LeastOutage}, Set{time.Minute, 30 * time.Minute, 150 * time.Second, 150 * time.Second, 150 * time.Second, Wish{}}, 0},
		{"less than can be promised", Wish{Outage: LeastOutage - 1}, Set{LeastOutage - 1, 0, h, 5 * time.Minute, 0, Wish{}}, 1},
		{"the most", Wish{Outage: MostOutage}, Set{MostOutage, 1008 * h, 84 * h, 84 * h, 84 * h, Wish{}}, 0},
		{"SVIDs too short", Wish{Outage: 8 * h, X509: h}, Set{8 * h, 240 * h, h, 20 * h, 20 * h, Wish{}}, 1},
		{"all too short", Wish{Outage: 8 * h, X509: h, JWT: h, Agent: h}, Set{8 * h, 12 * h, h, h, h, Wish{}}, 3},
		{"authority too short", Wish{Outage: 8 * h, CA: 24 * h}, Set{8 * h, 24 * h, 20 * h, 20 * h, 20 * h, Wish{}}, 1},
		{"SVIDs that no authority spares", Wish{Outage: 8 * h, X509: 100 * h}, Set{8 * h, 1200 * h, 100 * h, 20 * h, 20 * h, Wish{}}, 1},
		{"more than can be promised", Wish{Outage: MostOutage + 1}, Set{MostOutage + 1, 0, h, 5 * time.Minute, 0, Wish{}}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, faults := c.wish.Resolve()
			c.want.Named = c.wish
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

// Whatever is accepted keeps the promise: a leaf that is renewed late, and under an
// authority that is replaced as late as can be, is handed out for at least as long
// as was promised. And nothing outlives who signed it, what is above that, or its
// grant (R8), whatever the lifetimes are.
func TestNothingIsShorterThanPromised(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	id := spiffeid.RequireFromPath(td, "/a")
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public := publicKey(t)
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	r := rand.New(rand.NewPCG(1, 2))
	between := func(least, most time.Duration) time.Duration {
		return least + time.Duration(r.Float64()*float64(most-least))
	}
	random := func(least, most time.Duration) time.Duration { return between(least, most).Truncate(time.Second) }
	kept, cut := 0, 0
	for n := range 8000 {
		w := Wish{Outage: random(LeastOutage, MostOutage)}
		for _, life := range []*time.Duration{&w.CA, &w.X509, &w.JWT, &w.Agent} {
			if r.IntN(2) == 0 {
				*life = random(time.Second, 40*w.Outage)
			}
		}
		if n%4 == 0 { // no promise
			w.Outage = 0
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
		for _, kind := range []Kind{X509, JWT, Agent, Server} { // in this order, so that each run draws the same
			entry := entry
			if kind == Agent || kind == Server {
				entry = 0
			}
			// The last moment at which the old authority signs, and any before it.
			caEnd := start.Add(s.CA)
			at := caEnd.Add(-min(s.CA/12, Most))
			if r.IntN(2) == 0 {
				at = start.Add(between(0, at.Sub(start)))
			}
			asked := Asked{Entry: entry, Authority: caEnd, Upstream: caEnd}
			particular := r.IntN(4) == 0 // an end that is no promise of ours
			if particular {
				asked.EntryEnd, asked.Upstream = at.Add(between(2*time.Second, 2*s.CA)), at.Add(between(2*time.Second, 2*s.CA)).Truncate(time.Second)
			}
			limits := s.Decide(kind, asked, at)
			end := limits[0].End
			for _, bound := range []time.Time{caEnd, asked.Upstream, asked.EntryEnd} {
				if !bound.IsZero() && end.After(bound) {
					t.Fatalf("%+v: %s ends %v after %+v", s, kind, end.Sub(bound), asked)
				}
			}
			if end.Before(caEnd) && limits[0].Name != AuthorityEnd && limits[0].Name != UpstreamEnd && limits[0].Name != EntryEnd &&
				at.Add(limits[0].Life).Sub(end) >= time.Second {
				t.Fatalf("%+v: %s ends %v before what limits it, %+v", s, kind, at.Add(limits[0].Life).Sub(end), limits[0])
			}
			if s.Outage > 0 && !particular {
				life := end.Sub(at)
				renewed := at.Add(time.Duration((0.45 + 0.1*r.Float64()) * float64(life)))
				// Agents give up what has 5 s left.
				if left := end.Add(-min(5*time.Second, life/10)).Sub(renewed); left < s.Outage {
					t.Fatalf("%+v: only %v is left of what was signed %v before its authority's end", s, left, caEnd.Sub(at))
				}
			}
			if kept%10 != 0 || kind == Agent || kind == Server || end.Sub(at) < 2*time.Second {
				continue // real documents take a while
			}
			if asked.Upstream.Before(caEnd) { // here the issuer is a root
				asked.Upstream = time.Time{}
				end = s.Decide(kind, asked, at)[0].End
				cut++
			}
			if got := issue(t, kind, id, caKey, public, start, caEnd, at, end); !got.Equal(end) {
				t.Fatalf("%+v: %s ends %v after what was decided", s, kind, got.Sub(end))
			}
		}
	}
	if kept < 300 || cut < 10 {
		t.Fatalf("only %d sets were accepted, and %d ends drawn", kept, cut)
	}
}

// issue prepares a document as a server does and returns when it ends.
func issue(t *testing.T, kind Kind, id spiffeid.ID, caKey *ecdsa.PrivateKey, public svid.PublicKey, begin, caEnd, at, end time.Time) time.Time {
	t.Helper()
	if kind == JWT {
		issuer, err := svid.NewJWTIssuer("key", caKey, caEnd)
		if err != nil {
			t.Fatal(err)
		}
		p, err := issuer.Prepare(svid.JWT{ID: id, Audience: []string{"a"}, IssuedAt: at, ExpiresAt: end})
		if err != nil {
			t.Fatal(err)
		}
		return p.ExpiresAt()
	}
	ca, err := svid.SelfSignedCA(id.TrustDomain(), caKey, begin.Add(-svid.Backdate), caEnd)
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := svid.NewX509Issuer([][]byte{ca}, caKey)
	if err != nil {
		t.Fatal(err)
	}
	if own, above := issuer.Ends(); !own.Equal(caEnd) || !above.IsZero() {
		t.Fatalf("the issuer says that it ends at %v, and what is above at %v", own, above)
	}
	p, err := issuer.Prepare(svid.Leaf{ID: id, Key: public, NotBefore: at.Add(-svid.Backdate), NotAfter: end})
	if err != nil {
		t.Fatal(err)
	}
	return p.NotAfter()
}

func publicKey(t *testing.T) svid.PublicKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	public, err := svid.ParsePublicKey(spki)
	if err != nil {
		t.Fatal(err)
	}
	return public
}
