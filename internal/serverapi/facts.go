package serverapi

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of looking at what agents state.
const (
	turnWait    = 3 * time.Second // for those of the same agent that came before
	lookWait    = 6 * time.Second // for an answer of the platform, and its own queue
	refusalLife = 2 * time.Second // of an answer by which something is refused
	maxSeen     = 50_000          // things remembered, some 1 KB each
	maxSeenOf   = 1000            // of one agent
	maxLooks    = 500             // of one agent under way
	maxAtOnce   = 16              // of them, calls to the platform
)

// looks finds out, once for each thing on each node, whether what agents state is
// true, and remembers it for the life of an SVID. Of refusals it remembers only
// for a moment that they were made, so that what has just become true is seen.
type looks struct {
	ctx  context.Context // of the looks under way; ends with stop
	stop context.CancelFunc
	wg   sync.WaitGroup

	guard *rpc.Guard

	// mu guards everything below.
	mu     sync.Mutex
	agents map[spiffeid.ID]*agentLooks
	held   int // in all of them
	sweep  time.Time
}

type agentLooks struct {
	things  map[thing]*looked
	running int
	slots   chan struct{} // for calls to the platform
}

// thing is the hash of the facts that say which one is meant, and of the node.
type thing [sha256.Size]byte

// looked is one thing: what is known of it, and the look that is under way.
type looked struct {
	known   *look // nil: nothing
	running *look // nil: none
	until   time.Time
}

// look is one question to the platform.
type look struct {
	done chan struct{} // closed when the fields below are set
	at   time.Time     // when it ended
	seen nodeattest.Seen
	err  error
}

func newLooks(guard *rpc.Guard) *looks {
	l := &looks{agents: map[spiffeid.ID]*agentLooks{}, guard: guard}
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l
}

// close ends what is under way and waits for that.
func (l *looks) close() {
	l.mu.Lock() // nobody begins one more
	l.stop()
	l.mu.Unlock()
	l.wg.Wait()
}

// claim is what an agent wants to be believed.
type claim struct {
	agent   spiffeid.ID
	node    registry.Node // its row
	rule    entry.Entry
	facts   map[string]string // exactly those that an agent states for the rule
	checker nodeattest.FactChecker
	life    time.Duration // of the SVID: for as long it is believed
}

