package svid

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// request are the parts of a PKCS#10 request, to be put together soundly or not.
type request struct {
	Version    int
	Name       asn1.RawValue
	SPKI       asn1.RawValue
	Attributes asn1.RawValue // tagged [0]
}

type signedRequest struct {
	Info      asn1.RawValue
	Algorithm asn1.RawValue
	Signature asn1.BitString
}

func mustDER(t testing.TB, v any) []byte {
	t.Helper()
	der, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func raw(der []byte) asn1.RawValue { return asn1.RawValue{FullBytes: der} }

func noAttributes() asn1.RawValue { return raw([]byte{0xa0, 0}) }

func attributes(contents ...[]byte) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: bytes.Join(contents, nil)}
}

func spkiOf(t testing.TB, pub any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// build signs a request with an EC key.
func build(t testing.TB, key *ecdsa.PrivateKey, edit func(r *request)) []byte {
	t.Helper()
	r := request{Name: raw([]byte{0x30, 0}), SPKI: raw(spkiOf(t, &key.PublicKey)), Attributes: noAttributes()}
	if edit != nil {
		edit(&r)
	}
	return signInfo(t, key, mustDER(t, r))
}

func signInfo(t testing.TB, key *ecdsa.PrivateKey, info []byte) []byte {
	t.Helper()
	digest := sha256.Sum256(info)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return assembleRequest(t, info, []byte(sigECDSA256), signature)
}

func assembleRequest(t testing.TB, info, algorithm, signature []byte) []byte {
	t.Helper()
	return mustDER(t, signedRequest{raw(info), raw(algorithm), asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}})
}

// withSPKI is a request for any public key, with a signature that no key of
// that kind made: the key must be refused before the signature is looked at.
func withSPKI(t testing.TB, key *ecdsa.PrivateKey, spki []byte) []byte {
	return build(t, key, func(r *request) { r.SPKI = raw(spki) })
}

func rsaSPKI(t testing.TB, n *big.Int, e *big.Int) []byte {
	t.Helper()
	key := mustDER(t, struct{ N, E *big.Int }{n, e})
	return mustDER(t, struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}{raw([]byte(algRSA)), asn1.BitString{Bytes: key, BitLength: 8 * len(key)}})
}

func ecSPKI(t testing.TB, parameters []byte, point []byte) []byte {
	t.Helper()
	type algorithm struct {
		OID        asn1.ObjectIdentifier
		Parameters asn1.RawValue
	}
	return mustDER(t, struct {
		Algorithm algorithm
		Key       asn1.BitString
	}{algorithm{asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}, raw(parameters)}, asn1.BitString{Bytes: point, BitLength: 8 * len(point)}})
}

func oidDER(t testing.TB, numbers ...int) []byte { return mustDER(t, asn1.ObjectIdentifier(numbers)) }

func prime(t testing.TB, bits int) *big.Int {
	t.Helper()
	p, err := rand.Prime(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// sized is an odd number of exactly that many bits.
func sized(bits int) *big.Int {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return n.SetBit(n, 0, 1)
}

// multiple is an odd number of 2048 bits that p divides.
func multiple(p int64) *big.Int {
	n := new(big.Int).Div(new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 2048), big.NewInt(1)), big.NewInt(p))
	return n.SetBit(n, 0, 1).Mul(n, big.NewInt(p))
}

func product(p, q *big.Int) *big.Int { return new(big.Int).Mul(p, q) }

func nextPrime(n *big.Int) *big.Int {
	p := new(big.Int).Add(n, big.NewInt(1))
	for p.SetBit(p, 0, 1); !p.ProbablyPrime(10); p.Add(p, big.NewInt(2)) {
	}
	return p
}

