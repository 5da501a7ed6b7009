package registry

import (
	"bytes"
	"cmp"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds on what one question looks at.
const (
	maxUnreached = 10_000
	maxClimb     = 1000
)

// NearAlias is an alias that a node lacks one selector of.
type NearAlias struct {
	ID      string
	Missing entry.Selector
}

// Unreached returns, the oldest first and at most limit, the entries that fit
// processes with these selectors, have not ended and do not reach a live agent.
func (v *Snapshot) Unreached(agent spiffeid.ID, selectors []entry.Selector, now time.Time, limit int) (entries []entry.Entry, more bool) {
	n, live := v.s.live(agent)
	if !live || len(selectors) == 0 {
		return nil, false
	}
	r, groups := v.s.rows, v.s.reach.reached(n)
	var found []uint32
	for set := range r.matchingSets(&SelectorFilter{Match: MatchSubset, Selectors: selectors}) {
		for h := range r.withSet(set) {
			row := r.at(h)
			ended := row.expires != 0 && row.expires <= now.Unix()
			if len(found) < maxUnreached && row.flags&(flagAlias|flagStoreSVID) == 0 && !ended && !v.s.reach.grants(groups, h) {
				found = append(found, h)
			}
		}
	}
	slices.SortFunc(found, func(a, b uint32) int {
		return cmp.Or(cmp.Compare(r.at(a).created, r.at(b).created), bytes.Compare(r.idBytes(a), r.idBytes(b)))
	})
	for _, h := range found[:min(limit, len(found))] {
		entries = append(entries, r.entry(h))
	}
	return entries, len(found) > limit
}

// NearestAlias returns an alias by which an agent would reach entries with this
// parent, did its node have one selector more; the first by id if there are
// several.
func (v *Snapshot) NearestAlias(agent, parent spiffeid.ID) (NearAlias, bool) {
	n, live := v.s.live(agent)
	if !live {
		return NearAlias{}, false
	}
	var best NearAlias
	found := false
	v.climb(parent, func(uint32) {}, func(h uint32) {
		missing := uint32(0)
		for _, sym := range v.s.rows.sets.symbols(v.s.rows.at(h).set) {
			if _, shown := v.s.reach.showing[sym][n]; !shown {
				if missing != 0 {
					return
				}
				missing = sym
			}
		}
		if id := v.s.rows.id(h); missing != 0 && (!found || id < best.ID) {
			best, found = NearAlias{id, v.s.rows.sets.selector(missing)}, true
		}
	})
	return best, found
}

// Agents returns how many live agents are granted what has this parent, and the
// IDs of the first of them, in the order of IDs.
func (v *Snapshot) Agents(parent spiffeid.ID, first int) (n int, ids []spiffeid.ID) {
	agents := map[uint32]struct{}{}
	v.climb(parent, func(path uint32) {
		if n, ok := v.s.reach.at[path]; ok {
			agents[n] = struct{}{}
		}
	}, func(h uint32) {
		for n := range v.s.reach.aliases[h].nodes {
			agents[n] = struct{}{}
		}
	})
	paths := make([]string, 0, len(agents))
	for n := range agents {
		paths = append(paths, v.s.nodes.at(n).path)
	}
	slices.Sort(paths)
	for _, path := range paths[:min(first, len(paths))] {
		ids = append(ids, spiffeid.RequireFromPath(v.s.td, path)) // it was checked on its way in
	}
	return len(agents), ids
}

// climb visits the paths from which, and the aliases through which, agents reach
// entries with this parent.
func (v *Snapshot) climb(parent spiffeid.ID, onPath, onAlias func(uint32)) {
	seen, looked := map[uint32]struct{}{}, 0
	paths := []uint32{v.s.rows.pathOf(parent)}
	for len(paths) > 0 {
		path := paths[len(paths)-1]
		paths = paths[:len(paths)-1]
		if _, again := seen[path]; again || path == 0 {
			continue
		}
		seen[path] = struct{}{}
		onPath(path)
		for h := range v.s.rows.withPath(path) {
			if looked++; looked > maxClimb {
				return
			}
			if row := v.s.rows.at(h); row.flags&flagAlias != 0 {
				onAlias(h)
			} else {
				paths = append(paths, row.parent)
			}
		}
	}
}
