package serverlink_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/test/parts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// authority is a trust domain's root.
type authority struct {
	td     spiffeid.TrustDomain
	der    []byte
	issuer *svid.X509Issuer
}

func newAuthority(t *testing.T, td string) *authority {
	t.Helper()
	a := &authority{td: spiffeid.RequireTrustDomainFromString(td)}
	key := newKey(t)
	var err error
	if a.der, err = svid.SelfSignedCA(a.td, key, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if a.issuer, err = svid.NewX509Issuer([][]byte{a.der}, key); err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) root(t *testing.T) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(a.der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (a *authority) certificate(t *testing.T, id string, until time.Duration) tls.Certificate {
	t.Helper()
	key := newKey(t)
	csr, err := svid.NewCSR(crypto.Signer(key))
	if err != nil {
		t.Fatal(err)
	}
	pub, err := svid.ParseCSR(csr)
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.issuer.Prepare(svid.Leaf{ID: spiffeid.RequireFromString(id), Key: pub, NotBefore: time.Now().Add(-30 * time.Minute), NotAfter: time.Now().Add(until)})
	if err != nil {
		t.Fatal(err)
	}
	x, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: x.Chain, PrivateKey: key}
}

// bundles answers with one bundle, or one error.
type bundles struct {
	bundlev1.UnimplementedBundleServer
	answer *spiretypes.Bundle
	err    error
}

func (b *bundles) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*spiretypes.Bundle, error) {
	return b.answer, b.err
}

// serve runs a server with that certificate and returns its address.
func serve(t *testing.T, cert tls.Certificate, version uint16, b *bundles) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, MaxVersion: version})))
	bundlev1.RegisterBundleServer(g, b)
	done := make(chan struct{})
	go func() { g.Serve(l); close(done) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return l.Addr().String()
}

func bundleOf(authorities ...*authority) *spiretypes.Bundle {
	b := &spiretypes.Bundle{TrustDomain: "example.org", SequenceNumber: 3}
	for _, a := range authorities {
		b.X509Authorities = append(b.X509Authorities, &spiretypes.X509Certificate{Asn1: a.der})
	}
	return b
}

const server = "spiffe://example.org/spire/server"

// Who is let pass as the server, by roots, by pinned hash and by nothing at all.
func TestWhoIsTheServer(t *testing.T) {
	ours, imposter, foreign := newAuthority(t, "example.org"), newAuthority(t, "example.org"), newAuthority(t, "other.test")
	for name, c := range map[string]struct {
		cert                    tls.Certificate
		version                 uint16
		bundle                  *spiretypes.Bundle
		roots, pinned, insecure string // reason; empty: accepted
	}{
		"the server": {cert: ours.certificate(t, server, time.Hour/2), bundle: bundleOf(ours)},
		"another identity of ours": {cert: ours.certificate(t, "spiffe://example.org/spire/agent/x", time.Hour/2), bundle: bundleOf(ours),
			roots: "server_untrusted", pinned: "server_untrusted", insecure: "server_untrusted"},
		"below the server's": {cert: ours.certificate(t, server+"/x", time.Hour/2), bundle: bundleOf(ours),
			roots: "server_untrusted", pinned: "server_untrusted", insecure: "server_untrusted"},
		"a server of another trust domain": {cert: foreign.certificate(t, "spiffe://other.test/spire/server", time.Hour/2), bundle: bundleOf(ours),
			roots: "server_untrusted", pinned: "server_untrusted", insecure: "server_untrusted"},
		"an imposter with a bundle of its own": {cert: imposter.certificate(t, server, time.Hour/2), bundle: bundleOf(imposter),
			roots: "server_untrusted", pinned: "server_untrusted"},
		"an imposter that shows our root": {cert: imposter.certificate(t, server, time.Hour/2), bundle: bundleOf(ours, imposter),
			roots: "server_untrusted", pinned: "server_untrusted"},
		"expired": {cert: ours.certificate(t, server, -time.Minute), bundle: bundleOf(ours), // R107
			roots: "clock_skew", pinned: "clock_skew", insecure: "clock_skew"},
		"an imposter, expired": {cert: imposter.certificate(t, server, -time.Minute), bundle: bundleOf(imposter),
			roots: "server_untrusted", pinned: "server_untrusted", insecure: "clock_skew"},
		"TLS 1.2": {cert: ours.certificate(t, server, time.Hour/2), version: tls.VersionTLS12, bundle: bundleOf(ours), // R123
			roots: "server_unavailable", pinned: "server_unavailable", insecure: "server_unavailable"},
		"an empty bundle": {cert: ours.certificate(t, server, time.Hour/2), bundle: bundleOf(),
			roots: "server_answer_malformed", pinned: "server_answer_malformed", insecure: "server_answer_malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := serverlink.Config{Route: serverlink.NewRoute(serve(t, c.cert, c.version, &bundles{answer: c.bundle})), TrustDomain: ours.td,
				Roots: func() []*x509.Certificate { return []*x509.Certificate{ours.root(t)} }}
			client, err := serverlink.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			_, err = client.Bundle(t.Context())
			check(t, "roots", err, c.roots)
			_, err = serverlink.Pinned(t.Context(), cfg, sha256.Sum256(ours.der))
			check(t, "pinned", err, c.pinned)
			_, err = serverlink.Insecure(t.Context(), cfg)
			check(t, "insecure", err, c.insecure)
		})
	}
}

