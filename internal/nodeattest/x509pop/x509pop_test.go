package x509pop

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/attesttest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// issued is a certificate with its key.
type issued struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue makes a certificate; parent nil signs itself.
func issue(t testing.TB, parent *issued, key crypto.Signer, edit func(*x509.Certificate)) *issued {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(0x0a1b2c), Subject: pkix.Name{CommonName: "node-1"}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
	}
	if edit != nil {
		edit(c)
	}
	signer, above := key, c
	if parent != nil {
		signer, above = parent.key, parent.cert
	}
	der, err := x509.CreateCertificate(rand.Reader, c, above, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &issued{cert, key}
}

func authority(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.Subject.CommonName, c.IsCA = name, true
		c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	}
}

// pki is a root, an intermediate and where the root lies as a file.
type pki struct {
	root, middle *issued
	rootPath     string
}

func newPKI(t testing.TB) pki {
	t.Helper()
	p := pki{root: issue(t, nil, newKey(t), authority("root")), rootPath: filepath.Join(t.TempDir(), "root.pem")}
	p.middle = issue(t, p.root, newKey(t), authority("middle"))
	writePEM(t, p.rootPath, p.root.cert)
	return p
}

func writePEM(t testing.TB, path string, certs ...*x509.Certificate) {
	t.Helper()
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	if err := os.WriteFile(path, out, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (p pki) leaf(t testing.TB, edit func(*x509.Certificate)) *issued {
	return issue(t, p.middle, newKey(t), edit)
}

func (p pki) prover(leaf *issued) *Prover {
	return &Prover{chain: [][]byte{leaf.cert.Raw, p.middle.cert.Raw}, key: leaf.key}
}

func env() nodeattest.Env {
	return nodeattest.Env{TrustDomain: td, Roots: func() []*x509.Certificate { return nil }, Log: slog.New(slog.DiscardHandler)}
}

func open(t testing.TB, c *Config, e nodeattest.Env) nodeattest.Verifier {
	t.Helper()
	v, err := c.Open(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func attest(t testing.TB, v nodeattest.Verifier, p nodeattest.Prover) (nodeattest.Evidence, error) {
	t.Helper()
	payload, err := p.Payload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v.Verify(t.Context(), payload, p.Answer)
}

func wantReason(t *testing.T, err error, reason string) {
	t.Helper()
	if fault.ReasonOf(err) != reason {
		t.Errorf("got %v (%s), want %s", err, fault.ReasonOf(err), reason)
	}
	if k := fault.KindOf(err); k != fault.Invalid && k != fault.Denied {
		t.Errorf("%v is of kind %v", err, k)
	}
}

// noAnswer fails the test when a node is asked that should have been refused before.
func noAnswer(t *testing.T) nodeattest.Challenger {
	return func(context.Context, []byte) ([]byte, error) {
		t.Error("the node was asked for a signature")
		return nil, errors.New("no answer")
	}
}

func TestContract(t *testing.T) {
	for name, key := range map[string]func(t *testing.T) crypto.Signer{
		"P-256": func(t *testing.T) crypto.Signer { return newKey(t) },
		"P-521": func(t *testing.T) crypto.Signer {
			key, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
			return key
		},
		"RSA": func(t *testing.T) crypto.Signer {
			key, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				t.Fatal(err)
			}
			return key
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := key(t)
			attesttest.Run(t, func(t *testing.T) attesttest.Pair {
				p := newPKI(t)
				return attesttest.Pair{Name: Name, Verifier: open(t, &Config{CABundlePath: p.rootPath}, env()), Prover: p.prover(issue(t, p.middle, k, nil))}
			})
		})
	}
}

func TestEvidence(t *testing.T) {
	p := newPKI(t)
	v := open(t, &Config{CABundlePaths: []string{p.rootPath}}, env())
	leaf := p.leaf(t, uris("x509pop://example.org/rack/r1", "x509pop://other.org/rack/r2", "https://example.org/rack/r3"))
	e, err := attest(t, v, p.prover(leaf))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range e.Selectors {
		got = append(got, s.Type+":"+s.Value)
	}
	want := []string{
		"x509pop:ca:fingerprint:" + fingerprint(p.middle.cert), "x509pop:ca:fingerprint:" + fingerprint(p.root.cert),
		"x509pop:san:rack:r1", "x509pop:serialnumber:0a1b2c", "x509pop:subject:cn:node-1",
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("selectors %q, want %q", got, want)
	}
	if e.Path != "/"+fingerprint(leaf.cert) || !e.CanReattest || e.FirstUse || e.Outside || len(e.Holder) != 32 {
		t.Errorf("Verify() = %+v", e)
	}
}

func uris(texts ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		for _, text := range texts {
			u, err := url.Parse(text)
			if err != nil {
				panic(err)
			}
			c.URIs = append(c.URIs, u)
		}
	}
}

func TestBadChains(t *testing.T) {
	p := newPKI(t)
	v := open(t, &Config{CABundlePath: p.rootPath}, env())
	good := p.leaf(t, nil)
	middle := p.middle.cert.Raw
	payload := func(chain ...[]byte) []byte {
		b, err := encode(attestation{chain})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	alone := func(edit func(*x509.Certificate)) []byte { return payload(p.leaf(t, edit).cert.Raw, middle) }
	foreign := issue(t, nil, newKey(t), authority("foreign"))
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	huge := hugeKey{weak.PublicKey}
	huge.N = new(big.Int).SetBit(new(big.Int).Lsh(big.NewInt(1), 16383), 0, 1)

	for id, c := range map[string]struct {
		payload []byte
		reason  string
	}{
		"A9 no certificates":       {[]byte(`{"certificates":[]}`), "x509pop_chain_length"},
		"A9 null":                  {[]byte(`{"certificates":null}`), "x509pop_chain_length"},
		"A9 no member":             {[]byte(`{}`), "x509pop_chain_length"},
		"A9 garbage":               {payload([]byte("garbage")), "x509pop_certificate_malformed"},
		"A9 PEM":                   {payload(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: good.cert.Raw})), "x509pop_certificate_malformed"},
		"A9 trailing bytes":        {payload(append(slices.Clone(good.cert.Raw), 0), middle), "x509pop_certificate_malformed"},
		"A9 unknown member":        {[]byte(`{"certificates":["AA=="],"x":1}`), "x509pop_malformed"},
		"A9 twice":                 {[]byte(`{"certificates":["AA=="],"certificates":["AA=="]}`), "x509pop_malformed"},
		"A9 base64 with lines":     {[]byte(`{"certificates":["AA\n=="]}`), "x509pop_malformed"},
		"A10 101 intermediates":    {payload(append([][]byte{good.cert.Raw}, slices.Repeat([][]byte{[]byte("x")}, 101)...)...), "x509pop_chain_length"},
		"A10 1000 intermediates":   {payload(append([][]byte{good.cert.Raw}, slices.Repeat([][]byte{[]byte("x")}, 1000)...)...), "x509pop_chain_length"},
		"A10 5 intermediates":      {payload(good.cert.Raw, middle, middle, middle, middle, middle), "x509pop_chain_length"},
		"A10 too many bytes":       {payload(bytes.Repeat([]byte("x"), 40<<10)), "x509pop_malformed"},
		"A11 RSA 16384 leaf":       {payload(issue(t, p.middle, signerFor{p.middle.key, &huge.PublicKey}, nil).cert.Raw, middle), "x509pop_key_size"},
		"A11 RSA 16384 above":      {payload(good.cert.Raw, issue(t, p.root, signerFor{p.root.key, &huge.PublicKey}, authority("huge")).cert.Raw), "x509pop_key_size"},
		"A12 expired":              {alone(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), "x509pop_certificate_refused"},
		"A12 not yet valid":        {alone(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) }), "x509pop_certificate_refused"},
		"A12 unknown root":         {payload(issue(t, foreign, newKey(t), nil).cert.Raw), "x509pop_certificate_refused"},
		"A12 root shown by itself": {payload(issue(t, foreign, newKey(t), nil).cert.Raw, foreign.cert.Raw), "x509pop_certificate_refused"},
		"A12 CA leaf":              {payload(middle), "x509pop_certificate_refused"},
		"A12 not for signatures":   {alone(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), "x509pop_certificate_refused"},
		"A12 no usage":             {alone(func(c *x509.Certificate) { c.KeyUsage = 0 }), "x509pop_certificate_refused"},
		"A12 without its issuer":   {payload(good.cert.Raw), "x509pop_certificate_refused"},
		"A12 signed by a leaf":     {payload(issue(t, good, newKey(t), nil).cert.Raw, good.cert.Raw, middle), "x509pop_certificate_refused"},
		"A12 unknown critical part": {alone(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}), "x509pop_certificate_refused"},
	} {
		t.Run(id, func(t *testing.T) {
			_, err := v.Verify(t.Context(), c.payload, noAnswer(t))
			wantReason(t, err, c.reason)
		})
	}
}

