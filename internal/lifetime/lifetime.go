// Package lifetime is the arithmetic of how long credentials live: from one
// number, the outage that identities must survive, to all lifetimes and back. It
// decides which sets of lifetimes keep a promise, when a document ends and what
// limited it; who signs and who explains ask the same function. It has no clock
// and signs nothing.
//
// What must always hold: of a set that Resolve accepts, everything that is
// renewed has at least the promised time left at any moment, also while a new
// authority waits for those who are silent; and nothing outlives its authority
// for longer than it was cut to (R8).
package lifetime

import (
	"cmp"
	"fmt"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

const (
	// keeps is the part of a life, in hundredths, that is left at the latest
	// renewal: it is due at half of the life, a tenth of that later at most, and
	// five hundredths of the life are for a renewal that has to be tried again.
	keeps = 40
	// perAuthority is how many lives fit into an authority's: a new authority signs
	// when a twelfth of the old one's life is left, however many are silent.
	perAuthority = 12
	// Most is the longest life that no change of authority cuts short: half a week,
	// at most, before its end an authority has been replaced.
	Most = 7 * 24 * time.Hour / 2
	// MostOutage is the longest outage that can be promised, LeastOutage the shortest:
	// agents hand nothing out in the last seconds of its life, and below a minute these
	// would count.
	MostOutage  = Most * keeps / 100
	LeastOutage = time.Minute
)

// Defaults, where neither a key nor a promise says otherwise.
const (
	DefaultCA   = 24 * time.Hour
	DefaultX509 = time.Hour
	DefaultJWT  = 5 * time.Minute
)

// Wish is what the configuration names; what is zero is derived.
type Wish struct {
	Outage               time.Duration // survive_outage
	CA, X509, JWT, Agent time.Duration
}

// Set is every lifetime of a server. Outage is zero if nothing is promised.
type Set struct {
	Outage               time.Duration
	CA, X509, JWT, Agent time.Duration

	Named Wish // of these, what the configuration names
}

// Left is the least that is left at any moment of something that lives so long
// and is renewed in time.
func Left(life time.Duration) time.Duration { return life * keeps / 100 }

// For is the shortest life, in whole seconds, of which at least that much is always left.
func For(left time.Duration) time.Duration {
	life := (left*100 + keeps - 1) / keeps
	return (life + time.Second - 1).Truncate(time.Second)
}

// Resolve fills in what is not named. With an outage to survive, each lifetime
// that is named must be long enough for it: the errors, one for each that is
// not, are fault.Invalid and name the configuration's key.
func (w Wish) Resolve() (Set, []error) {
	s := Set{Outage: w.Outage, CA: w.CA, X509: cmp.Or(w.X509, DefaultX509), JWT: cmp.Or(w.JWT, DefaultJWT), Named: w}
	if w.Outage == 0 {
		s.Agent, s.CA = cmp.Or(w.Agent, s.X509), cmp.Or(w.CA, DefaultCA)
		return s, nil
	}
	if w.Outage < LeastOutage || w.Outage > MostOutage {
		return s, []error{fault.New(fault.Invalid, "config_invalid", "server.survive_outage: %s is not between %s and %s", w.Outage, Text(LeastOutage), Text(MostOutage))}
	}
	least := For(w.Outage)
	s.X509, s.JWT, s.Agent = cmp.Or(w.X509, least), cmp.Or(w.JWT, least), cmp.Or(w.Agent, least)
	longest := max(s.X509, s.JWT, s.Agent)
	s.CA = cmp.Or(w.CA, perAuthority*longest)
	var faults []error
	for _, key := range []struct {
		name  string
		value time.Duration
	}{{"default_x509_svid_ttl", s.X509}, {"default_jwt_svid_ttl", s.JWT}, {"agent_ttl", s.Agent}} {
		if key.value < least {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid",
				"server.%s: %s is too short for survive_outage = %q: when it is renewed late, %s is left; it must be %s or longer",
				key.name, Text(key.value), Text(w.Outage), Text(Left(key.value)), Text(least)).Fix("make it longer, or leave it out"))
		}
	}
	switch {
	case longest > Most:
		faults = append(faults, fault.New(fault.Invalid, "config_invalid",
			"server.survive_outage: a lifetime of %s may be cut short by a change of authority; the longest that never is is %s", Text(longest), Text(Most)))
	case s.CA < perAuthority*longest:
		faults = append(faults, fault.New(fault.Invalid, "config_invalid",
			"server.ca_ttl: %s is too short for survive_outage = %q: a lifetime of %s may be cut to a twelfth of it; it must be %s or longer",
			Text(s.CA), Text(w.Outage), Text(longest), Text(perAuthority*longest)).Fix("make it longer, or leave it out"))
	}
	return s, faults
}

// CheckGrant refuses lifetimes of an entry or a rule that break the promise; zero
// is the default's. Entries that end are not judged: that is their purpose.
func (s Set) CheckGrant(x509, jwt time.Duration) error {
	if s.Outage == 0 {
		return nil
	}
	least := For(s.Outage)
	for _, ttl := range []struct {
		name  string
		value time.Duration
	}{{"x509_svid_ttl", x509}, {"jwt_svid_ttl", jwt}} {
		if ttl.value == 0 {
			continue
		}
		if ttl.value < least {
			return fault.New(fault.Invalid, "ttl_breaks_promise",
				"%s: %s is too short, because this server promises that identities survive an outage of %s: it must be %s or longer",
				ttl.name, Text(ttl.value), Text(s.Outage), Text(least)).Fix("make it longer, or leave it out; server.survive_outage is the promise")
		}
		if most := min(Most, s.CA/perAuthority); ttl.value > most {
			return fault.New(fault.Invalid, "ttl_breaks_promise",
				"%s: %s is too long, because a change of authority may cut it short: it must be %s or shorter", ttl.name, Text(ttl.value), Text(most)).
				Fix("make it shorter, or server.ca_ttl longer")
		}
	}
	return nil
}

// Text writes a duration without the zeros that Go appends: 20h, not 20h0m0s.
func Text(d time.Duration) string {
	switch {
	case d >= time.Hour && d%time.Hour == 0:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d >= time.Minute && d%time.Minute == 0 && d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	}
	return d.String()
}
