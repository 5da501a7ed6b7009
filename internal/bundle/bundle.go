// Package bundle is a trust bundle: the public keys with which documents of one
// trust domain are verified. It changes them, reads and writes them as SPIFFE
// bundle documents and as PEM. A reader is tolerant where the standard says so
// (an entry of a kind it does not know), strict everywhere else; a writer
// writes one form. Where bundles come from is not decided here.
//
// What must always hold: the sequence grows by one exactly when the content
// changes (R75); a bundle names the one trust domain it is for (R91); a key that
// was revoked never comes back into it (R69).
package bundle

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// X509Authority is a root of X509-SVIDs.
type X509Authority struct {
	ASN1    []byte // one DER certificate
	Tainted bool
}

// JWTAuthority is a key of JWT-SVIDs.
type JWTAuthority struct {
	KeyID     string
	PublicKey []byte    // DER SubjectPublicKeyInfo
	ExpiresAt time.Time // zero: unknown
	Tainted   bool
}

// Bundle is the keys of one trust domain. A Bundle is not changed in place: the
// With functions return a changed copy.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	X509        []X509Authority
	JWT         []JWTAuthority
	RefreshHint time.Duration // whole seconds; 0: none
	Sequence    uint64
	Revoked     []Revocation // keys that are never taken in again; no part of the content
}

// Revocation is a key that was revoked.
type Revocation struct {
	KeyHash [sha256.Size]byte // of the SubjectPublicKeyInfo
	Until   time.Time         // when nothing under it can be valid any more; zero: not known
}

// Clone returns a copy that shares no list with b. The bytes of keys are never
// written to and stay shared.
func (b *Bundle) Clone() *Bundle {
	c := *b
	c.X509, c.JWT, c.Revoked = slices.Clone(b.X509), slices.Clone(b.JWT), slices.Clone(b.Revoked)
	return &c
}

// Equal reports whether both hold the same content in the same order,
// whatever their sequence numbers and what they remember as revoked.
func (b *Bundle) Equal(o *Bundle) bool {
	return b.TrustDomain == o.TrustDomain && b.RefreshHint == o.RefreshHint &&
		slices.EqualFunc(b.X509, o.X509, func(x, y X509Authority) bool {
			return x.Tainted == y.Tainted && bytes.Equal(x.ASN1, y.ASN1)
		}) &&
		slices.EqualFunc(b.JWT, o.JWT, func(x, y JWTAuthority) bool {
			return x.KeyID == y.KeyID && x.Tainted == y.Tainted && x.ExpiresAt.Equal(y.ExpiresAt) && bytes.Equal(x.PublicKey, y.PublicKey)
		})
}

// next returns changed with the right sequence: b's own if nothing changed.
func (b *Bundle) next(changed *Bundle) *Bundle {
	changed.Sequence = b.Sequence
	if !b.Equal(changed) {
		changed.Sequence++
	}
	return changed
}

// WithX509 returns b with an authority added, or replaced if the certificate is
// there already. A taint that is there stays. A revoked key is not added.
func (b *Bundle) WithX509(a X509Authority) *Bundle {
	c := b.Clone()
	if b.IsRevoked(hashOf(a)) {
		return c
	}
	i := slices.IndexFunc(c.X509, func(x X509Authority) bool { return bytes.Equal(x.ASN1, a.ASN1) })
	if i < 0 {
		c.X509 = append(c.X509, a)
	} else {
		c.X509[i].Tainted = c.X509[i].Tainted || a.Tainted
	}
	return b.next(c)
}

// WithJWT returns b with a key added, or replaced if the key id is there
// already. A taint that is there stays. A revoked key is not added.
func (b *Bundle) WithJWT(a JWTAuthority) *Bundle {
	c := b.Clone()
	if b.IsRevoked(sha256.Sum256(a.PublicKey)) {
		return c
	}
	i := slices.IndexFunc(c.JWT, func(x JWTAuthority) bool { return x.KeyID == a.KeyID })
	if i < 0 {
		c.JWT = append(c.JWT, a)
	} else {
		a.Tainted = a.Tainted || c.JWT[i].Tainted
		c.JWT[i] = a
	}
	return b.next(c)
}

