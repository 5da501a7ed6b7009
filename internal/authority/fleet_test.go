package authority

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
)

// TestFleet drives the machines of three servers and ten agents from a seed, in
// one goroutine, through 50 rotations of each kind of key. The store is a list of
// states; each server sees one of them, the newest or an older, and what it
// commits must not have been changed since. Agents hold the bundle that their
// server gave them and what it signed for them, and verify one another.

var (
	fleetSeed  = flag.Uint64("seed", 0, "run this seed of TestFleet alone, and print what happens")
	fleetSeeds = flag.Int("seeds", 300, "how many seeds TestFleet runs")
)

// fleetMode is what goes wrong besides.
type fleetMode struct{ crashes, wrongClock bool }

const (
	fleetServers = 3
	fleetAgents  = 10
)

// shared is the store at one revision. It is never changed, only replaced.
type shared struct {
	revision, bundleAt uint64
	bundle             *bundle.Bundle
	rows               [fleetServers][2]authorityRow // by server and kind
	servers            [fleetServers]serverRow
	nodes              [fleetAgents]time.Time // until when the agent's certificate lasts
}

type authorityRow struct {
	revision uint64
	slots    []registry.Slot
}

// serverRow is what a server says of itself and its agents.
type serverRow struct {
	beat     time.Time
	position uint64
	attached [fleetAgents]bool
	holds    [fleetAgents]uint64 // up to where each holds what is its own
}

// peers is registry.Unacknowledged and the servers' rows, on the model.
func (s *shared) peers(self int, serving bool, now time.Time) (p Peers) {
	const silence = time.Minute
	var best serverRow
	var at [fleetAgents]string
	for i := range s.servers {
		row := &s.servers[i]
		if now.Sub(row.beat) >= silence {
			continue
		}
		name := fmt.Sprintf("server-%d", i)
		if i != self {
			p.Others = true
			if row.position < s.bundleAt {
				p.Missing = append(p.Missing, Missing{Name: name, Server: name, Until: row.beat.Add(silence)})
			}
		}
		for agent, attached := range row.attached {
			if attached && (!best.attached[agent] || row.holds[agent] > best.holds[agent]) {
				best.attached[agent], best.holds[agent], at[agent] = true, row.holds[agent], name
				if i == self && !serving {
					at[agent] = ""
				}
			}
		}
	}
	for agent, until := range s.nodes {
		if now.Before(until) && best.holds[agent] < s.bundleAt {
			p.Missing = append(p.Missing, Missing{Name: fmt.Sprintf("agent-%d", agent), Server: at[agent], Until: until})
		}
	}
	return p
}

type fleet struct {
	t       *testing.T
	mode    fleetMode
	random  *rand.Rand
	trace   bytes.Buffer
	now     time.Time // as it is
	newest  *shared
	life    time.Duration
	ttl     time.Duration
	maxWait time.Duration
	servers []*fleetServer
	agents  []*fleetAgent
	keys    int

	rotations map[string]int                 // by kind
	passed    map[string]map[string]struct{} // by authority: agents that it did not wait for
	revoked   map[string]bool                // authorities
	named     int                            // how often a laggard was named
	kinds     [2]kind
	seed      uint64
	seen      map[string]int // what happened
}

// fleetServer is one process and its keeper.
type fleetServer struct {
	number  int
	id      string
	offset  time.Duration // of its clock
	up      bool          // the process runs
	durable bool
	view    *shared
	held    map[string][]byte // the keeper: by key id
	lines   []*fleetLine
	ask     *ask
	asked   string // the kind
}

type fleetLine struct {
	number int
	kind   kind
	made   *registry.Slot
	signer *registry.Slot

	sawBundle   uint64
	waits       bool
	due, looked time.Time
}

// fleetAgent is one agent: it stands for its workloads too.
type fleetAgent struct {
	number  int
	name    string
	server  *fleetServer // that it is attached to; nil: none
	held    time.Time    // until then it is given no bundle
	mute    bool         // nor anything else
	sees    *bundle.Bundle
	seesAt  uint64
	signed  [2]fleetDocument // by kind
	renewAt time.Time
}