// hugeKey is a public key whose private half nobody has.
type hugeKey struct{ rsa.PublicKey }

// signerFor signs with one key and claims another, to make certificates for keys
// that do not exist.
type signerFor struct {
	crypto.Signer
	public crypto.PublicKey
}

func (s signerFor) Public() crypto.PublicKey { return s.public }

func TestBadAnswers(t *testing.T) { // R26
	p := newPKI(t)
	v := open(t, &Config{CABundlePath: p.rootPath}, env())
	leaf := p.leaf(t, nil)
	prover := p.prover(leaf)
	payload, _ := prover.Payload(t.Context())

	var question, recorded []byte
	if _, err := v.Verify(t.Context(), payload, func(ctx context.Context, q []byte) ([]byte, error) {
		answer, err := prover.Answer(ctx, q)
		question, recorded = q, answer
		return answer, err
	}); err != nil {
		t.Fatal(err)
	}
	other := &Prover{key: newKey(t)}
	var small big.Int
	edit := func(change func(*ecdsaAnswer)) nodeattest.Challenger {
		return func(ctx context.Context, q []byte) ([]byte, error) {
			b, err := prover.Answer(ctx, q)
			if err != nil {
				return nil, err
			}
			a, err := parseECDSAAnswer(b)
			if err != nil {
				return nil, err
			}
			change(&a)
			return encode(answer{ECDSA: &a})
		}
	}
	text := func(s string) nodeattest.Challenger {
		return func(context.Context, []byte) ([]byte, error) { return []byte(s), nil }
	}
	const failed, malformed = "x509pop_proof_failed", "x509pop_malformed"
	for id, c := range map[string]struct {
		ask    nodeattest.Challenger
		reason string
	}{
		"A13 over another nonce": {func(ctx context.Context, _ []byte) ([]byte, error) { return prover.Answer(ctx, question) }, failed},
		"A13 A14 recorded":       {func(context.Context, []byte) ([]byte, error) { return recorded, nil }, failed},
		"A13 other key":          {other.Answer, failed},
		"own nonce changed":      {edit(func(a *ecdsaAnswer) { a.Nonce[0] ^= 1 }), failed},
		"zero signature":         {edit(func(a *ecdsaAnswer) { a.R, a.S = []byte{0}, []byte{0} }), failed},
		"signature of n":         {edit(func(a *ecdsaAnswer) { a.R = elliptic.P256().Params().N.Bytes() }), failed},
		"oversized signature":    {edit(func(a *ecdsaAnswer) { a.R = small.Lsh(big.NewInt(1), 300).Bytes() }), malformed},
		"short nonce":            {edit(func(a *ecdsaAnswer) { a.Nonce = a.Nonce[:31] }), malformed},
		"the other kind":         {text(`{"rsa_signature":{"nonce":"AA==","signature":"AA=="}}`), malformed},
		"both kinds":             {text(`{"rsa_signature":{"nonce":"AA==","signature":"AA=="},"ecdsa_signature":{"nonce":"AA==","r":"AA==","s":"AA=="}}`), malformed},
		"neither kind":           {text(`{}`), malformed},
		"nothing":                {text(``), malformed},
		"one byte too much":      {text(strings.Repeat(" ", maxAnswer+1)), malformed},
		"the challenge":          {func(_ context.Context, q []byte) ([]byte, error) { return q, nil }, malformed},
	} {
		t.Run(id, func(t *testing.T) {
			_, err := v.Verify(t.Context(), payload, c.ask)
			wantReason(t, err, c.reason)
		})
	}
	t.Run("A14 the node goes away", func(t *testing.T) {
		gone := errors.New("gone")
		if _, err := v.Verify(t.Context(), payload, func(context.Context, []byte) ([]byte, error) { return nil, gone }); !errors.Is(err, gone) {
			t.Errorf("Verify() = %v, want the connection's error", err)
		}
	})
}

