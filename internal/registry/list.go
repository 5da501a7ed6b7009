package registry

import (
	"bytes"
	"iter"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Match is how a filter compares a set: the set that an entry has with the one
// that the filter names.
type Match uint8

// The ways to compare sets.
const (
	MatchExact    Match = iota // the same
	MatchSubset                // the entry has some, and no other than these
	MatchSuperset              // the entry has all of these
	MatchAny                   // the entry has one of these
)

// Filter picks entries; a nil field lets all pass.
type Filter struct {
	SPIFFEID      *spiffeid.ID
	ParentID      *spiffeid.ID
	Selectors     *SelectorFilter
	FederatesWith *DomainFilter
	Hint          *string
	Downstream    *bool
	EndedBy       *time.Time // entries whose own end has come by then
	Owner         string     // empty: anybody's
}

// SelectorFilter compares an entry's selectors.
type SelectorFilter struct {
	Match     Match
	Selectors []entry.Selector // normalised
}

// DomainFilter compares the trust domains that an entry federates with.
type DomainFilter struct {
	Match   Match
	Domains []spiffeid.TrustDomain
}

// List returns up to limit entries that pass the filter and whose id is
// greater than after, in the order of ids; a limit of 0 is none. An entry that
// is there during a whole scan, page by page, is listed exactly once (R86).
func (v *Snapshot) List(f Filter, after string, limit int) []entry.Entry {
	r, q := v.s.rows, v.s.query(f)
	var found []uint32
	if q.few != nil && q.most*8 < r.entries.n { // so few that sorting them is cheaper than walking all
		for h := range q.few {
			if string(r.idBytes(h)) > after && q.passes(h) {
				found = append(found, h)
			}
		}
		slices.SortFunc(found, func(a, b uint32) int { return bytes.Compare(r.idBytes(a), r.idBytes(b)) })
		if limit > 0 && len(found) > limit {
			found = found[:limit]
		}
	} else {
		for h := range r.after(&r.entries, after) {
			if !q.passes(h) {
				continue
			}
			if found = append(found, h); len(found) == limit {
				break
			}
		}
	}
	out := make([]entry.Entry, len(found))
	for i, h := range found {
		out[i] = r.entry(h)
	}
	return out
}

// Count returns the number of entries that pass the filter.
func (v *Snapshot) Count(f Filter) int {
	if f == (Filter{}) {
		return v.s.rows.entries.n
	}
	q := v.s.query(f)
	if q.few == nil {
		q.few = v.s.rows.all()
	}
	n := 0
	for h := range q.few {
		if q.passes(h) {
			n++
		}
	}
	return n
}

// query is a filter made ready. It builds no entry to test one: interned values
// are compared once for each that is met.
type query struct {
	rows  *rows
	tests []func(*row) bool
	few   iter.Seq[uint32] // from the index that promises the fewest rows, each once; nil: no index helps
	most  int              // at most so many
}

func (q *query) passes(h uint32) bool {
	for _, test := range q.tests {
		if !test(q.rows.at(h)) {
			return false
		}
	}
	return true
}

// offer adds a test, and an index that holds all entries that pass it.
func (q *query) offer(test func(*row) bool, few iter.Seq[uint32], most int) {
	q.tests = append(q.tests, test)
	if q.few == nil || most < q.most {
		q.few, q.most = few, most
	}
}

func (s *state) query(f Filter) *query {
	r := s.rows
	// The indexes hold rules as well, and those are not entries.
	q := &query{rows: r, tests: []func(*row) bool{func(row *row) bool { return row.flags&flagRule == 0 }}}
	if f.SPIFFEID != nil {
		path := r.pathOf(*f.SPIFFEID)
		q.offer(func(row *row) bool { return row.path == path }, r.withPath(path), r.paths.users(path))
	}
	if f.ParentID != nil {
		path := r.pathOf(*f.ParentID)
		q.offer(func(row *row) bool { return row.parent == path }, s.reach.granted([]uint32{path}), r.paths.users(path))
	}
	if f.Selectors != nil {
		sets, most := r.matchingSets(f.Selectors), 0
		for set := range sets {
			most += int(r.sets.rows[set].uses)
		}
		q.offer(func(row *row) bool { _, ok := sets[row.set]; return ok }, func(yield func(uint32) bool) {
			for set := range sets {
				for h := range r.withSet(set) {
					if !yield(h) {
						return
					}
				}
			}
		}, most)
	}
	if f.Hint != nil {
		hint := uint32(0)
		if *f.Hint != "" {
			hint = r.words.find(*f.Hint)
		}
		known := hint != 0 || *f.Hint == ""
		q.tests = append(q.tests, func(row *row) bool { return known && row.hint == hint })
	}
	if f.Owner != "" {
		owner := r.words.find(f.Owner)
		q.tests = append(q.tests, func(row *row) bool { return owner != 0 && row.owner == owner })
	}
	if f.Downstream != nil {
		q.tests = append(q.tests, func(row *row) bool { return row.flags&flagDownstream != 0 == *f.Downstream })
	}
	if f.EndedBy != nil {
		by := f.EndedBy.Unix()
		q.tests = append(q.tests, func(row *row) bool { return row.expires != 0 && row.expires <= by })
	}
	if f.FederatesWith != nil {
		wanted := make(map[spiffeid.TrustDomain]struct{})
		for _, td := range f.FederatesWith.Domains {
			wanted[td] = struct{}{}
		}
		met := make(map[uint32]bool)
		q.tests = append(q.tests, func(row *row) bool {
			ok, again := met[row.federates]
			if !again {
				ok = passes(f.FederatesWith.Match, r.domains(row.federates), wanted)
				met[row.federates] = ok
			}
			return ok
		})
	}
	return q
}

// pathOf returns the path symbol of an ID of the own trust domain, or 0.
func (r *rows) pathOf(id spiffeid.ID) uint32 {
	if !id.MemberOf(r.td) {
		return 0
	}
	return r.paths.find(id.Path())
}

// matchingSets returns the selector sets that a filter lets pass.
func (r *rows) matchingSets(f *SelectorFilter) map[uint32]struct{} {
	wanted := make(map[uint32]struct{}, len(f.Selectors)) // the selectors that any entry has
	var rarest uint32
	missing := false
	for _, s := range f.Selectors {
		sym := r.sets.texts.find(s.String())
		if sym == 0 {
			missing = true
			continue
		}
		wanted[sym] = struct{}{}
		if rarest == 0 || r.sets.holders(sym) < r.sets.holders(rarest) {
			rarest = sym
		}
	}
	out := make(map[uint32]struct{})
	if missing && (f.Match == MatchExact || f.Match == MatchSuperset) {
		return out
	}
	look := []uint32{rarest}
	if f.Match == MatchSubset || f.Match == MatchAny {
		look = look[:0]
		for sym := range wanted {
			look = append(look, sym)
		}
	}
	for _, sym := range look {
		for set := range r.sets.holding(sym) {
			if _, again := out[set]; !again && passes(f.Match, r.sets.symbols(set), wanted) {
				out[set] = struct{}{}
			}
		}
	}
	return out
}

// passes compares what an entry has with what is wanted, both without duplicates.
func passes[T comparable](m Match, have []T, wanted map[T]struct{}) bool {
	in := 0
	for _, v := range have {
		if _, ok := wanted[v]; ok {
			in++
		}
	}
	switch m {
	case MatchExact:
		return in == len(have) && in == len(wanted)
	case MatchSubset:
		return in == len(have) && in > 0
	case MatchSuperset:
		return in == len(wanted)
	default:
		return in > 0
	}
}
