package serverapi

import (
	"context"
	"time"

	authorityv1 "github.com/plastron/plastron/api/plastron/authority/v1"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
)

const (
	maxRotateWait = 10 * time.Minute
	maxWaiting    = 20 // of those who are not ready, named in an answer
)

// authorities is plastron.authority.v1.Authority.
type authorities struct {
	authorityv1.UnsafeAuthorityServer
	server *Server
}

// Status says what state every server's keys are in and what happens next.
func (a authorities) Status(context.Context, *authorityv1.StatusRequest) (*authorityv1.StatusResponse, error) {
	out := &authorityv1.StatusResponse{}
	for _, s := range a.server.cfg.Authority.Status(time.Now()) {
		line := &authorityv1.Line{
			Server: s.Server, Kind: s.Kind, Answers: s.Server == a.server.cfg.About.ServerID, Next: s.Next, NextAt: rpc.Unix(s.At),
			Unacknowledged: uint32(len(s.Missing)), Waiting: writeWaiting(s.Missing),
		}
		if s.Err != nil {
			line.Fault = rpc.Text(s.Err)
		}
		for _, k := range s.Keys {
			line.Keys = append(line.Keys, writeKey(k.Slot, k.Published, k.Tainted))
		}
		out.Lines = append(out.Lines, line)
	}
	return out, nil
}

func writeKey(s registry.Slot, published, tainted bool) *authorityv1.Key {
	return &authorityv1.Key{
		AuthorityId: s.AuthorityID, State: authority.StateName(s.State), Published: published, Tainted: tainted,
		PublishedAt: rpc.Unix(s.PublishedAt), ReadyAt: rpc.Unix(s.ReadyAt), Unready: s.Unready, ActivatedAt: rpc.Unix(s.ActivatedAt),
		RetiredAt: rpc.Unix(s.RetiredAt), NotAfter: rpc.Unix(s.NotAfter), LastExpiry: rpc.Unix(s.LastExpiry),
	}
}

func writeWaiting(missing []authority.Missing) (out []*authorityv1.Waiting) {
	for _, m := range missing[:min(len(missing), maxWaiting)] {
		out = append(out, &authorityv1.Waiting{Id: m.Name, Server: m.Server, Until: rpc.Unix(m.Until), ByTime: m.ByTime})
	}
	return out
}

// Rotate replaces the active key of this server.
func (a authorities) Rotate(ctx context.Context, req *authorityv1.RotateRequest) (*authorityv1.RotateResponse, error) {
	within := time.Duration(req.WithinMs) * time.Millisecond
	if req.WithinMs < 0 || req.WithinMs > maxRotateWait.Milliseconds() {
		return nil, fault.New(fault.Invalid, "wait_invalid", "the time to wait must be between 0 and %s", maxRotateWait)
	}
	wait, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	caller, engine := callerFrom(ctx).name(), a.server.cfg.Authority
	id := req.AuthorityId
	if id == "" {
		s, err := engine.Prepared(ctx, caller, req.Kind)
		if err != nil {
			return nil, err
		}
		id = s.AuthorityID
	}
	s, passed, err := engine.Activate(wait, caller, req.Kind, id, req.Force)
	if err != nil {
		return nil, err
	}
	return &authorityv1.RotateResponse{Active: writeKey(s, true, false), Unready: writeWaiting(passed), UnreadyCount: uint32(len(passed))}, nil
}
