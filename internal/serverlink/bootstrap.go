package serverlink

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// RootHash is the SHA-256 of a root certificate's DER: enough to recognise a
// trust domain by.
type RootHash [sha256.Size]byte

// ParseRootHash reads a hash of 64 hex digits.
func ParseRootHash(s string) (RootHash, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != sha256.Size {
		return RootHash{}, fault.New(fault.Invalid, "trust_bundle_hash_invalid", "the trust bundle hash is not 64 hex digits").
			Fix("take it from: openssl x509 -in bundle.pem -outform DER | sha256sum")
	}
	return RootHash(b), nil
}

// Pinned fetches the trust domain's bundle from a server that chains to a root
// with one of those hashes. Nothing is sent before the server is verified but the
// request for its public keys.
func Pinned(ctx context.Context, cfg Config, pins ...RootHash) (*bundle.Bundle, error) {
	b, state, err := introduce(ctx, cfg)
	if err != nil {
		return nil, err
	}
	var pinned []*x509.Certificate
	for _, root := range b.Roots() {
		if slices.Contains(pins, sha256.Sum256(root.Raw)) {
			pinned = append(pinned, root)
		}
	}
	if len(pinned) > 0 {
		if err := verifyServer(state, pinned, cfg.TrustDomain); err != nil {
			return nil, err
		}
		return b, nil
	}
	return nil, fault.New(fault.Unauthenticated, "server_untrusted", "the server's bundle does not hold the root that is pinned").
		Fix("compare trust_bundle_hash with the bundle that the server's operator shows")
}

// Insecure fetches the bundle from whoever answers with the server's ID in its
// certificate. Anyone on the way can be that: it is for trying things out.
func Insecure(ctx context.Context, cfg Config) (*bundle.Bundle, error) {
	b, state, err := introduce(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return b, verifyServer(state, b.Roots(), cfg.TrustDomain)
}

// introduce asks a server that is not yet verified for its bundle. It returns
// the state of the very connection that the bundle came by.
func introduce(ctx context.Context, cfg Config) (*bundle.Bundle, tls.ConnectionState, error) {
	cfg.Certificate = nil
	conn, err := open(cfg, func(state tls.ConnectionState) error {
		id, err := svid.PeerID(state.PeerCertificates[0])
		if err != nil {
			return untrusted(err)
		}
		return expectServer(id, cfg.TrustDomain)
	})
	if err != nil {
		return nil, tls.ConnectionState{}, err
	}
	defer conn.Close()
	var p peer.Peer
	b, err := fetchBundle(ctx, conn, cfg, grpc.Peer(&p))
	if err != nil {
		return nil, tls.ConnectionState{}, err
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, tls.ConnectionState{}, untrusted(nil)
	}
	return b, info.State, nil
}

func fetchBundle(ctx context.Context, conn *connection, cfg Config, opts ...grpc.CallOption) (*bundle.Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{}, opts...)
	if err != nil {
		return nil, conn.fault("fetch the bundle", err)
	}
	if resp.GetTrustDomain() != cfg.TrustDomain.Name() {
		return nil, malformed("the bundle is for another trust domain")
	}
	b := &bundle.Bundle{TrustDomain: cfg.TrustDomain, Sequence: resp.GetSequenceNumber(), RefreshHint: time.Duration(resp.GetRefreshHint()) * time.Second}
	for _, a := range resp.GetX509Authorities() {
		if _, err := x509.ParseCertificate(a.GetAsn1()); err != nil {
			return nil, malformed("an authority of the bundle cannot be parsed")
		}
		b.X509 = append(b.X509, bundle.X509Authority{ASN1: a.GetAsn1(), Tainted: a.GetTainted()})
	}
	if len(b.X509) == 0 {
		return nil, malformed("the bundle has no X.509 authority")
	}
	for _, k := range resp.GetJwtAuthorities() {
		key := bundle.JWTAuthority{KeyID: k.GetKeyId(), PublicKey: k.GetPublicKey(), Tainted: k.GetTainted()}
		if k.GetExpiresAt() != 0 {
			key.ExpiresAt = time.Unix(k.GetExpiresAt(), 0).UTC()
		}
		b.JWT = append(b.JWT, key)
	}
	return b, nil
}

func malformed(what string) error {
	return fault.New(fault.Unavailable, "server_answer_malformed", "the server's answer is not usable: %s", what)
}
