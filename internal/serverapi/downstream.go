package serverapi

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits on what downstream servers may have.
const (
	maxDownstream   = 1000 // authorities of one server that have not ended
	maxPublished    = 150  // JWT keys in the bundle; those who read documents take 200 keys
	maxPublishedTTL = 366 * 24 * time.Hour
)

// NewDownstreamX509CA signs an authority below ours for a server that an entry
// says is downstream. Of the request only the public key is taken (R2); the rest
// is ours to say (R13): the trust domain, a path length, a name constraint, and
// an end that is neither after the entry's nor longer away than that of an
// authority of our own would be.
func (a svids) NewDownstreamX509CA(ctx context.Context, req *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	s, caller, now := a.server, callerFrom(ctx), time.Now()
	if err := s.stale(); err != nil {
		return nil, err
	}
	key, err := svid.ParseCSR(req.Csr)
	if err != nil {
		return nil, err
	}
	if err := s.checkDownstreamCSR(req.Csr); err != nil {
		return nil, err
	}
	if err := s.cfg.Nodes.CheckKey(key, caller.id, now); err != nil { // R4
		return nil, err
	}
	wish := time.Duration(req.PreferredTtl) * time.Second
	if wish < 0 {
		return nil, fault.New(fault.Invalid, "ttl_invalid", "the preferred TTL is negative")
	}
	e, err := s.downstreamEntry(caller.id, now)
	if err != nil {
		return nil, err
	}
	issuer, err := s.cfg.X509(now)
	if err != nil {
		return nil, err
	}
	asked := x509Asked(&e, issuer)
	asked.Entry, asked.Requested = 0, wish
	life := s.cfg.Lifetimes.Decide(lifetime.Downstream, asked, now)[0]
	prepared, err := issuer.PrepareAuthority(svid.Authority{
		TrustDomain: s.cfg.TrustDomain, Key: key, Unit: fmt.Sprintf("DOWNSTREAM-%d", issuer.Depth()), Constrain: !s.cfg.Unconstrained,
		NotBefore: now.Add(-svid.Backdate), NotAfter: life.End,
	})
	if err != nil {
		return nil, err
	}
	// On record for as long as it may sign, before anybody has it.
	at, err := s.cfg.Registry.Update(ctx, caller.name(), func(tx *registry.Tx) error {
		if err := stillDownstream(tx, e.ID, caller.id, now); err != nil {
			return err
		}
		if liveDownstream(tx.Snapshot(), caller.id.String(), now) >= maxDownstream {
			return fault.New(fault.Exhausted, "downstream_exhausted", "%s has %d authorities that have not ended", caller.id, maxDownstream).
				Fix("wait until some have ended, and see why it asks so often")
		}
		return tx.PutDownstream(registry.Downstream{
			Serial: prepared.Serial(), Caller: caller.id.String(), EntryID: e.ID, Server: s.cfg.About.ServerID, Issuer: issuer.AuthorityID(),
			AuthorityID: prepared.ID(), KeyHash: key.Hash[:], NotAfter: prepared.NotAfter(),
		})
	})
	if err != nil {
		return nil, err
	}
	err = s.cfg.Audit.Append(audit.Issuance{
		Caller: caller.name(), Kind: "x509-ca", ID: s.cfg.TrustDomain.IDString(), Grant: e.ID, Revision: e.Revision, Position: at.String(),
		Serial: prepared.Serial(), Issuer: issuer.AuthorityID(), KeyHash: key.Hash, Expiry: prepared.NotAfter(), Limit: life.Name,
	})
	if err != nil {
		return nil, err
	}
	chain, err := prepared.Issue()
	if err != nil {
		return nil, err
	}
	b, err := s.bundleOf(s.cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	resp := &svidv1.NewDownstreamX509CAResponse{CaCertChain: chain}
	for _, root := range b.X509 {
		resp.X509Authorities = append(resp.X509Authorities, root.ASN1)
	}
	return resp, nil
}

// checkDownstreamCSR refuses a request that is made out to somebody else: what
// its maker expects would not come.
func (s *Server) checkDownstreamCSR(der []byte) error {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return fault.New(fault.Invalid, "csr_malformed", "the certificate request cannot be read").Because(err)
	}
	uris := svid.RequestedURIs(csr)
	if len(uris) > 1 || len(uris) == 1 && uris[0] != s.cfg.TrustDomain.IDString() {
		return fault.New(fault.Invalid, "csr_trust_domain", "the certificate request is not made out to %s", s.cfg.TrustDomain.IDString()).
			Fix("a downstream server has the trust domain of the server above it")
	}
	return nil
}

// downstreamEntry returns, of the entries that let an identity have authorities,
// the one that lasts longest.
func (s *Server) downstreamEntry(id spiffeid.ID, now time.Time) (best entry.Entry, err error) {
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		for _, e := range snap.List(registry.Filter{SPIFFEID: &id}, "", 0) {
			if e.Downstream && !e.Expired(now) && (best.ID == "" || !best.ExpiresAt.IsZero() && (e.ExpiresAt.IsZero() || e.ExpiresAt.After(best.ExpiresAt))) {
				best = e
			}
		}
	})
	if best.ID == "" {
		return best, errNotDownstream(id)
	}
	return best, nil
}

