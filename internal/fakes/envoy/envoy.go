// Package envoy behaves like an Envoy proxy towards a secret discovery service, for
// tests: a stream for each secret, the node in each request, an ACK or a NACK for
// each answer, and the last good secret for as long as there is no better one. It
// is strict: what Envoy would refuse, it refuses.
package envoy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// TypeURL is the type of secrets.
const TypeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

const (
	deadline = 3 * time.Minute // of whatever takes a moment, and of a whole stream
	internal = 13              // the code in every NACK of Envoy's
)

// Node is how an Envoy of this version names itself.
func Node(id string, major, minor uint32) *corev3.Node {
	return &corev3.Node{Id: id, Cluster: "test", UserAgentName: "envoy",
		UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{UserAgentBuildVersion: &corev3.BuildVersion{
			Version: &typev3.SemanticVersion{MajorNumber: major, MinorNumber: minor}}}}
}

// Proxy is one Envoy.
type Proxy struct {
	TB   testing.TB
	Node *corev3.Node
	api  secretv3.SecretDiscoveryServiceClient
}

// New returns an Envoy that takes its secrets from the socket at path.
func New(tb testing.TB, path string, node *corev3.Node) *Proxy {
	tb.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	return &Proxy{TB: tb, Node: node, api: secretv3.NewSecretDiscoveryServiceClient(conn)}
}

// API is the service as it is, for calls that no Envoy makes.
func (p *Proxy) API() secretv3.SecretDiscoveryServiceClient { return p.api }

// Stream is one stream whose requests a test writes.
type Stream struct {
	proxy  *Proxy
	wire   secretv3.SecretDiscoveryService_StreamSecretsClient
	Cancel context.CancelFunc             // ends it at once
	Last   *discoveryv3.DiscoveryResponse // that was received
}

// Open opens a stream. It ends with the test.
func (p *Proxy) Open() *Stream {
	p.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	p.TB.Cleanup(cancel)
	wire, err := p.api.StreamSecrets(ctx)
	if err != nil {
		p.TB.Fatal(err)
	}
	return &Stream{proxy: p, wire: wire, Cancel: cancel, Last: &discoveryv3.DiscoveryResponse{}}
}

// Send sends a request as it is, unless the stream has ended. Recv says why.
func (s *Stream) Send(req *discoveryv3.DiscoveryRequest) bool { return s.wire.Send(req) == nil }

// Ask asks for names, in answer to the last response.
func (s *Stream) Ask(names ...string) bool {
	return s.Send(&discoveryv3.DiscoveryRequest{Node: s.proxy.Node, TypeUrl: TypeURL, ResourceNames: names,
		VersionInfo: s.Last.GetVersionInfo(), ResponseNonce: s.Last.GetNonce()})
}

// Recv receives a response and takes it as it is.
func (s *Stream) Recv() (*discoveryv3.DiscoveryResponse, error) {
	resp, err := s.wire.Recv()
	if err == nil {
		s.Last = resp
	}
	return resp, err
}

// Nack refuses the response that was received last.
func (s *Stream) Nack(before *discoveryv3.DiscoveryResponse, why string, names ...string) {
	s.Send(&discoveryv3.DiscoveryRequest{Node: s.proxy.Node, TypeUrl: TypeURL, ResourceNames: names, VersionInfo: before.GetVersionInfo(),
		ResponseNonce: s.Last.GetNonce(), ErrorDetail: &status.Status{Code: internal, Message: why}})
}

// Close says that there is nothing more to say.
func (s *Stream) Close() { _ = s.wire.CloseSend() }

// Secret is one secret of a proxy's configuration, with a stream of its own.
type Secret struct {
	Name  string
	proxy *Proxy

	mu       sync.Mutex // guards everything below
	current  *Material  // nil: none yet
	versions []string   // accepted, in order
	refused  []error
	changed  chan struct{}
}

// Material is what a secret holds.
type Material struct {
	Version     string
	Certificate *tls.Certificate
	Trust       map[string]*x509.CertPool // by trust domain; "": of any
}

