package authority

import (
	"bytes"
	"slices"

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
	// publish, mark (as tainted) and withdraw change the bundle; find looks the key
	// up in it; count is how many of the kind are in it that servers with these slots can
	// be blamed for.
	publish, mark, withdraw func(*bundle.Bundle, registry.Slot) *bundle.Bundle
	find                    func(*bundle.Bundle, registry.Slot) (found, tainted bool)
	count                   func(*bundle.Bundle, []registry.Slot) int
}

// published reports whether the key is in the bundle and untainted. A key below a
// root of somebody else goes on while it is replaced, tainted or not: it is not
// that key which is distrusted.
func (k kind) published(b *bundle.Bundle, s registry.Slot) bool {
	found, tainted := k.find(b, s)
	return found && (!tainted || s.Upstream && k.name == X509)
}

// anchor is the certificate by which the bundle holds a key: its own, or that of
// the root above it.
func anchor(s registry.Slot) []byte {
	if s.Upstream {
		return s.Root
	}
	return s.Certificate
}

func x509Kind() kind {
	return kind{
		name: X509, key: "x509-CA",
		publish: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle {
			return b.WithX509(bundle.X509Authority{ASN1: anchor(s)})
		},
		mark: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle {
			return b.WithX509(bundle.X509Authority{ASN1: anchor(s), Tainted: true})
		},
		withdraw: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle { return b.WithoutX509(s.Certificate) },
		find: func(b *bundle.Bundle, s registry.Slot) (found, tainted bool) {
			for _, a := range b.X509 {
				if bytes.Equal(a.ASN1, anchor(s)) {
					return true, a.Tainted
				}
			}
			return false, false
		},
		count: func(b *bundle.Bundle, _ []registry.Slot) int { return len(b.X509) },
	}
}

func jwtKind() kind {
	return kind{
		name: JWT, key: "JWT-Signer",
		publish: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle {
			return b.WithJWT(bundle.JWTAuthority{KeyID: s.AuthorityID, PublicKey: s.PublicKey, ExpiresAt: s.NotAfter})
		},
		mark: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle {
			return b.WithJWT(bundle.JWTAuthority{KeyID: s.AuthorityID, PublicKey: s.PublicKey, ExpiresAt: s.NotAfter, Tainted: true})
		},
		withdraw: func(b *bundle.Bundle, s registry.Slot) *bundle.Bundle { return b.WithoutJWT(s.AuthorityID) },
		find: func(b *bundle.Bundle, s registry.Slot) (found, tainted bool) {
			for _, a := range b.JWT {
				if a.KeyID == s.AuthorityID && bytes.Equal(a.PublicKey, s.PublicKey) {
					return true, a.Tainted
				}
			}
			return false, false
		},
		count: ofServers,
	}
}

// ofServers counts the JWT keys in a bundle that are servers'. What downstream servers
// may publish, or one above does, must not keep a server from making its own.
func ofServers(b *bundle.Bundle, slots []registry.Slot) (n int) {
	for _, a := range b.JWT {
		if slices.ContainsFunc(slots, func(s registry.Slot) bool { return s.AuthorityID == a.KeyID }) {
			n++
		}
	}
	return n
}

// Live counts the keys in a bundle that MaxLive bounds.
func Live(snap *registry.Snapshot, b *bundle.Bundle) (x509, jwt int) {
	return len(b.X509), ofServers(b, others(snap, "", JWT))
}