func check(t *testing.T, what string, err error, reason string) {
	t.Helper()
	if reason == "" && err != nil || reason != "" && fault.ReasonOf(err) != reason {
		t.Errorf("%s: %v (%s), want %q", what, err, fault.ReasonOf(err), reason)
	}
}

// Roots are asked for at each handshake: a root that is gone ends trust at the next.
func TestRootsAreAskedEachTime(t *testing.T) {
	ours := newAuthority(t, "example.org")
	roots := []*x509.Certificate{ours.root(t)}
	client, err := serverlink.New(serverlink.Config{Route: serverlink.NewRoute(serve(t, ours.certificate(t, server, time.Hour/2), 0, &bundles{answer: bundleOf(ours)})),
		TrustDomain: ours.td, Roots: func() []*x509.Certificate { return roots }})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Bundle(t.Context()); err != nil {
		t.Fatal(err)
	}
	roots = nil
	if err := client.Redial(""); err != nil {
		t.Fatal(err)
	}
	_, err = client.Bundle(t.Context())
	check(t, "after the root went", err, "server_untrusted")
}

// What the server answers becomes a fault with its own reason, on one bounded line.
func TestFaults(t *testing.T) {
	ours := newAuthority(t, "example.org")
	detailed, err := status.New(codes.PermissionDenied, "no").WithDetails(
		protoadapt.MessageV1Of(&errdetails.ErrorInfo{Reason: "agent_banned", Domain: "plastron"}))
	if err != nil {
		t.Fatal(err)
	}
	later := func(d time.Duration) error {
		st, err := status.New(codes.ResourceExhausted, "busy").WithDetails(protoadapt.MessageV1Of(&errdetails.RetryInfo{RetryDelay: durationpb.New(d)}))
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	for i, c := range []struct {
		err    error
		kind   fault.Kind
		reason string
	}{
		{later(time.Minute), fault.Exhausted, "server_exhausted"},
		{later(-time.Minute), fault.Exhausted, "server_exhausted"},
		{detailed.Err(), fault.Denied, "agent_banned"},
		{status.Error(codes.PermissionDenied, "x"), fault.Denied, "server_denied"},
		{status.Error(codes.InvalidArgument, "x"), fault.Invalid, "server_refused"},
		{status.Error(codes.ResourceExhausted, "x"), fault.Exhausted, "server_exhausted"},
		{status.Error(codes.Unavailable, "x"), fault.Unavailable, "server_unavailable"},
		{status.Error(codes.Unimplemented, "x"), fault.Unsupported, "server_unsupported"},
		{status.Error(codes.Internal, "x"), fault.Unavailable, "server_failed"},
		{status.Error(codes.Unauthenticated, "a\nb\x00"+strings.Repeat("c", 10000)), fault.Unauthenticated, "server_unauthenticated"},
	} {
		client, err := serverlink.New(serverlink.Config{Route: serverlink.NewRoute(serve(t, ours.certificate(t, server, time.Hour/2), 0, &bundles{err: c.err})),
			TrustDomain: ours.td, Roots: func() []*x509.Certificate { return []*x509.Certificate{ours.root(t)} }})
		if err != nil {
			t.Fatal(err)
		}
		_, err = client.Bundle(t.Context())
		if fault.KindOf(err) != c.kind || fault.ReasonOf(err) != c.reason || len(err.Error()) > 2000 || strings.ContainsAny(err.Error(), "\n\x00") { // R104
			t.Errorf("%v became %v (%s, %s)", c.err, err, fault.KindOf(err), fault.ReasonOf(err))
		}
		// It is spread, so that not all come at once that were told the same (R110).
		if after := fault.AfterOf(err); after != 0 && (after < time.Minute || after > 75*time.Second) || i == 0 && after == 0 {
			t.Errorf("%v: come again after %v", c.err, after)
		}
		client.Close()
	}
}

// A server that is away is told of in the kernel's words, not in gRPC's.
func TestAwayInPlainWords(t *testing.T) {
	port, err := parts.ReservePort() // so that nobody comes to listen there
	if err != nil {
		t.Fatal(err)
	}
	defer port.Release()
	ours, at := newAuthority(t, "example.org"), fmt.Sprintf("127.0.0.1:%d", port.Number)
	client, err := serverlink.New(serverlink.Config{Route: serverlink.NewRoute(at, at), TrustDomain: ours.td,
		Roots: func() []*x509.Certificate { return []*x509.Certificate{ours.root(t)} }})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	refused := "dial tcp " + at + ": connect: connection refused"
	if _, err := client.Bundle(t.Context()); err == nil || err.Error() != "fetch the bundle: "+refused+"; "+refused {
		t.Errorf("it says: %v", err)
	}
}

func TestParseRootHash(t *testing.T) {
	for _, s := range []string{"", "ab", strings.Repeat("ab", 31), strings.Repeat("ab", 33), strings.Repeat("zz", 32)} {
		if h, err := serverlink.ParseRootHash(s); err == nil {
			t.Errorf("%q: %x", s, h)
		}
	}
	if h, err := serverlink.ParseRootHash(strings.Repeat("aB", 32)); err != nil || h[0] != 0xab {
		t.Error(h, err)
	}
}
