package mirror

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"maps"
	mathrand "math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
)

// sim drives a machine and a model of a server in one goroutine from a seed.
// After each step it checks what must always hold; at its end, with the faults
// over, it checks that the agent got everything. The same seed gives the same
// trace, byte for byte.
type sim struct {
	t   *testing.T
	rnd *mathrand.Rand
	now time.Time
	m   *machine
	cas [][]byte // prepared authorities, since making them is not deterministic

	// The server.
	revision uint64
	epoch    byte
	bodies   map[string][]byte
	grants   map[string]*syncv1.Grant
	authorities,
	revoked int // of cas: published so far, and the oldest of them that are gone
	stream []*syncv1.ServerMessage // on their way
	open   bool
	follow bool

	batch []want // being signed
	subs  map[string]*simSub
	trace bytes.Buffer
}

type simSub struct {
	group *group
	seen  string // what was last delivered
	woken bool
}

func newSim(t *testing.T, seed uint64, cas [][]byte) *sim {
	s := &sim{t: t, rnd: mathrand.New(mathrand.NewPCG(seed, 1)), now: time.Unix(1e9, 0).UTC(), cas: cas, revision: 1, authorities: 1,
		m:      newMachine(spiffeid.RequireTrustDomainFromString("example.org"), 6, "sim"),
		bodies: map[string][]byte{}, grants: map[string]*syncv1.Grant{}, subs: map[string]*simSub{}}
	s.publish()
	return s
}

func (s *sim) run(steps int) {
	for range steps {
		s.act(s.rnd.IntN(24))
	}
	// No more faults: everything must come right within a bounded number of steps.
	for range 60 {
		if !s.open {
			s.act(6)
		}
		s.deliver(len(s.stream))
		s.sign(true)
		s.advance(time.Second)
		s.feed(tick{})
	}
	s.sign(true) // a rule may have been matched by the last step only
	s.final()
}