// rocaPrime has the shape k·M + (65537^a mod M) of the weak generator.
func rocaPrime(t testing.TB, bits int) *big.Int {
	t.Helper()
	m := big.NewInt(1)
	for p := int64(2); p <= 167; p++ {
		if big.NewInt(p).ProbablyPrime(10) {
			m.Mul(m, big.NewInt(p))
		}
	}
	for {
		a, err := rand.Int(rand.Reader, big.NewInt(1<<40))
		if err != nil {
			t.Fatal(err)
		}
		k := prime(t, bits-m.BitLen())
		n := new(big.Int).Add(new(big.Int).Mul(k, m), new(big.Int).Exp(big.NewInt(65537), a, m))
		if n.BitLen() == bits && n.ProbablyPrime(10) {
			return n
		}
	}
}

func pssRequest(t testing.TB, key *rsa.PrivateKey, salt int) []byte {
	t.Helper()
	info := mustDER(t, request{Name: raw([]byte{0x30, 0}), SPKI: raw(spkiOf(t, &key.PublicKey)), Attributes: noAttributes()})
	digest := sha256.Sum256(info)
	signature, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], &rsa.PSSOptions{SaltLength: salt})
	if err != nil {
		t.Fatal(err)
	}
	sha := []byte("\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00")
	mgf := mustDER(t, struct {
		OID  asn1.ObjectIdentifier
		Hash asn1.RawValue
	}{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 8}, raw(sha)})
	tagged := func(n int, der []byte) []byte {
		return mustDER(t, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: n, IsCompound: true, Bytes: der})
	}
	parameters := mustDER(t, []asn1.RawValue{raw(tagged(0, sha)), raw(tagged(1, mgf)), raw(tagged(2, mustDER(t, salt)))})
	algorithm := mustDER(t, []asn1.RawValue{raw(oidDER(t, 1, 2, 840, 113549, 1, 1, 10)), raw(parameters)})
	return assembleRequest(t, info, algorithm, signature)
}

