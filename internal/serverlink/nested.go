package serverlink

import (
	"context"
	"crypto/x509"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
)

// Authority has the server sign an authority below its own, for the key in csr,
// and returns its chain without the root. It is for servers whose certificate
// names an identity that an entry says is downstream.
func (c *Client) Authority(ctx context.Context, csr []byte, ttl time.Duration) ([][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn := c.current()
	resp, err := svidv1.NewSVIDClient(conn).NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: int32(ttl / time.Second)})
	if err != nil {
		return nil, conn.fault("have an authority signed", err)
	}
	for _, der := range resp.GetCaCertChain() {
		if _, err := x509.ParseCertificate(der); err != nil {
			return nil, malformed("a certificate of the chain cannot be parsed")
		}
	}
	return resp.GetCaCertChain(), nil
}

// PublishJWT makes the JWT key of a server below known to the whole trust domain.
func (c *Client) PublishJWT(ctx context.Context, key bundle.JWTAuthority) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn := c.current()
	_, err := bundlev1.NewBundleClient(conn).PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{
		JwtAuthority: &spiretypes.JWTKey{KeyId: key.KeyID, PublicKey: key.PublicKey, ExpiresAt: key.ExpiresAt.Unix()},
	})
	return conn.fault("publish a JWT key", err)
}
