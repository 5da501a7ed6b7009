package serverapi

import (
	"context"
	"time"

	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	maxRules    = 500 // in one call or page: each is answered with its reach
	firstOfMany = 10  // agents that a reach names
)

// rules is plastron.rule.v1.Rules.
type rules struct {
	rulev1.UnsafeRulesServer
	server *Server
}

// Create creates rules, each with its own outcome. One that is there already
// comes back with its refusal.
func (a rules) Create(ctx context.Context, req *rulev1.CreateRequest) (*rulev1.CreateResponse, error) {
	if err := checkRules(len(req.Rules)); err != nil {
		return nil, err
	}
	now := time.Now().UTC().Truncate(time.Second)
	made, err := write(ctx, a.server, req.Rules, func(tx *registry.Tx, in *rulev1.Rule) (*entry.Entry, error) {
		return a.create(tx, in, now)
	})
	if err != nil {
		return nil, err
	}
	resp := &rulev1.CreateResponse{}
	for _, m := range made {
		out := &rulev1.CreateResult{}
		if m.err != nil {
			r := writeRefusal(m.err)
			out.Refusal = &rulev1.Refusal{Reason: r.Reason, Message: r.Message, Remedy: r.Remedy}
		}
		if m.entry != nil {
			out.Rule, out.Reach = writeRule(m.entry), a.server.reachOf(m.entry)
		}
		resp.Results = append(resp.Results, out)
	}
	return resp, nil
}

func (a rules) create(tx *registry.Tx, in *rulev1.Rule, now time.Time) (*entry.Entry, error) {
	if in == nil {
		return nil, fault.New(fault.Invalid, "rule_missing", "the batch has an empty item")
	}
	e, err := a.server.readRule(in)
	if err != nil {
		return nil, err
	}
	e.CreatedAt = now
	if e.ID == "" {
		e.ID = entry.NewID()
	}
	if err := a.server.validate(e, now); err != nil {
		return nil, err
	}
	same, err := tx.EntryByContent(entry.ContentHash(e))
	switch {
	case err == nil:
		return &same, fault.New(fault.Exists, "rule_exists", "a rule with this parent, ID template and selectors exists: %q", same.ID)
	case fault.KindOf(err) != fault.NotFound:
		return nil, err
	}
	switch _, err := tx.Rule(e.ID); {
	case err == nil: // E24
		return nil, fault.New(fault.Exists, "rule_id_taken", "a rule with the id %q exists", e.ID)
	case fault.KindOf(err) != fault.NotFound:
		return nil, err
	}
	return e, tx.PutRule(*e)
}

// readRule reads what an operator may say of a rule; entry.Validate judges it.
func (s *Server) readRule(in *rulev1.Rule) (*entry.Entry, error) {
	r, err := entry.ParseRule(s.cfg.TrustDomain, in.IdTemplate, in.IdPrefix, in.Trust)
	if err != nil {
		return nil, err
	}
	e := &entry.Entry{
		ID: in.Id, Rule: r, Hint: in.Hint,
		X509TTL: time.Duration(in.X509SvidTtl) * time.Second, JWTTL: time.Duration(in.JwtSvidTtl) * time.Second,
	}
	if in.ParentId != "" {
		if e.ParentID, err = identity.ParseMember(s.cfg.TrustDomain, in.ParentId); err != nil {
			return nil, err
		}
	}
	for _, sel := range in.Selectors[:min(len(in.Selectors), entry.MaxSelectors+1)] {
		e.Selectors = append(e.Selectors, entry.Selector{Type: sel.GetType(), Value: sel.GetValue()})
	}
	for _, name := range in.FederatesWith[:min(len(in.FederatesWith), entry.MaxFederatesWith+1)] {
		td, err := identity.ParseTrustDomain(name)
		if err != nil {
			return nil, err
		}
		e.FederatesWith = append(e.FederatesWith, td)
	}
	if in.ExpiresAt != 0 {
		e.ExpiresAt = time.Unix(in.ExpiresAt, 0).UTC()
	}
	return e, nil
}

func writeRule(e *entry.Entry) *rulev1.Rule {
	out := &rulev1.Rule{
		Id: e.ID, Revision: e.Revision, ParentId: e.ParentID.String(),
		IdTemplate: e.Rule.Template.String(), IdPrefix: e.Rule.Prefix, Trust: e.Rule.Trust(),
		X509SvidTtl: int32(e.X509TTL / time.Second), JwtSvidTtl: int32(e.JWTTL / time.Second),
		Hint: e.Hint, CreatedAt: rpc.Unix(e.CreatedAt), ExpiresAt: rpc.Unix(e.ExpiresAt),
	}
	for _, s := range e.Selectors {
		out.Selectors = append(out.Selectors, &rulev1.Selector{Type: s.Type, Value: s.Value})
	}
	for _, td := range e.FederatesWith {
		out.FederatesWith = append(out.FederatesWith, td.Name())
	}
	return out
}

