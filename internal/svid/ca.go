package svid

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/fault"
)

// AuthorityID names an X.509 authority: the lower-case hex of its subject key
// identifier.
func AuthorityID(pub crypto.PublicKey) (string, error) {
	id, err := subjectKeyID(pub)
	return hex.EncodeToString(id), err
}

func subjectKeyID(pub crypto.PublicKey) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	_, bits, err := splitSPKI(spki)
	if err != nil {
		return nil, err
	}
	return keyIdentifier(bits), nil
}

// SelfSignedCA makes the certificate of a self-signed authority of td. Its
// subject is unique, since it carries the serial number (RG28). This path is
// rare and made by crypto/x509, which verifies its own signature.
func SelfSignedCA(td spiffeid.TrustDomain, signer crypto.Signer, notBefore, notAfter time.Time) ([]byte, error) {
	scheme, err := schemeOf(signer.Public())
	if err != nil {
		return nil, err
	}
	keyID, err := subjectKeyID(signer.Public())
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	if !notBefore.Before(notAfter) {
		return nil, fault.New(fault.Invalid, "lifetime_empty", "the authority would end before it begins")
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject: pkix.Name{
			Country: []string{"US"}, Organization: []string{"SPIFFE"}, SerialNumber: serial.String(),
		},
		NotBefore: notBefore, NotAfter: notAfter,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:     true, BasicConstraintsValid: true,
		SubjectKeyId:       keyID,
		URIs:               []*url.URL{td.ID().URL()},
		SignatureAlgorithm: scheme.x509(),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("sign authority certificate: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	switch {
	case err != nil:
		// A name with an empty label is legal in SPIFFE and unreadable for crypto/x509.
		return nil, fault.New(fault.Invalid, "trust_domain_unusable",
			"the trust domain %q cannot be used in certificates that Go programs read", td.Name()).
			Fix("choose a trust domain that is a DNS name").Because(err)
	case !c.IsCA || c.KeyUsage != template.KeyUsage || len(c.URIs) != 1 || c.URIs[0].String() != td.IDString() ||
		len(c.UnhandledCriticalExtensions) > 0 || c.NotAfter.After(notAfter):
		return nil, fault.New(fault.Internal, "issue_unsound", "the authority's certificate is not what was asked for")
	}
	return der, nil
}

func (s scheme) x509() x509.SignatureAlgorithm {
	switch s.jose {
	case "ES256":
		return x509.ECDSAWithSHA256
	case "ES384":
		return x509.ECDSAWithSHA384
	}
	return x509.SHA256WithRSA
}