// TestCorpusC holds ParseCSR to corpus C; what concerns callers more than the
// parser is proven where they are. R3, R4.
func TestCorpusC(t *testing.T) {
	p256, other := newEC(t, elliptic.P256()), newEC(t, elliptic.P256())
	good := build(t, p256, nil)
	point, err := p256.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	named := oidDER(t, 1, 2, 840, 10045, 3, 1, 7)
	edit := func(f func(der []byte) []byte) []byte { return f(bytes.Clone(good)) }
	garbage := make([]byte, 1024)
	rand.Read(garbage)
	e := big.NewInt(65537)
	p1024 := prime(t, 1024)
	rsaKey := newRSA(t, 2048)

	reject := map[string][]byte{
		"C1 empty":                        {},
		"C2 random":                       garbage,
		"C3 PEM":                          pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good}),
		"C4 trailing byte":                append(bytes.Clone(good), 0),
		"C5 signature bit flipped":        edit(func(b []byte) []byte { b[len(b)-1] ^= 1; return b }),
		"C6 signed by another key":        build(t, other, func(r *request) { r.SPKI = raw(spkiOf(t, &p256.PublicKey)) }),
		"C7 empty signature":              assembleRequest(t, infoOf(t, good), []byte(sigECDSA256), nil),
		"C7 zero signature":               assembleRequest(t, infoOf(t, good), []byte(sigECDSA256), make([]byte, 70)),
		"C7 r and s zero":                 assembleRequest(t, infoOf(t, good), []byte(sigECDSA256), []byte{0x30, 6, 2, 1, 0, 2, 1, 0}),
		"C8 RSA 1024":                     withSPKI(t, p256, rsaSPKI(t, product(prime(t, 512), prime(t, 512)), e)),
		"C9 RSA 2047":                     withSPKI(t, p256, rsaSPKI(t, sized(2047), e)),
		"C9 RSA 2049":                     withSPKI(t, p256, rsaSPKI(t, sized(2049), e)),
		"C10 RSA 8192":                    withSPKI(t, p256, rsaSPKI(t, sized(8192), e)),
		"C10 RSA 16384":                   withSPKI(t, p256, rsaSPKI(t, sized(16384), e)),
		"C10 RSA 65536":                   withSPKI(t, p256, rsaSPKI(t, sized(65536), e)),
		"C11 exponent 1":                  withSPKI(t, p256, rsaSPKI(t, rsaKey.N, big.NewInt(1))),
		"C11 exponent 2":                  withSPKI(t, p256, rsaSPKI(t, rsaKey.N, big.NewInt(2))),
		"C11 exponent 3":                  withSPKI(t, p256, rsaSPKI(t, rsaKey.N, big.NewInt(3))),
		"C11 exponent even":               withSPKI(t, p256, rsaSPKI(t, rsaKey.N, big.NewInt(65538))),
		"C11 exponent 2^33":               withSPKI(t, p256, rsaSPKI(t, rsaKey.N, new(big.Int).Lsh(big.NewInt(1), 33))),
		"C11 exponent of 256 bytes":       withSPKI(t, p256, rsaSPKI(t, rsaKey.N, sized(2048))),
		"C11 exponent negative":           withSPKI(t, p256, rsaSPKI(t, rsaKey.N, big.NewInt(-65537))),
		"C12 modulus even":                withSPKI(t, p256, rsaSPKI(t, new(big.Int).Add(sized(2048), big.NewInt(1)), e)),
		"C12 prime square":                withSPKI(t, p256, rsaSPKI(t, product(p1024, p1024), e)),
		"C12 small prime":                 withSPKI(t, p256, rsaSPKI(t, multiple(997), e)),
		"C12 smallest prime":              withSPKI(t, p256, rsaSPKI(t, multiple(3), e)),
		"C12 modulus negative":            withSPKI(t, p256, rsaSPKI(t, new(big.Int).Neg(rsaKey.N), e)),
		"C12 modulus zero":                withSPKI(t, p256, rsaSPKI(t, new(big.Int), e)),
		"C13 neighbouring primes":         withSPKI(t, p256, rsaSPKI(t, product(p1024, nextPrime(p1024)), e)),
		"C13 close primes":                withSPKI(t, p256, rsaSPKI(t, product(p1024, nextPrime(new(big.Int).Add(p1024, new(big.Int).Lsh(big.NewInt(1), 511)))), e)),
		"C13 ROCA":                        withSPKI(t, p256, rsaSPKI(t, product(product(rocaPrime(t, 512), rocaPrime(t, 512)), product(rocaPrime(t, 512), rocaPrime(t, 512))), e)),
		"C14 DSA":                         withSPKI(t, p256, dsaSPKI(t)),
		"C15 P-224":                       withSPKI(t, p256, spkiOf(t, &newEC(t, elliptic.P224()).PublicKey)),
		"C15 secp256k1":                   withSPKI(t, p256, ecSPKI(t, oidDER(t, 1, 3, 132, 0, 10), point)),
		"C15 brainpoolP256r1":             withSPKI(t, p256, ecSPKI(t, oidDER(t, 1, 3, 36, 3, 3, 2, 8, 1, 1, 7), point)),
		"C15 P-521 off by policy":         withSPKI(t, p256, spkiOf(t, &newEC(t, elliptic.P521()).PublicKey)),
		"C16 explicit parameters":         withSPKI(t, p256, ecSPKI(t, explicitP256(t), point)),
		"C16 implicit parameters":         withSPKI(t, p256, ecSPKI(t, []byte{5, 0}, point)),
		"C17 point at infinity":           withSPKI(t, p256, ecSPKI(t, named, []byte{0})),
		"C17 all zero":                    withSPKI(t, p256, ecSPKI(t, named, append([]byte{4}, make([]byte, 64)...))),
		"C17 off curve":                   withSPKI(t, p256, ecSPKI(t, named, flip(point, 64))),
		"C17 on the twist":                withSPKI(t, p256, ecSPKI(t, named, twistPoint(t))),
		"C17 coordinate beyond the field": withSPKI(t, p256, ecSPKI(t, named, append([]byte{4}, bytes.Repeat([]byte{0xff}, 64)...))),
		"C17 point too short":             withSPKI(t, p256, ecSPKI(t, named, point[:64])),
		"C17 P-384 point on P-256":        withSPKI(t, p256, ecSPKI(t, named, p384Point(t))),
		"C18 compressed":                  withSPKI(t, p256, ecSPKI(t, named, elliptic.MarshalCompressed(elliptic.P256(), p256.X, p256.Y))),
		"C19 Ed25519":                     ed25519Request(t),
		"C20 X25519":                      withSPKI(t, p256, plainSPKI(t, 32, 1, 3, 101, 110)),
		"C20 unknown OID":                 withSPKI(t, p256, plainSPKI(t, 32, 1, 2, 3, 4)),
		"C20 ML-DSA":                      withSPKI(t, p256, plainSPKI(t, 1312, 2, 16, 840, 1, 101, 3, 4, 3, 17)),
		"C21 MD5":                         rsaRequest(t, rsaKey, crypto.MD5, 4),
		"C21 SHA-1":                       rsaRequest(t, rsaKey, crypto.SHA1, 5),
		"C21 ECDSA with SHA-1":            assembleRequest(t, infoOf(t, good), mustDER(t, []asn1.ObjectIdentifier{{1, 2, 840, 10045, 4, 1}}), signatureOf(t, good)),
		"C22 PSS, salt of 20":             pssRequest(t, rsaKey, 20),
		"C22 PSS":                         pssRequest(t, rsaKey, 32),
		"C29 10,000 names":                build(t, p256, func(r *request) { r.Attributes = attributes(extensionRequest(t, sanOf(t, 10000))) }),
		"C30 64 KiB and a byte":           make([]byte, MaxCSR+1),
		"C31 CN of 64 KiB":                build(t, p256, func(r *request) { r.Name = raw(nameOf(t, strings.Repeat("a", 64<<10), 1)) }),
		"C32 extension twice":             build(t, p256, func(r *request) { r.Attributes = attributes(extensionRequest(t, sanOf(t, 1), sanOf(t, 1))) }),
		"C32 extension request twice":     build(t, p256, func(r *request) { r.Attributes = attributes(extensionRequest(t, sanOf(t, 1)), extensionRequest(t)) }),
		"C33 indefinite length":           edit(func(b []byte) []byte { return append(append([]byte{0x30, 0x80}, contentOf(t, b)...), 0, 0) }),
		"C33 non-minimal length": edit(func(b []byte) []byte {
			return append([]byte{0x30, 0x82, 0, byte(len(contentOf(t, b)))}, contentOf(t, b)...)
		}),
		"C33 non-minimal length inside": build(t, p256, func(r *request) { r.Name = raw([]byte{0x30, 0x81, 0}) }),
		"C34 version 1":                 build(t, p256, func(r *request) { r.Version = 1 }),
		"C34 version -1":                build(t, p256, func(r *request) { r.Version = -1 }),
		"C34 version 256":               build(t, p256, func(r *request) { r.Version = 256 }),
		"deeply nested name":            build(t, p256, func(r *request) { r.Name = raw(nested(t, 40)) }),
		"no attributes": signInfo(t, p256, mustDER(t, struct {
			Version    int
			Name, SPKI asn1.RawValue
		}{0, raw([]byte{0x30, 0}), raw(spkiOf(t, &p256.PublicKey))})),
	}
	for name, der := range reject {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			key, err := ParseCSR(der)
			if took := time.Since(begin); took > 10*time.Second { // of microseconds
				t.Errorf("took %v", took)
			}
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("ParseCSR() = %v, %v; want invalid", key, err)
			}
			if want := reasonC(name); fault.ReasonOf(err) != want {
				t.Errorf("ParseCSR() = %v, want reason %s", err, want)
			}
			if len(der) > 40 && (strings.Contains(err.Error(), hex.EncodeToString(der[8:16])) || strings.Contains(err.Error(), string(der[8:16]))) {
				t.Errorf("the error quotes the request: %v", err)
			}
		})
	}
	accept := map[string][]byte{
		"P-256":                        good,
		"P-384":                        mustCSR(t, newEC(t, elliptic.P384()), nil),
		"RSA 2048":                     mustCSR(t, rsaKey, nil),
		"RSA 3072":                     mustCSR(t, newRSA(t, 3072), nil),
		"SHA-512":                      mustCSR(t, p256, &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA512}),
		"C23 asks to be a CA":          build(t, p256, func(r *request) { r.Attributes = attributes(extensionRequest(t, caOf(t))) }),
		"C24 C25 asks for other names": mustCSR(t, p256, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"a"}, EmailAddresses: []string{"a@b"}, URIs: []*url.URL{{Scheme: "spiffe", Host: "x", Path: "/y"}}}),
		"C31 1,000 RDNs":               build(t, p256, func(r *request) { r.Name = raw(nameOf(t, "a", 1000)) }),
		"C35 challenge password":       build(t, p256, func(r *request) { r.Attributes = attributes(challengePassword(t)) }),
	}
	for name, der := range accept {
		t.Run(name, func(t *testing.T) {
			key, err := ParseCSR(der)
			if err != nil {
				t.Fatal(err)
			}
			want, err := x509.ParseCertificateRequest(der)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(key.SPKI, want.RawSubjectPublicKeyInfo) || key.Hash != sha256.Sum256(key.SPKI) ||
				!want.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Key) {
				t.Error("another key than crypto/x509 reads")
			}
		})
	}
}

