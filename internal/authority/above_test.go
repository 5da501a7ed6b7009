package authority

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/internal/upstream"
)

// higher is an authority above that does what a test says.
type higher struct {
	t testing.TB

	mu      sync.Mutex // guards everything below
	issuer  *svid.X509Issuer
	trust   upstream.Trust
	changed chan struct{}
	fail    error // of every call
	bug     bool  // every call panics
	edit    func(upstream.Minted) upstream.Minted
	ttl     time.Duration // of what is minted; 0: as asked
	asked   int
}

func newHigher(t testing.TB) *higher {
	t.Helper()
	h := &higher{t: t, changed: make(chan struct{})}
	h.rotate(1000 * time.Hour)
	return h
}

// rotate has another root sign, beside those that are there.
func (h *higher) rotate(life time.Duration) []byte {
	h.t.Helper()
	key, err := keys.NewPrivate(keys.ECP256)
	if err != nil {
		h.t.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	root, err := svid.SelfSignedCA(domain(), key, now.Add(-svid.Backdate), now.Add(life))
	if err != nil {
		h.t.Fatal(err)
	}
	issuer, err := svid.NewX509Issuer([][]byte{root}, key)
	if err != nil {
		h.t.Fatal(err)
	}
	h.change(func() {
		h.issuer = issuer
		h.trust.Roots = append(slices.Clip(h.trust.Roots), bundle.X509Authority{ASN1: root})
	})
	return root
}

// change changes what it trusts, and tells who watches.
func (h *higher) change(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.trust.Roots, h.trust.JWT = slices.Clone(h.trust.Roots), slices.Clone(h.trust.JWT)
	f()
	h.trust.Version++
	close(h.changed)
	h.changed = make(chan struct{})
}

// set changes how it answers.
func (h *higher) set(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

func (h *higher) Mint(_ context.Context, r upstream.Request) (upstream.Minted, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked++
	if h.bug {
		panic("a bug")
	}
	if h.fail != nil {
		return upstream.Minted{}, h.fail
	}
	key, err := svid.ParseCSR(r.CSR)
	if err != nil {
		return upstream.Minted{}, err
	}
	ttl := r.TTL
	if h.ttl != 0 {
		ttl = h.ttl
	}
	now := time.Now()
	p, err := h.issuer.PrepareAuthority(svid.Authority{TrustDomain: domain(), Key: key, NotBefore: now.Add(-svid.Backdate), NotAfter: now.Add(ttl)})
	if err != nil {
		return upstream.Minted{}, err
	}
	chain, err := p.Issue()
	m := upstream.Minted{Chain: chain, Trust: h.trust}
	if h.edit != nil {
		m = h.edit(m)
	}
	return m, err
}

func (h *higher) Watch(ctx context.Context) iter.Seq2[upstream.Trust, error] {
	return func(yield func(upstream.Trust, error) bool) {
		for ctx.Err() == nil {
			h.mu.Lock()
			trust, err, changed, bug := h.trust, h.fail, h.changed, h.bug
			h.mu.Unlock()
			if bug {
				panic("a bug")
			}
			if !yield(trust, err) {
				return
			}
			select {
			case <-ctx.Done():
			case <-changed:
			}
		}
	}
}

// publisher is one that takes JWT keys too.
type publisher struct{ *higher }

func (p publisher) PublishJWT(_ context.Context, key bundle.JWTAuthority) (upstream.Trust, error) {
	if err := func() error { p.mu.Lock(); defer p.mu.Unlock(); return p.fail }(); err != nil {
		return upstream.Trust{}, err
	}
	p.change(func() { p.trust.JWT = append(p.trust.JWT, key) })
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.trust, nil
}

// below starts an authority below h, which may be nil.
func (w *world) below(server string, h upstream.Authority, edit ...func(*Config)) (*Authority, func()) {
	w.t.Helper()
	c := Config{TrustDomain: domain(), ServerID: server, Keeper: w.keeper, Registry: w.reg, TTL: w.ttl, Log: quiet(), Upstream: h}
	for _, f := range edit {
		f(&c)
	}
	a, err := New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := a.Start(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { a.Run(ctx) })
	return a, func() {
		cancel()
		running.Wait()
	}
}

// roots are the indexes of those roots that the bundle has, and that it has as tainted.
func (w *world) roots(list ...[]byte) (out string) {
	w.t.Helper()
	b := w.bundle()
	for i, der := range list {
		for _, a := range b.X509 {
			if bytes.Equal(a.ASN1, der) {
				out += fmt.Sprint(i)
				if a.Tainted {
					out += "!"
				}
			}
		}
	}
	if extra := len(b.X509) - len(strings.ReplaceAll(out, "!", "")); extra > 0 {
		out += fmt.Sprintf("+%d", extra)
	}
	return out
}

// Below an authority above, documents verify against its root alone, through all
// rotations, and the bundle holds nothing else (X509-3.2-a, R63, R65).
func TestBelow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		root := h.trust.Roots[0].ASN1
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", h)
		defer stop()
		seen := map[string]bool{}
		var live []documents
		for range 75 {
			d := sign(t, a, 8*time.Minute)
			if len(d.chain) != 2 {
				t.Fatalf("%d certificates in the chain, want the leaf and our authority's", len(d.chain))
			}
			if left := time.Until(d.ends); left < 8*time.Minute-time.Second {
				t.Fatalf("a rotation cuts a document to %v", left)
			}
			live = append(live, d)
			x, _ := authorities(t, a)
			seen[x] = true
			live = slices.DeleteFunc(live, func(d documents) bool { return !time.Now().Before(d.ends) })
			for _, d := range live {
				if err := w.verify(d); err != nil {
					t.Fatal(err)
				}
			}
			if got := w.roots(root); got != "0" {
				t.Fatalf("the bundle holds %s, want the root above alone", got)
			}
			time.Sleep(2 * time.Minute)
		}
		if len(seen) != 5 { // the first signs for 50 minutes, each that follows for half an hour
			t.Errorf("%d authorities in two and a half hours, want 5", len(seen))
		}
	})
}

