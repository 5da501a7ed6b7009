package serverapi

import (
	"context"
	"crypto/sha256"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/peer"
)

// caller is who makes one request.
type caller struct {
	kinds   kinds
	id      spiffeid.ID // zero for strangers and on the admin socket
	serial  string
	expiry  time.Time
	link    *link
	refusal error // why an agent counts for nothing, if it does
}

// name is how logs, batches and the audit trail name the caller.
func (c caller) name() string {
	switch {
	case c.kinds&kindLocal != 0:
		return c.link.local
	case !c.id.IsZero():
		return c.id.String()
	}
	return "unauthenticated"
}

// key is by what the caller's share is counted (R100).
func (c caller) key() string {
	if c.id.IsZero() || c.kinds&(kindBanned|kindExpired) != 0 {
		return addressKey(c.link.address)
	}
	return c.id.String()
}

// presented is the certificate with which an agent calls.
func (c caller) presented() nodes.Presented {
	key := sha256.Sum256(c.link.leaf.RawSubjectPublicKeyInfo)
	return nodes.Presented{ID: c.id, Serial: c.serial, Expiry: c.expiry, KeyHash: key[:], Address: c.link.address}
}

type callerKey struct{}

// callerFrom returns the caller that admit put there. Handlers run behind admit
// only, so its absence is a bug.
func callerFrom(ctx context.Context) caller { return ctx.Value(callerKey{}).(caller) }

// identify says who calls, from the connection and from the rows as they are
// now: a ban or an eviction shows at the next request.
func (s *Server) identify(ctx context.Context, now time.Time) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, fault.New(fault.Unauthenticated, "peer_unknown", "the connection has no peer")
	}
	l, ok := p.AuthInfo.(*link)
	if !ok {
		return caller{}, fault.New(fault.Unauthenticated, "peer_unknown", "the connection has no peer")
	}
	c := caller{link: l}
	switch {
	case l.local != "":
		c.kinds = kindLocal
		return c, nil
	case l.leaf == nil:
		c.kinds = kindNone
		return c, nil
	}
	if err := s.verify(l, now); err != nil {
		return caller{}, err
	}
	c.id, c.serial, c.expiry = l.id, l.leaf.SerialNumber.String(), l.leaf.NotAfter
	if identity.IsAgent(c.id) && c.id.MemberOf(s.cfg.TrustDomain) {
		c.kinds, c.refusal = s.agentKind(ctx, c)
	} else if now.Before(c.expiry) {
		c.kinds = kindWorkload | s.grantedKinds(c.id, now)
	} else {
		c.kinds, c.refusal = kindExpired, fault.New(fault.Denied, "svid_expired", "the caller's certificate has expired")
	}
	if c.refusal == nil && s.admins[c.id] {
		c.kinds |= kindAdmin
	}
	return c, nil
}

func (s *Server) agentKind(ctx context.Context, c caller) (kinds, error) {
	err := s.cfg.Nodes.Authenticate(ctx, c.presented())
	switch {
	case err == nil:
		return kindAgent, nil
	case fault.ReasonOf(err) == nodes.ReasonBanned:
		return kindBanned, err
	}
	return kindExpired, err
}

// grantedKinds is what the entries of an identity of ours add to it.
func (s *Server) grantedKinds(id spiffeid.ID, now time.Time) kinds {
	var k kinds
	if !id.MemberOf(s.cfg.TrustDomain) {
		return 0
	}
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		for _, e := range snap.List(registry.Filter{SPIFFEID: &id}, "", 0) {
			if e.Expired(now) {
				continue
			}
			if e.Admin {
				k |= kindAdmin
			}
			if e.Downstream {
				k |= kindDownstream
			}
		}
	})
	return k
}

// refused is the error for a caller that a rule does not name.
func (c caller) refused() error {
	if c.refusal != nil {
		return c.refusal
	}
	if c.kinds == kindNone {
		return fault.New(fault.Denied, "identity_required", "this call needs a client certificate of the trust domain").
			Fix("attest first, or use the admin socket")
	}
	return fault.New(fault.Denied, "not_allowed", "%s may not make this call", c.name())
}
