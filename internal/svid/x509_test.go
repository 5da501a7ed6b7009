package svid

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/plastron/plastron/internal/fault"
)

var update = flag.Bool("update", false, "write the golden files anew")

func newEC(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newRSA(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func publicKey(t testing.TB, signer crypto.Signer) PublicKey {
	t.Helper()
	csr, err := NewCSR(signer)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ParseCSR(csr)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// authority is a self-signed CA of example.org and its issuer.
type authority struct {
	key    crypto.Signer
	der    []byte
	root   *x509.Certificate
	issuer *X509Issuer
}

func newAuthority(t testing.TB, key crypto.Signer, now time.Time) authority {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	der, err := SelfSignedCA(td, key, now.Add(-Backdate), now.Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := NewX509Issuer([][]byte{der}, key)
	if err != nil {
		t.Fatal(err)
	}
	return authority{key, der, root, issuer}
}

func (a authority) issue(t testing.TB, leaf Leaf) X509 {
	t.Helper()
	p, err := a.issuer.Prepare(leaf)
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func leafOf(id string, key PublicKey, now time.Time, dns ...string) Leaf {
	return Leaf{ID: spiffeid.RequireFromString(id), Key: key, DNSNames: dns, NotBefore: now.Add(-Backdate), NotAfter: now.Add(time.Hour)}
}

// TestTBSEqualsCryptoX509 compares what is assembled here, byte for byte, with
// what crypto/x509 makes of the same template (design §7).
func TestTBSEqualsCryptoX509(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	cas := []authority{
		newAuthority(t, newEC(t, elliptic.P256()), now),
		newAuthority(t, newEC(t, elliptic.P384()), now),
		newAuthority(t, newRSA(t, 2048), now),
	}
	keys := []PublicKey{
		publicKey(t, newEC(t, elliptic.P256())), publicKey(t, newEC(t, elliptic.P384())), publicKey(t, newRSA(t, 2048)),
	}
	random := mathrand.New(mathrand.NewPCG(1, 2))
	for range 200 {
		ca := cas[random.IntN(len(cas))]
		ca.issuer.notAfter = time.Date(9000, 1, 1, 0, 0, 0, 0, time.UTC) // so that both forms of time occur
		leaf := Leaf{ID: spiffeid.RequireFromString("spiffe://example.org" + strings.Repeat("/segment", 1+random.IntN(40))),
			Key: keys[random.IntN(len(keys))], NotBefore: now}
		leaf.NotAfter = now.Add(time.Duration(1+random.IntN(60*365*24)) * time.Hour)
		for range random.IntN(5) {
			leaf.DNSNames = append(leaf.DNSNames, []string{"a.example.org", "*.example.org", "x_y.example", strings.Repeat("a", 63) + ".b", "b"}[random.IntN(5)])
		}
		p, err := ca.issuer.Prepare(leaf)
		if err != nil {
			t.Fatal(err)
		}
		got, err := p.Issue()
		if err != nil {
			t.Fatal(err)
		}
		_, bits, err := splitSPKI(leaf.Key.SPKI)
		if err != nil {
			t.Fatal(err)
		}
		subject := pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}
		if len(leaf.DNSNames) > 0 && len(leaf.DNSNames[0]) <= 64 {
			subject.CommonName = leaf.DNSNames[0]
		}
		template := &x509.Certificate{
			SerialNumber: p.serial, Subject: subject, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
			ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			SubjectKeyId: keyIdentifier(bits), DNSNames: leaf.DNSNames, URIs: []*url.URL{leaf.ID.URL()},
		}
		der, err := x509.CreateCertificate(rand.Reader, template, ca.root, leaf.Key.Key, ca.key)
		if err != nil {
			t.Fatal(err)
		}
		want, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p.tbs, want.RawTBSCertificate) {
			t.Fatalf("TBS differs for %v\ngot  %x\nwant %x", leaf, p.tbs, want.RawTBSCertificate)
		}
		// The signature is not verified when issuing; here it is.
		c, err := x509.ParseCertificate(got.Chain[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := c.CheckSignatureFrom(ca.root); err != nil {
			t.Fatalf("signature: %v", err)
		}
	}
}

func TestIssueOnce(t *testing.T) {
	now := time.Now()
	ca := newAuthority(t, newEC(t, elliptic.P256()), now)
	p, err := ca.issuer.Prepare(leafOf("spiffe://example.org/a", publicKey(t, newEC(t, elliptic.P256())), now))
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	var mu sync.Mutex
	issued := 0
	for range 16 {
		group.Go(func() {
			_, err := p.Issue()
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				issued++
			} else if fault.ReasonOf(err) != "already_issued" {
				t.Errorf("Issue() = %v", err)
			}
		})
	}
	group.Wait()
	if issued != 1 {
		t.Errorf("issued %d times, want once", issued)
	}
}

// R8: a leaf ends no later than any certificate above it.
func TestNotAfterCapped(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	root := newAuthority(t, newEC(t, elliptic.P256()), now)
	key := newEC(t, elliptic.P256())
	intermediate := intermediateCA(t, root, key, "spiffe://example.org", now.Add(2*time.Hour))
	issuer, err := NewX509Issuer([][]byte{intermediate, root.der}, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf := leafOf("spiffe://example.org/a", publicKey(t, newEC(t, elliptic.P256())), now)
	for _, c := range []struct{ ask, want time.Duration }{
		{time.Hour, time.Hour}, {2 * time.Hour, 2 * time.Hour}, {3 * time.Hour, 2 * time.Hour}, {time.Hour + 999*time.Millisecond, time.Hour},
	} {
		leaf.NotAfter = now.Add(c.ask)
		p, err := issuer.Prepare(leaf)
		if err != nil {
			t.Fatal(err)
		}
		got, err := p.Issue()
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := x509.ParseCertificate(got.Chain[0])
		if err != nil {
			t.Fatal(err)
		}
		if want := now.Add(c.want); !got.NotAfter.Equal(want) || !parsed.NotAfter.Equal(want) || !p.NotAfter().Equal(want) {
			t.Errorf("asked for %v: ends %v, want %v", c.ask, got.NotAfter, want)
		}
		if len(got.Chain) != 2 || !bytes.Equal(got.Chain[1], intermediate) {
			t.Errorf("chain has %d certificates, want leaf and intermediate without the root", len(got.Chain))
		}
	}
	leaf.NotAfter = leaf.NotBefore
	if _, err := issuer.Prepare(leaf); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("Prepare(empty lifetime) = %v", err)
	}
}

func TestPrepareRefuses(t *testing.T) {
	now := time.Now()
	ca := newAuthority(t, newEC(t, elliptic.P256()), now)
	key := publicKey(t, newEC(t, elliptic.P256()))
	for name, c := range map[string]struct {
		leaf   Leaf
		reason string
	}{
		"no path":                 {leafOf("spiffe://example.org", key, now), "spiffe_id_no_path"},
		"too long":                {leafOf("spiffe://example.org/"+strings.Repeat("a", 2048), key, now), "spiffe_id_invalid"},
		"C36 key of an authority": {leafOf("spiffe://example.org/a", publicKey(t, ca.key), now), "public_key_invalid"},
		"no key":                  {leafOf("spiffe://example.org/a", PublicKey{}, now), "public_key_invalid"},
		"DNS name with space":     {leafOf("spiffe://example.org/a", key, now, "a b"), "dns_name_invalid"},
		"DNS name with NUL":       {leafOf("spiffe://example.org/a", key, now, "a\x00b"), "dns_name_invalid"},
		"empty DNS name":          {leafOf("spiffe://example.org/a", key, now, ""), "dns_name_invalid"},
		"101 DNS names":           {leafOf("spiffe://example.org/a", key, now, strings.Split(strings.Repeat("a,", 100)+"a", ",")...), "dns_name_invalid"},
	} {
		if _, err := ca.issuer.Prepare(c.leaf); fault.ReasonOf(err) != c.reason {
			t.Errorf("%s: Prepare() = %v, want reason %s", name, err, c.reason)
		}
	}
}

// R6: the lint finds each single deviation of the bytes to be signed.
func TestLintCatches(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	ca := newAuthority(t, newEC(t, elliptic.P256()), now)
	leaf := leafOf("spiffe://example.org/a", publicKey(t, newEC(t, elliptic.P256())), now, "a.example.org")
	p, err := ca.issuer.Prepare(leaf)
	if err != nil {
		t.Fatal(err)
	}
	serial := contentOf(t, mustDER(t, p.serial)) // with the zero in front that some numbers need
	serialAt := bytes.Index(p.tbs, serial)
	subjectAt := bytes.Index(p.tbs, []byte("SPIRE"))
	skidAt := bytes.Index(p.tbs, []byte(oidSubjectKeyID)) + 5
	missed := 0
	for at := range p.tbs {
		for bit := range 8 {
			tbs := bytes.Clone(p.tbs)
			tbs[at] ^= 1 << bit
			if ca.issuer.lint(tbs, &p.leaf) == nil {
				// Random or constant values that the lint does not know: the serial number's
				// bits, the subject's names, the key identifier.
				inSerial := at >= serialAt && at < serialAt+len(serial)
				inSubject := at > subjectAt-30 && at < subjectAt+40
				inKeyID := at >= skidAt && at < skidAt+22
				if !inSerial && !inSubject && !inKeyID {
					t.Errorf("bit %d of byte %d (%#x) flipped: the lint passes", bit, at, p.tbs[at])
				}
				missed++
			}
		}
	}
	if missed == 0 {
		t.Error("no flip passed at all: the offsets above are wrong")
	}
}

// R7
func TestSerialNumbers(t *testing.T) {
	seen := map[string]bool{}
	var or big.Int
	for range 20000 {
		s, err := newSerial()
		if err != nil || s.Sign() <= 0 || s.BitLen() > 127 || seen[s.String()] {
			t.Fatalf("serial %v, %v", s, err)
		}
		seen[s.String()] = true
		or.Or(&or, s)
	}
	if or.BitLen() != 127 {
		t.Errorf("%d bits vary, want 127", or.BitLen())
	}
}

func intermediateCA(t testing.TB, parent authority, key crypto.Signer, id string, notAfter time.Time) []byte {
	t.Helper()
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "intermediate"}, NotBefore: parent.root.NotBefore, NotAfter: notAfter,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{u},
	}, parent.root, key.Public(), parent.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// RG31: for every feature of an entry that shows in a certificate, openssl and
// go-spiffe accept the leaf with its intermediates against the bundle.
func TestOthersAccept(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("openssl is not installed")
	}
	now := time.Now()
	type keyPair struct {
		name string
		key  crypto.Signer
	}
	leafKeys := []keyPair{{"P-256", newEC(t, elliptic.P256())}, {"P-384", newEC(t, elliptic.P384())}, {"RSA", newRSA(t, 2048)}}
	for _, caKey := range []keyPair{{"P-256", newEC(t, elliptic.P256())}, {"P-384", newEC(t, elliptic.P384())}, {"RSA", newRSA(t, 2048)}} {
		root := newAuthority(t, caKey.key, now)
		subKey := newEC(t, elliptic.P256())
		sub := intermediateCA(t, root, subKey, "spiffe://example.org", now.Add(20*time.Hour))
		below, err := NewX509Issuer([][]byte{sub, root.der}, subKey)
		if err != nil {
			t.Fatal(err)
		}
		for chain, issuer := range map[string]*X509Issuer{"root": root.issuer, "intermediate": below} {
			for _, leafKey := range leafKeys {
				for name, leaf := range map[string]Leaf{
					"plain":       leafOf("spiffe://example.org/a", publicKey(t, leafKey.key), now),
					"DNS names":   leafOf("spiffe://example.org/a/b", publicKey(t, leafKey.key), now, "a.example.org", "*.example.org", "b"),
					"long name":   leafOf("spiffe://example.org/a", publicKey(t, leafKey.key), now, strings.Repeat("a", 63)+".example.org"),
					"longest ID":  leafOf("spiffe://example.org/"+strings.Repeat("a", 2048-len("spiffe://example.org/")), publicKey(t, leafKey.key), now),
					"fresh agent": leafOf("spiffe://example.org/spire/agent/join_token/0123", publicKey(t, leafKey.key), now),
				} {
					t.Run(fmt.Sprintf("%s CA/%s/%s leaf/%s", caKey.name, chain, leafKey.name, name), func(t *testing.T) {
						p, err := issuer.Prepare(leaf)
						if err != nil {
							t.Fatal(err)
						}
						got, err := p.Issue()
						if err != nil {
							t.Fatal(err)
						}
						opensslVerify(t, openssl, root.der, got.Chain, true)
						bundle := x509bundle.FromX509Authorities(leaf.ID.TrustDomain(), []*x509.Certificate{root.root})
						if id, _, err := x509svid.ParseAndVerify(got.Chain, bundle); err != nil || id != leaf.ID {
							t.Errorf("go-spiffe: %v, %v", id, err)
						}
						// R9: validators 30 s behind and ahead.
						for _, skew := range []time.Duration{-30 * time.Second, 0, 30 * time.Second} {
							id, err := VerifyX509(got.Chain, []*x509.Certificate{root.root}, leaf.ID.TrustDomain(), now.Add(skew))
							if err != nil || id != leaf.ID {
								t.Errorf("VerifyX509 with a clock off by %v: %v, %v", skew, id, err)
							}
						}
					})
				}
			}
		}
	}
}

func opensslVerify(t *testing.T, openssl string, root []byte, chain [][]byte, strict bool) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, certificates ...[]byte) string {
		var b bytes.Buffer
		for _, der := range certificates {
			if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	args := []string{"verify", "-purpose", "sslserver", "-CAfile", write("root.pem", root)}
	if strict {
		args = append(args, "-x509_strict")
	}
	if len(chain) > 1 {
		args = append(args, "-untrusted", write("chain.pem", chain[1:]...))
	}
	out, err := exec.Command(openssl, append(args, write("leaf.pem", chain[0]))...).CombinedOutput()
	if err != nil {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
}

// The profile of the authority itself (X509-3.2, X509-4.3-h, RG28).
func TestSelfSignedCA(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	key := newEC(t, elliptic.P256())
	a, b := newAuthority(t, key, now), newAuthority(t, key, now)
	c := a.root
	if !c.IsCA || c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(c.ExtKeyUsage) != 0 ||
		len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://example.org" || len(c.AuthorityKeyId) != 0 ||
		c.Subject.String() != "SERIALNUMBER="+c.SerialNumber.String()+",O=SPIFFE,C=US" || !extension(c, "2.5.29.15").Critical {
		t.Errorf("CA profile: %v %v", c.Subject, c.KeyUsage)
	}
	if bytes.Equal(a.root.RawSubject, b.root.RawSubject) {
		t.Error("two authorities have one subject")
	}
	id, err := AuthorityID(key.Public())
	if err != nil || id != fmt.Sprintf("%x", c.SubjectKeyId) || id != a.issuer.AuthorityID() {
		t.Errorf("AuthorityID() = %s, %v", id, err)
	}
	// T-ID-2: legal in SPIFFE, unreadable for Go programs.
	td := spiffeid.RequireTrustDomainFromString("foo..bar")
	if _, err := SelfSignedCA(td, key, now, now.Add(time.Hour)); fault.ReasonOf(err) != "trust_domain_unusable" {
		t.Errorf("SelfSignedCA(foo..bar) = %v", err)
	}
}

// RG31: the bytes that are signed, for each feature of an entry that shows in a
// certificate. A change of these files is a change of the profile.
func TestGolden(t *testing.T) {
	// A fixed point on P-256 (its base point) stands for authority and leaf.
	point, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), basePoint(elliptic.P256().Params()))
	if err != nil {
		t.Fatal(err)
	}
	spki := spkiOf(t, point)
	key, err := ParsePublicKey(spki)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	name := mustDER(t, pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}, SerialNumber: "1"}.ToRDNSequence())
	issuer := &X509Issuer{scheme: scheme{algorithm: sigECDSA256}, name: name, keyID: make([]byte, 20), notBefore: at, notAfter: at.Add(24 * time.Hour)}
	if issuer.authority, err = authorityKeyID(issuer.keyID); err != nil {
		t.Fatal(err)
	}
	leaf := func(path string, ttl time.Duration, dns ...string) Leaf {
		return Leaf{ID: spiffeid.RequireFromString("spiffe://example.org" + path), Key: key, DNSNames: dns, NotBefore: at.Add(-Backdate), NotAfter: at.Add(ttl)}
	}
	for file, leaf := range map[string]Leaf{
		"plain":        leaf("/web", time.Hour),
		"short":        leaf("/web", 6*time.Second),
		"dns":          leaf("/web", time.Hour, "web.example.org"),
		"dns-several":  leaf("/web", time.Hour, "web.example.org", "web", "*.web.example.org"),
		"dns-wildcard": leaf("/web", time.Hour, "*.web.example.org"),
		"dns-long":     leaf("/web", time.Hour, strings.Repeat("a", 63)+".example.org"),
		"agent":        leaf("/spire/agent/join_token/0123456789abcdef", time.Hour),
		"server":       leaf("/spire/server", time.Hour),
		"year-2050":    leaf("/web", 24*365*25*time.Hour),
	} {
		t.Run(file, func(t *testing.T) {
			tbs, err := issuer.assemble(&leaf, big.NewInt(0x0102030405))
			if err != nil {
				t.Fatal(err)
			}
			got := fmt.Sprintf("%x\n", tbs)
			path := filepath.Join("testdata", "golden", file+".hex")
			if *update {
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(got), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil || string(want) != got {
				t.Errorf("the bytes to be signed are not those of %s (-update writes it anew): %v\n%s", path, err, got)
			}
		})
	}
}
