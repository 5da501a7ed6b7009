package serverapi

import (
	"crypto/x509"
	"time"

	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits on what a bundle given by a caller may hold.
const (
	maxAuthorities    = 200
	maxCertificate    = 64 << 10
	maxPublicKey      = 16 << 10
	maxKeyID          = 255
	maxRefreshHint    = 10 * 366 * 24 * time.Hour
	maxAuthoritiesOwn = 1000
)

// allBundle is what an absent mask means.
func allBundle() *spiretypes.BundleMask {
	return &spiretypes.BundleMask{X509Authorities: true, JwtAuthorities: true, RefreshHint: true, SequenceNumber: true, WitAuthorities: true}
}

func writeBundle(b *bundle.Bundle, mask *spiretypes.BundleMask) *spiretypes.Bundle {
	if mask == nil {
		mask = allBundle()
	}
	out := &spiretypes.Bundle{TrustDomain: b.TrustDomain.Name()}
	if mask.X509Authorities {
		for _, a := range b.X509 {
			out.X509Authorities = append(out.X509Authorities, &spiretypes.X509Certificate{Asn1: a.ASN1, Tainted: a.Tainted})
		}
	}
	if mask.JwtAuthorities {
		for _, a := range b.JWT {
			out.JwtAuthorities = append(out.JwtAuthorities, &spiretypes.JWTKey{
				PublicKey: a.PublicKey, KeyId: a.KeyID, ExpiresAt: rpc.Unix(a.ExpiresAt), Tainted: a.Tainted,
			})
		}
	}
	if mask.RefreshHint {
		out.RefreshHint = int64(b.RefreshHint / time.Second)
	}
	if mask.SequenceNumber {
		out.SequenceNumber = b.Sequence
	}
	return out
}

// readFederated reads the trust domain of a foreign bundle.
func (s *Server) readFederated(name string) (spiffeid.TrustDomain, error) {
	td, err := identity.ParseTrustDomain(name)
	if err == nil && td == s.cfg.TrustDomain {
		err = fault.New(fault.Invalid, "trust_domain_own", "%q is this server's own trust domain", name)
	}
	return td, err
}

// readAuthorities reads the keys of a bundle as strictly as if we had made them.
func readAuthorities(certs []*spiretypes.X509Certificate, keys []*spiretypes.JWTKey) ([]bundle.X509Authority, []bundle.JWTAuthority, error) {
	if len(certs) > maxAuthorities || len(keys) > maxAuthorities {
		return nil, nil, fault.New(fault.Invalid, "bundle_too_large", "a bundle may have %d authorities of a kind", maxAuthorities)
	}
	var roots []bundle.X509Authority
	for _, c := range certs {
		if len(c.GetAsn1()) > maxCertificate {
			return nil, nil, fault.New(fault.Invalid, "authority_invalid", "an X.509 authority is larger than %d bytes", maxCertificate)
		}
		if _, err := x509.ParseCertificate(c.GetAsn1()); err != nil {
			return nil, nil, fault.New(fault.Invalid, "authority_invalid", "an X.509 authority is not one DER certificate").Because(err)
		}
		roots = append(roots, bundle.X509Authority{ASN1: c.Asn1, Tainted: c.Tainted})
	}
	var jwts []bundle.JWTAuthority
	for _, k := range keys {
		if k.GetKeyId() == "" || len(k.KeyId) > maxKeyID || len(k.PublicKey) > maxPublicKey {
			return nil, nil, fault.New(fault.Invalid, "authority_invalid", "a JWT authority needs a key id of 1 to %d bytes and a key of at most %d", maxKeyID, maxPublicKey)
		}
		if _, err := x509.ParsePKIXPublicKey(k.PublicKey); err != nil {
			return nil, nil, fault.New(fault.Invalid, "authority_invalid", "the JWT authority %q is not a DER public key", k.KeyId).Because(err)
		}
		a := bundle.JWTAuthority{KeyID: k.KeyId, PublicKey: k.PublicKey, Tainted: k.Tainted}
		if k.ExpiresAt != 0 {
			a.ExpiresAt = time.Unix(k.ExpiresAt, 0).UTC()
		}
		jwts = append(jwts, a)
	}
	return roots, jwts, nil
}

// changeBundle returns b with the parts that the mask names replaced.
func changeBundle(b *bundle.Bundle, in *spiretypes.Bundle, mask *spiretypes.BundleMask) (*bundle.Bundle, error) {
	if len(in.WitAuthorities) > 0 {
		return nil, errNoWIT()
	}
	roots, jwts, err := readAuthorities(in.X509Authorities, in.JwtAuthorities)
	if err != nil {
		return nil, err
	}
	c := b.Clone()
	if mask.X509Authorities {
		c.X509 = roots
	}
	if mask.JwtAuthorities {
		c.JWT = jwts
	}
	if mask.RefreshHint {
		if in.RefreshHint < 0 || in.RefreshHint > int64(maxRefreshHint/time.Second) {
			return nil, fault.New(fault.Invalid, "refresh_hint_invalid", "the refresh hint is negative or longer than ten years")
		}
		c.RefreshHint = time.Duration(in.RefreshHint) * time.Second
	}
	if mask.SequenceNumber && in.SequenceNumber != 0 { // 0: it came in a form without one, such as PEM
		c.Sequence = in.SequenceNumber
	}
	return c, nil
}
