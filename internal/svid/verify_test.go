package svid

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/fault"
)

// pki makes chains that no issuer of ours would make.
type pki struct {
	t    testing.TB
	now  time.Time
	key  crypto.Signer // of everything but the root, unless said otherwise
	root authority
}

func newPKI(t testing.TB) *pki {
	now := time.Now()
	return &pki{t, now, newEC(t, elliptic.P256()), newAuthority(t, newEC(t, elliptic.P256()), now)}
}

// names encodes a subjectAltName of URIs as they are.
func (p *pki) names(critical bool, uris ...string) pkix.Extension {
	var list []asn1.RawValue
	for _, u := range uris {
		list = append(list, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	return p.extension(critical, list, 2, 5, 29, 17)
}

func (p *pki) extension(critical bool, value any, oid ...int) pkix.Extension {
	return pkix.Extension{Id: oid, Critical: critical, Value: mustDER(p.t, value)}
}

// leafTemplate is a sound leaf, for edit to spoil.
func (p *pki) leafTemplate() *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(5), Subject: pkix.Name{Organization: []string{"x"}}, NotBefore: p.now.Add(-time.Minute), NotAfter: p.now.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		ExtraExtensions: []pkix.Extension{p.names(false, "spiffe://example.org/a")},
	}
}

func (p *pki) caTemplate() *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(6), Subject: pkix.Name{CommonName: "intermediate"}, NotBefore: p.now.Add(-time.Minute), NotAfter: p.now.Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
}

func (p *pki) sign(template, parent *x509.Certificate, public any, signer crypto.Signer) []byte {
	p.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		p.t.Fatal(err)
	}
	return der
}

// leaf is a leaf below the root.
func (p *pki) leaf(edit func(c *x509.Certificate)) []byte {
	p.t.Helper()
	c := p.leafTemplate()
	if edit != nil {
		edit(c)
	}
	return p.sign(c, p.root.root, p.key.Public(), p.root.key)
}

// below is a leaf below an intermediate.
func (p *pki) below(editCA, editLeaf func(c *x509.Certificate)) [][]byte {
	p.t.Helper()
	caKey := newEC(p.t, elliptic.P256())
	c := p.caTemplate()
	if editCA != nil {
		editCA(c)
	}
	ca := p.sign(c, p.root.root, caKey.Public(), p.root.key)
	l := p.leafTemplate()
	if editLeaf != nil {
		editLeaf(l)
	}
	return [][]byte{p.sign(l, c, p.key.Public(), caKey), ca}
}

// long is a chain of that many certificates with the leaf.
func (p *pki) long(certificates int) [][]byte {
	p.t.Helper()
	parent, key := p.root.root, p.root.key
	var chain [][]byte
	for i := range certificates - 1 {
		c := p.caTemplate()
		c.Subject.CommonName = fmt.Sprint("intermediate ", i)
		next := newEC(p.t, elliptic.P256())
		chain = append([][]byte{p.sign(c, parent, next.Public(), key)}, chain...)
		parent, key = c, next
	}
	return append([][]byte{p.sign(p.leafTemplate(), parent, p.key.Public(), key)}, chain...)
}

