package entry

import (
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// What bounds a trace.
const (
	maxNearMisses = 20
	maxFactFaults = 20
	maxSameKind   = 20
)

// Facts is what is known of one caller.
type Facts struct {
	Selectors []Selector        // in any order
	Values    map[string]string // named facts, for rules
}

// Matched is an identity that a caller gets.
type Matched struct {
	GrantID string
	ID      spiffeid.ID
	Facts   map[string]string // what a rule named; nil for an exact entry
}

// Trace says why a caller got what it got.
type Trace struct {
	Matched  []Matched   // what Match returned
	Shadowed []Shadowed  // matched, but an older grant has the same hint
	Expired  []string    // grants that would have matched, had they not ended
	Facts    []FactFault // rules whose selectors are shown, but whose facts are missing or do not fit, oldest first
	Near     []NearMiss  // grants that one selector keeps away, oldest first
}

// Shadowed is a grant that is not handed out because its hint is taken.
type Shadowed struct {
	Matched
	Hint string
	By   string // the older grant
}

// NearMiss is a grant that lacks one selector.
type NearMiss struct {
	GrantID  string
	ID       spiffeid.ID // zero for a rule
	Template string      // of a rule
	Missing  Selector    // what the grant asks for
	Have     []Selector  // what the caller shows of the same kind; may be empty
}

// Match returns the identities of a caller, the oldest grant first: those
// grants, of all that its agent holds, whose selectors the caller shows all of
// (R46). A grant that ended never matches, nor does one that goes to a store,
// nor a rule for which a fact is missing or does not fit.
//
// Of grants with one hint only the oldest is handed out (WAPI-5.2.1-g). That is
// naming and not authorisation: a caller who loses a selector never becomes
// entitled to more (R47), but a younger grant that was shadowed may take the
// hint over.
func Match(grants []Entry, facts Facts, now time.Time) ([]Matched, Trace) {
	have := slices.Clone(facts.Selectors)
	slices.SortFunc(have, Selector.Compare)
	have = slices.Compact(have)

	byAge := make([]*Entry, 0, len(grants))
	for i := range grants {
		if e := &grants[i]; !e.Alias() && !e.StoreSVID && len(e.Selectors) > 0 {
			byAge = append(byAge, e)
		}
	}
	slices.SortFunc(byAge, Oldest)

	var t Trace
	hints := make(map[string]string) // hint -> grant
	for _, e := range byAge {
		i := firstMissing(e.Selectors, have)
		switch {
		case i < len(e.Selectors):
			if len(t.Near) < maxNearMisses && !e.Expired(now) && Subset(e.Selectors[i+1:], have) {
				t.Near = append(t.Near, NearMiss{GrantID: e.ID, ID: e.SPIFFEID, Template: e.template(), Missing: e.Selectors[i], Have: SameKind(e.Selectors[i], have)})
			}
		case e.Expired(now):
			t.Expired = append(t.Expired, e.ID)
		default:
			id, named, bad := e.Grants(facts.Values)
			if bad != nil {
				if len(t.Facts) < maxFactFaults {
					t.Facts = append(t.Facts, *bad)
				}
				continue
			}
			m := Matched{GrantID: e.ID, ID: id, Facts: named}
			if by, taken := hints[e.Hint]; taken && e.Hint != "" {
				t.Shadowed = append(t.Shadowed, Shadowed{Matched: m, Hint: e.Hint, By: by})
				continue
			}
			hints[e.Hint] = e.ID
			t.Matched = append(t.Matched, m)
		}
	}
	return t.Matched, t
}

// Nearly reports whether at most one of required is not in have; both are sorted.
func Nearly(required, have []Selector) bool {
	i := firstMissing(required, have)
	return i == len(required) || Subset(required[i+1:], have)
}

// SameKind returns the selectors of have that state the same thing as s with
// another value: the same type and the same word before the value's first colon;
// the first 20 of them.
func SameKind(s Selector, have []Selector) []Selector {
	kind := func(s Selector) string {
		key, _, found := strings.Cut(s.Value, ":")
		if !found {
			return ""
		}
		return key
	}
	var out []Selector
	for _, h := range have {
		if h.Type == s.Type && kind(h) == kind(s) && len(out) < maxSameKind {
			out = append(out, h)
		}
	}
	return out
}
