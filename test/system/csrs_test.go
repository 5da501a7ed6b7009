package system_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"

	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// The parts of a PKCS#10 request (RFC 2986 section 4), soundly or not.
var (
	emptyName    = []byte{0x30, 0}
	noAttributes = []byte{0xa0, 0}
	ecdsaSHA256  = sequence(oid(1, 2, 840, 10045, 4, 3, 2))
)

func tlv(tag asn1.Tag, contents ...[]byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(tag, func(b *cryptobyte.Builder) { b.AddBytes(bytes.Join(contents, nil)) })
	return b.BytesOrPanic()
}

func sequence(contents ...[]byte) []byte { return tlv(asn1.SEQUENCE, contents...) }

func bitString(b []byte) []byte { return tlv(asn1.BIT_STRING, []byte{0}, b) }

func integer(n *big.Int) []byte {
	var b cryptobyte.Builder
	b.AddASN1BigInt(n)
	return b.BytesOrPanic()
}

func oid(numbers ...int) []byte {
	var b cryptobyte.Builder
	b.AddASN1ObjectIdentifier(numbers)
	return b.BytesOrPanic()
}

// csrParts are a request before it is signed.
type csrParts struct{ version, name, spki, attributes []byte }

// makeCSR signs a request with an EC key; edit may spoil it before.
func makeCSR(t testing.TB, key *ecdsa.PrivateKey, edit func(*csrParts)) []byte {
	t.Helper()
	p := csrParts{integer(new(big.Int)), emptyName, spkiOf(t, key.Public()), noAttributes}
	if edit != nil {
		edit(&p)
	}
	return signCSR(t, key, sequence(p.version, p.name, p.spki, p.attributes))
}

func signCSR(t testing.TB, key *ecdsa.PrivateKey, info []byte) []byte {
	t.Helper()
	digest := sha256.Sum256(info)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return sequence(info, ecdsaSHA256, bitString(signature))
}

