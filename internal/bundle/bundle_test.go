package bundle

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/fault"
)

func domain() spiffeid.TrustDomain { return spiffeid.RequireTrustDomainFromString("example.org") }

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// newRoot makes a self-signed authority, spoiled by edit.
func newRoot(t testing.TB, key crypto.Signer, edit func(c *x509.Certificate)) []byte {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
	}
	if edit != nil {
		edit(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func spkiOf(t testing.TB, pub crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func newJWT(t testing.TB, id string) JWTAuthority {
	t.Helper()
	return JWTAuthority{KeyID: id, PublicKey: spkiOf(t, newKey(t).Public()), ExpiresAt: time.Unix(2_000_000_000, 0).UTC()}
}

// R75: the sequence grows by one exactly when the content changes, and the
// bundle that was there does not change.
func TestChanges(t *testing.T) {
	a, b := newRoot(t, newKey(t), nil), newRoot(t, newKey(t), nil)
	j, k := newJWT(t, "j"), newJWT(t, "k")
	other := newJWT(t, "j")
	at := &Bundle{TrustDomain: domain(), Sequence: 5}
	for i, step := range []struct {
		name    string
		change  func(b *Bundle) *Bundle
		changes bool
		x, j    int
	}{
		{"add a", func(b *Bundle) *Bundle { return b.WithX509(X509Authority{ASN1: a}) }, true, 1, 0},
		{"add a again", func(b *Bundle) *Bundle { return b.WithX509(X509Authority{ASN1: a}) }, false, 1, 0},
		{"add b", func(x *Bundle) *Bundle { return x.WithX509(X509Authority{ASN1: b}) }, true, 2, 0},
		{"taint a", func(b *Bundle) *Bundle { return b.WithX509(X509Authority{ASN1: a, Tainted: true}) }, true, 2, 0},
		{"add a, tainted already", func(b *Bundle) *Bundle { return b.WithX509(X509Authority{ASN1: a}) }, false, 2, 0},
		{"add j", func(b *Bundle) *Bundle { return b.WithJWT(j) }, true, 2, 1},
		{"add j again", func(b *Bundle) *Bundle { return b.WithJWT(j) }, false, 2, 1},
		{"replace j", func(b *Bundle) *Bundle { return b.WithJWT(other) }, true, 2, 1},
		{"add k", func(b *Bundle) *Bundle { return b.WithJWT(k) }, true, 2, 2},
		{"remove a", func(b *Bundle) *Bundle { return b.WithoutX509(a) }, true, 1, 2},
		{"remove a again", func(b *Bundle) *Bundle { return b.WithoutX509(a) }, false, 1, 2},
		{"remove j", func(b *Bundle) *Bundle { return b.WithoutJWT("j") }, true, 1, 1},
		{"remove nobody", func(b *Bundle) *Bundle { return b.WithoutJWT("nobody") }, false, 1, 1},
	} {
		before := at.Clone()
		next := step.change(at)
		if !at.Equal(before) || at.Sequence != before.Sequence {
			t.Errorf("%d %s: the bundle itself changed", i, step.name)
		}
		want := at.Sequence
		if step.changes {
			want++
		}
		if next.Sequence != want || len(next.X509) != step.x || len(next.JWT) != step.j || next.Equal(at) == step.changes {
			t.Errorf("%d %s: sequence %d, %d and %d authorities; want %d, %d and %d", i, step.name, next.Sequence, len(next.X509), len(next.JWT), want, step.x, step.j)
		}
		at = next
	}
}

// What is written is read again, by us and by go-spiffe, and has only the
// members that the standard defines.
func TestMarshal(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b := &Bundle{
		TrustDomain: domain(), RefreshHint: 5 * time.Minute, Sequence: 18446744073709551615,
		X509: []X509Authority{{ASN1: newRoot(t, newKey(t), nil)}, {ASN1: newRoot(t, rsaKey, nil)}, {ASN1: newRoot(t, p384, nil)}},
		JWT:  []JWTAuthority{newJWT(t, "j1"), {KeyID: "j2", PublicKey: spkiOf(t, rsaKey.Public())}, {KeyID: "j3", PublicKey: spkiOf(t, p384.Public())}},
	}
	data := b.Marshal()
	back, err := Parse(domain(), data)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b.JWT {
		b.JWT[i].ExpiresAt = time.Time{} // a document has no member for it
	}
	if !back.Equal(b) || back.Sequence != b.Sequence {
		t.Errorf("read back %+v, want %+v", back, b)
	}
	theirs, err := spiffebundle.Parse(domain(), data)
	if err != nil {
		t.Fatal(err)
	}
	if hint, _ := theirs.RefreshHint(); len(theirs.X509Authorities()) != 3 || len(theirs.JWTAuthorities()) != 3 || hint != b.RefreshHint {
		t.Errorf("go-spiffe reads %d and %d authorities, hint %v", len(theirs.X509Authorities()), len(theirs.JWTAuthorities()), hint)
	}
	var document struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(data, &document); err != nil {
		t.Fatal(err)
	}
	for _, k := range document.Keys {
		want := map[string]bool{"use": true, "kty": true}
		members := []string{"kid"}
		if k["use"] == "x509-svid" {
			members = []string{"x5c"}
		}
		if k["kty"] == "EC" {
			members = append(members, "crv", "x", "y")
		} else {
			members = append(members, "n", "e")
		}
		for _, m := range members {
			want[m] = true
		}
		for m := range k {
			if !want[m] {
				t.Errorf("member %q in %v", m, k)
			}
			delete(want, m)
		}
		if len(want) > 0 {
			t.Errorf("missing %v in %v", want, k)
		}
	}
	if empty := (&Bundle{TrustDomain: domain(), Sequence: 3}).Marshal(); string(empty) != `{"keys":[],"spiffe_sequence":3}` {
		t.Errorf("empty bundle: %s", empty)
	}
	jwks := string(b.MarshalJWKS())
	if strings.Contains(jwks, `"use"`) || strings.Contains(jwks, `"x5c"`) || strings.Count(jwks, `"kid"`) != 3 {
		t.Errorf("JWKS %s", jwks)
	}
	if got := string((&Bundle{}).MarshalJWKS()); got != `{"keys":[]}` {
		t.Errorf("empty JWKS: %s", got)
	}
	if der := b.X509DER(); !bytes.Equal(der, bytes.Join([][]byte{b.X509[0].ASN1, b.X509[1].ASN1, b.X509[2].ASN1}, nil)) {
		t.Error("X509DER is not the certificates in order")
	}
	if roots, err := x509.ParseCertificates(b.X509DER()); err != nil || len(roots) != len(b.Roots()) {
		t.Errorf("%d roots, %v", len(roots), err)
	}
	if hashes := b.KeyHashes(); len(hashes) != 4 || !hashes[sha256.Sum256(b.JWT[1].PublicKey)] || !hashes[sha256.Sum256(spkiOf(t, p384.Public()))] {
		t.Errorf("%d key hashes", len(hashes)) // one RSA and one P-384 key are there twice
	}
	if key, ok := b.JWTKey("j2"); !ok || !rsaKey.PublicKey.Equal(key) {
		t.Error("JWTKey(j2)")
	}
	if _, ok := b.JWTKey("nobody"); ok {
		t.Error("JWTKey(nobody)")
	}
}

// entryOf is the JWK of a root, to be spoiled.
func entryOf(t testing.TB, der []byte) map[string]any {
	t.Helper()
	b := Bundle{TrustDomain: domain(), X509: []X509Authority{{ASN1: der}}}
	var d struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(b.Marshal(), &d); err != nil {
		t.Fatal(err)
	}
	return d.Keys[0]
}

func jwtEntry(t testing.TB, id string) map[string]any {
	t.Helper()
	b := Bundle{TrustDomain: domain(), JWT: []JWTAuthority{newJWT(t, id)}}
	var d struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(b.Marshal(), &d); err != nil {
		t.Fatal(err)
	}
	return d.Keys[0]
}

func with(m map[string]any, name string, v any) map[string]any {
	m = maps.Clone(m)
	if v == nil {
		delete(m, name)
	} else {
		m[name] = v
	}
	return m
}

func encode(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestCorpusB holds Parse to the rows of corpus B that concern parsing.
func TestCorpusB(t *testing.T) {
	good, root, jwt := entryOf(t, newRoot(t, newKey(t), nil)), newRoot(t, newKey(t), nil), jwtEntry(t, "j")
	entry := entryOf(t, root)
	document := func(keys ...map[string]any) string {
		return encode(t, map[string]any{"keys": keys, "spiffe_sequence": 1})
	}
	plain := document(good)
	many := func(n int) string {
		list := make([]map[string]any, n)
		for i := range list {
			list[i] = map[string]any{"kty": "x"}
		}
		return document(list...)
	}
	member := func(m string) string { return plain[:len(plain)-1] + "," + m + "}" }
	sequence := func(s string) string { return strings.Replace(plain, `"spiffe_sequence":1`, `"spiffe_sequence":`+s, 1) }
	reject := map[string]string{
		"B1 not JSON":                 "x",
		"B1 array":                    "[]",
		"B1 string":                   `"x"`,
		"B1 empty":                    "",
		"B2 no keys":                  "{}",
		"B2 keys null":                `{"keys":null}`,
		"B2 keys object":              `{"keys":{}}`,
		"B2 KEYS":                     `{"KEYS":[]}`,
		"B2 key is no object":         `{"keys":[1]}`,
		"B4 keys twice":               member(`"keys":[]`),
		"B5 sequence twice":           member(`"spiffe_sequence":1`),
		"B6 sequence -1":              sequence("-1"),
		"B6 sequence 1.5":             sequence("1.5"),
		"B6 sequence string":          sequence(`"7"`),
		"B6 sequence 2^64":            sequence("18446744073709551616"),
		"B6 sequence 1e3":             sequence("1e3"),
		"B6 sequence null":            sequence("null"),
		"B23 same kid, other key":     document(jwt, jwtEntry(t, "j")),
		"B24 JWT and WIT share a kid": document(jwt, with(jwtEntry(t, "j"), "use", "wit-svid")),
		"B26 private EC key":          document(good, with(jwt, "d", "AA")),
		"B26 private RSA key":         document(good, map[string]any{"kty": "RSA", "use": "other", "n": "AA", "e": "AQAB", "p": "AA"}),
		"B29 201 keys":                many(201),
		"B29 10,000 keys":             many(10000),
		"B30 1 MiB and a byte":        `{"keys":[]}` + strings.Repeat(" ", MaxDocument),
		"B32 truncated":               plain[:len(plain)/2],
		"B32 trailing bytes":          plain + "x",
		"B32 byte order mark":         "\ufeff" + plain,
		"B32 UTF-16":                  "\xff\xfe{\x00}\x00",
		"B33 nesting":                 member(`"x":` + strings.Repeat("[", 100000)),
		"member of a key twice":       strings.Replace(plain, `"kty"`, `"kty":"EC","kty"`, 1),
	}
	for name, text := range reject {
		t.Run(name, func(t *testing.T) {
			if b, err := Parse(domain(), []byte(text)); fault.KindOf(err) != fault.Invalid {
				t.Errorf("Parse() = %+v, %v; want invalid", b, err)
			}
		})
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	x5c := func(der []byte) []string { return []string{base64.StdEncoding.EncodeToString(der)} }
	spoiled := func(edit func(c *x509.Certificate)) map[string]any { return entryOf(t, newRoot(t, newKey(t), edit)) }
	x5cText := x5c(root)[0]
	// Each entry is left out alone: the good one beside it stays.
	ignored := map[string]map[string]any{
		"B11 no use":                        with(entry, "use", nil),
		"B12 unknown use":                   with(entry, "use", "foo"),
		"B12 use in upper case":             with(entry, "use", "X509-SVID"),
		"B12 sig":                           with(jwt, "use", "sig"),
		"B12 use a number":                  with(entry, "use", 1),
		"B13 x509-svid with kid":            with(entry, "kid", "x"),
		"B14 no x5c":                        with(entry, "x5c", nil),
		"B14 empty x5c":                     with(entry, "x5c", []string{}),
		"B14 x5c a string":                  with(entry, "x5c", x5cText),
		"B16 not a CA":                      spoiled(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }),
		"B16 no keyCertSign":                spoiled(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }),
		"B17 key differs":                   with(entry, "x", good["x"]),
		"B17 no key members":                with(entry, "kty", nil),
		"B18 base64url":                     with(entry, "x5c", []string{strings.NewReplacer("+", "-", "/", "_").Replace(x5cText) + "-_"}),
		"B18 newline":                       with(entry, "x5c", []string{x5cText[:64] + "\n" + x5cText[64:]}),
		"B18 no padding":                    with(entry, "x5c", []string{x5cText + "="}),
		"B19 CA's ID has a path":            spoiled(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ca"}} }),
		"B22 jwt-svid without kid":          with(jwtEntry(t, "k"), "kid", nil),
		"B22 kid a number":                  with(jwtEntry(t, "k"), "kid", 1),
		"B25 oct":                           {"kty": "oct", "use": "jwt-svid", "kid": "k", "k": "AAAA"},
		"B27 RSA 512":                       rsaEntry(sized(512), "AQAB"),
		"B27 RSA 1024":                      rsaEntry(small.N, "AQAB"),
		"B27 RSA 16384":                     rsaEntry(sized(16384), "AQAB"),
		"B27 even exponent":                 rsaEntry(sized(2048), "BA"),
		"B27 exponent of 9 bytes":           rsaEntry(sized(2048), "AQAAAAAAAAAB"),
		"B27 off curve":                     with(jwtEntry(t, "k"), "y", good["y"]),
		"B27 x too long":                    with(jwtEntry(t, "k"), "x", jwt["x"].(string)+"AA"),
		"B28 unknown curve":                 with(jwtEntry(t, "k"), "crv", "secp256k1"),
		"B28 OKP":                           {"kty": "OKP", "crv": "Ed25519", "use": "jwt-svid", "kid": "k", "x": strings.Repeat("A", 43)},
		"T-X509-2 ML-DSA":                   {"kty": "AKP", "alg": "ML-DSA-44", "use": "x509-svid", "pub": "AA"},
		"kty missing":                       with(jwtEntry(t, "k"), "kty", nil),
		"WIT key (not carried in this one)": with(jwtEntry(t, "k"), "use", "wit-svid"),
	}
	for name, e := range ignored {
		t.Run(name, func(t *testing.T) {
			b, err := Parse(domain(), []byte(document(e, good)))
			if err != nil {
				t.Fatal(err)
			}
			if len(b.X509) != 1 || len(b.JWT) != 0 {
				t.Errorf("%d and %d authorities, want the good one alone", len(b.X509), len(b.JWT))
			}
		})
	}
	accept := map[string]struct {
		text string
		x, j int
	}{
		"B3 empty":                  {`{"keys":[]}`, 0, 0},
		"B15 two certificates":      {document(with(entry, "x5c", []string{x5cText, "junk"})), 1, 0},
		"B16 no key usage":          {document(spoiled(func(c *x509.Certificate) { c.KeyUsage = 0 })), 1, 0}, // above us: RFC 5280 allows it
		"B20 another trust domain":  {document(spoiled(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "foreign.test"}} })), 1, 0},
		"B21 expired":               {document(spoiled(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })), 1, 0},
		"B34 unknown members":       {member(`"x_foo":{"keys":[]}`), 1, 0},
		"B34 unknown member of key": {document(with(entry, "x5t", "AA")), 1, 0},
		"one root twice":            {document(good, good), 1, 0},
		"200 keys":                  {many(200), 0, 0},
		"both":                      {document(good, jwt, entry), 2, 1},
		"no sequence":               {encode(t, map[string]any{"keys": []any{good}}), 1, 0},
	}
	for name, c := range accept {
		t.Run(name, func(t *testing.T) {
			b, err := Parse(domain(), []byte(c.text))
			if err != nil {
				t.Fatal(err)
			}
			if len(b.X509) != c.x || len(b.JWT) != c.j {
				t.Errorf("%d and %d authorities, want %d and %d", len(b.X509), len(b.JWT), c.x, c.j)
			}
		})
	}
	for text, want := range map[string]time.Duration{
		"300": 5 * time.Minute, "1": time.Second, "0": 0, "-5": 0, "1e3": 0, `"60"`: 0, "null": 0, "1.5": 0,
		"1000000000000000000": 24 * time.Hour, "18446744073709551615": 24 * time.Hour, "18446744073709551616": 0,
	} {
		t.Run("B10 hint "+text, func(t *testing.T) {
			if b, err := Parse(domain(), []byte(member(`"spiffe_refresh_hint":`+text))); err != nil || b.RefreshHint != want {
				t.Errorf("hint %v, %v; want %v", b.RefreshHint, err, want)
			}
		})
	}
}