// An authority above that is away delays replacement only: what signs goes on to
// its end, with alarms at 50, 25 and 10 % of its life left; and is replaced soon
// after the other is back (R67, R110).
func TestAboveIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		w := newWorld(t, memory(t), time.Hour)
		var alarms []string
		a, stop := w.below("s1", h, func(c *Config) {
			c.Alarm = func(_, reason, detail string) {
				alarms = append(alarms, strings.TrimPrefix(reason, "authority_")+" "+detail)
			}
		})
		defer stop()
		first, _ := authorities(t, a)
		away := fault.New(fault.Unavailable, "upstream_away", "nobody answers")
		h.set(func() { h.fail = away })
		if err := a.UpstreamHealth(); err != nil {
			t.Errorf("before anything was asked: %v", err)
		}
		time.Sleep(59 * time.Minute)
		if x, _ := authorities(t, a); x != first {
			t.Errorf("%s signs, want the first one", x)
		}
		if err := w.verify(sign(t, a, time.Second)); err != nil {
			t.Error(err)
		}
		if !errors.Is(a.UpstreamHealth(), away) {
			t.Errorf("health: %v", a.UpstreamHealth())
		}
		h.set(func() {
			if h.asked < 20 || h.asked > 200 {
				t.Errorf("asked %d times in half an hour", h.asked)
			}
		})
		if got := strings.Join(alarms, ", "); got != "50_percent_left x509: upstream_away, 25_percent_left x509: upstream_away, 10_percent_left x509: upstream_away" {
			t.Errorf("alarms: %s", got)
		}
		time.Sleep(2 * time.Minute) // past its end
		if _, err := a.X509(time.Now()); fault.KindOf(err) != fault.Unavailable {
			t.Errorf("past its end: %v", err)
		}
		if _, err := a.JWT(time.Now()); err != nil { // nobody above is asked for these
			t.Errorf("the JWT key: %v", err)
		}
		h.set(func() { h.fail = nil })
		h.change(func() {})
		time.Sleep(2 * retryMost)
		if x, _ := authorities(t, a); x == first {
			t.Error("the first one still signs")
		}
		if err := a.UpstreamHealth(); err != nil {
			t.Errorf("health: %v", err)
		}
	})
}