type fleetDocument struct {
	slot registry.Slot
	ends time.Time
}

func (f *fleet) logf(format string, args ...any) {
	fmt.Fprintf(&f.trace, "%d "+format+"\n", append([]any{f.now.Unix()}, args...)...)
	f.seen[strings.Fields(format)[0]]++
}

func (f *fleet) failf(format string, args ...any) {
	f.t.Helper()
	tail := f.trace.String()
	f.t.Fatalf("seed %d: "+format+"\n…%s", append(append([]any{f.seed}, args...), tail[max(0, len(tail)-4000):])...)
}

func (f *fleet) chance(percent int) bool { return f.random.IntN(100) < percent }

// commit makes the change the newest state. It is seen by who looks.
func (f *fleet) commit(change func(*shared)) {
	s := *f.newest
	s.revision++
	change(&s)
	f.newest = &s
}

func (s *fleetServer) clock(now time.Time) time.Time { return now.Add(s.offset).Truncate(time.Second) }

// off reports whether the others' clocks tell the server that its own is wrong (R108).
func (s *fleetServer) off() bool { return s.offset.Abs() > 30*time.Second }

// serving reports whether the server answers agents: all its keys are there.
func (s *fleetServer) serving() bool {
	return s.up && !slices.ContainsFunc(s.lines, func(l *fleetLine) bool { return l.signer == nil })
}

// start begins a new life of the process.
func (f *fleet) start(s *fleetServer) {
	s.up, s.view, s.ask = true, f.newest, nil
	s.lines = []*fleetLine{{number: 0, kind: f.kinds[0]}, {number: 1, kind: f.kinds[1]}}
	if !s.durable {
		s.held = map[string][]byte{}
	}
	f.logf("start %s", s.id)
}

func (f *fleet) crash(s *fleetServer, where string) {
	f.logf("crash %s %s", s.id, where)
	f.seen["crash "+where]++
	s.up = false
	for _, a := range f.agents {
		if a.server == s {
			a.server = nil
		}
	}
}

// turn is what run.go does when it wakes.
func (f *fleet) turn(s *fleetServer) {
	if !s.up {
		return
	}
	if f.chance(80) {
		s.view = f.newest
	}
	if s.off() {
		return // nothing is decided by a wrong clock (R70)
	}
	for _, l := range s.lines {
		// Like run.go it looks when something is due, the bundle has changed, something
		// waits for others, an operator asks, or it slept for long.
		at := s.clock(f.now)
		if l.sawBundle == s.view.bundleAt && !l.waits && s.ask == nil && at.Before(l.due) && at.Sub(l.looked).Abs() < maxSleep {
			continue
		}
		if !f.settle(s, l) {
			return
		}
		l.sawBundle, l.looked = s.view.bundleAt, at
	}
}

// settle takes the steps of one kind, and reports whether the process still runs.
func (f *fleet) settle(s *fleetServer, l *fleetLine) bool {
	for range maxSteps {
		view := s.view
		row := view.rows[s.number][l.number]
		l.made = still(l.made, row.slots)
		e := event{Now: s.clock(f.now), Lifetime: f.life, MaxWait: f.maxWait, Bundle: view.bundle, Held: s.held, Made: l.made}
		if slices.ContainsFunc(row.slots, waiting) {
			e.Peers = view.peers(s.number, s.serving(), s.clock(f.now))
		}
		if s.ask != nil && s.asked == l.kind.name {
			e.Ask = s.ask
		}
		st, err := next(l.kind, row.slots, e)
		if err != nil && e.Ask != nil {
			f.logf("refused %s %s: %s", s.id, e.Ask.do, fault.ReasonOf(err))
			s.ask = nil
			continue
		}
		if err != nil {
			f.failf("%s: %v", s.id, err)
		}
		slots := row.slots
		if st.Rule != "" && st.Make == nil {
			if f.mode.crashes && f.chance(3) {
				f.crash(s, "before the commit of "+st.Rule)
				return false
			}
			if now := f.newest; now.bundleAt != view.bundleAt || now.rows[s.number][l.number].revision != row.revision {
				s.view = now // a conflict: it has to look again
				continue
			}
			f.apply(s, l, st)
			if slots = st.Slots; e.Ask != nil && e.Ask.rule() == st.Rule {
				s.ask = nil
			}
			s.view = f.newest
			if f.mode.crashes && f.chance(3) {
				f.crash(s, "after the commit of "+st.Rule)
				return false
			}
		}
		l.signer = nil
		if st.Signs.AuthorityID != "" {
			l.signer = &st.Signs
		}
		switch {
		case st.Make != nil:
			f.keys++
			slot := *st.Make
			slot.PublicKey = fmt.Appendf(nil, "key %d", f.keys)
			slot.Certificate = fmt.Appendf(nil, "certificate %d", f.keys)
			slot.AuthorityID = fmt.Sprintf("%s-%d", l.kind.name, f.keys)
			s.held[slot.KeyID], l.made = slot.PublicKey, &slot
			if f.mode.crashes && f.chance(3) {
				f.crash(s, "after making a key")
				return false
			}
		case st.Rule == "":
			l.due, l.waits = st.At, slices.ContainsFunc(slots, waiting)
			f.rest(s, l, slots, st)
			return true
		}
	}
	f.failf("%s %s: no rest after %d steps", s.id, l.kind.name, maxSteps)
	return false
}

