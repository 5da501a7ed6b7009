package serverapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// platform is a checker whose answers a test gives.
type platform struct {
	asked  atomic.Int64
	answer func(ctx context.Context, facts map[string]string) (nodeattest.Seen, error)
}

func (p *platform) Checks(fact string) bool { return entry.Verifiable(fact) }

func (p *platform) Look(ctx context.Context, _ []entry.Selector, facts map[string]string) (nodeattest.Seen, error) {
	p.asked.Add(1)
	return p.answer(ctx, facts)
}

// nods says that everything is as stated.
func nods(_ context.Context, facts map[string]string) (nodeattest.Seen, error) {
	return nodeattest.Seen{Facts: facts, Selectors: []entry.Selector{{Type: "k8s", Value: "ns:shop"}, {Type: "k8s", Value: "pod-label:app:web"}}}, nil
}

var lookTD = spiffeid.RequireTrustDomainFromString("td")

func lookRule(t *testing.T, selectors ...string) entry.Entry {
	t.Helper()
	r, err := entry.ParseRule(lookTD, "spiffe://td/ns/{k8s.ns}/sa/{k8s.sa}", "", "")
	if err != nil {
		t.Fatal(err)
	}
	e := entry.Entry{ID: "r", Revision: 1, Rule: r}
	for _, text := range selectors {
		s, err := entry.ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		e.Selectors = append(e.Selectors, s)
	}
	return e
}

// rigLooks asks as one agent would.
type rigLooks struct {
	t     *testing.T
	looks *looks
	on    *platform
}

func newRigLooks(t *testing.T) *rigLooks {
	r := &rigLooks{t, newLooks(&rpc.Guard{Log: slog.New(slog.DiscardHandler)}), &platform{answer: nods}}
	t.Cleanup(r.looks.close)
	return r
}

func podFacts(uid string) map[string]string {
	return map[string]string{"k8s.ns": "shop", "k8s.sa": "web", "k8s.pod": "web-" + uid, "k8s.pod_uid": uid}
}

func (r *rigLooks) claim(agent, uid string, selectors ...string) *claim {
	return &claim{agent: spiffeid.RequireFromPath(lookTD, "/spire/agent/"+agent), node: registry.Node{AttestationType: "x"},
		rule: lookRule(r.t, selectors...), facts: podFacts(uid), checker: r.on, life: time.Hour}
}

func (r *rigLooks) ask(c *claim) error {
	k, err := r.looks.begin(c, time.Now().Round(0))
	if err != nil {
		return err
	}
	return k.wait(r.t.Context(), c)
}

func (r *rigLooks) wants(what string, err error, reason string, asked int64) {
	r.t.Helper()
	if err == nil && reason != "" || err != nil && fault.ReasonOf(err) != reason {
		r.t.Errorf("%s: %v, want %q", what, err, reason)
	}
	if n := r.on.asked.Load(); n != asked {
		r.t.Errorf("%s: the platform was asked %d times, want %d", what, n, asked)
	}
}

