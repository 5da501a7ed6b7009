package authority

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
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
	"github.com/plastron/plastron/internal/keys/diskkeys"
	"github.com/plastron/plastron/internal/keys/memkeys"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/svid"
)

func domain() spiffeid.TrustDomain { return spiffeid.RequireTrustDomainFromString("example.org") }

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// world is a real store with a running registry; restart stands for a new
// process on it.
type world struct {
	t      testing.TB
	dir    string
	keeper keys.Keeper
	store  store.Store
	reg    *registry.Registry
	stop   func()
	ttl    time.Duration

	peers    func(*registry.Snapshot, string, store.Position, time.Time) Peers
	revoked  []bundle.Revocation
	remember func([]bundle.Revocation) error
}

func newWorld(t testing.TB, keeper keys.Keeper, ttl time.Duration) *world {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, keeper: keeper, ttl: ttl}
	w.open()
	t.Cleanup(func() { w.stop() })
	return w
}

func (w *world) open() {
	w.t.Helper()
	st, err := sqlite.Config{Dir: w.dir}.Open(context.Background(), quiet())
	if err != nil {
		w.t.Fatal(err)
	}
	reg, err := registry.Open(context.Background(), st, domain(), quiet())
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { reg.Run(ctx) })
	w.store, w.reg = st, reg
	w.stop = func() {
		cancel()
		running.Wait()
		st.Close()
	}
}

