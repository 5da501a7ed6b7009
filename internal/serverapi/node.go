package serverapi

import (
	"context"

	nodev1 "github.com/plastron/plastron/api/plastron/node/v1"
	"github.com/plastron/plastron/internal/identity"
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