// TestCorpusL holds VerifyX509 to corpus L and PeerID to the SPIFFE ID corpus. R41.
func TestCorpusL(t *testing.T) {
	p := newPKI(t)
	one := func(edit func(c *x509.Certificate)) [][]byte { return [][]byte{p.leaf(edit)} }
	uris := func(uris ...string) [][]byte {
		return one(func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{p.names(false, uris...)} })
	}
	add := func(e pkix.Extension) func(c *x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtraExtensions = append(c.ExtraExtensions, e) }
	}
	usage := func(critical bool, bits ...byte) func(c *x509.Certificate) {
		return func(c *x509.Certificate) {
			c.KeyUsage = 0
			add(p.extension(critical, asn1.BitString{Bytes: bits, BitLength: 8 * len(bits)}, 2, 5, 29, 15))(c)
		}
	}
	extended := func(u ...x509.ExtKeyUsage) func(c *x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtKeyUsage = u }
	}
	unknown := p.extension(true, 1, 1, 2, 3, 4)
	constraint := func(permitted bool, host string) pkix.Extension {
		tag := 1
		if permitted {
			tag = 0
		}
		subtree := []asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(host)}}
		return p.extension(true, []asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: true, Bytes: mustDER(t, subtree)}}, 2, 5, 29, 30)
	}
	otherRoot := newAuthority(t, newEC(t, elliptic.P256()), p.now)
	rsaWeak := newRSA(t, 1024)
	p224 := newEC(t, elliptic.P224())
	bomb := func(c *x509.Certificate) {
		for i := range 10000 {
			c.DNSNames = append(c.DNSNames, fmt.Sprintf("host-%d.example.org", i))
		}
		c.ExtraExtensions = nil
	}
	selfSigned := p.leafTemplate()
	tampered := p.leaf(nil)
	at := bytes.Index(tampered, []byte("spiffe://example.org/a"))
	tampered[at+len("spiffe://example.org/")] = 'b'
	innerOuter := bytes.Clone(p.leaf(nil))
	last := bytes.LastIndex(innerOuter, []byte(sigECDSA256))
	innerOuter[last+len(sigECDSA256)-1] = 3 // says SHA-384 outside

	reject := map[string][][]byte{
		"L1 no URI":                 one(func(c *x509.Certificate) { c.ExtraExtensions, c.DNSNames = nil, []string{"a.example.org"} }),
		"L1 two URIs":               uris("spiffe://example.org/a", "https://x/"),
		"L1 two SPIFFE IDs":         uris("spiffe://example.org/a", "spiffe://example.org/b"),
		"L1 one URI twice":          uris("spiffe://example.org/a", "spiffe://example.org/a"),
		"L3 S4 (T-ID-1)":            uris("SPIFFE://example.org/a"),
		"L3 S5":                     uris("https://example.org/a"),
		"L3 S7":                     uris("spiffe://EXAMPLE.org/a"),
		"L3 S8":                     uris("spiffe://example.org:8081/a"),
		"L3 S9":                     uris("spiffe://user@example.org/a"),
		"L3 S12":                    uris("spiffe://example.org/a?"),
		"L3 S14":                    uris("spiffe://example.org/a#"),
		"L3 S15":                    uris("spiffe://example.org/a/"),
		"L3 S17":                    uris("spiffe://example.org//a"),
		"L3 S19":                    uris("spiffe://example.org/a/../b"),
		"L3 S22":                    uris("spiffe://example.org/%2e%2e/b"),
		"L3 S23":                    uris("spiffe://example.org/a%2Fb"),
		"L3 S38":                    uris("spiffe://example.org/" + strings.Repeat("a", 2049-21)),
		"L4 ID in CN only":          one(func(c *x509.Certificate) { c.ExtraExtensions, c.Subject.CommonName = nil, "spiffe://example.org/a" }),
		"L5 CA":                     one(func(c *x509.Certificate) { c.IsCA = true }),
		"L6 keyCertSign":            one(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }),
		"L6 cRLSign":                one(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }),
		"L7 no key usage":           one(func(c *x509.Certificate) { c.KeyUsage = 0 }),
		"L7 key usage not critical": one(usage(false, 0x80)),
		"L7 no digitalSignature":    one(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }),
		"L8 server only":            one(extended(x509.ExtKeyUsageServerAuth)),
		"L8 client only":            one(extended(x509.ExtKeyUsageClientAuth)),
		"L8 any":                    one(extended(x509.ExtKeyUsageAny)),
		"L8 code signing":           one(extended(x509.ExtKeyUsageCodeSigning)),
		"L8 empty": one(func(c *x509.Certificate) {
			c.ExtKeyUsage = nil
			add(p.extension(false, []asn1.ObjectIdentifier{}, 2, 5, 29, 37))(c)
		}),
		"L9 root as leaf":                     {p.root.der},
		"L9 intermediate as leaf":             {intermediateCA(t, p.root, p.key, "spiffe://example.org", p.now.Add(time.Hour))},
		"L10 no path":                         uris("spiffe://example.org"),
		"L11 L32 another trust domain's root": {p.sign(p.leafTemplate(), otherRoot.root, p.key.Public(), otherRoot.key)},
		"L11 another trust domain":            uris("spiffe://foreign.test/a"),
		"L13 intermediate is no CA":           p.below(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }, nil),
		"L13 intermediate may not sign":       p.below(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, nil),
		"L13 path length":                     p.pathLength(),
		"L13 X509-3.2-c workload as CA":       p.below(add(p.names(false, "spiffe://example.org/a")), nil),
		"L14 leaf has expired":                one(func(c *x509.Certificate) { c.NotAfter = p.now.Add(-time.Second) }),
		"L14 leaf is not valid yet":           one(func(c *x509.Certificate) { c.NotBefore = p.now.Add(time.Minute) }),
		"L14 intermediate has expired":        p.below(func(c *x509.Certificate) { c.NotAfter = p.now.Add(-time.Second) }, nil),
		"L14 intermediate not valid yet":      p.below(func(c *x509.Certificate) { c.NotBefore = p.now.Add(time.Minute) }, nil),
		"L16 critical in the leaf":            one(add(unknown)),
		"L16 critical in an intermediate":     p.below(add(unknown), nil),
		"L17 not permitted":                   p.below(add(constraint(true, "other.test")), nil),
		"L17 excluded":                        p.below(add(constraint(false, "example.org")), nil),
		"L17 malformed":                       p.below(add(pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 30}, Critical: true, Value: []byte{0x30, 2, 1}}), nil),
		"L17 in the leaf":                     one(add(constraint(true, "example.org"))),
		"L18 L25 10,000 names":                one(bomb),
		"L19 nine certificates":               p.long(9),
		"L19 eight, nine with the root":       p.long(8),
		"L19 100 intermediates":               append([][]byte{p.leaf(nil)}, slicesRepeat(p.root.der, 100)...),
		"L20 extension twice":                 p.extensionTwice(),
		"L20 serial zero":                     p.serial([]byte{0}),
		"L20 serial negative":                 p.serial([]byte{0xfb}),
		"L20 serial of 21 bytes":              p.serial(bytes.Repeat([]byte{0x11}, 21)),
		"L22 RSA 1024":                        {p.sign(p.leafTemplate(), p.root.root, rsaWeak.Public(), p.root.key)},
		"L22 P-224":                           {p.sign(p.leafTemplate(), p.root.root, p224.Public(), p.root.key)},
		"L22 SHA-1":                           p.sha1(),
		"L23 inner and outer":                 {innerOuter},
		"L24 trailing byte":                   {append(p.leaf(nil), 0)},
		"L24 indefinite length":               {append(append([]byte{0x30, 0x80}, contentOf(t, p.leaf(nil))...), 0, 0)},
		"L25 over 64 KiB":                     {p.leaf(nil), make([]byte, 64<<10)},
		"L26 self-signed leaf":                {p.sign(selfSigned, selfSigned, p.key.Public(), p.key)},
		"L27 none":                            {},
		"L27 garbage":                         {[]byte("garbage")},
		"L27 empty":                           {nil},
		"L27 leaf not first":                  {p.below(nil, nil)[1], p.below(nil, nil)[0]},
		"L27 PEM":                             {[]byte("-----BEGIN CERTIFICATE-----\n")},
		"L30 NUL":                             uris("spiffe://example.org/a\x00b"),
		"L30 control byte in a DNS name":      one(func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{p.mixed("a\x07b")} }),
		"subject empty, names not critical":   one(func(c *x509.Certificate) { c.Subject = pkix.Name{} }),
		"bytes changed":                       {tampered},
	}
	roots := []*x509.Certificate{p.root.root}
	td := spiffeid.RequireTrustDomainFromString("example.org")
	for name, chain := range reject {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			id, err := VerifyX509(chain, roots, td, p.now)
			if took := time.Since(begin); took > 10*time.Second { // of microseconds
				t.Errorf("took %v", took)
			}
			if fault.KindOf(err) != fault.Unauthenticated {
				t.Errorf("VerifyX509() = %v, %v; want a refusal", id, err)
			}
		})
	}
	accept := map[string][][]byte{
		"plain":                    one(nil),
		"L2 other names":           one(func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{p.mixed("a.example.org")} }),
		"L3 S37":                   uris("spiffe://example.org/" + strings.Repeat("a", 2048-21)),
		"L8 no extended key usage": one(extended()),
		"L12 intermediate of another trust domain": p.below(add(p.names(false, "spiffe://foreign.test")), nil),
		"L12 intermediate without ID":              p.below(nil, nil),
		"T-ID-5 slash in a CA's ID":                p.below(add(p.names(false, "spiffe://example.org/")), nil),
		"L15 2049":                                 one(func(c *x509.Certificate) { c.NotAfter = time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC) }),
		"L15 2050":                                 one(func(c *x509.Certificate) { c.NotAfter = time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC) }),
		"L15 9999":                                 one(func(c *x509.Certificate) { c.NotAfter = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) }),
		"L17 permitted":                            p.below(add(constraint(true, "example.org")), nil),
		"L19 seven, eight with the root":           p.long(7),
		"L33 L34 pointers": one(func(c *x509.Certificate) {
			c.OCSPServer, c.CRLDistributionPoints, c.IssuingCertificateURL = []string{"http://127.0.0.1:1/"}, []string{"http://127.0.0.1:1/"}, []string{"http://127.0.0.1:1/"}
		}),
		"unrelated certificate beside":    {p.leaf(nil), otherRoot.der},
		"T-X509-4 EKU on an intermediate": p.below(extended(x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth), nil),
		"subject empty, names critical": one(func(c *x509.Certificate) {
			c.Subject, c.ExtraExtensions = pkix.Name{}, []pkix.Extension{p.names(true, "spiffe://example.org/a")}
		}),
	}
	for name, chain := range accept {
		t.Run(name, func(t *testing.T) {
			id, err := VerifyX509(chain, roots, td, p.now)
			if err != nil || id.TrustDomain() != td || id.Path() == "" {
				t.Errorf("VerifyX509() = %v, %v", id, err)
			}
		})
	}
	t.Run("L14 root has expired", func(t *testing.T) {
		if _, err := VerifyX509(one(func(c *x509.Certificate) { c.NotAfter = p.now.Add(1000 * time.Hour) }), roots, td, p.now.Add(48*time.Hour)); err == nil {
			t.Error("accepted")
		}
	})
	t.Run("L16 critical in an unrelated root", func(t *testing.T) {
		c := p.caTemplate()
		add(unknown)(c)
		odd, err := x509.ParseCertificate(p.sign(c, c, p.key.Public(), p.key))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyX509(one(nil), []*x509.Certificate{odd, p.root.root}, td, p.now); err != nil {
			t.Error(err)
		}
	})
	t.Run("L21 B40 RG28 200 roots of one name and key identifier", func(t *testing.T) {
		var many []*x509.Certificate
		for range 200 {
			c := p.caTemplate()
			c.RawSubject, c.SubjectKeyId = p.root.root.RawSubject, p.root.root.SubjectKeyId
			key := newEC(t, elliptic.P256())
			root, err := x509.ParseCertificate(p.sign(c, c, key.Public(), key))
			if err != nil {
				t.Fatal(err)
			}
			many = append(many, root)
		}
		// Go stops after 100 signatures; authorities of ours never share a name.
		if _, err := VerifyX509(one(nil), append(many[:50:50], p.root.root), td, p.now); err != nil {
			t.Error(err)
		}
		VerifyX509(one(nil), append(many, p.root.root), td, p.now)
		for i := range many {
			many[i] = newAuthority(t, newEC(t, elliptic.P256()), p.now).root
		}
		if _, err := VerifyX509(one(nil), append(many, p.root.root), td, p.now); err != nil {
			t.Errorf("200 authorities of ours: %v", err)
		}
	})
	t.Run("no roots", func(t *testing.T) {
		if _, err := VerifyX509(one(nil), nil, td, p.now); err == nil {
			t.Error("accepted")
		}
	})
}

