package authority

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/svid"
)

func start() time.Time { return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC) }

// slotAt is a slot made at start for a life of 24 h whose key is in b and held.
func slotAt(name string, state registry.SlotState, made time.Time) registry.Slot {
	return registry.Slot{
		Name: name, State: state, AuthorityID: "id-" + name, KeyID: "x509-CA-" + name,
		NotBefore: made.Add(-svid.Backdate), NotAfter: made.Add(24 * time.Hour), PublishedAt: made, ReadyAt: made, LastExpiry: made.Add(24 * time.Hour),
		Certificate: []byte("certificate " + name), PublicKey: []byte("key " + name),
	}
}

// TestRules is the machine as a table: what applies to a state, and what it becomes.
func TestRules(t *testing.T) {
	k := x509Kind()
	const hour = time.Hour
	active, prepared := registry.SlotActive, registry.SlotPrepared
	intended := registry.Slot{Name: "B", State: registry.SlotIntended, KeyID: "x509-CA-B"}
	made := slotAt("B", registry.SlotIntended, start())
	for _, c := range []struct {
		name  string
		slots []registry.Slot
		at    time.Duration // since start
		edit  func(e *event)
		rule  string
		// refused is the reason with which what an operator asks for is refused.
		refused string
		want    string // the slots after it: name and state
		inB     string // the certificates in the bundle after it
	}{
		{name: "nothing yet", rule: "intend", want: "A1"},
		{name: "active, half of its life left", slots: slots(active), at: 12*hour - time.Second, rule: "", want: "A3", inB: "A"},
		{name: "active, less than half", slots: slots(active), at: 12 * hour, rule: "intend", want: "A3 B1", inB: "A"},
		{name: "operator wants another", slots: slots(active), edit: func(e *event) { e.Ask = &ask{do: askPrepare} }, rule: "intend", want: "A3 B1", inB: "A"},
		{name: "operator wants another, none active", edit: func(e *event) { e.Ask = &ask{do: askPrepare} }, refused: "authority_unavailable"},
		{name: "intended", slots: append(slots(active), intended), rule: "make", want: "A3 B1", inB: "A"},
		{name: "made", slots: append(slots(active), intended), edit: func(e *event) { e.Made = &made }, rule: "publish", want: "A3 B2", inB: "A B"},
		{name: "prepared, too early", slots: slots(active, prepared), at: 20*hour - time.Second, rule: "", want: "A3 B2", inB: "A B"},
		{name: "prepared, a sixth left", slots: slots(active, prepared), at: 20 * hour, rule: "drop", want: "A3", inB: "A"}, // as old as the active one (RG21)
		{name: "prepared later, a sixth left", slots: slotsMade(0, 12*hour), at: 20 * hour, rule: "activate", want: "A4 B3", inB: "A B"},
		{name: "R64 published just now", slots: slotsMade(0, 20*hour), at: 20*hour + 14*time.Minute, rule: "", want: "A3 B2", inB: "A B"},
		{name: "R64 published three hints ago", slots: slotsMade(0, 20*hour), at: 20*hour + 15*time.Minute, rule: "activate", want: "A4 B3", inB: "A B"},
		{name: "R64 nobody is missing", slots: unready(slotsMade(0, 12*hour)), at: 13 * hour, rule: "ready", want: "A3 B2", inB: "A B"},
		{name: "R64 an agent is missing", slots: unready(slotsMade(0, 12*hour)), at: 22*hour - time.Second, edit: missing(Missing{Name: "a"}), rule: "", want: "A3 B2"},
		{name: "R64 an agent is missing, a twelfth left", slots: unready(slotsMade(0, 12*hour)), at: 22 * hour, edit: missing(Missing{Name: "a"}), rule: "ready", want: "A3 B2"},
		{name: "R64 an agent is missing until its certificate ends", slots: unready(slotsMade(0, 12*hour)), at: 14*hour - time.Second, edit: missing(Missing{Name: "a", Until: start().Add(14 * hour)}), rule: "", want: "A3 B2"},
		{name: "R64 its certificate has ended", slots: unready(slotsMade(0, 12*hour)), at: 14 * hour, edit: missing(Missing{Name: "a", Until: start().Add(14 * hour)}), rule: "ready", want: "A3 B2"},
		{name: "R64 an agent is missing for longer than maxWait", slots: unready(slotsMade(0, 12*hour)), at: 15 * hour, edit: both(missing(Missing{Name: "a"}), func(e *event) { e.MaxWait = 3 * hour }), rule: "ready", want: "A3 B2"},
		{name: "R64 who asks has not had time", slots: unready(slotsMade(0, 12*hour)), at: 12*hour + 14*time.Minute, edit: missing(Missing{Name: "a", ByTime: true}), rule: "", want: "A3 B2"},
		{name: "R64 who asks has had time", slots: unready(slotsMade(0, 12*hour)), at: 12*hour + 15*time.Minute, edit: missing(Missing{Name: "a", ByTime: true}), rule: "ready", want: "A3 B2"},
		{name: "R64 servers below have not had time", slots: unready(slotsMade(0, 12*hour)), at: 12*hour + 14*time.Second, edit: missing(Missing{Name: "a", ByTime: true, Below: true}), rule: "", want: "A3 B2"},
		{name: "R64 servers below have had time", slots: unready(slotsMade(0, 12*hour)), at: 12*hour + 15*time.Second, edit: missing(Missing{Name: "a", ByTime: true, Below: true}), rule: "ready", want: "A3 B2"},
		{name: "R64 published late, an agent is missing", slots: unready(slotsMade(0, 23*hour)), at: 23*hour + 59*time.Second, edit: missing(Missing{Name: "a"}), rule: "", want: "A3 B2"},
		{name: "R64 published late, waited for a minute", slots: unready(slotsMade(0, 23*hour)), at: 23*hour + time.Minute, edit: missing(Missing{Name: "a"}), rule: "ready", want: "A3 B2"},
		{name: "due, but not ready", slots: unready(slotsMade(0, 12*hour)), at: 21 * hour, edit: missing(Missing{Name: "a"}), rule: "", want: "A3 B2"},
		{name: "ready, but not due", slots: slotsMade(0, 12*hour), at: 13 * hour, rule: "", want: "A3 B2", inB: "A B"},
		{name: "operator wants the prepared one", slots: slotsMade(0, hour), at: 2 * hour, edit: asks(askActivate, "id-B", false), rule: "activate", want: "A4 B3"},
		{name: "operator wants the prepared one, an agent is missing", slots: unready(slotsMade(0, hour)), at: 2 * hour, edit: both(missing(Missing{Name: "a"}), asks(askActivate, "id-B", false)), refused: "authority_not_acknowledged"},
		{name: "operator forces the prepared one, an agent is missing", slots: unready(slotsMade(0, hour)), at: 2 * hour, edit: both(missing(Missing{Name: "a"}), asks(askActivate, "id-B", true)), rule: "activate", want: "A4 B3"},
		{name: "operator wants the active one", slots: slots(active), at: hour, edit: asks(askActivate, "id-A", false), rule: "", want: "A3"},
		{name: "operator wants an old one", slots: slotsOld(20 * hour), at: 21 * hour, edit: asks(askActivate, "id-A", true), refused: "authority_not_prepared"},
		{name: "operator wants an unknown one", slots: slots(active), at: hour, edit: asks(askActivate, "id-X", true), refused: "authority_unknown"},
		{name: "operator wants none", slots: slots(active), at: hour, edit: asks(askTaint, "", false), refused: "authority_id_missing"},
		{name: "operator wants another prepared one", slots: slotsMade(0, hour), at: 2 * hour, edit: asks(askPrepare, "id-B", false), rule: "drop", want: "A3"},
		{name: "operator taints the active one", slots: slots(active), at: hour, edit: asks(askTaint, "id-A", false), refused: "authority_in_use"},
		{name: "operator taints the prepared one", slots: slotsMade(0, hour), at: 2 * hour, edit: asks(askTaint, "id-B", false), refused: "authority_in_use"},
		{name: "R69 operator taints the old one", slots: slotsOld(20 * hour), at: 21 * hour, edit: asks(askTaint, "id-A", false), rule: "taint", want: "A4 B3"},
		{name: "operator taints the tainted one", slots: slotsOld(20 * hour), at: 21 * hour, edit: both(taintA, asks(askTaint, "id-A", false)), rule: "", want: "A4 B3"},
		{name: "operator taints one that is not in the bundle", slots: slotsOld(20 * hour), at: 21 * hour, edit: both(func(e *event) { e.Bundle.X509 = e.Bundle.X509[1:] }, asks(askTaint, "id-A", false)), refused: "authority_not_published"},
		{name: "operator revokes the active one", slots: slots(active), at: hour, edit: asks(askRevoke, "id-A", false), refused: "authority_in_use"},
		{name: "operator revokes the old one", slots: slotsOld(20 * hour), at: 21 * hour, edit: asks(askRevoke, "id-A", false), refused: "authority_not_tainted"},
		{name: "R69 operator revokes the tainted one", slots: slotsOld(20 * hour), at: 21 * hour, edit: both(taintA, asks(askRevoke, "id-A", false)), rule: "revoke", want: "B3"},
		{name: "R69 the store forgot a revocation", slots: slotsOld(20 * hour), at: 21 * hour, edit: forgotten("A", 40*hour), rule: "purge", want: "A4 B3"},
		{name: "the store forgot a revocation of what has ended", slots: slotsOld(20 * hour), at: 21 * hour, edit: forgotten("A", 21*hour), rule: "", want: "A4 B3"},
		{name: "prepared, none active", slots: slotsMade(-1, hour), at: 2 * hour, rule: "activate", want: "B3", inB: "B"},
		{name: "first start, who is away cannot be told by anyone", slots: unready(slotsMade(-1, hour)), at: hour, edit: missing(Missing{Name: "a"}), rule: "ready", want: "B2"},
		{name: "R64 none active, an agent that is attached is missing", slots: unready(slotsMade(-1, hour)), at: hour + 59*time.Second, edit: missing(Missing{Name: "a", Server: "s"}), rule: "", want: "B2"},
		{name: "R64 none active, waited for a minute", slots: unready(slotsMade(-1, hour)), at: hour + time.Minute, edit: missing(Missing{Name: "a", Server: "s"}), rule: "ready", want: "B2"},
		{name: "R64 a server joins, an agent is missing", slots: unready(slotsMade(-1, hour)), at: hour + 59*time.Second, edit: both(missing(Missing{Name: "a"}), func(e *event) { e.Peers.Others = true }), rule: "", want: "B2"},
		{name: "R64 a server joins, everyone has it", slots: unready(slotsMade(-1, hour)), at: hour, edit: func(e *event) { e.Peers.Others = true }, rule: "ready", want: "B2"},
		{name: "active has ended", slots: slots(active), at: 24 * hour, rule: "retire", want: "A4", inB: "A"},
		{name: "active has not begun: the clock went back", slots: slots(active), at: -hour, rule: "retire", want: "A4", inB: "A"},
		{name: "R63 active is not in the bundle", slots: slots(active), edit: func(e *event) { e.Bundle = &bundle.Bundle{} }, rule: "retire", want: "A4"},
		{name: "active is tainted", slots: slots(active), edit: func(e *event) { e.Bundle.X509[0].Tainted = true }, rule: "retire", want: "A4", inB: "A"},
		{name: "key of active is lost", slots: slots(active), edit: func(e *event) { delete(e.Held, "x509-CA-A") }, rule: "retire", want: "A4", inB: "A"},
		{name: "key of active is another", slots: slots(active), edit: func(e *event) { e.Held["x509-CA-A"] = []byte("x") }, rule: "retire", want: "A4", inB: "A"},
		{name: "key of prepared is lost", slots: slotsMade(0, hour), at: 2 * hour, edit: func(e *event) { delete(e.Held, "x509-CA-B") }, rule: "drop", want: "A3", inB: "A"},
		{name: "prepared is not in the bundle", slots: slotsMade(0, hour), at: 2 * hour, edit: func(e *event) { e.Bundle.X509 = e.Bundle.X509[:1] }, rule: "drop", want: "A3", inB: "A"},
		{name: "old, its last document lives", slots: slotsOld(20 * hour), at: 24*hour + pruneAfter - time.Second, rule: "", want: "A4 B3", inB: "A B"},
		{name: "old, its last document has ended", slots: slotsOld(20 * hour), at: 24*hour + pruneAfter, rule: "prune", want: "B3", inB: "B"},
		{name: "R70 old, its last document has ended by a clock that is off", slots: slotsOld(20 * hour), at: 24*hour + pruneAfter, edit: func(e *event) { e.Keep = true }, rule: "", want: "A4 B3"},
		{name: "old has ended, none active", slots: slotsOld(-1), at: 25 * hour, edit: full, rule: "error"},
		{name: "the bundle is full, none active", edit: full, rule: "error"},
		{name: "the bundle is full", slots: slots(active), at: 13 * hour, edit: full, rule: "", want: "A3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := event{Now: start().Add(c.at), Lifetime: 24 * time.Hour, MaxWait: DefaultMaxWait, Bundle: &bundle.Bundle{}, Held: map[string][]byte{}}
			for _, s := range c.slots {
				if s.State != registry.SlotIntended {
					e.Bundle = k.publish(e.Bundle, s)
					e.Held[s.KeyID] = s.PublicKey
				}
			}
			e.Bundle.Sequence = 7
			if c.edit != nil {
				c.edit(&e)
			}
			before := fmt.Sprint(c.slots, e.Bundle)
			s, err := next(k, c.slots, e)
			if after := fmt.Sprint(c.slots, e.Bundle); after != before {
				t.Errorf("next changed what it was given")
			}
			if c.rule == "error" {
				if fault.ReasonOf(err) != "authorities_exhausted" {
					t.Errorf("next() = %+v, %v", s, err)
				}
				return
			}
			if c.refused != "" {
				if fault.ReasonOf(err) != c.refused {
					t.Errorf("next() = %+v, %v", s, err)
				}
				return
			}
			if err != nil || s.Rule != c.rule {
				t.Fatalf("rule %q, %v, want %q", s.Rule, err, c.rule)
			}
			if c.rule == "" {
				if !s.At.After(e.Now) || s.Next == "" {
					t.Errorf("nothing to do, and %q at %v, now is %v", s.Next, s.At, e.Now)
				}
				s.Slots, s.Bundle = c.slots, e.Bundle
			}
			if got := show(s.Slots); got != c.want {
				t.Errorf("slots %q, want %q", got, c.want)
			}
			active, _ := find(s.Slots, func(x registry.Slot) bool { return x.State == registry.SlotActive })
			if s.Signs.AuthorityID != active.AuthorityID {
				t.Errorf("%q signs, and %q is active", s.Signs.AuthorityID, active.AuthorityID)
			}
			if got := certificates(s.Bundle); got != c.inB && c.edit == nil {
				t.Errorf("bundle %q, want %q", got, c.inB)
			}
			if (s.Make != nil) != (c.rule == "make") {
				t.Errorf("Make = %v", s.Make)
			}
		})
	}
}

