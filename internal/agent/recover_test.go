package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/serverlink"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// testServer admits every agent, and breaks off every connection that shows a
// certificate, as a server does that does not know its authority any more.
type testServer struct {
	agentv1.UnimplementedAgentServer
	ca       *testAuthority
	refused  atomic.Int64 // connections
	attested atomic.Int64
}

func (s *testServer) AttestAgent(stream grpc.BidiStreamingServer[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse]) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	csr, err := x509.ParseCertificateRequest(req.GetParams().GetParams().GetCsr())
	if err != nil {
		return err
	}
	s.attested.Add(1)
	now := time.Now()
	chain := s.ca.sign("/spire/agent/join_token/x", csr.PublicKey, now.Add(-time.Minute), now.Add(time.Hour))
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{
		Svid: &spiretypes.X509SVID{CertChain: chain, Id: &spiretypes.SPIFFEID{TrustDomain: testDomain.Name(), Path: "/spire/agent/join_token/x"}},
	}}})
}

// serve starts the server and has an agent's life use it.
func (s *testServer) serve(t *testing.T) *life {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	own := tls.Certificate{Certificate: s.ca.sign("/spire/server", key.Public(), now.Add(-time.Minute), now.Add(time.Hour)), PrivateKey: key}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{own}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ClientAuth: tls.RequestClientCert,
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) > 0 {
				s.refused.Add(1)
				return errors.New("the authority is not known here")
			}
			return nil
		},
	})))
	agentv1.RegisterAgentServer(g, s)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go g.Serve(l)
	t.Cleanup(g.Stop)

	life := testLife(t, func(c *Config) {
		host, port, _ := net.SplitHostPort(l.Addr().String())
		c.Agent.ServerAddress = host
		c.Agent.ServerPort, _ = strconv.Atoi(port)
		c.Agent.JoinToken = "QJ3XK5ZT7VYB2M4NRA6WDHCEPS"
	})
	life.trouble, life.directives, life.changed = make(chan refusal, 1), make(chan *syncv1.Directive, 1), make(chan struct{}, 1)
	if life.link, err = serverlink.New(life.agent.linkConfig()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { life.link.Close() })
	life.agent.bundle.Store(s.ca.bundle)
	return life
}

// hold gives the agent an SVID of its own.
func (s *testServer) hold(t *testing.T, l *life, end time.Time) *credential {
	t.Helper()
	key, err := l.keeper.Generate(t.Context(), keyA, keys.ECP256)
	if err != nil {
		t.Fatal(err)
	}
	own := &credential{keyID: keyA, key: key, expiresAt: end,
		chain: s.ca.sign("/spire/agent/join_token/x", key.Public(), end.Add(-time.Hour), end)}
	l.use(own)
	return own
}

// While the server was away the agent's SVID ended, and its authority went. The
// agent attests all the same: it does not show the SVID that is of no use.
func TestAttestsAgainWhenTheOldAuthorityIsGone(t *testing.T) {
	s := &testServer{ca: newTestAuthority(t)}
	l := s.serve(t)
	old := s.hold(t, l, time.Now().Add(-time.Minute))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := l.renew(ctx); err != nil {
		t.Fatalf("renew() = %v with %d refused connections and %d attestations", err, s.refused.Load(), s.attested.Load())
	}
	if own := l.agent.own.Load(); own == old || !own.expiresAt.After(time.Now()) {
		t.Error("the agent has no SVID that is good")
	}
	if l.agent.anonymous.Load() {
		t.Error("the new SVID is not shown")
	}
}

// Where that is how an agent renews, it attests again over a connection that does
// not show its SVID; this server would refuse the one in use.
func TestRenewsByAttestingAgain(t *testing.T) {
	s := &testServer{ca: newTestAuthority(t)}
	l := s.serve(t)
	old := s.hold(t, l, time.Now().Add(time.Hour))
	old.reattest = true
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := l.renewOnce(ctx); err != nil {
		t.Fatal(err)
	}
	own := l.agent.own.Load()
	if own == old || own.keyID == old.keyID || s.attested.Load() != 1 || s.refused.Load() != 0 {
		t.Errorf("the same SVID: %v, %d attestations, %d refused connections, want another by one attestation", own == old, s.attested.Load(), s.refused.Load())
	}
	if l.agent.anonymous.Load() {
		t.Error("the new SVID is not shown")
	}
}

