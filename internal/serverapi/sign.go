package serverapi

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
)

// Limits on the audience of a JWT-SVID, in members and in bytes of one.
const (
	maxAudience       = 100
	maxAudienceMember = 2048
)

// subject is for whom something is signed: a grant of the caller's, or, for a
// mint, what an operator says.
type subject struct {
	id       spiffeid.ID
	grant    string
	revision uint64
	at       store.Position // at which the caller was found entitled
	dns      []string
	facts    map[string]string // of a rule
	trust    string            // of a rule: who says that the facts are true
	life     lifetime.Limit    // that counts
}

// signRequest is one X.509-SVID that an agent asks for.
type signRequest struct {
	grant string
	facts map[string]string
	csr   []byte
}

// authorized is who says what an agent is granted: with rules, or, for SPIRE's
// API, which knows none, without.
type authorized func(*registry.Snapshot, spiffeid.ID, string) (entry.Entry, bool)

// signedX509 is what became of one request.
type signedX509 struct {
	svid.X509
	revision uint64
	err      error
}

// signedJWT is a signed token.
type signedJWT struct {
	token             string
	id                spiffeid.ID
	issuedAt, expires time.Time
	revision          uint64
}

// entitled returns, of the grants asked for, those that are the calling agent's.
func (s *Server) entitled(ctx context.Context, of authorized, grants ...string) (mine map[string]entry.Entry, at store.Position) {
	agent := callerFrom(ctx).id
	mine = make(map[string]entry.Entry, len(grants))
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		at = snap.Position()
		for _, id := range grants {
			if e, ok := of(snap, agent, id); ok {
				mine[id] = e
			}
		}
	})
	return mine, at
}

// errNotEntitled is the one answer for a grant that does not exist, is another
// agent's, or has ended (R12).
func errNotEntitled() error {
	return fault.New(fault.NotFound, "grant_unknown", "the agent has no such entry")
}

// signX509 signs a batch: what may be signed is prepared, the whole batch goes
// on record, then it is signed (R14). Each request has its own outcome (C40).
func (s *Server) signX509(ctx context.Context, of authorized, requests []signRequest) ([]signedX509, error) {
	known := s.check(ctx, of, requests) // it may take a while
	s.signing.RLock()
	defer s.signing.RUnlock()
	grants := make([]string, len(requests))
	for i, r := range requests {
		grants[i] = r.grant
	}
	mine, at := s.entitled(ctx, of, grants...)
	now := time.Now()
	issuer, err := s.cfg.X509(now)
	if err != nil {
		return nil, err
	}
	agent, stale := callerFrom(ctx).id, s.stale()
	results := make([]signedX509, len(requests))
	pairs := make([]pair, len(requests))
	prepared := make([]*svid.PreparedX509, len(requests))
	events := make([]audit.Event, 0, len(requests))
	var denied []error
	for i, r := range requests {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		// Read before the grant is judged, so that both take the same time (R12).
		key, err := svid.ParseCSR(r.csr)
		e, ok := mine[r.grant]
		if !ok || e.Expired(now) {
			err = errNotEntitled()
		}
		pairs[i] = pairFor(&e, r.facts)
		if err == nil {
			err = s.mayGrant(stale, agent, pairs[i], now)
		}
		var who subject
		if err == nil {
			who, err = s.subjectOf(&e, r.facts, at, s.cfg.Lifetimes.Decide(lifetime.X509, x509Asked(&e, issuer), now)[0])
		}
		if err == nil {
			err = known[i].verdict(&e)
		}
		var event audit.Event
		if err == nil {
			prepared[i], event, err = s.prepareX509(ctx, issuer, who, key, now)
		}
		if err == nil && e.Rule != nil { // last, so that it counts what will be signed
			err = s.pairs.take(agent, pairs[i], prepared[i].NotAfter(), now)
		}
		results[i] = signedX509{revision: e.Revision, err: err}
		if denies(err) {
			denied = append(denied, &underGrant{err, e.ID, r.facts})
		}
		if err != nil {
			prepared[i] = nil
			continue
		}
		events = append(events, event)
	}
	if len(denied) > 0 {
		method, _ := grpc.Method(ctx)
		s.recordRefusal(ctx, method, denied...)
	}
	if len(events) > 0 {
		if err := s.cfg.Audit.Append(events...); err != nil {
			return nil, err
		}
	}
	for i, p := range prepared {
		if p != nil {
			if results[i].X509, results[i].err = p.Issue(); results[i].err == nil {
				s.renewals.note(agent, pairs[i], p.NotAfter(), now)
			}
		}
	}
	return results, nil
}

// subjectOf says for whom something is to be signed under a grant of the
// caller's. Of what the caller says only the facts count, and only for a rule (R2).
func (s *Server) subjectOf(e *entry.Entry, facts map[string]string, at store.Position, life lifetime.Limit) (subject, error) {
	who := subject{id: e.SPIFFEID, grant: e.ID, revision: e.Revision, at: at, dns: e.DNSNames, life: life}
	if e.Rule == nil {
		if len(facts) > 0 {
			return subject{}, fault.New(fault.Invalid, "facts_unexpected", "an exact entry takes no facts")
		}
		return who, nil
	}
	var err error
	who.id, err = s.ruled(e, facts)
	who.facts, who.trust = facts, e.Rule.FactsBy()
	return who, err
}

