package serverapi

import (
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// readID reads an ID as the wire carries it, in two parts.
func readID(field string, id *spiretypes.SPIFFEID) (spiffeid.ID, error) {
	if id == nil {
		return spiffeid.ID{}, fault.New(fault.Invalid, "spiffe_id_missing", "%s is missing", field)
	}
	if len(id.TrustDomain) > identity.MaxTrustDomain || len(id.Path) > identity.MaxID {
		return spiffeid.ID{}, fault.New(fault.Invalid, "spiffe_id_invalid", "%s is too long", field)
	}
	// A trust domain with a slash in it would move part of it into the path.
	if _, err := identity.ParseTrustDomain(id.TrustDomain); err != nil {
		return spiffeid.ID{}, err
	}
	// And a path that does not begin with one would move part of it into the trust domain.
	if id.Path != "" && id.Path[0] != '/' {
		return spiffeid.ID{}, fault.New(fault.Invalid, "spiffe_id_invalid", "the path of %s does not begin with a slash", field)
	}
	return identity.Parse("spiffe://" + id.TrustDomain + id.Path)
}

// readMember reads an ID of our trust domain that has a path.
func (s *Server) readMember(field string, id *spiretypes.SPIFFEID) (spiffeid.ID, error) {
	read, err := readID(field, id)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return identity.ParseMember(s.cfg.TrustDomain, read.String())
}

// readAgent reads an agent's ID.
func (s *Server) readAgent(id *spiretypes.SPIFFEID) (spiffeid.ID, error) {
	read, err := s.readMember("id", id)
	if err == nil && !identity.IsAgent(read) {
		err = fault.New(fault.Invalid, "agent_id_invalid", "%q is not an agent's ID", read).
			Fix("'plastron server agent list' shows the agents")
	}
	return read, err
}

func writeID(id spiffeid.ID) *spiretypes.SPIFFEID {
	return &spiretypes.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func readSelectors(in []*spiretypes.Selector) []entry.Selector {
	out := make([]entry.Selector, 0, len(in))
	for _, s := range in {
		out = append(out, entry.Selector{Type: s.GetType(), Value: s.GetValue()})
	}
	return out
}

func writeSelectors(in []entry.Selector) []*spiretypes.Selector {
	out := make([]*spiretypes.Selector, 0, len(in))
	for _, s := range in {
		out = append(out, &spiretypes.Selector{Type: s.Type, Value: s.Value})
	}
	return out
}
