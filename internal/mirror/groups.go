package mirror

import (
	"encoding/binary"
	"slices"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// group is all subscribers that show the same selectors.
type group struct {
	key        string
	selectors  []entry.Selector // sorted, without duplicates
	refs       int
	candidates map[string]bool // grants whose selectors are all shown
	matched    []entry.Matched
	trace      entry.Trace
	federates  map[string]bool // trust domains that matched grants name
}

// groupKey encodes a set of selectors so that no two sets share a key.
func groupKey(selectors []entry.Selector) string {
	var b []byte
	for _, s := range selectors {
		b = binary.AppendUvarint(b, uint64(len(s.Type)))
		b = append(b, s.Type...)
		b = binary.AppendUvarint(b, uint64(len(s.Value)))
		b = append(b, s.Value...)
	}
	return string(b)
}

// normalised returns selectors sorted and without duplicates.
func normalised(selectors []entry.Selector) []entry.Selector {
	selectors = slices.Clone(selectors)
	slices.SortFunc(selectors, entry.Selector.Compare)
	return slices.Compact(selectors)
}

// join returns the group of a set of selectors and counts one more subscriber.
func (m *machine) join(selectors []entry.Selector, now time.Time) *group {
	selectors = normalised(selectors)
	key := groupKey(selectors)
	g := m.groups[key]
	if g == nil {
		g = &group{key: key, selectors: selectors, candidates: map[string]bool{}}
		for id, gr := range m.grants {
			if gr.usable && entry.Subset(gr.entry.Selectors, selectors) {
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
	for _, matched := range g.matched {
		if gr := m.grants[matched.GrantID]; gr != nil {
			delete(gr.groups, g)
			gr.lastUse = now
		}
	}
	delete(m.groups, g.key)
}

// regroup follows the change of one grant: groups that match it before or
// after are affected, no others (RG16).
func (m *machine) regroup(id string, before, after *grant, now time.Time, dirty map[*group]bool) {
	if after != nil {
		after.groups = nil
	}
	for _, g := range m.groups {
		was := g.candidates[id]
		is := after != nil && after.usable && entry.Subset(after.entry.Selectors, g.selectors)
		if !was && !is {
			continue
		}
		if is {
			g.candidates[id] = true
		} else {
			delete(g.candidates, id)
		}
		if before != nil {
			delete(before.groups, g)
		}
		m.rematch(g, now)
		dirty[g] = true
	}
}

// rematch works out anew what a group is given.
func (m *machine) rematch(g *group, now time.Time) {
	for _, matched := range g.matched {
		if gr := m.grants[matched.GrantID]; gr != nil {
			delete(gr.groups, g)
		}
	}
	grants := make([]entry.Entry, 0, len(g.candidates))
	for id := range g.candidates {
		grants = append(grants, m.grants[id].entry)
	}
	g.matched, g.trace = entry.Match(grants, entry.Facts{Selectors: g.selectors}, now)
	g.federates = map[string]bool{}
	for _, matched := range g.matched {
		gr := m.grants[matched.GrantID]
		if gr.groups == nil {
			gr.groups = map[*group]bool{}
		}
		gr.groups[g] = true
		for _, td := range gr.entry.FederatesWith {
			g.federates[td.Name()] = true
		}
	}
}

// view says what a group is given now. It looks at the clock itself, so that
// nothing expired leaves even if a tick is late.
func (m *machine) view(g *group, now time.Time) View {
	v := View{Synced: m.synced, Trace: g.trace}
	if own := m.own(); own != nil {
		v.Bundle = own.out
	}
	federates := map[string]spiffeid.TrustDomain{}
	for _, matched := range g.matched {
		gr := m.grants[matched.GrantID]
		if !gr.serves(now) {
			continue
		}
		v.Matched = append(v.Matched, matched)
		for _, td := range gr.entry.FederatesWith {
			federates[td.Name()] = td
		}
		if c := gr.cert; c.usable(now) {
			v.Identities = append(v.Identities, Identity{GrantID: matched.GrantID, ID: c.id, Hint: gr.entry.Hint,
				Chain: c.chain, Key: c.key, ExpiresAt: c.expiresAt})
		} else if !gr.refused {
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

func markGroups(gr *grant, dirty map[*group]bool) {
	for g := range gr.groups {
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
