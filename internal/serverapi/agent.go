package serverapi

import (
	"context"
	"math"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/plastron/plastron/internal/svid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// agents is spire.api.server.agent.v1.Agent.
type agents struct {
	agentv1.UnsafeAgentServer
	server *Server
}

// CountAgents counts what a filter lets through; without one it costs nothing.
func (a agents) CountAgents(ctx context.Context, req *agentv1.CountAgentsRequest) (*agentv1.CountAgentsResponse, error) {
	count := 0
	if req.Filter == nil {
		a.server.cfg.Registry.View(func(s *registry.Snapshot) { count = s.NodeCount() })
		return &agentv1.CountAgentsResponse{Count: int32(min(count, math.MaxInt32))}, nil
	}
	f, err := readAgentFilter(req.Filter)
	if err != nil {
		return nil, err
	}
	err = f.each(ctx, a.server.cfg.Registry, "", pieceSize, func(*registry.Node) (bool, error) { count++; return true, nil })
	if err != nil {
		return nil, err
	}
	return &agentv1.CountAgentsResponse{Count: int32(min(count, math.MaxInt32))}, nil
}

// ListAgents gives a page, or everything if no page size is given.
func (a agents) ListAgents(ctx context.Context, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	f, err := readAgentFilter(req.Filter)
	if err != nil {
		return nil, err
	}
	c := a.server.cursor("agents", req.Filter)
	after, err := c.key(req.PageToken)
	if err != nil {
		return nil, err
	}
	resp, page, last := &agentv1.ListAgentsResponse{}, newPage(req.PageSize), ""
	err = f.each(ctx, a.server.cfg.Registry, after, page.piece(), func(n *registry.Node) (bool, error) {
		out := writeAgent(n, req.OutputMask)
		fits, err := page.take(out)
		if !fits {
			resp.NextPageToken = c.token(last)
			return false, nil
		}
		last = n.ID.String()
		resp.Agents = append(resp.Agents, out)
		return true, err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// GetAgent gives one agent.
func (a agents) GetAgent(_ context.Context, req *agentv1.GetAgentRequest) (*spiretypes.Agent, error) {
	id, err := a.server.readAgent(req.Id)
	if err != nil {
		return nil, err
	}
	var n registry.Node
	a.server.cfg.Registry.View(func(s *registry.Snapshot) { n, err = s.Node(id) })
	if err != nil {
		return nil, err
	}
	return writeAgent(&n, req.OutputMask), nil
}

// DeleteAgent forgets an agent, a ban included.
func (a agents) DeleteAgent(ctx context.Context, req *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	id, err := a.server.readAgent(req.Id)
	if err != nil {
		return nil, err
	}
	if err := a.server.cfg.Nodes.Evict(ctx, callerFrom(ctx).name(), id); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// BanAgent keeps an agent out until it is unbanned or deleted.
func (a agents) BanAgent(ctx context.Context, req *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	id, err := a.server.readAgent(req.Id)
	if err != nil {
		return nil, err
	}
	if err := a.server.cfg.Nodes.Ban(ctx, callerFrom(ctx).name(), id); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// AttestAgent leads the conversation with a node. The interceptor bounds its
// length; what is said is the attestor's business, what follows from it the
// engine's.
func (a agents) AttestAgent(stream grpc.BidiStreamingServer[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse]) error {
	ctx := stream.Context()
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	params := first.GetParams()
	if params.GetData() == nil || params.GetParams() == nil { // A2
		return fault.New(fault.Invalid, "attestation_incomplete", "the first message must hold the attestation data and a certificate request")
	}
	ask := func(_ context.Context, challenge []byte) ([]byte, error) {
		err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: challenge}})
		if err != nil {
			return nil, err
		}
		answer, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		r, ok := answer.Step.(*agentv1.AttestAgentRequest_ChallengeResponse)
		if !ok || len(r.ChallengeResponse) > nodeattest.MaxPayload { // A50
			return nil, fault.New(fault.Invalid, "challenge_response_invalid", "the message is not an answer to the challenge of at most %d bytes", nodeattest.MaxPayload)
		}
		return r.ChallengeResponse, nil
	}
	admitted, err := a.server.cfg.Nodes.Attest(ctx, nodes.Attestation{
		Type: params.Data.Type, Payload: params.Data.Payload, CSR: params.Params.Csr, Address: callerFrom(ctx).link.address,
	}, ask)
	if count := a.server.cfg.Count.Attested; count != nil {
		count(params.Data.Type, err)
	}
	if err != nil {
		return err
	}
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: writeX509(admitted.SVID), Reattestable: admitted.CanReattest},
	}})
}

// RenewAgent signs the caller's next certificate.
func (a agents) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	renewed, err := a.server.cfg.Nodes.Renew(ctx, callerFrom(ctx).presented(), req.GetParams().GetCsr())
	if err != nil {
		return nil, err
	}
	return &agentv1.RenewAgentResponse{Svid: writeX509(renewed.SVID)}, nil
}

// CreateJoinToken makes a token. The agent's ID follows from it one-way, so the
// answer, which has the shape that SPIRE's clients expect, need not carry it.
func (a agents) CreateJoinToken(ctx context.Context, req *agentv1.CreateJoinTokenRequest) (*spiretypes.JoinToken, error) {
	r := nodes.TokenRequest{TTL: time.Duration(req.Ttl) * time.Second, Value: req.Token}
	if req.AgentId != nil {
		alias, err := a.server.readMember("agent_id", req.AgentId)
		if err != nil {
			return nil, err
		}
		r.Alias = alias
	}
	token, expiry, err := a.server.cfg.Nodes.CreateToken(ctx, callerFrom(ctx).name(), r)
	if err != nil {
		return nil, err
	}
	return &spiretypes.JoinToken{Value: token.Reveal(), ExpiresAt: expiry.Unix()}, nil
}

// PostStatus keeps the version that an agent reports, which is one that asks what is
// granted to it: those that follow say so with their Hello.
func (a agents) PostStatus(ctx context.Context, req *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	if err := a.server.cfg.Nodes.Report(ctx, callerFrom(ctx).id, req.AgentVersion, false); err != nil {
		return nil, err
	}
	return &agentv1.PostStatusResponse{}, nil
}

func writeAgent(n *registry.Node, mask *spiretypes.AgentMask) *spiretypes.Agent {
	if mask == nil {
		mask = &spiretypes.AgentMask{
			AttestationType: true, X509SvidSerialNumber: true, X509SvidExpiresAt: true, Selectors: true, Banned: true,
			CanReattest: true, AgentVersion: true,
		}
	}
	out := &spiretypes.Agent{Id: writeID(n.ID)}
	if mask.AttestationType {
		out.AttestationType = n.AttestationType
	}
	if mask.X509SvidSerialNumber {
		out.X509SvidSerialNumber = n.Current.Serial
	}
	if mask.X509SvidExpiresAt {
		out.X509SvidExpiresAt = rpc.Unix(n.Current.ExpiresAt)
	}
	if mask.Selectors {
		out.Selectors = writeSelectors(n.Selectors)
	}
	if mask.AgentVersion {
		out.AgentVersion = n.AgentVersion
	}
	out.Banned = mask.Banned && n.Banned
	out.CanReattest = mask.CanReattest && n.CanReattest
	return out
}

func writeX509(x svid.X509) *spiretypes.X509SVID {
	return &spiretypes.X509SVID{CertChain: x.Chain, Id: writeID(x.ID), ExpiresAt: x.NotAfter.Unix()}
}
