package serverapi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// crowd is agents that follow a server, without a wire.
type crowd struct {
	t   *testing.T
	reg *registry.Registry
	f   *Followers
	now time.Time

	gone chan struct{} // a batch put somebody out who had left
}

func newCrowd(t *testing.T, agents int) *crowd {
	c := &crowd{t: t, reg: emptyRegistry(t), now: time.Now().Truncate(time.Second), gone: make(chan struct{}, 10)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); c.reg.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	c.f = NewFollowers("s1", c.reg)
	c.reg.Batches(func(b store.Batch) {
		if c.f.batch(b) {
			c.gone <- struct{}{}
		}
	})
	c.update(func(tx *registry.Tx) error {
		for i := range agents {
			n := registry.Node{ID: c.id(i), AttestationType: "test", AttestedAt: c.now,
				Current: registry.Credential{Serial: "1", ExpiresAt: c.now.Add(time.Hour), KeyHash: []byte{1}}}
			if err := tx.PutNode(n); err != nil {
				return err
			}
		}
		return nil
	})
	return c
}

func (c *crowd) id(i int) spiffeid.ID {
	return spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/spire/agent/%04d", i))
}

func (c *crowd) update(f func(*registry.Tx) error) uint64 {
	c.t.Helper()
	p, err := c.reg.Update(c.t.Context(), "test", f)
	if err != nil {
		c.t.Fatal(err)
	}
	return p.Revision
}

// grant changes what an agent is granted.
func (c *crowd) grant(i int, name string) uint64 {
	return c.update(func(tx *registry.Tx) error {
		return tx.PutEntry(entry.Entry{ID: fmt.Sprintf("%s-%d", name, i), ParentID: c.id(i), SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/" + name),
			Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}, CreatedAt: c.now})
	})
}

// attach opens a stream of an agent, which is told everything and acknowledges it.
func (c *crowd) attach(i int) *following {
	row := c.f.join(c.id(i), c.now.Add(time.Hour), c.reg.Follow(c.id(i), true))
	c.catchUp(row)
	return row
}

// catchUp has an agent told everything, and acknowledges it.
func (c *crowd) catchUp(row *following) {
	c.f.acknowledge(row, row.follower.Delta().Position, 1, c.now)
}

// is checks what would be said of these agents.
func (c *crowd) is(when string, acknowledged uint64, roster []int, laggards ...registry.Laggard) {
	c.t.Helper()
	r := c.f.Report(c.now)
	var hashes []uint64
	for _, i := range roster {
		hashes = append(hashes, registry.AgentHash(c.id(i)))
	}
	slices.Sort(hashes)
	if r.Acknowledged != acknowledged || !slices.Equal(r.Roster, hashes) || !slices.Equal(r.Laggards, laggards) {
		c.t.Errorf("%s: %+v, want acknowledged %d, agents %v, laggards %v", when, r, acknowledged, roster, laggards)
	}
}

func (c *crowd) lags(i int, at uint64) registry.Laggard {
	return registry.Laggard{Agent: c.id(i).String(), Acknowledged: at}
}

func TestReport(t *testing.T) {
	c := newCrowd(t, 3)
	c.is("nobody", c.reg.Position().Revision, nil)
	zero, one := c.attach(0), c.attach(1)
	begin := c.reg.Position().Revision
	c.is("both are in step", begin, []int{0, 1})

	// Who is not affected by a change holds it; who is, once it has acknowledged.
	one0 := c.grant(0, "x")
	c.is("not told yet", one0, []int{0, 1}, c.lags(0, begin))
	d := zero.follower.Delta()
	c.is("told", one0, []int{0, 1}, c.lags(0, begin))
	two0 := c.grant(0, "y") // while the first is under way
	c.f.acknowledge(zero, d.Position, 1, c.now)
	c.is("has the first of two", two0, []int{0, 1}, c.lags(0, one0))
	c.catchUp(zero)
	c.is("has both", two0, []int{0, 1})

	// An agent that is new says nothing at first, and may say what it likes: no more
	// than there is.
	third := c.f.join(c.id(2), c.now.Add(time.Hour), c.reg.Follow(c.id(2), true))
	c.is("new", two0, []int{0, 1, 2}, c.lags(2, 0))
	boast := third.follower.Delta().Position
	boast.Revision += 1000
	c.f.acknowledge(third, boast, 1, c.now)
	c.grant(2, "z")
	at := c.grant(1, "z")
	c.is("boasting", at, []int{0, 1, 2}, c.lags(1, begin))
	c.catchUp(one)
	c.catchUp(third)

	// An agent that leaves stays for a while, but holds nothing that comes later.
	c.f.leave(one, c.now)
	c.is("left", at, []int{0, 1, 2})
	later := c.grant(0, "later")
	c.catchUp(zero)
	c.is("left behind", later, []int{0, 1, 2}, c.lags(1, at))
	c.now = c.now.Add(awayFor)
	c.is("gone", later, []int{0, 2})
	one = c.attach(1)
	c.is("back", later, []int{0, 1, 2})

	// A second stream counts beside the first, and one of them is enough.
	again := c.attach(0)
	now := c.grant(0, "twice")
	c.catchUp(again)
	c.is("one of two streams has it", now, []int{0, 1, 2})
	c.f.leave(again, c.now)
	c.is("the better one is gone", now, []int{0, 1, 2}, c.lags(0, later))
	c.catchUp(zero)

	// R30: who is out is attached no longer.
	ban := func(i int) uint64 {
		return c.update(func(tx *registry.Tx) error {
			n, err := tx.Node(c.id(i))
			if err != nil {
				return err
			}
			n.Banned = true
			return tx.PutNode(n)
		})
	}
	banned := ban(1)
	if !c.f.leave(one, c.now) {
		t.Error("leave does not say that the agent is out")
	}
	c.is("banned", banned, []int{0, 2})
	if c.f.leave(third, c.now) {
		t.Error("leave says that the agent is out")
	}
	c.is("left", banned, []int{0, 2})
	banned = ban(2)
	select {
	case <-c.gone:
	case <-time.After(30 * time.Second):
		t.Fatal("the ban of an agent that has left is not worth a beat")
	}
	c.is("banned after it left", banned, []int{0})
}

