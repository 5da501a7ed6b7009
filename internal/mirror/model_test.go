package mirror

import (
	"bytes"
	"crypto/x509"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
)

var (
	modelSeed  = flag.Int64("seed", -1, "run the model with this seed alone and print its trace")
	modelSeeds = flag.Int64("seeds", 300, "run the model with that many seeds")
)

// model drives the two machines of one agent, the mirror's and the one of the
// agent's own identity, and a model of the servers and their store, in one
// goroutine from a seed. After each step it checks what must always hold; at the
// end, with the faults over, that the agent serves what the oracle says. The same
// seed gives the same trace, byte for byte.
//
// What was granted, while the agent cannot hear of what changed: exactly what the
// store held at the position that the agent stands at. It never stands at one
// that no server told it, and goes back in one epoch only when for a minute of
// its clock nobody told it better (R77). What it serves was signed by a server
// that had the grant at that moment, and ends (R35, R56).
type model struct {
	testing.TB
	rnd        *rand.Rand
	trace      bytes.Buffer
	cas        [][]byte
	parsed     []*x509.Certificate
	repeatable bool // the node can prove itself again and again

	at   time.Time     // the right time
	boot time.Duration // since the machine's start, which nobody sets
	skew time.Duration // of the agent's clock

	head     *state
	states   map[string]*state // every one that there was
	epoch    byte
	servers  []*modelServer
	session  *session // nil: none
	signedBy map[string]int
	issued   map[string]issued
	serial   int
	calm     bool // no more faults
	full     bool // the agent's disk
	away     bool // the source of roots

	agent  *modelAgent // nil: not running
	stored struct {
		own   *agentid.Own
		roots []int
	}
	behind  time.Time // since when, by the agent's clock, it hears only of older states
	stops   int
	callers map[string]entry.Facts
}

// modelAgent is one life of the agent.
type modelAgent struct {
	m     *machine
	id    *agentid.Machine
	job   agentid.Job
	wait  time.Duration
	key   string // of the attempt under way
	token string
	own   *agentid.Own
	roots []int // of cas
	route int
	batch []want // being signed
	subs  map[string]*modelSub
}

// modelSub is a caller with an open stream.
type modelSub struct {
	group  *group
	seen   string // what was last delivered
	served map[string]Identity
	woken  bool
}

func newModel(t *testing.T, seed uint64, cas [][]byte) *model {
	w := &model{TB: t, rnd: rand.New(rand.NewPCG(seed, 1)), cas: cas, at: time.Unix(1e9, 0).UTC(), boot: time.Hour, epoch: 1,
		states: map[string]*state{}, signedBy: map[string]int{}, issued: map[string]issued{}, callers: map[string]entry.Facts{}}
	for _, der := range cas {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		w.parsed = append(w.parsed, c)
	}
	w.repeatable = w.rnd.IntN(2) == 0
	w.head = &state{epoch: w.epoch, next: 1}
	for range 1 + w.rnd.IntN(3) {
		w.servers = append(w.servers, &modelServer{up: true, at: w.head})
	}
	w.commit(func(s *state) {
		s.bodies, s.grants = map[string][]byte{}, map[string]entry.Entry{}
		w.publish(s)
	})
	w.operate()
	if w.rnd.IntN(4) > 0 { // most begin with an agent that is at work
		w.quiet()
		w.calm = false
	}
	return w
}

func (w *model) logf(format string, args ...any) {
	fmt.Fprintf(&w.trace, "%s ", w.at.Format(time.TimeOnly))
	if w.skew != 0 {
		fmt.Fprintf(&w.trace, "(agent %s) ", w.at.Add(w.skew).Format(time.TimeOnly))
	}
	fmt.Fprintf(&w.trace, format+"\n", args...)
}

// operate does what an agent that stopped asks an operator for.
func (w *model) operate() {
	if own := w.stored.own; own != nil && !w.repeatable && w.signedBy[own.Serial] < w.head.first {
		w.stored.own = nil // its authority is gone, so it is not worth keeping
	}
	token := ""
	if banned := w.head.node != nil && w.head.node.Banned; banned || !w.repeatable && w.stored.own == nil || w.stops > 0 {
		w.serial++
		token = fmt.Sprintf("token %d", w.serial)
		w.commit(func(s *state) {
			s.node = nil
			s.token = &registry.Token{Hash: []byte(token), Epoch: store.Epoch{s.epoch}, ExpiresAt: w.at.Add(time.Hour), NodeID: "spiffe://example.org/spire/agent/x"}
		})
		for i := range w.servers {
			w.catchUp(i)
		}
	}
	w.stops = 0
	w.start(token)
}