func asks(do, id string, force bool) func(*event) {
	return func(e *event) { e.Ask = &ask{do, id, force} }
}

func missing(who ...Missing) func(*event) { return func(e *event) { e.Peers.Missing = who } }

func both(a, b func(*event)) func(*event) { return func(e *event) { a(e); b(e) } }

func taintA(e *event) { e.Bundle.X509[0].Tainted = true }

// forgotten has the server remember the key of a slot as revoked.
func forgotten(name string, until time.Duration) func(*event) {
	return func(e *event) {
		e.Revoked = []bundle.Revocation{{KeyHash: sha256.Sum256([]byte("key " + name)), Until: start().Add(until)}}
	}
}

// unready makes the prepared key one that waits to be acknowledged.
func unready(slots []registry.Slot) []registry.Slot {
	for i := range slots {
		slots[i].ReadyAt = time.Time{}
	}
	return slots
}

// slots are A, made at start, and B, made a second later, in these states.
func slots(states ...registry.SlotState) []registry.Slot {
	var out []registry.Slot
	for i, state := range states {
		out = append(out, slotAt([]string{"A", "B"}[i], state, start().Add(-time.Duration(i))))
	}
	return out
}

// slotsMade are an active A and a prepared B, made at these times after start.
func slotsMade(a, b time.Duration) []registry.Slot {
	out := []registry.Slot{slotAt("B", registry.SlotPrepared, start().Add(b))}
	if a >= 0 {
		out = append([]registry.Slot{slotAt("A", registry.SlotActive, start().Add(a))}, out...)
	}
	return out
}

