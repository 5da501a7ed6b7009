package serverapi

import (
	"context"
	"time"

	nodev1 "github.com/plastron/plastron/api/plastron/node/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// nodeCalls is plastron.node.v1.Node.
type nodeCalls struct {
	nodev1.UnsafeNodeServer
	server *Server
}

// Unban lets a banned agent attest again.
func (a nodeCalls) Unban(ctx context.Context, req *nodev1.UnbanRequest) (*nodev1.UnbanResponse, error) {
	id, err := identity.ParseMember(a.server.cfg.TrustDomain, req.Id)
	if err != nil {
		return nil, err
	}
	if err := a.server.cfg.Nodes.Unban(ctx, callerFrom(ctx).name(), id); err != nil {
		return nil, err
	}
	return &nodev1.UnbanResponse{}, nil
}

// maxAttached is how many agents one question is about.
const maxAttached = 1000

// Attached says to which servers agents are attached.
func (a nodeCalls) Attached(_ context.Context, req *nodev1.AttachedRequest) (*nodev1.AttachedResponse, error) {
	if len(req.Agents) > maxAttached {
		return nil, fault.New(fault.Invalid, "batch_too_large", "there are %d agents, the limit is %d", len(req.Agents), maxAttached)
	}
	ids := make([]spiffeid.ID, len(req.Agents))
	for i, text := range req.Agents {
		var err error
		if ids[i], err = identity.ParseMember(a.server.cfg.TrustDomain, text); err != nil {
			return nil, err
		}
	}
	out := &nodev1.AttachedResponse{}
	for i, at := range a.server.followers.where(ids, time.Now()) {
		if at.Server != "" {
			out.Agents = append(out.Agents, &nodev1.Attachment{Agent: req.Agents[i], Server: at.Server, Acknowledged: at.Acknowledged.Revision})
		}
	}
	return out, nil
}
