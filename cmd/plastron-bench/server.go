package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// target is the system under test, seen from outside.
type target struct {
	options     options
	admin       *grpc.ClientConn
	trustDomain string
	roots       *x509.CertPool
}

func dialServer(ctx context.Context, o options) (*target, error) {
	admin, err := dialSocket(o.admin)
	if err != nil {
		return nil, err
	}
	bundle, err := bundlev1.NewBundleClient(admin).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		admin.Close()
		return nil, fmt.Errorf("ask the admin socket for the bundle: %w", err)
	}
	s := &target{options: o, admin: admin, trustDomain: bundle.GetTrustDomain(), roots: x509.NewCertPool()}
	for _, authority := range bundle.GetX509Authorities() {
		certs, err := x509.ParseCertificates(authority.GetAsn1())
		if err != nil {
			return nil, err
		}
		for _, cert := range certs {
			s.roots.AddCert(cert)
		}
	}
	return s, nil
}

// dialSocket is the way to an admin socket.
func dialSocket(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}))
}

func (s *target) Close() error { return s.admin.Close() }

// dial opens a TLS connection to the server's port, as an agent if it has an
// SVID. The server's certificate is verified against the bundle.
func (s *target) dial(own ...tls.Certificate) (*grpc.ClientConn, error) {
	verify := func(state tls.ConnectionState) error {
		leaf := state.PeerCertificates[0]
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://"+s.trustDomain+"/spire/server" {
			return errors.New("the peer is not the server of this trust domain")
		}
		intermediates := x509.NewCertPool()
		for _, cert := range state.PeerCertificates[1:] {
			intermediates.AddCert(cert)
		}
		_, err := leaf.Verify(x509.VerifyOptions{Roots: s.roots, Intermediates: intermediates})
		return err
	}
	return grpc.NewClient(s.options.address,
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: s.options.ping, Timeout: 45 * time.Second}),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
			InsecureSkipVerify: true, // verify, below, checks chain and SPIFFE ID instead of a host name
			VerifyConnection:   verify, Certificates: own, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"},
		})))
}

func (s *target) tokens(ctx context.Context, count int) ([]string, error) {
	var tokens []string
	for range count {
		token, err := agentv1.NewAgentClient(s.admin).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 3600})
		if err != nil {
			return nil, err
		}
		tokens = append(tokens, token.GetValue())
	}
	return tokens, nil
}

// attest joins as a new agent.
func attest(ctx context.Context, conn *grpc.ClientConn, token string, csr []byte) (*spiretypes.X509SVID, error) {
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &spiretypes.AttestationData{Type: "join_token", Payload: []byte(token)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}); err != nil {
		return nil, err
	}
	reply, err := stream.Recv()
	if err != nil {
		return nil, fmt.Errorf("%w (if that is the rate limit, set ratelimit { attestation = false } in the server's configuration)", err)
	}
	if reply.GetResult().GetSvid() == nil {
		return nil, errors.New("the server sent a challenge for a join token")
	}
	return reply.GetResult().GetSvid(), nil
}

// player is an agent that this program plays.
type player struct {
	conn *grpc.ClientConn
	id   *spiretypes.SPIFFEID
	// entryIDs are entries below this agent, made for the benchmark.
	entryIDs []string
}

// join attests one agent and registers entries below it.
func (s *target) join(ctx context.Context, entries int) (*player, func(), error) {
	key, csr, err := newCSR()
	if err != nil {
		return nil, nil, err
	}
	token, err := s.tokens(ctx, 1)
	if err != nil {
		return nil, nil, err
	}
	anonymous, err := s.dial()
	if err != nil {
		return nil, nil, err
	}
	defer anonymous.Close()
	svid, err := attest(ctx, anonymous, token[0], csr)
	if err != nil {
		return nil, nil, err
	}
	conn, err := s.dial(tls.Certificate{Certificate: svid.GetCertChain(), PrivateKey: key})
	if err != nil {
		return nil, nil, err
	}
	a := &player{conn: conn, id: svid.GetId()}
	a.entryIDs, err = s.fill(ctx, a.id, entries)
	clean := func() {
		ctx := context.WithoutCancel(ctx)
		_ = s.remove(ctx, a.entryIDs)
		_, _ = agentv1.NewAgentClient(s.admin).DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: a.id})
		conn.Close()
	}
	if err != nil {
		clean()
		return nil, nil, err
	}
	return a, clean, nil
}

// fill registers count entries below a parent, in many calls.
func (s *target) fill(ctx context.Context, parent *spiretypes.SPIFFEID, count int) (ids []string, err error) {
	for len(ids) < count && err == nil {
		var made []string
		made, err = s.create(ctx, parent, len(ids), min(500, count-len(ids)))
		ids = append(ids, made...)
	}
	return ids, err
}

// create registers count entries below a parent and returns their IDs.
func (s *target) create(ctx context.Context, parent *spiretypes.SPIFFEID, from, count int) ([]string, error) {
	request := &entryv1.BatchCreateEntryRequest{OutputMask: &spiretypes.EntryMask{}}
	for i := range count {
		request.Entries = append(request.Entries, &spiretypes.Entry{
			SpiffeId: &spiretypes.SPIFFEID{TrustDomain: s.trustDomain, Path: fmt.Sprintf("/bench/%s/%d", strings.TrimPrefix(parent.GetPath(), "/spire/"), from+i)},
			ParentId: parent, Selectors: []*spiretypes.Selector{selector(from + i)},
		})
	}
	reply, err := entryv1.NewEntryClient(s.admin).BatchCreateEntry(ctx, request)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, r := range reply.GetResults() {
		if r.GetStatus().GetCode() != 0 {
			return ids, fmt.Errorf("create an entry: %s", r.GetStatus().GetMessage())
		}
		ids = append(ids, r.GetEntry().GetId())
	}
	return ids, nil
}