// An answer from above that makes us panic is a failed one, and ends nothing (R67, R99).
func TestAbovePanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", h)
		defer stop()
		first, _ := authorities(t, a)
		h.set(func() { h.bug = true })
		h.change(func() {})
		synctest.Wait()
		if err := a.UpstreamHealth(); fault.ReasonOf(err) != fault.Panicked {
			t.Errorf("health: %v", err)
		}
		time.Sleep(45 * time.Minute) // it should be replaced, and cannot be
		if x, _ := authorities(t, a); x != first {
			t.Errorf("%s signs, want the first one", x)
		}
		h.set(func() { h.bug = false })
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if x, _ := authorities(t, a); x == first {
			t.Error("the first one still signs")
		}
		if err := a.UpstreamHealth(); err != nil {
			t.Errorf("health: %v", err)
		}
	})
}

// While nothing signs, everybody who wants a certificate must not make us ask.
func TestAboveIsNotFlooded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", h)
		defer stop()
		h.set(func() { h.fail = fault.New(fault.Unavailable, "upstream_away", "nobody answers"); h.asked = 0 })
		time.Sleep(2 * time.Hour)
		h.set(func() { h.asked = 0 })
		for range 600 {
			a.X509(time.Now())
			time.Sleep(100 * time.Millisecond)
		}
		h.set(func() {
			if h.asked > 5 {
				t.Errorf("asked %d times in a minute", h.asked)
			}
		})
	})
}

// A restart while the authority above is away goes on with what signs.
func TestRestartBelow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", h)
		first, _ := authorities(t, a)
		stop()
		h.set(func() { h.fail = fault.New(fault.Unavailable, "upstream_away", "nobody answers") })
		time.Sleep(40 * time.Minute)
		a, stop = w.below("s1", h)
		defer stop()
		if x, _ := authorities(t, a); x != first {
			t.Errorf("%s signs, want %s", x, first)
		}
		if _, err := New(Config{TrustDomain: domain(), ServerID: "s2", Keeper: memory(t), Registry: w.reg, TTL: time.Hour, Log: quiet(), Upstream: h}); err != nil {
			t.Fatal(err)
		}
	})
	synctest.Test(t, func(t *testing.T) { // with nothing that signs
		h := newHigher(t)
		h.fail = fault.New(fault.Unavailable, "upstream_away", "nobody answers")
		w := newWorld(t, memory(t), time.Hour)
		a, err := New(Config{TrustDomain: domain(), ServerID: "s1", Keeper: memory(t), Registry: w.reg, TTL: time.Hour, Log: quiet(), Upstream: h})
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Start(t.Context()); !errors.Is(err, h.fail) {
			t.Errorf("Start() = %v", err)
		}
		time.AfterFunc(startPatience/2, func() { h.set(func() { h.fail = nil }) })
		if err := a.Start(t.Context()); err != nil { // they may be starting both
			t.Errorf("Start() = %v", err)
		}
		w.stop()
	})
}

