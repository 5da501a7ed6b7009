package serverapi

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/localsocket"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
)

// link is what is known of one connection for as long as it is open. It rides
// along as the connection's AuthInfo.
type link struct {
	credentials.CommonAuthInfo
	address string
	local   string // who is at the other end of the admin socket; empty on TCP

	// The peer's certificate, verified at the handshake; leaf is nil without one.
	chain [][]byte
	leaf  *x509.Certificate
	id    spiffeid.ID
	// verified is the bundle against which the chain last held.
	verified atomic.Pointer[cachedRoots]

	close func() error
}

// AuthType names the kind of link, as the library asks.
func (l *link) AuthType() string { return "plastron" }

func (s *Server) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, // R123
		NextProtos: []string{"h2"},
		// Peers are checked at the handshake, so every connection makes a whole one (R123).
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequestClientCert,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.cfg.Certificate() },
	}
}

// localHandshake makes a link of a connection to the admin socket.
func (s *Server) localHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	l := &link{address: "local", local: localsocket.PeerOf(raw.(*held).Conn).String(), close: raw.Close}
	l.SecurityLevel = credentials.PrivacyAndIntegrity // it does not leave the kernel
	known(raw)
	return raw, l, nil
}

// tlsHandshake makes a link of a TCP connection, by TLS with an optional client
// certificate.
func (s *Server) tlsHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	var l *link
	config := s.tlsConfig()
	config.VerifyConnection = func(state tls.ConnectionState) error {
		_, err := s.guard.Contain("handshake", func() (_ any, err error) {
			l, err = s.peerOf(state, time.Now())
			return nil, err
		})
		return err
	}
	conn, _, err := credentials.NewTLS(config).ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	l.SecurityLevel = credentials.PrivacyAndIntegrity
	l.address, l.close = raw.RemoteAddr().String(), raw.Close
	if l.leaf != nil && time.Now().Before(l.leaf.NotAfter) {
		known(raw)
	}
	return conn, l, nil
}

// known takes a connection out of the strangers' share.
func known(raw net.Conn) {
	if h, ok := raw.(*held); ok {
		h.door.know(h)
	}
}

// peerOf verifies the certificate of a TLS peer, if it showed one: a member of
// our trust domain, or a foreign identity that the configuration lists.
//
// An agent whose certificate has just ended is let in as an expired one, which
// may do no more than a stranger: so it learns why it is refused instead of
// seeing its connection break (Q5).
func (s *Server) peerOf(state tls.ConnectionState, now time.Time) (*link, error) {
	l := &link{}
	if len(state.PeerCertificates) == 0 {
		return l, nil
	}
	l.leaf = state.PeerCertificates[0]
	for _, c := range state.PeerCertificates {
		l.chain = append(l.chain, c.Raw)
	}
	id, err := svid.PeerID(l.leaf)
	if err != nil {
		return nil, err
	}
	if td := id.TrustDomain(); td != s.cfg.TrustDomain && !s.admins[id] {
		return nil, fault.New(fault.Unauthenticated, "peer_foreign", "the certificate is of the trust domain %q", td.Name())
	}
	l.id = id
	return l, s.verify(l, now)
}

// verify checks the link's chain against the bundle as it is now, unless it was
// checked against that bundle before. It is called for each request, so an
// authority that is revoked takes its open connections with it.
func (s *Server) verify(l *link, now time.Time) error {
	if l.leaf == nil {
		return nil
	}
	bundle := s.rootsOf(l.id.TrustDomain())
	if bundle == nil {
		return fault.New(fault.Unauthenticated, "bundle_unknown", "no bundle is known of the trust domain %q", l.id.TrustDomain().Name())
	}
	at := now
	if !now.Before(l.leaf.NotAfter) {
		at = l.leaf.NotAfter.Add(-time.Second)
	} else if l.verified.Load() == bundle {
		return nil
	}
	if _, err := svid.VerifyX509(l.chain, bundle.roots, l.id.TrustDomain(), at); err != nil {
		return err
	}
	l.verified.Store(bundle)
	return nil
}

// rootCache keeps the parsed roots of bundles as they were last written. The
// sequence number would not do: a bundle that was deleted may come back with the
// same one and other keys.
type rootCache struct {
	// mu guards everything below.
	mu    sync.Mutex
	roots map[spiffeid.TrustDomain]*cachedRoots
}

type cachedRoots struct {
	version store.Position
	roots   []*x509.Certificate
}

// rootsOf returns the roots of a trust domain, the same pointer for as long as
// its bundle is the same; nil if there is none.
func (s *Server) rootsOf(td spiffeid.TrustDomain) (c *cachedRoots) {
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		version, ok := snap.BundleVersion(td)
		if !ok {
			return
		}
		s.rootCache.mu.Lock()
		defer s.rootCache.mu.Unlock()
		if c = s.rootCache.roots[td]; c != nil && c.version == version {
			return
		}
		b, err := snap.Bundle(td)
		if err != nil {
			c = nil
			return
		}
		c = &cachedRoots{version, b.Roots()}
		s.rootCache.roots[td] = c
	})
	return c
}