func sized(bits int) *big.Int {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return n.SetBit(n, 0, 1)
}

func rsaEntry(n *big.Int, e string) map[string]any {
	return map[string]any{"kty": "RSA", "use": "jwt-svid", "kid": "k", "n": base64.RawURLEncoding.EncodeToString(n.Bytes()), "e": e}
}

// B38, B39: the file that trust begins with holds authorities and nothing else.
func TestParsePEM(t *testing.T) {
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	root, second := newRoot(t, newKey(t), nil), newRoot(t, newKey(t), nil)
	private, err := x509.MarshalPKCS8PrivateKey(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	leaf := newRoot(t, newKey(t), func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature })
	one, two := block("CERTIFICATE", root), block("CERTIFICATE", second)
	lines := strings.Count(one, "\n")
	for name, c := range map[string]struct {
		text, reason string
		line         int
	}{
		"B38 private key":        {one + block("PRIVATE KEY", private), "bundle_invalid", lines + 1},
		"B38 leaf":               {one + two + block("CERTIFICATE", leaf), "bundle_invalid", 2*lines + 1},
		"B38 text before":        {"hello\n" + one, "bundle_invalid", 1},
		"B38 text between":       {one + "\nhello\n" + two, "bundle_invalid", lines + 2},
		"B38 text after":         {one + "hello", "bundle_invalid", lines + 1},
		"B38 headers":            {one + strings.Replace(two, "-----\n", "-----\nA: b\n\n", 1), "bundle_invalid", lines + 1},
		"B38 truncated":          {one + two[:len(two)/2], "bundle_invalid", lines + 1},
		"B38 broken, then sound": {strings.Replace(one, "M", "!", 1) + two, "bundle_invalid", 1},
		"B38 not a certificate":  {one + block("CERTIFICATE", []byte("x")), "bundle_invalid", lines + 1},
		"B38 DER":                {string(root), "bundle_invalid", 1},
		"B39 empty":              {"", "bundle_empty", 0},
		"B39 white space":        {" \r\n\n", "bundle_empty", 0},
		"over 1 MiB":             {strings.Repeat("\n", MaxDocument+1), "bundle_invalid", 0},
		"too many":               {strings.Repeat(one, MaxKeys+1), "bundle_invalid", MaxKeys*lines + 1},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParsePEM([]byte(c.text))
			if fault.ReasonOf(err) != c.reason {
				t.Fatalf("ParsePEM() = %d certificates, %v", len(got), err)
			}
			if c.line > 0 && !strings.Contains(err.Error(), fmt.Sprintf("line %d ", c.line)) {
				t.Errorf("%v; want line %d", err, c.line)
			}
			if strings.Contains(err.Error(), base64.StdEncoding.EncodeToString(private)[:32]) {
				t.Error("the error quotes the key")
			}
		})
	}
	for name, text := range map[string]string{"plain": one + two, "blank lines": "\n" + one + "\n\n" + two + "\n", "CRLF": strings.ReplaceAll(one+two, "\n", "\r\n")} {
		got, err := ParsePEM([]byte(text))
		if err != nil || len(got) != 2 || !bytes.Equal(got[0], root) || !bytes.Equal(got[1], second) {
			t.Errorf("%s: %d certificates, %v", name, len(got), err)
		}
	}
	b := Bundle{X509: []X509Authority{{ASN1: root}, {ASN1: second}}}
	if string(b.MarshalPEM()) != one+two {
		t.Error("MarshalPEM")
	}
}

