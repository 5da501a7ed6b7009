package serverapi

import (
	"context"
	"time"

	localauthorityv1 "github.com/plastron/plastron/internal/api/spire/api/server/localauthority/v1"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/plastron/plastron/internal/svid"
)

// activateWait is how long ActivateX509Authority and ActivateJWTAuthority wait
// for acknowledgements.
const activateWait = 20 * time.Second

// localAuthorities is spire.api.server.localauthority.v1.LocalAuthority: what it
// shows and changes are this server's own keys.
type localAuthorities struct {
	localauthorityv1.UnsafeLocalAuthorityServer
	server *Server
}

// states returns the active key, and the prepared one or else the newest old one.
func (a localAuthorities) states(kind string) (active, prepared, old *localauthorityv1.AuthorityState, err error) {
	var retired time.Time
	for _, s := range a.server.cfg.Authority.Slots(kind) {
		switch {
		case s.State == registry.SlotActive:
			active = stateOf(s)
		case s.State == registry.SlotPrepared:
			prepared = stateOf(s)
		case s.State == registry.SlotOld && !s.RetiredAt.Before(retired):
			old, retired = stateOf(s), s.RetiredAt
		}
	}
	if active == nil {
		return nil, nil, nil, fault.New(fault.Unavailable, "authority_unavailable", "server is initializing").Fix("try again in a moment")
	}
	if prepared != nil {
		old = nil // one of them has the second slot
	}
	return active, prepared, old, nil
}

func stateOf(s registry.Slot) *localauthorityv1.AuthorityState {
	state := &localauthorityv1.AuthorityState{AuthorityId: s.AuthorityID, ExpiresAt: rpc.Unix(s.NotAfter)}
	if len(s.Root) > 0 {
		state.UpstreamAuthoritySubjectKeyId = svid.CertificateID(s.Root)
	}
	return state
}

func (a localAuthorities) prepare(ctx context.Context, kind string) (*localauthorityv1.AuthorityState, error) {
	s, err := a.server.cfg.Authority.Prepare(ctx, callerFrom(ctx).name(), kind)
	return stateOf(s), err
}

func (a localAuthorities) activate(ctx context.Context, kind, id string) (*localauthorityv1.AuthorityState, error) {
	wait, cancel := context.WithTimeout(ctx, activateWait)
	defer cancel()
	s, _, err := a.server.cfg.Authority.Activate(wait, callerFrom(ctx).name(), kind, id, false)
	return stateOf(s), err
}

func (a localAuthorities) taint(ctx context.Context, kind, id string) (*localauthorityv1.AuthorityState, error) {
	s, err := a.server.cfg.Authority.Taint(ctx, callerFrom(ctx).name(), kind, id)
	return stateOf(s), err
}

func (a localAuthorities) revoke(ctx context.Context, kind, id string) (*localauthorityv1.AuthorityState, error) {
	s, err := a.server.cfg.Authority.Revoke(ctx, callerFrom(ctx).name(), kind, id)
	return stateOf(s), err
}

// GetX509AuthorityState shows the keys.
func (a localAuthorities) GetX509AuthorityState(_ context.Context, _ *localauthorityv1.GetX509AuthorityStateRequest) (*localauthorityv1.GetX509AuthorityStateResponse, error) {
	active, prepared, old, err := a.states(authority.X509)
	return &localauthorityv1.GetX509AuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, err
}

// PrepareX509Authority makes and publishes another key.
func (a localAuthorities) PrepareX509Authority(ctx context.Context, _ *localauthorityv1.PrepareX509AuthorityRequest) (*localauthorityv1.PrepareX509AuthorityResponse, error) {
	state, err := a.prepare(ctx, authority.X509)
	return &localauthorityv1.PrepareX509AuthorityResponse{PreparedAuthority: state}, err
}

// ActivateX509Authority lets the prepared key sign once everyone has it.
func (a localAuthorities) ActivateX509Authority(ctx context.Context, req *localauthorityv1.ActivateX509AuthorityRequest) (*localauthorityv1.ActivateX509AuthorityResponse, error) {
	state, err := a.activate(ctx, authority.X509, req.AuthorityId)
	return &localauthorityv1.ActivateX509AuthorityResponse{ActivatedAuthority: state}, err
}

// TaintX509Authority has everything replaced that an old key signed.
func (a localAuthorities) TaintX509Authority(ctx context.Context, req *localauthorityv1.TaintX509AuthorityRequest) (*localauthorityv1.TaintX509AuthorityResponse, error) {
	state, err := a.taint(ctx, authority.X509, req.AuthorityId)
	return &localauthorityv1.TaintX509AuthorityResponse{TaintedAuthority: state}, err
}