func (s *sim) act(what int) {
	switch what {
	case 0, 1, 2: // create or change a grant, or make a rule of an entry
		id := fmt.Sprintf("g%d", s.rnd.IntN(10))
		g := &syncv1.Grant{Id: id, SpiffeId: fmt.Sprintf("spiffe://example.org/%d", s.rnd.IntN(12)), ParentId: "spiffe://example.org/spire/agent/x",
			CreatedAt: 1 + int64(s.rnd.IntN(3)), Hint: []string{"", "", "h"}[s.rnd.IntN(3)], DisableX509SvidPrefetch: s.rnd.IntN(5) == 0}
		if s.rnd.IntN(3) == 0 {
			g.SpiffeId, g.DisableX509SvidPrefetch, g.Trust = "", false, entry.TrustAgent
			g.IdTemplate = "spiffe://example.org/" + []string{"u/{unix.user}", "u/{unix.user}/{unix.program}", "v/{unix.program}"}[s.rnd.IntN(3)]
			g.IdPrefix = g.IdTemplate[:len("spiffe://example.org/u/")]
		}
		for range 1 + s.rnd.IntN(2) {
			g.Selectors = append(g.Selectors, &syncv1.Selector{Type: "unix", Value: fmt.Sprintf("uid:%d", s.rnd.IntN(4))})
		}
		if s.rnd.IntN(4) == 0 {
			g.ExpiresAt = s.now.Add(time.Duration(s.rnd.IntN(200)) * time.Second).Unix()
		}
		if s.rnd.IntN(3) == 0 {
			g.FederatesWith = []string{fmt.Sprintf("f%d.test", s.rnd.IntN(2))}
		}
		s.revision++
		g.Revision = s.revision
		s.grants[id] = g
		s.change("g/"+id, &syncv1.Body{Body: &syncv1.Body_Grant{Grant: g}})
	case 3: // delete one
		id := fmt.Sprintf("g%d", s.rnd.IntN(10))
		s.revision++
		delete(s.grants, id)
		s.change("g/"+id, nil)
	case 4: // a federated bundle comes, changes or goes
		td := fmt.Sprintf("f%d.test", s.rnd.IntN(2))
		s.revision++
		if s.rnd.IntN(3) == 0 {
			s.change("b/"+td, nil)
		} else {
			s.change("b/"+td, &syncv1.Body{Body: &syncv1.Body_Bundle{Bundle: &syncv1.Bundle{TrustDomain: td, Sequence: s.revision,
				X509Authorities: []*syncv1.X509Authority{{Asn1: s.cas[s.rnd.IntN(len(s.cas))]}}}}})
		}
	case 5: // rotate, or revoke all but the newest authority
		if s.rnd.IntN(3) == 0 {
			s.revoked = s.authorities - 1
		} else if s.authorities < len(s.cas) {
			s.authorities++
		}
		s.revision++
		s.publish()
	case 6: // connect
		if !s.open {
			s.open, s.follow, s.stream = true, false, nil
			s.feed(connected{})
		}
	case 7: // disconnect; what is on its way is lost
		s.close()
	case 8: // restore the store from a backup
		s.epoch++
		s.close()
	case 9, 10, 11, 12:
		s.deliver(1 + s.rnd.IntN(3))
	case 13, 14, 15:
		s.sign(s.rnd.IntN(5) > 0)
	case 16:
		s.advance(time.Duration(s.rnd.IntN(3000)) * time.Millisecond)
		s.feed(tick{})
	case 17:
		s.advance(time.Duration(s.rnd.IntN(90)) * time.Second)
		s.feed(tick{})
	case 18: // the clock is put back or forward (R107)
		if s.rnd.IntN(6) == 0 {
			s.now = s.now.Add(time.Duration(s.rnd.IntN(7200)-3600) * time.Second)
			s.feed(tick{})
		}
	case 19, 20, 21: // someone listens
		key := fmt.Sprintf("s%d", s.rnd.IntN(6))
		if s.subs[key] == nil {
			var sel []entry.Selector
			for i := range 4 {
				if s.rnd.IntN(2) == 0 {
					sel = append(sel, entry.Selector{Type: "unix", Value: fmt.Sprintf("uid:%d", i)})
				}
			}
			facts := entry.Facts{Selectors: sel, Values: map[string]string{"unix.uid": "1"}}
			for name, values := range map[string][]string{"unix.user": {"ann", "bob", ""}, "unix.program": {"web", "a b", ""}} {
				if v := values[s.draw(name)%3]; v != "" {
					facts.Values[name] = v
				}
			}
			s.subs[key] = &simSub{group: s.m.join(facts, s.now), woken: true}
			s.feed(tick{})
		}
	case 22: // someone leaves
		key := fmt.Sprintf("s%d", s.rnd.IntN(6))
		if sub := s.subs[key]; sub != nil {
			s.m.leave(sub.group, s.now)
			delete(s.subs, key)
		}
	case 23: // the server compares
		if s.open && s.follow {
			s.stream = append(s.stream, s.current())
		}
	}
}

// draw returns a number for a name, whatever the order in which names come.
func (s *sim) draw(name string) int { return int(s.now.UnixNano()/1e6)%7 + len(name)*len(s.subs) }

func (s *sim) close() {
	if s.open {
		s.open, s.stream = false, nil
		s.feed(disconnected{})
	}
}

func (s *sim) advance(d time.Duration) { s.now = s.now.Add(d) }

func (s *sim) position(revision uint64) *syncv1.Position {
	return &syncv1.Position{Epoch: bytes.Repeat([]byte{s.epoch}, 16), Revision: revision}
}

func (s *sim) hash() []byte {
	var sum entry.Sum
	for _, b := range s.bodies {
		sum.Add(sha256.Sum256(b))
	}
	h := sum.Bytes()
	return h[:]
}

func (s *sim) publish() {
	b := &syncv1.Bundle{TrustDomain: "example.org", Sequence: s.revision}
	for _, der := range s.cas[s.revoked:s.authorities] {
		b.X509Authorities = append(b.X509Authorities, &syncv1.X509Authority{Asn1: der})
	}
	s.change("b/example.org", &syncv1.Body{Body: &syncv1.Body_Bundle{Bundle: b}})
}

