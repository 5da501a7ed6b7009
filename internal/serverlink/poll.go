package serverlink

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/svid"
	"google.golang.org/protobuf/proto"
)

// How a server without the sync protocol is asked.
const (
	pollInterval = 5 * time.Second // ± 10 %
	// pollCeiling is the longest wait after failures. SPIRE's agents go up to
	// minutes; at this pace a failing server has less to do than a healthy one.
	pollCeiling = 15 * time.Second
	// wholeInterval is how often a long list is fetched in full, although its
	// revision numbers say that nothing changed: a server whose database was restored
	// counts some of them a second time.
	wholeInterval = 10 * time.Minute
	// staleHold is for how long an older bundle is taken for that of a replica that
	// lags behind, and not for the server's word.
	staleHold   = 10 * time.Minute
	renewWithin = 20 * time.Second // when the own SVID's authority is tainted
	// confirmEvery is how often an agent for which nothing changes is told so.
	confirmEvery = 5 * time.Minute
)

// poller holds what a server was last found to have for this agent, and stands
// in for that server in the sync protocol: with the same greeting, the same sums
// and only what changed, so that nobody above need know.
type poller struct {
	client *Client
	hurry  chan struct{} // to poll now

	mu       sync.Mutex // guards everything below; held while a poll is under way
	position syncv1.Position
	entries  map[string]polledEntry
	bundles  map[string]polledBundle // by trust domain name, the own one among them
	sum      entry.Sum
	due      time.Time
	fresh    bool // the last poll succeeded
	failures int
	wholeAt  time.Time
	reported string // the version that the server was told
}

// polledEntry is an entry in our form, and how the server numbers it.
type polledEntry struct {
	number, created int64
	revision        uint64 // in our form; grows where the server's number does not
	federates       []string
	body
}

type polledBundle struct {
	sequence    uint64
	seen        time.Time // when the server last had it
	authorities []*syncv1.X509Authority
	body
}

// body is a marshalled syncv1.Body.
type body struct {
	raw  []byte
	hash [sha256.Size]byte
}

// newBody marshals what a server has said. Only text that is not UTF-8 could make it
// fail, and such a message would not have been read.
func newBody(b *syncv1.Body) body {
	raw, _ := proto.MarshalOptions{Deterministic: true}.Marshal(b)
	return body{raw, sha256.Sum256(raw)}
}

func newPoller(c *Client) *poller {
	p := &poller{client: c, hurry: make(chan struct{}, 1), entries: map[string]polledEntry{}, bundles: map[string]polledBundle{}}
	// Not to be mistaken for a server's, nor for that of the agent's last start.
	p.position.Epoch = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, rand.Uint64()), rand.Uint64())
	return p
}

// soon makes the next poll be now, and forgets failures.
func (p *poller) soon() {
	select {
	case p.hurry <- struct{}{}:
	default:
	}
}

// follow returns a conversation that lasts as long as the connection. It polls
// first, unless that was just done, so that a server which cannot be followed
// shows here.
func (p *poller) follow(ctx context.Context) (*polled, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &polled{poller: p, ctx: ctx, said: make(chan *syncv1.AgentMessage, 2)}
	if p.fresh && time.Now().Before(p.due) {
		return s, nil
	}
	return s, s.pollLocked()
}

// polled is a conversation of the sync protocol with a server that does not
// speak it.
type polled struct {
	poller *poller
	ctx    context.Context
	said   chan *syncv1.AgentMessage // what wants an answer: Hello and Want

	// Only Recv touches what follows.
	at      *syncv1.Position  // where the agent stands; nil before it said so
	shown   entry.Sum         // what it holds then
	told    time.Time         // when it was told that it does
	listing bool              // it was sent an inventory
	renewed [sha256.Size]byte // the bundle for which it was told to renew
}

