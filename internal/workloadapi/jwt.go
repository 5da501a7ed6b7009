package workloadapi

import (
	"context"
	"crypto"
	"errors"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"
)

// errOtherID is the one answer for an identity that is another's or nobody's (R12).
var errOtherID = fault.New(fault.Denied, "no_identity", "no identity issued: the SPIFFE ID is not one of this process's").
	Fix("leave the SPIFFE ID out to get what there is")

// FetchJWTSVID returns a JWT-SVID for each of the caller's identities, or for
// the one it names. If one cannot be had the call fails.
func (s *Server) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := checkAudience(req.GetAudience()); err != nil {
		return nil, err
	}
	var only spiffeid.ID
	if req.GetSpiffeId() != "" {
		var err error
		if only, err = identity.Parse(req.GetSpiffeId()); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, jwtWait)
	defer cancel()
	c, seen, view, err := s.see(ctx)
	if err != nil {
		return nil, err
	}
	if len(view.Matched) == 0 {
		return nil, s.refuse(ctx, seen, errNothing)
	}
	resp := &workload.JWTSVIDResponse{}
	for _, matched := range view.Matched {
		if !only.IsZero() && matched.ID != only {
			continue
		}
		token, err := s.cfg.Mirror.JWT(ctx, matched, req.GetAudience())
		if fault.KindOf(err) == fault.Denied {
			return nil, s.refuse(ctx, seen, errNothing) // the grant went away meanwhile (R12)
		}
		if err != nil {
			return nil, unsigned(err)
		}
		resp.Svids = append(resp.Svids, &workload.JWTSVID{SpiffeId: token.ID.String(), Svid: token.Token, Hint: token.Hint})
	}
	if len(resp.GetSvids()) == 0 {
		return nil, errOtherID
	}
	return resp, c.Check() // R38: a caller that has gone or changed gets nothing
}

// see attests the caller of one call and returns what it may have.
func (s *Server) see(ctx context.Context) (*caller, attested, mirror.View, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, attested{}, mirror.View{}, err
	}
	seen, err := s.attest(ctx, c, false)
	if err != nil {
		return nil, seen, mirror.View{}, err
	}
	sub := s.cfg.Mirror.Subscribe(seen.facts)
	defer sub.Close()
	view := sub.View()
	if !view.Synced || view.Bundle.Keys == nil {
		return nil, seen, view, s.refuse(ctx, seen, errNothing)
	}
	return c, seen, view, nil
}

// unsigned is what a caller reads of a failure between agent and server: that it
// is not its own fault. What the server said is for the operator.
func unsigned(err error) error {
	switch fault.KindOf(err) {
	case fault.Unavailable, fault.Exhausted, fault.Internal:
		if errors.Is(err, reason.ClockSkew) {
			return reason.ClockSkew.Because(err)
		}
		return reason.NotSignedYet.Because(err)
	}
	return reason.SigningRefused.Because(err)
}

func checkAudience(audience []string) error {
	bad := func(what string) error {
		return fault.New(fault.Invalid, "audience_invalid", "%s", what).Fix("name who the token is for")
	}
	switch {
	case len(audience) == 0:
		return bad("no audience was given")
	case len(audience) > maxAudiences:
		return bad("more than 64 audiences were given")
	case slices.Contains(audience, ""):
		return bad("an audience is empty")
	case slices.ContainsFunc(audience, func(a string) bool { return len(a) > maxAudience }):
		return bad("an audience is longer than 2048 bytes")
	}
	return nil
}

// FetchJWTBundles streams the keys that verify JWT-SVIDs.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return watch(stream.Context(), s, false, func(v mirror.View) (*workload.JWTBundlesResponse, error) {
		bundles, err := s.bundles(v)
		if err != nil {
			return nil, err
		}
		resp := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
		for _, b := range bundles {
			resp.Bundles[b.TrustDomain.IDString()] = b.JWKS
		}
		return resp, nil
	}, stream.Send)
}

// ValidateJWTSVID verifies a token for the caller, who needs no identity, with
// the own trust domain's keys and those of the trust domains that the caller's
// grants name.
func (s *Server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	switch {
	case req.GetAudience() == "" || len(req.GetAudience()) > maxAudience:
		return nil, checkAudience([]string{req.GetAudience()})
	case req.GetSvid() == "" || len(req.GetSvid()) > maxToken:
		return nil, fault.New(fault.Invalid, "jwt_malformed", "the token is empty or too long")
	}
	c, _, view, err := s.see(ctx)
	if err != nil {
		return nil, err
	}
	var of spiffeid.TrustDomain
	claims, err := svid.ValidateJWT(req.GetSvid(), []string{req.GetAudience()}, func(td spiffeid.TrustDomain, keyID string) (crypto.PublicKey, bool) {
		of = td
		for _, b := range append([]mirror.Bundle{view.Bundle}, view.Federated...) {
			if b.TrustDomain == td {
				return b.Keys.JWTKey(keyID)
			}
		}
		return nil, false
	}, time.Now())
	if err != nil && slices.Contains(view.Unknown, of) {
		return nil, reason.FederatedBundleMissing.Because(err)
	}
	if err != nil {
		return nil, err
	}
	fields, err := structpb.NewStruct(s.visible(claims))
	if err != nil {
		return nil, err
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: claims.ID.String(), Claims: fields}, c.Check()
}

// visible returns the claims that a caller may read: all of an own token, of a
// foreign one those of the standard and what is configured.
func (s *Server) visible(c svid.Claims) map[string]any {
	if c.ID.TrustDomain() == s.cfg.TrustDomain {
		return c.All
	}
	out := map[string]any{}
	for name, value := range c.All {
		if name == "sub" || name == "aud" || name == "exp" || slices.Contains(s.cfg.AllowedForeignJWTClaims, name) {
			out[name] = value
		}
	}
	return out
}
