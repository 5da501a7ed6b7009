// Package agentid keeps the agent's own identity: it decides when to ask for
// the trust domain's roots, when to attest, when to renew, and when only an
// operator can help. It talks to nobody itself: step.go decides, run.go has the
// agent role do what was decided, one job at a time.
//
// What must always hold: an SVID that is good is never given up for an attempt
// to get another (R54); every state has a way out that needs nobody, or ends
// with a sentence that says what an operator has to do; a wrong clock costs
// nothing that is not there again when the clock is right (R107); a sleep of any
// length is noticed when it ends (R57); all waits are spread (R110).
package agentid

import (
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Reasons that decide what the agent does about itself, as servers and serverlink give them.
const (
	ReasonExpired      = "agent_expired"
	ReasonNotAttested  = "agent_not_attested"
	ReasonNotActive    = "agent_not_active"
	ReasonMustReattest = "agent_must_reattest"
	ReasonBanned       = "agent_banned"
	ReasonUntrusted    = "server_untrusted"  // what answers shows no root that is held
	ReasonWrongRoot    = "ticket_wrong_root" // the same, judged by a ticket
	ReasonClock        = "clock_skew"        // it would, at another time than our clock shows
	ReasonRefused      = "svid_refused"      // the server signed what our clock or bundle refuses
	ReasonNotStored    = "state_not_stored"  // nothing was changed
	ReasonGone         = "authority_gone"    // the own SVID's authority left the bundle
	ReasonSuperseded   = "bundle_superseded" // the configured source offers only roots that were dropped
)

// Waits. All are spread over their upper half.
const (
	attestFloor   = time.Second
	attestCeiling = 30 * time.Second
	renewFloor    = 250 * time.Millisecond
	renewCeiling  = 30 * time.Second
	windowMost    = 24 * time.Hour   // for which a directive may spread
	soon          = 10 * time.Second // a stored SVID past its half is renewed within this time
)

// DefaultRebootstrapDelay is how long an agent whose SVID is in its first half
// sees a server that it does not trust before it asks the configured source for
// other roots.
const DefaultRebootstrapDelay = 10 * time.Minute

// Mode says whether the configured source of roots is asked again after the
// agent has learnt roots from the server.
type Mode string

// The modes, as rebootstrap_mode spells them.
const (
	Never Mode = "never"
	Auto  Mode = "auto" // at once if the agent has to renew or to attest anyway, else after the delay
)

// Settings is what the configuration says.
type Settings struct {
	// Source says that there is a source of roots that may be asked more than once.
	Source           bool
	Rebootstrap      Mode
	RebootstrapDelay time.Duration
	// Remedy is what an operator has to do before the node can attest (again).
	Remedy string
}

// Own is an SVID of the agent's own.
type Own struct {
	ID                  spiffeid.ID
	KeyID               string
	Serial              string
	NotBefore, NotAfter time.Time
	Repeatable          bool // it is renewed by attesting again
	Stored              bool // it is from an earlier life
}

// Kind is a kind of job.
type Kind uint8

// The jobs that the agent role does, one at a time.
const (
	None      Kind = iota
	Bootstrap      // ask the configured source for the trust domain's roots
	Attest         // prove the node, over a connection of its own that shows no SVID
	Renew          // get another SVID, on the strength of the one in use
	Save           // store the bundle
)

// String returns the job's name in logs.
func (k Kind) String() string {
	return [...]string{"none", "bootstrap", "attest", "renew", "save"}[k]
}

// Job is one thing to do.
type Job struct {
	Kind Kind
	// NewKey asks for a key that no server has seen; else the key of an attempt
	// whose answer was lost is used again, so that it is the same attempt (K18).
	NewKey bool
	// Probe asks to look at the server before anything is proved to it: with a wrong
	// clock no server is ours, and one-time evidence is not to be spent on that.
	Probe bool
	// Volatile allows to use what cannot be stored: without it the agent would soon
	// be without an SVID.
	Volatile bool
}

// Event is what happened.
type Event struct {
	Now  time.Time     // wall clock, without a monotonic part
	Boot time.Duration // since some moment, sleep included, whatever the wall clock does
	Seed uint64        // feeds all jitter of the step
	What any           // one of the types below
}

// What may happen.
type (
	// Tick is when something may be due.
	Tick struct{}
	// Slept is the end of a suspend.
	Slept struct{}
	// Done is the outcome of the job. Own is set by a good Attest or Renew.
	Done struct {
		Kind Kind
		Own  *Own
		Err  error
	}
	// Ended is why a conversation, in which the SVID with that serial was shown,
	// could not be opened or broke.
	Ended struct {
		Serial string
		Err    error
	}
	// Accepted is a conversation with a server that accepts the SVID.
	Accepted struct{}
	// BundleChanged says how the authority of the own SVID stands in a new bundle.
	BundleChanged struct{ Authority Standing }
	// Renewal is the server's wish that the SVID be renewed within that time.
	Renewal struct{ Within time.Duration }
	// Reattestation is the server's wish that the node prove itself again.
	Reattestation struct{ Reason string }
	// Reconnection is the server's wish that the agent go to that address, or dial
	// the same again.
	Reconnection struct {
		Address string
		Within  time.Duration
	}
)

// Standing is how an authority stands in a bundle.
type Standing uint8

// The standings.
const (
	Held Standing = iota
	Tainted
	Gone
)

// Effects is what to do after a step, in the order of the fields.
type Effects struct {
	Notes   []Note
	Redial  bool          // open a new connection
	Address string        // where; empty: as before
	Job     Job           // to be started if its Kind is not None
	Stop    error         // the agent cannot go on by itself
	Forget  bool          // and its SVID must not come back
	Wait    time.Duration // until something is due
}

// Note is something that an operator should see.
type Note struct {
	Message string
	Warn    bool
	Err     error         // may be nil
	Next    time.Duration // until the next attempt; 0: none
}

// stopped is why an agent that was let in before cannot go on.
func stopped(err error, remedy string) error {
	return fault.New(fault.Precondition, fault.ReasonOf(err), "the server does not accept this agent any more").Fix("%s", remedy).Because(err)
}
