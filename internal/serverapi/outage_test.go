package serverapi_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	lifetimev1 "github.com/plastron/plastron/api/plastron/lifetime/v1"
	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// control is a control plane in a bubble: servers over one store, which can be killed.
type control struct {
	*quietServer
	apis []*serverapi.Server
	ctx  context.Context // done when it is killed
	kill context.CancelFunc
}

// newControl returns n servers whose lifetimes are those.
func newControl(t *testing.T, n int, life lifetime.Set) *control {
	t.Helper()
	lives := func(c *serverapi.Config, n *nodes.Config) {
		c.Lifetimes, n.Lifetimes = life, life
		c.About.ServerID = "s1"
	}
	c := &control{}
	c.ctx, c.kill = context.WithCancel(context.Background())
	t.Cleanup(c.kill)
	if n == 1 {
		c.quietServer = newQuietServer(t, lives)
		c.apis = append(c.apis, c.api)
		return c
	}
	c.quietServer = newQuietServer(t, lives, clustered(t))
	c.apis = append(c.apis, c.api)
	for i := 2; i <= n; i++ {
		cfg := c.cfg
		cfg.About.ServerID = fmt.Sprint("s", i)
		clustered(t)(&cfg, nil)
		c.apis = append(c.apis, serverapi.New(cfg))
	}
	return c
}

// fakeAgent is an agent: the real mirror, over a wire that the control plane takes with it.
type fakeAgent struct {
	t       *testing.T
	control *control
	api     *serverapi.Server
	id      spiffeid.ID
	mirror  *mirror.Mirror
	stop    func()

	mu    sync.Mutex // guards everything below
	svid  svid.X509
	leave context.CancelFunc // of the open stream
	calls int                // for signatures
}

// join starts an agent that follows one of the servers.
func (c *control) join(t *testing.T, api *serverapi.Server) *fakeAgent {
	t.Helper()
	a := &fakeAgent{t: t, control: c, api: api, svid: c.admit().SVID}
	a.id = a.svid.ID
	a.mirror = mirror.New(mirror.Config{TrustDomain: td, Link: a, Version: "test", Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { a.mirror.Run(ctx) })
	wg.Go(func() { a.renew(ctx) })
	a.stop = func() { cancel(); wg.Wait() }
	t.Cleanup(a.stop)
	return a
}

func (a *fakeAgent) now() svid.X509 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.svid
}

// renew keeps the agent's certificate, as long as there is a control plane.
func (a *fakeAgent) renew(ctx context.Context) {
	for {
		own := a.now()
		select {
		case <-ctx.Done():
			return
		case <-a.control.ctx.Done():
			return
		case <-time.After(time.Until(own.NotAfter) / 2):
		}
		renewed, err := a.control.nodes.Renew(ctx, nodes.Presented{ID: own.ID, Serial: own.Serial, Expiry: own.NotAfter, KeyHash: own.KeyHash[:]}, newCSR(a.t, newKey(a.t)))
		if err != nil {
			a.t.Errorf("an agent is not renewed: %v", err)
			return
		}
		a.mu.Lock()
		a.svid = renewed.SVID
		if a.leave != nil {
			a.leave()
		}
		a.mu.Unlock()
	}
}

var errAway = fault.New(fault.Unavailable, "server_unreachable", "nobody answers")

// Follow opens the stream of changes, as a mirror.Link.
func (a *fakeAgent) Follow(ctx context.Context) (mirror.Stream, error) {
	if a.control.ctx.Err() != nil {
		return nil, errAway
	}
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(a.control.ctx, cancel)
	p := &pipe{ctx: ctx, toAgent: make(chan *syncv1.ServerMessage, 64), toUs: make(chan *syncv1.AgentMessage, 64)}
	a.mu.Lock()
	a.leave = cancel
	chain := a.svid.Chain
	a.mu.Unlock()
	go func() {
		defer cancel()
		_ = a.api.FollowAs(chain, p)
	}()
	return agentEnd{p, cancel}, nil
}

// agentEnd is the agent's end of a pipe.
type agentEnd struct {
	p     *pipe
	close func()
}

func (e agentEnd) Close() { e.close() }

func (e agentEnd) Send(m *syncv1.AgentMessage) error {
	select {
	case e.p.toUs <- m:
		return nil
	case <-e.p.ctx.Done():
		return errAway
	}
}

func (e agentEnd) Recv() (*syncv1.ServerMessage, error) {
	select {
	case m := <-e.p.toAgent:
		return m, nil
	case <-e.p.ctx.Done():
		return nil, errAway
	}
}

func (a *fakeAgent) issuer(ctx context.Context) (context.Context, issuev1.IssueServer, error) {
	a.mu.Lock()
	a.calls++
	calls, chain := a.calls, a.svid.Chain
	a.mu.Unlock()
	if a.control.ctx.Err() != nil || calls > 10_000 {
		return nil, nil, errAway
	}
	return a.api.IssueAs(ctx, chain)
}