func spkiOf(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// withExtensions asks for extensions, each a DER Extension.
func withExtensions(extensions ...[]byte) []byte {
	return sequence(oid(1, 2, 840, 113549, 1, 9, 14), tlv(asn1.SET, sequence(extensions...)))
}

func attributes(all ...[]byte) []byte { return tlv(asn1.Tag(0xa0), all...) }

// altNames is the extension subjectAltName with raw names.
func altNames(names ...[]byte) []byte {
	return sequence(oid(2, 5, 29, 17), tlv(asn1.OCTET_STRING, sequence(names...)))
}

func uriName(text string) []byte { return tlv(asn1.Tag(0x86), []byte(text)) }
func dnsName(text string) []byte { return tlv(asn1.Tag(0x82), []byte(text)) }

// csrForURI asks for one URI name, byte for byte.
func csrForURI(t testing.TB, key *ecdsa.PrivateKey, text string) []byte {
	return makeCSR(t, key, func(p *csrParts) { p.attributes = attributes(withExtensions(altNames(uriName(text)))) })
}

// asksForAll asks for all that a certificate of ours must not have on an entry's path.
func asksForAll(p *csrParts) {
	p.name = sequence(tlv(asn1.SET, sequence(oid(2, 5, 4, 3), tlv(asn1.UTF8String, []byte("root")))))
	p.attributes = attributes(withExtensions(
		altNames(uriName("spiffe://example.org/admin"), dnsName("evil.example.org"), tlv(asn1.Tag(0x87), []byte{10, 0, 0, 1}), tlv(asn1.Tag(0x81), []byte("a@example.org"))),
		sequence(oid(2, 5, 29, 19), []byte{1, 1, 0xff}, tlv(asn1.OCTET_STRING, []byte{0x30, 3, 1, 1, 0xff})),      // CA:TRUE
		sequence(oid(2, 5, 29, 15), []byte{1, 1, 0xff}, tlv(asn1.OCTET_STRING, []byte{3, 2, 1, 6})),               // keyCertSign, cRLSign
		sequence(oid(1, 3, 6, 1, 4, 1, 99999, 1), []byte{1, 1, 0xff}, tlv(asn1.OCTET_STRING, []byte("anything"))), // critical and unknown
	), sequence(oid(1, 2, 840, 113549, 1, 9, 7), tlv(asn1.SET, tlv(asn1.UTF8String, []byte("canary-challenge"))))) // C35
}

func rsaSPKI(n, e *big.Int) []byte {
	return sequence(sequence(oid(1, 2, 840, 113549, 1, 1, 1), []byte{5, 0}), bitString(sequence(integer(n), integer(e))))
}

func ecSPKI(parameters, point []byte) []byte {
	return sequence(sequence(oid(1, 2, 840, 10045, 2, 1), parameters), bitString(point))
}

// sized is an odd number of exactly that many bits.
func sized(bits int) *big.Int {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return n.SetBit(n, 0, 1)
}

func randomPrime(t testing.TB, bits int) *big.Int {
	t.Helper()
	p, err := rand.Prime(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// rocaModulus is modulo every small prime a power of 65537, as the moduli of
// CVE-2017-15361 are.
func rocaModulus(t testing.TB) *big.Int {
	t.Helper()
	m := big.NewInt(1)
	for p := int64(2); p <= 167; p++ {
		if big.NewInt(p).ProbablyPrime(10) {
			m.Mul(m, big.NewInt(p))
		}
	}
	k := randomPrime(t, 2048-m.BitLen()+1)
	n := new(big.Int).Mul(k, m)
	return n.Add(n, new(big.Int).Exp(big.NewInt(65537), big.NewInt(987654321), m))
}

// badCSRs are the rows of corpus C that every signing path refuses. Most carry a
// sound signature by key over a public key that is not: the key is what must be
// refused.
func badCSRs(t testing.TB, key, other *ecdsa.PrivateKey) map[string][]byte {
	t.Helper()
	good := makeCSR(t, key, nil)
	with := func(spki []byte) []byte { return makeCSR(t, key, func(p *csrParts) { p.spki = spki }) }
	e := big.NewInt(65537)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p := randomPrime(t, 1024)
	square := new(big.Int).Mul(p, p)
	q := new(big.Int).Add(p, big.NewInt(2))
	for !q.ProbablyPrime(10) {
		q.Add(q, big.NewInt(2))
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	offCurve := bytes.Clone(point)
	offCurve[64] ^= 1
	named := oid(1, 2, 840, 10045, 3, 1, 7)
	info := sequence(integer(new(big.Int)), emptyName, spkiOf(t, key.Public()), noAttributes)
	rsaInfo := sequence(integer(new(big.Int)), emptyName, spkiOf(t, rsaKey.Public()), noAttributes)
	rsaSigned := func(hash crypto.Hash, number int) []byte {
		h := hash.New()
		h.Write(rsaInfo)
		signature, err := rsa.SignPKCS1v15(rand.Reader, rsaKey, hash, h.Sum(nil))
		if err != nil {
			t.Fatal(err)
		}
		return sequence(rsaInfo, sequence(oid(1, 2, 840, 113549, 1, 1, number), []byte{5, 0}), bitString(signature))
	}
	digest := sha256.Sum256(rsaInfo)
	pss, err := rsa.SignPSS(rand.Reader, rsaKey, crypto.SHA256, digest[:], &rsa.PSSOptions{SaltLength: 20})
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ed, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, edKey)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	garbage := make([]byte, 1024)
	rand.Read(garbage)
	curve := elliptic.P256().Params()
	explicit := sequence(integer(big.NewInt(1)), sequence(oid(1, 2, 840, 10045, 1, 1), integer(curve.P)),
		sequence(tlv(asn1.OCTET_STRING, new(big.Int).Sub(curve.P, big.NewInt(3)).Bytes()), tlv(asn1.OCTET_STRING, curve.B.Bytes())),
		tlv(asn1.OCTET_STRING, point), integer(curve.N))
	var names [][]byte
	for i := range 10_000 {
		names = append(names, dnsName(fmt.Sprintf("name-%d.example.org", i)))
	}
	oneName := altNames(dnsName("a.example.org"))
	plain := func(size int, numbers ...int) []byte {
		return sequence(sequence(oid(numbers...)), bitString(make([]byte, size)))
	}
	if good[1] != 0x81 { // tag, and a length of two bytes
		t.Fatal("the length of the request is not as assumed")
	}
	content := good[3:]
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	return map[string][]byte{
		"C1 empty":                   {},
		"C2 random":                  garbage,
		"C3 PEM":                     pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good}),
		"C4 trailing byte":           append(bytes.Clone(good), 0),
		"C5 signature bit flipped":   flipped,
		"C6 signed by another key":   makeCSR(t, other, func(p *csrParts) { p.spki = spkiOf(t, key.Public()) }),
		"C7 empty signature":         sequence(info, ecdsaSHA256, bitString(nil)),
		"C7 zero signature":          sequence(info, ecdsaSHA256, bitString(make([]byte, 70))),
		"C8 RSA 1024":                with(rsaSPKI(sized(1024), e)),
		"C9 RSA 2047":                with(rsaSPKI(sized(2047), e)),
		"C9 RSA 2049":                with(rsaSPKI(sized(2049), e)),
		"C10 RSA 8192":               with(rsaSPKI(sized(8192), e)),
		"C10 RSA 16384":              with(rsaSPKI(sized(16384), e)),
		"C10 RSA 65536":              with(rsaSPKI(sized(65536), e)),
		"C11 exponent 1":             with(rsaSPKI(rsaKey.N, big.NewInt(1))),
		"C11 exponent 2":             with(rsaSPKI(rsaKey.N, big.NewInt(2))),
		"C11 exponent 3":             with(rsaSPKI(rsaKey.N, big.NewInt(3))),
		"C11 exponent even":          with(rsaSPKI(rsaKey.N, big.NewInt(65538))),
		"C11 exponent 2^33":          with(rsaSPKI(rsaKey.N, new(big.Int).Lsh(big.NewInt(1), 33))),
		"C12 even modulus":           with(rsaSPKI(new(big.Int).Lsh(big.NewInt(1), 2047), e)),
		"C12 prime square":           with(rsaSPKI(square, e)),
		"C12 small prime":            with(rsaSPKI(new(big.Int).Mul(sized(2039), big.NewInt(509)), e)),
		"C13 close primes":           with(rsaSPKI(new(big.Int).Mul(p, q), e)),
		"C13 ROCA":                   with(rsaSPKI(rocaModulus(t), e)),
		"C14 DSA":                    with(sequence(sequence(oid(1, 2, 840, 10040, 4, 1), sequence(integer(sized(2048)), integer(sized(256)), integer(big.NewInt(2)))), bitString(integer(big.NewInt(4))))),
		"C15 P-224":                  with(spkiOf(t, p224.Public())),
		"C15 secp256k1":              with(ecSPKI(oid(1, 3, 132, 0, 10), point)),
		"C15 brainpoolP256r1":        with(ecSPKI(oid(1, 3, 36, 3, 3, 2, 8, 1, 1, 7), point)),
		"C16 explicit parameters":    with(ecSPKI(explicit, point)),
		"C17 point at infinity":      with(ecSPKI(named, []byte{0})),
		"C17 off the curve":          with(ecSPKI(named, offCurve)),
		"C17 zero":                   with(ecSPKI(named, append([]byte{4}, make([]byte, 64)...))),
		"C18 compressed point":       with(ecSPKI(named, elliptic.MarshalCompressed(elliptic.P256(), new(big.Int).SetBytes(point[1:33]), new(big.Int).SetBytes(point[33:])))),
		"C19 Ed25519":                ed,
		"C20 X25519":                 with(plain(32, 1, 3, 101, 110)),
		"C20 unknown algorithm":      with(plain(32, 1, 2, 3, 4)),
		"C20 ML-DSA":                 with(plain(1312, 2, 16, 840, 1, 101, 3, 4, 3, 17)),
		"C21 MD5":                    rsaSigned(crypto.MD5, 4),
		"C21 SHA-1":                  rsaSigned(crypto.SHA1, 5),
		"C22 PSS":                    sequence(rsaInfo, sequence(oid(1, 2, 840, 113549, 1, 1, 10), sequence()), bitString(pss)),
		"C29 10,000 names":           makeCSR(t, key, func(p *csrParts) { p.attributes = attributes(withExtensions(altNames(names...))) }),
		"C30 64 KiB and a byte":      make([]byte, 64<<10+1),
		"C31 name of 64 KiB":         makeCSR(t, key, func(p *csrParts) { p.name = rdns(1, strings.Repeat("a", 64<<10)) }),
		"C32 extension twice":        makeCSR(t, key, func(p *csrParts) { p.attributes = attributes(withExtensions(oneName, oneName)) }),
		"C32 two extension requests": makeCSR(t, key, func(p *csrParts) { p.attributes = attributes(withExtensions(oneName), withExtensions()) }),
		"C33 indefinite length":      bytes.Join([][]byte{{0x30, 0x80}, content, {0, 0}}, nil),
		"C33 long length":            bytes.Join([][]byte{{0x30, 0x82, 0, good[2]}, content}, nil),
		"C34 version 1":              makeCSR(t, key, func(p *csrParts) { p.version = integer(big.NewInt(1)) }),
		"C34 version -1":             makeCSR(t, key, func(p *csrParts) { p.version = integer(big.NewInt(-1)) }),
	}
}

func rdns(count int, text string) []byte {
	one := tlv(asn1.SET, sequence(oid(2, 5, 4, 3), tlv(asn1.UTF8String, []byte(text))))
	return sequence(bytes.Repeat(one, count))
}

// dialServer connects to the server's port as an agent does, with or without a
// certificate of its own.
func (d *deployment) dialServer(own *tls.Certificate) *grpc.ClientConn {
	d.t.Helper()
	td := spiffeid.RequireTrustDomainFromString(d.trustDomain)
	roots, err := x509bundle.Parse(td, []byte(d.run("server", "bundle", "show", "-socketPath", d.adminSocket())))
	if err != nil {
		d.t.Fatal(err)
	}
	config := tlsconfig.TLSClientConfig(roots, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(td, "/spire/server")))
	if own != nil {
		config.Certificates = []tls.Certificate{*own}
	}
	conn, err := grpc.NewClient(fmt.Sprintf("%s:%d", d.host, d.port), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	return conn
}

// attest makes one attestation with a join token and returns the chain.
func attest(ctx context.Context, conn *grpc.ClientConn, token, csr []byte) ([][]byte, error) {
	return attestAs(ctx, conn, &agentv1.AttestAgentRequest_Params{
		Data: &spiretypes.AttestationData{Type: "join_token", Payload: token}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	})
}

func attestAs(ctx context.Context, conn *grpc.ClientConn, params *agentv1.AttestAgentRequest_Params) ([][]byte, error) {
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: params}}); err != nil {
		_, err = stream.Recv()
		return nil, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	return resp.GetResult().GetSvid().GetCertChain(), nil
}

