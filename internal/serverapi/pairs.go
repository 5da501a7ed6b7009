package serverapi

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// DefaultRulePairs is how many pairs of a rule and facts one agent may have alive.
const DefaultRulePairs = 1000

// pairs bounds what a compromised agent can have signed by rules: for each
// agent, how many pairs of a rule and facts have an SVID that has not ended.
// Deleting the rule or the agent does not end an SVID, so it ends no pair. It is
// kept in memory: a server that restarts counts anew.
type pairs struct {
	max int

	// mu guards everything below.
	mu    sync.Mutex
	until map[spiffeid.ID]map[pair]time.Time // by agent
	sweep time.Time                          // when to look for what has ended
}

// pair is the hash of a rule's id and of the facts that its template names. Of which
// pod they are true makes no difference: the ID is the same.
type pair [sha256.Size]byte

const sweepEvery = time.Minute

func newPairs(limit int) *pairs {
	if limit <= 0 {
		limit = DefaultRulePairs
	}
	return &pairs{max: limit, until: map[spiffeid.ID]map[pair]time.Time{}}
}

// pairFor is the pair of what an agent states for a grant.
func pairFor(e *entry.Entry, facts map[string]string) pair {
	if e.Rule == nil {
		return pairOf(e.ID, nil)
	}
	named := map[string]string{}
	for _, name := range e.Rule.Template.Facts() {
		named[name] = facts[name]
	}
	return pairOf(e.ID, named)
}

// pairOf is injective: every part carries its length.
func pairOf(rule string, facts map[string]string) pair {
	var b []byte
	part := func(s string) {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	part(rule)
	for _, name := range slices.Sorted(maps.Keys(facts)) {
		part(name)
		part(facts[name])
	}
	return sha256.Sum256(b)
}

// take counts a pair of an agent's that is about to get an SVID which ends then.
func (p *pairs) take(agent spiffeid.ID, what pair, end, now time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !now.Before(p.sweep) || p.sweep.Sub(now) > sweepEvery { // the clock may have been put back
		p.sweep = now.Add(sweepEvery)
		for agent, mine := range p.until {
			if dropEnded(mine, now); len(mine) == 0 {
				delete(p.until, agent)
			}
		}
	}
	mine := p.until[agent]
	if _, known := mine[what]; !known && len(mine) >= p.max {
		if dropEnded(mine, now); len(mine) >= p.max {
			return fault.New(fault.Exhausted, "rule_pairs_exhausted", "the agent has SVIDs for %d different processes by rules, which is the limit", p.max).
				Fix("wait until some of them end, or raise rule_pairs_per_agent in the server's configuration")
		}
	}
	if mine == nil {
		mine = map[pair]time.Time{}
		p.until[agent] = mine
	}
	if end.After(mine[what]) {
		mine[what] = end
	}
	return nil
}

func dropEnded(mine map[pair]time.Time, now time.Time) {
	maps.DeleteFunc(mine, func(_ pair, end time.Time) bool { return !now.Before(end) })
}