// Answers that are not fit for use leave the old authority in use, with the
// reason in health; the next good one counts (Q14, R67).
func TestUnfitAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		edit   func(h *higher, m upstream.Minted) upstream.Minted
		reason string
	}{
		"no certificate": {func(_ *higher, m upstream.Minted) upstream.Minted { m.Chain = nil; return m }, "upstream_chain_empty"},
		"no root":        {func(_ *higher, m upstream.Minted) upstream.Minted { m.Trust.Roots = nil; return m }, "upstream_chain_empty"},
		"garbage":        {func(_ *higher, m upstream.Minted) upstream.Minted { m.Chain = [][]byte{{1}}; return m }, "upstream_certificate_malformed"},
		"another key":    {func(h *higher, m upstream.Minted) upstream.Minted { m.Chain = h.mintFor(domain(), time.Hour); return m }, "upstream_key_mismatch"},
		"the root itself": {func(_ *higher, m upstream.Minted) upstream.Minted {
			m.Chain = [][]byte{m.Trust.Roots[0].ASN1}
			return m
		}, "upstream_key_mismatch"},
		"unrelated root": {func(h *higher, m upstream.Minted) upstream.Minted {
			m.Trust.Roots = newHigher(h.t).trust.Roots
			return m
		}, "upstream_root_unrelated"},
		"a second certificate": {func(h *higher, m upstream.Minted) upstream.Minted {
			m.Chain = append(m.Chain, h.mintFor(domain(), time.Hour)...)
			return m
		}, "upstream_chain_order"},
		"hardly any life": {func(h *higher, m upstream.Minted) upstream.Minted { return m }, "upstream_lifetime_short"},
		"ended": {func(h *higher, m upstream.Minted) upstream.Minted {
			return h.resign(m, func(_, ours *x509.Certificate) { ours.NotAfter = time.Now().Add(-time.Second) })
		}, "upstream_expired"},
		"another trust domain": {func(h *higher, m upstream.Minted) upstream.Minted {
			return h.resign(m, func(_, ours *x509.Certificate) { ours.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.org"}} })
		}, "upstream_trust_domain_mismatch"},
		"not an authority": {func(h *higher, m upstream.Minted) upstream.Minted {
			return h.resign(m, func(_, ours *x509.Certificate) { ours.IsCA, ours.MaxPathLen, ours.MaxPathLenZero = false, 0, false })
		}, "upstream_not_an_authority"},
		"path length broken": {func(h *higher, m upstream.Minted) upstream.Minted {
			return h.resign(m, func(root, _ *x509.Certificate) { root.MaxPathLenZero = true })
		}, "upstream_path_length"},
		"tainted root": {func(h *higher, m upstream.Minted) upstream.Minted {
			other := newHigher(h.t).trust.Roots[0]
			m.Trust.Roots = []bundle.X509Authority{{ASN1: m.Trust.Roots[0].ASN1, Tainted: true}, other}
			return m
		}, "upstream_root_tainted"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHigher(t)
				w := newWorld(t, memory(t), time.Hour)
				a, stop := w.below("s1", h)
				defer stop()
				first, _ := authorities(t, a)
				h.set(func() {
					h.edit = func(m upstream.Minted) upstream.Minted {
						// What is told in an answer that is refused may not count as newer.
						m.Trust.Version = 0
						return c.edit(h, m)
					}
					if name == "hardly any life" {
						h.ttl = 2 * time.Second
					}
				})
				time.Sleep(40 * time.Minute)
				if x, _ := authorities(t, a); x != first {
					t.Errorf("another authority signs")
				}
				if st := a.Status(time.Now()); !slices.ContainsFunc(st, func(s Status) bool { return s.Kind == X509 && fault.ReasonOf(s.Err) == c.reason }) {
					t.Errorf("status says %+v, want %q", st, c.reason)
				}
				if got := fault.ReasonOf(a.UpstreamHealth()); got != c.reason {
					t.Errorf("health says %q, want %q: %v", got, c.reason, a.UpstreamHealth())
				}
				h.set(func() { h.edit, h.ttl = nil, 0 })
				time.Sleep(15 * time.Minute)
				if x, _ := authorities(t, a); x == first {
					t.Error("the next good answer does not count")
				}
				if err := a.UpstreamHealth(); err != nil {
					t.Errorf("health: %v", err)
				}
			})
		})
	}
}

// mintFor signs an authority for a key of nobody's.
func (h *higher) mintFor(td spiffeid.TrustDomain, ttl time.Duration) [][]byte {
	h.t.Helper()
	key, err := keys.NewPrivate(keys.ECP256)
	if err != nil {
		h.t.Fatal(err)
	}
	csr, err := svid.NewCSR(key)
	if err != nil {
		h.t.Fatal(err)
	}
	public, err := svid.ParseCSR(csr)
	if err != nil {
		h.t.Fatal(err)
	}
	p, err := h.issuer.PrepareAuthority(svid.Authority{TrustDomain: td, Key: public, NotBefore: time.Now(), NotAfter: time.Now().Add(ttl)})
	if err != nil {
		h.t.Fatal(err)
	}
	chain, err := p.Issue()
	if err != nil {
		h.t.Fatal(err)
	}
	return chain
}

