package serverapi

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	maxAlive   = 100              // credentials that an answer names
	trailLimit = 20 * time.Second // for the look into the audit trail
)

// signed is what was signed for somebody: one of agent, id and grant says whose.
type signed struct {
	agent  spiffeid.ID   // got through this agent, its own certificates included
	id     spiffeid.ID   // for this ID
	grant  string        // under this grant
	grants []entry.Entry // all that it may have been signed under
	below  bool          // authorities of downstream servers count
}

// about is what names it in the audit trail.
func (l *signed) about() string {
	switch {
	case !l.agent.IsZero():
		return l.agent.String()
	case !l.id.IsZero():
		return l.id.String()
	}
	return l.grant
}

func (l *signed) has(e *audit.Issuance) bool {
	switch {
	case !l.agent.IsZero():
		return e.Caller == l.agent.String()
	case !l.id.IsZero():
		return e.ID == l.id.String()
	}
	return e.Grant == l.grant
}

// downstream reports whether an authority below ours is among it.
func (l *signed) downstream(d *registry.Downstream) bool {
	return l.below && slices.ContainsFunc(l.grants, func(e entry.Entry) bool { return e.ID == d.EntryID && e.Downstream })
}

// lifetimes are the longest that a server could have given which learns now that
// it is over.
func (s *Server) lifetimes(grants []entry.Entry, now time.Time) (x509, jwt time.Duration) {
	life := func(kind lifetime.Kind, ttl time.Duration, end time.Time) time.Duration {
		return s.cfg.Lifetimes.Decide(kind, lifetime.Asked{Entry: ttl, EntryEnd: end}, now)[0].End.Sub(now)
	}
	for _, e := range grants {
		x509 = max(x509, life(lifetime.X509, e.X509TTL, e.ExpiresAt))
		jwt = max(jwt, life(lifetime.JWT, e.JWTTL, e.ExpiresAt))
	}
	return x509, jwt
}

// alive says what of it has not ended. What is asked for is over by now: nothing of
// it is signed here any more once the calls that began before have ended.
func (s *Server) alive(ctx context.Context, l *signed) *cutoffv1.Alive {
	s.signing.Lock()
	//lint:ignore SA2001 it only waits for those who hold it
	s.signing.Unlock()
	now := time.Now()
	out := &cutoffv1.Alive{}
	take := func(c *cutoffv1.Credential) {
		if c.ExpiresAt <= now.Unix() {
			return
		}
		out.Recorded++
		out.Until = max(out.Until, c.ExpiresAt)
		switch c.Kind {
		case "x509":
			out.X509Until = max(out.X509Until, c.ExpiresAt)
		case "jwt":
			out.JwtUntil = max(out.JwtUntil, c.ExpiresAt)
		}
		if out.Credentials = append(out.Credentials, c); len(out.Credentials) >= 10*maxAlive {
			lastFirst(out)
		}
	}
	var node registry.Node
	var authorities []registry.Authority
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		node, _ = snap.Node(l.agent) // absent: the zero one has no certificates
		authorities = snap.Authorities("")
		for d := range snap.Downstreams() {
			if l.downstream(&d) {
				take(&cutoffv1.Credential{Kind: "x509-ca", SpiffeId: d.Caller, Serial: d.Serial, Issuer: d.Issuer, Grant: d.EntryID, ExpiresAt: d.NotAfter.Unix()})
			}
		}
	})
	for _, c := range []registry.Credential{node.Current, node.Next} {
		if !c.IsZero() {
			take(&cutoffv1.Credential{Kind: "agent", SpiffeId: l.agent.String(), Serial: c.Serial, Agent: l.agent.String(), ExpiresAt: c.ExpiresAt.Unix()})
		}
	}
	missing := s.readTrail(ctx, l, &node, authorities, take)
	grants := l.grants
	if !l.agent.IsZero() { // what it was granted until a moment ago counts as well
		grants = append(slices.Clip(grants), entry.Entry{})
	}
	x509, jwt := s.lifetimes(grants, now)
	for _, e := range s.elsewhere(authorities, x509, jwt, missing, now) {
		out.Elsewhere = append(out.Elsewhere, e)
		out.Until = max(out.Until, e.Until)
	}
	lastFirst(out)
	return out
}

func lastFirst(out *cutoffv1.Alive) {
	slices.SortStableFunc(out.Credentials, func(a, b *cutoffv1.Credential) int { return cmp.Compare(b.ExpiresAt, a.ExpiresAt) })
	out.Credentials = out.Credentials[:min(len(out.Credentials), maxAlive)]
}

