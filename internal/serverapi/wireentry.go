package serverapi

import (
	"maps"
	"slices"
	"time"

	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// allEntry is what an absent mask means.
func allEntry() *spiretypes.EntryMask {
	return &spiretypes.EntryMask{
		SpiffeId: true, ParentId: true, Selectors: true, X509SvidTtl: true, FederatesWith: true, Admin: true, Downstream: true,
		ExpiresAt: true, DnsNames: true, RevisionNumber: true, StoreSvid: true, JwtSvidTtl: true, Hint: true, CreatedAt: true,
		AdditionalAttributes: true,
	}
}

// writeEntry puts an entry on the wire, as far as the mask asks.
func writeEntry(e *entry.Entry, mask *spiretypes.EntryMask) *spiretypes.Entry {
	if mask == nil {
		mask = allEntry()
	}
	out := &spiretypes.Entry{Id: e.ID}
	if mask.SpiffeId {
		out.SpiffeId = writeID(e.SPIFFEID)
	}
	if mask.ParentId {
		out.ParentId = writeID(e.ParentID)
	}
	if mask.Selectors {
		out.Selectors = writeSelectors(e.Selectors)
	}
	if mask.X509SvidTtl {
		out.X509SvidTtl = int32(e.X509TTL / time.Second)
	}
	if mask.JwtSvidTtl {
		out.JwtSvidTtl = int32(e.JWTTL / time.Second)
	}
	if mask.FederatesWith {
		for _, td := range e.FederatesWith {
			out.FederatesWith = append(out.FederatesWith, td.Name())
		}
	}
	out.Admin = mask.Admin && e.Admin
	out.Downstream = mask.Downstream && e.Downstream
	out.StoreSvid = mask.StoreSvid && e.StoreSVID
	if mask.ExpiresAt {
		out.ExpiresAt = rpc.Unix(e.ExpiresAt)
	}
	if mask.CreatedAt {
		out.CreatedAt = rpc.Unix(e.CreatedAt)
	}
	if mask.DnsNames {
		out.DnsNames = e.DNSNames
	}
	if mask.RevisionNumber {
		out.RevisionNumber = int64(e.Revision)
	}
	if mask.Hint {
		out.Hint = e.Hint
	}
	if mask.AdditionalAttributes && (e.DisableX509Prefetch || e.JWTIncludeJTI) {
		out.AdditionalAttributes = &spiretypes.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: e.DisableX509Prefetch, JwtSvidIncludeJti: e.JWTIncludeJTI,
		}
	}
	return out
}

// changeEntry writes onto e the fields that the mask names. The result is
// checked by entry.Validate, not here, save for what has no form inside.
func (s *Server) changeEntry(e *entry.Entry, in *spiretypes.Entry, mask *spiretypes.EntryMask) error {
	var err error
	if mask.SpiffeId {
		if e.SPIFFEID, err = readID("spiffe_id", in.SpiffeId); err != nil {
			return err
		}
		if _, err := identity.ParseWorkload(s.cfg.TrustDomain, e.SPIFFEID.String()); err != nil {
			return err
		}
	}
	if mask.ParentId {
		if e.ParentID, err = s.readMember("parent_id", in.ParentId); err != nil {
			return err
		}
	}
	if mask.Selectors {
		if len(in.Selectors) > entry.MaxSelectors {
			return fault.New(fault.Invalid, "selectors_too_many", "there are %d selectors, the limit is %d", len(in.Selectors), entry.MaxSelectors)
		}
		e.Selectors = readSelectors(in.Selectors)
	}
	if mask.FederatesWith {
		if len(in.FederatesWith) > entry.MaxFederatesWith {
			return fault.New(fault.Invalid, "federates_with_too_many", "there are %d federated trust domains, the limit is %d", len(in.FederatesWith), entry.MaxFederatesWith)
		}
		e.FederatesWith = make([]spiffeid.TrustDomain, 0, len(in.FederatesWith))
		for _, name := range in.FederatesWith {
			td, err := identity.ParseTrustDomain(name)
			if err != nil {
				return err
			}
			e.FederatesWith = append(e.FederatesWith, td)
		}
	}
	if mask.X509SvidTtl {
		e.X509TTL = time.Duration(in.X509SvidTtl) * time.Second
	}
	if mask.JwtSvidTtl {
		e.JWTTL = time.Duration(in.JwtSvidTtl) * time.Second
	}
	if mask.ExpiresAt {
		e.ExpiresAt = time.Time{}
		if in.ExpiresAt != 0 {
			e.ExpiresAt = time.Unix(in.ExpiresAt, 0).UTC()
		}
	}
	if mask.Admin {
		e.Admin = in.Admin
	}
	if mask.Downstream {
		e.Downstream = in.Downstream
	}
	if mask.StoreSvid {
		e.StoreSVID = in.StoreSvid
	}
	if mask.DnsNames {
		e.DNSNames = in.DnsNames
	}
	if mask.Hint {
		e.Hint = in.Hint
	}
	if mask.AdditionalAttributes {
		e.DisableX509Prefetch = in.AdditionalAttributes.GetDisableX509SvidPrefetch()
		e.JWTIncludeJTI = in.AdditionalAttributes.GetJwtSvidIncludeJti()
	}
	return nil
}

// validate judges an entry or a rule that is to be stored. Its lifetimes must keep
// what this server promises, and a rule that does not take the agent's word needs
// somebody here who can do without.
func (s *Server) validate(e *entry.Entry, now time.Time) error {
	if err := entry.Validate(s.cfg.TrustDomain, e, now); err != nil {
		return err
	}
	if e.Rule != nil && !e.Rule.TrustAgent {
		for _, name := range e.Rule.Template.Stated() {
			checks := func(c nodeattest.FactChecker) bool { return c.Checks(name) }
			if !slices.ContainsFunc(slices.Collect(maps.Values(s.cfg.Checkers)), checks) {
				return e.Rule.Unverifiable(name, "no node attestor of this server can find out %s: none is given access to the platform's API", name)
			}
		}
	}
	return s.cfg.Lifetimes.CheckGrant(e.X509TTL, e.JWTTL)
}