// start begins a life of the agent with what an earlier one stored.
func (w *model) start(token string) {
	a := &modelAgent{m: newMachine(modelDomain, 6, "model"), token: token, roots: w.stored.roots, route: w.rnd.IntN(len(w.servers)), subs: map[string]*modelSub{}}
	if own := w.stored.own; own != nil {
		again := *own
		again.Stored = true
		a.own = &again
	}
	a.id = agentid.NewMachine(agentid.Settings{Source: true, Rebootstrap: agentid.Auto, Remedy: "start it again"}, a.own, len(a.roots) > 0)
	for _, key := range slices.Sorted(maps.Keys(w.callers)) {
		a.listen(key, w.callers[key], w.at.Add(w.skew))
	}
	w.agent, w.session, w.behind = a, nil, time.Time{}
	w.live(agentid.Tick{})
}

func (a *modelAgent) listen(key string, facts entry.Facts, now time.Time) {
	a.subs[key] = &modelSub{group: a.m.join(facts, now), woken: true}
}

// live steps the machine of the agent's own identity, and does what follows.
func (w *model) live(what any) {
	a := w.agent
	if a == nil {
		return
	}
	fx := a.id.Step(agentid.Event{Now: w.at.Add(w.skew), Boot: w.boot, Seed: w.rnd.Uint64(), What: what})
	if _, dull := what.(agentid.Tick); !dull || fx.Job.Kind != agentid.None || fx.Stop != nil || fx.Redial {
		w.logf("  identity: %s: job %v, redial %v, wait %v", readable(what), fx.Job.Kind, fx.Redial, fx.Wait.Round(time.Second))
	}
	for _, n := range fx.Notes {
		w.logf("    %s: %v", n.Message, n.Err)
	}
	if fx.Stop != nil {
		w.logf("  the agent stops: %v, forget %v", fx.Stop, fx.Forget)
		// Not heard of as good for nothing, nor looked at by a wrong clock when it was read.
		spent := fault.ReasonOf(fx.Stop) == "join_token_refused"
		if over := a.own != nil && a.own.Stored && !w.at.Add(w.skew).Before(a.own.NotAfter); spent && !over && a.own != nil && w.calls(a.own) {
			w.Fatalf("the agent stops with an SVID that counts: %v", fx.Stop) // R54
		}
		if fx.Forget {
			w.stored.own = nil
		}
		w.agent, w.session = nil, nil
		w.stops++
		return
	}
	if fx.Job.Kind != agentid.None {
		if a.job.Kind != agentid.None {
			w.Fatalf("%v begins during %v", fx.Job.Kind, a.job.Kind)
		}
		a.job = fx.Job
	}
	a.wait = fx.Wait
	if fx.Redial {
		fmt.Sscanf(fx.Address, "%d", &a.route)
		w.hangUp(nil)
	}
}

// calls reports whether the store has it that an SVID of the agent's own counts.
func (w *model) calls(own *agentid.Own) bool {
	_, err := nodes.Authenticate(w.head.node, own.Serial, own.NotAfter, w.at)
	ca := w.signedBy[own.Serial]
	return err == nil && ca >= w.head.first && ca < w.head.next
}

// work ends the job under way.
func (w *model) work() string {
	a := w.agent
	if a == nil || a.job.Kind == agentid.None {
		return ""
	}
	job := a.job
	a.job = agentid.Job{}
	own, err := w.do(a, job)
	if w.agent != a {
		return "the agent was stopped meanwhile"
	}
	w.live(agentid.Done{Kind: job.Kind, Own: own, Err: err})
	return fmt.Sprint(job.Kind, " ", err)
}

