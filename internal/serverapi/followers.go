package serverapi

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	maxLaggards = 100
	// maxFollowing is how many streams an agent may have: the one that it uses, and
	// some that broke without anyone having noticed yet.
	maxFollowing = 4
)

// Followers is which agents follow one server, and how far each says it is. The
// server's API fills it, and its row says of it what other servers need to know.
type Followers struct {
	server   string
	registry *registry.Registry // asked with mu held

	// mu guards everything below, the rows' fields included.
	mu      sync.Mutex
	open    map[*following]struct{}
	byAgent map[spiffeid.ID][]*following // the oldest first
	left    map[spiffeid.ID]departure    // who had a stream until lately
	swept   time.Time                    // when left was last rid of those who are away for long
	waits   map[spiffeid.ID]map[*wait]struct{}
	recheck *time.Timer // for recheckAll; runs while a stream is open
}

// NewFollowers returns that nobody follows a server yet.
func NewFollowers(server string, r *registry.Registry) *Followers {
	return &Followers{
		server: server, registry: r,
		open: map[*following]struct{}{}, byAgent: map[spiffeid.ID][]*following{}, left: map[spiffeid.ID]departure{},
		waits: map[spiffeid.ID]map[*wait]struct{}{},
	}
}

// following is one open stream.
type following struct {
	agent    spiffeid.ID
	follower *registry.Follower
	expiry   time.Time      // of the certificate that it was opened with
	over     chan struct{}  // closed when the agent has opened too many others since
	recheck  chan struct{}  // sent to when the right to the stream is to be looked at again
	judged   grounds        // as they were when it was last sent to
	position store.Position // last acknowledged; zero: none yet
	bundle   uint64         // sequence of the own bundle that it holds
	owes     store.Position // to which the last delta leads, until it is acknowledged
	since    time.Time      // when the first of those was sent; zero: nothing is owed
	// ahead is the agent's clock less ours, when it last told.
	ahead      time.Duration
	clockKnown bool

	hash      uint64 // registry.AgentHash
	endsKnown bool   // it has said what ends first
	x509, jwt registry.End
}

// grounds is on what the right to an open stream rests besides its certificate's
// end: where in the log the agent's row and the own bundle were last written.
type grounds struct{ node, bundle store.Position }

func (row *following) grounds(s *registry.Snapshot) (g grounds) {
	g.node, _ = s.NodeVersion(row.agent)
	g.bundle, _ = s.BundleVersion(row.agent.TrustDomain())
	return g
}

func (f *Followers) join(agent spiffeid.ID, expiry time.Time, follower *registry.Follower) *following {
	f.mu.Lock()
	defer f.mu.Unlock()
	row := &following{
		agent: agent, follower: follower, expiry: expiry, over: make(chan struct{}), recheck: make(chan struct{}, 1), hash: registry.AgentHash(agent),
	}
	if len(f.open) == 0 {
		f.recheck = time.AfterFunc(recheckEvery, f.recheckAll)
	}
	delete(f.left, agent)
	f.open[row] = struct{}{}
	rows := append(f.byAgent[agent], row)
	if len(rows) > maxFollowing { // R98
		close(rows[0].over)
		rows = rows[1:]
	}
	f.byAgent[agent] = rows
	return row
}

// leave takes note that a stream has ended. It says whether the agent is out, and
// so not attached any more.
func (f *Followers) leave(row *following, now time.Time) (gone bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if delete(f.open, row); len(f.open) == 0 {
		f.recheck.Stop()
	}
	rows := slices.DeleteFunc(f.byAgent[row.agent], func(r *following) bool { return r == row })
	if f.byAgent[row.agent] = rows; len(rows) > 0 {
		return false
	}
	delete(f.byAgent, row.agent)
	f.registry.View(func(s *registry.Snapshot) {
		seen := f.seen(s, now)
		if gone = seen.out(row.agent); !gone {
			f.sweepLocked(now)
			f.left[row.agent] = departure{now, row.holds(s)}
			return
		}
		f.settleLocked(row.agent, func(missing store.Position) bool { return f.holdsLocked(row.agent, missing, seen) })
	})
	return gone
}

// recheckAll has the right to those streams looked at again for which the answer
// can have changed since the last time (R124). For the others nobody is woken and
// nothing is read: idle streams cost one comparison each.
func (f *Followers) recheckAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.open) == 0 {
		return
	}
	f.recheck.Reset(recheckEvery)
	now := time.Now()
	f.registry.View(func(s *registry.Snapshot) {
		for row := range f.open {
			g := row.grounds(s)
			if g == row.judged && now.Before(row.expiry) {
				continue
			}
			row.judged = g
			select {
			case row.recheck <- struct{}{}:
			default: // it is to be looked at already
			}
		}
	})
}

// owe takes note that a delta is being sent.
func (f *Followers) owe(row *following, p store.Position, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if row.owes = p; row.since.IsZero() {
		row.since = now
	}
}

// acknowledge takes note of how far an agent says it is. If that settles what it
// owed, took is since when it did; newBundle says that it has another bundle than before.
func (f *Followers) acknowledge(row *following, p store.Position, bundle uint64, now time.Time) (took time.Duration, settled, newBundle bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	newBundle = row.bundle != bundle
	row.position, row.bundle = p, bundle
	if settled = !row.since.IsZero() && reaches(p, row.owes); settled {
		took, row.since = now.Sub(row.since), time.Time{}
	}
	f.settleLocked(row.agent, func(missing store.Position) bool { return reaches(p, missing) })
	return took, settled, newBundle
}

