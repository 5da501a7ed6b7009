package mirror

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
)

var modelDomain = spiffeid.RequireTrustDomainFromString("example.org")

// state is what the store holds after one commit. It is not changed once made.
type state struct {
	epoch    byte
	revision uint64
	bodies   map[string][]byte // by "g/ID" or "b/TRUSTDOMAIN"
	grants   map[string]entry.Entry
	entries  []entry.Entry // the grants, in order
	sum      entry.Sum     // over bodies
	node     *registry.Node
	token    *registry.Token
	// The authorities are cas[first:next], the last of which signs; those before
	// tainted are tainted.
	first, tainted, next int
}

func (s *state) position() *syncv1.Position {
	return &syncv1.Position{Epoch: bytes.Repeat([]byte{s.epoch}, 16), Revision: s.revision}
}

func (s *state) hash() []byte {
	h := s.sum.Bytes()
	return h[:]
}

func (s *state) name() string { return fmt.Sprintf("%d.%d", s.epoch, s.revision) }

// modelServer is one of the servers. One that lags hears of nothing before it
// catches up.
type modelServer struct {
	at      *state
	up, lag bool
	skew    time.Duration
}

// session is the stream between the agent and one server.
type session struct {
	server  int
	shown   *agentid.Own
	stream  []*syncv1.ServerMessage // on their way
	offered *state                  // of the inventory; nil: none
	follow  bool
}

// commit makes the next state of the store, which every server that does not lag
// sees at once.
func (w *model) commit(change func(*state)) {
	next := *w.head
	next.bodies, next.grants = maps.Clone(w.head.bodies), maps.Clone(w.head.grants)
	next.revision++
	change(&next)
	next.sum, next.entries = entry.Sum{}, nil
	for _, id := range slices.Sorted(maps.Keys(next.grants)) {
		next.entries = append(next.entries, next.grants[id])
	}
	for _, b := range next.bodies {
		next.sum.Add(sha256.Sum256(b))
	}
	w.head = &next
	w.states[next.name()] = &next
	for i, s := range w.servers {
		if s.up && !s.lag {
			w.catchUp(i)
		}
	}
}

// catchUp has a server see the head of the store, and tell its agent.
func (w *model) catchUp(i int) {
	s := w.servers[i]
	before := s.at
	s.at = w.head
	c := w.session
	if before == s.at || c == nil || c.server != i {
		return
	}
	// As the server looks at each of its streams after a change (R124).
	if reconnect, err := nodes.Standing(s.at.node, c.shown.Serial, c.shown.NotAfter, w.at.Add(s.skew)); err != nil || reconnect {
		w.hangUp(err)
		return
	}
	if c.follow {
		w.sayDelta(before, s.at, difference(before, s.at))
	}
}

// sayDelta puts a delta on its way, in parts if chance wants it so.
func (w *model) sayDelta(from, to *state, bodies [][]byte) {
	for {
		n := len(bodies)
		if n > 1 && w.rnd.IntN(2) == 0 {
			n = 1 + w.rnd.IntN(n-1)
		}
		w.session.stream = append(w.session.stream, &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: &syncv1.Delta{
			Previous: from.position(), Position: to.position(), Hash: to.hash(), Bodies: bodies[:n], More: n < len(bodies)}}})
		if bodies = bodies[n:]; len(bodies) == 0 {
			return
		}
	}
}

func (w *model) current() *syncv1.ServerMessage {
	s := w.servers[w.session.server]
	return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Current{Current: &syncv1.Current{Position: s.at.position(), Hash: s.at.hash(), Clock: w.at.Add(s.skew).UnixMilli()}}}
}

// difference returns what leads from one state to another.
func difference(from, to *state) [][]byte {
	var bodies [][]byte
	for _, key := range slices.Sorted(maps.Keys(to.bodies)) {
		if !bytes.Equal(from.bodies[key], to.bodies[key]) {
			bodies = append(bodies, to.bodies[key])
		}
	}
	for _, key := range slices.Sorted(maps.Keys(from.bodies)) {
		if _, still := to.bodies[key]; !still {
			gone := &syncv1.Body{Body: &syncv1.Body_GrantRemoved{GrantRemoved: key[2:]}}
			if key[0] == 'b' {
				gone = &syncv1.Body{Body: &syncv1.Body_BundleRemoved{BundleRemoved: key[2:]}}
			}
			bodies = append(bodies, marshal(gone))
		}
	}
	return bodies
}