func (w *model) do(a *modelAgent, job agentid.Job) (*agentid.Own, error) {
	full := fault.New(fault.Unavailable, agentid.ReasonNotStored, "no space")
	switch job.Kind {
	case agentid.Save:
		if w.full {
			return nil, full
		}
		w.stored.own, w.stored.roots = a.own, a.roots
		return nil, nil
	case agentid.Bootstrap:
		if w.away {
			return nil, fault.New(fault.Unavailable, "bundle_unavailable", "no answer")
		}
		a.roots = nil
		for i := w.head.first; i < w.head.next; i++ {
			a.roots = append(a.roots, i)
		}
		return nil, nil
	}
	if job.NewKey || a.key == "" {
		w.serial++
		a.key = fmt.Sprintf("key %d", w.serial)
	}
	get := w.attest
	if job.Kind == agentid.Renew && !a.own.Repeatable {
		get = w.renew
	}
	own, err := get()
	switch now := w.at.Add(w.skew); {
	case err != nil:
		return nil, err
	case now.Before(own.NotBefore) || !now.Before(own.NotAfter) || !slices.Contains(a.roots, w.signedBy[own.Serial]):
		return nil, fault.New(fault.Unavailable, agentid.ReasonRefused, "it does not verify")
	case w.full && !job.Volatile:
		return nil, full
	case !w.full:
		w.stored.own, w.stored.roots = own, a.roots
	}
	a.own, a.key = own, ""
	return own, nil
}

// connect opens a stream.
func (w *model) connect() string {
	a := w.agent
	if a == nil || a.own == nil || w.session != nil {
		return ""
	}
	_, err := w.reach(a.own)
	if w.agent != a {
		return "the agent was stopped meanwhile"
	}
	if err != nil {
		w.feed(disconnected{err})
		w.live(agentid.Ended{Serial: a.own.Serial, Err: err})
		return err.Error()
	}
	w.session = &session{server: a.route, shown: a.own}
	w.feed(connected{})
	return fmt.Sprintf("to server %d, which is at %s", a.route, w.servers[a.route].at.name())
}

// hangUp ends the stream. What is on its way is lost.
func (w *model) hangUp(err error) {
	c := w.session
	if c == nil {
		return
	}
	w.session = nil
	w.feed(disconnected{err})
	if err != nil {
		w.live(agentid.Ended{Serial: c.shown.Serial, Err: err})
	}
}

// deliver hands the agent up to n messages; the server hears the answers at once.
func (w *model) deliver(n int) {
	for range n {
		c := w.session
		if c == nil || len(c.stream) == 0 {
			return
		}
		msg := c.stream[0]
		c.stream = c.stream[1:]
		w.live(agentid.Accepted{})
		if w.session != c {
			return
		}
		before := w.agent.m.position
		to := msg.GetCurrent().GetPosition()
		for _, p := range []*syncv1.Position{msg.GetInventory().GetPosition(), msg.GetDelta().GetPosition()} {
			if p != nil {
				to = p
			}
		}
		back := before != nil && to != nil && bytes.Equal(before.GetEpoch(), to.GetEpoch()) && to.GetRevision() < before.GetRevision()
		now := w.at.Add(w.skew)
		switch {
		case to != nil && !back:
			w.behind = time.Time{}
		case back && w.behind.IsZero():
			w.behind = now
		}
		a := w.agent
		w.feed(msg)
		if at := a.m.position; back && at.GetRevision() < before.GetRevision() && now.Sub(w.behind) < behindMost { // R77
			w.Fatalf("it goes back from %d to %d", before.GetRevision(), at.GetRevision())
		}
	}
}