// mintX509 signs what an operator asks for, without a grant.
func (s *Server) mintX509(ctx context.Context, issuer *svid.X509Issuer, who subject, key svid.PublicKey, now time.Time) (svid.X509, error) {
	prepared, event, err := s.prepareX509(ctx, issuer, who, key, now)
	if err != nil {
		return svid.X509{}, err
	}
	if err := s.cfg.Audit.Append(event); err != nil {
		return svid.X509{}, err
	}
	return prepared.Issue()
}

func (s *Server) prepareX509(ctx context.Context, issuer *svid.X509Issuer, who subject, key svid.PublicKey, now time.Time) (*svid.PreparedX509, audit.Event, error) {
	if err := s.cfg.Nodes.CheckKey(key, who.id, now); err != nil { // C36, C37
		return nil, nil, err
	}
	prepared, err := issuer.Prepare(svid.Leaf{ID: who.id, Key: key, DNSNames: who.dns, NotBefore: now.Add(-svid.Backdate), NotAfter: who.life.End})
	if err != nil {
		return nil, nil, err
	}
	return prepared, audit.Issuance{
		Caller: callerFrom(ctx).name(), Kind: "x509", ID: who.id.String(), Grant: who.grant, Revision: who.revision, Position: who.at.String(),
		Facts: who.facts, Trust: who.trust, Serial: prepared.Serial(), Issuer: issuer.AuthorityID(), KeyHash: key.Hash, Expiry: prepared.NotAfter(), Limit: who.life.Name,
	}, nil
}

// grantJWT signs a token for one of the calling agent's grants.
func (s *Server) grantJWT(ctx context.Context, of authorized, grant string, facts map[string]string, audience []string) (signedJWT, error) {
	if err := checkAudience(audience); err != nil {
		return signedJWT{}, err
	}
	known := s.check(ctx, of, []signRequest{{grant: grant, facts: facts}})
	s.signing.RLock()
	defer s.signing.RUnlock()
	mine, at := s.entitled(ctx, of, grant)
	now := time.Now()
	e, ok := mine[grant]
	if !ok || e.Expired(now) {
		return signedJWT{}, errNotEntitled()
	}
	jti := ""
	if e.JWTIncludeJTI {
		id := uuid.New()
		jti = base64.RawURLEncoding.EncodeToString(id[:])
	}
	issuer, err := s.cfg.JWT(now)
	if err != nil {
		return signedJWT{}, err
	}
	agent, what := callerFrom(ctx).id, pairFor(&e, facts)
	who, err := s.subjectOf(&e, facts, at, s.cfg.Lifetimes.Decide(lifetime.JWT, jwtAsked(&e, issuer), now)[0])
	if err == nil {
		err = known[0].verdict(&e)
	}
	if err == nil {
		err = s.mayGrant(s.stale(), agent, what, now)
	}
	if err == nil && e.Rule != nil {
		err = s.pairs.take(agent, what, who.life.End, now)
	}
	if err != nil {
		return signedJWT{}, &underGrant{err, e.ID, facts}
	}
	signed, err := s.signJWT(ctx, issuer, who, audience, jti, now)
	if err == nil {
		s.renewals.note(agent, what, who.life.End, now)
	}
	return signed, err
}

func (s *Server) signJWT(ctx context.Context, issuer *svid.JWTIssuer, who subject, audience []string, jti string, now time.Time) (signedJWT, error) {
	prepared, err := issuer.Prepare(svid.JWT{
		ID: who.id, Audience: audience, IssuedAt: now, ExpiresAt: who.life.End, JTI: jti, Issuer: s.cfg.JWTIssuer,
	})
	if err != nil {
		return signedJWT{}, err
	}
	err = s.cfg.Audit.Append(audit.Issuance{
		Caller: callerFrom(ctx).name(), Kind: "jwt", ID: who.id.String(), Grant: who.grant, Revision: who.revision, Position: who.at.String(),
		Facts: who.facts, Trust: who.trust, JTI: jti, Issuer: issuer.KeyID(), Audience: sha256.Sum256([]byte(strings.Join(audience, "\x00"))), Expiry: prepared.ExpiresAt(),
		Limit: who.life.Name,
	})
	if err != nil {
		return signedJWT{}, err
	}
	token, err := prepared.Issue()
	return signedJWT{token, who.id, now.UTC().Truncate(time.Second), prepared.ExpiresAt(), who.revision}, err
}

// x509Asked is what bounds an X.509-SVID for a grant, zero for none: its TTL, and
// never past its own end or the issuer's (R8).
func x509Asked(e *entry.Entry, issuer *svid.X509Issuer) lifetime.Asked {
	own, above := issuer.Ends()
	return lifetime.Asked{Entry: e.X509TTL, EntryEnd: e.ExpiresAt, Authority: own, Upstream: above}
}

// jwtAsked is the same of a JWT-SVID.
func jwtAsked(e *entry.Entry, issuer *svid.JWTIssuer) lifetime.Asked {
	return lifetime.Asked{Entry: e.JWTTL, EntryEnd: e.ExpiresAt, Authority: issuer.NotAfter()}
}

func checkAudience(audience []string) error {
	if len(audience) == 0 || len(audience) > maxAudience {
		return fault.New(fault.Invalid, "audience_invalid", "the audience must have 1 to %d members", maxAudience)
	}
	for _, a := range audience {
		if a == "" || len(a) > maxAudienceMember {
			return fault.New(fault.Invalid, "audience_invalid", "a member of the audience must have 1 to %d bytes", maxAudienceMember)
		}
	}
	return nil
}
