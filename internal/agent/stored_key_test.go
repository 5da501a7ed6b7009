package agent

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/memkeys"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var testDomain = spiffeid.RequireTrustDomainFromString("example.org")

// testAuthority signs what a server would.
type testAuthority struct {
	t      *testing.T
	issuer *svid.X509Issuer
	bundle *bundle.Bundle
}

func newTestAuthority(t *testing.T) *testAuthority {
	t.Helper()
	keeper, err := new(memkeys.Config).Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	key, err := keeper.Generate(t.Context(), "ca", keys.ECP256)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	root, err := svid.SelfSignedCA(testDomain, key, now.Add(-48*time.Hour), now.Add(48*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := svid.NewX509Issuer([][]byte{root}, key)
	if err != nil {
		t.Fatal(err)
	}
	return &testAuthority{t, issuer, &bundle.Bundle{TrustDomain: testDomain, Sequence: 1, X509: []bundle.X509Authority{{ASN1: root}}}}
}

func (a *testAuthority) sign(path string, public crypto.PublicKey, begin, end time.Time) [][]byte {
	a.t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		a.t.Fatal(err)
	}
	key, err := svid.ParsePublicKey(spki)
	if err != nil {
		a.t.Fatal(err)
	}
	id := spiffeid.RequireFromPath(testDomain, path)
	prepared, err := a.issuer.Prepare(svid.Leaf{ID: id, Key: key, NotBefore: begin, NotAfter: end})
	if err != nil {
		a.t.Fatal(err)
	}
	issued, err := prepared.Issue()
	if err != nil {
		a.t.Fatal(err)
	}
	return issued.Chain
}

// testLife is a life that can begin, with an agent that is configured but does not run.
func testLife(t *testing.T, ca *testAuthority, change func(*Config)) *life {
	t.Helper()
	cfg := Default()
	cfg.Agent.TrustDomain = config.TrustDomain{TrustDomain: testDomain}
	cfg.Agent.ServerAddress, cfg.Agent.ServerPort = "127.0.0.1", 1
	cfg.Agent.DataDir, cfg.Agent.SocketPath = filepath.Join(t.TempDir(), "data"), filepath.Join(t.TempDir(), "s")
	cfg.Agent.InsecureBootstrap = true
	cfg.Plugins = []config.Plugin{
		{Type: "KeyManager", Name: "memory"}, {Type: "NodeAttestor", Name: "join_token"}, {Type: "WorkloadAttestor", Name: "unix"},
	}
	if change != nil {
		change(&cfg)
	}
	a, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := openDataDir(cfg.Agent.DataDir, a.log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	keeper, err := new(memkeys.Config).Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	link, err := serverlink.New(a.linkConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { link.Close() })
	l := newLife(t.Context(), a, dir, keeper, link)
	a.bundle.Store(ca.bundle)
	return l
}

// A stored SVID that is not good now, because the clock is wrong, is kept with its
// key, and used: whether it is good the server knows (R54, R107).
func TestStoredSVIDOutlivesAWrongClock(t *testing.T) {
	for _, name := range []string{keyA, keyB} {
		for when, begin := range map[string]time.Duration{"future": time.Hour, "past": -3 * time.Hour} {
			t.Run(name+" "+when, func(t *testing.T) {
				ca, now := newTestAuthority(t), time.Now()
				l := testLife(t, ca, nil)
				key, err := l.keeper.Generate(t.Context(), name, keys.ECP256)
				if err != nil {
					t.Fatal(err)
				}
				chain := ca.sign("/spire/agent/join_token/x", key.Public(), now.Add(begin), now.Add(begin+time.Hour))
				if err := l.dir.save(testDomain, &credential{keyID: name, key: key, chain: chain}, ca.bundle); err != nil {
					t.Fatal(err)
				}
				again := newLife(t.Context(), l.agent, l.dir, l.keeper, l.link)
				if own := l.agent.own.Load(); own == nil || own.keyID != name {
					t.Fatalf("the stored SVID is not used: %+v", own)
				}
				if again.nextKey() == name {
					t.Error("its key is the next to be replaced")
				}
				if stored, _ := l.dir.load(testDomain); stored.KeyID != name || len(stored.SVID) == 0 {
					t.Errorf("stored state names the key %q", stored.KeyID)
				}
			})
		}
	}
}

// What the trust domain has dropped is not trusted again because of an old
// configured bundle or an old state file; what the server tells later wins.
func TestDroppedRootsStayDropped(t *testing.T) { // R55
	old, current := newTestAuthority(t), newTestAuthority(t)
	both := old.bundle.Clone()
	both.X509 = append(both.X509, current.bundle.X509...)
	path := filepath.Join(t.TempDir(), "bundle.pem")
	if err := os.WriteFile(path, old.bundle.MarshalPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	configured := func(c *Config) { c.Agent.InsecureBootstrap, c.Agent.TrustBundlePath = false, path }
	l := testLife(t, &testAuthority{bundle: both}, configured)
	if err := l.dir.save(testDomain, nil, both); err != nil {
		t.Fatal(err)
	}
	rolledBack, err := os.ReadFile(filepath.Join(l.dir.path, stateFile))
	if err != nil {
		t.Fatal(err)
	}
	l.setBundle(current.bundle)
	if _, err := l.Do(t.Context(), agentid.Job{Kind: agentid.Save}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Do(t.Context(), agentid.Job{Kind: agentid.Bootstrap}); fault.ReasonOf(err) != agentid.ReasonSuperseded {
		t.Errorf("the configured bundle: %v", err)
	}
	if err := os.WriteFile(filepath.Join(l.dir.path, stateFile), rolledBack, 0o600); err != nil {
		t.Fatal(err)
	}
	fresh := func() *dataDir { return &dataDir{path: l.dir.path, log: l.dir.log, dropped: new(dropped)} }
	if _, b := fresh().load(testDomain); b == nil || len(b.X509) != 1 || !bytes.Equal(b.X509[0].ASN1, current.bundle.X509[0].ASN1) {
		t.Errorf("the old state file: %d roots", len(b.X509))
	}
	l.setBundle(both) // such as a server that was restored
	if _, err := l.Do(t.Context(), agentid.Job{Kind: agentid.Save}); err != nil {
		t.Fatal(err)
	}
	if _, b := fresh().load(testDomain); b == nil || len(b.X509) != 2 {
		t.Error("what the server tells later is not taken")
	}
	if err := os.WriteFile(filepath.Join(l.dir.path, droppedFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, b := fresh().load(testDomain); b == nil {
		t.Error("a torn list of dropped roots costs the state")
	}
}

// What was dropped stays so whatever the clock shows, and if it is more than fits,
// what ends first is forgotten.
func TestDroppedForgetsNothingByTheClock(t *testing.T) { // R55, R107
	key := func(i int) bundle.JWTAuthority {
		return bundle.JWTAuthority{KeyID: fmt.Sprint(i), PublicKey: fmt.Append(nil, "key ", i), ExpiresAt: time.Unix(int64(i), 0)}
	}
	all := &bundle.Bundle{TrustDomain: testDomain}
	for i := 1; i <= maxDropped+2; i++ {
		all.JWT = append(all.JWT, key(i))
	}
	var d dropped
	d.learn(all, &bundle.Bundle{TrustDomain: testDomain}) // each has ended long ago
	d.learn(&bundle.Bundle{TrustDomain: testDomain}, &bundle.Bundle{TrustDomain: testDomain})
	if left := d.without(all).JWT; len(left) != 2 || left[0].KeyID != "1" || left[1].KeyID != "2" {
		t.Errorf("%d keys are not known as dropped", len(left))
	}
}
