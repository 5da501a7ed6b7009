package workloadapi

import (
	"github.com/plastron/plastron/internal/mirror"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
)

// FetchX509SVID streams the caller's X.509-SVIDs.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return watch(stream.Context(), s, true, x509SVIDs, stream.Send)
}

func x509SVIDs(v mirror.View) (*workload.X509SVIDResponse, error) {
	if len(v.Identities) == 0 || len(v.Bundle.X509) == 0 {
		return nil, errNothing
	}
	resp := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
	for _, id := range v.Identities {
		resp.Svids = append(resp.Svids, &workload.X509SVID{
			SpiffeId: id.ID.String(), X509Svid: id.Chain, X509SvidKey: id.Key, Bundle: v.Bundle.X509, Hint: id.Hint,
		})
	}
	for _, b := range v.Federated {
		if len(b.X509) > 0 { // clients refuse a whole message for one empty bundle
			resp.FederatedBundles[b.TrustDomain.IDString()] = b.X509
		}
	}
	return resp, nil
}

// FetchX509Bundles streams the bundles that verify X.509-SVIDs.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return watch(stream.Context(), s, false, func(v mirror.View) (*workload.X509BundlesResponse, error) {
		bundles, err := s.bundles(v)
		if err != nil {
			return nil, err
		}
		resp := &workload.X509BundlesResponse{Bundles: map[string][]byte{}}
		for _, b := range bundles {
			if len(b.X509) > 0 {
				resp.Bundles[b.TrustDomain.IDString()] = b.X509
			}
		}
		if len(v.Bundle.X509) == 0 {
			return nil, errNothing
		}
		return resp, nil
	}, stream.Send)
}

// bundles returns those that the caller may see, the own trust domain's first.
func (s *Server) bundles(v mirror.View) ([]mirror.Bundle, error) {
	switch {
	case v.Bundle.Keys == nil:
		return nil, errNothing
	case len(v.Matched) > 0:
		return append([]mirror.Bundle{v.Bundle}, v.Federated...), nil
	case s.cfg.AllowUnauthenticatedVerifiers:
		return []mirror.Bundle{v.Bundle}, nil
	}
	return nil, errNothing
}
