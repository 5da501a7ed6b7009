package lifetime

import (
	"slices"
	"time"
)

// Kind is a kind of document that a server signs.
type Kind string

// The kinds.
const (
	X509       Kind = "x509" // an X.509-SVID
	JWT        Kind = "jwt"
	Agent      Kind = "agent"      // an agent's certificate
	Server     Kind = "server"     // the server's own certificate
	CA         Kind = "ca"         // an authority of the server
	Downstream Kind = "downstream" // an authority of a server below
)

// The names of limits, besides the keys of the configuration ("agent_ttl") and the
// lifetimes of an entry ("x509_svid_ttl", "jwt_svid_ttl"). They are stable.
const (
	BuiltIn        = "default"               // nothing is configured
	SurviveOutage  = "survive_outage"        // derived from what is promised
	ReattestPeriod = "agent_reattest_period" // of agents that prove their node again
	Requested      = "requested"             // by who asks: a mint's, or a downstream server's
	EntryEnd       = "entry_expiry"
	AuthorityEnd   = "authority_end" // of the authority that signs
	UpstreamEnd    = "upstream_end"  // of what is above that authority
)

// Asked is what bounds a document besides the lifetimes of the server. What is
// zero does not.
type Asked struct {
	Entry     time.Duration // as the entry has it, in place of the server's
	Requested time.Duration // in place of the server's; of an authority below, beside it
	Reattest  time.Duration // for an agent that proves its node again
	EntryEnd  time.Time
	Authority time.Time // when the authority that signs ends
	Upstream  time.Time // when the first certificate above that one ends
}

// Limit is one of the bounds of a lifetime.
type Limit struct {
	Name string
	Life time.Duration // from the moment of signing; 0: the end is a moment of its own
	End  time.Time     // in whole seconds, which is what documents can say
}

// Decide returns what limits a document that is signed now, the earliest end
// first: that is when it ends. Of equal ones the more particular is first.
func (s Set) Decide(kind Kind, a Asked, now time.Time) []Limit {
	limits := make([]Limit, 0, 6)
	life := func(name string, d time.Duration) {
		limits = append(limits, Limit{name, d, now.Add(d).UTC().Truncate(time.Second)})
	}
	until := func(name string, end time.Time) {
		if !end.IsZero() {
			limits = append(limits, Limit{name, 0, end.UTC().Truncate(time.Second)})
		}
	}
	if a.Requested != 0 {
		life(Requested, a.Requested)
	}
	if a.Reattest != 0 {
		life(ReattestPeriod, a.Reattest)
	}
	switch name, d := s.own(kind); {
	case a.Entry != 0:
		life(string(kind)+"_svid_ttl", a.Entry)
	case a.Requested == 0 || kind == Downstream:
		life(name, d)
	}
	until(EntryEnd, a.EntryEnd)
	until(AuthorityEnd, a.Authority)
	until(UpstreamEnd, a.Upstream)
	slices.SortStableFunc(limits, func(a, b Limit) int { return a.End.Compare(b.End) })
	return limits
}

// own is the lifetime that the server has for a kind, and where it is from.
func (s Set) own(kind Kind) (name string, life time.Duration) {
	var named time.Duration
	switch kind {
	case X509, Server:
		name, named, life = "default_x509_svid_ttl", s.Named.X509, s.X509
	case JWT:
		name, named, life = "default_jwt_svid_ttl", s.Named.JWT, s.JWT
	case Agent:
		name, named, life = "agent_ttl", s.Named.Agent, s.Agent
		if named == 0 && s.Outage == 0 {
			name, named = "default_x509_svid_ttl", s.Named.X509
		}
	case CA, Downstream:
		name, named, life = "ca_ttl", s.Named.CA, s.CA
	}
	switch {
	case named != 0:
		return name, life
	case s.Outage != 0:
		return SurviveOutage, life
	}
	return BuiltIn, life
}
