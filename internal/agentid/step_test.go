package agentid

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const lifeOfSVID = time.Hour

var agentID = spiffeid.RequireFromString("spiffe://example.org/spire/agent/x")

// world is what surrounds a machine: a server, a source of roots, and clocks.
type world struct {
	t       *testing.T
	rnd     *rand.Rand
	machine *Machine
	steps   []taken

	time     time.Time     // the right one
	skew     time.Duration // of the agent's wall clock
	boot     time.Duration
	wait     time.Duration
	converse time.Duration // when the stream is opened again
	stop     error
	fx       Effects
	jobs     map[Kind]int
	going    Job // under way

	server  string // "ok", "away", "foreign", or the reason with which it refuses
	source  string // "current", "old", "away", "none"
	good    bool   // the agent's roots are the server's
	method  bool   // evidence is good again and again
	spent   bool   // evidence that is good once
	refused map[string]bool
	serial  int
	own     *Own
}

func newWorld(t *testing.T, seed uint64, repeatable bool) *world {
	return &world{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), boot: time.Hour,
		jobs: map[Kind]int{}, server: "ok", source: "current", method: repeatable, refused: map[string]bool{}}
}

// taken is a step as a reader wants to see it.
type taken struct {
	boot, skew time.Duration
	what       any
	fx         Effects
}

func (w *world) trace() string {
	var b strings.Builder
	for _, s := range w.steps {
		fmt.Fprintf(&b, "%v clock %+v: %T%+v -> %v %+v, wait %v, stop %v\n", s.boot, s.skew, s.what, s.what, s.fx.Job.Kind, s.fx.Job, s.fx.Wait.Round(time.Millisecond), s.fx.Stop)
		for _, n := range s.fx.Notes {
			fmt.Fprintf(&b, "\t%s: %v\n", n.Message, n.Err)
		}
	}
	return b.String()
}

func (w *world) begin(s Settings, own *Own, trusted bool) {
	w.own = own
	w.machine = NewMachine(s, own, trusted)
	w.feed(Tick{})
}

// sign returns an SVID as a server with the right time does.
func (w *world) sign(age time.Duration) *Own {
	w.serial++
	begin := w.time.Add(-age)
	return &Own{ID: agentID, Serial: fmt.Sprint(w.serial), NotBefore: begin.Add(-30 * time.Second), NotAfter: begin.Add(lifeOfSVID), Repeatable: w.method}
}

// feed gives one event to the machine and sees that what must always hold does.
func (w *world) feed(what any) {
	had := w.machine.own
	fx := w.machine.Step(Event{Now: w.time.Add(w.skew), Boot: w.boot, Seed: w.rnd.Uint64(), What: what})
	w.fx, w.wait = fx, fx.Wait
	if _, dull := what.(Tick); !dull || fx.Job.Kind != None || fx.Redial || fx.Stop != nil {
		w.steps = append(w.steps, taken{w.boot, w.skew, what, fx})
	}
	if had != nil && w.machine.own == nil {
		w.t.Fatalf("an SVID was given up without another\n%s", w.trace())
	}
	if fx.Stop != nil {
		w.stop = fx.Stop
		if fx.Wait != 0 || fx.Job.Kind != None {
			w.t.Fatalf("a stopped machine goes on: %+v", fx)
		}
		return
	}
	if fx.Wait <= 0 {
		w.t.Fatalf("no wait\n%s", w.trace())
	}
	if fx.Job.Kind != None {
		if w.going.Kind != None {
			w.t.Fatalf("%v starts during %v", fx.Job.Kind, w.going.Kind)
		}
		w.going = fx.Job
		w.jobs[fx.Job.Kind]++
	}
}

