package serverapi

import (
	"context"
	"crypto/x509"
	"time"

	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/svid"
)

// svids is spire.api.server.svid.v1.SVID.
type svids struct {
	svidv1.UnsafeSVIDServer
	server *Server
}

// BatchNewX509SVID signs for entries of the calling agent, each with its own outcome.
func (a svids) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	requests := make([]signRequest, 0, min(len(req.Params), maxIssueBatch))
	if err := a.server.checkIssueBatch(ctx, len(req.Params)); err != nil {
		return nil, err
	}
	for _, p := range req.Params {
		requests = append(requests, signRequest{grant: p.GetEntryId(), csr: p.GetCsr()})
	}
	results, err := a.server.signX509(ctx, (*registry.Snapshot).AuthorizedEntry, requests)
	if err != nil {
		return nil, err
	}
	resp := &svidv1.BatchNewX509SVIDResponse{}
	for _, r := range results {
		out := &svidv1.BatchNewX509SVIDResponse_Result{Status: itemStatus(r.err)}
		if r.err == nil {
			out.Svid = writeX509(r.X509)
		}
		resp.Results = append(resp.Results, out)
	}
	return resp, nil
}

// checkIssueBatch bounds a batch and charges it to the caller; the call itself
// was charged as one.
func (s *Server) checkIssueBatch(ctx context.Context, n int) error {
	if n > maxIssueBatch {
		return fault.New(fault.Invalid, "batch_too_large", "the batch has %d items, the limit is %d", n, maxIssueBatch).Fix("split it") // C39
	}
	return s.charge(ctx, queueSign, n-1)
}

// NewJWTSVID signs a token for an entry of the calling agent.
func (a svids) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	signed, err := a.server.grantJWT(ctx, (*registry.Snapshot).AuthorizedEntry, req.EntryId, nil, req.Audience)
	if err != nil {
		return nil, err
	}
	return &svidv1.NewJWTSVIDResponse{Svid: writeJWT(signed)}, nil
}

// MintX509SVID signs for an operator what the request names: one ID of our
// trust domain outside the reserved space, and DNS names. The subject is ours.
func (a svids) MintX509SVID(ctx context.Context, req *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	if err := a.server.stale(); err != nil {
		return nil, err
	}
	key, err := svid.ParseCSR(req.Csr)
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(req.Csr)
	if err != nil {
		return nil, fault.New(fault.Invalid, "csr_malformed", "the certificate request cannot be read").Because(err)
	}
	uris := svid.RequestedURIs(csr)
	if len(uris) != 1 { // C26
		return nil, fault.New(fault.Invalid, "csr_uri_count", "the certificate request has %d URI names; a mint needs exactly one", len(uris))
	}
	now := time.Now()
	ttl, err := mintTTL(req.Ttl)
	if err != nil {
		return nil, err
	}
	// Judged as the entry that would give the same (C27, C28).
	e := entry.Entry{ID: "mint", ParentID: identity.Server(a.server.cfg.TrustDomain), DNSNames: csr.DNSNames, Selectors: []entry.Selector{{Type: "mint", Value: "mint"}}}
	if e.SPIFFEID, err = identity.ParseWorkload(a.server.cfg.TrustDomain, uris[0]); err != nil {
		return nil, err
	}
	if err := entry.Validate(a.server.cfg.TrustDomain, &e, now); err != nil {
		return nil, err
	}
	issuer, err := a.server.cfg.X509(now)
	if err != nil {
		return nil, err
	}
	asked := x509Asked(&e, issuer)
	asked.Requested = ttl
	who := subject{id: e.SPIFFEID, at: a.server.cfg.Registry.Position(), dns: e.DNSNames, life: a.server.cfg.Lifetimes.Decide(lifetime.X509, asked, now)[0]}
	minted, err := a.server.mintX509(ctx, issuer, who, key, now)
	if err != nil {
		return nil, err
	}
	return &svidv1.MintX509SVIDResponse{Svid: writeX509(minted)}, nil
}

// MintJWTSVID signs a token for an operator.
func (a svids) MintJWTSVID(ctx context.Context, req *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	if err := a.server.stale(); err != nil {
		return nil, err
	}
	if err := checkAudience(req.Audience); err != nil {
		return nil, err
	}
	id, err := readID("id", req.Id)
	if err != nil {
		return nil, err
	}
	if id, err = identity.ParseWorkload(a.server.cfg.TrustDomain, id.String()); err != nil {
		return nil, err
	}
	now := time.Now()
	ttl, err := mintTTL(req.Ttl)
	if err != nil {
		return nil, err
	}
	issuer, err := a.server.cfg.JWT(now)
	if err != nil {
		return nil, err
	}
	asked := jwtAsked(&entry.Entry{}, issuer)
	asked.Requested = ttl
	who := subject{id: id, at: a.server.cfg.Registry.Position(), life: a.server.cfg.Lifetimes.Decide(lifetime.JWT, asked, now)[0]}
	signed, err := a.server.signJWT(ctx, issuer, who, req.Audience, "", now)
	if err != nil {
		return nil, err
	}
	return &svidv1.MintJWTSVIDResponse{Svid: writeJWT(signed)}, nil
}

// mintTTL reads how long a mint shall live; 0 is the default.
func mintTTL(seconds int32) (time.Duration, error) {
	if seconds < 0 {
		return 0, fault.New(fault.Invalid, "ttl_invalid", "the TTL is negative")
	}
	return time.Duration(seconds) * time.Second, nil
}

// MintWITSVID is not offered.
func (a svids) MintWITSVID(context.Context, *svidv1.MintWITSVIDRequest) (*svidv1.MintWITSVIDResponse, error) {
	return nil, errNoWIT()
}

// BatchNewWITSVID is not offered.
func (a svids) BatchNewWITSVID(context.Context, *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	return nil, errNoWIT()
}

func errNoWIT() error {
	return fault.New(fault.Unsupported, "wit_unsupported", "WIT-SVIDs are not offered by this server")
}

func writeJWT(s signedJWT) *spiretypes.JWTSVID {
	return &spiretypes.JWTSVID{Token: s.token, Id: writeID(s.id), IssuedAt: s.issuedAt.Unix(), ExpiresAt: s.expires.Unix()}
}