func marshal(m proto.Message) []byte {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	return raw
}

// answer is the server's side of the protocol.
func (w *model) answer(msg *syncv1.AgentMessage) {
	c := w.session
	at := w.servers[c.server].at
	switch msg := msg.GetMessage().(type) {
	case *syncv1.AgentMessage_Hello:
		if bytes.Equal(msg.Hello.GetHash(), at.hash()) {
			c.follow = true
			c.stream = append(c.stream, w.current())
			return
		}
		c.offered = at
		keys := slices.Sorted(maps.Keys(at.bodies))
		for i, key := range keys {
			kind := syncv1.Item_KIND_GRANT
			if key[0] == 'b' {
				kind = syncv1.Item_KIND_BUNDLE
			}
			c.stream = append(c.stream, &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Inventory{Inventory: &syncv1.Inventory{
				Position: at.position(), Hash: at.hash(), More: i < len(keys)-1,
				Items: []*syncv1.Item{{Kind: kind, Id: key[2:], Fingerprint: fingerprint(sha256.Sum256(at.bodies[key]))}}}}})
		}
	case *syncv1.AgentMessage_Want:
		// What has changed since the inventory comes along.
		var bodies [][]byte
		for _, id := range msg.Want.GetGrantIds() {
			bodies = append(bodies, c.offered.bodies["g/"+id])
		}
		for _, td := range msg.Want.GetTrustDomains() {
			bodies = append(bodies, c.offered.bodies["b/"+td])
		}
		bodies = append(bodies, difference(c.offered, at)...)
		c.follow = true
		w.sayDelta(c.offered, at, bodies)
	}
}

// grant creates or changes a grant, or makes a rule of an entry.
func (w *model) grant() string {
	id := fmt.Sprintf("g%d", w.rnd.IntN(10))
	g := &syncv1.Grant{Id: id, SpiffeId: fmt.Sprintf("spiffe://example.org/%d", w.rnd.IntN(12)), ParentId: "spiffe://example.org/spire/agent/x",
		CreatedAt: 1 + int64(w.rnd.IntN(3)), Hint: []string{"", "", "h"}[w.rnd.IntN(3)], DisableX509SvidPrefetch: w.rnd.IntN(5) == 0}
	if w.rnd.IntN(3) == 0 {
		g.SpiffeId, g.DisableX509SvidPrefetch, g.Trust = "", false, entry.TrustAgent
		g.IdTemplate = "spiffe://example.org/" + []string{"u/{unix.user}", "u/{unix.user}/{unix.program}", "v/{unix.program}"}[w.rnd.IntN(3)]
		g.IdPrefix = g.IdTemplate[:len("spiffe://example.org/u/")]
	}
	for range 1 + w.rnd.IntN(2) {
		g.Selectors = append(g.Selectors, &syncv1.Selector{Type: "unix", Value: fmt.Sprintf("uid:%d", w.rnd.IntN(4))})
	}
	if w.rnd.IntN(4) == 0 {
		g.ExpiresAt = w.at.Add(time.Duration(w.rnd.IntN(200)) * time.Second).Unix()
	}
	if w.rnd.IntN(3) == 0 {
		g.FederatesWith = []string{fmt.Sprintf("f%d.test", w.rnd.IntN(2))}
	}
	w.commit(func(s *state) {
		g.Revision = s.revision
		s.bodies["g/"+id] = marshal(&syncv1.Body{Body: &syncv1.Body_Grant{Grant: g}})
		read, err := newMachine(modelDomain, 0, "").newGrant(g)
		if err != nil {
			w.Fatal(err)
		}
		s.grants[id] = read.entry
	})
	return fmt.Sprintf("%s: %s = %s%s for %v", w.head.name(), id, g.SpiffeId, g.IdTemplate, w.head.grants[id].Selectors)
}

