package serverlink

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/plastron/plastron/api/plastron/issue/v1"
	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/api/plastron/why/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
)

// MaxBatch is how many SVIDs one call may ask for; maxChallenges bounds an attestation.
const (
	MaxBatch      = 500
	maxChallenges = 16
)

// Bundle returns the trust domain's bundle.
func (c *Client) Bundle(ctx context.Context) (*bundle.Bundle, error) {
	c.mu.Lock()
	conn, cfg := c.conn, c.cfg
	c.mu.Unlock()
	return fetchBundle(ctx, conn, cfg)
}

// SVID is a certificate of the agent's own. The caller verifies it before use.
type SVID struct {
	ID          spiffeid.ID
	Chain       [][]byte // DER, leaf first
	ExpiresAt   time.Time
	CanReattest bool // only after an attestation
}

// Attest proves this node by the named attestor and returns the agent's SVID
// for the key in csr. It works without a certificate of our own.
func (c *Client) Attest(ctx context.Context, attestor string, prover nodeattest.Prover, csr []byte) (SVID, error) {
	const doing = "attest this node"
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	payload, err := prover.Payload(ctx)
	if err != nil {
		return SVID{}, err
	}
	conn := c.current()
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return SVID{}, conn.fault(doing, err)
	}
	// When Send returns io.EOF, what went wrong comes from Recv.
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &spiretypes.AttestationData{Type: attestor, Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil && !errors.Is(err, io.EOF) {
		return SVID{}, conn.fault(doing, err)
	}
	for range maxChallenges {
		resp, err := stream.Recv()
		if err != nil {
			return SVID{}, conn.fault(doing, err)
		}
		if result := resp.GetResult(); result != nil {
			s, err := c.ownSVID(result.GetSvid())
			s.CanReattest = result.GetReattestable()
			return s, err
		}
		answer, err := prover.Answer(ctx, resp.GetChallenge())
		if err != nil {
			return SVID{}, err
		}
		err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}})
		if err != nil && !errors.Is(err, io.EOF) {
			return SVID{}, conn.fault(doing, err)
		}
	}
	return SVID{}, malformed("there is no end to its challenges")
}

// Renew returns a new SVID of the agent's own for the key in csr. The old one
// stays good until the new one is first used (R33).
func (c *Client) Renew(ctx context.Context, csr []byte) (SVID, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn := c.current()
	resp, err := agentv1.NewAgentClient(conn).RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
	if err != nil {
		return SVID{}, conn.fault("renew the agent's own SVID", err)
	}
	return c.ownSVID(resp.GetSvid())
}

func (c *Client) ownSVID(p *spiretypes.X509SVID) (SVID, error) {
	id, err := identity.ParseMember(c.td, "spiffe://"+p.GetId().GetTrustDomain()+p.GetId().GetPath())
	if err != nil || !identity.IsAgent(id) {
		return SVID{}, malformed("it gives the agent an ID that is not an agent's")
	}
	if len(p.GetCertChain()) == 0 {
		return SVID{}, malformed("it holds no certificate")
	}
	return SVID{ID: id, Chain: p.GetCertChain(), ExpiresAt: time.Unix(p.GetExpiresAt(), 0)}, nil
}

// Stream is one conversation of the sync protocol. One goroutine may send while
// another receives.
type Stream struct {
	conversation
	client   *Client
	cancel   context.CancelFunc
	answered bool // Recv has returned something
}

// conversation is held with a server that speaks the protocol, or is made up from
// what another one is found to have.
type conversation interface {
	Send(*syncv1.AgentMessage) error
	Recv() (*syncv1.ServerMessage, error)
}

// Follow opens the stream by which the server says what changes. A server that
// says nothing by itself is polled; then Follow takes as long as the first poll.
func (c *Client) Follow(ctx context.Context) (*Stream, error) {
	ctx, cancel := context.WithCancel(ctx)
	var talk conversation
	var err error
	if c.Polls() {
		talk, err = c.poller.follow(ctx)
	} else {
		talk, err = c.push(ctx)
	}
	if err != nil {
		cancel()
		return nil, c.left(err)
	}
	return &Stream{conversation: talk, client: c, cancel: cancel}, nil
}

// Recv waits for the next message. A server that ends the conversation before it
// has said anything is left for another, if there is one.
func (s *Stream) Recv() (*syncv1.ServerMessage, error) {
	m, err := s.conversation.Recv()
	switch {
	case err == nil:
		s.answered = true
	case !s.answered:
		err = s.client.left(err)
	}
	return m, err
}

// Close ends the stream; Recv returns.
func (s *Stream) Close() { s.cancel() }

// pushed is a conversation with a server that speaks the sync protocol, or so it
// is hoped until the first answer.
type pushed struct {
	client *Client
	peer   peering
	stream grpc.BidiStreamingClient[syncv1.AgentMessage, syncv1.ServerMessage]
}

func (c *Client) push(ctx context.Context) (*pushed, error) {
	peer := c.current().peering()
	stream, err := syncv1.NewSyncClient(peer).Follow(ctx)
	if err != nil {
		return nil, peer.fault(followServer, err)
	}
	if peer.handshakes == 0 { // it is there since
		peer = peer.peering()
	}
	return &pushed{c, peer, stream}, nil
}

// Send sends one message.
func (p *pushed) Send(m *syncv1.AgentMessage) error {
	return p.peer.fault("send to the server", p.stream.Send(m))
}