func TestParseJWKS(t *testing.T) {
	ec, rsaKey := newKey(t), func() string { // as Kubernetes writes it
		n := base64.RawURLEncoding.EncodeToString(append([]byte{0xc0}, bytes.Repeat([]byte{1}, 255)...))
		return `{"use":"sig","kty":"RSA","kid":"r","alg":"RS256","n":"` + n + `","e":"AQAB"}`
	}()
	point, err := ec.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	ecKey := fmt.Sprintf(`{"kty":"EC","kid":"e","crv":"P-256","x":%q,"y":%q}`,
		base64.RawURLEncoding.EncodeToString(point[1:33]), base64.RawURLEncoding.EncodeToString(point[33:]))
	for name, c := range map[string]struct{ keys, want string }{
		"both":            {rsaKey + "," + ecKey, "e r"},
		"one for another": {rsaKey + "," + strings.Replace(ecKey, `"kid"`, `"use":"enc","kid"`, 1), "r"},
		"one without id":  {rsaKey + "," + strings.Replace(ecKey, `"kid":"e",`, "", 1), "r"},
		"unknown kinds":   {rsaKey + `,{"kty":"oct","kid":"o","k":"x"},7`, "r"},
		"weak":            {`{"kty":"RSA","kid":"r","n":"AQAB","e":"AQAB"}`, ""},
		"twice":           {rsaKey + "," + rsaKey, ""},
		"private":         {rsaKey + `,{"kty":"EC","kid":"p","d":"x"}`, ""},
		"none":            {"", ""},
	} {
		t.Run(name, func(t *testing.T) {
			keys, err := ParseJWKS([]byte(`{"keys":[` + c.keys + `]}`))
			if got := strings.Join(slices.Sorted(maps.Keys(keys)), " "); got != c.want || (err == nil) != (got != "") {
				t.Errorf("ParseJWKS() = %q, %v, want %q", got, err, c.want)
			}
		})
	}
}

