// Package serverlink is a client of a server: it attests, renews, follows the
// server's changes and has SVIDs signed. It makes sure that the other end is a
// server of the trust domain, and turns what the server answers into faults.
// A server that has SPIRE's services only is polled, and looks from above like
// any other. What to do with the answers is not decided here.
//
// What must always hold: TLS 1.3, without resumption; the server's certificate
// verifies against the roots that the caller holds at that moment and names
// exactly the server's ID; neither DNS records nor the environment change how
// we connect; what the server sends is bounded.
package serverlink

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// Limits of a connection. A link that swallows packets one way is noticed by
// TCP keepalive or by an unanswered ping, after 75 s at most.
const (
	dialTimeout   = 10 * time.Second
	callTimeout   = 30 * time.Second
	tcpKeepAlive  = 15 * time.Second
	pingInterval  = 30 * time.Second
	userTimeout   = 45 * time.Second // of pings, and grpc sets the TCP user timeout from it
	maxMessage    = 16 << 20
	maxHeaderList = 16 << 10
	streamWindow  = 256 << 10
	connWindow    = 1 << 20
)

// Config says where a server is and how both sides are recognised.
type Config struct {
	Route       *Route // where servers are; shared by all clients of one agent
	TrustDomain spiffeid.TrustDomain
	// Roots returns the trust domain's roots as they are now. It is asked at each handshake.
	Roots func() []*x509.Certificate
	// Certificate returns the agent's own as it is now; nil, or a nil result: none is shown.
	Certificate func() *tls.Certificate
	// Dial replaces the way to the network; nil: TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
}

// Client is a client of one server. All methods may be called concurrently.
type Client struct {
	td     spiffeid.TrustDomain
	poller *poller

	mu   sync.Mutex // guards everything below
	cfg  Config
	conn *connection
	down bool
	mute peering // at whose other end is a server that does not push
}

// connection is a grpc connection and the verdict on the server at its other
// end, which grpc hands on as text only.
type connection struct {
	*grpc.ClientConn
	mu         sync.Mutex // guards everything below
	verdict    error
	handshakes int
	dialled    string // the address that was reached last
}

func (c *connection) address() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dialled
}

// peering is a connection for as long as it leads to one and the same process.
type peering struct {
	*connection
	handshakes int
}

func (c *connection) peering() peering {
	c.mu.Lock()
	defer c.mu.Unlock()
	return peering{c, c.handshakes}
}

func (c *connection) judged(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.verdict = err
	c.handshakes++
	return err
}

func (c *connection) untrusted() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.verdict
}

// New returns a client. It connects when it is first used, and again whenever needed.
func New(cfg Config) (*Client, error) {
	conn, err := open(cfg, cfg.verify)
	if err != nil {
		return nil, err
	}
	c := &Client{td: cfg.TrustDomain, cfg: cfg, conn: conn}
	c.poller = newPoller(c)
	return c, nil
}

// Redial opens a new connection and gives up the old one with all its calls: the
// own certificate has changed, or another address is to be used (empty: the same).
func (c *Client) Redial(address string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down {
		return net.ErrClosed
	}
	c.cfg.Route.lead(address)
	conn, err := open(c.cfg, c.cfg.verify)
	if err != nil {
		return err
	}
	old := c.conn
	c.conn = conn
	c.poller.soon()
	return old.Close()
}

// Leave goes to another server, if there is one.
func (c *Client) Leave() error {
	if !c.cfg.Route.leave(c.current().address()) {
		return nil
	}
	return c.Redial("")
}

// left goes to another server if what a conversation ended with says that this
// one is of no use now.
func (c *Client) left(err error) error {
	switch {
	case fault.ReasonOf(err) == "call_ended": // by us
	case fault.KindOf(err) == fault.Unavailable, fault.KindOf(err) == fault.Exhausted, fault.KindOf(err) == fault.Unauthenticated:
		if !c.cfg.Route.leave(c.current().address()) {
			return err
		}
		if f, ok := errors.AsType[*fault.Error](err); ok {
			err = f.NotBefore(0) // the other has not asked us to wait
		}
		return errors.Join(err, c.Redial(""))
	}
	return err
}

// Close ends the connection and all calls.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = true
	return c.conn.Close()
}

func (c *Client) current() *connection {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn
}

// open makes a connection whose server is judged by verify.
func open(cfg Config, verify func(tls.ConnectionState) error) (*connection, error) {
	dial := cfg.Dial
	if dial == nil {
		d := &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: tcpKeepAlive, Interval: tcpKeepAlive, Count: 3}}
		dial = func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
	}
	c := &connection{}
	reach := func(ctx context.Context, _ string) (net.Conn, error) {
		conn, address, err := cfg.Route.dial(ctx, dial)
		c.mu.Lock()
		c.dialled = address
		c.mu.Unlock()
		return conn, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, // R123
		// The chain is verified below, by the rules of SPIFFE instead of host names.
		// Without a session cache every connection makes a whole handshake.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			err := c.judged(verify(state))
			if err != nil {
				cfg.Route.leave(c.address())
			}
			return err
		},
	}
	if cfg.Certificate != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if own := cfg.Certificate(); own != nil {
				return own, nil
			}
			return &tls.Certificate{}, nil
		}
	}
	// passthrough: no resolver, so no TXT record decides anything (RG46).
	conn, err := grpc.NewClient("passthrough:///"+cfg.Route.Current(),
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(reach),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingInterval, Timeout: userTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: dialTimeout,
			Backoff: backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second}}),
		grpc.WithMaxHeaderListSize(maxHeaderList),
		grpc.WithStaticStreamWindowSize(streamWindow),
		grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithReadBufferSize(8<<10), grpc.WithWriteBufferSize(8<<10),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, fault.New(fault.Invalid, "server_address_invalid", "%q cannot be connected to", cfg.Route.Current()).
			Fix("write it as HOST:PORT").Because(err)
	}
	c.ClientConn = conn
	return c, nil
}

// verify judges the server against the roots that are held now (R41).
func (c Config) verify(state tls.ConnectionState) error {
	return verifyServer(state, c.Roots(), c.TrustDomain)
}

func verifyServer(state tls.ConnectionState, roots []*x509.Certificate, td spiffeid.TrustDomain) error {
	chain := make([][]byte, len(state.PeerCertificates))
	for i, cert := range state.PeerCertificates {
		chain[i] = cert.Raw
	}
	now, leaf := time.Now(), state.PeerCertificates[0]
	id, err := svid.VerifyX509(chain, roots, td, now)
	if err != nil && (now.Before(leaf.NotBefore) || now.After(leaf.NotAfter)) {
		if _, timeless := svid.VerifyX509(chain, roots, td, leaf.NotAfter.Add(-time.Second)); timeless == nil {
			return fault.New(fault.Unauthenticated, "clock_skew", "the server's certificate is good from %s to %s, and this machine's clock shows %s",
				leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)).
				Fix("set the clock of this machine, or of the server if that is the wrong one").Because(err)
		}
	}
	if err != nil {
		return untrusted(err)
	}
	return expectServer(id, td)
}

func expectServer(id spiffeid.ID, td spiffeid.TrustDomain) error {
	if want := identity.Server(td); id != want {
		return untrusted(errors.New("it shows " + id.String() + ", expected is " + want.String()))
	}
	return nil
}

// untrusted is the fault about a server, whatever the reason is called elsewhere.
func untrusted(err error) error {
	return fault.New(fault.Unauthenticated, "server_untrusted", "what answers is not a server of our trust domain").
		Fix("check the address and the agent's trust bundle").Because(err)
}