// run lets a time pass.
func (w *world) run(d time.Duration) {
	for end := w.boot + d; w.boot < end && w.stop == nil; {
		if job := w.going; job.Kind != None {
			w.pass(50 * time.Millisecond)
			w.going = Job{}
			own, err := w.do(job)
			if own != nil {
				w.own = own
			}
			w.feed(Done{Kind: job.Kind, Own: own, Err: err})
			continue
		}
		w.pass(min(w.wait, end-w.boot, 4*time.Second))
		if w.boot >= w.converse {
			w.converse = w.boot + 4*time.Second
			w.stream()
		} else {
			w.feed(Tick{})
		}
	}
}

// stream is what the conversation with the server tells, while there is an SVID to show.
func (w *world) stream() {
	if w.own == nil || w.server == "away" {
		w.feed(Tick{})
		return
	}
	err := w.reach()
	switch {
	case err == nil && !w.time.Before(w.own.NotAfter):
		err = denied(ReasonExpired)
	case err == nil && w.server != "ok" && w.server != "evidence":
		err = denied(w.server)
	case err == nil:
		if w.machine.foreign != 0 || w.machine.asked {
			w.feed(Accepted{})
		} else {
			w.feed(Tick{})
		}
		return
	}
	w.feed(Ended{Serial: w.own.Serial, Err: err})
}

func (w *world) pass(d time.Duration) {
	w.time = w.time.Add(d)
	w.boot += d
}

// do is the agent role, with that server.
func (w *world) do(job Job) (*Own, error) {
	if job.Kind == Save {
		return nil, nil
	}
	if job.Kind == Bootstrap {
		switch w.source {
		case "current":
			w.good = true
			return nil, nil
		case "away":
			return nil, fault.New(fault.Unavailable, "bundle_unavailable", "no answer")
		}
		return nil, fault.New(fault.Precondition, ReasonSuperseded, "only roots that were dropped").Fix("give a newer bundle")
	}
	if err := w.reach(); err != nil {
		return nil, err
	}
	if job.Kind == Renew {
		if w.server != "ok" && w.server != "evidence" {
			return nil, denied(w.server)
		}
		if !w.time.Before(w.own.NotAfter) {
			return nil, denied(ReasonExpired)
		}
		if !w.method {
			return w.sign(0), nil
		}
	}
	switch {
	case w.server == "evidence":
		return nil, fault.New(fault.Denied, "evidence_refused", "not any more")
	case !w.method && w.spent:
		return nil, fault.New(fault.Denied, "join_token_refused", "used")
	}
	w.spent = true
	w.server = "ok"
	return w.sign(0), nil
}

// reach gets as far as the server's own word.
func (w *world) reach() error {
	switch {
	case w.server == "away":
		return fault.New(fault.Unavailable, "server_unavailable", "no answer")
	case w.skew.Abs() > 30*time.Minute:
		return fault.New(fault.Unauthenticated, ReasonClock, "the server's certificate is not valid now")
	case w.server == "foreign" || !w.good:
		return fault.New(fault.Unauthenticated, ReasonUntrusted, "not ours")
	case w.server == ReasonBanned:
		return denied(ReasonBanned)
	}
	return nil
}

func denied(reason string) error { return fault.New(fault.Denied, reason, "refused") }

// ready reports whether the agent has an SVID that this server accepts.
func (w *world) ready() bool {
	m := w.machine
	return w.stop == nil && m.own != nil && m.refused == nil && w.time.Before(m.own.NotAfter) && w.server == "ok" && w.good && m.foreign == 0
}

