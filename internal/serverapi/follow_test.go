package serverapi_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"testing"
	"time"

	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// follower is an agent's side of a sync stream, as small as it can be.
type follower struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[syncv1.AgentMessage, syncv1.ServerMessage]
	heard  chan *syncv1.ServerMessage
	ended  chan error
	held   map[string][]byte // bodies by grant id or trust domain
	at     *syncv1.Position  // where the last delta led to
}

func follow(t *testing.T, conn *grpc.ClientConn, hello *syncv1.Hello) *follower {
	t.Helper()
	stream, err := syncv1.NewSyncClient(conn).Follow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{t: t, stream: stream, heard: make(chan *syncv1.ServerMessage, 16), ended: make(chan error, 1), held: map[string][]byte{}}
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				f.ended <- err
				return
			}
			f.heard <- m
		}
	}()
	if hello == nil {
		hello = &syncv1.Hello{Version: 1, AgentVersion: "test"}
	}
	f.say(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Hello{Hello: hello}})
	return f
}

func (f *follower) say(m *syncv1.AgentMessage) {
	f.t.Helper()
	if err := f.stream.Send(m); err != nil {
		f.t.Fatal(err)
	}
}

func (f *follower) next() *syncv1.ServerMessage {
	f.t.Helper()
	select {
	case m := <-f.heard:
		return m
	case err := <-f.ended:
		f.t.Fatalf("the stream ended: %v", err)
	case <-time.After(deadline):
		f.t.Fatal("nothing came")
	}
	return nil
}

// checkClock: the agent can tell from it how far its own clock is off (R107).
func (f *follower) checkClock(ms int64) {
	f.t.Helper()
	if d := time.Since(time.UnixMilli(ms)); d < -time.Millisecond || d > deadline {
		f.t.Errorf("the server's clock is %v behind", d)
	}
}

// sync goes through inventory and difference to a known state.
func (f *follower) sync() *syncv1.Delta {
	f.t.Helper()
	want := &syncv1.Want{}
	for {
		inv := f.next().GetInventory()
		if inv == nil {
			f.t.Fatal("not an inventory")
		}
		f.checkClock(inv.Clock)
		for _, item := range inv.Items {
			body, ok := f.held[item.Id]
			if sum := sha256.Sum256(body); ok && fingerprint(sum) == item.Fingerprint {
				continue
			}
			if item.Kind == syncv1.Item_KIND_BUNDLE {
				want.TrustDomains = append(want.TrustDomains, item.Id)
			} else {
				want.GrantIds = append(want.GrantIds, item.Id)
			}
		}
		if !inv.More {
			break
		}
	}
	f.say(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Want{Want: want}})
	return f.delta()
}

func fingerprint(sum [32]byte) (out uint64) {
	for _, b := range sum[:8] {
		out = out<<8 | uint64(b)
	}
	return out
}

// delta takes in one delta of any number of parts, and checks the state hash.
func (f *follower) delta() *syncv1.Delta {
	f.t.Helper()
	whole := &syncv1.Delta{}
	for {
		part := f.next().GetDelta()
		if part == nil {
			f.t.Fatal("not a delta")
		}
		if size := proto.Size(part); size > 1<<20 {
			f.t.Errorf("a part of %d bytes", size)
		}
		bodies := append(whole.Bodies, part.Bodies...)
		whole = part
		whole.Bodies = bodies
		if !part.More {
			break
		}
	}
	if f.at != nil && !proto.Equal(whole.Previous, f.at) {
		f.t.Errorf("a delta from %v, but the one before led to %v", whole.Previous, f.at)
	}
	f.at = whole.Position
	for _, raw := range whole.Bodies {
		body := new(syncv1.Body)
		if err := proto.Unmarshal(raw, body); err != nil {
			f.t.Fatal(err)
		}
		switch b := body.Body.(type) {
		case *syncv1.Body_Grant:
			f.held[b.Grant.Id] = raw
		case *syncv1.Body_Bundle:
			f.held[b.Bundle.TrustDomain] = raw
		case *syncv1.Body_GrantRemoved:
			delete(f.held, b.GrantRemoved)
		case *syncv1.Body_BundleRemoved:
			delete(f.held, b.BundleRemoved)
		}
	}
	if got := f.hash(); string(got) != string(whole.Hash) {
		f.t.Errorf("the agent's hash is %x, the server says %x", got, whole.Hash)
	}
	return whole
}