// Secret subscribes to a secret. It goes on until the test ends.
func (p *Proxy) Secret(name string) *Secret {
	ctx, cancel := context.WithCancel(context.Background())
	s := &Secret{Name: name, proxy: p, changed: make(chan struct{})}
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			s.follow(ctx)
			select { // Envoy waits for up to 30 s; a test has less time
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	p.TB.Cleanup(func() { cancel(); wg.Wait() })
	return s
}

// follow is one stream.
func (s *Secret) follow(ctx context.Context) {
	wire, err := s.proxy.api.StreamSecrets(ctx)
	if err != nil {
		return
	}
	version := ""
	if m := s.Now(); m != nil {
		version = m.Version
	}
	req := &discoveryv3.DiscoveryRequest{Node: s.proxy.Node, TypeUrl: TypeURL, ResourceNames: []string{s.Name}, VersionInfo: version}
	for wire.Send(req) == nil {
		resp, err := wire.Recv()
		if err != nil {
			s.proxy.TB.Logf("stream of %s: %v", s.Name, err)
			return
		}
		req.ResponseNonce, req.ErrorDetail = resp.GetNonce(), nil
		if err := s.take(resp); err != nil {
			req.ErrorDetail = &status.Status{Code: internal, Message: err.Error()}
		} else {
			req.VersionInfo = resp.GetVersionInfo()
		}
	}
}

// take is what Envoy does with an answer: look whether it is fit, and only then use it.
func (s *Secret) take(resp *discoveryv3.DiscoveryResponse) error {
	m, err := s.material(resp)
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
	switch {
	case err != nil:
		s.refused = append(s.refused, err)
	case m != nil:
		s.current, s.versions = m, append(s.versions, m.Version)
	}
	return err
}

func (s *Secret) material(resp *discoveryv3.DiscoveryResponse) (*Material, error) {
	if resp.GetTypeUrl() != TypeURL || resp.GetNonce() == "" || resp.GetVersionInfo() == "" {
		return nil, errors.New("an answer without type, nonce or version")
	}
	switch n := len(resp.GetResources()); {
	case n == 0:
		return nil, nil // Envoy does not look at such an answer
	case n > 1:
		return nil, fmt.Errorf("unexpected SDS secrets length: %d", n)
	}
	secret := new(tlsv3.Secret)
	if err := resp.GetResources()[0].UnmarshalTo(secret); err != nil {
		return nil, err
	}
	if secret.GetName() != s.Name {
		return nil, fmt.Errorf("unexpected SDS secret %q", secret.GetName())
	}
	m, err := Read(secret)
	if err != nil {
		return nil, err
	}
	m.Version = resp.GetVersionInfo()
	return m, nil
}

// Read makes of a secret what Envoy would use, or says why it would refuse it.
func Read(secret *tlsv3.Secret) (*Material, error) {
	if err := secret.ValidateAll(); err != nil {
		return nil, err
	}
	if c := secret.GetTlsCertificate(); c != nil {
		pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
		return &Material{Certificate: &pair}, err
	}
	context := secret.GetValidationContext()
	if context == nil {
		return nil, errors.New("neither a certificate nor a validation context")
	}
	m := &Material{Trust: map[string]*x509.CertPool{}}
	custom := context.GetCustomValidatorConfig()
	if custom == nil {
		pool, err := roots(context.GetTrustedCa())
		m.Trust[""] = pool
		return m, err
	}
	cfg := new(tlsv3.SPIFFECertValidatorConfig)
	if err := custom.GetTypedConfig().UnmarshalTo(cfg); err != nil || custom.GetName() != "envoy.tls.cert_validator.spiffe" || context.GetTrustedCa() != nil {
		return nil, fmt.Errorf("not a config of the SPIFFE validator: %v", err)
	}
	for _, td := range cfg.GetTrustDomains() {
		pool, err := roots(td.GetTrustBundle())
		if err != nil {
			return nil, err
		}
		if m.Trust[td.GetName()] != nil || td.GetName() == "" || strings.Contains(td.GetName(), "/") {
			return nil, fmt.Errorf("trust domain %q twice, or no name of one", td.GetName())
		}
		m.Trust[td.GetName()] = pool
	}
	if len(m.Trust) == 0 {
		return nil, errors.New("no trust domain")
	}
	return m, nil
}

func roots(from *corev3.DataSource) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	text := from.GetInlineBytes()
	for n := 0; ; n++ {
		block, rest := pem.Decode(text)
		if block == nil {
			if n == 0 || len(rest) > 0 {
				return nil, errors.New("no certificates, or more than certificates")
			}
			return pool, nil
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		pool.AddCert(cert)
		text = rest
	}
}

// Now returns what is in use, or nil.
func (s *Secret) Now() *Material {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current
}

// Versions returns the versions that were taken, in order.
func (s *Secret) Versions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.versions
}

// Refused returns why answers were not taken.
func (s *Secret) Refused() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused
}

// Until waits for a secret of which cond is true.
func (s *Secret) Until(cond func(*Material) bool) *Material {
	s.proxy.TB.Helper()
	late := time.After(deadline)
	for {
		s.mu.Lock()
		m, changed := s.current, s.changed
		s.mu.Unlock()
		if m != nil && cond(m) {
			return m
		}
		select {
		case <-changed:
		case <-late:
			s.proxy.TB.Fatalf("the secret %s did not become what it should", s.Name)
		}
	}
}