// feed steps the mirror's machine, and does what follows.
func (w *model) feed(what any) {
	a := w.agent
	a.m.follow(moment{w.at.Add(w.skew), w.boot})
	fx := a.m.step(event{now: w.at.Add(w.skew), seed: w.rnd.Uint64(), what: what})
	if _, dull := what.(tick); !dull {
		w.logf("  %s", readable(what))
	}
	for _, m := range fx.send {
		w.logf("    %s", readable(m))
	}
	for _, i := range fx.sign {
		w.logf("    to be signed: %s %v %s", i.grantID, i.facts, i.id)
		if p := a.m.grants[i.grantID].find(i.facts); i.facts != nil && len(p.groups) == 0 {
			w.Fatalf("an SVID is signed for the rule %s that nobody uses", i.grantID)
		}
	}
	for _, n := range fx.notes {
		w.logf("    %s %s %s", n.message, n.id, n.reason)
	}
	for _, g := range fx.wake {
		for _, sub := range a.subs {
			sub.woken = sub.woken || sub.group == g
		}
	}
	if len(fx.sign) > 0 {
		if a.batch != nil {
			w.Fatal("a second batch was begun before the first had ended")
		}
		a.batch = fx.sign
	}
	if fx.own != nil { // as life.setBundle does
		a.roots = nil
		for i, der := range w.cas {
			if slices.ContainsFunc(a.m.own().roots, func(r root) bool { return bytes.Equal(r.certificate.Raw, der) }) {
				a.roots = append(a.roots, i)
			}
		}
		standing := agentid.Gone
		for _, r := range a.m.own().roots {
			if ca := w.cas[w.signedBy[a.own.Serial]]; bytes.Equal(r.certificate.Raw, ca) {
				if standing = agentid.Held; r.tainted {
					standing = agentid.Tainted
				}
			}
		}
		w.live(agentid.BundleChanged{Authority: standing})
	}
	w.check()
	for _, m := range fx.send {
		if w.session != nil && w.agent == a {
			w.answer(m)
		}
	}
	for _, d := range fx.directives { // as life.direct does
		switch d := d.GetDirective().(type) {
		case *syncv1.Directive_Renew:
			w.live(agentid.Renewal{Within: time.Duration(d.Renew.GetWithinMs()) * time.Millisecond})
		case *syncv1.Directive_Reconnect:
			w.live(agentid.Reconnection{Address: d.Reconnect.GetAddress(), Within: time.Duration(d.Reconnect.GetWithinMs()) * time.Millisecond})
		case *syncv1.Directive_Reattest:
			w.live(agentid.Reattestation{Reason: d.Reattest.GetReason()})
		}
	}
	if fx.resync == "" || w.agent != a {
		return
	}
	w.logf("    it starts over: %s", fx.resync)
	if fx.resync == serverBehind { // as life.streamEnded does
		a.route = (a.route + 1) % len(w.servers)
		w.hangUp(fault.New(fault.Unavailable, serverBehind, "the server stands before what another has told"))
	} else {
		w.hangUp(nil)
	}
}

// pass lets time pass; both machines look at their clocks then.
func (w *model) pass(d time.Duration) {
	w.at = w.at.Add(d)
	w.boot += d
	w.look()
}

func (w *model) look() {
	if w.agent != nil {
		w.feed(tick{})
		w.live(agentid.Tick{})
	}
}

func (w *model) run(steps int) {
	actions := slices.DeleteFunc(modelActions(), func(a action) bool { return a.share <= upsets && w.rnd.IntN(3) > 0 })
	all := 0
	for _, a := range actions {
		all += a.share
	}
	for range steps {
		n := w.rnd.IntN(all)
		for _, a := range actions {
			if n -= a.share; n < 0 {
				before := w.trace.Len()
				w.logf("%s", a.name)
				began := w.trace.Len()
				if said := a.do(w); said != "" {
					w.logf("  so: %s", said)
				} else if w.trace.Len() == began {
					w.trace.Truncate(before) // nothing came of it
				}
				break
			}
		}
	}
	w.quiet()
}

// lifeOfOwn is the life of the agent's own SVIDs.
const lifeOfOwn = 10 * time.Minute

// settle is within what time after the last fault everything is right again. A
// grant that was refused is asked for again after five minutes at the latest.
const settle = 6 * time.Minute

// reunite is within what time it follows a server: all back-offs are over by then.
const reunite = 90 * time.Second

// quiet ends all faults and waits until the agent serves what it should.
func (w *model) quiet() {
	w.logf("there are no more faults")
	w.calm, w.full, w.away, w.skew = true, false, false, 0
	for i, s := range w.servers {
		s.up, s.lag, s.skew = true, false, 0
		w.catchUp(i)
	}
	if w.session != nil && w.session.follow {
		w.session.stream = append(w.session.stream, w.current()) // as every server says from time to time
	}
	w.look()
	why, operators, alone := "", 0, false
	began, away, end := w.at, w.at, w.at.Add(settle)
	if a := w.agent; a != nil && a.own != nil {
		// The server breaks off a handshake with an SVID whose authority is gone, and the
		// agent has not heard of that: it attests again when it would have renewed, or
		// needs another token.
		gone := w.signedBy[a.own.Serial] < w.head.first
		if gone && !w.repeatable {
			w.agent, w.session = nil, nil
		} else if gone || !w.repeatable && !w.at.Before(a.own.NotAfter) {
			alone = true
			end = end.Add(lifeOfOwn + svid.Backdate) // one that cannot attest again gives up when both its clocks say so
		}
	}
	for w.at.Before(end) {
		if w.agent == nil {
			if operators++; operators > 2 {
				w.Fatal("an operator does not help")
			}
			w.operate()
			began, end = w.at, w.at.Add(settle)
		}
		w.work()
		w.connect()
		for w.session != nil && len(w.session.stream) > 0 {
			w.deliver(1)
		}
		w.sign(true)
		if why = w.unlike(); why == "" {
			w.logf("all is well")
			return
		}
		// The source of roots is asked for others when the agent has to renew.
		if alone || w.agent == nil || !slices.Contains(w.agent.roots, w.head.next-1) || w.session != nil && w.session.follow {
			away = w.at
		} else if w.at.Sub(away) > reunite {
			w.Fatal("the agent does not come back to a server")
		}
		w.pass(time.Second + w.at.Sub(began)/20)
	}
	w.Fatalf("long after the last fault %s", why)
}