func (f *follower) hash() []byte {
	var sum entry.Sum
	for _, body := range f.held {
		sum.Add(sha256.Sum256(body))
	}
	h := sum.Bytes()
	return h[:]
}

func (f *follower) grant(id string) *syncv1.Grant {
	f.t.Helper()
	body := new(syncv1.Body)
	if err := proto.Unmarshal(f.held[id], body); err != nil {
		f.t.Fatal(err)
	}
	return body.GetGrant()
}

// end waits for the stream to end and returns why.
func (f *follower) end() error {
	f.t.Helper()
	for {
		select {
		case <-f.heard:
		case err := <-f.ended:
			return err
		case <-time.After(deadline):
			f.t.Fatal("the stream does not end")
		}
	}
}

func TestFollow(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	conn := r.connect(&agent)
	before := r.create(entryUnder(agent.id, "/before"))[0]
	f := follow(t, conn, nil)
	f.sync()
	if len(f.held) != 2 || f.grant(before.Id).SpiffeId != "spiffe://example.org/before" {
		t.Errorf("holds %d bodies, want the bundle and one grant", len(f.held))
	}

	client := entryv1.NewEntryClient(r.admin)
	made := r.create(entryUnder(agent.id, "/web"))[0]
	f.delta()
	if g := f.grant(made.Id); g.GetSpiffeId() != "spiffe://example.org/web" || g.X509SvidTtl != 0 {
		t.Errorf("created: %v", g)
	}
	if _, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries: []*spiretypes.Entry{{Id: made.Id, X509SvidTtl: 77}}, InputMask: &spiretypes.EntryMask{X509SvidTtl: true},
	}); err != nil {
		t.Fatal(err)
	}
	f.delta()
	if g := f.grant(made.Id); g.GetX509SvidTtl() != 77 || g.SpiffeId != "spiffe://example.org/web" {
		t.Errorf("updated: %v", g)
	}
	if _, err := client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{made.Id}}); err != nil {
		t.Fatal(err)
	}
	last := f.delta()
	if f.held[made.Id] != nil {
		t.Error("deleted, but still held")
	}

	// A change for somebody else is none for this agent: what comes next is its own.
	other := r.agent()
	r.create(entryUnder(other.id, "/elsewhere"))
	mine := r.create(entryUnder(agent.id, "/mine"))[0]
	if d := f.delta(); len(d.Bodies) != 1 || f.grant(mine.Id) == nil {
		t.Errorf("%d bodies, want only the own change", len(d.Bodies))
	}

	// The agent comes back with what it holds: current by hash, whatever the epoch.
	for name, position := range map[string]*syncv1.Position{
		"same epoch": last.Position, "another epoch": {Epoch: make([]byte, 16), Revision: 9999}, "none": nil,
	} {
		again := follow(t, conn, &syncv1.Hello{Version: 1, Position: position, Hash: f.hash()})
		if current := again.next().GetCurrent(); current == nil || string(current.Hash) != string(f.hash()) {
			t.Errorf("%s: want Current", name)
		} else {
			again.checkClock(current.Clock)
		}
	}
	// And with something old: only the difference is asked for.
	stale := follow(t, conn, &syncv1.Hello{Version: 1, Hash: make([]byte, 32)})
	for id, body := range f.held {
		if id != mine.Id {
			stale.held[id] = body
		}
	}
	if d := stale.sync(); len(d.Bodies) != 1 {
		t.Errorf("%d bodies, want the one that is missing", len(d.Bodies))
	}
}