// Attached says how many agents follow here, how many of those have not
// acknowledged what they were sent, and for how long the slowest has not.
func (s *Server) Attached(now time.Time) (agents, behind int, longest time.Duration) {
	s.followers.mu.Lock()
	defer s.followers.mu.Unlock()
	for _, rows := range s.followers.byAgent {
		agents++
		if row := rows[len(rows)-1]; !row.since.IsZero() { // the newest is the one in use
			behind++
			longest = max(longest, now.Sub(row.since))
		}
	}
	return agents, behind, longest
}

// tell takes note of what an agent says of its clock, and of what ends first there.
func (f *Followers) tell(row *following, st *syncv1.Status, now time.Time) {
	if st.GetClock() <= 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	row.ahead, row.clockKnown = time.UnixMilli(st.Clock).Sub(now), true
	row.endsKnown, row.x509, row.jwt = st.SaysEnds, row.endOf(st.FirstX509), row.endOf(st.FirstJwt)
}

// endOf reads an end, which is by the agent's clock. An ID that cannot be ours is
// left out: it is for people to read.
func (row *following) endOf(e *syncv1.End) registry.End {
	if e == nil {
		return registry.End{}
	}
	out := registry.End{Agent: row.agent.String(), At: time.UnixMilli(e.At).Add(-row.ahead).UTC()}
	if id, err := identity.ParseWorkload(row.agent.TrustDomain(), e.SpiffeId); err == nil {
		out.ID = id.String()
	}
	return out
}

// endsLocked is what ends first at the agents that follow here.
func (f *Followers) endsLocked() (e registry.Ends) {
	for _, rows := range f.byAgent {
		if row := rows[len(rows)-1]; row.endsKnown { // the newest is the one in use
			e.Telling++
			e.X509.First(row.x509)
			e.JWT.First(row.jwt)
		}
	}
	return e
}

// Acknowledged says how many agents follow here and which of them, at most a
// hundred, have not yet acknowledged our bundle at that sequence.
func (s *Server) Acknowledged(sequence uint64) (following int, laggards []spiffeid.ID) {
	s.followers.mu.Lock()
	defer s.followers.mu.Unlock()
	for row := range s.followers.open {
		if row.bundle < sequence && len(laggards) < maxLaggards {
			laggards = append(laggards, row.agent)
		}
	}
	slices.SortFunc(laggards, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
	return len(s.followers.open), laggards
}

// sendInventory sends an inventory in parts; an empty one is one part.
func (f *follow) sendInventory(ctx context.Context, inv registry.Inventory) error {
	for from := 0; ; from += pieceOfInventory {
		to := min(from+pieceOfInventory, len(inv.Items))
		part := &syncv1.Inventory{Position: writePosition(inv.Position), Hash: inv.Hash[:], More: to < len(inv.Items),
			Clock: time.Now().UnixMilli()}
		for _, item := range inv.Items[from:to] {
			kind := syncv1.Item_KIND_GRANT
			if item.Kind == registry.ItemBundle {
				kind = syncv1.Item_KIND_BUNDLE
			}
			part.Items = append(part.Items, &syncv1.Item{Kind: kind, Id: item.ID, Fingerprint: item.Fingerprint})
		}
		err := f.say(ctx, &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Inventory{Inventory: part}})
		if err != nil || !part.More {
			return err
		}
	}
}

// sendDelta sends a delta in parts of at most 1 MiB.
func (f *follow) sendDelta(ctx context.Context, d registry.Delta) error {
	f.followers.owe(f.row, d.Position, time.Now())
	if f.cfg.Count.Delta != nil {
		f.cfg.Count.Delta()
	}
	for {
		n, size := 0, 0
		for n < len(d.Bodies) && (n == 0 || size+len(d.Bodies[n]) <= pieceOfDelta) {
			size += len(d.Bodies[n]) + 8
			n++
		}
		part := &syncv1.Delta{
			Previous: writePosition(d.Previous), Position: writePosition(d.Position), Hash: d.Hash[:], Bodies: d.Bodies[:n], More: n < len(d.Bodies),
		}
		err := f.say(ctx, &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: part}})
		if err != nil || !part.More {
			return err
		}
		d.Bodies = d.Bodies[n:]
	}
}

func current(p store.Position, hash [32]byte) *syncv1.ServerMessage {
	return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Current{Current: &syncv1.Current{
		Position: writePosition(p), Hash: hash[:], Clock: time.Now().UnixMilli()}}}
}

func directive(d *syncv1.Directive) *syncv1.ServerMessage {
	return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Directive{Directive: d}}
}

func writePosition(p store.Position) *syncv1.Position {
	return &syncv1.Position{Epoch: p.Epoch[:], Revision: p.Revision}
}

func readPosition(p *syncv1.Position) (out store.Position) {
	copy(out.Epoch[:], p.GetEpoch())
	out.Revision = p.GetRevision()
	return out
}

// heardEnd is how a stream ends whose agent stopped talking: well, if it closed it.
func heardEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func errClosing() error {
	return fault.New(fault.Unavailable, "server_stopping", "the server is shutting down").Fix("connect again")
}

func errReconnect() error {
	return fault.New(fault.Unavailable, "reconnect", "this connection is to be replaced").Fix("connect again, with the newest certificate")
}