// resign signs again below another root, both as edit says.
func (h *higher) resign(m upstream.Minted, edit func(root, ours *x509.Certificate)) upstream.Minted {
	h.t.Helper()
	key, err := keys.NewPrivate(keys.ECP256)
	if err != nil {
		h.t.Fatal(err)
	}
	sign := func(c, parent *x509.Certificate, public any) []byte {
		h.t.Helper()
		der, err := x509.CreateCertificate(rand.Reader, c, parent, public, key)
		if err != nil {
			h.t.Fatal(err)
		}
		return der
	}
	parse := func(der []byte) *x509.Certificate {
		h.t.Helper()
		c, err := x509.ParseCertificate(der)
		if err != nil {
			h.t.Fatal(err)
		}
		return c
	}
	template, ours := parse(m.Trust.Roots[0].ASN1), parse(m.Chain[0])
	template.MaxPathLen, template.SubjectKeyId, template.PublicKey, ours.AuthorityKeyId = 0, []byte{1}, key.Public(), nil
	edit(template, ours)
	root := sign(template, template, key.Public())
	m.Chain, m.Trust.Roots = [][]byte{sign(ours, parse(root), ours.PublicKey)}, []bundle.X509Authority{{ASN1: root}}
	return m
}

// When another root signs above, both are in the bundle for as long as something
// below the old one lives, and replacement does not wait for half of a life.
func TestRootChangesAbove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		old := h.trust.Roots[0].ASN1
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", h)
		defer stop()
		time.Sleep(time.Minute)
		first, _ := authorities(t, a)
		before := sign(t, a, 10*time.Minute)
		other := h.rotate(1000 * time.Hour)
		time.Sleep(time.Second)
		if x, _ := authorities(t, a); x != first || w.roots(old, other) != "01" {
			t.Errorf("a second root is no reason to replace what signs: bundle %s", w.roots(old, other))
		}
		h.change(func() { h.trust.Roots = h.trust.Roots[1:] }) // the old one is gone above
		time.Sleep(time.Minute)
		if x, _ := authorities(t, a); x == first {
			t.Error("what is below the old root still signs")
		}
		for _, d := range []documents{before, sign(t, a, time.Minute)} {
			if err := w.verify(d); err != nil {
				t.Error(err)
			}
		}
		if got := w.roots(old, other); got != "01" {
			t.Errorf("bundle %s, want both roots", got)
		}
		time.Sleep(62 * time.Minute) // the end of what is below the old one, and a minute
		if got := w.roots(old, other); got != "1" {
			t.Errorf("bundle %s, want the new root alone", got)
		}
	})
}

// A root that is tainted above: what is below it is replaced first, then it is
// marked, and when it goes it goes for ever (R69).
func TestRootIsTaintedAbove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		old := h.trust.Roots[0].ASN1
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", h)
		defer stop()
		time.Sleep(time.Minute)
		first, _ := authorities(t, a)
		other := h.rotate(1000 * time.Hour)
		h.set(func() { h.fail = fault.New(fault.Unavailable, "upstream_away", "nobody answers") })
		h.change(func() { h.trust.Roots[0].Tainted = true })
		time.Sleep(5 * time.Second)
		if x, _ := authorities(t, a); x != first || strings.Contains(w.roots(old, other), "!") {
			t.Errorf("what cannot be replaced is marked: bundle %s", w.roots(old, other))
		}
		h.set(func() { h.fail = nil })
		h.change(func() {})
		time.Sleep(30 * time.Second)
		if x, _ := authorities(t, a); x == first {
			t.Error("what is below the tainted root still signs")
		}
		if got := w.roots(old, other); got != "0!1" {
			t.Errorf("bundle %s, want the old root tainted beside the new one", got)
		}
		h.change(func() { h.trust.Roots = h.trust.Roots[1:] })
		time.Sleep(time.Second)
		if got := w.roots(old, other); got != "1" || len(w.bundle().Revoked) != 1 {
			t.Errorf("bundle %s with %d revoked, want the new root alone", got, len(w.bundle().Revoked))
		}
		h.change(func() { h.trust.Roots = append(h.trust.Roots, bundle.X509Authority{ASN1: old}) }) // a replica that lags
		time.Sleep(time.Second)
		if got := w.roots(old, other); got != "1" {
			t.Errorf("bundle %s: a revoked root is back", got)
		}
		if err := w.verify(sign(t, a, time.Minute)); err != nil {
			t.Error(err)
		}
	})
}

