package svid

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
)

// Limits on the names of a leaf.
const (
	maxDNSNames   = 100
	maxDNSName    = 253
	maxCommonName = 64 // RFC 5280 appendix A.1, ub-common-name-length
)

// X509Issuer signs leaves under one authority. It may be used concurrently.
type X509Issuer struct {
	signer crypto.Signer
	scheme scheme
	chain  [][]byte // what follows the leaf on the wire: intermediates, no root
	keys   [][]byte // the chain's SPKIs, which no leaf may have
	ca     *x509.Certificate
	below  int // how many authorities may stand below it

	name      []byte // the issuing CA's subject
	keyID     []byte // its subject key identifier
	authority []byte // the authorityKeyIdentifier extension, DER
	notBefore time.Time
	notAfter  time.Time // the earliest end of all certificates above a leaf
	above     time.Time // the earliest end of those above the issuing CA's; zero: there are none
}

// Leaf is what an X.509-SVID shall say.
type Leaf struct {
	ID        spiffeid.ID
	Key       PublicKey
	DNSNames  []string // the first becomes the subject's CN if it fits
	NotBefore time.Time
	NotAfter  time.Time
}

// X509 is an issued X.509-SVID.
type X509 struct {
	ID        spiffeid.ID
	Chain     [][]byte // DER, leaf first, without the root
	Serial    string   // decimal
	NotBefore time.Time
	NotAfter  time.Time
	KeyHash   [32]byte // SHA-256 of the leaf's SPKI
}

// PreparedX509 is a linted leaf that can be signed once.
type PreparedX509 struct {
	issuer *X509Issuer
	leaf   Leaf // as capped by the issuer
	serial *big.Int
	tbs    []byte
	used   atomic.Bool
}

// NewX509Issuer makes an issuer from its CA chain (DER, issuing CA first) and
// the issuing CA's key. A self-signed certificate in the chain is a root: it
// caps lifetimes but is not sent.
func NewX509Issuer(caChain [][]byte, signer crypto.Signer) (*X509Issuer, error) {
	if len(caChain) == 0 {
		return nil, fault.New(fault.Invalid, "ca_invalid", "an issuer needs the certificate of its authority")
	}
	spki, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, fmt.Errorf("encode authority key: %w", err)
	}
	scheme, err := schemeOf(signer.Public())
	if err != nil {
		return nil, err
	}
	i := &X509Issuer{signer: signer, scheme: scheme}
	var certificates []*x509.Certificate
	for n, der := range caChain {
		ca, err := x509.ParseCertificate(der)
		switch {
		case err != nil:
			return nil, fault.New(fault.Invalid, "ca_invalid", "certificate %d of the authority's chain cannot be read", n).Because(err)
		case !maySign(ca):
			return nil, fault.New(fault.Invalid, "ca_invalid", "certificate %d of the authority's chain may not sign certificates", n)
		}
		if n == 0 {
			switch {
			case !bytes.Equal(ca.RawSubjectPublicKeyInfo, spki):
				return nil, fault.New(fault.Invalid, "ca_invalid", "the authority's certificate is for another key")
			case len(ca.SubjectKeyId) == 0 || len(ca.Subject.Names) == 0:
				return nil, fault.New(fault.Invalid, "ca_invalid", "the authority's certificate has no subject or no subject key identifier")
			}
			i.ca, i.name, i.keyID, i.notBefore, i.notAfter = ca, ca.RawSubject, ca.SubjectKeyId, ca.NotBefore, ca.NotAfter
		}
		if ca.NotAfter.Before(i.notAfter) {
			i.notAfter = ca.NotAfter
		}
		if n > 0 && (i.above.IsZero() || ca.NotAfter.Before(i.above)) {
			i.above = ca.NotAfter
		}
		i.keys = append(i.keys, ca.RawSubjectPublicKeyInfo)
		certificates = append(certificates, ca)
		if !selfSigned(ca) {
			i.chain = append(i.chain, slices.Clone(der))
		}
	}
	above := 1
	if selfSigned(certificates[len(certificates)-1]) {
		above = 0
	}
	i.below = room(certificates, above)
	if i.authority, err = authorityKeyID(i.keyID); err != nil {
		return nil, fmt.Errorf("encode authority key identifier: %w", err)
	}
	return i, nil
}

// NotAfter is when the first certificate above a leaf ends.
func (i *X509Issuer) NotAfter() time.Time { return i.notAfter }

// Ends is when the issuing CA's certificate ends, and when the first of those above
// it does; zero if there are none.
func (i *X509Issuer) Ends() (own, above time.Time) { return i.ca.NotAfter, i.above }

// AuthorityID is the lower-case hex of the issuing CA's subject key identifier.
func (i *X509Issuer) AuthorityID() string { return fmt.Sprintf("%x", i.keyID) }