// reachOf says which agents have a rule now.
func (s *Server) reachOf(e *entry.Entry) *rulev1.Reach {
	out := &rulev1.Reach{}
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		n, first := snap.Agents(e.ParentID, firstOfMany)
		out.Agents = uint32(n)
		for _, id := range first {
			out.First = append(out.First, id.String())
		}
	})
	return out
}

// Show gives one rule.
func (a rules) Show(_ context.Context, req *rulev1.ShowRequest) (*rulev1.ShowResponse, error) {
	if err := entry.CheckID(req.Id); err != nil {
		return nil, err
	}
	var found entry.Entry
	var err error
	a.server.cfg.Registry.View(func(s *registry.Snapshot) { found, err = s.Rule(req.Id) })
	if err != nil {
		return nil, err
	}
	return &rulev1.ShowResponse{Rule: writeRule(&found), Reach: a.server.reachOf(&found)}, nil
}

// List gives a page. Each rule is a view of its own, so that a long list does
// not keep writers waiting.
func (a rules) List(ctx context.Context, req *rulev1.ListRequest) (*rulev1.ListResponse, error) {
	c := a.server.cursor("rules", nil)
	after, err := c.key(req.PageToken)
	if err != nil {
		return nil, err
	}
	resp, page := &rulev1.ListResponse{}, page{limit: maxRules}
	if req.PageSize > 0 {
		page.limit = min(int(req.PageSize), maxRules)
	}
	for ctx.Err() == nil {
		var next *entry.Entry
		a.server.cfg.Registry.View(func(s *registry.Snapshot) {
			for e := range s.Rules(after) {
				next = &e
				return
			}
		})
		if next == nil {
			return resp, nil
		}
		out := &rulev1.ShowResponse{Rule: writeRule(next), Reach: a.server.reachOf(next)}
		fits, err := page.take(out)
		if err != nil {
			return nil, err
		}
		if !fits {
			resp.NextPageToken = c.token(after)
			return resp, nil
		}
		resp.Rules = append(resp.Rules, out)
		after = next.ID
	}
	return nil, ctx.Err()
}

// Delete deletes rules by id, each with its own outcome.
func (a rules) Delete(ctx context.Context, req *rulev1.DeleteRequest) (*rulev1.DeleteResponse, error) {
	if err := checkRules(len(req.Ids)); err != nil {
		return nil, err
	}
	gone, err := write(ctx, a.server, req.Ids, func(tx *registry.Tx, id string) (*entry.Entry, error) {
		if err := entry.CheckID(id); err != nil {
			return nil, err
		}
		return nil, tx.DeleteRule(id)
	})
	if err != nil {
		return nil, err
	}
	resp := &rulev1.DeleteResponse{}
	for i, g := range gone {
		out := &rulev1.DeleteResult{Id: req.Ids[i]}
		if g.err != nil {
			r := writeRefusal(g.err)
			out.Refusal = &rulev1.Refusal{Reason: r.Reason, Message: r.Message, Remedy: r.Remedy}
		}
		resp.Results = append(resp.Results, out)
	}
	return resp, nil
}

func checkRules(n int) error {
	if n > maxRules {
		return fault.New(fault.Invalid, "batch_too_large", "the batch has %d items, the limit is %d", n, maxRules).Fix("split it") // E32
	}
	return nil
}

// ruled returns the ID that a rule gives for the facts that an agent states, true
// or not. What they make is computed here, and is never an ID with rights over this
// server.
func (s *Server) ruled(e *entry.Entry, facts map[string]string) (spiffeid.ID, error) {
	names := e.Rule.Template.Stated()
	id, _, bad := e.Grants(facts)
	switch {
	case bad != nil:
		return spiffeid.ID{}, bad.Fault()
	case len(facts) != len(names):
		return spiffeid.ID{}, fault.New(fault.Invalid, "facts_unexpected", "the rule %q takes the facts %v and no others", e.ID, names)
	case s.admins[id] || s.grantedKinds(id, time.Time{}) != 0: // entries that have ended count: their end can be moved
		return spiffeid.ID{}, fault.New(fault.Denied, "rule_id_privileged", "%q is the ID of an administrator or a downstream server, which no rule gives out", id).
			Fix("use another ID for the one, or another template for the other")
	}
	return id, nil
}