// change sets or removes a body and pushes the change.
func (s *sim) change(key string, b *syncv1.Body) {
	pushed := b
	if b == nil {
		if _, there := s.bodies[key]; !there {
			s.revision-- // nothing to delete
			return
		}
		delete(s.bodies, key)
		if pushed = (&syncv1.Body{Body: &syncv1.Body_GrantRemoved{GrantRemoved: key[2:]}}); key[0] == 'b' {
			pushed = &syncv1.Body{Body: &syncv1.Body_BundleRemoved{BundleRemoved: key[2:]}}
		}
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(pushed)
	if err != nil {
		s.t.Fatal(err)
	}
	if b != nil {
		s.bodies[key] = raw
	}
	if s.open && s.follow {
		s.stream = append(s.stream, &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: &syncv1.Delta{
			Previous: s.position(s.revision - 1), Position: s.position(s.revision), Hash: s.hash(), Bodies: [][]byte{raw}}}})
	}
}

func (s *sim) current() *syncv1.ServerMessage {
	return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Current{Current: &syncv1.Current{Position: s.position(s.revision), Hash: s.hash()}}}
}

// deliver hands the agent up to n messages, and the server its answers at once.
func (s *sim) deliver(n int) {
	for range n {
		if !s.open || len(s.stream) == 0 {
			return
		}
		msg := s.stream[0]
		s.stream = s.stream[1:]
		s.feed(msg)
	}
}

// answer is the server's side of the protocol.
func (s *sim) answer(msg *syncv1.AgentMessage) {
	switch msg := msg.GetMessage().(type) {
	case *syncv1.AgentMessage_Hello:
		if bytes.Equal(msg.Hello.GetHash(), s.hash()) {
			s.follow = true
			s.stream = append(s.stream, s.current())
			return
		}
		keys := slices.Sorted(maps.Keys(s.bodies))
		for i, key := range keys {
			kind := syncv1.Item_KIND_GRANT
			if key[0] == 'b' {
				kind = syncv1.Item_KIND_BUNDLE
			}
			s.stream = append(s.stream, &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Inventory{Inventory: &syncv1.Inventory{
				Position: s.position(s.revision), Hash: s.hash(), More: i < len(keys)-1,
				Items: []*syncv1.Item{{Kind: kind, Id: key[2:], Fingerprint: fingerprint(sha256.Sum256(s.bodies[key]))}}}}})
		}
	case *syncv1.AgentMessage_Want:
		// What has changed since the inventory comes along, as a careful server does
		// not know what the agent still holds.
		d := &syncv1.Delta{Previous: s.position(s.revision), Position: s.position(s.revision), Hash: s.hash()}
		for _, key := range slices.Sorted(maps.Keys(s.bodies)) {
			d.Bodies = append(d.Bodies, s.bodies[key])
		}
		s.follow = true
		s.stream = append(s.stream, &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: d}})
	}
}

// sign answers the batch under way: fails it, or signs it, at times with a
// refusal or with an authority that the agent has not heard of.
func (s *sim) sign(well bool) {
	if s.batch == nil {
		return
	}
	batch := s.batch
	s.batch = nil
	if !well {
		s.feed(signFailed{})
		return
	}
	var items signed
	for _, w := range batch {
		g := s.grants[w.grantID]
		if g == nil || s.rnd.IntN(8) == 0 {
			items = append(items, signedItem{grantID: w.grantID, facts: w.facts, err: fault.New(fault.Denied, "no", "no"), refused: true})
			continue
		}
		ca, err := x509.ParseCertificate(s.cas[s.authorities-1])
		if err != nil {
			s.t.Fatal(err)
		}
		// The server goes by what it has now, which may not be what the agent saw.
		now, err := s.m.newGrant(g)
		if err != nil {
			s.t.Fatal(err)
		}
		id, named, bad := now.entry.Grants(w.facts)
		if bad != nil || len(named) != len(w.facts) {
			items = append(items, signedItem{grantID: w.grantID, facts: w.facts, err: fault.New(fault.Invalid, "facts", "facts"), refused: true})
			continue
		}
		life := time.Duration(6+s.rnd.IntN(300)) * time.Second
		items = append(items, signedItem{grantID: w.grantID, facts: w.facts, cert: &cert{id: id, revision: g.GetRevision(),
			chain: fmt.Appendf(nil, "%s@%d#%d", w.grantID, g.GetRevision(), s.now.UnixMilli()), issuedAt: s.now, expiresAt: s.now.Add(life),
			authority: ca.SubjectKeyId, authName: ca.RawSubject}})
	}
	s.feed(items)
}