// slotsOld are an old A and an active B, made at that time after start.
func slotsOld(b time.Duration) []registry.Slot {
	out := []registry.Slot{slotAt("A", registry.SlotOld, start())}
	if b >= 0 {
		out = append(out, slotAt("B", registry.SlotActive, start().Add(b)))
	}
	return out
}

func full(e *event) {
	for i := range MaxLive {
		e.Bundle = e.Bundle.WithX509(bundle.X509Authority{ASN1: []byte{byte(i)}})
	}
}

// R97: what servers below publish, or one above, does not keep a server from making its
// own JWT keys; the keys of servers do, at some point.
func TestPublishedKeys(t *testing.T) {
	k := jwtKind()
	held := slots(registry.SlotActive)
	e := event{Now: start().Add(12 * time.Hour), Lifetime: 24 * time.Hour, Bundle: k.publish(&bundle.Bundle{}, held[0]), Held: map[string][]byte{held[0].KeyID: held[0].PublicKey}}
	for i := range MaxLive {
		id := fmt.Sprint(i)
		e.Bundle = e.Bundle.WithJWT(bundle.JWTAuthority{KeyID: id, PublicKey: []byte(id)})
	}
	if s, err := next(k, held, e); err != nil || s.Rule != "intend" {
		t.Errorf("beside keys of nobody here: %q, %v", s.Rule, err)
	}
	for i := range MaxLive {
		e.Others = append(e.Others, registry.Slot{AuthorityID: fmt.Sprint(i)})
	}
	if s, err := next(k, held, e); err != nil || s.Rule != "" {
		t.Errorf("beside keys of other servers: %q, %v", s.Rule, err)
	}
}