func TestFollowManyInParts(t *testing.T) { // no message above 1 MiB; Resync past 1024 changes
	r := newRig(t)
	agent := r.agent()
	f := follow(t, r.connect(&agent), nil)
	f.sync()
	var all []*spiretypes.Entry
	for i := range 3000 {
		e := entryUnder(agent.id, fmt.Sprintf("/w/%d", i))
		e.Hint = fmt.Sprintf("%01000d", i)
		all = append(all, e)
	}
	r.create(all...)
	for len(f.held) < 3001 {
		switch m := f.next(); {
		case m.GetInventory() != nil:
			want := &syncv1.Want{}
			for inv := m.GetInventory(); ; inv = f.next().GetInventory() {
				for _, item := range inv.Items {
					if _, ok := f.held[item.Id]; !ok && item.Kind == syncv1.Item_KIND_GRANT {
						want.GrantIds = append(want.GrantIds, item.Id)
					}
				}
				if !inv.More {
					break
				}
			}
			// What it wants comes, or another inventory if too much has changed meanwhile.
			f.say(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Want{Want: want}})
		case m.GetDelta() != nil:
			for part := m.GetDelta(); ; part = f.next().GetDelta() {
				if size := proto.Size(part); size > 1<<20 {
					t.Errorf("a part of %d bytes", size)
				}
				for _, raw := range part.Bodies {
					body := new(syncv1.Body)
					if err := proto.Unmarshal(raw, body); err != nil {
						t.Fatal(err)
					}
					f.held[body.GetGrant().GetId()] = raw
				}
				if !part.More {
					if string(f.hash()) != string(part.Hash) {
						t.Error("the hash differs")
					}
					break
				}
			}
		}
	}
}

func TestBanCutsStream(t *testing.T) { // R30
	r := newRig(t)
	for name, act := range map[string]func(*agentv1.BanAgentRequest) error{
		"ban": func(req *agentv1.BanAgentRequest) error {
			_, err := agentv1.NewAgentClient(r.admin).BanAgent(t.Context(), req)
			return err
		},
		"evict": func(req *agentv1.BanAgentRequest) error {
			_, err := agentv1.NewAgentClient(r.admin).DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: req.Id})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			agent := r.agent()
			f := follow(t, r.connect(&agent), nil)
			f.sync()
			if err := act(&agentv1.BanAgentRequest{Id: wireID(agent.id.Path())}); err != nil {
				t.Fatal(err)
			}
			reason := map[string]string{"ban": "agent_banned", "evict": "agent_not_attested"}[name]
			wantCode(t, "the stream", f.end(), codes.PermissionDenied, reason)
			r.create(entryUnder(agent.id, "/after-"+name))
		})
	}
}

// TestBanCutsStreamOfSilentReader: an agent that never reads, and to which
// megabytes are on the way, is cut all the same (R30, Q7).
func TestBanCutsStreamOfSilentReader(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	conn := r.connect(&agent)
	stream, err := syncv1.NewSyncClient(conn).Follow(t.Context(), grpc.MaxCallRecvMsgSize(64<<20))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Hello{Hello: &syncv1.Hello{Version: 1}}}); err != nil {
		t.Fatal(err)
	}
	// Until someone follows, and then far more than the windows hold.
	until(t, "somebody follows", func() bool { n, _ := r.api.Acknowledged(1); return n == 1 })
	if err := stream.Send(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Want{Want: &syncv1.Want{}}}); err != nil {
		t.Fatal(err)
	}
	for i := range 12 {
		var batch []*spiretypes.Entry
		for j := range 100 {
			e := entryUnder(agent.id, fmt.Sprintf("/big/%d/%d", i, j))
			e.Selectors[0].Value = fmt.Sprintf("%d%010000d", j, i)
			batch = append(batch, e)
		}
		r.create(batch...)
	}
	if _, err := agentv1.NewAgentClient(r.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(agent.id.Path())}); err != nil {
		t.Fatal(err)
	}
	until(t, "the stream of a banned agent that does not read is gone", func() bool { n, _ := r.api.Acknowledged(1); return n == 0 })
}