// Send takes what the agent says. What it says of itself nobody wants to know.
func (s *polled) Send(m *syncv1.AgentMessage) error {
	if m.GetHello() == nil && m.GetWant() == nil {
		return nil
	}
	select {
	case s.said <- m:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// Recv waits for the next thing to say to the agent: an answer, or that a poll has
// found a change.
func (s *polled) Recv() (*syncv1.ServerMessage, error) {
	p := s.poller
	if s.at == nil || s.listing {
		select {
		case m := <-s.said:
			p.mu.Lock()
			defer p.mu.Unlock()
			if s.listing {
				return s.deltaLocked(m.GetWant()), nil
			}
			return s.greetLocked(m.GetHello()), nil
		case <-s.ctx.Done():
			return nil, ended(s.ctx.Err())
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if own := p.bundles[p.client.td.Name()]; s.renewed != own.hash && p.client.taintedBy(own.authorities) { // R69
			s.renewed = own.hash
			renew := &syncv1.Renew{WithinMs: renewWithin.Milliseconds()}
			return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Directive{Directive: &syncv1.Directive{
				Directive: &syncv1.Directive_Renew{Renew: renew}}}}, nil
		}
		switch {
		case s.shown != p.sum:
			return s.inventoryLocked(), nil
		case time.Since(s.told) > confirmEvery:
			return s.currentLocked(), nil
		}
		if err := s.pollLocked(); err != nil {
			return nil, err
		}
	}
}

// greetLocked answers the agent's Hello.
func (s *polled) greetLocked(hello *syncv1.Hello) *syncv1.ServerMessage {
	s.poller.reportLocked(s.ctx, hello.GetAgentVersion())
	s.at, s.shown = hello.GetPosition(), s.poller.sum
	if sum := s.shown.Bytes(); s.at == nil || string(hello.GetHash()) != string(sum[:]) {
		return s.inventoryLocked()
	}
	return s.currentLocked()
}

// currentLocked says that the agent holds what there is.
func (s *polled) currentLocked() *syncv1.ServerMessage {
	sum := s.shown.Bytes()
	s.at, s.told = proto.CloneOf(&s.poller.position), time.Now()
	return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Current{Current: &syncv1.Current{Position: s.at, Hash: sum[:]}}}
}

// inventoryLocked lists everything; the agent asks for what it lacks.
func (s *polled) inventoryLocked() *syncv1.ServerMessage {
	p := s.poller
	sum := p.sum.Bytes()
	inv := &syncv1.Inventory{Position: proto.CloneOf(&p.position), Hash: sum[:]}
	for id, e := range p.entries {
		inv.Items = append(inv.Items, &syncv1.Item{Kind: syncv1.Item_KIND_GRANT, Id: id, Fingerprint: binary.BigEndian.Uint64(e.hash[:])})
	}
	for td, b := range p.bundles {
		inv.Items = append(inv.Items, &syncv1.Item{Kind: syncv1.Item_KIND_BUNDLE, Id: td, Fingerprint: binary.BigEndian.Uint64(b.hash[:])})
	}
	s.listing = true
	return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Inventory{Inventory: inv}}
}

// deltaLocked sends what the agent wants of an inventory. No poll comes between the
// two, for both are made in Recv.
func (s *polled) deltaLocked(want *syncv1.Want) *syncv1.ServerMessage {
	p := s.poller
	sum := p.sum.Bytes()
	d := &syncv1.Delta{Previous: s.at, Position: proto.CloneOf(&p.position), Hash: sum[:]}
	for _, id := range want.GetGrantIds() {
		d.Bodies = append(d.Bodies, p.entries[id].raw)
	}
	for _, td := range want.GetTrustDomains() {
		d.Bodies = append(d.Bodies, p.bundles[td].raw)
	}
	s.listing, s.at, s.shown, s.told = false, d.Position, p.sum, time.Now()
	return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: d}}
}