// Recv waits for the next message.
func (p *pushed) Recv() (*syncv1.ServerMessage, error) {
	m, err := p.stream.Recv()
	if err = p.peer.fault(followServer, err); fault.KindOf(err) == fault.Unsupported {
		p.client.poll(p.peer)
		return nil, noPush()
	}
	return m, err
}

// poll says that there is a server which does not push at the other end; the zero
// peering says that there is not.
func (c *Client) poll(peer peering) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mute = peer
}

// Polls reports whether the server is known to have SPIRE's services only. What a
// process can do it can do until it ends, so this is asked anew with each
// connection and not otherwise.
func (c *Client) Polls() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mute == c.conn.peering()
}

// X509Item asks for one X.509-SVID.
type X509Item struct {
	GrantID string
	Facts   map[string]string // what is stated for a rule; nil for an entry
	CSR     []byte
}

// X509Result is the outcome of one item.
type X509Result struct {
	Err      error // a fault with the server's reason; nothing was signed
	Chain    [][]byte
	Revision uint64 // of the grant that was signed for
}

// X509 has SVIDs signed, at most MaxBatch. The results are in the order of the items.
func (c *Client) X509(ctx context.Context, items []X509Item) ([]X509Result, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if c.Polls() {
		return c.spireX509(ctx, items)
	}
	req := &issuev1.X509Request{}
	for _, item := range items {
		req.Items = append(req.Items, &issuev1.X509Item{GrantId: item.GrantID, Facts: item.Facts, Csr: item.CSR})
	}
	conn := c.current()
	resp, err := issuev1.NewIssueClient(conn).X509(ctx, req)
	if err = conn.fault(signX509, err); fault.KindOf(err) == fault.Unsupported {
		return c.spireX509(ctx, items)
	}
	if err != nil {
		return nil, err
	}
	if len(resp.GetResults()) != len(items) {
		return nil, malformed("it does not answer each item once")
	}
	results := make([]X509Result, len(items))
	for i, r := range resp.GetResults() {
		if refusal := r.GetRefusal(); refusal != nil {
			results[i].Err = &fault.Error{Kind: fault.Denied, Reason: clip(refusal.GetReason()), Message: clip(refusal.GetMessage()), Remedy: clip(refusal.GetRemedy())}
			continue
		}
		results[i].Chain, results[i].Revision = r.GetCertChain(), r.GetRevision()
	}
	return results, nil
}

// JWTResult is a signed token. The caller verifies it before use.
type JWTResult struct {
	Token    string
	Revision uint64
}

// JWT has one token signed, for what is stated for a rule.
func (c *Client) JWT(ctx context.Context, grantID string, facts map[string]string, audience []string) (JWTResult, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if c.Polls() {
		return c.spireJWT(ctx, grantID, audience)
	}
	conn := c.current()
	resp, err := issuev1.NewIssueClient(conn).JWT(ctx, &issuev1.JWTRequest{GrantId: grantID, Facts: facts, Audience: audience})
	if err = conn.fault(signJWT, err); fault.KindOf(err) == fault.Unsupported {
		return c.spireJWT(ctx, grantID, audience)
	}
	if err != nil {
		return JWTResult{}, err
	}
	return JWTResult{Token: resp.GetToken(), Revision: resp.GetRevision()}, nil
}

const (
	followServer = "follow the server"
	signX509     = "have X.509-SVIDs signed"
	signJWT      = "have a JWT-SVID signed"
)

// spireX509 has SVIDs signed by a server that has SPIRE's services only. It does
// not say for which revision of an entry it signed.
func (c *Client) spireX509(ctx context.Context, items []X509Item) ([]X509Result, error) {
	req := &svidv1.BatchNewX509SVIDRequest{}
	for _, item := range items {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: item.GrantID, Csr: item.CSR})
	}
	conn := c.current()
	resp, err := svidv1.NewSVIDClient(conn).BatchNewX509SVID(ctx, req)
	if err != nil {
		return nil, conn.fault(signX509, err)
	}
	if len(resp.GetResults()) != len(items) {
		return nil, malformed("it does not answer each item once")
	}
	results := make([]X509Result, len(items))
	for i, r := range resp.GetResults() {
		results[i] = X509Result{Err: itemFault(signX509, r.GetStatus()), Chain: r.GetSvid().GetCertChain()}
	}
	return results, nil
}

// spireJWT has one token signed by a server that has SPIRE's services only.
func (c *Client) spireJWT(ctx context.Context, grantID string, audience []string) (JWTResult, error) {
	conn := c.current()
	resp, err := svidv1.NewSVIDClient(conn).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: grantID, Audience: audience})
	if err != nil {
		return JWTResult{}, conn.fault(signJWT, err)
	}
	return JWTResult{Token: resp.GetSvid().GetToken()}, nil
}

// Hint asks whether an entry that does not reach this agent fits a process: a
// code of package reason, or nothing.
func (c *Client) Hint(ctx context.Context, selectors []entry.Selector) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req := &whyv1.HintRequest{}
	for _, s := range selectors {
		req.Selectors = append(req.Selectors, &whyv1.Selector{Type: s.Type, Value: s.Value})
	}
	conn := c.current()
	resp, err := whyv1.NewEntriesClient(conn).Hint(ctx, req)
	if err != nil {
		return "", conn.fault("ask the server for a hint", err)
	}
	return clip(resp.GetCode()), nil
}