// joined is an agent that this test plays.
type joined struct {
	id   string
	key  *ecdsa.PrivateKey
	conn *grpc.ClientConn
}

func (d *deployment) join() *joined {
	d.t.Helper()
	token, id := d.token()
	key := newKey(d.t)
	chain, err := attest(d.t.Context(), d.dialServer(nil), []byte(token), makeCSR(d.t, key, nil))
	if err != nil {
		d.t.Fatal(err)
	}
	return &joined{id, key, d.dialServer(&tls.Certificate{Certificate: chain, PrivateKey: key})}
}

// signingPath is one way to have a request signed: it returns the chain, or how
// it was refused.
type signingPath struct {
	name string
	want string // the ID that the certificate has; empty: what the request says
	sign func(ctx context.Context, csr []byte) ([][]byte, error)
}

// signingPaths are the five. token stays unused as long as all is refused.
func (d *deployment) signingPaths(agent *joined, grant *spiretypes.Entry, token, tokenID string) []signingPath {
	anybody, admin := d.dialServer(nil), svidv1.NewSVIDClient(dialUnix(d.t, d.adminSocket()))
	path := "spiffe://" + grant.SpiffeId.TrustDomain + grant.SpiffeId.Path
	return []signingPath{
		{"AttestAgent", tokenID, func(ctx context.Context, csr []byte) ([][]byte, error) {
			return attest(ctx, anybody, []byte(token), csr)
		}},
		{"RenewAgent", agent.id, func(ctx context.Context, csr []byte) ([][]byte, error) {
			resp, err := agentv1.NewAgentClient(agent.conn).RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
			return resp.GetSvid().GetCertChain(), err
		}},
		{"BatchNewX509SVID", path, func(ctx context.Context, csr []byte) ([][]byte, error) {
			resp, err := svidv1.NewSVIDClient(agent.conn).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: grant.Id, Csr: csr}}})
			if err != nil {
				return nil, err
			}
			return resp.Results[0].GetSvid().GetCertChain(), itemError(resp.Results[0].Status, nil)
		}},
		{"Issue.X509", path, func(ctx context.Context, csr []byte) ([][]byte, error) {
			resp, err := issuev1.NewIssueClient(agent.conn).X509(ctx, &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: grant.Id, Csr: csr}}})
			if err != nil {
				return nil, err
			}
			r := resp.Results[0]
			switch r.GetRefusal().GetReason() {
			case "":
				return r.CertChain, nil
			case "csr_invalid", "csr_too_large", "csr_signature_invalid", "public_key_invalid", "key_of_authority", "key_taken":
				// A refusal has a reason instead of a code.
				return nil, status.Error(codes.InvalidArgument, r.Refusal.Message)
			}
			return nil, status.Error(codes.Unknown, r.Refusal.Reason+": "+r.Refusal.Message)
		}},
		{"MintX509SVID", "", func(ctx context.Context, csr []byte) ([][]byte, error) {
			resp, err := admin.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr})
			return resp.GetSvid().GetCertChain(), err
		}},
	}
}