func (w *model) federate() string {
	td := fmt.Sprintf("f%d.test", w.rnd.IntN(2))
	ca := w.rnd.IntN(len(w.cas))
	remove := w.rnd.IntN(3) == 0
	w.commit(func(s *state) {
		delete(s.bodies, "b/"+td)
		if !remove {
			s.bodies["b/"+td] = marshal(&syncv1.Body{Body: &syncv1.Body_Bundle{Bundle: &syncv1.Bundle{TrustDomain: td, Sequence: s.revision,
				X509Authorities: []*syncv1.X509Authority{{Asn1: w.cas[ca]}}}}})
		}
	})
	return w.head.name() + ": " + td
}

// authorities changes the authorities of the trust domain.
func (w *model) authorities(change func(*state)) string {
	w.commit(func(s *state) {
		change(s)
		s.tainted = max(s.tainted, s.first)
		w.publish(s)
	})
	return fmt.Sprintf("%s: from %d, tainted before %d, %d signs", w.head.name(), w.head.first, w.head.tainted, w.head.next-1)
}

func (w *model) publish(s *state) {
	b := &syncv1.Bundle{TrustDomain: modelDomain.Name(), Sequence: s.revision}
	for i, der := range w.cas[s.first:s.next] {
		b.X509Authorities = append(b.X509Authorities, &syncv1.X509Authority{Asn1: der, Tainted: s.first+i < s.tainted})
	}
	s.bodies["b/"+modelDomain.Name()] = marshal(&syncv1.Body{Body: &syncv1.Body_Bundle{Bundle: b}})
}

// restore puts an older state of the store back, with every server stopped. It
// is a new epoch. The authorities are those of now: an operator who revoked one
// does not let it come back.
func (w *model) restore() string {
	names := slices.Sorted(maps.Keys(w.states))
	old := w.states[names[w.rnd.IntN(len(names))]]
	if w.session != nil {
		w.hangUp(errAway)
	}
	for _, s := range w.servers {
		s.up, s.lag = true, false
	}
	w.epoch++
	w.commit(func(s *state) {
		s.epoch, s.revision = w.epoch, old.revision
		s.bodies, s.grants, s.node, s.token = maps.Clone(old.bodies), maps.Clone(old.grants), old.node, old.token
		w.publish(s)
	})
	return old.name() + " as " + w.head.name()
}

var errAway = fault.New(fault.Unavailable, "server_unavailable", "no answer")

// reach gets the agent as far as the word of the server that it keeps to: over a
// connection that shows own, or none.
func (w *model) reach(own *agentid.Own) (*modelServer, error) {
	s, a := w.servers[w.agent.route], w.agent
	skew := w.skew - s.skew
	switch {
	case !s.up:
		a.route = (a.route + 1) % len(w.servers)
		return nil, errAway
	case skew.Abs() > 30*time.Minute:
		return nil, fault.New(fault.Unauthenticated, agentid.ReasonClock, "the server's certificate is not valid now")
	case !slices.Contains(a.roots, s.at.next-1):
		return nil, fault.New(fault.Unauthenticated, agentid.ReasonUntrusted, "not ours")
	case own == nil:
		return s, nil
	}
	if ca := w.signedBy[own.Serial]; ca < s.at.first || ca >= s.at.next {
		return nil, fault.New(fault.Unavailable, "server_unavailable", "the handshake breaks")
	}
	now := w.at.Add(s.skew)
	promote, err := nodes.Authenticate(s.at.node, own.Serial, own.NotAfter, now)
	if s.at != w.head && (err != nil || promote) {
		// A server that lags may not have heard of the agent's last renewal: it asks
		// the store before it refuses, and before it writes.
		promote, err = nodes.Authenticate(w.head.node, own.Serial, own.NotAfter, now)
	}
	if promote {
		w.update(s, func(st *state) {
			node := nodes.Promote(*st.node, registry.Credential{Serial: own.Serial})
			st.node = &node
		})
	}
	return s, err
}

