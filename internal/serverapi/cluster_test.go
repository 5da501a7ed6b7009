package serverapi_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	nodev1 "github.com/plastron/plastron/api/plastron/node/v1"
	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/servers"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
)

// clustered makes a rig one of several servers.
func clustered(t *testing.T) option { return clusteredLater(t, new(atomic.Int64)) }

// clusteredLater does so with a boot clock that can be set ahead by nanoseconds.
func clusteredLater(t *testing.T, ahead *atomic.Int64) option {
	return func(c *serverapi.Config, _ *nodes.Config) {
		c.Shared, c.Followers = true, serverapi.NewFollowers(c.About.ServerID, c.Registry)
		began := time.Now()
		c.Servers = servers.New(servers.Config{
			TrustDomain: td, ID: c.About.ServerID, Registry: c.Registry, Shared: true, Lease: time.Hour, Version: "test", Started: began,
			Report: func() servers.Report { return c.Followers.Report(time.Now()) },
			Boot:   func() time.Duration { return time.Hour + time.Since(began) + time.Duration(ahead.Load()) }, Log: c.Log,
		})
		c.Poke = c.Servers.Poke
		if err := c.Servers.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- c.Servers.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil && fault.ReasonOf(err) != "server_expelled" { // which is what some test is about
				t.Errorf("Servers.Run() = %v", err)
			}
		})
	}
}

// Receipts count the agents of all servers.
func TestReceiptAcrossServers(t *testing.T) {
	a := newRig(t, clustered(t))
	b := newRigOver(t, a.sqlite, "s2", clustered(t))
	here, there, away := a.agent(), a.agent(), a.agent()
	f, g := follow(t, a.connect(&here), nil), follow(t, b.connect(&there), nil)
	f.sync()
	g.sync()
	f.ack()
	g.ack()

	// An entry that is written on A is pushed to an agent on B.
	made := a.createWith(entryUnder(here.id, "/x"), entryUnder(there.id, "/x"))
	f.delta()
	g.delta()
	waiting := a.waitFor(made, deadline)
	f.ack()
	g.ack()
	a.wantReceipt("both have it", waiting, "2/2")
	until(t, "B says the same", func() bool { return <-b.waitFor(made, 0) == "2/2" })

	// Who lags is named with the server.
	made = b.createWith(entryUnder(here.id, "/y"), entryUnder(there.id, "/y"), entryUnder(away.id, "/y"))
	f.delta()
	g.delta()
	f.ack()
	until(t, "one of three has it", func() bool {
		got := <-b.waitFor(made, 0)
		return got == lagging("1/3", there.id.String()+":REASON_BEHIND@s2", away.id.String()+":REASON_NOT_ATTACHED@")
	})
	until(t, "A says the same", func() bool {
		return <-a.waitFor(made, 0) == lagging("1/3", there.id.String()+":REASON_BEHIND@s2", away.id.String()+":REASON_NOT_ATTACHED@")
	})
	// The absent one comes to another server than the one that waits.
	waiting = b.waitFor(made, deadline)
	h := follow(t, a.connect(&away), nil)
	h.sync()
	h.ack()
	g.ack()
	b.wantReceipt("all", waiting, "3/3")

	// R30: a ban counts once the other server has cut the stream.
	banned := receiptsOf(t, func(opts ...grpc.CallOption) error {
		_, err := agentv1.NewAgentClient(a.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(there.id.Path())}, opts...)
		return err
	})
	a.wantReceipt("banned", a.waitFor(banned, deadline), "1/1")
	select {
	case <-g.ended:
	case <-time.After(deadline):
		t.Error("the stream at the other server goes on")
	}
}