func errNotDownstream(id spiffeid.ID) error {
	return fault.New(fault.Denied, "not_downstream", "no entry says that %s is a downstream server", id)
}

// stillDownstream holds a transaction to the entry that allows it.
func stillDownstream(tx *registry.Tx, entryID string, id spiffeid.ID, now time.Time) error {
	e, err := tx.Entry(entryID)
	if fault.KindOf(err) == fault.NotFound || err == nil && (!e.Downstream || e.SPIFFEID != id || e.Expired(now)) {
		return errNotDownstream(id)
	}
	return err
}

func liveDownstream(snap *registry.Snapshot, caller string, now time.Time) (n int) {
	for d := range snap.Downstreams() {
		if now.Before(d.NotAfter) && (caller == "" || d.Caller == caller) {
			n++
		}
	}
	return n
}

// PublishJWTAuthority takes the JWT key of a downstream server into the bundle,
// and passes it on to the server above ours, if there is one.
func (a bundles) PublishJWTAuthority(ctx context.Context, req *bundlev1.PublishJWTAuthorityRequest) (*bundlev1.PublishJWTAuthorityResponse, error) {
	s, caller, now := a.server, callerFrom(ctx), time.Now()
	_, keys, err := readAuthorities(nil, []*spiretypes.JWTKey{req.JwtAuthority})
	if err != nil {
		return nil, err
	}
	key := keys[0]
	public, err := svid.ParsePublicKey(key.PublicKey)
	if err != nil {
		return nil, err
	}
	switch left := key.ExpiresAt.Sub(now); {
	case printable(key.KeyID) != key.KeyID: // commands show it
		return nil, fault.New(fault.Invalid, "authority_invalid", "the key id %q is not printable", key.KeyID)
	case key.Tainted:
		return nil, fault.New(fault.Invalid, "authority_tainted", "the key is tainted").Fix("make another one")
	case key.ExpiresAt.IsZero() || left <= 0 || left > maxPublishedTTL:
		return nil, fault.New(fault.Invalid, "authority_invalid", "the key must say when it ends, within a year")
	}
	e, err := s.downstreamEntry(caller.id, now)
	if err != nil {
		return nil, err
	}
	// Above us first: a key that is known here only would not do what it is for.
	var above []bundle.JWTAuthority
	if s.cfg.PublishJWT != nil {
		if above, err = s.cfg.PublishJWT(ctx, key); err != nil {
			return nil, err
		}
	}
	var changed *bundle.Bundle
	_, err = s.cfg.Registry.Update(ctx, caller.name(), func(tx *registry.Tx) error {
		if err := stillDownstream(tx, e.ID, caller.id, now); err != nil {
			return err
		}
		b, err := tx.Bundle(s.cfg.TrustDomain)
		if err != nil {
			return err
		}
		if changed, err = withPublished(b, key, public); err != nil {
			return err
		}
		for _, k := range above {
			changed = changed.WithJWT(k)
		}
		if changed.Equal(b) {
			return nil
		}
		changed.Sequence = b.Sequence + 1
		return tx.PutBundle(changed)
	})
	if err != nil {
		return nil, err
	}
	return &bundlev1.PublishJWTAuthorityResponse{JwtAuthorities: writeBundle(changed, &spiretypes.BundleMask{JwtAuthorities: true}).JwtAuthorities}, nil
}

// withPublished adds a key. No key id and no key becomes another's.
func withPublished(b *bundle.Bundle, key bundle.JWTAuthority, public svid.PublicKey) (*bundle.Bundle, error) {
	if err := refuseRevoked(b, nil, []bundle.JWTAuthority{key}); err != nil {
		return nil, err
	}
	for _, k := range b.JWT {
		same := sha256.Sum256(k.PublicKey) == public.Hash
		switch {
		case k.KeyID == key.KeyID && same:
			return b, nil
		case k.KeyID == key.KeyID:
			return nil, fault.New(fault.Exists, "key_id_taken", "another key has the key id %q", key.KeyID)
		case same:
			return nil, fault.New(fault.Exists, "key_of_authority", "the key is in the bundle with another key id").Fix("make another one")
		}
	}
	for _, root := range b.Roots() {
		if sha256.Sum256(root.RawSubjectPublicKeyInfo) == public.Hash {
			return nil, fault.New(fault.Invalid, "key_of_authority", "the key is an X.509 authority's").Fix("make another one")
		}
	}
	if len(b.JWT) >= maxPublished {
		return nil, fault.New(fault.Exhausted, "authorities_exhausted", "the bundle holds %d JWT keys, no more are added", len(b.JWT)).
			Fix("wait until some have ended, and see which downstream server publishes so many")
	}
	return b.WithJWT(key), nil
}

// Downstream counts the authorities below ours that have not ended.
func (s *Server) Downstream(now time.Time) (n int) {
	s.cfg.Registry.View(func(snap *registry.Snapshot) { n = liveDownstream(snap, "", now) })
	return n
}