// update commits through a server, which sees what it wrote.
func (w *model) update(s *modelServer, change func(*state)) {
	w.commit(change)
	if s.at != w.head {
		w.catchUp(slices.Index(w.servers, s))
	}
}

// attest admits the agent's node.
func (w *model) attest() (*agentid.Own, error) {
	s, err := w.reach(nil)
	if err != nil {
		return nil, err
	}
	own, credential := w.ownSVID(s)
	c := nodes.Candidate{Now: w.at.Add(s.skew), Epoch: store.Epoch{w.head.epoch}, ID: own.ID, Type: "model", CanReattest: w.repeatable, Credential: credential, Lineage: []byte("l")}
	if !w.repeatable {
		c.OneTime = []byte(w.agent.token)
	}
	token := w.head.token
	if token != nil && !bytes.Equal(token.Hash, c.OneTime) {
		token = nil
	}
	node, used, err := nodes.Admit(w.head.node, token, c)
	if err != nil {
		return nil, err
	}
	w.update(s, func(st *state) {
		st.node = node
		if used != nil {
			st.token = used
		}
	})
	return own, nil
}

func (w *model) renew() (*agentid.Own, error) {
	s, err := w.reach(w.agent.own)
	if err != nil {
		return nil, err
	}
	own, credential := w.ownSVID(s)
	node, err := nodes.Renew(w.head.node, w.agent.own.Serial, w.agent.own.NotAfter, w.at.Add(s.skew), credential)
	if err != nil {
		return nil, err
	}
	w.update(s, func(st *state) { st.node = node })
	return own, nil
}

// ownSVID signs an SVID for the agent itself.
func (w *model) ownSVID(s *modelServer) (*agentid.Own, registry.Credential) {
	w.serial++
	now := w.at.Add(s.skew)
	own := &agentid.Own{ID: spiffeid.RequireFromPath(modelDomain, "/spire/agent/x"), Serial: fmt.Sprint(w.serial),
		NotBefore: now.Add(-svid.Backdate), NotAfter: now.Add(lifeOfOwn), Repeatable: w.repeatable}
	w.signedBy[own.Serial] = s.at.next - 1
	return own, registry.Credential{Serial: own.Serial, ExpiresAt: own.NotAfter, KeyHash: []byte(w.agent.key)}
}

// issued is an X.509-SVID that a server has signed.
type issued struct {
	id  spiffeid.ID
	ca  int
	end time.Time // by the right clock, as long from its arrival as the agent's showed then
}

// x509 has the server sign one item, by what it has now, which may not be what
// the agent saw.
func (w *model) x509(s *modelServer, i want) signedItem {
	item := signedItem{grantID: i.grantID, facts: i.facts}
	g, found := s.at.grants[i.grantID]
	if !found || !w.calm && w.rnd.IntN(8) == 0 {
		item.err, item.refused = fault.New(fault.Denied, "no", "no"), true
		return item
	}
	id, named, bad := g.Grants(i.facts)
	if bad != nil || len(named) != len(i.facts) {
		item.err, item.refused = fault.New(fault.Invalid, "facts", "facts"), true
		return item
	}
	ca := s.at.next - 1
	from := w.at.Add(s.skew)
	until := from.Add(time.Duration(6+w.rnd.IntN(300)) * time.Second)
	now := w.at.Add(w.skew)
	// What verify looks at before the step sees it (R36).
	switch {
	case now.Before(from.Add(-svid.Backdate)) || !now.Before(until):
		item.err = fault.New(fault.Invalid, "clock_skew", "it is not valid now")
	case !slices.Contains(w.agent.roots, ca):
		item.err = fault.New(fault.Invalid, "svid_untrusted", "its authority is not in the bundle")
	default:
		w.serial++
		chain := fmt.Sprintf("svid %d", w.serial)
		w.issued[chain] = issued{id, ca, w.at.Add(until.Sub(now))}
		item.cert = &cert{id: id, asked: i.revision, revision: max(g.Revision, i.revision), chain: []byte(chain), span: lasting(now, until, moment{now, w.boot}),
			authority: w.parsed[ca].SubjectKeyId, authName: w.parsed[ca].RawSubject}
	}
	return item
}