// readTrail looks what this server has on record, as far back as anything that it
// signed can be alive, and returns why some of it may be missing, or nil.
func (s *Server) readTrail(ctx context.Context, l *signed, node *registry.Node, authorities []registry.Authority, take func(*cutoffv1.Credential)) error {
	from, live := time.Now(), map[string]bool{}
	for _, a := range authorities {
		for _, slot := range a.Slots {
			if a.Server == s.cfg.About.ServerID && slot.AuthorityID != "" {
				live[slot.AuthorityID] = true
				if made := slot.NotBefore.Add(svid.Backdate); made.Before(from) {
					from = made
				}
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, trailLimit)
	defer cancel()
	first, lost, err := s.cfg.Audit.Since(ctx, from, []string{l.about()}, func(r audit.Record) error {
		switch r.Kind {
		case "issuance":
			var e audit.Issuance
			if err := json.Unmarshal(r.Event, &e); err != nil {
				return err
			}
			if e.Kind != "x509-ca" && live[e.Issuer] && l.has(&e) { // authorities below have rows of their own
				take(&cutoffv1.Credential{
					Kind: e.Kind, SpiffeId: e.ID, Serial: e.Serial, Jti: e.JTI, Issuer: e.Issuer, Grant: e.Grant, Agent: e.Caller, ExpiresAt: e.Expiry.Unix(),
				})
			}
		case "admission":
			var e audit.Admission
			if err := json.Unmarshal(r.Event, &e); err != nil {
				return err
			}
			if e.Node == l.agent.String() && e.Serial != node.Current.Serial && e.Serial != node.Next.Serial {
				take(&cutoffv1.Credential{Kind: "agent", SpiffeId: e.Node, Serial: e.Serial, Agent: e.Node, ExpiresAt: e.Expiry.Unix()})
			}
		}
		return nil
	})
	switch {
	case err != nil:
		s.cfg.Log.WarnContext(ctx, "audit trail not read to its end", "err", err)
		return fault.New(fault.Unavailable, "audit_unreadable", "the audit trail could not be read to its end")
	case lost > 0:
		return fault.New(fault.Unavailable, "audit_gap", "%d events are missing in the audit trail", lost)
	case first.After(from.Add(time.Second)): // slots know whole seconds
		return fault.New(fault.Unavailable, "audit_cut", "the audit trail begins only at %s", first.UTC().Format(time.RFC3339))
	}
	return nil
}

// elsewhere says until when what other servers signed can live, and what this one
// signed if its records are not complete. x509 and jwt are the lifetimes that were
// given; none is zero.
func (s *Server) elsewhere(authorities []registry.Authority, x509, jwt time.Duration, missing error, now time.Time) (out []*cutoffv1.Elsewhere) {
	own := s.cfg.About.ServerID
	blind := map[string]time.Duration{} // who does not reach the store goes on with what it signed before
	if s.cfg.Servers != nil {
		for _, o := range s.cfg.Servers.Others() {
			if !o.Live && !o.Row.Stopped {
				blind[o.Row.ID] = max(0, o.Row.Lease-o.Silent)
			}
		}
	}
	for _, a := range authorities {
		if a.Server == own && missing == nil {
			continue
		}
		given := x509
		if a.Kind == authority.JWT {
			given = jwt
		}
		end := lastOf(a)
		if given == 0 || !end.After(now) {
			continue
		}
		until := now.Add(blind[a.Server] + given)
		if end.Before(until) {
			until = end
		}
		i := slices.IndexFunc(out, func(e *cutoffv1.Elsewhere) bool { return e.Server == a.Server })
		if i < 0 {
			i = len(out)
			out = append(out, &cutoffv1.Elsewhere{Server: a.Server})
			if a.Server == own {
				out[i].Why = fault.MessageOf(missing)
			}
		}
		out[i].Until, out[i].NeverAfter = max(out[i].Until, rpc.Unix(until)), max(out[i].NeverAfter, rpc.Unix(end))
	}
	return out
}

// lastOf is when the last document ends that keys can have signed.
func lastOf(a registry.Authority) (end time.Time) {
	for _, slot := range a.Slots {
		last := slot.LastExpiry
		if last.IsZero() && slot.State == registry.SlotOld {
			last = slot.NotAfter
		}
		if last.After(end) {
			end = last
		}
	}
	return end
}
