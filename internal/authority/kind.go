package authority

import (
	"bytes"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/registry"
)

// The kinds of signing keys, as they are stored.
const (
	X509 = "x509"
	JWT  = "jwt"
)

// kind is what differs between kinds of keys.
type kind struct {
	name string
	key  string // the keeper's key ids are this with -A and -B
	// publish and withdraw change the bundle; published reports whether the key is
	// in it and untainted; count is how many of the kind are in it.
	publish, withdraw func(*bundle.Bundle, registry.Slot) *bundle.Bundle
	published         func(*bundle.Bundle, registry.Slot) bool
	count             func(*bundle.Bundle) int
}

func x509Kind() kind {
	return kind{
		name: X509, key: "x509-CA",
		publish: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle {
			return b.WithX509(bundle.X509Authority{ASN1: s.Certificate})
		},
		withdraw: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle { return b.WithoutX509(s.Certificate) },
		published: func(b *bundle.Bundle, s registry.Slot) bool {
			for _, a := range b.X509 {
				if bytes.Equal(a.ASN1, s.Certificate) {
					return !a.Tainted
				}
			}
			return false
		},
		count: func(b *bundle.Bundle) int { return len(b.X509) },
	}
}

func jwtKind() kind {
	return kind{
		name: JWT, key: "JWT-Signer",
		publish: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle {
			return b.WithJWT(bundle.JWTAuthority{KeyID: s.AuthorityID, PublicKey: s.PublicKey, ExpiresAt: s.NotAfter})
		},
		withdraw: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle { return b.WithoutJWT(s.AuthorityID) },
		published: func(b *bundle.Bundle, s registry.Slot) bool {
			for _, a := range b.JWT {
				if a.KeyID == s.AuthorityID && bytes.Equal(a.PublicKey, s.PublicKey) {
					return !a.Tainted
				}
			}
			return false
		},
		count: func(b *bundle.Bundle) int { return len(b.JWT) },
	}
}