func slicesRepeat(der []byte, n int) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		out[i] = der
	}
	return out
}

// mixed are names of every kind with one URI.
func (p *pki) mixed(dns string) pkix.Extension {
	context := asn1.ClassContextSpecific
	return p.extension(false, []asn1.RawValue{
		{Class: context, Tag: 1, Bytes: []byte("a@example.org")}, {Class: context, Tag: 2, Bytes: []byte(dns)},
		{Class: context, Tag: 7, Bytes: net.IPv4(127, 0, 0, 1).To4()}, {Class: context, Tag: 6, Bytes: []byte("spiffe://example.org/a")},
	}, 2, 5, 29, 17)
}

// pathLength is a chain with one CA more than the first allows.
func (p *pki) pathLength() [][]byte {
	first, second := p.caTemplate(), p.caTemplate()
	first.MaxPathLenZero = true
	second.Subject.CommonName = "second"
	firstKey, secondKey := newEC(p.t, elliptic.P256()), newEC(p.t, elliptic.P256())
	return [][]byte{
		p.sign(p.leafTemplate(), second, p.key.Public(), secondKey),
		p.sign(second, first, secondKey.Public(), firstKey),
		p.sign(first, p.root.root, firstKey.Public(), p.root.key),
	}
}

// resign replaces bytes of a leaf's TBS and signs again with the root's key.
func (p *pki) resign(edit func(tbs []byte) []byte) [][]byte {
	p.t.Helper()
	c, err := x509.ParseCertificate(p.leaf(nil))
	if err != nil {
		p.t.Fatal(err)
	}
	tbs := mustDER(p.t, asn1.RawValue{Class: 0, Tag: asn1.TagSequence, IsCompound: true, Bytes: edit(contentOf(p.t, c.RawTBSCertificate))})
	scheme, err := schemeOf(p.root.key.Public())
	if err != nil {
		p.t.Fatal(err)
	}
	signature, err := scheme.sign(p.root.key, tbs)
	if err != nil {
		p.t.Fatal(err)
	}
	algorithm := scheme.algorithm
	if bytes.Contains(tbs, []byte(sigECDSA1)) {
		algorithm = sigECDSA1
	}
	return [][]byte{assembleRequest(p.t, tbs, []byte(algorithm), signature)}
}

// sigECDSA1 is the AlgorithmIdentifier of ECDSA with SHA-1.
const sigECDSA1 = "\x30\x09\x06\x07\x2a\x86\x48\xce\x3d\x04\x01"

func (p *pki) serial(number []byte) [][]byte {
	return p.resign(func(tbs []byte) []byte {
		return bytes.Replace(tbs, []byte{2, 1, 5}, append([]byte{2, byte(len(number))}, number...), 1)
	})
}

func (p *pki) extensionTwice() [][]byte {
	return p.resign(func(tbs []byte) []byte {
		at := bytes.Index(tbs, []byte(extBasicConstraints))
		list := bytes.LastIndex(tbs[:at], []byte{0xa3, 0x81})
		out := bytes.Clone(tbs[:at])
		out = append(append(out, extBasicConstraints...), tbs[at:]...)
		out[list+2] += byte(len(extBasicConstraints))
		out[list+5] += byte(len(extBasicConstraints))
		return out
	})
}

// sha1 is a leaf that says it is signed with SHA-1.
func (p *pki) sha1() [][]byte {
	return p.resign(func(tbs []byte) []byte {
		return bytes.Replace(tbs, []byte(sigECDSA256), []byte(sigECDSA1), 1)
	})
}