// signatures is how often something was to be signed.
func (a *fakeAgent) signatures() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.calls
}

// X509 has SVIDs signed, as a mirror.Link.
func (a *fakeAgent) X509(ctx context.Context, items []serverlink.X509Item) ([]serverlink.X509Result, error) {
	ctx, issuer, err := a.issuer(ctx)
	if err != nil {
		return nil, err
	}
	req := &issuev1.X509Request{}
	for _, i := range items {
		req.Items = append(req.Items, &issuev1.X509Item{GrantId: i.GrantID, Csr: i.CSR})
	}
	resp, err := issuer.X509(ctx, req)
	if err != nil {
		return nil, err
	}
	out := make([]serverlink.X509Result, len(resp.Results))
	for i, r := range resp.Results {
		out[i] = serverlink.X509Result{Chain: r.CertChain, Revision: r.Revision}
		if r.Refusal != nil {
			out[i].Err = fault.New(fault.Denied, r.Refusal.Reason, "%s", r.Refusal.Message)
		}
	}
	return out, nil
}

// JWT has a token signed, as a mirror.Link.
func (a *fakeAgent) JWT(ctx context.Context, grant string, _ map[string]string, audience []string) (serverlink.JWTResult, error) {
	ctx, issuer, err := a.issuer(ctx)
	if err != nil {
		return serverlink.JWTResult{}, err
	}
	resp, err := issuer.JWT(ctx, &issuev1.JWTRequest{GrantId: grant, Audience: audience})
	if err != nil {
		return serverlink.JWTResult{}, err
	}
	return serverlink.JWTResult{Token: resp.Token, Revision: resp.Revision}, nil
}

// put makes an entry for an agent's processes with a user ID.
func (c *control) put(e entry.Entry) {
	c.t.Helper()
	_, err := c.registry.Update(c.t.Context(), "test", func(tx *registry.Tx) error { return tx.PutEntry(e) })
	if err != nil {
		c.t.Fatal(err)
	}
}

// uses is a process that uses an identity, as long as the control plane lives.
type uses struct {
	agent *fakeAgent
	id    spiffeid.ID
	grant string
	sub   *mirror.Subscription
	end   time.Time // of the entry; zero: none
}

// counts reports whether what ended at a moment ended before its entry: agents give
// up five seconds before that what ends with it.
func (u *uses) counts(at time.Time) bool {
	return u.end.IsZero() || at.Before(u.end.Add(-5*time.Second))
}

func (u *uses) token() error {
	_, err := u.agent.mirror.JWT(context.Background(), entry.Matched{GrantID: u.grant, ID: u.id}, []string{"audience"})
	return err
}

// gone waits until the identity is served no more.
func (u *uses) gone() time.Time {
	for {
		if len(u.sub.View().Identities) == 0 {
			return time.Now()
		}
		<-u.sub.Changed()
	}
}

// What the printed budget says is what happens: the control plane is killed at a random
// moment, and what is served then is watched until the first of it ends.
func TestOutageBudget(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { checkOutage(t, rand.New(rand.NewPCG(seed, 7))) })
		})
	}
}