// However many roots an authority above has, keys below them are replaced in time; of
// keys there are so many at most.
func TestManyRootsAbove(t *testing.T) {
	k := x509Kind()
	held := slots(registry.SlotActive)
	held[0].Upstream, held[0].Root = true, []byte("root")
	e := event{Now: start().Add(12 * time.Hour), Lifetime: 24 * time.Hour, Above: &Above{}, Bundle: k.publish(&bundle.Bundle{}, held[0]),
		Held: map[string][]byte{held[0].KeyID: held[0].PublicKey}}
	full(&e)
	if s, err := next(k, held, e); err != nil || s.Rule != "intend" {
		t.Errorf("below many roots: %q, %v", s.Rule, err)
	}
	for range MaxLive {
		old := slotAt("B", registry.SlotOld, start())
		old.Upstream, old.Root = true, held[0].Root
		held = append(held, old)
	}
	if s, err := next(k, held, e); err != nil || s.Rule != "" {
		t.Errorf("with many old keys: %q, %v", s.Rule, err)
	}
}

func show(slots []registry.Slot) string {
	var out []string
	for _, s := range slots {
		out = append(out, fmt.Sprintf("%s%d", s.Name, s.State))
	}
	return strings.Join(out, " ")
}

// named are the slots with their authorities.
func named(slots []registry.Slot) string {
	var out []string
	for _, s := range slots {
		out = append(out, fmt.Sprintf("%s%d(%s)", s.Name, s.State, strings.TrimPrefix(s.AuthorityID, "authority-")))
	}
	return strings.Join(out, " ")
}