// More than a hundred that lag: the hundred that are furthest behind are named, and
// what is said of the others is true of all of them.
func TestReportOfMany(t *testing.T) {
	c := newCrowd(t, 150)
	var rows []*following
	for i := range 150 {
		rows = append(rows, c.attach(i))
	}
	held := map[string]uint64{}
	for i := range 120 { // each has one change more than the one before
		at := c.reg.Position().Revision
		c.catchUp(rows[i])
		c.grant(i, "x")
		held[c.id(i).String()] = at
	}
	r := c.f.Report(c.now)
	if len(r.Laggards) != 100 || r.Acknowledged != held[c.id(100).String()] {
		t.Errorf("%d laggards, acknowledged %d, want 100 and %d", len(r.Laggards), r.Acknowledged, held[c.id(100).String()])
	}
	for i, l := range r.Laggards {
		if l != c.lags(i, held[l.Agent]) {
			t.Errorf("laggard %d is %+v", i, l)
		}
	}
}

// What servers say of themselves affects no agent, so that no beat has an agent
// acknowledge something, which would be worth another beat.
func TestBeatsWakeNobody(t *testing.T) {
	c := newCrowd(t, 3)
	rows := []*following{c.attach(0), c.attach(1)}
	c.update(func(tx *registry.Tx) error {
		r := c.f.Report(c.now)
		return errors.Join(tx.PutServer(registry.Server{ID: "s1", Position: r.Position, Acknowledged: r.Acknowledged}), tx.PutRoster("s1", r.Roster))
	})
	for _, row := range rows {
		select {
		case <-row.follower.Wake():
			t.Error("a beat wakes an agent's stream")
		default:
		}
	}
	c.is("after a beat", c.reg.Position().Revision, []int{0, 1})
}

// In the steady state a server with 1,000 agents writes no roster, though they connect
// anew all the time.
func TestSteadyRoster(t *testing.T) {
	const agents = 1000
	c := newCrowd(t, agents)
	rows := make([]*following, agents)
	for i := range rows {
		rows[i] = c.attach(i)
	}
	write := func() uint64 {
		return c.update(func(tx *registry.Tx) error { return tx.PutRoster("s1", c.f.Report(c.now).Roster) })
	}
	first := write()
	if n := len(c.f.Report(c.now).Roster); n != agents {
		t.Fatalf("the roster has %d agents", n)
	}
	for beat := range 60 {
		c.now = c.now.Add(10 * time.Second)
		for i := beat / 2 % 10; i < agents; i += 10 {
			if beat%2 == 0 { // away over one beat
				c.f.leave(rows[i], c.now)
			} else {
				rows[i] = c.attach(i)
			}
		}
		if at := write(); at != first {
			t.Fatalf("beat %d wrote the roster: revision %d after %d", beat, at, first)
		}
	}
	c.f.leave(rows[0], c.now)
	c.now = c.now.Add(awayFor)
	if write() == first {
		t.Error("an agent that is gone stays in the roster")
	}
	if n := len(c.f.left); n != 0 {
		t.Errorf("%d agents that are gone are remembered (R106)", n)
	}
}