func (w *world) authority(server string) *Authority {
	w.t.Helper()
	a, err := New(Config{TrustDomain: domain(), ServerID: server, Keeper: w.keeper, Registry: w.reg, TTL: w.ttl, Log: quiet(),
		Peers: w.peers, Revoked: w.revoked, Remember: w.remember})
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

// start makes an authority, starts it, and runs it until the returned function is called.
func (w *world) start(server string) (*Authority, func()) {
	w.t.Helper()
	a := w.authority(server)
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

func (w *world) bundle() *bundle.Bundle {
	w.t.Helper()
	var b *bundle.Bundle
	var err error
	w.reg.View(func(s *registry.Snapshot) { b, err = s.Bundle(domain()) })
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func memory(t testing.TB) keys.Keeper {
	t.Helper()
	k, err := (&memkeys.Config{}).Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// documents are an X.509-SVID and a JWT-SVID signed at a time.
type documents struct {
	chain [][]byte
	token string
	ends  time.Time // of both at the latest
}

func sign(t testing.TB, a *Authority, ttl time.Duration) documents {
	t.Helper()
	now := time.Now()
	issuer, err := a.X509(now)
	if err != nil {
		t.Fatal(err)
	}
	private, err := keys.NewPrivate(keys.ECP256)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := svid.NewCSR(private)
	if err != nil {
		t.Fatal(err)
	}
	key, err := svid.ParseCSR(csr)
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromPath(domain(), "/a")
	p, err := issuer.Prepare(svid.Leaf{ID: id, Key: key, NotBefore: now.Add(-svid.Backdate), NotAfter: now.Add(ttl)})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := a.JWT(now)
	if err != nil {
		t.Fatal(err)
	}
	j, err := signer.Prepare(svid.JWT{ID: id, Audience: []string{"x"}, IssuedAt: now, ExpiresAt: now.Add(ttl)})
	if err != nil {
		t.Fatal(err)
	}
	token, err := j.Issue()
	if err != nil {
		t.Fatal(err)
	}
	ends := leaf.NotAfter
	if j.ExpiresAt().Before(ends) {
		ends = j.ExpiresAt()
	}
	return documents{leaf.Chain, token, ends}
}

// verify verifies both with the bundle as it is committed.
func (w *world) verify(d documents) error {
	b := w.bundle()
	_, err := svid.VerifyX509(d.chain, b.Roots(), domain(), time.Now())
	_, err2 := svid.ValidateJWT(d.token, []string{"x"}, func(td spiffeid.TrustDomain, id string) (crypto.PublicKey, bool) {
		return b.JWTKey(id)
	}, time.Now())
	return errors.Join(err, err2)
}

func authorities(t testing.TB, a *Authority) (x509ID, jwtID string) {
	t.Helper()
	i, err := a.X509(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	j, err := a.JWT(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return i.AuthorityID(), j.KeyID()
}

func TestFirstStart(t *testing.T) {
	w := newWorld(t, memory(t), 24*time.Hour)
	a := w.authority("s1")
	if _, err := a.X509(time.Now()); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("X509() before Start = %v", err)
	}
	if _, err := a.JWT(time.Now()); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("JWT() before Start = %v", err)
	}
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.verify(sign(t, a, time.Hour)); err != nil {
		t.Error(err)
	}
	b := w.bundle()
	if len(b.X509) != 1 || len(b.JWT) != 1 || b.Sequence != 2 || b.RefreshHint != DefaultRefreshHint {
		t.Errorf("bundle after the first start: %+v", b)
	}
	if x, j := authorities(t, a); len(x) != 40 || len(j) != 32 || b.JWT[0].KeyID != j {
		t.Errorf("authorities %s %s", x, j)
	}
	// Nothing is due: another round writes nothing.
	before := w.reg.Position()
	a.round(t.Context())
	if after := w.reg.Position(); after != before {
		t.Errorf("an idle round moved the store from %v to %v", before, after)
	}
}

func TestConfig(t *testing.T) {
	w := newWorld(t, memory(t), 24*time.Hour)
	for name, c := range map[string]Config{
		"short":            {ServerID: "s", TTL: 5 * time.Second},
		"fraction":         {ServerID: "s", TTL: 6*time.Second + 1},
		"no server":        {TTL: time.Hour},
		"server with path": {ServerID: "a/b", TTL: time.Hour},
	} {
		c.Registry = w.reg
		if _, err := New(c); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: New() = %v", name, err)
		}
	}
}

// A restart with the keys goes on with the same authorities; one without makes
// new ones, and what the old ones signed verifies until it ends (R65).
func TestRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	if err := os.Chmod(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	open := func() keys.Keeper {
		k, err := (&diskkeys.Config{Path: path}).Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	w := newWorld(t, open(), 24*time.Hour)
	a, stop := w.start("s1")
	x, j := authorities(t, a)
	signed := sign(t, a, time.Hour)
	stop()
	w.stop()

	w.keeper = open()
	w.open()
	a, stop = w.start("s1")
	if x2, j2 := authorities(t, a); x2 != x || j2 != j {
		t.Errorf("after a restart with keys: %s %s, want %s %s", x2, j2, x, j)
	}
	if b := w.bundle(); b.Sequence != 2 {
		t.Errorf("the restart changed the bundle: sequence %d", b.Sequence)
	}
	stop()
	w.stop()

	w.keeper = memory(t)
	w.open()
	a, stop = w.start("s1")
	defer stop()
	if x2, j2 := authorities(t, a); x2 == x || j2 == j {
		t.Errorf("after a restart without keys the same authorities sign: %s %s", x2, j2)
	}
	for _, d := range []documents{signed, sign(t, a, time.Hour)} {
		if err := w.verify(d); err != nil {
			t.Error(err)
		}
	}
	if b := w.bundle(); len(b.X509) != 2 || len(b.JWT) != 2 {
		t.Errorf("%d and %d authorities, want the old and the new", len(b.X509), len(b.JWT))
	}
}

func rotate(t testing.TB, a *Authority, kind string) {
	t.Helper()
	s, err := a.Prepared(t.Context(), "test", kind)
	if err != nil {
		t.Error(err)
		return
	}
	if s, _, err = a.Activate(t.Context(), "test", kind, s.AuthorityID, false); err != nil || s.State != registry.SlotActive {
		t.Errorf("Activate() = %+v, %v", s, err)
	}
}

func TestRotate(t *testing.T) {
	w := newWorld(t, memory(t), 24*time.Hour)
	a, stop := w.start("s1")
	defer stop()
	var all []documents
	seen := map[string]bool{}
	for range 3 {
		all = append(all, sign(t, a, time.Hour))
		x, j := authorities(t, a)
		if seen[x] || seen[j] {
			t.Errorf("%s or %s was there before", x, j)
		}
		seen[x], seen[j] = true, true
		for _, kind := range []string{X509, JWT} {
			rotate(t, a, kind)
		}
	}
	for _, d := range append(all, sign(t, a, time.Hour)) {
		if err := w.verify(d); err != nil {
			t.Error(err)
		}
	}
	if _, err := a.Prepare(t.Context(), "test", "wit"); fault.KindOf(err) != fault.Invalid {
		t.Errorf("Prepare(wit) = %v", err)
	}
}

// Two servers share the bundle, not the keys.
func TestTwoServers(t *testing.T) {
	w := newWorld(t, memory(t), 24*time.Hour)
	first, stopFirst := w.start("s1")
	defer stopFirst()
	w.keeper = memory(t)
	second, stopSecond := w.start("s2")
	defer stopSecond()
	for range 3 {
		var group sync.WaitGroup
		for _, a := range []*Authority{first, second} {
			group.Go(func() {
				for _, kind := range []string{X509, JWT} {
					rotate(t, a, kind)
				}
			})
		}
		group.Wait()
		for _, a := range []*Authority{first, second} {
			if err := w.verify(sign(t, a, time.Hour)); err != nil {
				t.Error(err)
			}
		}
	}
	if b := w.bundle(); len(b.X509) != 8 || len(b.JWT) != 8 || b.Sequence != 16 {
		t.Errorf("%d and %d authorities, sequence %d; want 8, 8, 16", len(b.X509), len(b.JWT), b.Sequence)
	}
}

// An authority that is withdrawn or tainted from outside signs no more, and is
// replaced at once.
func TestWithdrawn(t *testing.T) {
	for name, change := range map[string]func(b *bundle.Bundle) *bundle.Bundle{
		"withdrawn": func(b *bundle.Bundle) *bundle.Bundle { return b.WithoutX509(b.X509[0].ASN1).WithoutJWT(b.JWT[0].KeyID) },
		"tainted": func(b *bundle.Bundle) *bundle.Bundle {
			b = b.WithX509(bundle.X509Authority{ASN1: b.X509[0].ASN1, Tainted: true})
			key := b.JWT[0]
			key.Tainted = true
			return b.WithJWT(key)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, memory(t), 24*time.Hour)
				a, stop := w.start("s1")
				defer stop()
				x, j := authorities(t, a)
				if _, err := w.reg.Update(t.Context(), "test", func(tx *registry.Tx) error {
					b, err := tx.Bundle(domain())
					if err != nil {
						return err
					}
					return tx.PutBundle(change(b))
				}); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if x2, j2 := authorities(t, a); x2 == x || j2 == j {
					t.Errorf("%s and %s still sign", x2, j2)
				}
				if err := w.verify(sign(t, a, time.Hour)); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// brokenKeeper fails as a key service does that is away (R67).
type brokenKeeper struct {
	keys.Keeper
	away *bool
	mu   *sync.Mutex
}

func (k brokenKeeper) fails() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if *k.away {
		return fault.New(fault.Unavailable, "keeper_away", "away")
	}
	return nil
}

func (k brokenKeeper) Key(ctx context.Context, id string) (keys.Key, error) {
	if err := k.fails(); err != nil {
		return keys.Key{}, err
	}
	return k.Keeper.Key(ctx, id)
}

func (k brokenKeeper) Generate(ctx context.Context, id string, t keys.Type) (keys.Key, error) {
	if err := k.fails(); err != nil {
		return keys.Key{}, err
	}
	return k.Keeper.Generate(ctx, id, t)
}

// Rotation by time alone, with the real store: no document becomes unverifiable
// before it ends, and old keys leave the bundle (R65).
func TestRotationByTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, memory(t), 30*time.Second)
		a, stop := w.start("s1")
		defer stop()
		type signed struct {
			documents
			at time.Time
		}
		var live []signed
		seen := map[string]bool{}
		// Five lives of a key, a document each second that lasts up to 5 s.
		for range 150 {
			d := sign(t, a, 5*time.Second)
			live = append(live, signed{d, time.Now()})
			x, _ := authorities(t, a)
			seen[x] = true
			for len(live) > 0 && !time.Now().Before(live[0].ends) {
				live = live[1:]
			}
			for _, s := range live {
				if err := w.verify(s.documents); err != nil {
					t.Fatalf("a document of %v, valid until %v, at %v: %v", s.at, s.ends, time.Now(), err)
				}
			}
			// A rotation cuts no document of up to a sixth of the authority's life.
			if left := time.Until(d.ends); left < 4*time.Second {
				t.Fatalf("a document lasts %v", left)
			}
			time.Sleep(time.Second)
		}
		// Each signs for 25 s of its 30: activated when the one before has 5 s left.
		if len(seen) < 6 || len(seen) > 10 {
			t.Errorf("%d authorities in 150 s", len(seen))
		}
		// Old ones leave the bundle a minute after their end.
		if b := w.bundle(); len(b.X509) > 8 || len(b.JWT) > 8 {
			t.Errorf("%d and %d authorities are left", len(b.X509), len(b.JWT))
		}
	})
}

// R67: with the keeper away, what signs goes on; when it is back, rotation catches up.
func TestKeeperAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away, mu := false, sync.Mutex{}
		w := newWorld(t, brokenKeeper{memory(t), &away, &mu}, time.Hour)
		a, stop := w.start("s1")
		defer stop()
		x, _ := authorities(t, a)
		set := func(v bool) {
			mu.Lock()
			defer mu.Unlock()
			away = v
		}
		set(true)
		time.Sleep(59 * time.Minute)
		if x2, _ := authorities(t, a); x2 != x {
			t.Errorf("another authority signs: %s", x2)
		}
		time.Sleep(2 * time.Minute) // past its end
		if _, err := a.X509(time.Now()); fault.KindOf(err) != fault.Unavailable {
			t.Errorf("an ended authority signs: %v", err)
		}
		set(false)
		time.Sleep(2 * retryMost)
		if x2, _ := authorities(t, a); x2 == x {
			t.Error("the authority was not replaced")
		}
		if err := w.verify(sign(t, a, time.Minute)); err != nil {
			t.Error(err)
		}
	})
}