func certificates(b *bundle.Bundle) string {
	var out []string
	for _, a := range b.X509 {
		out = append(out, strings.TrimPrefix(string(a.ASN1), "certificate "))
	}
	return strings.Join(out, " ")
}

// The thresholds are those of spire-interop §8.2.
func TestThresholds(t *testing.T) {
	for _, c := range []struct{ life, prepare, activate time.Duration }{
		{24 * time.Hour, 12 * time.Hour, 4 * time.Hour},
		{365 * 24 * time.Hour, 30 * 24 * time.Hour, 7 * 24 * time.Hour},
		{30 * time.Second, 15 * time.Second, 5 * time.Second},
		{6 * time.Second, 3 * time.Second, time.Second},
	} {
		s := registry.Slot{NotBefore: start().Add(-svid.Backdate), NotAfter: start().Add(c.life)}
		if p, a := s.NotAfter.Sub(prepareAt(s)), s.NotAfter.Sub(activateAt(s)); p != c.prepare || a != c.activate {
			t.Errorf("life %v: prepared with %v left, activated with %v left; want %v and %v", c.life, p, a, c.prepare, c.activate)
		}
	}
}

// sim is one server, its keeper and the store, in one goroutine from a seed. A
// turn does what run.go does, and may be cut off between any two of its acts.
type sim struct {
	t      *testing.T
	random *rand.Rand
	trace  bytes.Buffer
	kind   kind

	// The store.
	slots  []registry.Slot
	bundle *bundle.Bundle
	// The keeper, which forgets at a crash or not.
	held    map[string][]byte
	durable bool
	// The process.
	made   *registry.Slot
	signer *registry.Slot
	ask    *ask

	now       time.Time
	lifetime  time.Duration
	ttl       time.Duration
	keys      int             // made so far
	issued    []document      // not ended yet
	withdrawn map[string]bool // authorities that the outside took away, or an operator revoked
	peers     Peers
	begun     map[string]bool // authorities that became active
}