// Every combination of what the agent holds, what the server says and what the
// clock shows has a way out: while the trouble lasts the agent neither spins nor
// gives up what is good; when it is over the agent is well again within a
// minute, or it has ended with what an operator has to do.
func TestEveryStateHasAWayOut(t *testing.T) { // R54, R56, R107
	owns := []string{"absent", "fresh", "past half", "expired"}
	bundles := []string{"good", "stale", "absent"}
	servers := []string{"ok", "away", "foreign", "evidence", ReasonExpired, ReasonNotAttested, ReasonNotActive, ReasonMustReattest, ReasonBanned}
	skews := []time.Duration{0, 10 * 365 * 24 * time.Hour, -50 * time.Minute}
	sources := []string{"current", "old", "away", "none"}
	rows, stops := 0, map[string]int{}
	for _, own := range owns {
		for _, roots := range bundles {
			for _, server := range servers {
				for _, skew := range skews {
					for _, source := range sources {
						for _, repeatable := range []bool{true, false} {
							if roots == "absent" && own != "absent" {
								continue // an SVID is stored with the roots that it stands on
							}
							rows++
							name := fmt.Sprintf("own %s, bundle %s, server %s, clock %v, source %s, repeatable %v", own, roots, server, skew, source, repeatable)
							s := Settings{Source: source != "none", Rebootstrap: Auto, RebootstrapDelay: 2 * time.Minute, Remedy: "do this"}
							w := newWorld(t, uint64(rows), repeatable)
							w.server, w.source, w.skew = server, source, skew
							w.good = roots == "good"
							var held *Own
							switch own {
							case "fresh":
								held = w.sign(time.Minute)
							case "past half":
								held = w.sign(40 * time.Minute)
							case "expired":
								held = w.sign(2 * lifeOfSVID)
							}
							if held != nil {
								held.Stored, w.spent = true, true
							}
							w.begin(s, held, roots != "absent")
							const trouble = 3 * time.Minute
							w.run(trouble)
							total := w.jobs[Bootstrap] + w.jobs[Attest] + w.jobs[Renew]
							if total > 40 {
								t.Fatalf("%s: %d attempts in %v", name, total, trouble)
							}
							if server == "foreign" || server == "away" || server == "evidence" {
								w.server = "ok" // else it refuses until the agent attests, or has another SVID
							}
							w.skew = 0
							if w.source == "away" {
								w.source = "current"
							}
							w.run(time.Minute)
							switch {
							case w.stop != nil:
								stops[fault.ReasonOf(w.stop)]++
								checkStop(t, name, w, held)
							case w.ready():
							case roots != "good" && !w.good && source != "current" && held != nil && w.time.Before(held.NotAfter):
								// The source is asked when the delay is over; what is held is good.
								w.run(w.machine.RebootstrapDelay + time.Minute)
								if w.source == "current" && !w.ready() {
									t.Fatalf("%s: not well after the delay\n%s", name, w.trace())
								}
							case roots == "stale" && held != nil && w.source == "current" && w.time.Before(held.NotAfter):
								w.run(w.machine.RebootstrapDelay + time.Minute)
								if !w.ready() {
									t.Fatalf("%s: not well after the delay\n%s", name, w.trace())
								}
							case !w.good && w.source != "current":
								// Nobody can tell it the roots: it goes on trying, and says so.
								if len(w.fx.Notes) == 0 && w.machine.failures == 0 {
									t.Fatalf("%s: it does nothing\n%s", name, w.trace())
								}
							default:
								t.Fatalf("%s: not well\n%s", name, w.trace())
							}
						}
					}
				}
			}
		}
	}
	t.Logf("%d combinations; stopped: %v", rows, stops)
}

// checkStop sees that an agent gave up only where nothing else could be done.
func checkStop(t *testing.T, name string, w *world, held *Own) {
	t.Helper()
	reason := fault.ReasonOf(w.stop)
	if reason == ReasonBanned {
		if !w.fx.Forget {
			t.Fatalf("%s: the SVID of a banned agent comes back with the next start", name)
		}
		return
	}
	if w.fx.Forget {
		t.Fatalf("%s: the SVID is removed for %s", name, reason)
	}
	if held == nil {
		return // a first start: someone is there to read what is wrong
	}
	if w.method && reason != "evidence_refused" && !strings.Contains(w.stop.Error(), "refused") {
		t.Fatalf("%s: stopped with %v although the node can prove itself", name, w.stop)
	}
	if !strings.Contains(w.stop.Error(), "do this") {
		t.Fatalf("%s: stopped without a remedy: %v", name, w.stop)
	}
	if w.machine.refused == nil && w.time.Before(held.NotAfter) {
		t.Fatalf("%s: stopped with an SVID that is good: %v\n%s", name, w.stop, w.trace())
	}
}