// lossyKeeper makes the key and then fails, as a process does that dies between
// the two, or a key service whose answer is lost.
type lossyKeeper struct {
	keys.Keeper
	fails int
	err   error
}

func (k *lossyKeeper) Generate(ctx context.Context, id string, t keys.Type) (keys.Key, error) {
	key, err := k.Keeper.Generate(ctx, id, t)
	if k.fails > 0 && err == nil {
		k.fails--
		return keys.Key{}, k.err
	}
	return key, err
}

// R66: a start that was cut off is taken up by the next one; nothing is left over.
func TestStartCutOff(t *testing.T) {
	keeper := &lossyKeeper{Keeper: memory(t), fails: 2, err: errors.New("killed")}
	w := newWorld(t, keeper, 24*time.Hour)
	for range 2 {
		a := w.authority("s1")
		if err := a.Start(t.Context()); !errors.Is(err, keeper.err) {
			t.Fatalf("Start() = %v", err)
		}
		if _, err := a.X509(time.Now()); err == nil {
			t.Error("an authority that was not published signs")
		}
		w.stop()
		w.open()
	}
	a, stop := w.start("s1")
	defer stop()
	if err := w.verify(sign(t, a, time.Hour)); err != nil {
		t.Error(err)
	}
	if b := w.bundle(); len(b.X509) != 1 || len(b.JWT) != 1 {
		t.Errorf("%d and %d authorities", len(b.X509), len(b.JWT))
	}
}