// apply commits a step and notes what it means for the checks.
func (f *fleet) apply(s *fleetServer, l *fleetLine, st step) {
	f.logf("step %s %s %s %s, sequence %d, without %d", st.Rule, s.id, l.kind.name, named(st.Slots), st.Bundle.Sequence, len(st.Missing))
	f.seen[st.Rule]++
	for _, slot := range st.Slots {
		if slot.State != registry.SlotPrepared && slot.State != registry.SlotActive {
			continue
		}
		for _, m := range st.Missing {
			if f.passed[slot.AuthorityID] == nil {
				f.passed[slot.AuthorityID] = map[string]struct{}{}
			}
			f.passed[slot.AuthorityID][m.Name] = struct{}{}
		}
	}
	switch st.Rule {
	case "activate":
		f.rotations[l.kind.name]++
	case "ready":
		active, ok := find(st.Slots, func(x registry.Slot) bool { return x.State == registry.SlotActive })
		made, _ := find(st.Slots, func(x registry.Slot) bool { return x.State == registry.SlotPrepared })
		if ok && f.strict() && len(st.Missing) > 0 && made.PublishedAt.Before(activateAt(active)) {
			f.failf("R64: %s goes on with %s without %v", s.id, made.AuthorityID, st.Missing)
		}
	case "revoke":
		f.revoked[st.About.AuthorityID] = true
	}
	f.commit(func(n *shared) {
		if st.Bundle.Sequence != n.bundle.Sequence {
			n.bundleAt = n.revision
		}
		n.bundle = st.Bundle
		n.rows[s.number][l.number] = authorityRow{n.revision, st.Slots}
	})
}

// rest checks a machine that has nothing to do: what it waits for is named.
func (f *fleet) rest(s *fleetServer, l *fleetLine, slots []registry.Slot, st step) {
	if !st.At.After(s.clock(f.now)) {
		f.failf("%s rests, but %s is due at %v, now is %v", s.id, st.Next, st.At, s.clock(f.now))
	}
	i := slices.IndexFunc(slots, waiting)
	if i < 0 {
		return
	}
	if len(st.Missing) == 0 || st.Next != "ready" && st.Next != "drop" && st.Next != "retire" && st.Next != "prune" {
		f.failf("%s %s: %s is not ready, and waits for nobody: %+v", s.id, l.kind.name, slots[i].AuthorityID, st.Outlook)
	}
	for _, m := range st.Missing {
		if i := slices.IndexFunc(f.agents, func(a *fleetAgent) bool { return a.name == m.Name }); i >= 0 && f.now.Before(f.agents[i].held) {
			f.named++
		}
	}
}