type document struct {
	authority registry.Slot
	ends      time.Time
}

func (s *sim) logf(format string, args ...any) {
	fmt.Fprintf(&s.trace, "%d "+format+"\n", append([]any{s.now.Unix()}, args...)...)
}

func (s *sim) failf(format string, args ...any) {
	s.t.Helper()
	tail := s.trace.String()
	s.t.Fatalf(format+"\n…%s", append(args, tail[max(0, len(tail)-3000):])...)
}

func (s *sim) chance(percent int) bool { return s.random.IntN(100) < percent }

// crash loses what the process had in memory.
func (s *sim) crash(where string) {
	s.logf("crash %s", where)
	s.made, s.signer, s.ask = nil, nil, nil
	if !s.durable {
		s.held = map[string][]byte{}
	}
}

// turn settles as run.go does; it reports whether it got to the end.
func (s *sim) turn(faults bool) bool {
	for range maxSteps {
		s.made = still(s.made, s.slots)
		e := event{Now: s.now, Lifetime: s.lifetime, MaxWait: DefaultMaxWait, Bundle: s.bundle, Held: s.held, Made: s.made, Ask: s.ask, Peers: s.peers}
		st, err := next(s.kind, s.slots, e)
		if err != nil && s.ask != nil {
			s.logf("refused %s", fault.ReasonOf(err))
			s.ask = nil
			continue
		}
		if err != nil {
			s.logf("error %s", fault.ReasonOf(err))
			return false
		}
		// 1. The transaction.
		if st.Rule != "" && st.Make == nil {
			if faults && s.chance(5) {
				s.crash("before the commit of " + st.Rule)
				return false
			}
			if faults && s.chance(5) {
				s.logf("commit of %s refused", st.Rule)
				return false
			}
			s.commit(st)
			if s.ask != nil && s.ask.rule() == st.Rule {
				s.ask = nil
			}
			if faults && s.chance(5) {
				s.crash("after the commit of " + st.Rule)
				return false
			}
			if faults && s.chance(5) {
				s.logf("commit of %s unknown", st.Rule)
				return false
			}
		}
		// 2. The signer.
		s.signer = nil
		if active := st.Signs; active.AuthorityID != "" {
			s.signer = &active
			if !s.kind.published(s.bundle, active) || !bytes.Equal(s.held[active.KeyID], active.PublicKey) {
				s.failf("R63: %s is to sign and is not in the bundle, or its key is not there", active.AuthorityID)
			}
		}
		s.check()
		// 3. The key.
		switch {
		case st.Make != nil:
			s.generate(*st.Make)
			if faults && s.chance(10) {
				s.crash("after making a key")
				return false
			}
		case st.Rule == "":
			if !st.At.After(s.now) {
				s.failf("at rest, but %s is due at %v, now is %v", st.Next, st.At, s.now)
			}
			return true
		}
	}
	s.failf("no rest after %d steps", maxSteps)
	return false
}

func (s *sim) generate(slot registry.Slot) {
	if i := slices.IndexFunc(s.slots, func(x registry.Slot) bool { return x.State == registry.SlotActive }); i >= 0 && s.slots[i].KeyID == slot.KeyID {
		s.failf("RG27: the key in use is replaced: %s", slot.KeyID)
	}
	s.keys++
	slot.PublicKey = fmt.Appendf(nil, "key %d", s.keys)
	slot.Certificate = fmt.Appendf(nil, "certificate %d", s.keys)
	slot.AuthorityID = fmt.Sprintf("authority-%d", s.keys)
	s.held[slot.KeyID] = slot.PublicKey
	s.made = &slot
	s.logf("make %s %s", slot.KeyID, slot.AuthorityID)
}

