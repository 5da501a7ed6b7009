package serverapi

import (
	"context"
	"strings"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/registry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxCut is how many entries of one ID are deleted in one transaction.
const maxCut = 1000

// cutoffs is plastron.cutoff.v1.Cutoff.
type cutoffs struct {
	cutoffv1.UnsafeCutoffServer
	server *Server
}

// Revoke bans an agent or deletes grants, and says what lives on.
func (a cutoffs) Revoke(ctx context.Context, req *cutoffv1.RevokeRequest) (*cutoffv1.RevokeResponse, error) {
	s := a.server
	resp := &cutoffv1.RevokeResponse{}
	left := signed{below: true}
	if strings.HasPrefix(req.What, "spiffe://") {
		id, err := identity.ParseMember(s.cfg.TrustDomain, req.What)
		if err != nil {
			return nil, err
		}
		if identity.IsAgent(id) {
			resp.Agent = id.String()
			left.agent, left.grants, left.below = id, s.reachable(id), false
			resp.BannedBefore, err = s.ban(ctx, id, req.DryRun)
		} else {
			left.id = id
			left.grants, err = s.cut(ctx, req.DryRun, func(tx *registry.Tx) ([]entry.Entry, error) { return givers(tx, id) })
		}
		if err != nil {
			return nil, err
		}
	} else {
		if err := entry.CheckID(req.What); err != nil {
			return nil, err
		}
		var err error
		left.grant = req.What
		left.grants, err = s.cut(ctx, req.DryRun, func(tx *registry.Tx) ([]entry.Entry, error) { return grantNamed(tx, req.What) })
		if err != nil {
			return nil, err
		}
	}
	if resp.Agent == "" {
		resp.Grants, resp.Remaining = writeGrants(left.grants), s.remaining(left.grants)
	}
	if !req.DryRun {
		s.cfg.Audit.Note(audit.Cutoff{Act: "revoke", Caller: callerFrom(ctx).name(), Subject: req.What})
	}
	resp.Alive = s.alive(ctx, &left)
	return resp, nil
}

// ban bans an agent, or only sees that it is there.
func (s *Server) ban(ctx context.Context, id spiffeid.ID, dry bool) (before bool, err error) {
	var n registry.Node
	s.cfg.Registry.View(func(snap *registry.Snapshot) { n, err = snap.Node(id) })
	if !dry && (err == nil || fault.KindOf(err) == fault.NotFound) { // another server may have let it in a moment ago
		err = s.cfg.Nodes.Ban(ctx, callerFrom(ctx).name(), id)
	}
	return n.Banned, made(err)
}

// made is nil if a change was made, whether or not it shows here already.
func made(err error) error {
	if fault.ReasonOf(err) == "committed_not_visible" {
		return nil
	}
	return err
}

// cut deletes the grants that find names, and returns them.
func (s *Server) cut(ctx context.Context, dry bool, find func(*registry.Tx) ([]entry.Entry, error)) (gone []entry.Entry, err error) {
	for {
		var part []entry.Entry
		_, err := s.cfg.Registry.Update(ctx, callerFrom(ctx).name(), func(tx *registry.Tx) error {
			var err error
			if part, err = find(tx); err != nil || dry {
				return err
			}
			part = part[:min(len(part), maxCut)]
			for _, e := range part {
				drop := tx.DeleteEntry
				if e.Rule != nil {
					drop = tx.DeleteRule
				}
				if err := drop(e.ID); err != nil {
					return err
				}
			}
			return nil
		})
		if len(gone) > 0 && fault.KindOf(err) == fault.NotFound {
			return gone, nil // the last were as many as one transaction takes
		}
		if made(err) != nil {
			return nil, err
		}
		if gone = append(gone, part...); dry || len(part) < maxCut {
			return gone, nil
		}
	}
}

// grantNamed finds the entry or the rule with an id. No two share one.
func grantNamed(tx *registry.Tx, id string) ([]entry.Entry, error) {
	e, err := tx.Entry(id)
	if fault.KindOf(err) == fault.NotFound {
		e, err = tx.Rule(id)
	}
	if fault.KindOf(err) == fault.NotFound {
		return nil, fault.New(fault.NotFound, "grant_not_found", "there is no entry and no rule %q", id).
			Fix("name an agent, an entry, a rule or a SPIFFE ID: see plastron server agent list, entry show, rule show")
	}
	return []entry.Entry{e}, err
}

// givers finds the entries that give exactly one ID.
func givers(tx *registry.Tx, id spiffeid.ID) ([]entry.Entry, error) {
	found := tx.Snapshot().List(registry.Filter{SPIFFEID: &id}, "", 0)
	if len(found) > 0 {
		return found, nil
	}
	var rules []string
	for r := range tx.Snapshot().Rules("") {
		if r.Rule.Template.Matches(id) {
			rules = append(rules, r.ID)
		}
	}
	err := fault.New(fault.NotFound, "grant_not_found", "no entry gives %q", id)
	if len(rules) > 0 {
		return nil, err.Fix("rules can make it: revoke %s", strings.Join(rules[:min(len(rules), maxWhy)], ", "))
	}
	return nil, err
}

// reachable returns what an agent is granted, banned or not, but what has ended.
func (s *Server) reachable(agent spiffeid.ID) (grants []entry.Entry) {
	now := time.Now()
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		for e := range snap.Reachable(agent) {
			if !e.Expired(now) {
				grants = append(grants, e)
			}
		}
	})
	return grants
}

// remaining returns the grants besides these that can give an ID which these gave.
func (s *Server) remaining(gone []entry.Entry) []*cutoffv1.Grant {
	ids, deleted := map[spiffeid.ID]bool{}, map[string]bool{}
	for _, e := range gone {
		deleted[e.ID] = true
		if e.Rule == nil {
			ids[e.SPIFFEID] = true
		}
	}
	var out []entry.Entry
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		for id := range ids {
			out = append(out, snap.List(registry.Filter{SPIFFEID: &id}, "", maxCut)...)
		}
		for r := range snap.Rules("") {
			for id := range ids {
				if r.Rule.Template.Matches(id) {
					out = append(out, r)
					break
				}
			}
		}
	})
	var left []entry.Entry
	for _, e := range out {
		if !deleted[e.ID] { // in a dry run they are there
			left = append(left, e)
		}
	}
	return writeGrants(left)
}

func writeGrants(grants []entry.Entry) (out []*cutoffv1.Grant) {
	for _, e := range grants {
		g := &cutoffv1.Grant{Id: e.ID, ParentId: e.ParentID.String(), Admin: e.Admin, Downstream: e.Downstream, Owner: e.Owner}
		if e.Rule != nil {
			g.Rule, g.Gives, g.Prefix = true, e.Rule.Template.String(), e.Rule.Prefix
		} else {
			g.Gives = e.SPIFFEID.String()
		}
		out = append(out, g)
	}
	return out
}