// beat has a server say how far it and its agents are.
func (f *fleet) beat(s *fleetServer) {
	if !s.up || s.off() && f.chance(50) {
		return
	}
	row := serverRow{beat: s.clock(f.now), position: s.view.revision}
	for _, a := range f.agents {
		if a.server != s {
			continue
		}
		row.attached[a.number], row.holds[a.number] = true, a.seesAt
		if a.seesAt == s.view.bundleAt {
			row.holds[a.number] = s.view.revision // nothing of it has changed since
		}
	}
	f.commit(func(n *shared) { n.servers[s.number] = row })
}

// live is what an agent does: it connects, takes the bundle, and renews.
func (f *fleet) live(a *fleetAgent) {
	heldBack := f.now.Before(a.held)
	if heldBack && a.mute {
		a.server = nil
	} else if a.server == nil || !a.server.serving() || f.chance(2) {
		a.server = nil
		if s := f.servers[f.random.IntN(len(f.servers))]; s.serving() {
			a.server = s
		}
	}
	alive := f.now.Before(a.signed[0].ends) // else it has to attest again, and takes the bundle first
	if a.server != nil && !heldBack && (f.chance(90) || !alive) {
		if v := a.server.view; a.sees == nil || v.bundle.Sequence >= a.sees.Sequence {
			a.sees, a.seesAt = v.bundle, v.bundleAt
		}
	}
	for i, d := range a.signed { // R58: without its authority it goes
		if d.ends.IsZero() {
			continue
		}
		if found, tainted := f.kinds[i].find(a.sees, d.slot); !found {
			if !f.revoked[d.slot.AuthorityID] && f.now.Before(d.ends) {
				f.failf("R65: %s holds a document of %s until %v, which is not in its bundle", a.name, d.slot.AuthorityID, d.ends)
			}
			a.signed[i], a.renewAt = fleetDocument{}, time.Time{}
		} else if tainted {
			a.renewAt = time.Time{}
		}
	}
	if a.server != nil && a.sees != nil && !f.now.Before(a.renewAt) && (alive || !heldBack) && !a.server.off() {
		f.renew(a)
	}
}

// renew has the agent's server sign for it.
func (f *fleet) renew(a *fleetAgent) {
	s := a.server
	at := s.clock(f.now)
	for _, l := range s.lines {
		signer := *l.signer
		if !at.Before(signer.NotAfter) || at.Before(signer.NotBefore) {
			return
		}
		if found, _ := l.kind.find(f.newest.bundle, signer); !found && !f.revoked[signer.AuthorityID] {
			f.failf("R63: %s signs with %s, which is not in the bundle", s.id, signer.AuthorityID)
		}
		ends := earlier(at.Add(f.ttl), signer.NotAfter)
		if found, _ := l.kind.find(a.sees, signer); !found {
			if _, ok := f.passed[signer.AuthorityID][a.name]; !ok && !f.revoked[signer.AuthorityID] {
				f.failf("R64: %s signs with %s for %s, which does not have it", s.id, signer.AuthorityID, a.name)
			}
			f.seen["unknown"]++ // the agent refuses it and asks again
			continue
		}
		a.signed[l.number] = fleetDocument{signer, ends}
	}
	first := earlier(a.signed[0].ends, a.signed[1].ends)
	a.renewAt = f.now.Add(first.Sub(f.now) / 2)
	until := a.signed[0].ends
	f.commit(func(n *shared) { n.nodes[a.number] = until })
}

// verify has every agent verify every other.
func (f *fleet) verify() {
	for _, a := range f.agents {
		for i, d := range a.signed {
			if !f.now.Before(d.ends) || f.revoked[d.slot.AuthorityID] {
				continue
			}
			for _, b := range f.agents {
				if b.sees == nil || !f.now.Before(f.newest.nodes[b.number]) {
					continue // it has nothing to show, so it meets nobody
				}
				if found, _ := f.kinds[i].find(b.sees, d.slot); !found {
					if _, passed := f.passed[d.slot.AuthorityID][b.name]; !passed {
						f.failf("R64: %s shows %s a document of %s, which it cannot verify", a.name, b.name, d.slot.AuthorityID)
					}
					f.seen["unverifiable"]++ // the key went on without it, and said so
				}
			}
		}
	}
}