func (s *sim) commit(st step) {
	if grown := st.Bundle.Sequence - s.bundle.Sequence; grown > 1 || (grown == 1) == st.Bundle.Equal(s.bundle) {
		s.failf("R75: the sequence grew by %d in %s", grown, st.Rule)
	}
	s.logf("%s: %s, sequence %d", st.Rule, named(st.Slots), st.Bundle.Sequence)
	if st.Rule == "activate" {
		for _, x := range st.Slots {
			if x.State != registry.SlotActive {
				continue
			}
			if s.begun[x.AuthorityID] {
				s.failf("RG19: %s becomes active a second time", x.AuthorityID)
			}
			s.begun[x.AuthorityID] = true
			if left := x.NotAfter.Sub(s.now); left <= min(s.lifetime/6, activateMost) {
				s.failf("RG21: %s becomes active with %v left", x.AuthorityID, left)
			}
		}
	}
	if st.Rule == "revoke" {
		s.withdrawn[st.About.AuthorityID] = true
	}
	s.slots, s.bundle = st.Slots, st.Bundle
}

// wish is something that an operator may want, possible or not.
func (s *sim) wish() *ask {
	do := []string{askPrepare, askActivate, askTaint, askRevoke}[s.random.IntN(4)]
	id := s.slots[s.random.IntN(len(s.slots))].AuthorityID
	if i := slices.IndexFunc(s.slots, func(x registry.Slot) bool { return x.State == registry.SlotPrepared }); do == askPrepare {
		id = ""
		if i >= 0 {
			id = s.slots[i].AuthorityID
		}
	}
	return &ask{do, id, s.chance(50)}
}

// check is the model: what must hold after every step.
func (s *sim) check() {
	count := map[registry.SlotState]int{}
	for _, x := range s.slots {
		count[x.State]++
	}
	if count[registry.SlotActive] > 1 || count[registry.SlotPrepared] > 1 || count[registry.SlotIntended] > 1 {
		s.failf("slots %s", show(s.slots))
	}
	if s.signer != nil && !s.withdrawn[s.signer.AuthorityID] && !s.kind.published(s.bundle, *s.signer) {
		s.failf("R63: %s signs and is not in the bundle", s.signer.AuthorityID)
	}
	for _, d := range s.issued {
		if found, _ := s.kind.find(s.bundle, d.authority); s.now.Before(d.ends) && !s.withdrawn[d.authority.AuthorityID] && !found {
			s.failf("R65: a document of %s is valid until %v and cannot be verified", d.authority.AuthorityID, d.ends)
		}
	}
}

// sign issues as callers of X509 and JWT do.
func (s *sim) sign() {
	if s.signer == nil || !s.now.Before(s.signer.NotAfter) {
		return
	}
	ends := s.now.Add(s.ttl)
	if ends.After(s.signer.NotAfter) {
		ends = s.signer.NotAfter
	}
	s.issued = append(s.issued, document{*s.signer, ends})
	s.check()
}