// FuzzParse: what is accepted is written and read again to the same bundle, and
// every authority in it can be used.
func FuzzParse(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte) {
		if keys, err := ParseJWKS(data); (err == nil) != (len(keys) > 0) || err != nil && fault.KindOf(err) != fault.Invalid {
			t.Fatalf("ParseJWKS() = %v, %v", keys, err)
		}
		b, err := Parse(domain(), data)
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Fatal(err)
			}
			return
		}
		if len(b.Roots()) != len(b.X509) {
			t.Fatal("an authority that cannot be parsed")
		}
		for _, a := range b.JWT {
			if _, ok := b.JWTKey(a.KeyID); !ok {
				t.Fatalf("key %q cannot be used", a.KeyID)
			}
		}
		again, err := Parse(domain(), b.Marshal())
		if err != nil || !again.Equal(b) || again.Sequence != b.Sequence {
			t.Fatalf("read again: %+v, %v; want %+v", again, err, b)
		}
	})
}

// FuzzParsePEM: what is accepted is written and read again to the same.
func FuzzParsePEM(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := ParsePEM(data)
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Fatal(err)
			}
			return
		}
		var b Bundle
		for _, der := range got {
			b.X509 = append(b.X509, X509Authority{ASN1: der})
		}
		again, err := ParsePEM(b.MarshalPEM())
		if err != nil || !bytes.Equal(bytes.Join(again, nil), b.X509DER()) {
			t.Fatal(err)
		}
	})
}