func (s *target) remove(ctx context.Context, ids []string) error {
	for len(ids) > 0 {
		n := min(len(ids), 500)
		if _, err := entryv1.NewEntryClient(s.admin).BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: ids[:n]}); err != nil {
			return err
		}
		ids = ids[n:]
	}
	return nil
}

func newCSR() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return key, csr, err
}

func benchCreate(ctx context.Context, o options) (result, error) {
	s, err := dialServer(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer s.Close()
	parent := s.absentAgent()
	made := make([][]string, (o.count+o.batch-1)/o.batch)
	r, err := measure(ctx, o, o.batch, func(ctx context.Context, _, call int) error {
		var err error
		made[call], err = s.create(ctx, parent, call*o.batch, o.batch)
		return err
	})
	for _, ids := range made {
		err = errors.Join(err, s.remove(context.WithoutCancel(ctx), ids))
	}
	return r, err // what a commit cannot do without is the disk's, so there is no reference
}

func benchX509(ctx context.Context, o options) (result, error) {
	s, err := dialServer(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer s.Close()
	o.batch = min(o.batch, o.entries)
	a, clean, err := s.join(ctx, o.entries)
	if err != nil {
		return result{}, err
	}
	defer clean()
	var requests []*svidv1.BatchNewX509SVIDRequest
	for worker := range o.parallel { // the keys are made before the clock runs
		request := &svidv1.BatchNewX509SVIDRequest{}
		for i := range o.batch { // all over the entries
			id := a.entryIDs[((worker*o.batch+i)*7919)%len(a.entryIDs)]
			_, csr, err := newCSR()
			if err != nil {
				return result{}, err
			}
			request.Params = append(request.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: csr})
		}
		requests = append(requests, request)
	}
	r, err := measure(ctx, o, o.batch, func(ctx context.Context, worker, _ int) error {
		reply, err := svidv1.NewSVIDClient(a.conn).BatchNewX509SVID(ctx, requests[worker])
		for _, one := range reply.GetResults() {
			if err == nil && one.GetStatus().GetCode() != 0 {
				err = errors.New(one.GetStatus().GetMessage())
			}
		}
		return err
	})
	if err != nil {
		return result{}, err
	}
	r.Reference = "CSR verify + sign, P-256"
	r.ReferenceNS, err = referenceCSR()
	return r, err
}

func benchJWT(ctx context.Context, o options) (result, error) {
	s, err := dialServer(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer s.Close()
	a, clean, err := s.join(ctx, o.entries)
	if err != nil {
		return result{}, err
	}
	defer clean()
	r, err := measure(ctx, o, 1, func(ctx context.Context, _, call int) error {
		_, err := svidv1.NewSVIDClient(a.conn).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{
			EntryId: a.entryIDs[call%len(a.entryIDs)], Audience: []string{"bench"},
		})
		return err
	})
	if err != nil {
		return result{}, err
	}
	r.Reference = "sign, P-256"
	r.ReferenceNS, err = referenceSign()
	return r, err
}

func benchAttest(ctx context.Context, o options) (result, error) {
	s, err := dialServer(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer s.Close()
	tokens, err := s.tokens(ctx, o.count)
	if err != nil {
		return result{}, err
	}
	csrs := make([][]byte, o.count)
	for i := range csrs {
		if _, csrs[i], err = newCSR(); err != nil {
			return result{}, err
		}
	}
	ids := make([]*spiretypes.SPIFFEID, o.count)
	r, err := measure(ctx, o, 1, func(ctx context.Context, _, call int) error {
		conn, err := s.dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		svid, err := attest(ctx, conn, tokens[call], csrs[call])
		ids[call] = svid.GetId()
		return err
	})
	for _, id := range ids {
		if id != nil {
			_, gone := agentv1.NewAgentClient(s.admin).DeleteAgent(context.WithoutCancel(ctx), &agentv1.DeleteAgentRequest{Id: id})
			err = errors.Join(err, gone)
		}
	}
	if err != nil {
		return result{}, err
	}
	r.Reference = "CSR verify + sign, P-256"
	r.ReferenceNS, err = referenceCSR()
	return r, err
}

// referenceCSR is what issuing a certificate cannot do without: verify the
// request, sign the certificate.
func referenceCSR() (int64, error) {
	key, csr, err := newCSR()
	if err != nil {
		return 0, err
	}
	verify, err := reference(func() error {
		request, err := x509.ParseCertificateRequest(csr)
		if err != nil {
			return err
		}
		return request.CheckSignature()
	})
	if err != nil {
		return 0, err
	}
	sign, err := signing(key)
	return verify + sign, err
}

func referenceSign() (int64, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	return signing(key)
}

func signing(key *ecdsa.PrivateKey) (int64, error) {
	digest := make([]byte, 32)
	return reference(func() error {
		_, err := key.Sign(rand.Reader, digest, crypto.SHA256)
		return err
	})
}
