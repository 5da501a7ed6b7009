package serverapi

import (
	"context"
	"time"

	lifetimev1 "github.com/plastron/plastron/api/plastron/lifetime/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
)

const maxSerial = 64 // decimal digits; ours have 39

// lifetimes is plastron.lifetime.v1.Lifetime.
type lifetimes struct {
	lifetimev1.UnsafeLifetimeServer
	server *Server
}

// Explain says what limits lifetimes, by the function that signing asks too.
func (a lifetimes) Explain(ctx context.Context, req *lifetimev1.ExplainRequest) (*lifetimev1.ExplainResponse, error) {
	s, now := a.server, time.Now()
	resp := &lifetimev1.ExplainResponse{SurviveOutageMs: s.cfg.Lifetimes.Outage.Milliseconds()}
	var err error
	switch {
	case req.EntryId != "" && req.Serial != "":
		return nil, fault.New(fault.Invalid, "request_invalid", "an entry and a serial number are two questions")
	case req.Serial != "":
		if resp.Issued, err = s.explainSerial(ctx, req.Serial); err != nil {
			return nil, err
		}
		if resp.Issued.RevisionNow != 0 {
			resp.Documents, err = s.explainGrant(resp.Issued.EntryId, lifetime.Kind(resp.Issued.Kind), now)
		}
	case req.EntryId != "":
		resp.Documents, err = s.explainGrant(req.EntryId, "", now)
	default:
		resp.Documents, err = s.explainAll(now)
	}
	return resp, err
}

// explainAll says it of everything that this server signs, of SVIDs for a grant that
// bounds nothing itself.
func (s *Server) explainAll(now time.Time) ([]*lifetimev1.Document, error) {
	out, err := s.explain(&entry.Entry{}, now, lifetime.X509, lifetime.JWT)
	if err != nil {
		return nil, err
	}
	issuer, err := s.cfg.X509(now)
	if err != nil {
		return nil, err
	}
	agent, again := s.cfg.Nodes.Lives(issuer, false, now), s.cfg.Nodes.Lives(issuer, true, now)
	out = append(out, writeDocument(string(lifetime.Agent), agent, now))
	if len(again) > len(agent) { // there is a limit for those
		out = append(out, writeDocument("agent_reattest", again, now))
	}
	asked := x509Asked(&entry.Entry{}, issuer)
	own := lifetime.Asked{Upstream: asked.Upstream} // an authority of ours is not below another of ours
	return append(out,
		writeDocument(string(lifetime.Server), s.cfg.Lifetimes.Decide(lifetime.Server, asked, now), now),
		writeDocument(string(lifetime.CA), s.cfg.Lifetimes.Decide(lifetime.CA, own, now), now),
		writeDocument(string(lifetime.Downstream), s.cfg.Lifetimes.Decide(lifetime.Downstream, asked, now), now),
	), nil
}

// explainGrant says it of what an entry or a rule grants, or of one kind of that.
func (s *Server) explainGrant(id string, only lifetime.Kind, now time.Time) ([]*lifetimev1.Document, error) {
	e, err := s.grant(id)
	switch {
	case err != nil:
		return nil, err
	case e.Expired(now):
		return nil, fault.New(fault.NotFound, "grant_unknown", "the entry %q has ended", id)
	}
	kinds := []lifetime.Kind{lifetime.X509, lifetime.JWT}
	if e.Downstream {
		kinds = append(kinds, lifetime.Downstream)
	}
	if only != "" {
		kinds = []lifetime.Kind{only}
	}
	return s.explain(&e, now, kinds...)
}

func (s *Server) explain(e *entry.Entry, now time.Time, kinds ...lifetime.Kind) ([]*lifetimev1.Document, error) {
	out := make([]*lifetimev1.Document, 0, len(kinds))
	for _, kind := range kinds {
		var asked lifetime.Asked
		switch kind {
		case lifetime.JWT:
			issuer, err := s.cfg.JWT(now)
			if err != nil {
				return nil, err
			}
			asked = jwtAsked(e, issuer)
		default:
			issuer, err := s.cfg.X509(now)
			if err != nil {
				return nil, err
			}
			if asked = x509Asked(e, issuer); kind == lifetime.Downstream {
				asked.Entry = 0
			}
		}
		out = append(out, writeDocument(string(kind), s.cfg.Lifetimes.Decide(kind, asked, now), now))
	}
	return out, nil
}

// grant returns an entry or a rule.
func (s *Server) grant(id string) (e entry.Entry, err error) {
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		if e, err = snap.Rule(id); fault.KindOf(err) == fault.NotFound {
			e, err = snap.Entry(id)
		}
	})
	return e, err
}

// explainSerial says what is on record of a certificate.
func (s *Server) explainSerial(ctx context.Context, serial string) (*lifetimev1.Issued, error) {
	if len(serial) > maxSerial {
		return nil, fault.New(fault.Invalid, "serial_invalid", "the serial number has more than %d digits", maxSerial)
	}
	found, err := s.cfg.Audit.Find(ctx, serial)
	if err != nil {
		return nil, err
	}
	out := &lifetimev1.Issued{Serial: serial, SignedAt: found.Record.Time.Unix()}
	if a := found.Admission; a != nil {
		out.Kind, out.SpiffeId, out.Caller, out.EndsAt, out.Limit = string(lifetime.Agent), a.Node, a.Node, a.Expiry.Unix(), a.Limit
		return out, nil
	}
	i := found.Issuance
	out.Kind, out.SpiffeId, out.Caller, out.EndsAt, out.Limit = i.Kind, i.ID, i.Caller, i.Expiry.Unix(), i.Limit
	out.EntryId, out.Revision, out.AuthorityId = i.Grant, i.Revision, i.Issuer
	switch {
	case i.Kind == "x509-ca":
		out.Kind = string(lifetime.Downstream)
	case i.ID == identity.Server(s.cfg.TrustDomain).String():
		out.Kind = string(lifetime.Server)
	}
	if e, err := s.grant(i.Grant); err == nil && !e.Expired(time.Now()) {
		out.RevisionNow = e.Revision
	}
	return out, nil
}

func writeDocument(kind string, limits []lifetime.Limit, now time.Time) *lifetimev1.Document {
	end := limits[0].End
	out := &lifetimev1.Document{Kind: kind, LifeMs: end.Sub(now).Milliseconds(), EndsAt: end.Unix()}
	for _, l := range limits {
		out.Limits = append(out.Limits, &lifetimev1.Limit{Name: l.Name, LifeMs: l.Life.Milliseconds(), EndsAt: rpc.Unix(l.End)})
	}
	return out
}