// What fails for a passing reason ends a start only if it does not pass.
func TestStartMeetsTrouble(t *testing.T) {
	busy := fault.New(fault.Unavailable, "busy", "not now")
	for _, tt := range []struct {
		fails int
		want  error
	}{{20, nil}, {1000, busy}} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, &lossyKeeper{Keeper: memory(t), fails: tt.fails, err: busy}, 24*time.Hour)
			began := time.Now()
			err := w.authority("s1").Start(t.Context())
			if took := time.Since(began); !errors.Is(err, tt.want) || took < 10*time.Second || took > startPatience+time.Second {
				t.Errorf("Start() = %v after %v, want %v", err, took, tt.want)
			}
			w.stop()
		})
	}
}

// The authority's own certificate is what SPIRE's users expect (spire-interop §6.1).
func TestAuthorityCertificate(t *testing.T) {
	w := newWorld(t, memory(t), 24*time.Hour)
	a := w.authority("s1")
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(w.bundle().X509[0].ASN1)
	if err != nil {
		t.Fatal(err)
	}
	if life := time.Until(c.NotAfter); life > 24*time.Hour || life < 24*time.Hour-time.Minute {
		t.Errorf("life %v", life)
	}
	if back := time.Since(c.NotBefore); back < 30*time.Second || back > time.Minute {
		t.Errorf("backdated by %v", back)
	}
}