// Two nodes with one ID, by a template or a copied key, oust each other.
func TestOustedAgentTakesItsTime(t *testing.T) { // F22
	s := &testServer{ca: newTestAuthority(t)}
	l := s.serve(t)
	s.hold(t, l, time.Now().Add(time.Hour))
	why := fault.New(fault.Denied, "agent_not_active", "replaced")
	if err := l.recover(t.Context(), why); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), attestFloor/10)
	defer cancel()
	if err := l.recover(ctx, why); !errors.Is(err, context.DeadlineExceeded) || s.attested.Load() != 1 {
		t.Errorf("recover() = %v with %d attestations, want a wait before the second", err, s.attested.Load())
	}
	if err := l.recover(t.Context(), why); err != nil || s.attested.Load() != 2 {
		t.Errorf("recover() = %v with %d attestations, want the second after the wait", err, s.attested.Load())
	}
}

// A refusal of the SVID that was replaced meanwhile says nothing about the new
// one: a second attestation would cost a join token that is used.
func TestLateRefusalOfAReplacedSVID(t *testing.T) {
	s := &testServer{ca: newTestAuthority(t)}
	l := s.serve(t)
	old := s.hold(t, l, time.Now().Add(time.Minute))
	why := fault.New(fault.Denied, "agent_not_active", "replaced")
	l.shown = old
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := l.recover(ctx, why); err != nil {
		t.Fatal(err)
	}
	l.streamEnded(why) // of a stream that was opened with the old one
	done := make(chan error, 1)
	go func() { done <- l.run(ctx) }()
	gone := func(waiting func() int) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); waiting() > 0; runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatal("it was not dealt with in time")
			}
		}
	}
	gone(func() int { return len(l.trouble) })
	l.setBundle(s.ca.bundle) // the loop comes to it when it is done with the refusal
	gone(func() int { return len(l.changed) })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("run() = %v", err)
	}
	if n := s.attested.Load(); n != 1 {
		t.Errorf("%d attestations, want 1", n)
	}
}

// A clock that was ahead and is right again leaves no renewal waiting for years (R107).
func TestRenewalAfterTheClockWasPutBack(t *testing.T) {
	now := time.Now()
	for name, row := range map[string]struct {
		at   time.Time
		want bool
	}{
		"later":     {now.Add(10 * time.Minute), false},
		"come":      {now.Add(-time.Second), true},
		"in a year": {now.Add(365 * 24 * time.Hour), true},
	} {
		if got := due(row.at, now, time.Hour); got != row.want {
			t.Errorf("%s: due() = %v", name, got)
		}
	}
}

// With the clock ahead the SVID seems to have ended; when the clock is right
// again the agent goes on with it, without a new attestation (R107).
func TestGoesOnWithItsSVIDWhenTheClockIsRightAgain(t *testing.T) {
	s := &testServer{ca: newTestAuthority(t)}
	l := s.serve(t)
	own := s.hold(t, l, time.Now().Add(time.Hour))
	// As with a clock that is ahead: no server is ours.
	l.agent.bundle.Store(newTestAuthority(t).bundle)
	l.fresh = true
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := l.recover(ctx, fault.New(fault.Unauthenticated, "server_untrusted", "the server's certificate has expired")); err != nil {
		t.Fatalf("recover() = %v", err)
	}
	if l.agent.own.Load() != own || l.agent.anonymous.Load() || l.renewAt.After(time.Now()) {
		t.Error("the agent does not go on with its SVID")
	}
	if n := s.attested.Load(); n != 0 {
		t.Errorf("%d attestations", n)
	}
}

// After a suspend the agent does not wait for a dead connection (R57); ordinary
// drift and load are no suspend.
func TestNoticesASuspend(t *testing.T) {
	for _, row := range []struct {
		wall, monotonic time.Duration
		want            bool
	}{
		{2 * time.Second, 2 * time.Second, false},
		{30 * time.Second, 30 * time.Second, false}, // starved, not asleep
		{time.Hour, 2 * time.Second, true},
		{-time.Hour, 2 * time.Second, false}, // put back
	} {
		if got := slept(row.wall, row.monotonic); got != row.want {
			t.Errorf("slept(%v, %v) = %v", row.wall, row.monotonic, got)
		}
	}
}