// unlike says what is not yet as the oracle has it.
func (w *model) unlike() string {
	a := w.agent
	switch {
	case a == nil:
		return "the agent does not run"
	case w.session == nil || !w.session.follow:
		return "the agent does not follow a server"
	case a.m.sum != w.head.sum:
		return "the agent does not hold what the store has"
	case a.own.Serial != w.head.node.Current.Serial && a.own.Serial != w.head.node.Next.Serial:
		return "the agent's SVID is not the one that counts"
	case w.stored.own != a.own && w.stored.own.Serial != a.own.Serial:
		return "the agent's SVID is not stored"
	case !slices.Equal(w.stored.roots, a.roots):
		return "the agent's roots are not stored"
	}
	now := w.at
	for _, key := range slices.Sorted(maps.Keys(a.subs)) {
		sub := a.subs[key]
		want, _ := entry.Match(w.head.entries, sub.group.facts, now)
		got := a.m.view(sub.group, now)
		if len(got.Identities) != len(want) {
			return fmt.Sprintf("%s is served %s, and should be %v", key, w.describe(got), want)
		}
		for i, id := range got.Identities {
			if id.ID != want[i].ID || id.GrantID != want[i].GrantID {
				return fmt.Sprintf("%s is served %s, and should be %v", key, w.describe(got), want)
			}
			if w.issued[string(id.Chain)].ca < w.head.tainted { // R69
				return fmt.Sprintf("%s is served an SVID of a tainted authority", key)
			}
		}
	}
	return ""
}

// check sees that what must always hold does.
func (w *model) check() {
	a := w.agent
	now := w.at.Add(w.skew)
	told := &state{}
	if a.m.position != nil {
		if told = w.states[fmt.Sprintf("%d.%d", a.m.position.GetEpoch()[0], a.m.position.GetRevision())]; told == nil {
			w.Fatal("it stands where the store never stood")
		}
	}
	sum := entry.Sum{}
	for _, g := range a.m.grants {
		sum.Add(g.hash)
	}
	for _, b := range a.m.bundles {
		sum.Add(b.hash)
	}
	if sum != a.m.sum || sum != told.sum {
		w.Fatal("it does not hold exactly what the store held where it stands")
	}
	idle, used, held := 0, 0, 0
	for p := range a.m.pairs() {
		if p.cert != nil {
			held++
		}
		if len(p.groups) > 0 {
			used++
		}
	}
	if held > max(a.m.cacheSize, used) {
		w.Fatalf("%d SVIDs are held, %d have a subscriber, and the limit is %d", held, used, a.m.cacheSize)
	}
	for p := range a.m.pairs() {
		if p.cert != nil && len(p.groups) > 0 && w.issued[string(p.cert.chain)].ca < told.tainted && p.grant.serves(now) &&
			!p.signing && !a.m.signing && (!now.Before(p.cert.renewAt) || p.cert.renewAt.Sub(now) > taintSpread) && due(p.notYet, now, grantCeiling) && due(a.m.signNotYet, now, signCeiling) { // R69
			w.Fatalf("nobody replaces the SVID of %s, whose authority is tainted", p.id)
		}
		if p.grant.entry.Rule == nil || len(p.groups) > 0 {
			continue
		}
		if idle++; p.cert == nil && !p.signing && due(p.notYet, now, grantCeiling) {
			w.Fatalf("the rule %s still holds %v, which nobody uses", p.grant.entry.ID, p.facts)
		}
	}
	if idle > a.m.cacheSize+len(a.batch) {
		w.Fatalf("%d pairs of rules are held that nobody uses", idle)
	}
	for _, key := range slices.Sorted(maps.Keys(a.subs)) {
		w.checkServed(key, a.subs[key], told, now)
	}
}