func simulate(t *testing.T, seed uint64) string {
	random := rand.New(rand.NewPCG(seed, 1))
	lives := []time.Duration{6 * time.Second, 30 * time.Second, time.Minute, time.Hour, 24 * time.Hour, 365 * 24 * time.Hour}
	s := &sim{
		t: t, random: random, bundle: &bundle.Bundle{}, held: map[string][]byte{}, durable: random.IntN(3) > 0, now: start(),
		kind: []kind{x509Kind(), jwtKind()}[random.IntN(2)], withdrawn: map[string]bool{}, begun: map[string]bool{},
	}
	s.lifetime = lives[random.IntN(len(lives))]
	s.ttl = s.lifetime / time.Duration(1+random.IntN(12))
	s.logf("seed %d: %s, life %v, durable %v", seed, s.kind.name, s.lifetime, s.durable)
	latest := s.now
	for range 150 {
		switch n := random.IntN(100); {
		case n < 60: // time passes, in steps that may skip thresholds
			s.now = s.now.Add(time.Duration(random.Int64N(int64(s.lifetime/3))) + time.Second).Truncate(time.Second)
		case n < 65: // the clock is set back, less than what pruning allows for
			s.now = later(s.now.Add(-time.Duration(random.Int64N(int64(pruneAfter/2)))), latest.Add(-pruneAfter/2)).Truncate(time.Second)
		case n < 68: // the machine was off
			s.now = s.now.Add(time.Duration(random.Int64N(int64(3 * s.lifetime)))).Truncate(time.Second)
		case n < 76:
			s.crash("in between")
		case n < 82:
			if s.signer != nil {
				s.ask = s.wish()
				s.logf("operator wants %+v", *s.ask)
			}
		case n < 85: // someone withdraws what signs
			if s.signer != nil {
				s.withdrawn[s.signer.AuthorityID] = true
				s.bundle = s.kind.withdraw(s.bundle, *s.signer)
				s.logf("%s withdrawn", s.signer.AuthorityID)
				s.signer = nil // until the next turn callers are told to wait
			}
		}
		latest = later(latest, s.now)
		if random.IntN(4) == 0 { // who is missing is another question
			s.peers = Peers{Others: s.chance(50), Missing: []Missing{{Name: "a"}, {Name: "b", Server: "s", ByTime: s.chance(50)}}[:random.IntN(3)]}
		}
		s.issued = slices.DeleteFunc(s.issued, func(d document) bool { return s.now.After(d.ends.Add(pruneAfter)) })
		s.turn(true)
		for range random.IntN(3) {
			s.sign()
		}
	}
	// Without further faults, and with everyone there, it comes to rest with a signer.
	s.peers = Peers{}
	if !s.turn(false) && s.kind.count(s.bundle, s.slots) < MaxLive {
		s.failf("no rest without faults")
	}
	if s.signer == nil && s.kind.count(s.bundle, s.slots) < MaxLive {
		s.failf("nothing signs after a turn without faults")
	}
	return s.trace.String()
}

// R63, R65, R66, R75, RG19, RG21, RG27: crashes, refusals and clock steps at
// every act, from 300 seeds; a seed gives the same trace again.
func TestSimulation(t *testing.T) {
	rules := map[string]int{}
	for seed := range uint64(300) {
		first := simulate(t, seed)
		if again := simulate(t, seed); again != first {
			t.Fatalf("seed %d: two traces", seed)
		}
		for _, line := range strings.Split(first, "\n") {
			if fields := strings.Fields(line); len(fields) > 1 {
				rules[strings.TrimSuffix(fields[1], ":")]++
			}
		}
	}
	for _, rule := range []string{"taint", "revoke", "retire", "drop", "ready", "activate", "publish", "make", "intend", "prune", "crash", "operator"} {
		if rules[rule] == 0 {
			t.Errorf("%s never happened: %v", rule, rules)
		}
	}
}

// F26: with a clock that was never set nothing is made, retired or signed, and
// the answer says why.
func TestClockNotSet(t *testing.T) {
	for _, now := range []time.Time{{}, time.Unix(0, 0), time.Unix(3600, 0), time.Date(1999, 12, 31, 23, 59, 59, 0, time.UTC)} {
		for _, slots := range [][]registry.Slot{nil, slots(registry.SlotActive), slots(registry.SlotIntended), slots(registry.SlotOld, registry.SlotPrepared)} {
			e := event{Now: now, Lifetime: time.Hour, Bundle: &bundle.Bundle{TrustDomain: domain()}}
			s, err := next(x509Kind(), slots, e)
			if fault.ReasonOf(err) != "clock_not_set" || s.Rule != "" || !strings.Contains(err.Error(), now.UTC().Format(time.DateOnly)) {
				t.Errorf("next() at %v = %+v, %v", now, s, err)
			}
		}
	}
	w := newWorld(t, memory(t), time.Hour)
	a, stop := w.start("s1")
	defer stop()
	if _, err := a.X509(time.Unix(60, 0)); fault.ReasonOf(err) != "clock_not_set" {
		t.Errorf("X509() = %v", err)
	}
	if _, err := a.JWT(time.Unix(60, 0)); fault.ReasonOf(err) != "clock_not_set" {
		t.Errorf("JWT() = %v", err)
	}
}
