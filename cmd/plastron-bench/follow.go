package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// crowd is agents that this program plays: each attested, on a connection of its
// own, following the server.
type crowd struct {
	messages atomic.Int64 // that the server sent once all had attached
	end      context.CancelCauseFunc
	clean    []func()
}

// attach makes a crowd. Should one of its streams end, ctx does, with the reason.
func (s *target) attach(ctx context.Context) (context.Context, *crowd, error) {
	c := &crowd{}
	ctx, c.end = context.WithCancelCause(ctx)
	var mu sync.Mutex
	o := options{count: s.options.agents, parallel: s.options.parallel}
	_, err := measure(ctx, o, 1, func(context.Context, int, int) error {
		a, clean, err := s.join(ctx, 0)
		if err != nil {
			return err
		}
		mu.Lock()
		c.clean = append(c.clean, clean)
		mu.Unlock()
		stream, err := syncv1.NewSyncClient(a.conn).Follow(ctx)
		if err != nil {
			return err
		}
		if err := greet(stream); err != nil {
			return fmt.Errorf("follow the server: %w", err)
		}
		go func() {
			for {
				m, err := stream.Recv()
				if err != nil {
					c.end(fmt.Errorf("an agent's stream ended: %w", err))
					return
				}
				c.messages.Add(1)
				if d := m.GetDelta(); d != nil && !d.GetMore() {
					_ = stream.Send(ack(d)) // if it fails, so does Recv
				}
			}
		}()
		return nil
	})
	if err != nil {
		c.leave()
		return nil, nil, err
	}
	c.messages.Store(0)
	return ctx, c, nil
}

// leave ends the streams and deletes the agents.
func (c *crowd) leave() {
	c.end(context.Canceled)
	for _, clean := range c.clean {
		clean()
	}
}

// greet is the opening of the sync protocol by an agent that holds nothing, up to
// the first state that is whole.
func greet(stream grpc.BidiStreamingClient[syncv1.AgentMessage, syncv1.ServerMessage]) error {
	if err := stream.Send(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Hello{Hello: &syncv1.Hello{Version: 1}}}); err != nil {
		return err
	}
	want := &syncv1.Want{}
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		for _, item := range m.GetInventory().GetItems() {
			if item.GetKind() == syncv1.Item_KIND_GRANT {
				want.GrantIds = append(want.GrantIds, item.GetId())
			} else {
				want.TrustDomains = append(want.TrustDomains, item.GetId())
			}
		}
		if inventory := m.GetInventory(); inventory != nil && !inventory.GetMore() {
			if err := stream.Send(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Want{Want: want}}); err != nil {
				return err
			}
		}
		if d := m.GetDelta(); d != nil && !d.GetMore() {
			return stream.Send(ack(d))
		}
	}
}

func ack(d *syncv1.Delta) *syncv1.AgentMessage {
	return &syncv1.AgentMessage{Message: &syncv1.AgentMessage_Ack{Ack: &syncv1.Ack{Position: d.GetPosition(), Hash: d.GetHash()}}}
}

// benchSync looks at a crowd that has nothing to do.
func benchSync(ctx context.Context, o options) (result, error) {
	s, err := dialServer(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer s.Close()
	ctx, c, err := s.attach(ctx)
	if err != nil {
		return result{}, err
	}
	defer c.leave()
	before, err := o.pids.cpuTime()
	if err != nil {
		return result{}, err
	}
	select {
	case <-time.After(o.period):
	case <-ctx.Done():
		return result{}, context.Cause(ctx)
	}
	after, err := o.pids.cpuTime()
	messages := c.messages.Load()
	return result{
		Operations: o.agents, WallNS: o.period.Nanoseconds(), CPUNS: (after - before).Nanoseconds() / int64(o.agents), Messages: &messages,
	}, err
}

// benchPropagation creates entries for this process, one after the other, and
// waits for each to come by a stream of the Workload API that stays open. Before
// the next, the entry is deleted, and that awaited too.
func benchPropagation(ctx context.Context, o options) (result, error) {
	s, err := dialServer(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer s.Close()
	conn, first, err := dialWorkload(ctx, o.workload)
	if err != nil {
		return result{}, err
	}
	defer conn.Close()
	model, err := s.entryOf(ctx, first)
	if err != nil {
		return result{}, err
	}
	ctx, c, err := s.attach(ctx)
	if err != nil {
		return result{}, err
	}
	defer c.leave()
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(
		metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"), &workload.X509SVIDRequest{})
	if err != nil {
		return result{}, err
	}
	if _, err := stream.Recv(); err != nil { // what there is already
		return result{}, err
	}
	client := entryv1.NewEntryClient(s.admin)
	times := make([]time.Duration, o.count)
	before, err := o.pids.cpuTime()
	if err != nil {
		return result{}, err
	}
	for i := range times {
		path := fmt.Sprintf("/bench/%d/%d", time.Now().UnixNano(), i)
		began := time.Now()
		reply, err := client.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{
			SpiffeId: &spiretypes.SPIFFEID{TrustDomain: s.trustDomain, Path: path}, ParentId: model.GetParentId(), Selectors: model.GetSelectors(),
		}}})
		if err != nil {
			return result{}, err
		}
		made := reply.GetResults()[0]
		if made.GetStatus().GetCode() != 0 {
			return result{}, errors.New(made.GetStatus().GetMessage())
		}
		err = await(stream, "spiffe://"+s.trustDomain+path, true)
		times[i] = time.Since(began)
		if gone := s.remove(context.WithoutCancel(ctx), []string{made.GetEntry().GetId()}); err == nil {
			err = gone
		}
		if err == nil {
			err = await(stream, "spiffe://"+s.trustDomain+path, false)
		}
		if err != nil {
			return result{}, err
		}
	}
	after, err := o.pids.cpuTime()
	messages := c.messages.Load()
	r := result{Operations: o.count, CPUNS: (after - before).Nanoseconds() / int64(o.count), Messages: &messages}
	for _, t := range times {
		r.WallNS += t.Nanoseconds() / int64(o.count)
	}
	r.P50NS, r.P99NS = percentiles(times)
	return r, err
}

// entryOf returns the entry by which this process has its first SVID.
func (s *target) entryOf(ctx context.Context, first *workload.X509SVIDResponse) (*spiretypes.Entry, error) {
	id := first.GetSvids()[0].GetSpiffeId()
	path, ok := strings.CutPrefix(id, "spiffe://"+s.trustDomain)
	if !ok {
		return nil, fmt.Errorf("the agent at -workloadSocket serves %s, which is not of the trust domain %s", id, s.trustDomain)
	}
	reply, err := entryv1.NewEntryClient(s.admin).ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{
		BySpiffeId: &spiretypes.SPIFFEID{TrustDomain: s.trustDomain, Path: path},
	}})
	if err != nil {
		return nil, err
	}
	if len(reply.GetEntries()) != 1 {
		return nil, fmt.Errorf("%d entries name %s, so which one this process has cannot be told", len(reply.GetEntries()), id)
	}
	return reply.GetEntries()[0], nil
}

// await reads the stream until a message has, or lacks, an SVID of this ID.
func await(stream grpc.ServerStreamingClient[workload.X509SVIDResponse], id string, want bool) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(m.GetSvids(), func(s *workload.X509SVID) bool { return s.GetSpiffeId() == id }) == want {
			return nil
		}
	}
}