// What is true is asked for once in the life of an SVID, what is not once in a moment.
func TestLooksRemember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigLooks(t)
		r.wants("first", r.ask(r.claim("a", "1", "k8s:ns:shop")), "", 1)
		time.Sleep(59 * time.Minute)
		r.wants("again", r.ask(r.claim("a", "1", "k8s:ns:shop")), "", 1)
		r.wants("by another rule", r.ask(r.claim("a", "1", "k8s:pod-label:app:web", "unix:uid:7", "k8s:container-name:c")), "", 1)
		r.wants("another pod", r.ask(r.claim("a", "2")), "", 2)
		r.wants("the same pod of another agent", r.ask(r.claim("b", "1")), "", 3)
		moved := r.claim("a", "1")
		moved.node.Selectors = []entry.Selector{{Type: "x", Value: "cluster:other"}}
		r.wants("the agent as another node", r.ask(moved), "", 4)
		time.Sleep(time.Minute)
		r.wants("after its life", r.ask(r.claim("a", "1")), "", 5)

		// A lie is refused for a moment without asking, and what has become true is seen.
		lie := r.claim("a", "1", "k8s:pod-label:app:db")
		r.wants("a lie", r.ask(lie), "rule_facts_refuted", 5)
		time.Sleep(refusalLife)
		r.wants("a lie later", r.ask(lie), "rule_facts_refuted", 6)
		r.wants("a lie at once", r.ask(lie), "rule_facts_refuted", 6)
		r.wants("the truth meanwhile", r.ask(r.claim("a", "1")), "", 6)
		other := r.claim("a", "1")
		other.facts["k8s.sa"] = "admin"
		r.on.answer = func(ctx context.Context, facts map[string]string) (nodeattest.Seen, error) {
			return nods(ctx, podFacts("1"))
		}
		time.Sleep(refusalLife)
		r.wants("a fact that is not so", r.ask(other), "rule_facts_refuted", 7)

		gone := func(context.Context, map[string]string) (nodeattest.Seen, error) {
			return nodeattest.Seen{}, fault.New(fault.Denied, "pod_unknown", "there is none")
		}
		r.on.answer = gone
		r.wants("gone", r.ask(r.claim("a", "3")), "pod_unknown", 8)
		r.wants("gone, at once", r.ask(r.claim("a", "3")), "pod_unknown", 8)
		r.on.answer = nods
		time.Sleep(refusalLife)
		r.wants("there now", r.ask(r.claim("a", "3")), "", 9)

		// What is known to end soon is believed until then.
		r.on.answer = func(ctx context.Context, facts map[string]string) (nodeattest.Seen, error) {
			seen, _ := nods(ctx, facts)
			seen.Until = time.Now().Add(30 * time.Second)
			return seen, nil
		}
		r.wants("ending", r.ask(r.claim("a", "4")), "", 10)
		time.Sleep(29 * time.Second)
		r.wants("ending, still there", r.ask(r.claim("a", "4")), "", 10)
		time.Sleep(time.Second)
		r.on.answer = gone
		r.wants("ended", r.ask(r.claim("a", "4")), "pod_unknown", 11)
	})
}

// While the platform is away what was seen counts, and nothing else does.
func TestLooksWhilePlatformIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigLooks(t)
		r.wants("first", r.ask(r.claim("a", "1")), "", 1)
		for _, away := range []func(context.Context, map[string]string) (nodeattest.Seen, error){
			func(context.Context, map[string]string) (nodeattest.Seen, error) {
				return nodeattest.Seen{}, fault.New(fault.Unavailable, "api_away", "it is away")
			},
			func(context.Context, map[string]string) (nodeattest.Seen, error) {
				return nodeattest.Seen{}, errors.New("broken")
			},
			func(ctx context.Context, _ map[string]string) (nodeattest.Seen, error) { // silent
				<-ctx.Done()
				return nodeattest.Seen{}, ctx.Err()
			},
		} {
			time.Sleep(refusalLife)
			r.on.answer, r.on.asked = away, atomic.Int64{}
			began := time.Now()
			err := r.ask(r.claim("a", "2"))
			r.wants("unknown", err, entry.FactsUnavailable, 1)
			if fault.KindOf(err) != fault.Unavailable || time.Since(began) > lookWait {
				t.Errorf("%v after %v", err, time.Since(began))
			}
			r.wants("unknown, at once", r.ask(r.claim("a", "2")), entry.FactsUnavailable, 1)
			r.wants("known", r.ask(r.claim("a", "1")), "", 1)
			// A claim that is not as it was seen is asked for, and takes nothing from the others.
			r.wants("another claim", r.ask(r.claim("a", "1", "k8s:pod-label:app:new")), entry.FactsUnavailable, 2)
			r.wants("known after that", r.ask(r.claim("a", "1")), "", 2)
		}
		r.on.answer, r.on.asked = nods, atomic.Int64{}
		time.Sleep(refusalLife)
		r.wants("back", r.ask(r.claim("a", "2")), "", 1)
	})
}