// RevokeX509Authority takes a tainted old key out of the bundle.
func (a localAuthorities) RevokeX509Authority(ctx context.Context, req *localauthorityv1.RevokeX509AuthorityRequest) (*localauthorityv1.RevokeX509AuthorityResponse, error) {
	state, err := a.revoke(ctx, authority.X509, req.AuthorityId)
	return &localauthorityv1.RevokeX509AuthorityResponse{RevokedAuthority: state}, err
}

// GetJWTAuthorityState shows the keys.
func (a localAuthorities) GetJWTAuthorityState(_ context.Context, _ *localauthorityv1.GetJWTAuthorityStateRequest) (*localauthorityv1.GetJWTAuthorityStateResponse, error) {
	active, prepared, old, err := a.states(authority.JWT)
	return &localauthorityv1.GetJWTAuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, err
}

// PrepareJWTAuthority makes and publishes another key.
func (a localAuthorities) PrepareJWTAuthority(ctx context.Context, _ *localauthorityv1.PrepareJWTAuthorityRequest) (*localauthorityv1.PrepareJWTAuthorityResponse, error) {
	state, err := a.prepare(ctx, authority.JWT)
	return &localauthorityv1.PrepareJWTAuthorityResponse{PreparedAuthority: state}, err
}

// ActivateJWTAuthority lets the prepared key sign once everyone has it.
func (a localAuthorities) ActivateJWTAuthority(ctx context.Context, req *localauthorityv1.ActivateJWTAuthorityRequest) (*localauthorityv1.ActivateJWTAuthorityResponse, error) {
	state, err := a.activate(ctx, authority.JWT, req.AuthorityId)
	return &localauthorityv1.ActivateJWTAuthorityResponse{ActivatedAuthority: state}, err
}

// TaintJWTAuthority has everything replaced that an old key signed.
func (a localAuthorities) TaintJWTAuthority(ctx context.Context, req *localauthorityv1.TaintJWTAuthorityRequest) (*localauthorityv1.TaintJWTAuthorityResponse, error) {
	state, err := a.taint(ctx, authority.JWT, req.AuthorityId)
	return &localauthorityv1.TaintJWTAuthorityResponse{TaintedAuthority: state}, err
}

// RevokeJWTAuthority takes a tainted old key out of the bundle.
func (a localAuthorities) RevokeJWTAuthority(ctx context.Context, req *localauthorityv1.RevokeJWTAuthorityRequest) (*localauthorityv1.RevokeJWTAuthorityResponse, error) {
	state, err := a.revoke(ctx, authority.JWT, req.AuthorityId)
	return &localauthorityv1.RevokeJWTAuthorityResponse{RevokedAuthority: state}, err
}

// TaintX509UpstreamAuthority is for servers with an upstream authority.
func (a localAuthorities) TaintX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.TaintX509UpstreamAuthorityRequest) (*localauthorityv1.TaintX509UpstreamAuthorityResponse, error) {
	id := req.GetSubjectKeyId()
	err := a.server.cfg.Authority.TaintUpstream(ctx, callerFrom(ctx).name(), id)
	return &localauthorityv1.TaintX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: id}, err
}

// RevokeX509UpstreamAuthority is for servers with an upstream authority.
func (a localAuthorities) RevokeX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.RevokeX509UpstreamAuthorityRequest) (*localauthorityv1.RevokeX509UpstreamAuthorityResponse, error) {
	id := req.GetSubjectKeyId()
	err := a.server.cfg.Authority.RevokeUpstream(ctx, callerFrom(ctx).name(), id)
	return &localauthorityv1.RevokeX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: id}, err
}

// GetWITAuthorityState is not offered.
func (a localAuthorities) GetWITAuthorityState(_ context.Context, _ *localauthorityv1.GetWITAuthorityStateRequest) (*localauthorityv1.GetWITAuthorityStateResponse, error) {
	return nil, errNoWIT()
}

// PrepareWITAuthority is not offered.
func (a localAuthorities) PrepareWITAuthority(_ context.Context, _ *localauthorityv1.PrepareWITAuthorityRequest) (*localauthorityv1.PrepareWITAuthorityResponse, error) {
	return nil, errNoWIT()
}

// ActivateWITAuthority is not offered.
func (a localAuthorities) ActivateWITAuthority(_ context.Context, _ *localauthorityv1.ActivateWITAuthorityRequest) (*localauthorityv1.ActivateWITAuthorityResponse, error) {
	return nil, errNoWIT()
}

// TaintWITAuthority is not offered.
func (a localAuthorities) TaintWITAuthority(_ context.Context, _ *localauthorityv1.TaintWITAuthorityRequest) (*localauthorityv1.TaintWITAuthorityResponse, error) {
	return nil, errNoWIT()
}

// RevokeWITAuthority is not offered.
func (a localAuthorities) RevokeWITAuthority(_ context.Context, _ *localauthorityv1.RevokeWITAuthorityRequest) (*localauthorityv1.RevokeWITAuthorityResponse, error) {
	return nil, errNoWIT()
}
