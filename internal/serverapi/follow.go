package serverapi

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"google.golang.org/grpc"
)

const (
	syncVersion = 1
	// capabilityRules in a Hello says that grants may be rules.
	capabilityRules = "rules"
	// firstWords is how long an agent may take over its Hello and its Want.
	firstWords = 30 * time.Second
	// lastWords is how long it may take to read what was under way when its stream ends.
	lastWords = time.Second
	// confirmEvery is how often an agent that hears nothing is told the hash, so
	// that it notices if it has diverged.
	confirmEvery = 5 * time.Minute
	// recheckEvery is how often the right to open streams is looked at again (R124).
	recheckEvery = 30 * time.Second
	// followAge is how long a stream lives before the agent is asked to connect
	// anew, ± 20 %, and followGrace how long it may take.
	followAge   = 60 * time.Minute
	followGrace = 30 * time.Second
	// pieceOfDelta is how many bytes of bodies one message holds, unless a single
	// body is larger; pieceOfInventory how many items.
	pieceOfDelta     = 1<<20 - 4096
	pieceOfInventory = 5000
)

// syncs is plastron.sync.v1.Sync.
type syncs struct {
	syncv1.UnsafeSyncServer
	server *Server
}

// follow is one open stream. Its fields belong to the goroutine of Follow, save
// for what goes through the channels.
type follow struct {
	*Server
	caller   caller
	follower *registry.Follower
	heard    chan *syncv1.AgentMessage // from the agent
	ended    chan error                // why hearing stopped
	outbox   chan *syncv1.ServerMessage
	sent     chan error // one for each message taken from outbox
	row      *following
	dirty    bool   // a change came while a message was on its way
	stuck    bool   // a message is still on its way, and the stream ends
	tainted  uint64 // sequence of the bundle for which a Renew was sent
}

// errCut ends a stream whose agent may not have it any more.
var errCut = errors.New("the agent is out")

// Follow serves one agent for as long as both live. A change that the agent is
// affected by becomes a Delta; while the agent is slow to read, nothing is
// queued for it: the follower remembers what to look at (design section 8).
func (a syncs) Follow(stream grpc.BidiStreamingServer[syncv1.AgentMessage, syncv1.ServerMessage]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	f := &follow{
		Server: a.server, caller: callerFrom(ctx), heard: make(chan *syncv1.AgentMessage), ended: make(chan error, 1),
		outbox: make(chan *syncv1.ServerMessage), sent: make(chan error, 1),
	}
	// Both end when this returns: the library cancels what they wait for.
	go f.hear(ctx, stream)
	go f.speak(ctx, stream)

	hello, err := f.hello(ctx)
	if err != nil {
		return err
	}
	// Which version an agent runs, and that it follows, is good to know, but not worth its stream.
	if err := a.server.cfg.Nodes.Report(ctx, f.caller.id, hello.AgentVersion, true); err != nil && fault.KindOf(err) != fault.Unavailable {
		return err
	}
	f.follower = a.server.cfg.Registry.Follow(f.caller.id, slices.Contains(hello.Capabilities, capabilityRules))
	defer f.follower.Close()
	f.row = a.server.followers.join(f.caller.id, f.caller.expiry, f.follower)
	defer func() {
		if a.server.followers.leave(f.row, time.Now()) {
			a.server.poke()
		}
	}()

	if err := f.begin(ctx, hello); err != nil {
		return f.end(err)
	}
	return f.end(f.serve(ctx))
}

// hello waits for the first message.
func (f *follow) hello(ctx context.Context) (*syncv1.Hello, error) {
	m, err := f.next(ctx)
	if err != nil {
		return nil, err
	}
	hello := m.GetHello()
	switch {
	case hello == nil:
		return nil, fault.New(fault.Invalid, "hello_missing", "the first message must be a Hello")
	case hello.Version != syncVersion:
		return nil, fault.New(fault.Unsupported, "sync_version", "version %d of the sync protocol is not spoken here, only %d", hello.Version, syncVersion)
	case len(hello.Hash) != 0 && len(hello.Hash) != 32, len(hello.GetPosition().GetEpoch()) > len(store.Epoch{}):
		return nil, fault.New(fault.Invalid, "hello_invalid", "the Hello's hash or position has a wrong size")
	}
	return hello, nil
}

