package serverapi

import (
	"context"
	"errors"

	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
)

// issues is plastron.issue.v1.Issue.
type issues struct {
	issuev1.UnsafeIssueServer
	server *Server
}

// X509 signs one certificate for each item, each with its own outcome.
func (a issues) X509(ctx context.Context, req *issuev1.X509Request) (*issuev1.X509Response, error) {
	if err := a.server.checkIssueBatch(ctx, len(req.Items)); err != nil {
		return nil, err
	}
	requests := make([]signRequest, len(req.Items))
	for i, item := range req.Items {
		requests[i] = signRequest{item.GetGrantId(), item.GetFacts(), item.GetCsr()}
	}
	results, err := a.server.signX509(ctx, (*registry.Snapshot).AuthorizedGrant, requests)
	if err != nil {
		return nil, err
	}
	resp := &issuev1.X509Response{Results: make([]*issuev1.X509Result, len(results))}
	for i, r := range results {
		if r.err != nil {
			resp.Results[i] = &issuev1.X509Result{Refusal: writeRefusal(r.err)}
			continue
		}
		resp.Results[i] = &issuev1.X509Result{CertChain: r.Chain, SpiffeId: r.ID.String(), ExpiresAt: r.NotAfter.Unix(), Revision: r.revision}
	}
	return resp, nil
}

// JWT signs one token.
func (a issues) JWT(ctx context.Context, req *issuev1.JWTRequest) (*issuev1.JWTResponse, error) {
	signed, err := a.server.grantJWT(ctx, (*registry.Snapshot).AuthorizedGrant, req.GrantId, req.Facts, req.Audience)
	if err != nil {
		return nil, err
	}
	return &issuev1.JWTResponse{
		Token: signed.token, SpiffeId: signed.id.String(), IssuedAt: signed.issuedAt.Unix(), ExpiresAt: signed.expires.Unix(), Revision: signed.revision,
	}, nil
}

func writeRefusal(err error) *issuev1.Refusal {
	r := &issuev1.Refusal{Reason: fault.ReasonOf(err), Message: rpc.InternalText}
	if f, ok := errors.AsType[*fault.Error](err); ok {
		r.Message, r.Remedy = f.Message, f.Remedy
	}
	return r
}
