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
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/agentid"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
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
	age      time.Duration // of the server's certificate
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
	own := tls.Certificate{Certificate: s.ca.sign("/spire/server", key.Public(), now.Add(-time.Minute-s.age), now.Add(time.Hour-s.age)), PrivateKey: key}
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
	bundlev1.RegisterBundleServer(g, bundlev1.UnimplementedBundleServer{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go g.Serve(l)
	t.Cleanup(g.Stop)

	return testLife(t, s.ca, func(c *Config) {
		host, port, _ := net.SplitHostPort(l.Addr().String())
		c.Agent.ServerAddress = host
		c.Agent.ServerPort, _ = strconv.Atoi(port)
		c.Agent.JoinToken = "QJ3XK5ZT7VYB2M4NRA6WDHCEPS"
	})
}

// hold gives the agent an SVID of its own.
func (s *testServer) hold(t *testing.T, l *life, end time.Time) *credential {
	t.Helper()
	key, err := l.keeper.Generate(t.Context(), keyA, keys.ECP256)
	if err != nil {
		t.Fatal(err)
	}
	chain := s.ca.sign("/spire/agent/join_token/x", key.Public(), end.Add(-time.Hour), end)
	own, err := newCredential(testDomain, s.ca.bundle.Roots(), keyA, key, chain, lastMoment(chain))
	if err != nil {
		t.Fatal(err)
	}
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
	got, err := l.Do(ctx, agentid.Job{Kind: agentid.Attest, NewKey: true})
	if err != nil {
		t.Fatalf("Do() = %v with %d refused connections and %d attestations", err, s.refused.Load(), s.attested.Load())
	}
	if own := l.agent.own.Load(); own == old || own.serial != got.Serial || !own.expiresAt.After(time.Now()) {
		t.Error("the agent has no SVID that is good")
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
	if _, err := l.Do(ctx, agentid.Job{Kind: agentid.Renew}); err != nil {
		t.Fatal(err)
	}
	own := l.agent.own.Load()
	if own == old || own.keyID == old.keyID || s.attested.Load() != 1 || s.refused.Load() != 0 {
		t.Errorf("the same SVID: %v, %d attestations, %d refused connections, want another by one attestation", own == old, s.attested.Load(), s.refused.Load())
	}
}

// With the clock ahead no server is ours: what says so is the clock's own reason,
// and nothing is proved to the server meanwhile (R107).
func TestWrongClockCostsNoEvidence(t *testing.T) {
	s := &testServer{ca: newTestAuthority(t), age: 2 * time.Hour}
	l := s.serve(t)
	s.hold(t, l, time.Now().Add(-time.Minute))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, err := l.Do(ctx, agentid.Job{Kind: agentid.Attest, Probe: true})
	if fault.ReasonOf(err) != agentid.ReasonClock || s.attested.Load() != 0 {
		t.Errorf("Do() = %v with %d attestations", err, s.attested.Load())
	}
}

// A disk that cannot be written: nothing changes while the SVID in use is good for
// long; when it is nearly over the new one lives in memory. The state file stays
// whole (R54).
func TestDiskThatCannotBeWritten(t *testing.T) {
	s := &testServer{ca: newTestAuthority(t)}
	l := s.serve(t)
	old := s.hold(t, l, time.Now().Add(time.Hour))
	old.reattest = true
	if err := l.dir.save(testDomain, old, s.ca.bundle); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(l.dir.path, stateFile))
	if err != nil {
		t.Fatal(err)
	}
	path := l.dir.path
	l.dir.path = filepath.Join(path, "gone") // as good as a full disk to whoever writes
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := l.Do(ctx, agentid.Job{Kind: agentid.Renew}); fault.ReasonOf(err) != agentid.ReasonNotStored || l.agent.own.Load() != old {
		t.Errorf("Do() = %v, and the SVID is another", err)
	}
	if _, err := l.Do(ctx, agentid.Job{Kind: agentid.Renew, Volatile: true}); err != nil || l.agent.own.Load() == old {
		t.Errorf("Do() = %v, and the SVID is the same", err)
	}
	if after, err := os.ReadFile(filepath.Join(path, stateFile)); err != nil || string(after) != string(before) {
		t.Errorf("the state file changed (%v)", err)
	}
}