// reasonC says which check must refuse a row: most broken keys would fail the
// check of the signature too, which proves nothing about the key policy.
func reasonC(name string) string {
	var row int
	fmt.Sscanf(name, "C%d", &row)
	switch {
	case row >= 8 && row <= 20:
		return "public_key_invalid"
	case row == 5, row == 6, row == 21, row == 22, strings.HasPrefix(name, "C7 zero"), strings.HasPrefix(name, "C7 r and s"):
		return "csr_signature_invalid"
	case row == 29, row == 30, row == 31:
		return "csr_too_large"
	}
	return "csr_invalid"
}

// Each weakness is found by its own check, and sound keys have none (C12, C13).
func TestWeakModulus(t *testing.T) {
	p := nextPrime(new(big.Int).Lsh(big.NewInt(3), 1022)) // always the same: the square of one in 58,000 looks like ROCA
	for name, n := range map[string]*big.Int{
		"square": product(p, p), "neighbours": product(p, nextPrime(p)),
		"close": product(p, nextPrime(new(big.Int).Add(p, new(big.Int).Lsh(big.NewInt(1), 511)))),
	} {
		if !closePrimes(n) || hasSmallFactor(n.Bytes()) || roca(n.Bytes()) {
			t.Errorf("%s: close %v, small %v, ROCA %v", name, closePrimes(n), hasSmallFactor(n.Bytes()), roca(n.Bytes()))
		}
	}
	if n := product(rocaPrime(t, 512), rocaPrime(t, 512)); !roca(n.Bytes()) {
		t.Error("ROCA is not found")
	}
	for small := int64(3); small < 1000; small += 2 {
		if n := multiple(small); !hasSmallFactor(n.Bytes()) {
			t.Errorf("the factor %d is not found", small)
		}
	}
	for range 3 {
		n := newRSA(t, 2048).N
		if closePrimes(n) || hasSmallFactor(n.Bytes()) || roca(n.Bytes()) {
			t.Errorf("a sound key is refused: %x", n)
		}
		if m := uint64(0xfffffffb); mod(n.Bytes(), m) != new(big.Int).Mod(n, new(big.Int).SetUint64(m)).Uint64() {
			t.Error("mod is wrong")
		}
	}
}