// Many who ask for the same thing at once share one call; of one agent only so many
// are under way, and a silent platform keeps nobody for longer than stated.
func TestLooksAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigLooks(t)
		release, most, running := make(chan struct{}), 0, 0
		var mu sync.Mutex
		r.on.answer = func(ctx context.Context, facts map[string]string) (nodeattest.Seen, error) {
			mu.Lock()
			running++
			most = max(most, running)
			mu.Unlock()
			defer func() {
				mu.Lock()
				running--
				mu.Unlock()
			}()
			select {
			case <-release:
				return nods(ctx, facts)
			case <-ctx.Done():
				return nodeattest.Seen{}, ctx.Err()
			}
		}
		var all sync.WaitGroup
		for i := range 1000 {
			all.Go(func() {
				if err := r.ask(r.claim("a", fmt.Sprint(i%10))); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		close(release)
		all.Wait()
		if n := r.on.asked.Load(); n != 10 || most != 10 {
			t.Errorf("asked %d times, %d at once", n, most)
		}
		// Nobody who goes away takes the answer from the others.
		release = make(chan struct{})
		ctx, leave := context.WithCancel(t.Context())
		c := r.claim("a", "left")
		k, err := r.looks.begin(c, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			if err := r.ask(r.claim("a", "left")); err != nil {
				t.Error(err)
			}
		})
		leave()
		if err := k.wait(ctx, c); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		synctest.Wait()
		close(release)
		all.Wait()

		release, most = make(chan struct{}), 0
		refused := 0
		for i := range maxLooks + 100 {
			if _, err := r.looks.begin(r.claim("a", fmt.Sprint("x", i)), time.Now()); fault.ReasonOf(err) == entry.FactsUnavailable {
				refused++
			}
		}
		if err := func() error { close(release); return r.ask(r.claim("b", "1")) }(); err != nil {
			t.Errorf("another agent: %v", err)
		}
		synctest.Wait()
		if refused != 100 || most > maxAtOnce+1 {
			t.Errorf("%d were refused, want 100; %d at once", refused, most)
		}
	})
}

// What is remembered is bounded, and goes by itself.
func TestLooksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigLooks(t)
		count := func() (n int) {
			for _, mine := range r.looks.agents {
				n += len(mine.things)
			}
			if n != r.looks.held {
				t.Errorf("%d are held, %d counted", n, r.looks.held)
			}
			return n
		}
		for i := range maxSeenOf + 500 {
			if err := r.ask(r.claim("a", fmt.Sprint(i))); err != nil {
				t.Fatal(err)
			}
		}
		if n := count(); n != maxSeenOf {
			t.Errorf("%d are held of one agent", n)
		}
		r.looks.held = maxSeen // as if others had them
		r.wants("the neighbour of full ones", r.ask(r.claim("b", "1")), "", maxSeenOf+501)
		r.looks.held -= maxSeen - maxSeenOf
		if n := count(); n != maxSeenOf {
			t.Errorf("%d are held", n)
		}
		time.Sleep(time.Hour)
		r.wants("later", r.ask(r.claim("c", "1")), "", maxSeenOf+502)
		if n := count(); n != 1 || len(r.looks.agents) != 1 {
			t.Errorf("%d of %d agents are held", n, len(r.looks.agents))
		}
		// The clock is put back: nothing that was seen in the future is believed (R107).
		time.Sleep(time.Minute)
		k, err := r.looks.begin(r.claim("c", "1"), time.Now().Add(-time.Hour))
		if err != nil || k.wait(t.Context(), r.claim("c", "1")) != nil || r.on.asked.Load() != maxSeenOf+503 {
			t.Errorf("%v, asked %d times", err, r.on.asked.Load())
		}
		r.looks.close()
		if _, err := r.looks.begin(r.claim("d", "1"), time.Now()); fault.KindOf(err) != fault.Unavailable {
			t.Errorf("after the end: %v", err)
		}
	})
}

// A checker that panics fails that look alone. R99.
func TestLookPanics(t *testing.T) {
	r := newRigLooks(t)
	r.on.answer = func(context.Context, map[string]string) (nodeattest.Seen, error) { panic("a bug") }
	r.wants("panic", r.ask(r.claim("a", "1")), entry.FactsUnavailable, 1)
	r.on.answer = nods
	r.wants("another", r.ask(r.claim("a", "2")), "", 2)
	if n := r.looks.guard.Panics.Load(); n != 1 {
		t.Errorf("%d panics were counted", n)
	}
}
