package svid

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/fault"
)

// Authority is what the certificate of an intermediate authority shall say.
type Authority struct {
	TrustDomain spiffeid.TrustDomain
	Key         PublicKey
	Unit        string // the subject's OU; empty: none
	// Constrain limits the URI names below it to those of the trust domain (R13).
	// It has no effect for a trust domain that looks like an IPv4 address, whose
	// certificates crypto/x509 would then refuse.
	Constrain bool
	NotBefore time.Time
	NotAfter  time.Time
}

// PreparedAuthority is an authority's certificate that can be signed once.
type PreparedAuthority struct {
	authority Authority
	parent    *x509.Certificate
	signer    crypto.Signer
	template  *x509.Certificate
	chain     [][]byte // above it, without the root
	used      atomic.Bool
}

// Depth is how many authorities lie between a leaf and the root, the root included.
func (i *X509Issuer) Depth() int { return len(i.keys) }

// PrepareAuthority checks what an intermediate below the issuer shall say, cuts
// its validity to the issuer's (R8) and its path length to what the issuer's and
// maxChain leave, and tries the profile on a copy that a throw-away key signs (R5).
func (i *X509Issuer) PrepareAuthority(a Authority) (*PreparedAuthority, error) {
	if len(a.Key.SPKI) == 0 || slices.ContainsFunc(i.keys, func(k []byte) bool { return bytes.Equal(k, a.Key.SPKI) }) {
		return nil, errKey("it is the key of an authority") // R4
	}
	a.NotBefore, a.NotAfter = a.NotBefore.UTC().Truncate(time.Second), a.NotAfter.UTC().Truncate(time.Second)
	if a.NotBefore.Before(i.notBefore) {
		a.NotBefore = i.notBefore
	}
	if a.NotAfter.After(i.notAfter) {
		a.NotAfter = i.notAfter
	}
	if !a.NotBefore.Before(a.NotAfter) {
		return nil, fault.New(fault.Unavailable, "lifetime_empty", "the authority would end before it begins").
			Fix("the authority above may be at its end: retry, and check the server's clock")
	}
	if i.below < 1 {
		return nil, fault.New(fault.Precondition, "path_length_exhausted",
			"no authority may stand below this one: a path length above it, or the limit of %d certificates, leaves no room", maxChain).
			Fix("nest less deep, or have the authority above made with a larger path length")
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	keyID, err := subjectKeyID(a.Key.Key)
	if err != nil {
		return nil, err
	}
	subject := pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}, SerialNumber: serial.String()}
	if a.Unit != "" {
		subject.OrganizationalUnit = []string{a.Unit}
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: subject, NotBefore: a.NotBefore, NotAfter: a.NotAfter,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:     true, BasicConstraintsValid: true, MaxPathLen: i.below - 1, MaxPathLenZero: true,
		SubjectKeyId: keyID,
		URIs:         []*url.URL{a.TrustDomain.ID().URL()},
	}
	if _, err := netip.ParseAddr(a.TrustDomain.Name()); a.Constrain && err != nil {
		t.PermittedURIDomains, t.PermittedDNSDomainsCritical = []string{a.TrustDomain.Name()}, true // critical, whatever kind of name
	}
	p := &PreparedAuthority{authority: a, parent: i.ca, signer: i.signer, template: t, chain: i.chain}
	throwaway, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	parent := *i.ca
	parent.PublicKey = throwaway.Public()
	if _, err := p.sign(&parent, throwaway); err != nil {
		return nil, fmt.Errorf("lint authority certificate: %w", err)
	}
	return p, nil
}

// NotAfter is the end that the certificate will have.
func (p *PreparedAuthority) NotAfter() time.Time { return p.authority.NotAfter }

// Serial is the decimal serial number that the certificate will have.
func (p *PreparedAuthority) Serial() string { return p.template.SerialNumber.String() }

// ID is the authority ID that it will have.
func (p *PreparedAuthority) ID() string { return fmt.Sprintf("%x", p.template.SubjectKeyId) }

// Issue signs, once, and returns the chain: the new certificate first, without the root.
func (p *PreparedAuthority) Issue() ([][]byte, error) {
	if p.used.Swap(true) {
		return nil, fault.New(fault.Precondition, "already_issued", "a prepared certificate can be signed only once")
	}
	der, err := p.sign(p.parent, p.signer)
	if err != nil {
		return nil, err
	}
	return append([][]byte{der}, p.chain...), nil
}

// sign is rare and done by crypto/x509, which verifies its own signature.
func (p *PreparedAuthority) sign(parent *x509.Certificate, signer crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificate(rand.Reader, p.template, parent, p.authority.Key.Key, signer)
	if err != nil {
		return nil, fmt.Errorf("sign authority certificate: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	t := p.template
	switch {
	case err != nil:
		return nil, fault.New(fault.Internal, "issue_unsound", "the signed certificate cannot be parsed").Because(err)
	case !c.IsCA || c.KeyUsage != t.KeyUsage || c.MaxPathLen != t.MaxPathLen || len(c.UnhandledCriticalExtensions) > 0 ||
		len(c.URIs) != 1 || c.URIs[0].String() != p.authority.TrustDomain.IDString() || len(c.DNSNames) > 0 ||
		!slices.Equal(c.PermittedURIDomains, t.PermittedURIDomains) || c.PermittedDNSDomainsCritical != t.PermittedDNSDomainsCritical ||
		!bytes.Equal(c.RawSubjectPublicKeyInfo, p.authority.Key.SPKI) || !bytes.Equal(c.RawIssuer, p.parent.RawSubject) ||
		!bytes.Equal(c.SubjectKeyId, t.SubjectKeyId) || c.SerialNumber.Cmp(t.SerialNumber) != 0 ||
		!c.NotBefore.Equal(t.NotBefore) || !c.NotAfter.Equal(t.NotAfter):
		return nil, fault.New(fault.Internal, "issue_unsound", "the signed certificate is not what was prepared")
	}
	return der, nil
}

// room is how many authorities may stand below the first certificate of a chain,
// by the path lengths in it and by maxChain. above counts the chain's root, if it
// is not in it.
func room(chain []*x509.Certificate, above int) int {
	below := maxChain - 1 - len(chain) - above // 1: the leaf
	for i, c := range chain {
		if c.BasicConstraintsValid && (c.MaxPathLen > 0 || c.MaxPathLenZero) {
			below = min(below, c.MaxPathLen-i)
		}
	}
	return below
}

// selfSigned tells a root: its issuer is its subject.
func selfSigned(c *x509.Certificate) bool { return bytes.Equal(c.RawIssuer, c.RawSubject) }

// within narrows a period to those of certificates.
func within(certificates ...*x509.Certificate) (notBefore, notAfter time.Time) {
	for _, c := range certificates {
		if c.NotBefore.After(notBefore) {
			notBefore = c.NotBefore
		}
		if notAfter.IsZero() || c.NotAfter.Before(notAfter) {
			notAfter = c.NotAfter
		}
	}
	return notBefore, notAfter
}
