package serverapi

import (
	"context"
	"encoding/hex"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/servers"
)

// List says how each server is doing, as far as this one knows: first itself.
func (a statuses) List(context.Context, *statusv1.ListRequest) (*statusv1.ListResponse, error) {
	own := a.server.status(false, time.Now())
	own.Seen = &statusv1.Seen{State: statusv1.Seen_STATE_LIVE, Self: true}
	out := &statusv1.ListResponse{Servers: []*statusv1.ServerStatus{own}}
	if known := a.server.cfg.Servers; known != nil {
		if left, limited := known.LeaseLeft(); limited {
			own.Seen.Leased, own.Seen.LeaseLeftMs = true, left.Milliseconds()
		}
		for _, other := range known.Others() {
			out.Servers = append(out.Servers, a.server.describeOther(&other))
		}
	}
	return out, nil
}

// describeOther says what is known of another server.
func (s *Server) describeOther(o *servers.Other) *statusv1.ServerStatus {
	row := &o.Row
	seen := &statusv1.Seen{
		State: statusv1.Seen_STATE_SILENT, BeatAgeMs: o.Silent.Milliseconds(),
		ClockKnown: o.Clock, ClockAheadMs: o.Ahead.Milliseconds(),
	}
	switch {
	case row.Stopped:
		seen.State = statusv1.Seen_STATE_STOPPED
	case o.Live:
		seen.State = statusv1.Seen_STATE_LIVE
	}
	switch {
	case o.Diverged:
		seen.Agreement = statusv1.Seen_AGREEMENT_DIFFERS
	case o.Compared:
		seen.Agreement = statusv1.Seen_AGREEMENT_SAME
	}
	if !row.Stopped && row.Lease > 0 {
		seen.Leased, seen.LeaseLeftMs = true, max(0, row.Lease-o.Silent).Milliseconds()
	}
	out := &statusv1.ServerStatus{
		Id: row.ID, Version: row.Version, TrustDomain: s.cfg.TrustDomain.Name(), StartedAt: row.StartedAt.Unix(),
		Addresses: row.Addresses, Position: statusPosition(row.Position), Digest: hex.EncodeToString(row.Digest[:]),
		Attached: &statusv1.Attached{Agents: uint32(row.Agents)}, Seen: seen,
	}
	for _, l := range row.Laggards {
		out.Attached.Laggards = append(out.Attached.Laggards, l.Agent)
	}
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		if at := snap.Position(); at.Epoch == row.Position.Epoch {
			seen.Behind = at.Revision - min(at.Revision, row.Position.Revision)
		}
		out.Authorities = describeAuthorities(snap, row.ID)
	})
	return out
}
