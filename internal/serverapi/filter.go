package serverapi

import (
	"context"
	"slices"
	"time"

	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/registry"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// wireEntryFilter is what the filters of counting and of listing have in common.
type wireEntryFilter interface {
	GetBySpiffeId() *spiretypes.SPIFFEID
	GetByParentId() *spiretypes.SPIFFEID
	GetBySelectors() *spiretypes.SelectorMatch
	GetByFederatesWith() *spiretypes.FederatesWithMatch
	GetByHint() *wrapperspb.StringValue
	GetByDownstream() *wrapperspb.BoolValue
}

// readEntryFilter reads a filter; what cannot be read is refused, never ignored.
func (s *Server) readEntryFilter(in wireEntryFilter) (f registry.Filter, err error) {
	if id := in.GetBySpiffeId(); id != nil {
		spiffeID, err := s.readMember("by_spiffe_id", id)
		if err != nil {
			return f, err
		}
		f.SPIFFEID = &spiffeID
	}
	if id := in.GetByParentId(); id != nil {
		parent, err := s.readMember("by_parent_id", id)
		if err != nil {
			return f, err
		}
		f.ParentID = &parent
	}
	if m := in.GetBySelectors(); m != nil {
		f.Selectors = &registry.SelectorFilter{}
		if f.Selectors.Match, err = readMatch(int32(m.Match)); err != nil {
			return f, err
		}
		if f.Selectors.Selectors, err = readFilterSelectors(m); err != nil {
			return f, err
		}
	}
	if m := in.GetByFederatesWith(); m != nil {
		f.FederatesWith = &registry.DomainFilter{}
		if f.FederatesWith.Match, err = readMatch(int32(m.Match)); err != nil {
			return f, err
		}
		if len(m.TrustDomains) == 0 || len(m.TrustDomains) > maxFilter {
			return f, fault.New(fault.Invalid, "filter_invalid", "the filter must name 1 to %d trust domains", maxFilter)
		}
		for _, name := range m.TrustDomains {
			td, err := identity.ParseTrustDomain(name)
			if err != nil {
				return f, err
			}
			f.FederatesWith.Domains = append(f.FederatesWith.Domains, td)
		}
	}
	if h := in.GetByHint(); h != nil {
		f.Hint = &h.Value
	}
	if d := in.GetByDownstream(); d != nil {
		f.Downstream = &d.Value
	}
	return f, nil
}

// readMatch reads how sets are compared; the wire has one enumeration for
// selectors and one for trust domains, with the same numbers.
func readMatch(behavior int32) (registry.Match, error) {
	switch spiretypes.SelectorMatch_MatchBehavior(behavior) {
	case spiretypes.SelectorMatch_MATCH_EXACT:
		return registry.MatchExact, nil
	case spiretypes.SelectorMatch_MATCH_SUBSET:
		return registry.MatchSubset, nil
	case spiretypes.SelectorMatch_MATCH_SUPERSET:
		return registry.MatchSuperset, nil
	case spiretypes.SelectorMatch_MATCH_ANY:
		return registry.MatchAny, nil
	}
	return 0, fault.New(fault.Invalid, "filter_invalid", "the filter's match behaviour %d is not known", behavior) // E30
}

func readFilterSelectors(m *spiretypes.SelectorMatch) ([]entry.Selector, error) {
	if len(m.Selectors) > maxFilter {
		return nil, fault.New(fault.Invalid, "filter_invalid", "the filter names %d selectors, the limit is %d", len(m.Selectors), maxFilter) // E37
	}
	return entry.NormalizeSelectors(readSelectors(m.Selectors))
}

// eachEntry calls visit with the entries that pass the filter and come after a
// key, in the order of their ids, until visit says stop. The registry is read in
// pieces of so many rows, so that a long list does not keep writers waiting;
// what is there all the while is seen exactly once (R86).
func (s *Server) eachEntry(ctx context.Context, f registry.Filter, after string, rows int, visit func(*entry.Entry) (more bool, err error)) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		var piece []entry.Entry
		s.cfg.Registry.View(func(snap *registry.Snapshot) { piece = snap.List(f, after, rows) })
		for i := range piece {
			if more, err := visit(&piece[i]); err != nil || !more {
				return err
			}
		}
		if len(piece) < rows {
			return nil
		}
		after = piece[len(piece)-1].ID
	}
}