func TestChallenges(t *testing.T) { // what a false server may ask
	prover := &Prover{key: newKey(t)}
	for name, text := range map[string]string{
		"empty":       ``,
		"not JSON":    `x`,
		"for RSA":     `{"rsa_signature":{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}`,
		"short nonce": `{"ecdsa_signature":{"nonce":"AAAA"}}`,
		"large":       `{"ecdsa_signature":{"nonce":"` + strings.Repeat("A", 2048) + `"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			if answer, err := prover.Answer(t.Context(), []byte(text)); fault.ReasonOf(err) != "x509pop_malformed" {
				t.Errorf("Answer() = %q, %v, want x509pop_malformed", answer, err)
			}
		})
	}
	t.Run("the other kind is null", func(t *testing.T) { // a peer may write both members
		_, err := prover.Answer(t.Context(), []byte(`{"rsa_signature":null,"ecdsa_signature":{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}`))
		if err != nil {
			t.Error(err)
		}
	})
}

func TestSubjects(t *testing.T) {
	p := newPKI(t)
	byName := open(t, &Config{CABundlePath: p.rootPath, AgentPathTemplate: "/x509pop/cn/{{ .Subject.CommonName }}"}, env())
	for id, c := range map[string]struct{ cn, reason string }{
		"A15 slash":       {"a/b", "agent_path_invalid"},
		"A15 dots":        {"..", "agent_path_invalid"},
		"A15 newline":     {"a\nb", "x509pop_subject_invalid"},
		"A15 64 KiB":      {strings.Repeat("a", 20<<10), "x509pop_subject_invalid"}, // the largest that the payload's bound lets in
		"A15 empty":       {"", "agent_path_invalid"},
		"A15 space":       {"a b", "agent_path_invalid"},
		"A15 not ASCII":   {"ä", "agent_path_invalid"},
		"A15 traversal":   {"../../server", "agent_path_invalid"},
		"A15 a good name": {"web-1.example.org", ""},
	} {
		t.Run(id, func(t *testing.T) {
			e, err := attest(t, byName, p.prover(p.leaf(t, func(x *x509.Certificate) { x.Subject.CommonName = c.cn })))
			if c.reason == "" {
				if err != nil || e.Path != "/cn/"+c.cn {
					t.Errorf("Verify() = %+v, %v", e, err)
				}
				return
			}
			wantReason(t, err, c.reason)
		})
	}
}

func TestSANPairs(t *testing.T) { // A17, R43
	good := map[string]string{
		"x509pop://example.org/a/b":       "san:a:b",
		"x509pop://example.org/a/b:c":     "san:a:b:c",
		"x509pop://example.org/a/b/c":     "san:a:b/c",
		"x509pop://example.org/a/b%3Ac":   "san:a:b:c", // the same value, written otherwise
		"x509pop://example.org/a/b%20c":   "san:a:b c",
		"x509pop://example.org/a/x%2Fy":   "san:a:x/y",
		"x509pop://example.org/a/b:c:d/e": "san:a:b:c:d/e",
	}
	bad := []string{"x509pop://example.org/a:b/c", "x509pop://example.org/a%3Ab/c", "x509pop://example.org/a%2Fb/c", "x509pop://example.org/a",
		"x509pop://example.org/a/", "x509pop://example.org//b", "x509pop://example.org", "x509pop://example.org/a/b?c", "x509pop://example.org/a/b#c",
		"x509pop://u@example.org/a/b", "x509pop://example.org/a/b%0Ac", "x509pop://example.org/a/%FF", "x509pop://example.org/a/" + strings.Repeat("b", 256)}
	p := newPKI(t)
	v := open(t, &Config{CABundlePath: p.rootPath}, env())
	for uri, want := range good {
		t.Run(uri, func(t *testing.T) {
			e, err := attest(t, v, p.prover(p.leaf(t, uris(uri))))
			if err != nil {
				t.Fatal(err)
			}
			found := 0
			for _, s := range e.Selectors {
				if strings.HasPrefix(s.Value, "san:") {
					found++
					if s.Value != want {
						t.Errorf("selector %q, want %q", s.Value, want)
					}
				}
			}
			if found != 1 {
				t.Errorf("%d selectors, want 1", found)
			}
		})
	}
	for _, uri := range bad {
		t.Run(uri, func(t *testing.T) {
			_, err := attest(t, v, p.prover(p.leaf(t, uris(uri))))
			wantReason(t, err, "x509pop_san_invalid")
		})
	}
}

func TestSPIFFEMode(t *testing.T) {
	svidRoot := issue(t, nil, newKey(t), func(c *x509.Certificate) {
		authority("root")(c)
		uris("spiffe://example.org")(c)
	})
	foreignRoot := issue(t, nil, newKey(t), func(c *x509.Certificate) {
		authority("foreign")(c)
		uris("spiffe://other.org")(c)
	})
	e := env()
	e.Roots = func() []*x509.Certificate { return []*x509.Certificate{svidRoot.cert} }
	slash := "/spire-exchange"
	for name, config := range map[string]*Config{"default": {Mode: "spiffe"}, "without slash": {Mode: "spiffe", SVIDPrefix: &slash}} {
		v := open(t, config, e)
		for id, c := range map[string]struct {
			root   *issued
			uris   []string
			reason string
			path   string
		}{
			"good":                {svidRoot, []string{"spiffe://example.org/spire-exchange/rack/n1"}, "", "/rack/n1"},
			"A16 two SPIFFE URIs": {svidRoot, []string{"spiffe://example.org/spire-exchange/a", "spiffe://example.org/spire-exchange/b"}, "x509pop_svid_refused", ""},
			"A16 no URI":          {svidRoot, nil, "x509pop_svid_refused", ""},
			"A16 foreign domain":  {svidRoot, []string{"spiffe://other.org/spire-exchange/a"}, "x509pop_svid_refused", ""},
			"A16 foreign root":    {foreignRoot, []string{"spiffe://example.org/spire-exchange/a"}, "x509pop_certificate_refused", ""},
			"A16 prefix trick":    {svidRoot, []string{"spiffe://example.org/spire-exchangeX/a"}, "x509pop_svid_prefix", ""},
			"A16 the prefix":      {svidRoot, []string{"spiffe://example.org/spire-exchange"}, "x509pop_svid_prefix", ""},
			"A16 elsewhere":       {svidRoot, []string{"spiffe://example.org/web"}, "x509pop_svid_prefix", ""},
		} {
			t.Run(name+" "+id, func(t *testing.T) {
				leaf := issue(t, c.root, newKey(t), uris(c.uris...))
				got, err := attest(t, v, &Prover{chain: [][]byte{leaf.cert.Raw}, key: leaf.key})
				if c.reason == "" {
					if err != nil || got.Path != c.path {
						t.Errorf("Verify() = %+v, %v, want %s", got, err, c.path)
					}
					return
				}
				wantReason(t, err, c.reason)
			})
		}
	}
	t.Run("R16 an agent's SVID with every prefix allowed", func(t *testing.T) {
		empty := ""
		v := open(t, &Config{Mode: "spiffe", SPIFFEPrefix: &empty}, e)
		for uri, reason := range map[string]string{"spiffe://example.org/spire/agent/join_token/a": "x509pop_svid_prefix", "spiffe://example.org/web": ""} {
			leaf := issue(t, svidRoot, newKey(t), uris(uri))
			if _, err := attest(t, v, &Prover{chain: [][]byte{leaf.cert.Raw}, key: leaf.key}); (err != nil) != (reason != "") || err != nil && fault.ReasonOf(err) != reason {
				t.Errorf("%s: %v, want %q", uri, err, reason)
			}
		}
	})
}

func TestServerConfig(t *testing.T) {
	p := newPKI(t)
	n, bits, text := -1, 1024, "/x"
	for name, c := range map[string]struct {
		config Config
		want   string
	}{
		"nothing":           {Config{}, "ca_bundle_path"},
		"mode":              {Config{Mode: "x", CABundlePath: p.rootPath}, "mode"},
		"both paths":        {Config{CABundlePath: p.rootPath, CABundlePaths: []string{p.rootPath}}, "exclude"},
		"both prefixes":     {Config{Mode: "spiffe", SPIFFEPrefix: &text, SVIDPrefix: &text}, "two names"},
		"bundle in spiffe":  {Config{Mode: "spiffe", CABundlePath: p.rootPath}, "own bundle"},
		"prefix outside":    {Config{CABundlePath: p.rootPath, SVIDPrefix: &text}, "mode spiffe only"},
		"reserved prefix":   {Config{Mode: "spiffe", SVIDPrefix: new("/spire/agent")}, "/spire/"},
		"prefix not a path": {Config{Mode: "spiffe", SVIDPrefix: new("a//b")}, "not a path"},
		"intermediates":     {Config{CABundlePath: p.rootPath, MaxIntermediates: &n}, "max_intermediates"},
		"RSA size":          {Config{CABundlePath: p.rootPath, MaxRSAKeySize: &bits}, "max_rsa_key_size"},
		"client address":    {Config{CABundlePath: p.rootPath, VerifyClientIP: true}, "verify_client_ip is not offered"},
		"no such file":      {Config{CABundlePath: p.rootPath + "x"}, "cannot be used"},
		"outside":           {Config{CABundlePath: p.rootPath, AgentPathTemplate: "/cn/{{ .Subject.CommonName }}"}, "agent_path_outside"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.config.Open(t.Context(), env())
			if e, ok := errors.AsType[*fault.Error](err); !ok || !strings.Contains(fmt.Sprint(err, e.Remedy), c.want) {
				t.Errorf("Open() = %v, want it to say %q", err, c.want)
			}
		})
	}
	t.Run("explicitly outside", func(t *testing.T) { // D2
		v := open(t, &Config{CABundlePath: p.rootPath, AgentPathTemplate: "/cn/{{ .Subject.CommonName }}", AgentPathOutside: true}, env())
		e, err := attest(t, v, p.prover(p.leaf(t, nil)))
		if err != nil || e.Path != "/cn/node-1" || !e.Outside {
			t.Errorf("Verify() = %+v, %v", e, err)
		}
	})
}

func TestAgentFiles(t *testing.T) {
	p := newPKI(t)
	leaf := p.leaf(t, nil)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writePEM(t, at("leaf.pem"), leaf.cert)
	writePEM(t, at("middle.pem"), p.middle.cert)
	writePEM(t, at("chain.pem"), leaf.cert, p.middle.cert)
	key := func(name, kind string, der []byte) {
		if err := os.WriteFile(at(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pkcs8, _ := x509.MarshalPKCS8PrivateKey(leaf.key)
	sec1, _ := x509.MarshalECPrivateKey(leaf.key.(*ecdsa.PrivateKey))
	foreign, _ := x509.MarshalPKCS8PrivateKey(newKey(t))
	key("pkcs8.pem", "PRIVATE KEY", pkcs8)
	key("sec1.pem", "EC PRIVATE KEY", sec1)
	key("foreign.pem", "PRIVATE KEY", foreign)
	key("encrypted.pem", "ENCRYPTED PRIVATE KEY", pkcs8)
	key("broken.pem", "PRIVATE KEY", pkcs8[:20])
	v := open(t, &Config{CABundlePath: p.rootPath}, env())
	for name, c := range map[string]AgentConfig{
		"PKCS#8": {PrivateKeyPath: at("pkcs8.pem"), CertificatePath: at("leaf.pem"), IntermediatesPath: at("middle.pem")},
		"SEC 1":  {PrivateKeyPath: at("sec1.pem"), CertificatePath: at("chain.pem")},
	} {
		t.Run(name, func(t *testing.T) {
			prover, err := c.Prover("")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := attest(t, v, prover); err != nil {
				t.Error(err)
			}
			if s := fmt.Sprintf("%v %+v %#v %s", prover, prover, prover, prover); strings.Contains(s, "big.Int") || strings.Count(s, "x509pop.Prover") != 4 { // R112
				t.Errorf("the prover prints as %q", s)
			}
		})
	}
	for name, c := range map[string]struct {
		config AgentConfig
		want   string
	}{
		"nothing":            {AgentConfig{}, "must be set"},
		"endpoint socket":    {AgentConfig{SPIFFEEndpointSocket: "unix:///x"}, "spiffe_endpoint_socket is not offered"},
		"no file":            {AgentConfig{PrivateKeyPath: at("none"), CertificatePath: at("leaf.pem")}, "no such file"},
		"another's key":      {AgentConfig{PrivateKeyPath: at("foreign.pem"), CertificatePath: at("leaf.pem")}, "not the key"},
		"encrypted key":      {AgentConfig{PrivateKeyPath: at("encrypted.pem"), CertificatePath: at("leaf.pem")}, "encrypted"},
		"broken key":         {AgentConfig{PrivateKeyPath: at("broken.pem"), CertificatePath: at("leaf.pem")}, "cannot be read"},
		"key as certificate": {AgentConfig{PrivateKeyPath: at("pkcs8.pem"), CertificatePath: at("pkcs8.pem")}, "something else"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := c.config.Prover(""); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Prover() = %v, want it to say %q", err, c.want)
			}
		})
	}
}

// TestWire holds the messages to the names that SPIRE's agents and servers use.
func TestWire(t *testing.T) {
	for name, c := range map[string]struct {
		message any
		want    string
	}{
		"attestation":     {attestation{[][]byte{{1}}}, `{"certificates":["AQ=="]}`},
		"challenge RSA":   {challenge{RSA: &nonce{[]byte{1}}}, `{"rsa_signature":{"nonce":"AQ=="}}`},
		"challenge ECDSA": {challenge{ECDSA: &nonce{[]byte{1}}}, `{"ecdsa_signature":{"nonce":"AQ=="}}`},
		"answer RSA":      {answer{RSA: &rsaAnswer{[]byte{1}, []byte{2}}}, `{"rsa_signature":{"nonce":"AQ==","signature":"Ag=="}}`},
		"answer ECDSA":    {answer{ECDSA: &ecdsaAnswer{[]byte{1}, []byte{2}, []byte{3}}}, `{"ecdsa_signature":{"nonce":"AQ==","r":"Ag==","s":"Aw=="}}`},
	} {
		if got, err := json.Marshal(c.message); err != nil || string(got) != c.want {
			t.Errorf("%s: %s, %v, want %s", name, got, err, c.want)
		}
	}
}

// The root that "openssl req -x509" makes does not say what its key may be used for.
func TestRootWithoutKeyUsage(t *testing.T) {
	p := newPKI(t)
	p.root = issue(t, nil, newKey(t), func(c *x509.Certificate) { authority("root")(c); c.KeyUsage = 0 })
	p.middle = issue(t, p.root, newKey(t), authority("middle"))
	writePEM(t, p.rootPath, p.root.cert)
	v := open(t, &Config{CABundlePath: p.rootPath}, env())
	if _, err := attest(t, v, p.prover(p.leaf(t, nil))); err != nil {
		t.Error(err)
	}
	other := issue(t, nil, newKey(t), func(c *x509.Certificate) { authority("root")(c); c.KeyUsage = x509.KeyUsageCRLSign })
	writePEM(t, p.rootPath, other.cert)
	if _, err := (&Config{CABundlePath: p.rootPath}).Open(t.Context(), env()); err == nil {
		t.Error("a root that may not sign certificates is accepted")
	}
}
