package serverapi

import (
	"context"
	"slices"
	"strings"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
)

const (
	// rekey is how long agents have to replace what a tainted authority signed (R69).
	rekey       = time.Minute
	maxAttaches = 100 // agents that an answer names
	shortID     = 8   // characters of a server's id that commands show
)

// Expel puts a server out that is in wrong hands, and says what it could reach (R69, R130).
func (a cutoffs) Expel(ctx context.Context, req *cutoffv1.ExpelRequest) (*cutoffv1.ExpelResponse, error) {
	s, now := a.server, time.Now()
	if s.cfg.Servers == nil {
		return nil, fault.New(fault.Unsupported, "servers_unknown", "this server knows no others")
	}
	resp := &cutoffv1.ExpelResponse{}
	var err error
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		if resp.Server, err = serverNamed(snap, req.Server); err == nil {
			s.describeOutcast(resp, snap, now)
		}
	})
	switch {
	case err != nil:
		return nil, err
	case resp.Server == s.cfg.About.ServerID:
		return nil, fault.New(fault.Precondition, "server_is_self", "a server does not expel itself").
			Fix("ask another server of the trust domain; if there is none, start one with a data_dir of its own first")
	}
	// Without its authorities the trust domain lives on ours.
	if _, err := s.cfg.X509(now); err != nil {
		return nil, err
	}
	if _, err := s.cfg.JWT(now); err != nil {
		return nil, err
	}
	after := rekey
	if req.Now {
		after = 0
	}
	if req.DryRun {
		if at := now.Add(after).Unix(); resp.RevokeAt == 0 || at < resp.RevokeAt {
			resp.RevokeAt = at
		}
		return resp, nil
	}
	x, err := s.cfg.Servers.Expel(ctx, callerFrom(ctx).name(), resp.Server, after)
	if made(err) != nil {
		return nil, err
	}
	resp.RevokeAt = x.RevokeAt.Unix()
	s.cfg.Audit.Note(audit.Cutoff{Act: "expel", Caller: callerFrom(ctx).name(), Subject: resp.Server})
	return resp, nil
}

// serverNamed finds a server by its id, the beginning of it, or an authority's.
func serverNamed(snap *registry.Snapshot, name string) (string, error) {
	known := map[string]bool{}
	for _, row := range snap.Servers() {
		known[row.ID] = true
	}
	for _, x := range snap.Expelled() {
		known[x.Server] = true
	}
	for _, a := range snap.Authorities("") {
		known[a.Server] = true
		for _, slot := range a.Slots {
			if slot.AuthorityID == name && name != "" {
				return a.Server, nil
			}
		}
	}
	var found []string
	for id := range known {
		if id == name {
			return id, nil
		}
		if len(name) >= shortID && strings.HasPrefix(id, name) {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", fault.New(fault.NotFound, "server_not_found", "no server has the id or an authority %.100q, and nothing of one is left", name).
			Fix("plastron server list and server authority status show them")
	}
	return "", fault.New(fault.Invalid, "server_ambiguous", "the ids of %d servers begin with %q", len(found), name).Fix("write the whole id")
}

// describeOutcast says what a server has and whom it serves, while it still does.
func (s *Server) describeOutcast(out *cutoffv1.ExpelResponse, snap *registry.Snapshot, now time.Time) {
	for _, x := range snap.Expelled() {
		if x.Server == out.Server {
			out.ExpelledBefore, out.RevokeAt = true, x.RevokeAt.Unix()
		}
	}
	out.State = "gone"
	if row, err := snap.Server(out.Server); err == nil {
		out.Host, out.DataDir, out.Addresses = row.Place.Host, row.Place.DataDir, row.Addresses
		switch {
		case row.Stopped:
			out.State = "stopped"
		case row.Live(now):
			out.State = "live"
		default:
			out.State = "silent"
		}
	}
	for _, a := range snap.Authorities(out.Server) {
		out.Until = max(out.Until, rpc.Unix(lastOf(a)))
		for _, slot := range a.Slots {
			out.Authorities = append(out.Authorities, &cutoffv1.Key{
				Kind: a.Kind, AuthorityId: slot.AuthorityID, State: authority.StateName(slot.State), Upstream: slot.Upstream, LastExpiry: rpc.Unix(slot.LastExpiry),
			})
		}
	}
	attached := snap.Attachments(now)
	for n := range snap.Nodes("") {
		if at, ok := attached.Of(n.ID); ok && at.Server == out.Server {
			if out.Attached++; len(out.Agents) < maxAttaches {
				out.Agents = append(out.Agents, n.ID.String())
			}
		}
	}
	for d := range snap.Downstreams() {
		if d.Server == out.Server && now.Before(d.NotAfter) {
			out.Downstream++
		}
	}
	slices.Sort(out.Agents)
	out.Published = published(snap, s.cfg.TrustDomain, now)
}