// WithoutX509 returns b without the authority of that certificate.
func (b *Bundle) WithoutX509(asn1 []byte) *Bundle {
	c := b.Clone()
	c.X509 = slices.DeleteFunc(c.X509, func(x X509Authority) bool { return bytes.Equal(x.ASN1, asn1) })
	return b.next(c)
}

// WithoutJWT returns b without the key of that id.
func (b *Bundle) WithoutJWT(keyID string) *Bundle {
	c := b.Clone()
	c.JWT = slices.DeleteFunc(c.JWT, func(x JWTAuthority) bool { return x.KeyID == keyID })
	return b.next(c)
}

// hashOf returns the key hash of a root, zero for one that cannot be parsed.
func hashOf(a X509Authority) (hash [sha256.Size]byte) {
	c, err := x509.ParseCertificate(a.ASN1)
	if err != nil {
		return hash
	}
	return sha256.Sum256(c.RawSubjectPublicKeyInfo)
}

// IsRevoked reports whether a key is remembered as revoked.
func (b *Bundle) IsRevoked(keyHash [sha256.Size]byte) bool {
	return slices.ContainsFunc(b.Revoked, func(r Revocation) bool { return r.KeyHash == keyHash })
}

// WithRevoked returns b without the authorities, of either kind, of a key, and
// remembers it. What is remembered twice is remembered for the longer time.
func (b *Bundle) WithRevoked(revoked ...Revocation) *Bundle {
	c := b.Clone()
	for _, r := range revoked {
		i := slices.IndexFunc(c.Revoked, func(x Revocation) bool { return x.KeyHash == r.KeyHash })
		switch {
		case i < 0:
			c.Revoked = append(c.Revoked, r)
		case r.Until.IsZero() || !c.Revoked[i].Until.IsZero() && c.Revoked[i].Until.Before(r.Until):
			c.Revoked[i].Until = r.Until
		}
	}
	c.X509 = slices.DeleteFunc(c.X509, func(a X509Authority) bool { return c.IsRevoked(hashOf(a)) })
	c.JWT = slices.DeleteFunc(c.JWT, func(a JWTAuthority) bool { return c.IsRevoked(sha256.Sum256(a.PublicKey)) })
	return b.next(c)
}

// Forgotten returns b without the revocations of what had ended before the given
// time: nothing accepts it, revoked or not.
func (b *Bundle) Forgotten(before time.Time) *Bundle {
	c := b.Clone()
	c.Revoked = slices.DeleteFunc(c.Revoked, func(r Revocation) bool { return !r.Until.IsZero() && r.Until.Before(before) })
	return c
}

// Roots returns the X.509 authorities parsed; one that cannot be parsed, which
// none that came through Parse or ParsePEM is, is left out.
func (b *Bundle) Roots() []*x509.Certificate {
	roots := make([]*x509.Certificate, 0, len(b.X509))
	for _, a := range b.X509 {
		if c, err := x509.ParseCertificate(a.ASN1); err == nil {
			roots = append(roots, c)
		}
	}
	return roots
}

// JWTKey returns the key with which tokens of that key id are verified. A
// tainted key verifies: taint asks for replacement, removal ends trust.
func (b *Bundle) JWTKey(keyID string) (crypto.PublicKey, bool) {
	for _, a := range b.JWT {
		if a.KeyID == keyID {
			key, err := x509.ParsePKIXPublicKey(a.PublicKey)
			return key, err == nil
		}
	}
	return nil, false
}

// X509DER returns the certificates one after the other, as the Workload API
// sends them.
func (b *Bundle) X509DER() []byte {
	var der []byte
	for _, a := range b.X509 {
		der = append(der, a.ASN1...)
	}
	return der
}

// KeyHashes returns the SHA-256 of the SubjectPublicKeyInfo of every authority,
// so that no document is issued for such a key (R4).
func (b *Bundle) KeyHashes() map[[32]byte]bool {
	hashes := make(map[[32]byte]bool, len(b.X509)+len(b.JWT))
	for _, c := range b.Roots() {
		hashes[sha256.Sum256(c.RawSubjectPublicKeyInfo)] = true
	}
	for _, a := range b.JWT {
		hashes[sha256.Sum256(a.PublicKey)] = true
	}
	return hashes
}