func TestBanCutsStreamBeforeTheFirstDelta(t *testing.T) { // R30
	r := newRig(t)
	agent := r.agent()
	f := follow(t, r.connect(&agent), nil)
	if f.next().GetInventory() == nil {
		t.Fatal("not an inventory")
	}
	if _, err := agentv1.NewAgentClient(r.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(agent.id.Path())}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	wantCode(t, "the stream", f.end(), codes.PermissionDenied, "agent_banned")
	t.Logf("cut after %v", time.Since(began))
}

func TestFollowRefuses(t *testing.T) { // Q8
	r := newRig(t)
	agent := r.agent()
	conn := r.connect(&agent)
	hello := func(h *syncv1.Hello) *syncv1.AgentMessage {
		return &syncv1.AgentMessage{Message: &syncv1.AgentMessage_Hello{Hello: h}}
	}
	want := &syncv1.AgentMessage{Message: &syncv1.AgentMessage_Want{Want: &syncv1.Want{GrantIds: make([]string, 100_000)}}}
	for name, c := range map[string]struct {
		say  []*syncv1.AgentMessage
		code codes.Code
	}{
		"no hello":          {[]*syncv1.AgentMessage{{}}, codes.InvalidArgument},
		"want first":        {[]*syncv1.AgentMessage{want}, codes.InvalidArgument},
		"another version":   {[]*syncv1.AgentMessage{hello(&syncv1.Hello{Version: 2})}, codes.Unimplemented},
		"short hash":        {[]*syncv1.AgentMessage{hello(&syncv1.Hello{Version: 1, Hash: []byte("x")})}, codes.InvalidArgument},
		"long epoch":        {[]*syncv1.AgentMessage{hello(&syncv1.Hello{Version: 1, Position: &syncv1.Position{Epoch: make([]byte, 17)}})}, codes.InvalidArgument},
		"bad agent version": {[]*syncv1.AgentMessage{hello(&syncv1.Hello{Version: 1, AgentVersion: "a\nb"})}, codes.InvalidArgument},
		"wants the moon":    {[]*syncv1.AgentMessage{hello(&syncv1.Hello{Version: 1}), want}, codes.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := syncv1.NewSyncClient(conn).Follow(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range c.say {
				stream.Send(m)
			}
			for err == nil {
				_, err = stream.Recv()
			}
			wantCode(t, "Follow", err, c.code, "")
		})
	}
}

func TestRenewedAgentMovesItsStream(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	f := follow(t, r.connect(&agent), nil)
	f.sync()
	next, err := renew(t, r.connect(&agent))
	if err != nil {
		t.Fatal(err)
	}
	moved := follow(t, r.connect(&next), &syncv1.Hello{Version: 1, Hash: f.hash()})
	if moved.next().GetCurrent() == nil {
		t.Error("want Current on the new connection")
	}
	if n := countInTrail(t, r, `"kind":"alarm"`); n != 0 {
		t.Errorf("%d alarms about an agent that only renewed", n)
	}
}

func TestIdleCostsNothing(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	f := follow(t, r.connect(&agent), nil)
	f.sync()
	reads, writes := r.store.reads.Load(), r.store.writes.Load()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	select {
	case m := <-f.heard:
		t.Errorf("a message while nothing happens: %v", m)
	case err := <-f.ended:
		t.Fatal(err)
	case <-ctx.Done():
	}
	if r.store.reads.Load() != reads || r.store.writes.Load() != writes {
		t.Errorf("%d reads and %d writes of the store while nothing happens", r.store.reads.Load()-reads, r.store.writes.Load()-writes)
	}
}

func TestAcknowledgements(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	f := follow(t, r.connect(&agent), nil)
	d := f.sync()
	expect := func(sequence uint64, want []spiffeid.ID) {
		t.Helper()
		until(t, fmt.Sprintf("at sequence %d the laggards are %v", sequence, want), func() bool {
			n, laggards := r.api.Acknowledged(sequence)
			return n == 1 && fmt.Sprint(laggards) == fmt.Sprint(want)
		})
	}
	expect(5, []spiffeid.ID{agent.id})
	f.say(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Ack{Ack: &syncv1.Ack{Position: d.Position, Hash: d.Hash, BundleSequence: 5}}})
	expect(5, nil)
	expect(6, []spiffeid.ID{agent.id})
}