// Corpus C through the five signing paths. The join token of the first path is
// the same throughout and works at the end: no refused request burns it (K18).
// R2, R3, R4.
func TestCorpusC(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.serverOptions = "ratelimit {\n attestation = false\n signing = false\n }" // the corpus is larger than a caller's share
	d.startServer()
	agent, other := d.join(), d.join()
	grant := d.createEntry(agent.id, "/workload", func(e *spiretypes.Entry) { e.DnsNames = []string{"entry.example.org"} }, "unix:uid:4242")
	token, tokenID := d.token()
	paths := d.signingPaths(agent, grant, token, tokenID)
	before, agents := d.countEntries(), len(d.agents())

	for row, csr := range badCSRs(t, newKey(t), newKey(t)) {
		t.Run(row, func(t *testing.T) {
			for _, path := range paths {
				chain, err := path.sign(t.Context(), csr)
				if status.Code(err) != codes.InvalidArgument || len(chain) > 0 {
					t.Errorf("%s: %v, %d certificates; want InvalidArgument", path.name, err, len(chain))
				}
			}
		})
	}
	for id, key := range d.authorityKeys() {
		t.Run("C36 key of "+id, func(t *testing.T) {
			for _, path := range paths {
				_, err := path.sign(t.Context(), csrForURI(t, key, "spiffe://example.org/minted"))
				denied(t, path.name, err)
			}
		})
	}
	t.Run("C37 key of another agent", func(t *testing.T) {
		for _, path := range paths {
			_, err := path.sign(t.Context(), csrForURI(t, other.key, "spiffe://example.org/minted"))
			denied(t, path.name, err)
		}
		eventually(t, "an event that tells of it", func() bool {
			trail, err := os.ReadFile(d.path("server/audit.log"))
			return err == nil && bytes.Contains(trail, []byte(`"reason":"key_taken"`))
		})
	})
	t.Run("C38 the agent's key again", func(t *testing.T) {
		_, err := paths[1].sign(t.Context(), makeCSR(t, agent.key, nil))
		denied(t, "RenewAgent", err)
	})
	if got := len(d.agents()); got != agents || d.countEntries() != before {
		t.Errorf("%d agents, %d before; %d entries, %d before", got, agents, d.countEntries(), before)
	}

	t.Run("C23 C24 C25 C35 asked for and ignored", func(t *testing.T) {
		for _, path := range paths {
			if path.want == "" {
				continue // a mint takes its name from the request
			}
			checkLeaf(t, path, newKey(t), asksForAll)
		}
	})
	// The attestation path is used up from here on.
	t.Run("C31 1,000 RDNs", func(t *testing.T) {
		for _, path := range paths[1:4] {
			checkLeaf(t, path, newKey(t), func(p *csrParts) { p.name = rdns(1000, "a") })
		}
	})
	t.Run("C38 a workload's key again", func(t *testing.T) {
		key := newKey(t)
		for _, path := range paths[2:4] {
			checkLeaf(t, path, key, nil)
			checkLeaf(t, path, key, nil)
		}
	})
	t.Run("C39 C40 batches", func(t *testing.T) { checkBatches(t, agent.conn, grant.Id) })
	t.Run("mint", func(t *testing.T) { checkMint(t, paths[4]) })
	t.Run("C35 never logged", func(t *testing.T) {
		d.checkNowhere(t, "canary-challenge")
	})
}