// C10, R27: the size is judged before any arithmetic on the key.
func TestLargeRSAIsCheap(t *testing.T) {
	der := withSPKI(t, newEC(t, elliptic.P256()), rsaSPKI(t, sized(65536), big.NewInt(65537)))
	result := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			if _, err := ParseCSR(der); err == nil {
				b.Fatal("accepted")
			}
		}
	})
	t.Logf("refused in %v", time.Duration(result.NsPerOp()))
	if result.NsPerOp() > int64(10*time.Millisecond) { // ten times the goal of 1 ms
		t.Errorf("took %v", time.Duration(result.NsPerOp()))
	}
}

// R2: whatever else a request says, only its key reaches the certificate. Each
// byte of a full request is changed in turn and the request signed again.
func TestOnlyTheKeyIsTaken(t *testing.T) {
	now := time.Now()
	ca := newAuthority(t, newEC(t, elliptic.P256()), now)
	key := newEC(t, elliptic.P256())
	full := mustCSR(t, key, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "somebody", Organization: []string{"else"}}, DNSNames: []string{"other.example.org"},
		URIs:            []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/admin"}},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}},
	})
	certify := func(csr []byte) ([]byte, bool) {
		public, err := ParseCSR(csr)
		if err != nil {
			return nil, false
		}
		p, err := ca.issuer.Prepare(leafOf("spiffe://example.org/a", public, now, "a.example.org"))
		if err != nil {
			t.Fatal(err)
		}
		tbs, err := ca.issuer.assemble(&p.leaf, big.NewInt(1)) // the serial number is random
		if err != nil {
			t.Fatal(err)
		}
		return tbs, true
	}
	want, ok := certify(full)
	if !ok {
		t.Fatal("the request itself is refused")
	}
	info := infoOf(t, full)
	spkiAt := bytes.Index(info, spkiOf(t, &key.PublicKey))
	accepted := 0
	for at := range info {
		if at >= spkiAt && at < spkiAt+len(spkiOf(t, &key.PublicKey)) {
			continue
		}
		for _, bit := range []byte{1, 2, 0x20, 0x80} {
			changed := bytes.Clone(info)
			changed[at] ^= bit
			got, ok := certify(signInfo(t, key, changed))
			if !ok {
				continue
			}
			accepted++
			if !bytes.Equal(got, want) {
				t.Fatalf("byte %d of the request changed the certificate", at)
			}
		}
	}
	if accepted < 100 {
		t.Errorf("only %d changed requests were accepted", accepted)
	}
}

