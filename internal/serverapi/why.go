package serverapi

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	whyv1 "github.com/plastron/plastron/api/plastron/why/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds on the answers to why.
const (
	maxWhy           = 100 // entries
	maxWhyAgents     = 10  // agents that a parent reaches
	maxHintSelectors = 256
)

// whys is plastron.why.v1.Entries.
type whys struct {
	whyv1.UnsafeEntriesServer
	server *Server
}

// Ask says which entries reach an agent's processes with certain selectors, and
// what keeps away those that nearly do.
func (a whys) Ask(ctx context.Context, req *whyv1.AskEntriesRequest) (*whyv1.AskEntriesResponse, error) {
	td := a.server.cfg.TrustDomain
	agent, err := identity.ParseMember(td, req.GetAgentId())
	if err == nil && !identity.IsAgent(agent) {
		err = fault.New(fault.Invalid, "agent_id_invalid", "%q is not an agent's ID", agent).
			Fix("'plastron server agent list' shows the agents")
	}
	if err != nil {
		return nil, err
	}
	var only *spiffeid.ID
	if req.GetSpiffeId() != "" {
		id, err := identity.ParseWorkload(td, req.GetSpiffeId())
		if err != nil {
			return nil, err
		}
		only = &id
	}
	selectors, err := readWhySelectors(req.GetSelectors())
	if err != nil {
		return nil, err
	}
	now := time.Now()
	resp := &whyv1.AskEntriesResponse{}
	a.server.cfg.Registry.View(func(snap *registry.Snapshot) {
		j := judge{snap: snap, selectors: selectors, now: now}
		if j.node, err = snap.Node(agent); err != nil {
			return
		}
		if j.node.Banned {
			err = fault.New(fault.Precondition, nodes.ReasonBanned, "the agent %s is banned, so nothing reaches it", agent).
				Fix("'plastron server agent evict' lifts the ban; the node then has to attest again")
			return
		}
		resp = j.all(only)
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// Hint says of the calling agent whether an entry that does not reach it fits a
// process. The entry itself is not named: it is another's.
func (a whys) Hint(ctx context.Context, req *whyv1.HintRequest) (*whyv1.HintResponse, error) {
	if n := len(req.GetSelectors()); n > maxHintSelectors {
		return nil, fault.New(fault.Invalid, "selectors_too_many", "there are %d selectors, the limit is %d", n, maxHintSelectors)
	}
	selectors, err := readWhySelectors(req.GetSelectors())
	if err != nil {
		return nil, err
	}
	agent, resp := callerFrom(ctx).id, &whyv1.HintResponse{}
	a.server.cfg.Registry.View(func(snap *registry.Snapshot) {
		entries, _ := snap.Unreached(agent, selectors, time.Now(), maxWhy)
		for i := range entries {
			resp.Code = reason.ParentMismatch.Reason
			if _, near := snap.NearestAlias(agent, entries[i].ParentID); near {
				resp.Code = reason.AliasMismatch.Reason
				return
			}
		}
	})
	return resp, nil
}

func readWhySelectors(in []*whyv1.Selector) ([]entry.Selector, error) {
	selectors := make([]entry.Selector, len(in))
	for i, s := range in {
		selectors[i] = entry.Selector{Type: s.GetType(), Value: s.GetValue()}
	}
	return entry.NormalizeSelectors(selectors)
}

// judge judges entries from the side of one agent and one process.
type judge struct {
	snap      *registry.Snapshot
	node      registry.Node
	selectors []entry.Selector
	now       time.Time
}

// verdict is an entry and how near it comes; the smallest rank is the nearest.
type verdict struct {
	*whyv1.Entry
	rank int
	said *fault.Error // nil: it reaches
}

func (j judge) all(only *spiffeid.ID) *whyv1.AskEntriesResponse {
	var verdicts []verdict
	add := func(e *entry.Entry, reached bool) {
		if !e.Alias() && !e.StoreSVID {
			verdicts = append(verdicts, j.one(e, reached))
		}
	}
	more := false
	if only != nil {
		for _, e := range j.snap.List(registry.Filter{SPIFFEID: only}, "", maxWhy) {
			_, reached := j.snap.AuthorizedEntry(j.node.ID, e.ID)
			add(&e, reached)
		}
	} else {
		for e := range j.snap.AuthorizedGrants(j.node.ID) {
			if entry.Nearly(e.Selectors, j.selectors) {
				add(&e, true)
			}
		}
		var entries []entry.Entry
		entries, more = j.snap.Unreached(j.node.ID, j.selectors, j.now, maxWhy)
		for i := range entries {
			add(&entries[i], false)
		}
	}
	slices.SortStableFunc(verdicts, func(a, b verdict) int { return cmp.Or(a.rank-b.rank, cmp.Compare(a.Id, b.Id)) })
	resp := &whyv1.AskEntriesResponse{More: more || len(verdicts) > maxWhy, Reason: rpc.Reason(reason.NoGrant)}
	for i, v := range verdicts[:min(len(verdicts), maxWhy)] {
		if i == 0 && (v.rank < rankUnlike || only != nil) {
			resp.Reason = rpc.Reason(v.said)
		}
		resp.Entries = append(resp.Entries, v.Entry)
	}
	return resp
}

// How near an entry comes to being handed out.
const (
	rankReaches = iota
	rankEnded
	rankNear // all but one of several selectors fit
	rankAlias
	rankParent
	rankLike   // the only selector has another value
	rankUnlike // nothing of the kind is shown, or more than one selector differs
)

func (j judge) one(e *entry.Entry, reached bool) verdict {
	v := verdict{Entry: &whyv1.Entry{Id: e.ID, SpiffeId: nameOf(e), ParentId: e.ParentID.String()}}
	missing := slices.DeleteFunc(slices.Clone(e.Selectors), func(s entry.Selector) bool { return slices.Contains(j.selectors, s) })
	switch {
	case !reached:
		j.unreached(e, &v)
	case len(missing) > 0:
		j.mismatch(e, missing, &v)
	case e.Expired(j.now):
		v.rank, v.said = rankEnded, reason.Say(reason.GrantExpired, "it ended at %s", e.ExpiresAt.Format(time.RFC3339))
	default:
		v.Reaches = true
	}
	v.Reason = rpc.Reason(v.said)
	return v
}

func (j judge) unreached(e *entry.Entry, v *verdict) {
	if near, ok := j.snap.NearestAlias(j.node.ID, e.ParentID); ok {
		have := entry.SameKind(near.Missing, j.node.Selectors)
		v.rank, v.AliasId, v.Missing, v.Have = rankAlias, near.ID, rpc.Selector(near.Missing), rpc.Selectors(have)
		v.said = reason.Say(reason.AliasMismatch, "its parent is %s; the alias %s wants the node selector %s, and the node has %s",
			e.ParentID, near.ID, near.Missing, shown(have))
		return
	}
	n, first := j.snap.Agents(e.ParentID, maxWhyAgents)
	v.rank, v.AgentCount = rankParent, uint32(n)
	for _, id := range first {
		v.Agents = append(v.Agents, id.String())
	}
	v.said = reason.Say(reason.ParentMismatch, "its parent is %s, which reaches %s", e.ParentID, others(n))
}

func (j judge) mismatch(e *entry.Entry, missing []entry.Selector, v *verdict) {
	first := missing[0]
	have := entry.SameKind(first, j.selectors)
	v.Missing, v.Have = rpc.Selector(first), rpc.Selectors(have)
	v.said = reason.Say(reason.SelectorMismatch, "it asks for %s, and the process shows %s", first, shown(have))
	switch {
	case len(missing) > 1:
		v.rank = rankUnlike
		v.said = reason.Say(reason.SelectorMismatch, "it asks for %s and %d selectors more that the process does not show", first, len(missing)-1)
	case len(e.Selectors) > 1:
		v.rank = rankNear
	case len(have) > 0:
		v.rank = rankLike
	default:
		v.rank = rankUnlike
	}
}

func others(agents int) string {
	switch agents {
	case 0:
		return "no agent"
	case 1:
		return "1 agent, another"
	}
	return fmt.Sprintf("%d agents, and not this one", agents)
}

// shown is the first of what there is.
func shown(have []entry.Selector) string {
	if len(have) == 0 {
		return "nothing of the kind"
	}
	return have[0].String()
}

// nameOf is what an entry gives: a SPIFFE ID, or a rule's template.
func nameOf(e *entry.Entry) string {
	if e.Rule != nil {
		return e.Rule.Template.String()
	}
	return e.SPIFFEID.String()
}