// feed steps the machine, records the step, and checks the invariants.
func (s *sim) feed(what any) {
	fx := s.m.step(event{now: s.now, seed: s.rnd.Uint64(), what: what})
	fmt.Fprintf(&s.trace, "%s %T\n", s.now.Format(time.StampMilli), what)
	for _, m := range fx.send {
		raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			s.t.Fatal(err)
		}
		fmt.Fprintf(&s.trace, "  send %x\n", raw)
	}
	for _, w := range fx.sign {
		fmt.Fprintf(&s.trace, "  sign %s %v %s %d\n", w.grantID, w.facts, w.id, w.revision)
		if p := s.m.grants[w.grantID].find(w.facts); w.facts != nil && len(p.groups) == 0 {
			s.t.Fatalf("an SVID is signed for the rule %s that nobody uses", w.grantID)
		}
	}
	for _, g := range fx.wake {
		fmt.Fprintf(&s.trace, "  wake %q\n", g.key)
		for _, sub := range s.subs {
			sub.woken = sub.woken || sub.group == g
		}
	}
	fmt.Fprintf(&s.trace, "  resync %q notes %v next %s\n", fx.resync, fx.notes, s.m.next.Format(time.StampMilli))
	if len(fx.sign) > 0 {
		if s.batch != nil {
			s.t.Fatal("a second batch was begun before the first had ended")
		}
		s.batch = fx.sign
	}
	s.check()
	for _, m := range fx.send {
		s.answer(m)
	}
	if fx.resync != "" {
		s.close()
	}
}

func (s *sim) check() {
	var sum entry.Sum
	for _, g := range s.m.grants {
		sum.Add(g.hash)
	}
	for _, b := range s.m.bundles {
		sum.Add(b.hash)
	}
	if sum != s.m.sum {
		s.t.Fatal("the sum is not the sum of what is held")
	}
	idle, used, held := 0, 0, 0
	for p := range s.m.pairs() {
		if p.cert != nil {
			held++
		}
		if len(p.groups) > 0 {
			used++
		}
	}
	if held > max(s.m.cacheSize, used) {
		s.t.Fatalf("%d SVIDs are held, %d have a subscriber, and the limit is %d", held, used, s.m.cacheSize)
	}
	for p := range s.m.pairs() {
		if p.grant.entry.Rule == nil || len(p.groups) > 0 {
			continue
		}
		if idle++; p.cert == nil && !p.signing && due(p.notYet, s.now, grantCeiling) {
			s.t.Fatalf("the rule %s still holds %v, which nobody uses", p.grant.entry.ID, p.facts)
		}
	}
	if idle > s.m.cacheSize+len(s.batch) {
		s.t.Fatalf("%d pairs of rules are held that nobody uses", idle)
	}
	for _, key := range slices.Sorted(maps.Keys(s.subs)) {
		sub := s.subs[key]
		v := s.m.view(sub.group, s.now)
		var all []entry.Entry
		for _, g := range s.m.grants {
			if g.usable {
				all = append(all, g.entry)
			}
		}
		if want, _ := entry.Match(all, sub.group.facts, s.now); fmt.Sprint(want) != fmt.Sprint(v.Matched) {
			s.t.Fatalf("%s matches %v, by the oracle %v", key, v.Matched, want)
		}
		facts := map[string]map[string]string{}
		for _, matched := range v.Matched {
			facts[matched.GrantID] = matched.Facts
		}
		for _, id := range v.Identities {
			g := s.m.grants[id.GrantID]
			want, _, bad := g.entry.Grants(sub.group.facts.Values)
			switch {
			case !entry.Subset(g.entry.Selectors, sub.group.facts.Selectors): // R46
				s.t.Fatalf("%s was given %s without its selectors", key, id.GrantID)
			case !s.now.Before(id.ExpiresAt): // R35
				s.t.Fatalf("%s was given an expired SVID", key)
			case g.entry.Expired(s.now):
				s.t.Fatalf("%s was given an SVID of a grant that has ended", key)
			case bad != nil || id.ID != want:
				s.t.Fatalf("%s was given %s for %s", key, id.ID, want)
			}
			if found, _ := s.m.issuer(g.find(facts[id.GrantID]).cert); !found { // R58
				s.t.Fatalf("%s was given an SVID whose authority is not in the bundle", key)
			}
		}
		// RG16: whoever's answer has changed is woken. (One who is woken for nothing
		// costs nothing: the same message is not sent twice.)
		now := describe(v)
		if now != sub.seen && !sub.woken {
			s.t.Fatalf("%s was not woken:\n was %s\n now %s", key, sub.seen, now)
		}
		sub.seen, sub.woken = now, false
	}
}