// checkLeaf has a request signed and holds the certificate to the path's ID.
func checkLeaf(t *testing.T, path signingPath, key *ecdsa.PrivateKey, edit func(*csrParts)) {
	t.Helper()
	chain, err := path.sign(t.Context(), makeCSR(t, key, edit))
	if err != nil {
		t.Errorf("%s: %v", path.name, err)
		return
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil || id.String() != path.want {
		t.Errorf("%s: the certificate is for %v %v, want %s", path.name, id, err, path.want)
	}
	dns := 0
	if strings.HasSuffix(path.want, "/workload") {
		dns = 1 // the entry's
	}
	if leaf.IsCA || !leaf.BasicConstraintsValid || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.DNSNames) != dns ||
		len(leaf.IPAddresses) > 0 || len(leaf.EmailAddresses) > 0 || len(leaf.UnhandledCriticalExtensions) > 0 || leaf.Subject.CommonName == "root" {
		t.Errorf("%s: the certificate has more than its entry says: %+v", path.name, leaf)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("%s: the certificate is for another key", path.name)
	}
}

func checkBatches(t *testing.T, conn *grpc.ClientConn, grant string) {
	svids, issue := svidv1.NewSVIDClient(conn), issuev1.NewIssueClient(conn)
	for _, n := range []int{501, 100_001} {
		_, err := svids.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: fill(n, &svidv1.NewX509SVIDParams{})})
		denied(t, fmt.Sprintf("C39 BatchNewX509SVID of %d", n), err)
		_, err = issue.X509(t.Context(), &issuev1.X509Request{Items: fill(n, &issuev1.X509Item{})})
		denied(t, fmt.Sprintf("C39 Issue.X509 of %d", n), err)
	}
	good := makeCSR(t, newKey(t), nil)
	bad := bytes.Clone(good)
	bad[len(bad)-1] ^= 1
	params, items := fill(100, &svidv1.NewX509SVIDParams{EntryId: grant, Csr: good}), fill(100, &issuev1.X509Item{GrantId: grant, Csr: good})
	params[41], items[41] = &svidv1.NewX509SVIDParams{EntryId: grant, Csr: bad}, &issuev1.X509Item{GrantId: grant, Csr: bad}
	batch, err := svids.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: params})
	if err != nil {
		t.Fatal(err)
	}
	issued, err := issue.X509(t.Context(), &issuev1.X509Request{Items: items})
	if err != nil {
		t.Fatal(err)
	}
	if len(batch.Results) != 100 || len(issued.Results) != 100 {
		t.Fatalf("C40: %d and %d results", len(batch.Results), len(issued.Results))
	}
	for i := range 100 {
		if refused := codes.Code(batch.Results[i].Status.Code) == codes.InvalidArgument; refused != (i == 41) || refused == (len(batch.Results[i].GetSvid().GetCertChain()) > 0) {
			t.Errorf("C40 BatchNewX509SVID item %d: %v", i, batch.Results[i].Status)
		}
		if refused := issued.Results[i].GetRefusal().GetReason() == "csr_signature_invalid"; refused != (i == 41) || refused == (len(issued.Results[i].CertChain) > 0) {
			t.Errorf("C40 Issue.X509 item %d: %v", i, issued.Results[i].GetRefusal())
		}
	}
}

