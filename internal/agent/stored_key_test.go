package agent

import (
	"crypto"
	"crypto/x509"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/memkeys"
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
func testLife(t *testing.T, change func(*Config)) *life {
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
	return &life{agent: a, dir: dir, keeper: keeper}
}

// A stored SVID that cannot be used now, because the clock is wrong, is good
// again at the next start, when the clock is right: nothing of it is lost by the
// attempt to attest instead (R54, R107).
func TestStoredKeyOutlivesAWrongClock(t *testing.T) {
	for _, name := range []string{keyA, keyB} {
		t.Run(name, func(t *testing.T) {
			l := testLife(t, func(c *Config) { c.Agent.JoinTokenFile = filepath.Join(t.TempDir(), "none") })
			key, err := l.keeper.Generate(t.Context(), name, keys.ECP256)
			if err != nil {
				t.Fatal(err)
			}
			ca, now := newTestAuthority(t), time.Now()
			chain := ca.sign("/spire/agent/join_token/x", key.Public(), now.Add(time.Hour), now.Add(2*time.Hour))
			own := &credential{keyID: name, key: key, chain: chain}
			if err := l.dir.save(testDomain, own, ca.bundle); err != nil {
				t.Fatal(err)
			}
			if err := l.begin(t.Context()); err == nil {
				t.Fatal("begin() = nil with an SVID of the future and no join token")
			}
			kept, err := l.keeper.Key(t.Context(), name)
			if err != nil || !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(kept.Public()) {
				t.Errorf("the key %s of the stored SVID is gone (%v)", name, err)
			}
			if stored, _ := l.dir.load(testDomain); stored.KeyID != name || len(stored.SVID) == 0 {
				t.Errorf("stored state names the key %q", stored.KeyID)
			}
		})
	}
}