// R76: who carries the receipt of a change to another server sees the change there, or
// is told that the server is behind.
func TestReadYourWritesAcrossServers(t *testing.T) {
	a := newRig(t, clustered(t))
	b := newRigOver(t, a.sqlite, "s2", clustered(t))
	agent := a.agent()
	list := func(receipts ...string) (int, error) {
		ctx := metadata.NewOutgoingContext(t.Context(), metadata.MD{"plastron-receipt": receipts})
		got, err := entryv1.NewEntryClient(b.admin).ListEntries(ctx, &entryv1.ListEntriesRequest{})
		return len(got.GetEntries()), err
	}
	for i := range 20 {
		made := a.createWith(entryUnder(agent.id, fmt.Sprint("/x", i)))
		if n, err := list(made...); err != nil || n != i+1 {
			t.Fatalf("after %d changes B shows %d: %v", i+1, n, err)
		}
	}
	at := a.registry.Position()
	at.Revision += 1000
	_, err := list(registry.Committed{Position: at}.String())
	wantCode(t, "ahead of everything", err, codes.Unavailable, "registry_behind")
	at.Epoch[0]++
	_, err = list(registry.Committed{Position: at}.String())
	wantCode(t, "of another epoch", err, codes.FailedPrecondition, "receipt_unknown")
	_, err = list("x")
	wantCode(t, "nonsense", err, codes.InvalidArgument, "receipt_invalid")
}

// Each server lists all, with what their rows say.
func TestServersList(t *testing.T) {
	a := newRig(t, clustered(t))
	b := newRigOver(t, a.sqlite, "s2", clustered(t))
	agent := a.agent()
	f := follow(t, b.connect(&agent), nil)
	f.sync()
	f.ack()
	list := func(r *rig) (self, other *statusv1.ServerStatus) {
		t.Helper()
		got, err := statusv1.NewServerClient(r.admin).List(t.Context(), &statusv1.ListRequest{})
		if err != nil || len(got.Servers) != 2 || !got.Servers[0].Seen.Self || got.Servers[1].Seen.Self {
			t.Fatalf("List() = %v, %v", got, err)
		}
		return got.Servers[0], got.Servers[1]
	}
	var self, other *statusv1.ServerStatus
	until(t, "B says that an agent is attached, and was compared with A", func() bool {
		self, other = list(a)
		return other.Attached.Agents == 1 && other.Seen.Agreement != statusv1.Seen_AGREEMENT_UNSPECIFIED
	})
	if self.Id != "s1" || self.Seen.State != statusv1.Seen_STATE_LIVE || self.Seen.LeaseLeftMs < time.Minute.Milliseconds() || self.Seen.LeaseLeftMs > time.Hour.Milliseconds() {
		t.Errorf("self: %v", self)
	}
	if s := other.Seen; other.Id != "s2" || other.Version != "test" || s.State != statusv1.Seen_STATE_LIVE || s.Agreement != statusv1.Seen_AGREEMENT_SAME ||
		!s.ClockKnown || s.ClockAheadMs > 1000 || s.ClockAheadMs < -deadline.Milliseconds() || s.BeatAgeMs > deadline.Milliseconds() ||
		s.LeaseLeftMs < time.Minute.Milliseconds() || s.LeaseLeftMs > time.Hour.Milliseconds() || s.Behind > 20 || len(other.Authorities) != 2 ||
		other.Position.Epoch != self.Position.Epoch || other.StartedAt == 0 {
		t.Errorf("other: %v", other)
	}
	// Both say where the agent is attached; what it has acknowledged A hears with a beat.
	stranger := a.agent()
	for _, r := range []*rig{a, b} {
		until(t, "the agent is attached at B and has acknowledged something", func() bool {
			got, err := nodev1.NewNodeClient(r.admin).Attached(t.Context(), &nodev1.AttachedRequest{Agents: []string{stranger.id.String(), agent.id.String()}})
			if err != nil || len(got.Agents) != 1 || got.Agents[0].Agent != agent.id.String() || got.Agents[0].Server != "s2" {
				t.Fatalf("Attached() = %v, %v", got, err)
			}
			return got.Agents[0].Acknowledged > 0
		})
	}
	_, err := nodev1.NewNodeClient(a.admin).Attached(t.Context(), &nodev1.AttachedRequest{Agents: make([]string, 1001)})
	wantCode(t, "too many", err, codes.InvalidArgument, "batch_too_large")
	_, err = nodev1.NewNodeClient(a.admin).Attached(t.Context(), &nodev1.AttachedRequest{Agents: []string{"spiffe://other/x"}})
	wantCode(t, "a stranger", err, codes.InvalidArgument, "")

	if err := b.servers.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "A sees that B has stopped", func() bool {
		_, other = list(a)
		return other.Seen.State == statusv1.Seen_STATE_STOPPED && !other.Seen.Leased
	})
}