// disturb is what happens now and then.
func (f *fleet) disturb(tick int) {
	a, s := f.agents[f.random.IntN(len(f.agents))], f.servers[f.random.IntN(len(f.servers))]
	switch n := f.random.IntN(100); {
	case n < 3 && !f.now.Before(a.held.Add(f.ttl/2)): // held back: for long enough to matter, sometimes for long
		longest := f.ttl / 2
		if !f.strict() && f.chance(20) {
			longest = f.life
		}
		a.held, a.mute = f.now.Add(time.Duration(f.random.Int64N(int64(longest)))), f.chance(50)
		f.logf("hold %s until %d, mute %v", a.name, a.held.Unix(), a.mute)
	case n < 6 && s.serving():
		s.asked, s.ask = f.wish(s)
		f.logf("operator of %s asks for %s of %s %s, force %v", s.id, s.ask.do, s.asked, s.ask.id, s.ask.force)
	case n < 8 && f.mode.crashes && s.up:
		f.crash(s, "in between")
	case n < 9 && f.mode.wrongClock && s == f.servers[1]:
		s.offset = time.Duration(f.random.Int64N(int64(25*time.Second)*2)) - 25*time.Second
		if f.chance(30) && !f.strict() {
			s.offset *= 20
		}
		f.logf("clock of %s is off by %v", s.id, s.offset)
	}
	for _, s := range f.servers { // what was tainted is mostly revoked
		for i, row := range f.newest.rows[s.number] {
			old, ok := find(row.slots, func(x registry.Slot) bool {
				_, tainted := f.kinds[i].find(f.newest.bundle, x)
				return x.State == registry.SlotOld && tainted
			})
			if ok && s.serving() && s.ask == nil && f.chance(30) {
				s.asked, s.ask = f.kinds[i].name, &ask{do: askRevoke, id: old.AuthorityID}
			}
		}
	}
	for i, s := range f.servers {
		if !s.up && (i < 2 || tick > 60) && f.chance(30) { // the third joins midway
			f.start(s)
		}
	}
	if len(f.agents) < fleetAgents && tick > 80 { // and one agent
		f.join()
	}
}

// wish is something that an operator may want, mostly something possible.
func (f *fleet) wish(s *fleetServer) (kind string, q *ask) {
	i := f.random.IntN(2)
	slots := s.view.rows[s.number][i].slots
	slot := slots[f.random.IntN(len(slots))]
	if old, ok := find(slots, func(x registry.Slot) bool { return x.State == registry.SlotOld }); ok && f.chance(50) {
		slot = old
	}
	q = &ask{do: askPrepare, id: slot.AuthorityID, force: !f.strict() && f.chance(20)}
	_, tainted := f.kinds[i].find(s.view.bundle, slot)
	switch {
	case f.chance(20):
		q.do = []string{askActivate, askTaint, askRevoke}[f.random.IntN(3)]
	case slot.State == registry.SlotPrepared:
		q.do = askActivate
	case slot.State == registry.SlotOld && tainted:
		q.do = askRevoke
	case slot.State == registry.SlotOld:
		q.do = askTaint
	}
	if q.do == askPrepare {
		p, _ := find(slots, func(x registry.Slot) bool { return x.State == registry.SlotPrepared })
		q.id = p.AuthorityID
	}
	return f.kinds[i].name, q
}

// strict fleets have no crash, no agent away for long, and nothing is forced: no key that was
// published in time goes on without someone, but for a server's first.
func (f *fleet) strict() bool { return f.seed%2 == 0 && !f.mode.crashes }

func (f *fleet) join() {
	f.agents = append(f.agents, &fleetAgent{number: len(f.agents), name: fmt.Sprintf("agent-%d", len(f.agents))})
}

