package entry

import "github.com/spiffe/go-spiffe/v2/spiffeid"

// Node is what authorisation knows of an agent.
type Node struct {
	ID        spiffeid.ID
	Selectors []Selector // sorted, without duplicates
}

// Entitled returns the ids of the entries that an agent is given: those whose
// parent is the agent or one of its aliases and, in turn, those whose parent is
// the SPIFFE ID of an entry it is given. Aliases themselves are not given, and
// only paths are compared, since all are of one trust domain. Expired entries
// count until they are removed.
//
// The registry answers this from an index; this function is what the index is
// tested against.
func Entitled(entries []Entry, node Node) map[string]bool {
	reached := map[string]bool{node.ID.Path(): true}
	for i := range entries {
		if e := &entries[i]; e.Alias() && Subset(e.Selectors, node.Selectors) {
			reached[e.SPIFFEID.Path()] = true
		}
	}
	given := make(map[string]bool)
	for grown := true; grown; {
		grown = false
		for i := range entries {
			e := &entries[i]
			if e.Alias() || given[e.ID] || !reached[e.ParentID.Path()] {
				continue
			}
			given[e.ID] = true
			reached[e.SPIFFEID.Path()] = true // a rule's is empty, which no parent's is
			grown = true
		}
	}
	return given
}
