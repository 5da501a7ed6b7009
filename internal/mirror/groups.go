package mirror

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// group is all subscribers that show the same selectors and have the same facts.
type group struct {
	key        string
	facts      entry.Facts // selectors sorted, without duplicates
	refs       int
	candidates map[string]bool // grants whose selectors are all shown
	matched    []entry.Matched
	pairs      []*pair // of matched, in the same order
	trace      entry.Trace
	federates  map[string]bool // trust domains that matched grants name
}

// groupKey names selectors and facts so that no two of them share a key, which is
// short however much there is of them: it is kept for many callers.
func groupKey(facts entry.Facts) string {
	b := binary.AppendUvarint(nil, uint64(len(facts.Selectors)))
	for _, s := range facts.Selectors {
		b = binary.AppendUvarint(b, uint64(len(s.Type)))
		b = append(b, s.Type...)
		b = binary.AppendUvarint(b, uint64(len(s.Value)))
		b = append(b, s.Value...)
	}
	sum := sha256.Sum256(append(b, factsKey(facts.Values)...))
	return string(sum[:])
}

// normalised returns selectors sorted and without duplicates.
func normalised(selectors []entry.Selector) []entry.Selector {
	selectors = slices.Clone(selectors)
	slices.SortFunc(selectors, entry.Selector.Compare)
	return slices.Compact(selectors)
}

// join returns the group of what is known of a caller and counts one more subscriber.
func (m *machine) join(facts entry.Facts, now time.Time) *group {
	facts = entry.Facts{Selectors: normalised(facts.Selectors), Values: maps.Clone(facts.Values)}
	key := groupKey(facts)
	g := m.groups[key]
	if g == nil {
		g = &group{key: key, facts: facts, candidates: map[string]bool{}}
		for id, gr := range m.grants {
			if gr.usable && entry.Subset(gr.entry.Selectors, facts.Selectors) {
				g.candidates[id] = true
			}
		}
		m.groups[key] = g
		m.rematch(g, now)
	}
	g.refs++
	return g
}

// leave counts one subscriber less.
func (m *machine) leave(g *group, now time.Time) {
	g.refs--
	if g.refs > 0 {
		return
	}
	for _, p := range g.pairs {
		delete(p.groups, g)
		p.lastUse = now
	}
	delete(m.groups, g.key)
	if m.full {
		m.next = now // there is something to give up
	}
}

// regroup follows the change of one grant: groups that matched it before or do so
// after are affected, no others (RG16).
func (m *machine) regroup(id string, after *grant, now time.Time, dirty map[*group]bool) {
	for _, g := range m.groups {
		was := g.candidates[id]
		is := after != nil && after.usable && entry.Subset(after.entry.Selectors, g.facts.Selectors)
		if !was && !is {
			continue
		}
		if is {
			g.candidates[id] = true
		} else {
			delete(g.candidates, id)
		}
		m.rematch(g, now)
		dirty[g] = true
	}
}

// rematch works out anew what a group is given.
func (m *machine) rematch(g *group, now time.Time) {
	for _, p := range g.pairs {
		delete(p.groups, g)
	}
	grants := make([]entry.Entry, 0, len(g.candidates))
	for id := range g.candidates {
		grants = append(grants, m.grants[id].entry)
	}
	g.matched, g.trace = entry.Match(grants, g.facts, now)
	g.pairs, g.federates = nil, map[string]bool{}
	for _, matched := range g.matched {
		p := m.grants[matched.GrantID].pair(matched)
		if p.groups == nil {
			p.groups = map[*group]bool{}
		}
		p.groups[g] = true
		g.pairs = append(g.pairs, p)
		for _, td := range p.grant.entry.FederatesWith {
			g.federates[td.Name()] = true
		}
	}
}

// gives returns the identity that a grant gives for these facts, if it does.
func (m *machine) gives(grantID string, facts map[string]string, now time.Time) (spiffeid.ID, entry.Entry, bool) {
	g := m.grants[grantID]
	if g == nil || !g.serves(now) {
		return spiffeid.ID{}, entry.Entry{}, false
	}
	id, _, bad := g.entry.Grants(facts)
	return id, g.entry, bad == nil
}

// view says what a group is given now. It looks at the clock itself, so that
// nothing expired leaves even if a tick is late.
func (m *machine) view(g *group, now time.Time) View {
	v := View{Synced: m.synced, Trace: g.trace}
	if own := m.own(); own != nil {
		v.Bundle = own.out
	}
	federates := map[string]spiffeid.TrustDomain{}
	for i, p := range g.pairs {
		if !p.grant.serves(now) {
			continue
		}
		v.Matched = append(v.Matched, g.matched[i])
		for _, td := range p.grant.entry.FederatesWith {
			federates[td.Name()] = td
		}
		if c := p.cert; c.usable(now) {
			v.Identities = append(v.Identities, Identity{GrantID: p.grant.entry.ID, ID: c.id, Hint: p.grant.entry.Hint,
				Chain: c.chain, Key: c.key, ExpiresAt: c.expiresAt})
		} else if !p.refused {
			v.Pending++
		}
	}
	if m.signFailures >= signAway && len(v.Identities) > 0 {
		v.Pending = 0 // the server is away: what there is, is not kept waiting
	}
	delete(federates, m.td.Name())
	for name, td := range federates {
		if t := m.bundles[name]; t != nil && !t.empty() {
			v.Federated = append(v.Federated, t.out)
		} else {
			v.Unknown = append(v.Unknown, td)
		}
	}
	slices.SortFunc(v.Federated, func(a, b Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) })
	return v
}

func markGroups(p *pair, dirty map[*group]bool) {
	for g := range p.groups {
		dirty[g] = true
	}
}

func inOrder(dirty map[*group]bool) []*group {
	var groups []*group
	for g := range dirty {
		groups = append(groups, g)
	}
	slices.SortFunc(groups, func(a, b *group) int { return strings.Compare(a.key, b.key) })
	return groups
}