// checkServed compares what one caller is served with what was granted.
func (w *model) checkServed(key string, sub *modelSub, told *state, now time.Time) {
	v := w.agent.m.view(sub.group, now)
	granted := map[string]entry.Matched{}
	want, _ := entry.Match(told.entries, sub.group.facts, now) // R46
	for _, m := range want {
		granted[m.GrantID] = m
	}
	if !slices.EqualFunc(v.Matched, want, func(a, b entry.Matched) bool {
		return a.GrantID == b.GrantID && a.ID == b.ID && maps.Equal(a.Facts, b.Facts)
	}) {
		w.Fatalf("%s matches %v, by the oracle %v", key, v.Matched, want)
	}
	served := map[string]Identity{}
	for _, id := range v.Identities {
		m, ok := granted[id.GrantID]
		signed, known := w.issued[string(id.Chain)]
		switch {
		case !ok || id.ID != m.ID:
			w.Fatalf("%s is served %s by %s, and was granted %v", key, id.ID, id.GrantID, want)
		case !known || signed.id != id.ID:
			w.Fatalf("%s is served %s, which was signed for %v", key, id.ID, signed.id)
		case !now.Before(id.ExpiresAt): // R35
			w.Fatalf("%s is served an SVID that ended at %s", key, id.ExpiresAt)
		case !w.at.Before(signed.end): // R35, R107
			w.Fatalf("%s is served an SVID that has ended, whatever the agent's clock shows", key)
		case !w.holds(v.Bundle, signed.ca): // R58
			w.Fatalf("%s is served an SVID whose authority is not in the bundle beside it", key)
		}
		served[id.GrantID+" "+id.ID.String()] = id
	}
	// R56: what is served stays so until it ends, is withdrawn or is replaced.
	for name, id := range sub.served {
		m := granted[id.GrantID]
		_, still := served[name]
		ended := !now.Before(id.ExpiresAt.Add(-expiryMargin)) || !w.at.Before(w.issued[string(id.Chain)].end.Add(-expiryMargin))
		if !still && !ended && m.ID == id.ID && w.holds(v.Bundle, w.issued[string(id.Chain)].ca) {
			w.Fatalf("%s is not served %s any more, which is good until %s", key, name, id.ExpiresAt)
		}
	}
	sub.served = served
	// RG16: whoever's answer has changed is woken. One who is woken for nothing
	// costs nothing: the same message is not sent twice.
	is := w.describe(v)
	if is != sub.seen {
		if !sub.woken {
			w.Fatalf("%s was not woken:\n was %s\n now %s", key, sub.seen, is)
		}
		w.logf("    %s is served%s", key, is)
	}
	sub.seen, sub.woken = is, false
}

func (w *model) describe(v View) string {
	var b strings.Builder
	for _, id := range v.Identities {
		fmt.Fprintf(&b, " %s=%s %s (%s)", id.GrantID, id.ID.Path(), id.Hint, id.Chain)
	}
	fmt.Fprintf(&b, " synced %v", v.Synced)
	for _, held := range append([]Bundle{v.Bundle}, v.Federated...) {
		fmt.Fprintf(&b, ", %s", held.TrustDomain.Name())
		for i := range w.cas {
			if w.holds(held, i) {
				fmt.Fprintf(&b, " %d", i)
			}
		}
	}
	return b.String()
}

// holds reports whether an authority is in a bundle.
func (w *model) holds(b Bundle, ca int) bool {
	return b.Keys != nil && slices.ContainsFunc(b.Keys.X509, func(a bundle.X509Authority) bool { return bytes.Equal(a.ASN1, w.cas[ca]) })
}

func TestModel(t *testing.T) { // R35, R46, R54, R56, R58, R69, R77, R107, RG16
	cas := modelAuthorities(t)
	run := func(seed uint64, tail int) []byte {
		w := newModel(t, seed, cas)
		defer func() {
			lines := strings.SplitAfter(w.trace.String(), "\n")
			if tail == 0 {
				t.Logf("seed %d\n%s", seed, w.trace.String())
			} else if t.Failed() {
				t.Logf("seed %d ends with\n%s\nAll of it: go test ./internal/mirror -run '^TestModel$' -seed=%d -v", seed, strings.Join(lines[max(0, len(lines)-tail):], ""), seed)
			}
		}()
		w.run(600)
		return w.trace.Bytes()
	}
	if *modelSeed >= 0 {
		run(uint64(*modelSeed), 0)
		return
	}
	for seed := range uint64(*modelSeeds) {
		if a := run(seed, 60); seed%10 == 0 && !bytes.Equal(a, run(seed, 60)) {
			t.Fatalf("seed %d: two runs, two traces", seed)
		}
	}
}
