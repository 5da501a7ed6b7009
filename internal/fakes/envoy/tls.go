package envoy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"
)

// Peer is a listener and a cluster that have one certificate and one validation
// context, both from SDS.
type Peer struct {
	ID          string
	SVID, Trust *Secret
}

// Peer subscribes to an identity and to what verifies others, and waits for both.
func (p *Proxy) Peer(id, trust string) *Peer {
	p.TB.Helper()
	peer := &Peer{ID: id, SVID: p.Secret(id), Trust: p.Secret(trust)}
	peer.SVID.Until(func(m *Material) bool { return m.Certificate != nil })
	peer.Trust.Until(func(m *Material) bool { return m.Trust != nil })
	return peer
}

// Listener is the TLS side of the listener, which lets in this URI alone. Each
// handshake uses what is there at its moment.
func (p *Peer) Listener(lets string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true, ClientAuth: tls.RequireAnyClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.SVID.certificate() },
		VerifyConnection: func(s tls.ConnectionState) error {
			return p.Trust.verify(s.PeerCertificates, x509.ExtKeyUsageClientAuth, []string{lets})
		},
	}
}

// Cluster is the TLS side of the cluster, which connects to this URI alone.
func (p *Peer) Cluster(to string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, // not by name; VerifyConnection does it by URI
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return p.SVID.certificate() },
		VerifyConnection: func(s tls.ConnectionState) error {
			return p.Trust.verify(s.PeerCertificates, x509.ExtKeyUsageServerAuth, []string{to})
		},
	}
}

// Handshake connects one peer to the other and sends a byte each way, without which
// TLS 1.3 does not tell the client that it was let in.
func Handshake(from, to *Peer) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- echo(tls.NewListener(l, to.Listener(from.ID))) }()
	dialer := tls.Dialer{NetDialer: &net.Dialer{Deadline: time.Now().Add(deadline)}, Config: from.Cluster(to.ID)}
	client, err := dialer.Dial("tcp", l.Addr().String())
	if err == nil {
		_ = client.SetDeadline(time.Now().Add(deadline))
		if _, err = client.Write([]byte{1}); err == nil {
			_, err = io.ReadFull(client, make([]byte, 1))
		}
		client.Close()
	}
	l.Close()
	return errors.Join(err, <-done)
}

// echo answers one connection with the byte that comes.
func echo(l net.Listener) error {
	server, err := l.Accept()
	if err != nil {
		return err
	}
	defer server.Close()
	_ = server.SetDeadline(time.Now().Add(deadline))
	var one [1]byte
	if _, err := io.ReadFull(server, one[:]); err != nil {
		return err
	}
	_, err = server.Write(one[:])
	return err
}

// Traffic are peers that connect to each other all the time.
type Traffic struct {
	tb testing.TB

	mu         sync.Mutex // guards everything below
	handshakes int
	failures   []error
	round      chan struct{} // closed at the end of each round
}

// Connect lets two peers connect to each other until the test ends.
func Connect(tb testing.TB, a, b *Peer) *Traffic {
	x := &Traffic{tb: tb, round: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			err := errors.Join(Handshake(a, b), Handshake(b, a))
			x.mu.Lock()
			if x.handshakes += 2; err != nil {
				x.failures = append(x.failures, err)
			}
			close(x.round)
			x.round = make(chan struct{})
			x.mu.Unlock()
		}
	})
	tb.Cleanup(func() { cancel(); wg.Wait() })
	return x
}

// Round waits until both have connected with what they have now.
func (x *Traffic) Round() {
	x.tb.Helper()
	for range 2 { // the first may have begun before
		x.mu.Lock()
		round := x.round
		x.mu.Unlock()
		select {
		case <-round:
		case <-time.After(deadline):
			x.tb.Fatal("nobody connects")
		}
	}
}

// Handshakes returns how many there were.
func (x *Traffic) Handshakes() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.handshakes
}

// Failures returns those that failed.
func (x *Traffic) Failures() []error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.failures
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
