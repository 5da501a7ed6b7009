package serverapi

import (
	"cmp"
	"context"
	"slices"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxReach is how many grants an answer names.
const maxReach = 1000

// Panic takes everything from an agent or a downstream server that is in wrong
// hands, and says what it could reach (R130).
func (a cutoffs) Panic(ctx context.Context, req *cutoffv1.PanicRequest) (*cutoffv1.PanicResponse, error) {
	s := a.server
	id, err := identity.ParseMember(s.cfg.TrustDomain, req.What)
	if err != nil {
		return nil, err
	}
	resp, left := &cutoffv1.PanicResponse{}, signed{below: true}
	if identity.IsAgent(id) {
		resp.Agent = id.String()
		left.agent, left.grants = id, s.reachable(id)
		resp.BannedBefore, err = s.ban(ctx, id, req.DryRun)
		slices.SortFunc(left.grants, mostDangerous)
		resp.Reach, resp.Reached = writeGrants(left.grants[:min(len(left.grants), maxReach)]), uint32(len(left.grants))
	} else {
		left.id = id
		left.grants, err = s.cut(ctx, req.DryRun, func(tx *registry.Tx) ([]entry.Entry, error) { return downstreamOf(tx, id) })
		resp.Grants = writeGrants(left.grants)
		s.cfg.Registry.View(func(snap *registry.Snapshot) { resp.Published = published(snap, s.cfg.TrustDomain, time.Now()) })
	}
	if err != nil {
		return nil, err
	}
	if !req.DryRun {
		s.cfg.Audit.Note(audit.Cutoff{Act: "panic", Caller: callerFrom(ctx).name(), Subject: id.String()})
	}
	resp.Alive = s.alive(ctx, &left)
	return resp, nil
}

// mostDangerous orders grants by what can be done with them.
func mostDangerous(a, b entry.Entry) int {
	rank := func(e *entry.Entry) int {
		switch {
		case e.Downstream:
			return 0
		case e.Admin:
			return 1
		case e.Rule != nil:
			return 2
		}
		return 3
	}
	return cmp.Or(cmp.Compare(rank(&a), rank(&b)), cmp.Compare(a.SPIFFEID.String(), b.SPIFFEID.String()), cmp.Compare(a.ID, b.ID))
}

// downstreamOf finds all entries of an ID, one of which makes it a downstream server's.
func downstreamOf(tx *registry.Tx, id spiffeid.ID) ([]entry.Entry, error) {
	found, err := givers(tx, id)
	if err == nil && !slices.ContainsFunc(found, func(e entry.Entry) bool { return e.Downstream }) {
		err = fault.New(fault.Precondition, "not_downstream", "%q is the ID of no agent and of no downstream server", id).
			Fix("plastron server revoke takes the entries of any ID away")
	}
	return found, err
}

// published returns the JWT keys in the bundle that are of no server here.
func published(snap *registry.Snapshot, td spiffeid.TrustDomain, now time.Time) (out []*cutoffv1.PublishedKey) {
	own := map[string]bool{}
	for _, a := range snap.Authorities("") {
		for _, slot := range a.Slots {
			own[slot.AuthorityID] = true
		}
	}
	b, err := snap.Bundle(td)
	if err != nil {
		return nil // there are no keys
	}
	for _, k := range b.JWT {
		if !own[k.KeyID] && (k.ExpiresAt.IsZero() || k.ExpiresAt.After(now)) {
			out = append(out, &cutoffv1.PublishedKey{KeyId: k.KeyID, ExpiresAt: rpc.Unix(k.ExpiresAt)})
		}
	}
	return out
}