func runFleet(t *testing.T, seed uint64, mode fleetMode, rotations int) *fleet {
	random := rand.New(rand.NewPCG(seed, 2))
	f := &fleet{t: t, seed: seed, kinds: [2]kind{x509Kind(), jwtKind()}, mode: mode, random: random, now: start(), rotations: map[string]int{}, passed: map[string]map[string]struct{}{},
		revoked: map[string]bool{}, seen: map[string]int{}}
	f.newest = &shared{bundle: &bundle.Bundle{RefreshHint: time.Minute}}
	f.life = []time.Duration{time.Hour, 24 * time.Hour, 30 * 24 * time.Hour}[random.IntN(3)]
	f.ttl = f.life / time.Duration(6+random.IntN(6))
	if f.maxWait = DefaultMaxWait; f.strict() {
		f.maxWait = f.life
	}
	for i := range fleetServers {
		f.servers = append(f.servers, &fleetServer{number: i, id: fmt.Sprintf("server-%d", i), durable: random.IntN(4) > 0, held: map[string][]byte{}})
	}
	for range fleetAgents - 1 {
		f.join()
	}
	f.logf("seed %d: %+v, life %v, TTL %v", seed, mode, f.life, f.ttl)
	for tick := 0; f.rotations[X509] < rotations || f.rotations[JWT] < rotations; tick++ {
		if tick > 4000 {
			f.failf("%d and %d rotations", f.rotations[X509], f.rotations[JWT])
		}
		// A tick is a short time, in which what was changed gets around, and a long one.
		f.now = f.now.Add(time.Duration(1+random.IntN(5)) * time.Second)
		for round, quiet := 0, 0; round < 20 && quiet < 3; round++ {
			before := f.newest.bundleAt
			for _, i := range random.Perm(len(f.servers)) {
				f.turn(f.servers[i])
				f.beat(f.servers[i])
			}
			for _, i := range random.Perm(len(f.agents)) {
				f.live(f.agents[i])
			}
			f.verify()
			f.now = f.now.Add(time.Duration(1+random.IntN(5)) * time.Second)
			if quiet++; f.newest.bundleAt != before {
				quiet = 0
			}
		}
		f.disturb(tick)
		f.now = f.now.Add(time.Duration(random.Int64N(int64(f.ttl / 2))))
		for _, s := range f.servers { // nobody was silent meanwhile, or saw nothing
			f.beat(s)
			s.view = f.newest
		}
	}
	return f
}

// R63, R64, R65, R66, R69, R70: see above. A seed gives the same trace again.
func TestFleet(t *testing.T) {
	if *fleetSeed != 0 {
		t.Logf("%s", runFleet(t, *fleetSeed, fleetModes()[*fleetSeed/2%3], 50).trace.String())
		return
	}
	seen, named, mu := map[string]int{}, 0, sync.Mutex{}
	t.Run("seeds", func(t *testing.T) {
		const parts = 4
		for part := range uint64(parts) {
			t.Run(fmt.Sprint(part), func(t *testing.T) {
				t.Parallel()
				for seed := part; seed < uint64(*fleetSeeds); seed += parts {
					mode := fleetModes()[seed/2%3]
					f := runFleet(t, seed, mode, 50)
					if seed%20 == 0 {
						if again := runFleet(t, seed, mode, 50); again.trace.String() != f.trace.String() {
							t.Fatalf("seed %d: two traces", seed)
						}
					}
					mu.Lock()
					named += f.named
					for what, n := range f.seen {
						seen[what] += n
					}
					mu.Unlock()
				}
			})
		}
	})
	t.Logf("%v, a laggard named %d times", seen, named)
	for _, what := range []string{"taint", "revoke", "retire", "drop", "ready", "activate", "publish", "intend", "prune", "crash", "refused", "hold", "clock", "unverifiable"} {
		if seen[what] == 0 {
			t.Errorf("%s never happened", what)
		}
	}
	crashes := []string{"after making a key"}
	for _, rule := range []string{"intend", "publish", "ready", "activate", "retire", "taint", "revoke", "drop", "prune"} {
		crashes = append(crashes, "before the commit of "+rule, "after the commit of "+rule)
	}
	for _, where := range crashes { // at every step
		if seen["crash "+where] == 0 {
			t.Errorf("there was never a crash %s", where)
		}
	}
	if named == 0 {
		t.Error("no laggard was ever named")
	}
}

func fleetModes() []fleetMode {
	return []fleetMode{{}, {crashes: true}, {wrongClock: true}}
}