// say writes the row of a server and its roster: what it holds, and its agents,
// which hold it too but for those that lag.
func (w *world) say(server string, shared bool, held uint64, agents []string, laggards ...registry.Laggard) {
	w.t.Helper()
	row := registry.Server{ID: server, BeatAt: time.Now(), Position: store.Position{Epoch: w.reg.Position().Epoch, Revision: held}, Acknowledged: held, Laggards: laggards}
	if shared {
		row.Lease = time.Hour
	}
	var roster []uint64
	for _, a := range agents {
		roster = append(roster, registry.AgentHash(agentID(a)))
	}
	slices.Sort(roster)
	w.update(func(tx *registry.Tx) error { return errors.Join(tx.PutServer(row), tx.PutRoster(server, roster)) })
}

func agentID(name string) spiffeid.ID {
	return spiffeid.RequireFromPath(domain(), "/spire/agent/test/"+name)
}

// node admits an agent whose certificate lasts for a time.
func (w *world) node(name string, lasts time.Duration, follows bool) {
	w.t.Helper()
	w.update(func(tx *registry.Tx) error {
		return tx.PutNode(registry.Node{ID: agentID(name), AttestationType: "test", Follows: follows,
			Current: registry.Credential{Serial: "1", ExpiresAt: time.Now().Add(lasts), KeyHash: []byte("x")}})
	})
}

func (w *world) update(f func(tx *registry.Tx) error) {
	w.t.Helper()
	if _, err := w.reg.Update(context.Background(), "test", f); err != nil {
		w.t.Fatal(err)
	}
}