// next waits for the agent's next message, not for ever.
func (f *follow) next(ctx context.Context) (*syncv1.AgentMessage, error) {
	limit := time.NewTimer(firstWords)
	defer limit.Stop()
	for {
		select {
		case m := <-f.heard:
			return m, nil
		case err := <-f.ended:
			return nil, heardEnd(err)
		case <-limit.C:
			return nil, context.DeadlineExceeded
		case <-f.closing:
			return nil, errClosing()
		case <-f.over():
			return nil, errReconnect()
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-f.wake():
			if err := f.interrupted(); err != nil {
				return nil, err
			}
		}
	}
}

// wake is the follower's, once there is one.
func (f *follow) wake() <-chan struct{} {
	if f.follower == nil {
		return nil
	}
	return f.follower.Wake()
}

// over is closed when the agent has opened too many streams since this one.
func (f *follow) over() <-chan struct{} {
	if f.row == nil {
		return nil
	}
	return f.row.over
}

// interrupted is for a change that comes while something else is waited for: it
// is looked at afterwards, unless it is that the agent is out.
func (f *follow) interrupted() error {
	f.dirty = true
	if _, err := f.cfg.Nodes.Standing(f.caller.presented()); err != nil {
		return errCut
	}
	return nil
}

// begin brings the agent to a known state: it holds the same already, or gets
// the difference.
func (f *follow) begin(ctx context.Context, hello *syncv1.Hello) error {
	d := f.follower.Delta()
	switch {
	case d.Gone:
		return errCut
	case !d.Resync && string(hello.Hash) == string(d.Hash[:]):
		return f.say(ctx, current(d.Position, d.Hash))
	}
	return f.difference(ctx, readPosition(hello.Position))
}

// difference sends the inventory, hears what the agent lacks of it, and sends
// that, together with what changed meanwhile. from is where the agent says it
// stands, which only it needs to know.
func (f *follow) difference(ctx context.Context, from store.Position) error {
	inv := f.follower.Inventory()
	if inv.Gone {
		return errCut
	}
	if err := f.sendInventory(ctx, inv); err != nil {
		return err
	}
	for {
		m, err := f.next(ctx)
		if err != nil {
			return err
		}
		want := m.GetWant()
		if want == nil {
			f.note(m) // an acknowledgement that was under way
			continue
		}
		if len(want.GrantIds)+len(want.TrustDomains) > len(inv.Items) { // Q8
			return fault.New(fault.Invalid, "want_invalid", "the agent asks for more than the inventory has")
		}
		// First the bodies, then what changed: a body that changes in between is
		// among the changes too, and they come later.
		bodies := f.follower.Bodies(want.GrantIds, want.TrustDomains)
		d := f.follower.Delta()
		switch {
		case d.Gone:
			return errCut
		case d.Resync:
			return f.difference(ctx, from)
		}
		d.Previous, d.Bodies = from, append(bodies, d.Bodies...)
		return f.sendDelta(ctx, d)
	}
}

// serve answers events until the stream is to end.
func (f *follow) serve(ctx context.Context) error {
	confirm := time.NewTicker(confirmEvery)
	defer confirm.Stop()
	age := time.NewTimer(followAge - followAge/5 + rand.N(2*followAge/5))
	defer age.Stop()
	var grace <-chan time.Time
	for {
		if f.dirty {
			f.dirty = false
			if err := f.forward(ctx); err != nil {
				return err
			}
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-f.ended:
			return heardEnd(err)
		case <-f.closing:
			return errClosing()
		case <-grace:
			return errReconnect()
		case <-f.over():
			return errReconnect()
		case m := <-f.heard:
			if m.GetHello() != nil || m.GetWant() != nil {
				return fault.New(fault.Invalid, "message_unexpected", "the agent says what it was not asked")
			}
			f.note(m)
		case <-f.follower.Wake():
			if err := f.forward(ctx); err != nil {
				return err
			}
			confirm.Reset(confirmEvery)
		case <-confirm.C:
			if err := f.forwardDelta(ctx, f.follower.Delta(), true); err != nil {
				return err
			}
		case <-f.row.recheck:
			if err := f.recheck(ctx); err != nil {
				return err
			}
		case <-age.C:
			reconnect := &syncv1.Reconnect{WithinMs: (followGrace / 2).Milliseconds()}
			if err := f.say(ctx, directive(&syncv1.Directive{Directive: &syncv1.Directive_Reconnect{Reconnect: reconnect}})); err != nil {
				return err
			}
			grace = time.After(followGrace)
		}
	}
}

// forward sends what changed since the last time.
func (f *follow) forward(ctx context.Context) error {
	return f.forwardDelta(ctx, f.follower.Delta(), false)
}

