package nodes_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"io/fs"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// lagging is a store that tells nothing of what others commit until it is asked
// to commit something itself.
type lagging struct {
	store.Store
	mu    sync.Mutex
	asked chan struct{} // closed by the first commit after hold
	away  bool
}

func (l *lagging) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked = make(chan struct{})
}

func (l *lagging) setAway(away bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.away = away
}

func (l *lagging) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.away {
		results := make([]store.Result, len(txns))
		for i := range results {
			results[i].Err = fault.New(fault.Unavailable, "store_unreachable", "away")
		}
		return results
	}
	results := l.Store.Commit(ctx, txns)
	select {
	case <-l.asked:
	default:
		close(l.asked)
	}
	return results
}

func (l *lagging) Watch(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		for b, err := range l.Store.Watch(ctx, after) {
			l.mu.Lock()
			asked := l.asked
			l.mu.Unlock()
			select {
			case <-asked:
			case <-ctx.Done():
				return
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

// place is one of several servers.
type place struct {
	*nodes.Engine
	reg    *registry.Registry
	alarms *[]audit.Alarm
}

func newPlace(t *testing.T, st store.Store, td spiffeid.TrustDomain) place {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	reg, err := registry.Open(t.Context(), st, td, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- reg.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	p := place{reg: reg, alarms: new([]audit.Alarm)}
	trail, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "audit.log"), Server: "s", Version: "v", Log: log, Seen: func(e audit.Event) {
		if a, ok := e.(audit.Alarm); ok {
			*p.alarms = append(*p.alarms, a)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { trail.Close() })
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root, err := svid.SelfSignedCA(td, key, time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	p.Engine = nodes.New(nodes.Config{
		TrustDomain: td, Registry: reg, Audit: trail, Log: log, Lifetimes: lifetime.Set{Agent: time.Hour},
		Verifiers: map[string]nodeattest.Verifier{jointoken.Name: verifier(t)},
		Issuer:    func(time.Time) (*svid.X509Issuer, error) { return svid.NewX509Issuer([][]byte{root}, key) },
	})
	return p
}

func verifier(t *testing.T) nodeattest.Verifier {
	t.Helper()
	v, err := (&jointoken.Config{}).Open(t.Context(), nodeattest.Env{})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func newCSR(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := svid.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// What a server's memory does not know yet, because it was done at another server
// a moment ago, is no reason to refuse an agent, and none for an alarm; what the
// store does not know either is (R31, R33).
func TestSeveralServers(t *testing.T) {
	st, err := sqlite.Config{Dir: t.TempDir()}.Open(t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	slow := &lagging{Store: st}
	slow.hold()
	close(slow.asked)
	td := spiffeid.RequireTrustDomainFromString("td")
	a, b := newPlace(t, st, td), newPlace(t, slow, td)
	ctx := t.Context()
	shown := func(x svid.X509) nodes.Presented {
		return nodes.Presented{ID: x.ID, Serial: x.Serial, Expiry: x.NotAfter, Address: "192.0.2.1"}
	}
	behind := func(what string) {
		t.Helper()
		if a.reg.Position() == b.reg.Position() {
			t.Fatalf("%s: b is not behind, so nothing is tested", what)
		}
	}
	caughtUp := func() {
		t.Helper()
		for done := time.After(time.Minute); b.reg.Position() != a.reg.Position(); {
			select {
			case <-done:
				t.Fatal("b never caught up")
			case <-time.After(time.Millisecond):
			}
		}
	}
	want := func(what string, err error, reason string) {
		t.Helper()
		if got := fault.ReasonOf(err); (err == nil) != (reason == "") || err != nil && got != reason {
			t.Errorf("%s: %v (%s), want %q", what, err, got, reason)
		}
	}
	attest := func(p place, token jointoken.Token) (svid.X509, error) {
		payload, err := jointoken.Prover{Token: token}.Payload(ctx)
		if err != nil {
			t.Fatal(err)
		}
		got, err := p.Attest(ctx, nodes.Attestation{Type: jointoken.Name, Payload: payload, CSR: newCSR(t), Address: "192.0.2.1"}, nil)
		return got.SVID, err
	}
	renew := func(x svid.X509) svid.X509 {
		t.Helper()
		got, err := a.Renew(ctx, shown(x), newCSR(t))
		if err != nil {
			t.Fatal(err)
		}
		return got.SVID
	}

	// A token made at a is good at b, and one used at a is used.
	slow.hold()
	token, _, err := a.CreateToken(ctx, "test", nodes.TokenRequest{TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	behind("token")
	first, err := attest(b, token)
	want("a token made at a", err, "")
	_, err = attest(b, token)
	want("with another key", err, "join_token_refused")
	_, err = attest(b, jointoken.Generate())
	want("a token that nobody made", err, "join_token_refused")

	// Attested or renewed at a, and at b at once.
	token, _, err = a.CreateToken(ctx, "test", nodes.TokenRequest{TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	slow.hold()
	second, err := attest(a, token)
	want("attest at a", err, "")
	behind("attested")
	want("attested at a", b.Authenticate(ctx, shown(second)), "")
	slow.hold()
	third := renew(first)
	behind("renewed")
	want("renewed at a", b.Authenticate(ctx, shown(third)), "")
	slow.hold()
	fourth := renew(third)
	want("used at a", a.Authenticate(ctx, shown(fourth)), "")
	behind("used")
	want("renewed and used at a", b.Authenticate(ctx, shown(fourth)), "")
	if len(*b.alarms) != 0 {
		t.Errorf("alarms %v", *b.alarms)
	}
	want("replaced", b.Authenticate(ctx, shown(third)), nodes.ReasonNotActive)
	if len(*b.alarms) != 1 {
		t.Errorf("%d alarms for a copied key, want 1", len(*b.alarms))
	}

	// While the store is away nothing is said that only it can know, and a ban stands.
	slow.setAway(true)
	fifth := renew(fourth)
	other := shown(fifth)
	other.Serial = "1"
	want("cannot be told", b.Authenticate(ctx, other), "store_unreachable")
	caughtUp()
	want("renewed, and seen before", b.Authenticate(ctx, shown(fifth)), "")
	if len(*b.alarms) != 1 {
		t.Errorf("alarms %v", *b.alarms)
	}
	if err := a.Ban(ctx, "test", fifth.ID); err != nil {
		t.Fatal(err)
	}
	caughtUp()
	want("banned", b.Authenticate(ctx, shown(fifth)), nodes.ReasonBanned)
	slow.setAway(false)

	// Unbanned and admitted again at a.
	slow.hold()
	if err := a.Evict(ctx, "test", fifth.ID); err != nil {
		t.Fatal(err)
	}
	behind("evicted")
	want("evicted", b.Authenticate(ctx, shown(fifth)), nodes.ReasonNotAttested)
}

// An agent that renewed in the time that a restored store has lost goes on with
// its newest certificate, and only with that (R31, R33).
func TestRestored(t *testing.T) {
	dir := t.TempDir()
	td := spiffeid.RequireTrustDomainFromString("td")
	// One life of a server, and whether the store is new in its eyes.
	life := func(f func(p place)) store.Epoch {
		t.Helper()
		st, err := sqlite.Config{Dir: dir}.Open(t.Context(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Run("", func(t *testing.T) { f(newPlace(t, st, td)) })
		at, err := st.Load(t.Context(), func(string, uint64, []byte) error { return nil })
		if err := errors.Join(err, st.Close()); err != nil {
			t.Fatal(err)
		}
		return at.Epoch
	}
	minute := time.Duration(0) // certificates end in whole seconds; these are a minute apart
	shown := func(x svid.X509) nodes.Presented {
		minute += time.Minute
		return nodes.Presented{ID: x.ID, Serial: x.Serial, Expiry: x.NotAfter.Add(minute), KeyHash: []byte("key"), Address: "192.0.2.1"}
	}
	renewed := func(p place, old nodes.Presented) nodes.Presented {
		t.Helper()
		got, err := p.Renew(t.Context(), old, newCSR(t))
		if err != nil {
			t.Fatal(err)
		}
		next := shown(got.SVID)
		if err := p.Authenticate(t.Context(), next); err != nil {
			t.Fatal(err)
		}
		return next
	}
	var first, second, third nodes.Presented
	before := life(func(p place) {
		token, _, err := p.CreateToken(t.Context(), "test", nodes.TokenRequest{TTL: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		payload, err := jointoken.Prover{Token: token}.Payload(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got, err := p.Attest(t.Context(), nodes.Attestation{Type: jointoken.Name, Payload: payload, CSR: newCSR(t), Address: "192.0.2.1"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		first = shown(got.SVID)
	})
	backup, err := os.ReadFile(filepath.Join(dir, "plastron.db"))
	if err != nil {
		t.Fatal(err)
	}
	life(func(p place) {
		second = renewed(p, first)
		third = renewed(p, second)
		if err := p.Authenticate(t.Context(), second); fault.ReasonOf(err) != nodes.ReasonNotActive {
			t.Errorf("without a restore: %v, want %s", err, nodes.ReasonNotActive)
		}
	})
	for _, name := range []string{"plastron.db-wal", "plastron.db-shm"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "plastron.db"), backup, 0o600); err != nil {
		t.Fatal(err)
	}
	after := life(func(p place) {
		if err := p.Authenticate(t.Context(), third); err != nil {
			t.Fatalf("the newest: %v", err)
		}
		if n := len(*p.alarms); n != 1 || (*p.alarms)[0].Reason != "node_restored" {
			t.Errorf("alarms: %+v, want one of the restored node", *p.alarms)
		}
		for name, p2 := range map[string]nodes.Presented{"the one before": second, "the one in the backup": first} {
			if err := p.Authenticate(t.Context(), p2); fault.ReasonOf(err) != nodes.ReasonNotActive {
				t.Errorf("%s: %v, want %s", name, err, nodes.ReasonNotActive)
			}
		}
		renewed(p, third)
	})
	if after == before {
		t.Error("the restored store has the epoch that it had, so nothing was tested")
	}
}
