package serverapi

import (
	"context"
	"math"
	"slices"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// bundles is spire.api.server.bundle.v1.Bundle.
type bundles struct {
	bundlev1.UnsafeBundleServer
	server *Server
}

func (s *Server) bundleOf(td spiffeid.TrustDomain) (b *bundle.Bundle, err error) {
	s.cfg.Registry.View(func(snap *registry.Snapshot) { b, err = snap.Bundle(td) })
	return b, err
}

// CountBundles counts our own too.
func (a bundles) CountBundles(context.Context, *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	count := 0
	a.server.cfg.Registry.View(func(s *registry.Snapshot) {
		for range s.Bundles() {
			count++
		}
	})
	return &bundlev1.CountBundlesResponse{Count: int32(min(count, math.MaxInt32))}, nil
}

// GetBundle gives our own bundle to anyone: it is public.
func (a bundles) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*spiretypes.Bundle, error) {
	b, err := a.server.bundleOf(a.server.cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	return writeBundle(b, req.OutputMask), nil
}

// AppendBundle adds authorities to our own bundle.
func (a bundles) AppendBundle(ctx context.Context, req *bundlev1.AppendBundleRequest) (*spiretypes.Bundle, error) {
	if len(req.WitAuthorities) > 0 {
		return nil, errNoWIT()
	}
	roots, jwts, err := readAuthorities(req.X509Authorities, req.JwtAuthorities)
	if err != nil {
		return nil, err
	}
	if len(roots)+len(jwts) == 0 {
		return nil, fault.New(fault.Invalid, "authorities_missing", "there is no authority to add")
	}
	td := a.server.cfg.TrustDomain
	var changed *bundle.Bundle
	_, err = a.server.cfg.Registry.Update(ctx, callerFrom(ctx).name(), func(tx *registry.Tx) error {
		b, err := tx.Bundle(td)
		if err != nil {
			return err
		}
		changed = b
		if err := refuseRevoked(b, roots, jwts); err != nil {
			return err
		}
		for _, root := range roots {
			changed = changed.WithX509(root)
		}
		for _, key := range jwts {
			changed = changed.WithJWT(key)
		}
		if len(changed.X509) > maxAuthoritiesOwn || len(changed.JWT) > maxAuthoritiesOwn {
			return fault.New(fault.Exhausted, "bundle_too_large", "the bundle would have more than %d authorities of a kind", maxAuthoritiesOwn)
		}
		// One act, one step of the sequence (R75).
		if changed != b && changed.Sequence != b.Sequence {
			changed.Sequence = b.Sequence + 1
			return tx.PutBundle(changed)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return writeBundle(changed, req.OutputMask), nil
}

// refuseRevoked keeps revoked authorities from coming back (R69).
func refuseRevoked(b *bundle.Bundle, roots []bundle.X509Authority, jwts []bundle.JWTAuthority) error {
	for hash := range (&bundle.Bundle{X509: roots, JWT: jwts}).KeyHashes() {
		if b.IsRevoked(hash) {
			return fault.New(fault.Precondition, "authority_revoked", "the key with the SHA-256 %x was revoked and is not taken in again", hash).Fix("use another key")
		}
	}
	return nil
}

// PublishWITAuthority is not offered.
func (a bundles) PublishWITAuthority(context.Context, *bundlev1.PublishWITAuthorityRequest) (*bundlev1.PublishWITAuthorityResponse, error) {
	return nil, errNoWIT()
}

// ListFederatedBundles gives a page of foreign bundles, or all of them.
func (a bundles) ListFederatedBundles(_ context.Context, req *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	c := a.server.cursor("bundles", nil)
	after, err := c.key(req.PageToken)
	if err != nil {
		return nil, err
	}
	var found []*bundle.Bundle
	a.server.cfg.Registry.View(func(s *registry.Snapshot) {
		for b := range s.Bundles() {
			if b.TrustDomain != a.server.cfg.TrustDomain && b.TrustDomain.Name() > after {
				found = append(found, b)
			}
		}
	})
	slices.SortFunc(found, func(x, y *bundle.Bundle) int { return x.TrustDomain.Compare(y.TrustDomain) })
	resp, page := &bundlev1.ListFederatedBundlesResponse{}, newPage(req.PageSize)
	for _, b := range found {
		out := writeBundle(b, req.OutputMask)
		fits, err := page.take(out)
		if err != nil {
			return nil, err
		}
		if !fits {
			resp.NextPageToken = c.token(resp.Bundles[len(resp.Bundles)-1].TrustDomain)
			break
		}
		resp.Bundles = append(resp.Bundles, out)
	}
	return resp, nil
}

// GetFederatedBundle gives one foreign bundle.
func (a bundles) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*spiretypes.Bundle, error) {
	td, err := a.server.readFederated(req.TrustDomain)
	if err != nil {
		return nil, err
	}
	b, err := a.server.bundleOf(td)
	if err != nil {
		return nil, err
	}
	return writeBundle(b, req.OutputMask), nil
}

// BatchCreateFederatedBundle adds foreign bundles that are not there.
func (a bundles) BatchCreateFederatedBundle(ctx context.Context, req *bundlev1.BatchCreateFederatedBundleRequest) (*bundlev1.BatchCreateFederatedBundleResponse, error) {
	resp := &bundlev1.BatchCreateFederatedBundleResponse{}
	err := a.each(ctx, req.Bundle, req.OutputMask, func(old *bundle.Bundle, in *spiretypes.Bundle, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
		if old != nil {
			return nil, fault.New(fault.Exists, "bundle_exists", "a bundle of %q exists", td.Name())
		}
		return changeBundle(&bundle.Bundle{TrustDomain: td}, in, allBundle())
	}, func(st *spiretypes.Status, b *spiretypes.Bundle) {
		resp.Results = append(resp.Results, &bundlev1.BatchCreateFederatedBundleResponse_Result{Status: st, Bundle: b})
	})
	return resp, err
}

// BatchUpdateFederatedBundle changes foreign bundles that are there.
func (a bundles) BatchUpdateFederatedBundle(ctx context.Context, req *bundlev1.BatchUpdateFederatedBundleRequest) (*bundlev1.BatchUpdateFederatedBundleResponse, error) {
	mask := req.InputMask
	if mask == nil {
		mask = allBundle()
	}
	resp := &bundlev1.BatchUpdateFederatedBundleResponse{}
	err := a.each(ctx, req.Bundle, req.OutputMask, func(old *bundle.Bundle, in *spiretypes.Bundle, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
		if old == nil {
			return nil, fault.New(fault.NotFound, "bundle_not_found", "there is no bundle %q", td.Name())
		}
		return changeBundle(old, in, mask)
	}, func(st *spiretypes.Status, b *spiretypes.Bundle) {
		resp.Results = append(resp.Results, &bundlev1.BatchUpdateFederatedBundleResponse_Result{Status: st, Bundle: b})
	})
	return resp, err
}

// BatchSetFederatedBundle adds or replaces foreign bundles.
func (a bundles) BatchSetFederatedBundle(ctx context.Context, req *bundlev1.BatchSetFederatedBundleRequest) (*bundlev1.BatchSetFederatedBundleResponse, error) {
	resp := &bundlev1.BatchSetFederatedBundleResponse{}
	err := a.each(ctx, req.Bundle, req.OutputMask, func(old *bundle.Bundle, in *spiretypes.Bundle, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
		if old == nil {
			old = &bundle.Bundle{TrustDomain: td}
		}
		return changeBundle(old, in, allBundle())
	}, func(st *spiretypes.Status, b *spiretypes.Bundle) {
		resp.Results = append(resp.Results, &bundlev1.BatchSetFederatedBundleResponse_Result{Status: st, Bundle: b})
	})
	return resp, err
}

// each runs one change per bundle, each in its own transaction, and hands on its outcome.
func (a bundles) each(ctx context.Context, in []*spiretypes.Bundle, mask *spiretypes.BundleMask,
	change func(old *bundle.Bundle, in *spiretypes.Bundle, td spiffeid.TrustDomain) (*bundle.Bundle, error),
	result func(*spiretypes.Status, *spiretypes.Bundle)) error {
	if len(in) > maxBundles {
		return fault.New(fault.Invalid, "batch_too_large", "the batch has %d items, the limit is %d", len(in), maxBundles).Fix("split it")
	}
	for _, item := range in {
		if err := ctx.Err(); err != nil {
			return err
		}
		changed, err := a.put(ctx, item, change)
		if err != nil {
			result(itemStatus(err), nil)
			continue
		}
		result(itemStatus(nil), writeBundle(changed, mask))
	}
	return nil
}

func (a bundles) put(ctx context.Context, in *spiretypes.Bundle,
	change func(old *bundle.Bundle, in *spiretypes.Bundle, td spiffeid.TrustDomain) (*bundle.Bundle, error)) (changed *bundle.Bundle, err error) {
	if in == nil {
		return nil, fault.New(fault.Invalid, "bundle_missing", "the batch has an empty item")
	}
	td, err := a.server.readFederated(in.TrustDomain)
	if err != nil {
		return nil, err
	}
	_, err = a.server.cfg.Registry.Update(ctx, callerFrom(ctx).name(), func(tx *registry.Tx) error {
		old, err := tx.Bundle(td)
		if fault.KindOf(err) == fault.NotFound {
			old, err = nil, nil
		}
		if err != nil {
			return err
		}
		if changed, err = change(old, in, td); err != nil {
			return err
		}
		switch {
		case old == nil:
		case changed.Sequence < old.Sequence: // R90
			return fault.New(fault.Precondition, "sequence_lower", "the bundle of %q is at sequence %d already", td.Name(), old.Sequence)
		case changed.Sequence == old.Sequence && changed.Equal(old):
			return nil
		case changed.Sequence == old.Sequence:
			changed.Sequence++ // R75: other content, other number
		}
		return tx.PutBundle(changed)
	})
	return changed, err
}

// BatchDeleteFederatedBundle deletes foreign bundles. Entries that federate with
// one keep it there, go with it, or stop federating, as the mode says.
func (a bundles) BatchDeleteFederatedBundle(ctx context.Context, req *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	if len(req.TrustDomains) > maxBundles {
		return nil, fault.New(fault.Invalid, "batch_too_large", "the batch has %d items, the limit is %d", len(req.TrustDomains), maxBundles).Fix("split it")
	}
	resp := &bundlev1.BatchDeleteFederatedBundleResponse{}
	for _, name := range req.TrustDomains {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		resp.Results = append(resp.Results, &bundlev1.BatchDeleteFederatedBundleResponse_Result{
			TrustDomain: name, Status: itemStatus(a.delete(ctx, name, req.Mode)),
		})
	}
	return resp, nil
}

func (a bundles) delete(ctx context.Context, name string, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) error {
	if _, known := bundlev1.BatchDeleteFederatedBundleRequest_Mode_name[int32(mode)]; !known {
		return fault.New(fault.Invalid, "mode_invalid", "the mode %d is not known", mode)
	}
	td, err := a.server.readFederated(name)
	if err != nil {
		return err
	}
	// Which entries federate is judged on a snapshot: an entry that begins to at
	// this very moment waits for the bundle, which is a state it may be in anyway.
	var naming []string
	f := registry.Filter{FederatesWith: &registry.DomainFilter{Match: registry.MatchAny, Domains: []spiffeid.TrustDomain{td}}}
	err = a.server.eachEntry(ctx, f, "", pieceSize, func(e *entry.Entry) (bool, error) {
		naming = append(naming, e.ID)
		return mode != bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT, nil
	})
	if err != nil {
		return err
	}
	if len(naming) > 0 && mode == bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT {
		return fault.New(fault.Precondition, "bundle_in_use", "entries federate with %q", name).
			Fix("delete with mode dissociate or delete, or change the entries")
	}
	_, err = a.server.cfg.Registry.Update(ctx, callerFrom(ctx).name(), func(tx *registry.Tx) error {
		if _, err := tx.Bundle(td); err != nil {
			return err
		}
		for _, id := range naming {
			if err := unfederate(tx, id, td, mode); err != nil {
				return err
			}
		}
		return tx.DeleteBundle(td)
	})
	return err
}

func unfederate(tx *registry.Tx, id string, td spiffeid.TrustDomain, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) error {
	e, err := tx.Entry(id)
	switch {
	case fault.KindOf(err) == fault.NotFound:
		return nil
	case err != nil:
		return err
	case mode == bundlev1.BatchDeleteFederatedBundleRequest_DELETE:
		return tx.DeleteEntry(id)
	}
	e.FederatesWith = slices.DeleteFunc(slices.Clone(e.FederatesWith), func(t spiffeid.TrustDomain) bool { return t == td })
	return tx.PutEntry(e)
}