// R64: a key signs once every agent and server has said that it has the bundle;
// who is missing is named; what servers write about it wakes the machine.
func TestWaitsForAcknowledgements(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, memory(t), 24*time.Hour)
		w.peers = Known
		a, stop := w.start("s1")
		defer stop()
		w.node("one", 2*time.Hour, true)
		w.node("two", 2*time.Hour, true)
		w.node("gone", time.Second, true)
		time.Sleep(2 * time.Second)
		s, err := a.Prepare(t.Context(), "test", X509)
		if err != nil {
			t.Fatal(err)
		}
		missing := func(force bool) string {
			t.Helper()
			now, cancel := context.WithCancel(t.Context())
			cancel()
			_, _, err := a.Activate(now, "test", X509, s.AuthorityID, force)
			if err == nil {
				return ""
			}
			if fault.ReasonOf(err) != "authority_not_acknowledged" {
				t.Fatal(err)
			}
			return err.Error()
		}
		if text := missing(false); !strings.Contains(text, "2 do not have") || !strings.Contains(text, "/one, ") || !strings.Contains(text, "/two;") {
			t.Errorf("with nobody attached: %q", text)
		}
		here := func() uint64 { return w.reg.Position().Revision }
		w.say("s1", false, here(), []string{"one", "two"}, registry.Laggard{Agent: agentID("two").String(), Acknowledged: 1})
		if text := missing(false); !strings.Contains(text, "1 do not have") || strings.Contains(text, "/one") {
			t.Errorf("with one: %q", text)
		}
		w.say("s2", true, 1, nil)
		if text := missing(false); !strings.Contains(text, "2 do not have") || !strings.Contains(text, "s2, ") {
			t.Errorf("with a server that is behind: %q", text)
		}
		if st := a.Status(time.Now()); len(st) != 2 || len(st[1].Missing) != 2 || st[1].Next != "ready" || st[1].Server != "s1" {
			t.Errorf("status: %+v", st)
		}
		// It waits until the rows say so.
		done := make(chan error, 1)
		go func() {
			_, _, err := a.Activate(t.Context(), "test", X509, s.AuthorityID, false)
			done <- err
		}()
		w.say("s2", true, here(), []string{"two"})
		synctest.Wait()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if x, _ := authorities(t, a); x != s.AuthorityID {
			t.Errorf("%s signs", x)
		}

		// By force it goes at once, and says who was not ready.
		w.say("s2", true, here(), nil)
		w.say("s1", false, here(), []string{"one"})
		s, err = a.Prepare(t.Context(), "test", JWT)
		if err != nil {
			t.Fatal(err)
		}
		s, passed, err := a.Activate(t.Context(), "test", JWT, s.AuthorityID, true)
		if err != nil || len(passed) != 3 || s.Unready != 3 || !s.ReadyAt.IsZero() {
			t.Errorf("forced: %+v, %+v, %v", s, passed, err)
		}
	})
}

// R64: a server that joins others serves once they and their agents have its first
// key, and after a minute if one of them is silent; alone it starts at once.
func TestJoining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, memory(t), 24*time.Hour)
		w.peers = Known
		_, stop := w.start("s1") // at once: the first
		w.node("one", time.Hour, true)
		w.say("s1", true, w.reg.Position().Revision, []string{"one"})
		w.keeper = memory(t)
		join := func(server string) (took time.Duration) {
			t.Helper()
			a, began := w.authority(server), time.Now()
			done := make(chan error, 1)
			go func() { done <- a.Start(t.Context()) }()
			synctest.Wait()
			select {
			case err := <-done:
				t.Errorf("%s starts at once: %v", server, err)
			default:
			}
			if _, err := a.X509(time.Now()); fault.KindOf(err) != fault.Unavailable {
				t.Errorf("%s signs: %v", server, err)
			}
			if server == "s2" { // s1 and its agent hear of it
				time.Sleep(5 * time.Second)
				w.say("s1", true, w.reg.Position().Revision, []string{"one"})
			} else {
				time.Sleep(30 * time.Second)
				w.say("s1", true, 1, nil) // s1 lives, and is far behind
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			return time.Since(began)
		}
		if took := join("s2"); took != 5*time.Second {
			t.Errorf("s2 took %v", took)
		}
		w.keeper = memory(t)
		if took := join("s3"); took != joinWait {
			t.Errorf("s3 took %v", took)
		}
		stop()
		time.Sleep(2 * time.Minute) // the others are silent: nobody could tell the agent
		w.keeper = memory(t)
		began := time.Now()
		if err := w.authority("s4").Start(t.Context()); err != nil || time.Since(began) != 0 {
			t.Errorf("s4 alone: %v after %v", err, time.Since(began))
		}
	})
}