// sign answers the batch under way: signs it, or fails it.
func (w *model) sign(well bool) string {
	a := w.agent
	if a == nil || a.batch == nil {
		return ""
	}
	batch := a.batch
	a.batch = nil
	s, err := w.reach(a.own)
	if w.agent != a {
		return "the agent was stopped meanwhile"
	}
	if !well {
		err = errAway
	}
	if err != nil {
		w.feed(signFailed{err})
		return err.Error()
	}
	var items signed
	for _, i := range batch {
		items = append(items, w.x509(s, i))
	}
	w.feed(items)
	return ""
}

// modelAuthorities are made beforehand, since that is not deterministic.
func modelAuthorities(t *testing.T) [][]byte {
	t.Helper()
	var out [][]byte
	for range 8 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := svid.SelfSignedCA(modelDomain, key, time.Unix(1e9-86400, 0), time.Unix(2e9, 0))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, der)
	}
	return out
}

// readable is a message as a reader of a trace wants to see it.
func readable(msg any) string {
	at := func(p *syncv1.Position) string {
		if p == nil {
			return "nothing"
		}
		return fmt.Sprintf("%d.%d", p.GetEpoch()[0], p.GetRevision())
	}
	body := func(raw []byte) string {
		var b syncv1.Body
		if err := proto.Unmarshal(raw, &b); err != nil {
			return "?"
		}
		switch b := b.GetBody().(type) {
		case *syncv1.Body_Grant:
			return "+" + b.Grant.GetId()
		case *syncv1.Body_GrantRemoved:
			return "-" + b.GrantRemoved
		case *syncv1.Body_Bundle:
			return "+" + b.Bundle.GetTrustDomain()
		}
		return "-" + b.GetBundleRemoved()
	}
	switch m := msg.(type) {
	case agentid.Done:
		return fmt.Sprintf("%v is done: %v", m.Kind, m.Err)
	case disconnected:
		return fmt.Sprintf("disconnected: %v", m.err)
	case signFailed:
		return fmt.Sprintf("not signed: %v", m.err)
	case *syncv1.ServerMessage:
		switch m := m.GetMessage().(type) {
		case *syncv1.ServerMessage_Current:
			return "server: you are at " + at(m.Current.GetPosition())
		case *syncv1.ServerMessage_Inventory:
			return fmt.Sprintf("server: at %s there is %s, more %v", at(m.Inventory.GetPosition()), m.Inventory.GetItems()[0].GetId(), m.Inventory.GetMore())
		case *syncv1.ServerMessage_Delta:
			var all []string
			for _, b := range m.Delta.GetBodies() {
				all = append(all, body(b))
			}
			return fmt.Sprintf("server: from %s to %s %s, more %v", at(m.Delta.GetPrevious()), at(m.Delta.GetPosition()), strings.Join(all, " "), m.Delta.GetMore())
		}
		return fmt.Sprintf("server: directive %T", m.GetDirective().GetDirective())
	case *syncv1.AgentMessage:
		switch m := m.GetMessage().(type) {
		case *syncv1.AgentMessage_Hello:
			return "agent: I am at " + at(m.Hello.GetPosition())
		case *syncv1.AgentMessage_Want:
			return fmt.Sprintf("agent: I want %v %v", m.Want.GetGrantIds(), m.Want.GetTrustDomains())
		case *syncv1.AgentMessage_Ack:
			return "agent: I hold " + at(m.Ack.GetPosition())
		}
		return "agent: status"
	case signed:
		var all []string
		for _, i := range m {
			if i.err != nil {
				all = append(all, i.grantID+" "+fault.ReasonOf(i.err))
			} else {
				all = append(all, fmt.Sprintf("%s %s until %s", i.grantID, i.cert.chain, i.cert.expiresAt.Format(time.TimeOnly)))
			}
		}
		return "signed: " + strings.Join(all, ", ")
	}
	return fmt.Sprintf("%T%+v", msg, msg)
}