func fill[T any](n int, item T) []T {
	all := make([]T, n)
	for i := range all {
		all[i] = item
	}
	return all
}

// checkMint goes through the rows in which the request itself names the identity.
func checkMint(t *testing.T, mint signingPath) {
	key := newKey(t)
	names := func(all ...[]byte) []byte {
		return makeCSR(t, key, func(p *csrParts) { p.attributes = attributes(withExtensions(altNames(all...))) })
	}
	const id = "spiffe://example.org/minted"
	for row, csr := range map[string][]byte{
		"C26 none":                     makeCSR(t, key, nil),
		"C26 two":                      names(uriName(id), uriName(id+"2")),
		"C26 twice the same":           names(uriName(id), uriName(id)),
		"C27 server":                   names(uriName("spiffe://example.org/spire/server")),
		"C27 agent":                    names(uriName("spiffe://example.org/spire/agent/join_token/x")),
		"C27 foreign":                  names(uriName("spiffe://other.org/minted")),
		"C28 wildcard over a name":     names(uriName(id), dnsName("a.example.org"), dnsName("*.example.org")),
		"C28 wildcard before the name": names(uriName(id), dnsName("*.example.org"), dnsName("a.example.org")),
		"C28 wildcard alone":           names(uriName(id), dnsName("*")),
		"S30 NUL in a DNS name":        names(uriName(id), dnsName("a.example.org\x00.evil.org")),
	} {
		_, err := mint.sign(t.Context(), csr)
		denied(t, row, err)
	}
	chain, err := mint.sign(t.Context(), makeCSR(t, key, func(p *csrParts) {
		asksForAll(p)
		p.attributes = bytes.Replace(p.attributes, []byte("spiffe://example.org/admin"), []byte("spiffe://example.org/minty"), 1)
	}))
	if err != nil {
		t.Fatalf("C23 mint: %v", err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.IPAddresses) > 0 || len(leaf.EmailAddresses) > 0 ||
		len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/minty" {
		t.Errorf("C23 mint: %+v", leaf)
	}
}

// agents are the agents that the server knows.
func (d *deployment) agents() []*spiretypes.Agent {
	d.t.Helper()
	resp, err := agentv1.NewAgentClient(dialUnix(d.t, d.adminSocket())).ListAgents(d.t.Context(), &agentv1.ListAgentsRequest{})
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.Agents
}