// While the SVID in use is good, evidence that is refused is tried again until
// the SVID ends; only then does the agent end.
func TestGoodSVIDOutlivesRefusedEvidence(t *testing.T) {
	s := Settings{Remedy: "do this"}
	w := newWorld(t, 1, true)
	w.good, w.server = true, "evidence"
	own := w.sign(0)
	w.begin(s, own, true)
	w.run(59 * time.Minute)
	if w.stop != nil || w.machine.own != own || w.jobs[Renew] < 10 {
		t.Fatalf("stop %v, %d attempts", w.stop, w.jobs[Renew])
	}
	w.run(2 * time.Minute)
	if w.stop == nil {
		t.Fatal("it goes on without an SVID and without evidence")
	}
}

// A clock that is set ahead by more than what is left of the SVID, and by less
// than shows in the server's own certificate, does not cost an agent whose
// evidence is spent its place: when the clock is right, so is all else.
func TestClockSetAheadOfTheSVID(t *testing.T) { // R107
	w := newWorld(t, 1, false)
	w.good, w.spent = true, true
	w.begin(Settings{Remedy: "do this"}, w.sign(0), true)
	w.run(20 * time.Minute)
	w.server, w.skew = "away", 29*time.Minute
	w.run(20 * time.Minute)
	w.server = "ok"
	w.run(5 * time.Minute)
	if w.stop != nil {
		t.Fatalf("stopped: %v\n%s", w.stop, w.trace())
	}
	w.skew = 0
	w.run(time.Minute)
	if !w.ready() || w.machine.ended() {
		t.Fatalf("not well\n%s", w.trace())
	}
	w.server = "away"
	w.run(lifeOfSVID)
	w.server = "ok"
	w.run(time.Minute)
	if w.stop == nil {
		t.Fatal("it goes on without an SVID and without evidence")
	}
}

// Asleep for 30 days: everything has ended, the authority too. Within a minute
// of the network's return the agent is well, where its source has the new roots.
func TestHealsAfterAMonthAsleep(t *testing.T) { // R57
	s := Settings{Source: true, Rebootstrap: Auto, Remedy: "do this"}
	w := newWorld(t, 2, true)
	w.good = true
	w.begin(s, w.sign(0), true)
	w.run(10 * time.Minute)
	w.good = false // all roots are others by now
	w.server, w.source = "away", "away"
	w.pass(30 * 24 * time.Hour)
	w.feed(Slept{})
	w.run(10 * time.Minute)
	w.server, w.source = "ok", "current"
	w.run(time.Minute)
	if !w.ready() {
		t.Fatalf("not well, stop %v\n%s", w.stop, w.trace())
	}
}

// What was adopted is renewed between 45 and 55 hundredths of its life, by the
// clock that cannot be set as well: a wall clock that is put back does not
// stretch a life (R107, R109).
func TestRenewalTime(t *testing.T) {
	for seed := range uint64(200) {
		for _, skew := range []time.Duration{0, -20 * time.Minute} {
			s := Settings{}
			w := newWorld(t, seed, false)
			w.good = true
			w.begin(s, w.sign(0), true)
			w.run(time.Minute)
			w.skew = skew
			w.run(26*time.Minute - time.Second)
			if w.jobs[Renew] != 0 && skew == 0 {
				t.Fatalf("seed %d: renewed after %v", seed, w.boot-time.Hour)
			}
			w.run(6*time.Minute + 10*time.Second)
			if w.jobs[Renew] == 0 {
				t.Fatalf("seed %d: not renewed after %v with the clock %v", seed, w.boot-time.Hour, skew)
			}
		}
	}
}