func (f *follow) forwardDelta(ctx context.Context, d registry.Delta, confirm bool) error {
	switch {
	case d.Gone:
		return errCut
	case d.Resync:
		return f.difference(ctx, d.Previous)
	case len(d.Bodies) > 0:
		return f.sendDelta(ctx, d)
	case confirm || d.Previous != d.Position:
		// Also when nothing came of a change: the next Delta will say that it
		// leads on from here.
		return f.say(ctx, current(d.Position, d.Hash))
	}
	return nil
}

// recheck asks whether the agent may still have its stream (R124), and has it
// renew when the authority above its certificate is tainted (R69).
func (f *follow) recheck(ctx context.Context) error {
	if err := f.verify(f.caller.link, time.Now()); err != nil {
		return err
	}
	reconnect, err := f.cfg.Nodes.Standing(f.caller.presented())
	switch {
	case err != nil:
		return err
	case reconnect:
		return errReconnect()
	}
	b, err := f.bundleOf(f.cfg.TrustDomain)
	if err != nil || f.tainted == b.Sequence || !taints(b, f.caller.link.chain) {
		return err
	}
	f.tainted = b.Sequence
	renew := &syncv1.Renew{WithinMs: recheckEvery.Milliseconds()}
	return f.say(ctx, directive(&syncv1.Directive{Directive: &syncv1.Directive_Renew{Renew: renew}}))
}

// taints reports whether the root that a chain leads to is tainted.
func taints(b *bundle.Bundle, chain [][]byte) bool {
	if !slices.ContainsFunc(b.X509, func(a bundle.X509Authority) bool { return a.Tainted }) {
		return false // nothing needs to be parsed for each agent, then
	}
	top, err := x509.ParseCertificate(chain[len(chain)-1])
	if err != nil {
		return false
	}
	return slices.ContainsFunc(b.X509, func(a bundle.X509Authority) bool {
		if !a.Tainted {
			return false
		}
		ca, err := x509.ParseCertificate(a.ASN1)
		return err == nil && bytes.Equal(ca.SubjectKeyId, top.AuthorityKeyId)
	})
}

// note takes in what the agent says of itself.
func (f *follow) note(m *syncv1.AgentMessage) {
	if ack := m.GetAck(); ack != nil {
		took, settled, bundle := f.followers.acknowledge(f.row, readPosition(ack.Position), ack.BundleSequence, time.Now())
		if settled && f.cfg.Count.Acknowledged != nil {
			f.cfg.Count.Acknowledged(took)
		}
		if bundle || settled && f.cfg.Shared {
			f.poke()
		}
	}
	if st := m.GetStatus(); st != nil {
		f.followers.tell(f.row, st, time.Now())
	}
}

// end turns the reason into what the agent hears. An agent that is out and
// does not read loses its connection too: nothing stays open for it (R30). One
// that reads keeps it, for there are other streams on it.
func (f *follow) end(err error) error {
	if f.stuck {
		select {
		case <-f.sent:
		case <-time.After(lastWords):
			f.caller.link.close()
		}
	}
	if !errors.Is(err, errCut) {
		return err
	}
	if _, err := f.cfg.Nodes.Standing(f.caller.presented()); err != nil {
		return err
	}
	return errReconnect() // it is back already
}

// hear passes on what the agent says.
func (f *follow) hear(ctx context.Context, stream grpc.BidiStreamingServer[syncv1.AgentMessage, syncv1.ServerMessage]) {
	for {
		m, err := stream.Recv()
		if err != nil {
			f.ended <- err
			return
		}
		select {
		case f.heard <- m:
		case <-ctx.Done():
			return
		}
	}
}

// speak sends messages. It is apart from Follow's goroutine so that an agent
// that does not read cannot keep its stream past a ban.
func (f *follow) speak(ctx context.Context, stream grpc.BidiStreamingServer[syncv1.AgentMessage, syncv1.ServerMessage]) {
	for {
		select {
		case m := <-f.outbox:
			f.sent <- stream.Send(m)
		case <-ctx.Done():
			return
		}
	}
}

// say sends one message and waits until the library took it. What changes
// meanwhile is looked at afterwards, but a ban cuts the wait short.
func (f *follow) say(ctx context.Context, m *syncv1.ServerMessage) error {
	select {
	case f.outbox <- m:
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		select {
		case err := <-f.sent:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-f.closing:
			return errClosing()
		case <-f.over():
			f.stuck = true
			return errReconnect()
		case <-f.wake():
			if err := f.interrupted(); err != nil {
				f.stuck = true
				return err
			}
		}
	}
}