func infoOf(t testing.TB, csr []byte) []byte {
	t.Helper()
	var s signedRequest
	if _, err := asn1.Unmarshal(csr, &s); err != nil {
		t.Fatal(err)
	}
	return s.Info.FullBytes
}

func signatureOf(t testing.TB, csr []byte) []byte {
	t.Helper()
	var s signedRequest
	if _, err := asn1.Unmarshal(csr, &s); err != nil {
		t.Fatal(err)
	}
	return s.Signature.Bytes
}

func contentOf(t testing.TB, der []byte) []byte {
	t.Helper()
	var v asn1.RawValue
	if _, err := asn1.Unmarshal(der, &v); err != nil {
		t.Fatal(err)
	}
	return v.Bytes
}

func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}

func mustCSR(t testing.TB, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	if template == nil {
		template = &x509.CertificateRequest{}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func rsaRequest(t testing.TB, key *rsa.PrivateKey, hash crypto.Hash, oid int) []byte {
	t.Helper()
	info := mustDER(t, request{Name: raw([]byte{0x30, 0}), SPKI: raw(spkiOf(t, &key.PublicKey)), Attributes: noAttributes()})
	h := hash.New()
	h.Write(info)
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, hash, h.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	algorithm := mustDER(t, []asn1.RawValue{raw(oidDER(t, 1, 2, 840, 113549, 1, 1, oid)), raw([]byte{5, 0})})
	return assembleRequest(t, info, algorithm, signature)
}

func ed25519Request(t testing.TB) []byte {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return mustCSR(t, key, nil)
}

func plainSPKI(t testing.TB, size int, oid ...int) []byte {
	t.Helper()
	return mustDER(t, struct {
		Algorithm []asn1.ObjectIdentifier
		Key       asn1.BitString
	}{[]asn1.ObjectIdentifier{oid}, asn1.BitString{Bytes: make([]byte, size), BitLength: 8 * size}})
}

func dsaSPKI(t testing.TB) []byte {
	t.Helper()
	p, q, g := sized(2048), sized(256), big.NewInt(2)
	y := mustDER(t, big.NewInt(4))
	return mustDER(t, struct {
		Algorithm []asn1.RawValue
		Key       asn1.BitString
	}{
		[]asn1.RawValue{raw(oidDER(t, 1, 2, 840, 10040, 4, 1)), raw(mustDER(t, []*big.Int{p, q, g}))},
		asn1.BitString{Bytes: y, BitLength: 8 * len(y)},
	})
}

// explicitP256 are P-256's own parameters written out, with another base point:
// the shape of CVE-2020-0601.
func explicitP256(t testing.TB) []byte {
	t.Helper()
	c := elliptic.P256().Params()
	a := new(big.Int).Sub(c.P, big.NewInt(3))
	base := basePoint(c)
	return mustDER(t, struct {
		Version int
		Field   []asn1.RawValue
		Curve   [][]byte
		Base    []byte
		Order   *big.Int
	}{1, []asn1.RawValue{raw(oidDER(t, 1, 2, 840, 10045, 1, 1)), raw(mustDER(t, c.P))}, [][]byte{a.Bytes(), c.B.Bytes()}, base, c.N})
}

// basePoint is the uncompressed form of a curve's base point.
func basePoint(c *elliptic.CurveParams) []byte {
	size := (c.BitSize + 7) / 8
	out := make([]byte, 1+2*size)
	out[0] = 4
	c.Gx.FillBytes(out[1 : 1+size])
	c.Gy.FillBytes(out[1+size:])
	return out
}

// twistPoint has an x for which x³-3x+b is no square, so that it lies on the twist.
func twistPoint(t testing.TB) []byte {
	t.Helper()
	c := elliptic.P256().Params()
	for x := big.NewInt(1); ; x.Add(x, big.NewInt(1)) {
		y2 := new(big.Int).Exp(x, big.NewInt(3), c.P)
		y2.Sub(y2, new(big.Int).Mul(big.NewInt(3), x)).Add(y2, c.B).Mod(y2, c.P)
		if big.Jacobi(y2, c.P) == -1 {
			out := make([]byte, 65)
			out[0] = 4
			x.FillBytes(out[1:33])
			// The y for which -y² fits (P is 3 modulo 4).
			new(big.Int).ModSqrt(new(big.Int).Sub(c.P, y2), c.P).FillBytes(out[33:])
			return out
		}
	}
}

func p384Point(t testing.TB) []byte {
	t.Helper()
	b, err := newEC(t, elliptic.P384()).PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func extensionRequest(t testing.TB, extensions ...pkix.Extension) []byte {
	t.Helper()
	return attributeOf(t, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}, mustDER(t, extensions))
}

func attributeOf(t testing.TB, oid asn1.ObjectIdentifier, value []byte) []byte {
	t.Helper()
	return mustDER(t, struct {
		OID    asn1.ObjectIdentifier
		Values asn1.RawValue
	}{oid, asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSet, IsCompound: true, Bytes: value}})
}

func challengePassword(t testing.TB) []byte {
	t.Helper()
	return attributeOf(t, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}, mustDER(t, "secret"))
}

func sanOf(t testing.TB, names int) pkix.Extension {
	t.Helper()
	var list []asn1.RawValue
	for i := range names {
		list = append(list, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: fmt.Appendf(nil, "name-%d", i)})
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: mustDER(t, list)}
}

func caOf(t testing.TB) pkix.Extension {
	t.Helper()
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}
}

func nameOf(t testing.TB, cn string, count int) []byte {
	t.Helper()
	var seq pkix.RDNSequence
	for range count {
		seq = append(seq, pkix.RelativeDistinguishedNameSET{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: cn}})
	}
	return mustDER(t, seq)
}

func nested(t testing.TB, depth int) []byte {
	der := []byte{0x30, 0}
	for range depth {
		der = mustDER(t, []asn1.RawValue{raw(der)})
	}
	return der
}