// A refusal of the SVID that was replaced meanwhile says nothing about the new one.
func TestLateRefusal(t *testing.T) {
	s := Settings{}
	w := newWorld(t, 3, false)
	w.good = true
	first := w.sign(0)
	w.begin(s, first, true)
	w.run(40 * time.Minute)
	if w.machine.own == first {
		t.Fatal("not renewed")
	}
	w.feed(Ended{Serial: first.Serial, Err: denied(ReasonNotActive)})
	if w.machine.refused != nil || w.fx.Job.Kind != None {
		t.Errorf("it acts on a late refusal: %+v", w.fx)
	}
}

// Two nodes that prove to be one oust each other, but not at full speed (F22).
func TestOustedAgentTakesItsTime(t *testing.T) {
	s := Settings{}
	w := newWorld(t, 4, true)
	w.good = true
	w.begin(s, w.sign(0), true)
	w.run(2 * time.Minute)
	for w.boot < 2*time.Hour {
		w.feed(Ended{Serial: w.machine.own.Serial, Err: denied(ReasonNotActive)})
		w.server = ReasonNotActive
		w.run(2 * time.Second)
	}
	if n := w.jobs[Attest]; n > 200 {
		t.Errorf("%d attestations in an hour", n)
	}
}

// What the server wants is done: a renewal within the window, an attestation
// beside the SVID in use, another address; and what an agent makes of a bundle
// without its authority.
func TestDirectives(t *testing.T) {
	s := Settings{}
	fresh := func(seed uint64) *world {
		w := newWorld(t, seed, true)
		w.good = true
		w.begin(s, w.sign(0), true)
		w.run(time.Minute)
		return w
	}
	w := fresh(1)
	w.feed(Renewal{Within: 10 * time.Second})
	w.run(11 * time.Second)
	if w.jobs[Renew] != 1 {
		t.Errorf("%d renewals", w.jobs[Renew])
	}
	w = fresh(2)
	own := w.machine.own
	w.feed(Reattestation{Reason: "evidence changed"})
	if w.fx.Job.Kind != Attest || w.machine.own != own || w.fx.Redial {
		t.Errorf("%+v", w.fx)
	}
	w.run(time.Second)
	if w.machine.own == own {
		t.Error("not attested")
	}
	w = fresh(3)
	w.feed(Reconnection{Address: "b:1", Within: 5 * time.Second})
	redialled := ""
	for range 10 {
		w.pass(time.Second)
		w.feed(Tick{})
		if w.fx.Redial {
			redialled += w.fx.Address
		}
	}
	if redialled != "b:1" {
		t.Errorf("redialled to %q", redialled)
	}
	for _, standing := range []Standing{Tainted, Gone} {
		w = fresh(4)
		w.feed(BundleChanged{Authority: standing})
		w.run(soon + time.Second)
		if w.jobs[Renew] != 1 || w.jobs[Save] != 1 {
			t.Errorf("authority %d: %v", standing, w.jobs)
		}
	}
	w = fresh(5)
	w.server = "away" // it breaks off connections that show the SVID
	w.feed(BundleChanged{Authority: Gone})
	w.run(20 * time.Second)
	if w.jobs[Attest] == 0 {
		t.Error("it never attests")
	}
}

// A server's hint to wait is obeyed.
func TestHint(t *testing.T) {
	for hint, want := range map[time.Duration]time.Duration{0: 30 * time.Second, 2 * time.Minute: 2 * time.Minute} {
		s := Settings{}
		w := newWorld(t, 1, true)
		w.begin(s, nil, true)
		w.going = Job{}
		w.feed(Done{Kind: Attest, Err: fault.New(fault.Exhausted, "rate_limited", "slow down").NotBefore(hint)})
		if got := w.machine.notBefore - w.boot; got > want || hint > 0 && got < want {
			t.Errorf("hint %v: wait %v", hint, got)
		}
	}
}

