package mirror

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Report is what an operator is told of a mirror.
type Report struct {
	Stats
	Sync
	Since        time.Time // when the conversation began, or ended if there is none; zero: never
	Acknowledged time.Time // when the agent last said that it holds what the server has; zero: never
	JWTSVIDs     int
	Tainted      int    // X.509-SVIDs of a tainted authority that are not replaced yet
	First        []Held // the X.509-SVIDs that end first, in that order
	Roots        int
	RootsEnd     time.Time // when the last root of the own trust domain ends
}

// Held is one X.509-SVID that is held.
type Held struct {
	GrantID   string
	ID        spiffeid.ID
	ExpiresAt time.Time
}

// report fills in what the machine knows, with at most n SVIDs.
func (m *machine) report(n int) Report {
	r := Report{Stats: m.stats(), Sync: m.inSync(), Since: m.ledger.since, Acknowledged: m.ledger.acknowledged}
	byEnd := func(a, b Held) int {
		return cmp.Or(a.ExpiresAt.Compare(b.ExpiresAt), strings.Compare(a.GrantID, b.GrantID), strings.Compare(a.ID.String(), b.ID.String()))
	}
	for p := range m.pairs() { // not sorted as a whole: callers of the Workload API wait meanwhile
		if p.cert == nil {
			continue
		}
		if _, tainted := m.issuer(p.cert); tainted {
			r.Tainted++
		}
		held := Held{p.grant.entry.ID, p.id, p.cert.expiresAt}
		if at, _ := slices.BinarySearchFunc(r.First, held, byEnd); at < n {
			r.First = slices.Insert(r.First, at, held)
			r.First = r.First[:min(n, len(r.First))]
		}
	}
	if own := m.own(); own != nil {
		roots := own.bundle.Roots()
		r.Roots = len(roots)
		for _, root := range roots {
			if root.NotAfter.After(r.RootsEnd) {
				r.RootsEnd = root.NotAfter
			}
		}
	}
	return r
}

// inSync says how far the mirror is behind the server.
func (m *machine) inSync() Sync {
	s := Sync{
		Synced: m.synced, Connected: m.online, Position: m.position,
		Heard: m.ledger.heard, Skew: m.ledger.skew, SkewKnown: m.ledger.skewKnown,
	}
	if !m.online {
		s.Err = m.ledger.stream
	}
	return s
}