// R69: a revoked key does not come back, in whatever certificate, until nothing
// under it can be valid.
func TestRevoked(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Truncate(time.Second)
	certificate := func(serial int64) X509Authority {
		template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return X509Authority{ASN1: der}
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(spki)
	b := (&Bundle{}).WithX509(certificate(1)).WithJWT(JWTAuthority{KeyID: "a", PublicKey: spki})
	revoked := b.WithRevoked(Revocation{KeyHash: hash, Until: now.Add(time.Hour)})
	if len(revoked.X509) != 0 || len(revoked.JWT) != 0 || revoked.Sequence != b.Sequence+1 || len(b.X509) != 1 {
		t.Errorf("revoked: %+v", revoked)
	}
	for name, back := range map[string]*Bundle{
		"the same certificate": revoked.WithX509(certificate(1)), "another": revoked.WithX509(certificate(2)),
		"a tainted one": revoked.WithX509(X509Authority{ASN1: certificate(1).ASN1, Tainted: true}),
		"a JWT key":     revoked.WithJWT(JWTAuthority{KeyID: "b", PublicKey: spki}), "too early": revoked.Forgotten(now.Add(time.Hour)).WithX509(certificate(1)),
	} {
		if !back.Equal(revoked) || back.Sequence != revoked.Sequence {
			t.Errorf("%s: %+v", name, back)
		}
	}
	if n := len(revoked.Forgotten(now.Add(time.Hour + 1)).Revoked); n != 0 {
		t.Errorf("%d revocations are remembered for ever", n)
	}
	longer := revoked.WithRevoked(Revocation{KeyHash: hash}).WithRevoked(Revocation{KeyHash: hash, Until: now})
	if len(longer.Revoked) != 1 || !longer.Revoked[0].Until.IsZero() || longer.Sequence != revoked.Sequence {
		t.Errorf("revoked again: %+v", longer)
	}
}
