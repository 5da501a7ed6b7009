package mirror

import (
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/reason"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Why says what a process is given and what keeps the rest away. It is for an
// operator; of it, only the reason's code may reach the process itself.
type Why struct {
	Grants []Fitting // whose selectors the process shows, the oldest first
	Near   []entry.NearMiss
	Sync   Sync
	// Reason is nil if there is an SVID to hand out and nothing is missing of it.
	Reason *fault.Error

	faint bool // another entry, of which only the server knows, may fit better than what Reason stands on
}

// Ready counts the identities that can be handed out now.
func (w Why) Ready() int {
	n := 0
	for _, g := range w.Grants {
		if g.State == Ready {
			n++
		}
	}
	return n
}

// State is how far a grant is from being handed out.
type State uint8

// The states of a grant that fits.
const (
	Ready    State = iota + 1 // its SVID is handed out
	Signing                   // its SVID is being signed, or is going to be
	Refused                   // the last attempt failed
	Ended                     // it has ended
	Shadowed                  // an older grant has the same hint
	Unfilled                  // a rule whose template a fact does not fill
)

// Fitting is a grant that fits a process.
type Fitting struct {
	GrantID   string
	ID        spiffeid.ID // zero for an unfilled rule
	Template  string      // of an unfilled rule
	State     State
	Reason    *fault.Error // why it is not Ready, or what it lacks
	ExpiresAt time.Time    // of its SVID; zero: there is none
	Next      time.Time    // when the next attempt is due; zero: none is planned
	Unknown   []spiffeid.TrustDomain
	By        string // the grant that shadows it
	FactsBy   string // of a rule: "agent" if its word is taken, "server" if that finds out
}

// Sync is how far the mirror is behind the server.
type Sync struct {
	Synced, Connected bool
	Position          *syncv1.Position
	Heard             time.Time     // when the server last said something; zero: never
	Skew              time.Duration // the server's clock less ours, if SkewKnown; delays count as skew
	SkewKnown         bool
	Err               error // why there is no conversation
}

// ledger is what the machine remembers for Why and Report alone.
type ledger struct {
	since        time.Time // the conversation began, or ended
	acknowledged time.Time
	heard        time.Time
	skew         time.Duration
	skewKnown    bool
	signing      error // why the last batch as a whole was not signed
	stream       error // why the last conversation ended
}

// hear takes note of a message and, if it carries one, of the server's clock.
func (l *ledger) hear(msg *syncv1.ServerMessage, now time.Time) {
	l.heard = now
	clock := max(msg.GetCurrent().GetClock(), msg.GetInventory().GetClock())
	if clock != 0 {
		l.skew, l.skewKnown = time.UnixMilli(clock).Sub(now), true
	}
}

// maxNear is how many near misses are told.
const maxNear = 20

// oldest holds the maxNear oldest of the grants that were added.
type oldest []*grant

func (o *oldest) add(g *grant) {
	byAge := func(a, b *grant) int { return entry.Oldest(&a.entry, &b.entry) }
	if len(*o) == maxNear && byAge(g, (*o)[maxNear-1]) > 0 {
		return
	}
	i, _ := slices.BinarySearchFunc(*o, g, byAge)
	*o = slices.Insert(*o, i, g)
	*o = (*o)[:min(len(*o), maxNear)]
}

// why looks at every grant once. Of those that miss one selector only a few are
// kept, rather such as have others that fit, so that it costs little more than to
// match. The selectors are normalised.
func (m *machine) why(facts entry.Facts, now time.Time) Why {
	var near []entry.Entry
	var strong, weak oldest
	for _, g := range m.grants {
		switch {
		case !g.usable || !entry.Nearly(g.entry.Selectors, facts.Selectors):
		case entry.Subset(g.entry.Selectors, facts.Selectors):
			near = append(near, g.entry)
		case g.entry.Expired(now):
		case len(g.entry.Selectors) > 1:
			strong.add(g)
		default:
			weak.add(g)
		}
	}
	for _, g := range append(strong, weak[:min(len(weak), maxNear-len(strong))]...) {
		near = append(near, g.entry)
	}
	_, trace := entry.Match(near, facts, now)
	w := Why{Near: trace.Near, Sync: m.inSync()}
	for _, matched := range trace.Matched {
		w.Grants = append(w.Grants, m.fitting(matched, now))
	}
	for _, s := range trace.Shadowed {
		w.Grants = append(w.Grants, Fitting{GrantID: s.GrantID, ID: s.ID, State: Shadowed, By: s.By})
	}
	for _, id := range trace.Expired {
		e := &m.grants[id].entry
		w.Grants = append(w.Grants, Fitting{GrantID: id, ID: e.SPIFFEID, State: Ended,
			Reason: reason.Say(reason.GrantExpired, "the grant ended at %s", e.ExpiresAt.Format(time.RFC3339))})
	}
	for _, bad := range trace.Facts {
		said, row := bad.Fault(), reason.RuleFactInvalid
		if bad.Reason == entry.FactMissing {
			row = reason.RuleFactMissing
		}
		w.Grants = append(w.Grants, Fitting{GrantID: bad.GrantID, Template: bad.Template, State: Unfilled,
			Reason: reason.Say(row, "%s", said.Message).Fix("%s", said.Remedy)})
	}
	for i := range w.Grants {
		if rule := m.grants[w.Grants[i].GrantID].entry.Rule; rule != nil {
			w.Grants[i].FactsBy = rule.FactsBy()
		}
	}
	w.Reason, w.faint = m.verdict(&w)
	return w
}

// fitting says how far one grant that matches has come.
func (m *machine) fitting(matched entry.Matched, now time.Time) Fitting {
	g := m.grants[matched.GrantID]
	p := g.find(matched.Facts)
	if p == nil {
		p = &pair{} // of a rule, and nobody has asked for it yet
	}
	f := Fitting{GrantID: matched.GrantID, ID: matched.ID, State: Signing}
	for _, td := range g.entry.FederatesWith {
		if t := m.bundles[td.Name()]; td != m.td && (t == nil || t.empty()) {
			f.Unknown = append(f.Unknown, td)
		}
	}
	switch {
	case p.cert.usable(now):
		f.State, f.ExpiresAt, f.Next = Ready, p.cert.expiresAt, p.cert.renewAt
		if len(f.Unknown) > 0 {
			f.Reason = reason.Say(reason.FederatedBundleMissing, "the grant federates with %s, whose keys are not known", f.Unknown[0].Name())
		}
	case p.err == nil && m.ledger.signing != nil:
		f.Reason = reason.Say(reason.NotSignedYet, "the server did not sign: %s", fault.MessageOf(m.ledger.signing))
		f.Next = m.signNotYet
		if byClock(m.ledger.signing) {
			f.Reason = reason.Say(reason.ClockSkew, "by this machine's clock the server's own certificate is not valid")
		}
	case p.err == nil:
		f.Reason = reason.NotSignedYet
	default:
		f.State, f.Next = Refused, p.notYet
		switch {
		case errors.Is(p.err, reason.ClockSkew):
			f.Reason, _ = errors.AsType[*fault.Error](p.err)
		case p.denied:
			f.Reason = reason.Say(reason.SigningRefused, "the server refuses to sign: %s (%s)", fault.MessageOf(p.err), fault.ReasonOf(p.err))
		default:
			f.Reason = reason.Say(reason.NotSignedYet, "what the server signed is not used: %s", fault.MessageOf(p.err))
		}
	}
	return f
}

// verdict picks the one reason that stands for all: what is nearest to an SVID
// wins. faint tells that hardly anything speaks for it.
func (m *machine) verdict(w *Why) (verdict *fault.Error, faint bool) {
	if !m.synced {
		if byClock(m.ledger.stream) {
			return reason.Say(reason.ClockSkew, "by this machine's clock the server's own certificate is not valid"), false
		}
		return reason.NotSynced, false
	}
	for _, state := range []State{Ready, Signing, Refused, Ended, Unfilled} {
		for _, g := range w.Grants {
			if g.State == state && (g.Reason != nil || state == Ready) {
				if state == Ready {
					return w.lacking(), false
				}
				return g.Reason, false
			}
		}
	}
	for _, strong := range []bool{true, false} {
		for _, n := range w.Near {
			others := len(m.grants[n.GrantID].entry.Selectors) > 1
			if others == strong && (others || len(n.Have) > 0) {
				return mismatch(n), !strong
			}
		}
	}
	return reason.NoGrant, true
}

// lacking is what is missing of an identity that is handed out, if anything.
func (w *Why) lacking() *fault.Error {
	for _, g := range w.Grants {
		if g.State == Ready && g.Reason != nil {
			return g.Reason
		}
	}
	return nil
}

func mismatch(n entry.NearMiss) *fault.Error {
	if len(n.Have) == 0 {
		return reason.Say(reason.SelectorMismatch, "the grant %s asks for %s, and the process shows nothing of the kind", n.GrantID, n.Missing)
	}
	return reason.Say(reason.SelectorMismatch, "the grant %s asks for %s, and the process shows %s", n.GrantID, n.Missing, n.Have[0])
}

// byClock reports whether an error comes from a certificate that is not yet or
// no longer valid by our clock.
func byClock(err error) bool {
	invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
	return ok && invalid.Reason == x509.Expired
}