// pollLocked waits until a poll is due and makes it. An error ends the conversation.
func (s *polled) pollLocked() error {
	p := s.poller
	timer, hurry := time.NewTimer(time.Until(p.due)), false
	p.mu.Unlock()
	select {
	case <-s.ctx.Done():
	case <-timer.C:
	case <-p.hurry:
		hurry = true
	}
	timer.Stop()
	p.mu.Lock()
	if s.ctx.Err() != nil {
		return ended(s.ctx.Err())
	}
	if hurry {
		p.failures = 0
	}
	err := p.pollOnceLocked(s.ctx)
	p.fresh = err == nil
	now := time.Now()
	switch reason := fault.ReasonOf(err); {
	case err == nil:
		p.failures, p.due = 0, now.Add(spread(pollInterval, 10))
		if !p.client.Polls() {
			return noPush() // it came over a new connection
		}
	case reason == "call_ended": // the connection was moved
		p.due = now
	case reason == "server_unavailable":
		// How soon to come again is up to those above, as with a server that pushes.
		p.due = now
		p.client.poll(peering{})
	default:
		p.failures++
		wait := min(pollInterval<<min(p.failures-1, 8), pollCeiling)
		p.due = now.Add(max(wait/2+rand.N(wait/2+1), fault.AfterOf(err))) // R110
	}
	return err
}

// pollOnceLocked learns what there is, and takes over all of it or nothing.
func (p *poller) pollOnceLocked(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	now := time.Now()
	whole := !now.Before(p.wholeAt)
	conn := p.client.current()
	entries, err := p.fetchEntries(ctx, conn, whole)
	if err != nil {
		return err
	}
	bundles, err := p.fetchBundles(ctx, conn, entries, now)
	if err != nil {
		return err
	}
	var sum entry.Sum
	for _, e := range entries {
		sum.Add(e.hash)
	}
	for _, b := range bundles {
		sum.Add(b.hash)
	}
	if sum != p.sum {
		p.position.Revision++
	}
	p.entries, p.bundles, p.sum = entries, bundles, sum
	if whole {
		p.wholeAt = now.Add(spread(wholeInterval, 20))
	}
	return nil
}

// reportLocked tells the server which version the agent has, once. A server that
// does not want to know is none the worse.
func (p *poller) reportLocked(ctx context.Context, version string) {
	if version == "" || version == p.reported {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn := p.client.current()
	_, err := agentv1.NewAgentClient(conn).PostStatus(ctx, &agentv1.PostStatusRequest{AgentVersion: version})
	if err := conn.fault("report the version", err); err == nil || fault.KindOf(err) == fault.Unsupported {
		p.reported = version
	}
}

// taintedBy reports whether a bundle taints the authority that signed the top of
// the chain that the agent shows.
func (c *Client) taintedBy(authorities []*syncv1.X509Authority) bool {
	chain := c.ownChain()
	if len(chain) == 0 || !slices.ContainsFunc(authorities, (*syncv1.X509Authority).GetTainted) {
		return false
	}
	top, err := x509.ParseCertificate(chain[len(chain)-1])
	if err != nil {
		return false
	}
	found, good := false, false
	for _, a := range authorities {
		ca, err := x509.ParseCertificate(a.GetAsn1())
		if err == nil && bytes.Equal(ca.RawSubject, top.RawIssuer) && bytes.Equal(ca.SubjectKeyId, top.AuthorityKeyId) {
			found, good = true, good || !a.GetTainted()
		}
	}
	return found && !good
}

// ownID returns the ID that the agent shows, or nothing.
func (c *Client) ownID() string {
	chain := c.ownChain()
	if len(chain) == 0 {
		return ""
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return ""
	}
	id, err := svid.PeerID(leaf)
	if err != nil {
		return ""
	}
	return id.String()
}

// ownChain returns the certificates that the agent shows now, leaf first.
func (c *Client) ownChain() [][]byte {
	c.mu.Lock()
	certificate := c.cfg.Certificate
	c.mu.Unlock()
	if certificate == nil {
		return nil
	}
	if own := certificate(); own != nil {
		return own.Certificate
	}
	return nil
}

// ended is the fault for a conversation that we ended ourselves.
func ended(err error) error {
	return fault.New(fault.Unavailable, "call_ended", "the conversation was given up").Because(err)
}

// noPush is the fault that leads from the sync protocol to polling and, with
// another connection, back.
func noPush() error {
	return fault.New(fault.Unsupported, "sync_unsupported", "the server does not push changes, it is polled instead")
}

// spread returns d ± percent.
func spread(d time.Duration, percent int64) time.Duration {
	part := d * time.Duration(percent) / 100
	return d - part + rand.N(2*part+1)
}
