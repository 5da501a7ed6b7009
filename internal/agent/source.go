package agent

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/serverlink"
)

const maxBundleFile = 1 << 20 // bytes

// configuredBundle returns the trust domain's roots from the configured source.
func (a *Agent) configuredBundle(ctx context.Context) (*bundle.Bundle, error) {
	s := a.cfg.Agent
	switch {
	case s.TrustBundlePath != "":
		return readBundle(s)
	case s.TrustBundleHash != "":
		pin, err := serverlink.ParseRootHash(s.TrustBundleHash)
		if err != nil {
			return nil, err
		}
		return serverlink.Pinned(ctx, a.linkConfig(), pin)
	case len(a.joining.roots) > 0:
		b, err := serverlink.Pinned(ctx, a.linkConfig(), a.joining.roots...)
		return b, a.joining.explain(err)
	}
	a.log.Warn("insecure bootstrap: the server is trusted because it answered")
	return serverlink.Insecure(ctx, a.linkConfig())
}

func readBundle(s Settings) (*bundle.Bundle, error) {
	bad := func(err error) error {
		return fault.New(fault.Precondition, "trust_bundle_unreadable", "the trust bundle %q cannot be used: %v", s.TrustBundlePath, err).
			Fix("write it with 'plastron server bundle show'")
	}
	f, err := os.Open(s.TrustBundlePath)
	if err != nil {
		return nil, bad(err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBundleFile+1))
	switch {
	case err != nil:
		return nil, bad(err)
	case len(data) > maxBundleFile:
		return nil, bad(errors.New("it is too large"))
	case s.TrustBundleFormat == "spiffe":
		b, err := bundle.Parse(s.TrustDomain.TrustDomain, data)
		if err != nil {
			return nil, bad(err)
		}
		return b, nil
	}
	roots, err := bundle.ParsePEM(data)
	if err != nil {
		return nil, bad(err)
	}
	b := &bundle.Bundle{TrustDomain: s.TrustDomain.TrustDomain}
	for _, der := range roots {
		b.X509 = append(b.X509, bundle.X509Authority{ASN1: der})
	}
	return b, nil
}