// An operator taints and revokes the root above by its subject key identifier,
// once nothing that signs is below it.
func TestTaintAbove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		old := h.trust.Roots[0].ASN1
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", h)
		defer stop()
		id := svid.CertificateID(old)
		want := func(what string, err error, reason string) {
			t.Helper()
			if err == nil && reason != "" || err != nil && fault.ReasonOf(err) != reason {
				t.Errorf("%s: %v, want %q", what, err, reason)
			}
		}
		ctx := t.Context()
		want("what signs", a.TaintUpstream(ctx, "test", id), "authority_in_use")
		want("an unknown one", a.TaintUpstream(ctx, "test", "00"), "authority_unknown")
		want("none", a.TaintUpstream(ctx, "test", ""), "authority_id_missing")
		other := h.rotate(1000 * time.Hour)
		h.change(func() { h.trust.Roots = []bundle.X509Authority{h.trust.Roots[1], h.trust.Roots[0]} })
		if _, err := a.Prepare(ctx, "test", X509); err != nil {
			t.Fatal(err)
		}
		prepared := a.Slots(X509)
		if _, _, err := a.Activate(ctx, "test", X509, prepared[len(prepared)-1].AuthorityID, false); err != nil {
			t.Fatal(err)
		}
		_, err := a.Taint(ctx, "test", X509, a.Slots(X509)[0].AuthorityID)
		want("an authority of ours that the upstream signed", err, "authority_of_upstream")
		want("revoke before taint", a.RevokeUpstream(ctx, "test", id), "authority_not_tainted")
		want("taint", a.TaintUpstream(ctx, "test", id), "")
		if got := w.roots(old, other); got != "0!1" {
			t.Errorf("bundle %s", got)
		}
		want("taint again", a.TaintUpstream(ctx, "test", id), "")
		want("revoke", a.RevokeUpstream(ctx, "test", id), "")
		time.Sleep(time.Second)
		if got := w.roots(old, other); got != "1" { // although the upstream still has it
			t.Errorf("bundle %s, want the new root alone", got)
		}
		want("revoke again", a.RevokeUpstream(ctx, "test", id), "authority_not_published")
	})
	t.Run("without one", func(t *testing.T) {
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", nil)
		defer stop()
		if err := a.TaintUpstream(t.Context(), "test", "00"); fault.ReasonOf(err) != "upstream_not_configured" {
			t.Errorf("TaintUpstream() = %v", err)
		}
	})
}