// What cannot be stored is used only when the SVID in use is nearly over, and a
// bundle that cannot be stored is tried again with a growing wait.
func TestFullDisk(t *testing.T) {
	s := Settings{}
	w := newWorld(t, 1, false)
	w.good = true
	w.begin(s, w.sign(0), true)
	full := fault.New(fault.Unavailable, ReasonNotStored, "no space")
	volatile := false
	for range 2000 {
		if job := w.going; job.Kind != None {
			w.going = Job{}
			if job.Volatile {
				volatile = true
				break
			}
			w.feed(Done{Kind: job.Kind, Err: full})
			continue
		}
		w.pass(min(w.wait, 2*time.Second))
		w.feed(Tick{})
	}
	if left := w.machine.remaining(); !volatile || left > lifeOfSVID/4+time.Minute || left < lifeOfSVID/8 {
		t.Errorf("volatile %v with %v left", volatile, w.machine.remaining())
	}
	w = newWorld(t, 2, false)
	w.begin(s, w.sign(0), true)
	w.feed(BundleChanged{})
	saves := 0
	for end := w.boot + 10*time.Minute; w.boot < end; {
		if job := w.going; job.Kind != None {
			w.going = Job{}
			if job.Kind == Save {
				saves++
			}
			w.feed(Done{Kind: job.Kind, Err: full})
			continue
		}
		w.pass(min(w.wait, 2*time.Second))
		w.feed(Tick{})
	}
	if saves < 10 || saves > 60 {
		t.Errorf("%d attempts to store in ten minutes", saves)
	}
}

// One seed gives one trace, byte for byte.
func TestReplay(t *testing.T) {
	run := func() string {
		s := Settings{Source: true, Rebootstrap: Auto}
		w := newWorld(t, 99, true)
		w.begin(s, nil, false)
		for range 50 {
			w.server = []string{"ok", "away", "foreign", ReasonExpired, "evidence"}[w.rnd.IntN(5)]
			w.skew = []time.Duration{0, time.Hour, -time.Hour}[w.rnd.IntN(3)]
			w.run(time.Duration(w.rnd.IntN(1200)) * time.Second)
		}
		return w.trace()
	}
	if a, b := run(), run(); a != b || len(a) == 0 {
		t.Error("two runs differ")
	}
}

// However short the life of an SVID and however unlucky the moment at which the
// server comes back, the renewal is in time: attempts fit into what is left, and a
// server that is there again is asked at once.
func TestServerComesBackBeforeTheEnd(t *testing.T) { // R56
	s := Settings{}
	for seed := range uint64(100) {
		w := newWorld(t, seed, false)
		w.good, w.spent = true, true
		own := w.sign(0)
		own.NotAfter = w.time.Add(time.Minute)
		w.begin(s, own, true)
		w.server = "away"
		w.run(50 * time.Second)
		w.server = "ok"
		w.feed(Accepted{})
		w.run(2 * time.Second)
		if w.machine.own == own {
			t.Fatalf("seed %d: not renewed with the server there\n%s", seed, w.trace())
		}
	}
	for seed := range uint64(100) { // without anybody saying that it is there
		w := newWorld(t, seed, false)
		w.good, w.spent = true, true
		own := w.sign(0)
		own.NotAfter = w.time.Add(time.Minute)
		w.begin(s, own, true)
		w.server = "away"
		w.run(50 * time.Second)
		w.server, w.converse = "ok", 24*time.Hour
		w.run(9 * time.Second)
		if w.machine.own == own {
			t.Fatalf("seed %d: not renewed in what is left\n%s", seed, w.trace())
		}
	}
}

// A hint stands although the server is there.
func TestHintOutlivesTheConversation(t *testing.T) {
	s := Settings{}
	w := newWorld(t, 1, false)
	w.good = true
	w.begin(s, w.sign(40*time.Minute), true)
	w.going = Job{}
	w.feed(Done{Kind: Renew, Err: fault.New(fault.Exhausted, "rate_limited", "slow down").NotBefore(time.Minute)})
	until := w.machine.notBefore
	w.feed(Accepted{})
	if w.machine.notBefore != until || until < w.boot+time.Minute {
		t.Errorf("the next attempt is in %v", w.machine.notBefore-w.boot)
	}
}