// thing names what the claim is about. A node that attests as another one makes
// all of it another.
func (c *claim) thing() thing {
	var b []byte
	part := func(s string) {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	for _, name := range []string{entry.FactNamespace, entry.FactPod, entry.FactPodUID} {
		part(c.facts[name])
	}
	part(c.node.AttestationType)
	for _, s := range c.node.Selectors {
		part(s.String())
	}
	return sha256.Sum256(b)
}

// judge holds what was seen against what is claimed: the facts, and what the rule
// asks for as far as the platform knows it.
func (c *claim) judge(seen *nodeattest.Seen) error {
	for name, value := range c.facts {
		if seen.Facts[name] != value {
			return fault.New(fault.Denied, "rule_facts_refuted", "the platform does not say that %s is %q", name, value).
				Fix("see what 'plastron agent why' says of the process; an agent that goes on stating it may be compromised")
		}
	}
	for _, s := range c.rule.Selectors {
		if s.Verifiable() && !entry.Subset([]entry.Selector{s}, seen.Selectors) {
			return fault.New(fault.Denied, "rule_facts_refuted", "the platform does not say that %s holds of the process", s).
				Fix("see what 'plastron agent why' says of the process; an agent that goes on stating it may be compromised")
		}
	}
	return nil
}

// holds reports whether the answer can still be given to the claim.
func (k *look) holds(c *claim, now time.Time) bool {
	if now.Before(k.at) { // the clock was put back
		return false
	}
	age := now.Sub(k.at)
	if k.err != nil || c.judge(&k.seen) != nil {
		return age < refusalLife
	}
	return age < c.life && (k.seen.Until.IsZero() || now.Before(k.seen.Until))
}

// begin returns a look that answers the claim: one that was had, one that is under
// way, or a new one.
func (l *looks) begin(c *claim, now time.Time) (*look, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sweepLocked(now)
	mine := l.agents[c.agent]
	if mine == nil {
		mine = &agentLooks{things: map[thing]*looked{}, slots: make(chan struct{}, maxAtOnce)}
		l.agents[c.agent] = mine
	}
	what := c.thing()
	one := mine.things[what]
	switch {
	case one == nil:
	case one.known != nil && one.known.holds(c, now):
		return one.known, nil
	case one.running != nil:
		return one.running, nil
	}
	if mine.running >= maxLooks || l.ctx.Err() != nil {
		return nil, fault.New(fault.Unavailable, entry.FactsUnavailable, "the server is finding out about %d other processes of this agent", mine.running)
	}
	if one == nil {
		l.roomLocked(mine, now)
		one = &looked{}
		mine.things[what] = one
		l.held++
	}
	k := &look{done: make(chan struct{})}
	one.running = k
	mine.running++
	claimed := *c
	l.wg.Go(func() { l.look(&claimed, mine, one, k) })
	return k, nil
}

// look asks the platform. Whoever began it may have gone: others wait for it too.
func (l *looks) look(c *claim, mine *agentLooks, one *looked, k *look) {
	ctx, cancel := context.WithTimeout(l.ctx, turnWait)
	defer cancel()
	var seen nodeattest.Seen
	var err error
	select {
	case mine.slots <- struct{}{}:
		// Who has waited for its turn still has all the time for its answer: or else,
		// when the platform is slow, no question that was asked would be of use.
		var done context.CancelFunc
		ctx, done = context.WithTimeout(l.ctx, lookWait)
		defer done()
		_, err = l.guard.Contain("Look", func() (_ any, err error) { // R99: no caller's guard is around this goroutine
			seen, err = c.checker.Look(ctx, c.node.Selectors, c.facts)
			return nil, err
		})
		<-mine.slots
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		err = c.failed(ctx, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	k.seen, k.err, k.at = seen, err, time.Now().Round(0)
	close(k.done)
	mine.running--
	one.running = nil
	// What cannot be seen now may have been seen before, and that still counts.
	if keeps := fault.KindOf(err) == fault.Unavailable && one.known != nil && one.known.err == nil; !keeps {
		one.known, one.until = k, k.at.Add(refusalLife)
		if err == nil {
			one.until = k.at.Add(c.life)
		}
	}
}

// failed is what an agent is told of a look without an answer, or with the answer no.
func (c *claim) failed(ctx context.Context, err error) error {
	why := fault.MessageOf(err)
	switch kind := fault.KindOf(err); {
	case ctx.Err() != nil:
		why = "there was no answer in time"
	case kind != fault.Unavailable && kind != fault.Internal:
		return err
	}
	return fault.New(fault.Unavailable, entry.FactsUnavailable, "what runs on the agent's node cannot be found out now: %s", why).
		Fix("see that this server reaches the API of the agent's platform; what is signed stays good meanwhile").Because(err)
}

// wait returns whether the claim is true.
func (k *look) wait(ctx context.Context, c *claim) error {
	select {
	case <-k.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if k.err != nil {
		return k.err
	}
	return c.judge(&k.seen)
}

// roomLocked sees to it that an agent can have one more thing, by forgetting any
// other, which only has it asked for again.
func (l *looks) roomLocked(mine *agentLooks, now time.Time) {
	if len(mine.things) >= maxSeenOf {
		if l.dropLocked(mine, now); len(mine.things) >= maxSeenOf {
			l.dropOneLocked(mine)
		}
	}
	if l.held < maxSeen {
		return
	}
	for _, other := range l.agents {
		if l.dropOneLocked(other) {
			return
		}
	}
}

func (l *looks) dropOneLocked(mine *agentLooks) bool {
	for what, one := range mine.things {
		if one.running == nil {
			delete(mine.things, what)
			l.held--
			return true
		}
	}
	return false
}

func (l *looks) dropLocked(mine *agentLooks, now time.Time) {
	before := len(mine.things)
	maps.DeleteFunc(mine.things, func(_ thing, one *looked) bool { return one.running == nil && !now.Before(one.until) })
	l.held -= before - len(mine.things)
}

func (l *looks) sweepLocked(now time.Time) {
	if now.Before(l.sweep) && l.sweep.Sub(now) <= sweepEvery { // the clock may have been put back
		return
	}
	l.sweep = now.Add(sweepEvery)
	for agent, mine := range l.agents {
		if l.dropLocked(mine, now); len(mine.things) == 0 {
			delete(l.agents, agent)
		}
	}
}

// claimOf returns what an agent has to be believed for a rule before it is given
// anything, or nil if the rule takes its word.
func (s *Server) claimOf(e *entry.Entry, facts map[string]string, agent spiffeid.ID, node registry.Node) (*claim, error) {
	if e.Rule == nil || e.Rule.TrustAgent {
		return nil, nil
	}
	checker := s.cfg.Checkers[node.AttestationType]
	for _, name := range e.Rule.Template.Stated() {
		if checker == nil || !checker.Checks(name) {
			return nil, fault.New(fault.Precondition, "rule_facts_unverifiable", "the agent's node was attested by %q, by which this server cannot find out %s", node.AttestationType, name).
				Fix("attest the node by an attestor that can, such as k8s_psat with access to the cluster's API, or set the rule's trust to %q", entry.TrustAgent)
		}
	}
	life := e.X509TTL
	if life == 0 {
		life = s.cfg.Lifetimes.X509
	}
	return &claim{agent: agent, node: node, rule: *e, facts: facts, checker: checker, life: life}, nil
}

// checked is what became of a claim: for which revision of the rule, and why it is
// not believed, if so.
type checked struct {
	revision uint64
	err      error
}

// check finds out what the rules among some grants need to be true. All are looked
// at at once; the answers are in the order of the requests.
func (s *Server) check(ctx context.Context, of authorized, requests []signRequest) []checked {
	agent := callerFrom(ctx).id
	claims, outcome := make([]*claim, len(requests)), make([]checked, len(requests))
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		for i, r := range requests {
			if len(r.facts) == 0 { // of an entry, or not enough for any rule
				continue
			}
			e, ok := of(snap, agent, r.grant)
			if !ok {
				continue
			}
			if _, _, bad := e.Grants(r.facts); bad != nil || e.Rule == nil || len(r.facts) != len(e.Rule.Template.Stated()) {
				continue // refused later, for that
			}
			node, err := snap.Node(agent)
			if err == nil {
				claims[i], err = s.claimOf(&e, r.facts, agent, node)
			}
			outcome[i] = checked{e.Revision, err}
		}
	})
	pending := make([]*look, len(requests))
	now := time.Now().Round(0)
	for i, c := range claims {
		if c != nil {
			pending[i], outcome[i].err = s.looks.begin(c, now)
		}
	}
	for i, k := range pending {
		if k != nil {
			outcome[i].err = k.wait(ctx, claims[i])
		}
	}
	return outcome
}

// verdict says why what was checked does not let a grant be signed for, or nil.
func (c checked) verdict(e *entry.Entry) error {
	if e.Rule != nil && !e.Rule.TrustAgent && c.revision != e.Revision {
		return fault.New(fault.Unavailable, entry.FactsUnavailable, "the rule was changed while its facts were checked").Fix("try again")
	}
	return c.err
}