func checkOutage(t *testing.T, r *rand.Rand) {
	between := func(least, most time.Duration) time.Duration {
		return least + time.Duration(r.Int64N(int64(most-least)))
	}
	const least, most = 2 * time.Minute, 20 * time.Minute
	life := lifetime.Set{X509: between(least, most), JWT: between(least, most), Agent: between(most+5*time.Minute, 2*most), CA: 72 * time.Hour}
	c := newControl(t, 1+r.IntN(3), life)
	var agents []*fakeAgent
	var used []*uses
	for range 1 + r.IntN(4) {
		a := c.join(t, c.apis[r.IntN(len(c.apis))])
		agents = append(agents, a)
		for i := range 1 + r.IntN(4) {
			e := entry.Entry{ID: fmt.Sprintf("%d-%d", len(agents), i), ParentID: a.id, SPIFFEID: spiffeid.RequireFromPathf(td, "/%d/%d", len(agents), i),
				Selectors: []entry.Selector{{Type: "unix", Value: fmt.Sprint("uid:", i)}}, CreatedAt: time.Now().UTC().Truncate(time.Second)}
			if r.IntN(2) == 0 {
				e.X509TTL, e.JWTTL = between(least, most).Truncate(time.Second), between(least, most).Truncate(time.Second)
			}
			u := &uses{agent: a, id: e.SPIFFEID, grant: e.ID}
			if r.IntN(5) == 0 {
				e.ExpiresAt = time.Now().Add(between(time.Minute, most)).UTC().Truncate(time.Second)
				u.end = e.ExpiresAt
			}
			c.put(e)
			u.sub = a.mirror.Subscribe(entry.Facts{Selectors: e.Selectors})
			t.Cleanup(u.sub.Close)
			used = append(used, u)
		}
		<-a.mirror.Synced()
	}
	polls, away := c.admit(), c.join(t, c.api) // one that never follows, and one that goes
	if err := c.nodes.Report(t.Context(), polls.SVID.ID, "1.15.0", false); err != nil {
		t.Fatal(err)
	}
	<-away.mirror.Synced()
	away.stop()

	// Those who use tokens ask for them again and again.
	for _, u := range used {
		go func() {
			for c.ctx.Err() == nil {
				_ = u.token()
				select {
				case <-c.ctx.Done():
				case <-time.After(life.JWT/4 + least/8):
				}
			}
		}()
	}
	time.Sleep(between(time.Minute, most))

	asked := c.apis[r.IntN(len(c.apis))]
	said, err := asked.Lifetimes().Outage(t.Context(), &lifetimev1.OutageRequest{})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Wait() // what is under way in this moment
	killed := time.Now()
	c.kill()
	synctest.Wait()
	if int(said.Agents) != len(agents)+2 || said.Polling != 1 || said.Away != 1 || said.Silent != 0 {
		t.Errorf("of %d agents, one that polls and one that is away, it is said: %v", len(agents), said)
	}

	measured := map[string]time.Time{}
	first := func(kind string, at time.Time) {
		if was, ok := measured[kind]; !ok || at.Before(was) {
			measured[kind] = at
		}
	}
	for _, a := range agents {
		first("agent", a.now().NotAfter)
	}
	first("agent", polls.SVID.NotAfter)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for _, u := range used {
		wg.Go(func() {
			if at := u.gone(); u.counts(at) {
				mu.Lock()
				defer mu.Unlock()
				first("x509", at)
			}
		})
	}
	for len(used) > 0 {
		over := slices.IndexFunc(used, func(u *uses) bool { return u.token() != nil })
		switch {
		case over < 0:
			time.Sleep(100 * time.Millisecond)
		case used[over].counts(time.Now()):
			mu.Lock()
			first("jwt", time.Now())
			mu.Unlock()
			used = nil
		default:
			used = slices.Delete(used, over, over+1)
		}
	}
	wg.Wait()

	printed := map[string]time.Time{}
	for _, e := range said.First {
		printed[e.Kind] = time.UnixMilli(e.AtMs)
	}
	if len(printed) != len(measured) {
		t.Errorf("it is said %v, and %v was measured", said.First, measured)
	}
	for kind, at := range measured {
		budget, off := at.Sub(killed), printed[kind].Sub(at)
		t.Logf("%d servers, %s: printed %v, measured %v", len(c.apis), kind, printed[kind].Sub(killed), budget)
		if off.Abs() > budget/50 {
			t.Errorf("%s: the budget is %v, and %v was printed", kind, budget, printed[kind].Sub(killed))
		}
	}
}

// What ends with its grant is as long as it can be: it is not signed again and again
// while that end comes nearer.
func TestEndingGrantIsSignedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newControl(t, 1, lifetime.Set{X509: time.Hour, JWT: time.Hour, Agent: 2 * time.Hour, CA: 72 * time.Hour})
		a := c.join(t, c.api)
		e := entry.Entry{ID: "e", ParentID: a.id, SPIFFEID: spiffeid.RequireFromPath(td, "/e"), Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}},
			CreatedAt: time.Now().UTC().Truncate(time.Second), ExpiresAt: time.Now().Add(10 * time.Minute).UTC().Truncate(time.Second)}
		c.put(e)
		u := uses{agent: a, id: e.SPIFFEID, grant: e.ID, sub: a.mirror.Subscribe(entry.Facts{Selectors: e.Selectors})}
		defer u.sub.Close()
		time.Sleep(time.Second)
		for range 9 { // minutes of ten
			if err := u.token(); err != nil || len(u.sub.View().Identities) != 1 {
				t.Fatalf("nothing is served: %v", err)
			}
			time.Sleep(time.Minute)
		}
		if n := a.signatures(); n != 2 {
			t.Errorf("%d signatures, want one of each kind", n)
		}
		time.Sleep(time.Until(e.ExpiresAt) + time.Minute)
		if n := a.signatures(); n > 20 { // in the last seconds, of which agents hand out nothing
			t.Errorf("%d signatures in all", n)
		}
		if said, err := c.api.Lifetimes().Outage(t.Context(), &lifetimev1.OutageRequest{}); err != nil || len(said.First) != 1 {
			t.Errorf("with no SVID left it is said %v, %v", said, err)
		}
	})
}
