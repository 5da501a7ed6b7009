package envoy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
)

// Server returns the TLS side of a listener that has its certificate and its
// validation context from SDS and lets in exactly these URIs. Each handshake uses
// what is there at its moment.
func Server(cert, trust *Secret, sans ...string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true, ClientAuth: tls.RequireAnyClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert.certificate() },
		VerifyConnection: func(s tls.ConnectionState) error {
			return trust.verify(s.PeerCertificates, x509.ExtKeyUsageClientAuth, sans)
		},
	}
}

// Client returns the TLS side of a cluster, likewise.
func Client(cert, trust *Secret, sans ...string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, // by name; VerifyConnection does it by URI
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert.certificate() },
		VerifyConnection: func(s tls.ConnectionState) error {
			return trust.verify(s.PeerCertificates, x509.ExtKeyUsageServerAuth, sans)
		},
	}
}

func (s *Secret) certificate() (*tls.Certificate, error) {
	if m := s.Now(); m != nil && m.Certificate != nil {
		return m.Certificate, nil
	}
	return nil, errors.New("secret is not supplied by SDS")
}

// verify is Envoy's SPIFFE validator, followed by match_typed_subject_alt_names. In
// the plain form the roots are those of any trust domain.
func (s *Secret) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage, sans []string) error {
	m := s.Now()
	if m == nil || m.Trust == nil {
		return errors.New("secret is not supplied by SDS")
	}
	leaf := chain[0]
	if leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return errors.New("the leaf may sign certificates")
	}
	domain := ""
	for _, uri := range leaf.URIs {
		if uri.Scheme == "spiffe" {
			domain = uri.Host
			break
		}
	}
	pool := m.Trust[domain]
	if pool == nil {
		pool = m.Trust[""]
	}
	if pool == nil {
		return fmt.Errorf("no trust bundle of %q", domain)
	}
	others := x509.NewCertPool()
	for _, c := range chain[1:] {
		others.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: others, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return err
	}
	if !slices.ContainsFunc(leaf.URIs, func(u *url.URL) bool { return slices.Contains(sans, u.String()) }) {
		return fmt.Errorf("verify SAN list: %v is not in %v", leaf.URIs, sans)
	}
	return nil
}