// Prepare checks what a leaf shall say, cuts its validity to the issuer's (R8),
// assembles the bytes to be signed and lints them.
func (i *X509Issuer) Prepare(leaf Leaf) (*PreparedX509, error) {
	if err := checkID(leaf.ID); err != nil {
		return nil, err
	}
	if err := checkDNSNames(leaf.DNSNames); err != nil {
		return nil, err
	}
	// R4, C36: an authority's key in a leaf would let its holder sign leaves.
	if len(leaf.Key.SPKI) == 0 || slices.ContainsFunc(i.keys, func(k []byte) bool { return bytes.Equal(k, leaf.Key.SPKI) }) {
		return nil, errKey("it is the key of an authority")
	}
	leaf.NotBefore, leaf.NotAfter = leaf.NotBefore.UTC().Truncate(time.Second), leaf.NotAfter.UTC().Truncate(time.Second)
	if leaf.NotBefore.Before(i.notBefore) {
		leaf.NotBefore = i.notBefore
	}
	if leaf.NotAfter.After(i.notAfter) {
		leaf.NotAfter = i.notAfter
	}
	if !leaf.NotBefore.Before(leaf.NotAfter) {
		return nil, fault.New(fault.Unavailable, "lifetime_empty", "the certificate would end before it begins").
			Fix("the authority may be at its end: retry, and check the server's clock")
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tbs, err := i.assemble(&leaf, serial)
	if err != nil {
		return nil, fmt.Errorf("assemble certificate: %w", err)
	}
	if err := i.lint(tbs, &leaf); err != nil {
		return nil, fmt.Errorf("lint certificate: %w", err)
	}
	return &PreparedX509{issuer: i, leaf: leaf, serial: serial, tbs: tbs}, nil
}

// NotAfter is the end that the certificate will have.
func (p *PreparedX509) NotAfter() time.Time { return p.leaf.NotAfter }

// Serial is the decimal serial number that the certificate will have, so that
// it can be put on record before the certificate exists (R14).
func (p *PreparedX509) Serial() string { return p.serial.String() }

// Issue signs. It works once.
func (p *PreparedX509) Issue() (X509, error) {
	if p.used.Swap(true) {
		return X509{}, fault.New(fault.Precondition, "already_issued", "a prepared certificate can be signed only once")
	}
	i := p.issuer
	signature, err := i.scheme.sign(i.signer, p.tbs)
	if err != nil {
		return X509{}, err
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, len(p.tbs)+len(signature)+32))
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(p.tbs)
		b.AddBytes([]byte(i.scheme.algorithm))
		b.AddASN1BitString(signature)
	})
	der, err := b.Bytes()
	if err != nil {
		return X509{}, fmt.Errorf("assemble certificate: %w", err)
	}
	if err := p.reread(der); err != nil {
		return X509{}, err
	}
	return X509{
		ID: p.leaf.ID, Chain: append([][]byte{der}, i.chain...), Serial: p.Serial(),
		NotBefore: p.leaf.NotBefore, NotAfter: p.leaf.NotAfter, KeyHash: p.leaf.Key.Hash,
	}, nil
}

// reread parses the signed certificate by another path than the one that made
// it and compares what matters most.
func (p *PreparedX509) reread(der []byte) error {
	c, err := x509.ParseCertificate(der)
	switch {
	case err != nil:
		return fault.New(fault.Internal, "issue_unsound", "the signed certificate cannot be parsed").Because(err)
	case c.IsCA || c.KeyUsage != x509.KeyUsageDigitalSignature || len(c.UnhandledCriticalExtensions) > 0 ||
		len(c.URIs) != 1 || c.URIs[0].String() != p.leaf.ID.String() || !slices.Equal(c.DNSNames, p.leaf.DNSNames) ||
		!bytes.Equal(c.RawSubjectPublicKeyInfo, p.leaf.Key.SPKI) || c.SerialNumber.Cmp(p.serial) != 0 ||
		!c.NotBefore.Equal(p.leaf.NotBefore) || !c.NotAfter.Equal(p.leaf.NotAfter):
		return fault.New(fault.Internal, "issue_unsound", "the signed certificate is not what was prepared")
	}
	return nil
}

// newSerial draws 127 random bits (R7).
func newSerial() (*big.Int, error) {
	var b [16]byte
	for {
		if _, err := rand.Read(b[:]); err != nil {
			return nil, fmt.Errorf("draw serial number: %w", err)
		}
		b[0] &= 0x7f
		if serial := new(big.Int).SetBytes(b[:]); serial.Sign() > 0 {
			return serial, nil
		}
	}
}

// checkID wants an ID with a path, not longer than the standard lets anyone
// issue. That it is well formed its type says.
func checkID(id spiffeid.ID) error {
	if id.Path() == "" {
		return fault.New(fault.Invalid, "spiffe_id_no_path", "%q has no path", id)
	}
	if len(id.String()) > identity.MaxID || len(id.TrustDomain().Name()) > identity.MaxTrustDomain {
		return fault.New(fault.Invalid, "spiffe_id_invalid", "the SPIFFE ID is longer than %d bytes, or its trust domain than %d",
			identity.MaxID, identity.MaxTrustDomain)
	}
	return nil
}

// checkDNSNames refuses what a certificate cannot carry. What a grant may name
// is judged where grants are made.
func checkDNSNames(names []string) error {
	if len(names) > maxDNSNames {
		return fault.New(fault.Invalid, "dns_name_invalid", "%d DNS names are more than the %d allowed", len(names), maxDNSNames)
	}
	for _, name := range names {
		if !validDNSName(name) {
			return fault.New(fault.Invalid, "dns_name_invalid", "%q is not a DNS name", name)
		}
	}
	return nil
}

func validDNSName(name string) bool {
	if name == "" || len(name) > maxDNSName {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_', c == '*':
		default:
			return false
		}
	}
	return true
}
