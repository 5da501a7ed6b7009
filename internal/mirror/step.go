package mirror

import (
	"iter"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// event is what happened. now carries no monotonic part, so that comparisons
// see suspends and clock changes; seed feeds all jitter of the step.
type event struct {
	now  time.Time
	seed uint64
	what any // connected, disconnected, *syncv1.ServerMessage, signed, signFailed, tick
}

type (
	connected    struct{}
	disconnected struct{ err error } // nil: it was we who ended it
	tick         struct{}
	signFailed   struct{ err error } // a batch as a whole, such as a server that cannot be reached
)

// effects is what to do after a step.
type effects struct {
	send       []*syncv1.AgentMessage
	resync     string // not empty: open the stream anew, for this reason
	sign       []want // not empty: have these signed; one batch at a time
	wake       []*group
	directives []*syncv1.Directive
	notes      []note
	keysGone   bool           // JWT authorities went away or are tainted
	changed    bool           // what would be kept is another
	narrowed   bool           // something that was kept may not be used any more
	own        *bundle.Bundle // not nil: the own trust domain's bundle is new
}

// note is something that an operator should see.
type note struct {
	message, id, reason string
	count               int
}

// want asks for the signature of one SVID.
type want struct {
	grantID  string
	facts    map[string]string // of a rule
	id       spiffeid.ID
	revision uint64
}

// machine is the mirror's whole state. Only step and the methods of this
// package's pure files touch it; run.go guards it.
type machine struct {
	td        spiffeid.TrustDomain
	cacheSize int
	version   string // of the agent, for the server's records
	keeps     bool   // bodies are remembered as they came

	// What the server said, and the sum over it.
	position *syncv1.Position
	sum      entry.Sum
	grants   map[string]*grant
	bundles  map[string]*trust // by trust domain name
	synced   bool

	// The exchange under way on the stream.
	online      bool
	following   bool      // something was acknowledged on the stream
	behindSince time.Time // the server says less than another did before
	inventory   *inventory
	parts       [][]byte
	partsSize   int
	statusAt    time.Time
	first, told [2]end // what ends first, X.509 and JWT; as the server was told
	toldAt      time.Time

	// Signing.
	keyType      keys.Type
	full         bool // subscribers have more than the cache has room for
	signing      bool
	signFailures int
	signNotYet   time.Time // after a failed batch
	signWait     time.Duration

	groups map[string]*group
	ledger ledger
	steps  uint64    // in which something happened
	now    time.Time // of the last step
	// next is when something is due without an event from outside.
	next time.Time
}

func newMachine(td spiffeid.TrustDomain, cacheSize int, version string) *machine {
	if cacheSize <= 0 {
		cacheSize = DefaultCacheSize
	}
	return &machine{td: td, cacheSize: cacheSize, version: version, keyType: keys.ECP256,
		grants: map[string]*grant{}, bundles: map[string]*trust{}, groups: map[string]*group{}}
}

// step applies one event and says what to do.
func (m *machine) step(ev event) effects {
	var fx effects
	dirty := map[*group]bool{}
	if ev.what != any(tick{}) {
		m.steps++
	}
	switch what := ev.what.(type) {
	case connected:
		m.ledger.since = ev.now
		m.hello(&fx)
	case disconnected:
		if m.online {
			m.ledger.since = ev.now
		}
		m.hangUp()
		m.ledger.stream = what.err
	case *syncv1.ServerMessage:
		m.receive(what, ev, dirty, &fx)
	case signed:
		m.accept(what, ev, dirty, &fx)
	case signFailed:
		m.signing, m.ledger.signing = false, what.err
		m.signFailures++
		for p := range m.pairs() {
			if p.signing && m.signFailures == signAway {
				markGroups(p, dirty) // whoever waits for it need not any more
			}
			p.signing = false
		}
		m.signWait = max(backoff(m.signFailures, signFloor, signCeiling, ev.seed, 0), fault.AfterOf(what.err))
		m.signNotYet = ev.now.Add(m.signWait)
	}
	if ev.now.Before(m.now) { // the clock was put back: what had ended may not have (R107)
		for _, g := range m.groups {
			m.rematch(g, ev.now)
			dirty[g] = true
		}
	}
	m.now = ev.now
	m.expire(ev.now, dirty)
	m.plan(ev, &fx)
	m.status(ev.now, &fx)
	fx.wake = inOrder(dirty)
	return fx
}

func (m *machine) status(now time.Time, fx *effects) {
	if !m.online || !m.synced || !due(m.statusDue(now), now, statusInterval) {
		return
	}
	m.statusAt, m.told, m.toldAt = now.Add(statusInterval), m.first, now
	st := m.stats()
	fx.send = append(fx.send, &syncv1.AgentMessage{Message: &syncv1.AgentMessage_Status{Status: &syncv1.Status{
		Grants: uint32(st.Grants), X509Svids: uint32(st.X509SVIDs), Subscribers: uint32(st.Subscribers), Clock: now.UnixMilli(),
		SaysEnds: true, FirstX509: m.first[0].wire(), FirstJwt: m.first[1].wire(),
	}}})
}

// statusDue is when the server is told how we are: now and then, and soon when
// something else ends first than it knows.
func (m *machine) statusDue(now time.Time) time.Time {
	next := m.statusAt
	for i, f := range m.first {
		if f == m.told[i] {
			continue
		}
		at := m.toldAt.Add(tellSpacing)
		part := max(f.at-now.UnixMilli(), 0) / tellOff
		if off := max(f.at, m.told[i].at) - min(f.at, m.told[i].at); off > part {
			at = m.toldAt.Add(min(tellSoon, time.Duration(part)*time.Millisecond))
		}
		if at.Before(next) {
			next = at
		}
	}
	return next
}

// end is what is handed out until a moment, Unix milliseconds. Zero: there is none.
type end struct {
	id spiffeid.ID
	at int64
}

// add takes note of what is handed out until then.
func (e *end) add(id spiffeid.ID, until time.Time) {
	if at := until.UnixMilli(); e.at == 0 || at < e.at || at == e.at && id.String() < e.id.String() {
		*e = end{id, at}
	}
}

func (e end) wire() *syncv1.End {
	if e.at == 0 {
		return nil
	}
	return &syncv1.End{SpiffeId: e.id.String(), At: e.at}
}

func (m *machine) stats() Stats {
	st := Stats{Grants: len(m.grants), Synced: m.synced, Following: m.following}
	for p := range m.pairs() {
		if p.cert != nil {
			st.X509SVIDs++
		}
	}
	for _, g := range m.groups {
		st.Subscribers += g.refs
	}
	if b := m.own(); b != nil {
		st.BundleSequence = b.bundle.Sequence
	}
	return st
}

// pairs yields all pairs, in no order.
func (m *machine) pairs() iter.Seq[*pair] {
	return func(yield func(*pair) bool) {
		for _, g := range m.grants {
			if g.usable && g.entry.Rule == nil && !yield(&g.own) {
				return
			}
			for _, p := range g.ruled {
				if !yield(p) {
					return
				}
			}
		}
	}
}

// own returns the own trust domain's bundle, or nil.
func (m *machine) own() *trust { return m.bundles[m.td.Name()] }

// goodKey reports whether tokens of that key may be handed out.
func (m *machine) goodKey(keyID string) bool {
	own := m.own()
	return own != nil && own.goodKey(keyID)
}