// From self-signed to an authority above and back by configuration: each time a
// rotation that documents live through, and what is not needed any more goes.
func TestSwitch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		root := h.trust.Roots[0].ASN1
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", nil)
		own := a.Slots(X509)[0].Certificate
		var live []documents
		goOn := func(what string, d time.Duration) {
			t.Helper()
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(150 * time.Second) {
				live = append(live, sign(t, a, 5*time.Minute))
				live = slices.DeleteFunc(live, func(d documents) bool { return !time.Now().Before(d.ends) })
				for _, d := range live {
					if err := w.verify(d); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
				}
			}
		}
		goOn("self-signed", 5*time.Minute)
		stop()
		a, stop = w.below("s1", publisher{h})
		goOn("to an authority above", 5*time.Minute)
		if got := w.roots(own, root); got != "01" {
			t.Errorf("bundle %s, want both", got)
		}
		if len(sign(t, a, time.Minute).chain) != 2 {
			t.Error("what is signed does not lead to the authority above")
		}
		h.set(func() {
			if len(h.trust.JWT) != 1 {
				t.Errorf("%d JWT keys are known above, want the new one", len(h.trust.JWT))
			}
		})
		goOn("below it", 70*time.Minute)
		if got := w.roots(own, root); got != "1" {
			t.Errorf("bundle %s, want the root above alone", got)
		}
		stop()
		a, stop = w.below("s1", nil)
		defer func() { stop() }()
		goOn("back", 5*time.Minute)
		if got := w.roots(own, root); got != "1+1" {
			t.Errorf("bundle %s, want the root above and ours", got)
		}
		goOn("on its own again", 70*time.Minute)
		if got := w.roots(own, root); got[0] != '+' {
			t.Errorf("bundle %s, want ours alone", got)
		}
		if n := len(w.bundle().JWT); n > 2 {
			t.Errorf("%d JWT keys", n)
		}
	})
}

// JWT keys: ours is known above before it signs, those of others come and go, and
// one of ours that is revoked above is replaced at once (R63, R69).
func TestPublishesJWTKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		w := newWorld(t, memory(t), time.Hour)
		a, stop := w.below("s1", publisher{h})
		defer stop()
		has := func(id string) bool {
			return slices.ContainsFunc(w.bundle().JWT, func(k bundle.JWTAuthority) bool { return k.KeyID == id })
		}
		_, first := authorities(t, a)
		if h.trust.JWT[0].KeyID != first {
			t.Errorf("above is known %s, and %s signs", h.trust.JWT[0].KeyID, first)
		}
		key, err := keys.NewPrivate(keys.ECP256)
		if err != nil {
			t.Fatal(err)
		}
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		h.change(func() { h.trust.JWT = append(h.trust.JWT, bundle.JWTAuthority{KeyID: "sibling", PublicKey: spki}) })
		time.Sleep(time.Second)
		if !has("sibling") || !has(first) {
			t.Errorf("the bundle has %+v", w.bundle().JWT)
		}
		h.change(func() { h.trust.JWT = h.trust.JWT[:1] })
		time.Sleep(time.Second)
		if has("sibling") || !has(first) {
			t.Errorf("the bundle has %+v", w.bundle().JWT)
		}
		h.set(func() { h.fail = fault.New(fault.Unavailable, "upstream_away", "nobody answers") })
		time.Sleep(45 * time.Minute)
		if _, j := authorities(t, a); j != first {
			t.Errorf("%s signs, which nobody above knows", j)
		}
		h.set(func() { h.fail = nil })
		time.Sleep(10 * time.Minute)
		_, second := authorities(t, a)
		if second == first {
			t.Error("the first key still signs")
		}
		h.change(func() {
			h.trust.JWT = slices.DeleteFunc(h.trust.JWT, func(k bundle.JWTAuthority) bool { return k.KeyID == second })
		})
		time.Sleep(30 * time.Second)
		if _, j := authorities(t, a); j == second || has(second) {
			t.Errorf("%s signs, and was revoked above", j)
		}
		if err := w.verify(sign(t, a, time.Minute)); err != nil {
			t.Error(err)
		}
	})
}

// Two servers below one authority: a root stays while either of them needs it.
func TestTwoBelow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHigher(t)
		old := h.trust.Roots[0].ASN1
		w := newWorld(t, memory(t), time.Hour)
		a, stopA := w.below("s1", h)
		defer stopA()
		w.keeper = memory(t)
		b, stopB := w.below("s2", h)
		other := h.rotate(1000 * time.Hour)
		ofB := sign(t, b, 30*time.Minute)
		stopB() // and it never comes back
		h.change(func() { h.trust.Roots = h.trust.Roots[1:] })
		time.Sleep(20 * time.Minute)
		if err := errors.Join(w.verify(sign(t, a, time.Minute)), w.verify(ofB)); err != nil {
			t.Error(err)
		}
		if got := w.roots(old, other); got != "01" {
			t.Errorf("bundle %s, want both roots", got)
		}
	})
}