func describe(v View) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v %x", v.Synced, sha256.Sum256(v.Bundle.X509))
	for _, id := range v.Identities {
		fmt.Fprintf(&b, " %s=%s %s %s", id.GrantID, id.ID, id.Hint, id.Chain)
	}
	for _, f := range v.Federated {
		fmt.Fprintf(&b, " +%s %x", f.TrustDomain.Name(), sha256.Sum256(f.X509))
	}
	return b.String()
}

// final compares the agent with the server: same state, and for each listener
// exactly what the pure match over the server's grants gives, all signed.
func (s *sim) final() {
	if sum := s.m.sum.Bytes(); !bytes.Equal(sum[:], s.hash()) {
		s.t.Fatal("at the end the agent does not hold what the server has")
	}
	var grants []entry.Entry
	for _, id := range slices.Sorted(maps.Keys(s.grants)) {
		g, err := s.m.newGrant(s.grants[id])
		if err != nil {
			s.t.Fatal(err)
		}
		grants = append(grants, g.entry)
	}
	for _, key := range slices.Sorted(maps.Keys(s.subs)) {
		sub := s.subs[key]
		want, _ := entry.Match(grants, sub.group.facts, s.now)
		got := s.m.view(sub.group, s.now)
		refused := 0
		for _, w := range want {
			if p := s.m.grants[w.GrantID].find(w.Facts); p.cert == nil && p.refused {
				refused++ // the model refuses at random; it is being tried again
			}
		}
		if fmt.Sprint(got.Matched) != fmt.Sprint(want) || len(got.Identities)+refused != len(want) {
			s.t.Fatalf("%s at the end: %s, want %v", key, describe(got), want)
		}
	}
}

func authoritiesForSim(t *testing.T) [][]byte {
	t.Helper()
	var out [][]byte
	for range 8 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := svid.SelfSignedCA(spiffeid.RequireTrustDomainFromString("example.org"), key, time.Unix(1e9-86400, 0), time.Unix(2e9, 0))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, der)
	}
	return out
}

func TestSimulation(t *testing.T) {
	cas := authoritiesForSim(t)
	seeds := uint64(100)
	if s := os.Getenv("PLASTRON_SIM_SEEDS"); s != "" { // the soak asks for more
		seeds, _ = strconv.ParseUint(s, 10, 64)
	}
	for seed := range seeds {
		a, b := newSim(t, seed, cas), newSim(t, seed, cas)
		func() {
			defer func() {
				if t.Failed() {
					t.Logf("seed %d", seed)
				}
			}()
			a.run(400)
		}()
		if seed < 30 {
			b.run(400)
			if !bytes.Equal(a.trace.Bytes(), b.trace.Bytes()) {
				t.Fatalf("seed %d: two runs, two traces", seed)
			}
		}
	}
}
