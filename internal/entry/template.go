package entry

import (
	"fmt"
	"slices"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits on a template. Sizes are in bytes.
const (
	MaxTemplate     = identity.MaxID
	MaxFacts        = 16 // named by one template
	MaxFactName     = 64
	maxShownOfValue = 100 // of a value that is refused
)

// Template is a SPIFFE ID in which facts stand for parts of the path:
// spiffe://example.org/user/{unix.user}/{unix.program}. A segment of the path
// holds at most one fact, so that two callers who differ in a fact that is named
// never get one ID.
type Template struct {
	text     string
	td       spiffeid.TrustDomain
	segments []segment
	facts    []string // sorted, without duplicates
	stated   []string // by an agent: facts, and what tells of which thing they are
}

// segment is one segment of the path: text around at most one fact.
type segment struct {
	before, fact, after string
}

// ParseTemplate reads a template of a trust domain.
func ParseTemplate(td spiffeid.TrustDomain, text string) (Template, error) {
	if len(text) > MaxTemplate {
		return Template{}, templateFault("it is %d bytes long, the limit is %d", len(text), MaxTemplate)
	}
	path, ok := strings.CutPrefix(text, td.IDString()+"/")
	if !ok {
		return Template{}, templateFault("%q does not begin with %s/", text, td.IDString())
	}
	t := Template{text: text, td: td}
	for part := range strings.SplitSeq(path, "/") {
		s, err := parseSegment(part)
		if err != nil {
			return Template{}, err
		}
		t.segments = append(t.segments, s)
		if s.fact != "" && !slices.Contains(t.facts, s.fact) {
			t.facts = append(t.facts, s.fact)
		}
	}
	slices.Sort(t.facts)
	t.stated = stated(t.facts)
	switch {
	case len(t.facts) == 0:
		return Template{}, fault.New(fault.Invalid, "rule_template_invalid", "the ID template %q names no fact", text).
			Fix("name one in braces, such as %s/user/{unix.user}, or create an entry for that one ID", td.IDString())
	case len(t.facts) > MaxFacts:
		return Template{}, templateFault("it names %d facts, the limit is %d", len(t.facts), MaxFacts)
	}
	return t, nil
}

func parseSegment(text string) (segment, error) {
	before, rest, found := strings.Cut(text, "{")
	if !found {
		if err := spiffeid.ValidatePathSegment(text); err != nil {
			return segment{}, templateFault("the segment %q cannot stand in a SPIFFE ID: %v", text, err)
		}
		return segment{before: text}, nil
	}
	name, after, closed := strings.Cut(rest, "}")
	switch {
	case !closed:
		return segment{}, templateFault("the brace in the segment %q is not closed", text)
	case !factName(name):
		return segment{}, templateFault("{%s} does not name a fact; a fact has a type and a name of lower case letters, digits and '_', such as {unix.user}", name)
	case strings.Contains(after, "{"):
		// {a}{b} and {a}-{b} give one segment for different facts.
		return segment{}, fault.New(fault.Invalid, "rule_template_invalid", "the segment %q of the ID template names two facts", text).
			Fix("give each fact a segment of its own")
	case before != "" && spiffeid.ValidatePathSegment(before+"x") != nil, after != "" && spiffeid.ValidatePathSegment("x"+after) != nil:
		return segment{}, templateFault("the segment %q holds a character that a SPIFFE ID cannot hold", text)
	}
	return segment{before, name, after}, nil
}

// factName reports whether a fact may be called so: type.name.
func factName(name string) bool {
	kind, rest, found := strings.Cut(name, ".")
	return found && len(name) <= MaxFactName && kind != "" && rest != "" &&
		!strings.ContainsFunc(kind+rest, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_' })
}

func templateFault(format string, args ...any) error {
	return fault.New(fault.Invalid, "rule_template_invalid", "the ID template is not valid: "+format, args...).
		Fix("write it as a SPIFFE ID with facts in braces, such as spiffe://TRUST-DOMAIN/user/{unix.user}")
}

// String returns the template as it was written.
func (t Template) String() string { return t.text }

// IsZero reports whether there is no template.
func (t Template) IsZero() bool { return t.text == "" }

// Equal reports whether two templates give the same IDs.
func (t Template) Equal(o Template) bool { return t.text == o.text }

// Facts returns the names of the facts, sorted. They are not to be written to.
func (t Template) Facts() []string { return t.facts }

// Stated returns the names of the facts that an agent states for the template:
// besides those that it names, those that tell which pod they are true of. They are
// sorted and not to be written to.
func (t Template) Stated() []string { return t.stated }

// fixed returns what every ID of the template begins with, up to and with the
// last slash before the first fact.
func (t Template) fixed() string {
	before, _, _ := strings.Cut(t.text, "{")
	return before[:strings.LastIndexByte(before, '/')+1]
}

// expand puts facts in. It takes them as they are: what a segment cannot hold
// is a fault, nothing is escaped or mapped, or else two callers could get one ID.
func (t Template) expand(facts map[string]string) (spiffeid.ID, *FactFault) {
	var path strings.Builder
	longest := t.facts[0]
	for _, s := range t.segments {
		value := ""
		if s.fact != "" {
			var known bool
			if value, known = facts[s.fact]; !known {
				return spiffeid.ID{}, &FactFault{Template: t.text, Fact: s.fact, Reason: FactMissing}
			}
			if len(value) > len(facts[longest]) {
				longest = s.fact
			}
			if why := notInSegment(s, value); why != "" {
				return spiffeid.ID{}, &FactFault{Template: t.text, Fact: s.fact, Value: value, Reason: FactInvalid, Why: why}
			}
		}
		path.WriteString("/" + s.before + value + s.after)
	}
	for _, name := range t.stated {
		if slices.Contains(t.facts, name) {
			continue
		}
		value, known := facts[name]
		if !known {
			return spiffeid.ID{}, &FactFault{Template: t.text, Fact: name, Reason: FactMissing}
		}
		if why := notAName(value); why != "" {
			return spiffeid.ID{}, &FactFault{Template: t.text, Fact: name, Value: value, Reason: FactInvalid, Why: why}
		}
	}
	id, err := spiffeid.FromPath(t.td, path.String())
	if err == nil {
		err = identity.CheckWorkload(t.td, id)
	}
	if err != nil { // it is too long: everything else is excluded by its parts
		return spiffeid.ID{}, &FactFault{Template: t.text, Fact: longest, Value: facts[longest], Reason: FactInvalid, Why: err.Error()}
	}
	return id, nil
}

// Matches reports whether some facts make this ID.
func (t Template) Matches(id spiffeid.ID) bool {
	parts := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if id.TrustDomain() != t.td || len(parts) != len(t.segments) {
		return false
	}
	values := make(map[string]string, len(t.facts))
	for i, s := range t.segments {
		value, ok := strings.CutPrefix(parts[i], s.before)
		if ok {
			value, ok = strings.CutSuffix(value, s.after)
		}
		if !ok || (value == "") != (s.fact == "") {
			return false
		}
		if was, again := values[s.fact]; again && was != value {
			return false
		}
		values[s.fact] = value
	}
	return true
}

// notInSegment says why a value cannot stand in a segment; empty: it can.
func notInSegment(s segment, value string) string {
	if value == "" {
		return "it is empty"
	}
	for _, r := range value {
		if notLabelRune(r) && r != '_' && r != '.' {
			return fmt.Sprintf("it holds %q, and a SPIFFE ID takes letters, digits, '.', '-' and '_' only", r)
		}
	}
	if whole := s.before + value + s.after; whole == "." || whole == ".." {
		return fmt.Sprintf("a SPIFFE ID cannot hold the segment %q", whole)
	}
	return ""
}
