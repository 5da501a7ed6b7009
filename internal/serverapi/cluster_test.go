package serverapi_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
)

// beats is a server's row as its engine would write it, but as soon as it is poked.
type beats struct {
	id        string
	followers *serverapi.Followers
	registry  *registry.Registry
	poked     chan struct{}
	n         atomic.Int64
}

// beating makes a rig one of several.
func beating(t *testing.T, b *beats) option {
	return func(c *serverapi.Config, _ *nodes.Config) {
		b.id, b.registry, b.poked = c.About.ServerID, c.Registry, make(chan struct{}, 1)
		b.followers = serverapi.NewFollowers(b.id, c.Registry)
		c.Shared, c.Followers, c.Poke = true, b.followers, func() {
			select {
			case b.poked <- struct{}{}:
			default:
			}
		}
		done := make(chan struct{})
		ctx, cancel := context.WithCancel(context.Background())
		t.Cleanup(func() { cancel(); <-done })
		go func() {
			defer close(done)
			for {
				select {
				case <-b.poked:
					if err := b.beat(ctx); err != nil && ctx.Err() == nil {
						t.Errorf("beat: %v", err)
					}
				case <-ctx.Done():
					return
				}
			}
		}()
	}
}

func (b *beats) beat(ctx context.Context) error {
	r := b.followers.Report(time.Now())
	_, err := b.registry.Update(ctx, "test", func(tx *registry.Tx) error {
		row := registry.Server{ID: b.id, BeatAt: time.Now(), Lease: time.Hour, Beat: uint64(b.n.Add(1)),
			Position: r.Position, Acknowledged: r.Acknowledged, Laggards: r.Laggards, Agents: r.Agents}
		return errors.Join(tx.PutServer(row), tx.PutRoster(b.id, r.Roster))
	})
	return err
}

// Receipts count the agents of all servers.
func TestReceiptAcrossServers(t *testing.T) {
	var onA, onB beats
	a := newRig(t, beating(t, &onA))
	b := newRigOver(t, a.sqlite, "s2", beating(t, &onB))
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
	var onA, onB beats
	a := newRig(t, beating(t, &onA))
	b := newRigOver(t, a.sqlite, "s2", beating(t, &onB))
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
