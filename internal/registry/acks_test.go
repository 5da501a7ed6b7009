package registry

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// putRow stores a message under a key.
func putRow(t *testing.T, s *state, k kind, name string, m proto.Message) {
	t.Helper()
	s.position.Revision++
	s.set(keyOf(k, name), s.position.Revision, sealed(t, m), nil)
}

func putRoster(t *testing.T, s *state, server string, agents ...uint64) {
	t.Helper()
	m := &statev1.Roster{}
	for _, h := range slices.Sorted(slices.Values(agents)) {
		m.Agents = append(m.Agents, bigEndian(h)...)
	}
	putRow(t, s, kindRoster, server, m)
}

func bigEndian(h uint64) []byte { return binary.BigEndian.AppendUint64(nil, h) }

// Unacknowledged against an oracle that asks of each node and server one by one.
func TestUnacknowledged(t *testing.T) {
	now := time.Unix(1_700_000_000, 0).UTC()
	epochs := []store.Epoch{{1}, {2}}
	servers := []string{"s1", "s2", "s3"}
	seen := map[string]int{} // what the random cases reached
	for seed := range 500 {
		r := rand.New(rand.NewPCG(uint64(seed), 5))
		s := newState(td)
		s.position = store.Position{Epoch: epochs[0], Revision: 100}
		var all []Node
		for i := range 8 {
			n := agent(fmt.Sprint(i))
			n.Banned, n.Follows = r.IntN(5) == 0, r.IntN(3) > 0
			n.Current.ExpiresAt = now.Add(time.Duration(r.IntN(3)-1) * time.Second)
			if r.IntN(3) == 0 {
				n.Next = Credential{Serial: "8", ExpiresAt: now.Add(time.Duration(r.IntN(4)-1) * time.Second), KeyHash: []byte{2}}
			}
			all = append(all, n)
			putRow(t, s, kindNode, nodeName(n.ID.Path()), nodeMessage(&n))
		}
		var rows []Server
		rosters := map[string][]spiffeid.ID{}
		for _, name := range servers {
			row := Server{ID: name, Stopped: r.IntN(4) == 0, Lease: time.Duration(r.IntN(4)) * time.Hour, BeatAt: now.Add(-time.Duration(r.IntN(4)) * silence / 2),
				Position: store.Position{Epoch: epochs[min(r.IntN(6), 1)^1], Revision: 40}, Acknowledged: uint64(30 + r.IntN(10))}
			if r.IntN(3) > 0 {
				row.Position.Epoch = epochs[0]
			}
			for _, n := range all {
				if r.IntN(2) == 0 {
					rosters[name] = append(rosters[name], n.ID)
				}
				if r.IntN(4) == 0 { // also of one that is not in the roster
					row.Laggards = append(row.Laggards, Laggard{n.ID.String(), uint64(20 + r.IntN(20))})
				}
			}
			rows = append(rows, row)
			putRow(t, s, kindServer, name, serverMessage(td, &row))
			var hashes []uint64
			for _, id := range rosters[name] {
				hashes = append(hashes, AgentHash(id))
			}
			if r.IntN(8) > 0 {
				putRoster(t, s, name, hashes...)
			} else {
				delete(rosters, name)
			}
		}
		at := store.Position{Epoch: epochs[min(r.IntN(10), 1)^1], Revision: uint64(18 + r.IntN(24))}

		var want []Unacknowledged
		for _, n := range all {
			until := n.Current.ExpiresAt
			if n.Next.ExpiresAt.After(until) {
				until = n.Next.ExpiresAt
			}
			if n.Banned || !now.Before(until) {
				seen["banned or ended"]++
				continue
			}
			u := Unacknowledged{ID: n.ID, Until: until, Polls: !n.Follows}
			has := false
			for _, row := range rows {
				if row.Stopped || row.Lease > 0 && now.Sub(row.BeatAt) >= time.Minute || !slices.Contains(rosters[row.ID], n.ID) {
					seen["not attached"]++
					continue
				}
				acknowledged := uint64(0)
				if row.Position.Epoch == s.position.Epoch {
					acknowledged = row.Acknowledged
					for _, l := range row.Laggards {
						if l.Agent == n.ID.String() {
							acknowledged = l.Acknowledged
							seen["lags"]++
						}
					}
				}
				has = has || at.Epoch == s.position.Epoch && acknowledged >= at.Revision
				if u.Server == "" || acknowledged > u.Acknowledged {
					u.Server, u.Acknowledged = row.ID, acknowledged
				}
			}
			if has {
				seen["acknowledged"]++
				continue
			}
			seen[fmt.Sprintf("polls %v, attached %v", u.Polls, u.Server != "")]++
			want = append(want, u)
		}
		if diff := cmp.Diff(want, (&Snapshot{s}).Unacknowledged(at, now), cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b })); diff != "" {
			t.Fatalf("seed %d: %s", seed, diff)
		}
	}
	for _, what := range []string{"banned or ended", "not attached", "lags", "acknowledged",
		"polls false, attached false", "polls false, attached true", "polls true, attached false", "polls true, attached true"} {
		if seen[what] < 100 {
			t.Errorf("%q came up %d times", what, seen[what])
		}
	}
}