// wireAgentFilter is what the filters of counting and of listing have in common.
type wireAgentFilter interface {
	GetByAttestationType() string
	GetBySelectorMatch() *spiretypes.SelectorMatch
	GetByBanned() *wrapperspb.BoolValue
	GetByCanReattest() *wrapperspb.BoolValue
	GetByExpiresBefore() string
}

// agentFilter lets a node through when every part that is set does.
type agentFilter struct {
	kind        string
	selectors   func([]entry.Selector) bool // nil: all pass
	banned      *bool
	canReattest *bool
	before      time.Time
}

// timeLayout is the one form of by_expires_before (Go's default for time.Time).
const timeLayout = "2006-01-02 15:04:05 -0700 -07"

func readAgentFilter(in wireAgentFilter) (f agentFilter, err error) {
	f.kind = in.GetByAttestationType()
	if m := in.GetBySelectorMatch(); m != nil {
		if f.selectors, err = readNodeSelectors(m); err != nil {
			return f, err
		}
	}
	if b := in.GetByBanned(); b != nil {
		f.banned = &b.Value
	}
	if b := in.GetByCanReattest(); b != nil {
		f.canReattest = &b.Value
	}
	if text := in.GetByExpiresBefore(); text != "" {
		if f.before, err = time.Parse(timeLayout, text); err != nil {
			return f, fault.New(fault.Invalid, "filter_invalid", "by_expires_before is not a time").Fix("write it as %s", timeLayout) // E38
		}
	}
	return f, nil
}

func (f agentFilter) passes(n *registry.Node) bool {
	switch {
	case f.kind != "" && n.AttestationType != f.kind,
		f.banned != nil && n.Banned != *f.banned,
		f.canReattest != nil && n.CanReattest != *f.canReattest,
		!f.before.IsZero() && !expiry(n).Before(f.before):
		return false
	}
	return f.selectors == nil || f.selectors(n.Selectors)
}

// readNodeSelectors returns the test of a node's selectors. Nodes have no index
// of them: they are few beside entries.
func readNodeSelectors(m *spiretypes.SelectorMatch) (func(have []entry.Selector) bool, error) {
	match, err := readMatch(int32(m.Match))
	if err != nil {
		return nil, err
	}
	want, err := readFilterSelectors(m)
	if err != nil {
		return nil, err
	}
	return func(have []entry.Selector) bool {
		switch match {
		case registry.MatchExact:
			return slices.Equal(have, want)
		case registry.MatchSubset:
			return len(have) > 0 && entry.Subset(have, want)
		case registry.MatchSuperset:
			return entry.Subset(want, have)
		default:
			return slices.ContainsFunc(have, func(s entry.Selector) bool { return slices.Contains(want, s) })
		}
	}, nil
}

// each calls visit with the nodes after a key that pass, in the order of their
// IDs, until visit says stop. It reads pieces of so many rows that pass, and
// looks at no more than pieceSize for one.
func (f agentFilter) each(ctx context.Context, reg *registry.Registry, after string, rows int, visit func(*registry.Node) (more bool, err error)) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		var piece []registry.Node
		looked, end := 0, true
		reg.View(func(s *registry.Snapshot) {
			for n := range s.Nodes(after) {
				after = n.ID.String()
				if looked++; f.passes(&n) {
					piece = append(piece, n)
				}
				if end = looked < pieceSize && len(piece) < rows; !end {
					return
				}
			}
		})
		for i := range piece {
			if more, err := visit(&piece[i]); err != nil || !more {
				return err
			}
		}
		if end {
			return nil
		}
	}
}

// expiry is the end of the newest certificate that counts.
func expiry(n *registry.Node) time.Time {
	if n.Next.ExpiresAt.After(n.Current.ExpiresAt) {
		return n.Next.ExpiresAt
	}
	return n.Current.ExpiresAt
}