func TestRoster(t *testing.T) {
	st := openStore(t, t.TempDir())
	r := start(t, st)
	write := func(agents ...uint64) store.Position {
		t.Helper()
		return update(t, r, func(tx *Tx) error { return tx.PutRoster("s", agents) })
	}
	first := write(3, 1<<63, 1<<63+1)
	if at := write(3, 1<<63, 1<<63+1); at != first { // nothing was committed
		t.Errorf("the same roster is written again: %v, %v", first, at)
	}
	if at := write(); at == first {
		t.Error("a roster that changed is not written")
	}
	for _, agents := range [][]uint64{{1, 1}, {2, 1}, make([]uint64, MaxRoster+1)} {
		_, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutRoster("s", agents) })
		isFault(t, err, fault.Invalid, "roster_invalid")
	}
	most := make([]uint64, MaxRoster) // fits into one value
	for i := range most {
		most[i] = uint64(i)
	}
	write(most...)

	// R79: a roster that cannot be read is no roster.
	for name, raw := range map[string][]byte{"odd": bytes.Repeat([]byte{1}, 9), "unordered": append(bigEndian(2), bigEndian(1)...)} {
		s := newState(td)
		putRow(t, s, kindServer, "s", serverMessage(td, &Server{ID: "s"}))
		putRow(t, s, kindRoster, "s", &statev1.Roster{Agents: raw})
		v := &Snapshot{s}
		if _, attached := v.Attachments(time.Now()).of(1); attached || len(s.bad) != 1 {
			t.Errorf("%s: attached %v, %d rows are left aside", name, attached, len(s.bad))
		}
	}
}

// Somebody who attaches to two servers is where it has acknowledged more; a server can
// be left out.
func TestAttachments(t *testing.T) {
	s := newState(td)
	s.position.Epoch = store.Epoch{1}
	id := id("/spire/agent/a")
	for name, acknowledged := range map[string]uint64{"s1": 5, "s2": 7} {
		putRow(t, s, kindServer, name, serverMessage(td, &Server{ID: name, Position: store.Position{Epoch: s.position.Epoch, Revision: 9}, Acknowledged: acknowledged}))
		putRoster(t, s, name, AgentHash(id))
	}
	all := (&Snapshot{s}).Attachments(time.Now())
	for server, a := range map[string]Attachments{"s2": all, "s1": all.Except("s2")} {
		if at, ok := a.Of(id); !ok || at.Server != server {
			t.Errorf("attached to %+v, %v, want %s", at, ok, server)
		}
	}
	if _, ok := all.Except("s1").Except("s2").Of(id); ok {
		t.Error("attached to nobody")
	}
}

func BenchmarkUnacknowledged(b *testing.B) {
	s := newState(td)
	s.position.Epoch = store.Epoch{1}
	now := time.Now()
	const agents = 100_000
	var roster []uint64
	for i := range agents {
		n := agent(fmt.Sprint(i))
		n.Current.ExpiresAt = now.Add(time.Hour)
		s.putNode(&n, 1, nil, nil)
		roster = append(roster, AgentHash(n.ID))
	}
	slices.Sort(roster)
	m := &statev1.Roster{}
	for _, h := range roster {
		m.Agents = append(m.Agents, bigEndian(h)...)
	}
	payload, _ := proto.Marshal(m)
	s.values[kindRoster]["s"] = value{payload: payload}
	row, _ := proto.Marshal(serverMessage(td, &Server{ID: "s", Position: store.Position{Epoch: s.position.Epoch, Revision: 9}, Acknowledged: 5}))
	s.values[kindServer]["s"] = value{payload: row}
	for b.Loop() {
		if n := len((&Snapshot{s}).Unacknowledged(store.Position{Epoch: s.position.Epoch, Revision: 5}, now)); n != 0 {
			b.Fatal(n)
		}
	}
}
