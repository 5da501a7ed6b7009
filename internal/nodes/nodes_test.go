package nodes_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	now     = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	epoch   = store.Epoch{1}
	agentID = spiffeid.RequireFromString("spiffe://td/spire/agent/join_token/abc")
)

func credential(n int, key string) registry.Credential {
	return registry.Credential{Serial: fmt.Sprint(n), KeyHash: []byte(key), ExpiresAt: now.Add(time.Hour)}
}

func candidate(n int, key string) nodes.Candidate {
	return nodes.Candidate{Now: now, Epoch: epoch, ID: agentID, Type: "join_token", FirstUse: true, OneTime: []byte("hash"),
		Credential: credential(n, key), Lineage: fmt.Appendf(nil, "lineage %d", n)}
}

func token() *registry.Token {
	return &registry.Token{Hash: []byte("hash"), ExpiresAt: now.Add(time.Minute), NodeID: agentID.String(), Epoch: epoch}
}

func TestAdmitWithToken(t *testing.T) {
	node, used, err := nodes.Admit(nil, token(), candidate(1, "k1"))
	if err != nil {
		t.Fatal(err)
	}
	if node.Current.Serial != "1" || node.Next.Serial != "" || string(used.Consumer) != "k1" || string(node.Evidence) != "hash" {
		t.Errorf("Admit() = %+v, %+v", node, used)
	}

	retry, again, err := nodes.Admit(node, used, candidate(2, "k1")) // K5
	if err != nil {
		t.Fatal(err)
	}
	if again != nil || retry.Current.Serial != "1" || retry.Next.Serial != "2" || !bytes.Equal(retry.Lineage, node.Lineage) {
		t.Errorf("retry: Admit() = %+v, %+v, want the same lineage with 2 as next", retry, again)
	}

	renewed := nodes.Promote(*node, registry.Credential{Serial: "1"})
	renewed.Current = credential(3, "k2")
	change := func(f func(*registry.Token)) *registry.Token { tok := token(); f(tok); return tok }
	for id, c := range map[string]struct {
		node  *registry.Node
		token *registry.Token
		key   string
		late  time.Duration
	}{
		"K1 unknown":                           {nil, nil, "k1", 0},
		"K2 expired by 1 s":                    {nil, token(), "k1", time.Minute + time.Second},
		"K2 expired now":                       {nil, token(), "k1", time.Minute},
		"K3 used, node gone":                   {nil, used, "k1", 0},
		"K3 used, node has renewed":            {&renewed, used, "k1", 0},
		"K3 retry after expiry":                {node, used, "k1", time.Minute},
		"K6 used, other key":                   {node, used, "k2", 0},
		"K15 the ID is taken":                  {node, token(), "k1", 0},
		"K16 token of another epoch":           {nil, change(func(t *registry.Token) { t.Epoch = store.Epoch{2} }), "k1", 0},
		"token of another node":                {nil, change(func(t *registry.Token) { t.NodeID = "spiffe://td/spire/agent/join_token/def" }), "k1", 0},
		"used token of another epoch, retried": {node, change(func(t *registry.Token) { t.Epoch, t.Consumer = store.Epoch{2}, []byte("k1") }), "k1", 0},
	} {
		t.Run(id, func(t *testing.T) {
			cand := candidate(9, c.key)
			cand.Now = now.Add(c.late)
			n, tok, err := nodes.Admit(c.node, c.token, cand)
			if fault.ReasonOf(err) != "join_token_refused" || fault.KindOf(err) != fault.Denied || n != nil || tok != nil {
				t.Errorf("Admit() = %v, %v, %v, want join_token_refused", n, tok, err)
			}
		})
	}
}

func TestAdmitWithoutToken(t *testing.T) {
	c := candidate(1, "k1")
	c.OneTime = nil
	node, _, err := nodes.Admit(nil, nil, c)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := nodes.Admit(node, nil, c); fault.ReasonOf(err) != "already_attested" { // R23
		t.Errorf("first use, second time: %v, want already_attested", err)
	}
	c.FirstUse, c.CanReattest, c.Credential = false, true, credential(2, "k2")
	again, _, err := nodes.Admit(node, nil, c)
	if err != nil || again.Current.Serial != "1" || again.Next.Serial != "2" { // R33
		t.Errorf("re-attestation: %+v, %v, want 2 as next", again, err)
	}
	c.Now = node.Current.ExpiresAt
	if again, _, err = nodes.Admit(node, nil, c); err != nil || again.Current.Serial != "2" || again.Next.Serial != "" {
		t.Errorf("re-attestation after expiry: %+v, %v, want 2 as the only certificate", again, err)
	}
	node.AgentVersion, node.Evidence, node.Follows, c.Holder = "1.0", []byte("one"), true, []byte("one")
	if again, _, err = nodes.Admit(node, nil, c); err != nil || again.AgentVersion != "1.0" || !again.Follows || string(again.Evidence) != "one" || nodes.Changed(node, c) {
		t.Errorf("re-attestation of the same holder: %+v, %v", again, err)
	}
	if c.Holder = []byte("two"); !nodes.Changed(node, c) { // F22
		t.Error("another holder was not noticed")
	}
	foreign := *node
	foreign.AttestationType = "other"
	if _, _, err := nodes.Admit(&foreign, nil, c); fault.ReasonOf(err) != "agent_exists" {
		t.Errorf("an agent of another attestor: %v, want agent_exists", err)
	}
	node.Banned = true
	if _, _, err := nodes.Admit(node, nil, c); fault.ReasonOf(err) != nodes.ReasonBanned { // A46
		t.Errorf("banned: %v, want %s", err, nodes.ReasonBanned)
	}
}

func TestTwoSerials(t *testing.T) { // R31, R33
	first, _, err := nodes.Admit(nil, token(), candidate(1, "k1"))
	if err != nil {
		t.Fatal(err)
	}
	later := now.Add(time.Hour)
	ok := func(n *registry.Node, serial string, wantPromote bool) {
		t.Helper()
		if promote, err := nodes.Authenticate(n, serial, later, now); err != nil || promote != wantPromote {
			t.Errorf("Authenticate(%s) = %v, %v, want %v", serial, promote, err, wantPromote)
		}
	}
	renewed, err := nodes.Renew(first, "1", later, now, credential(2, "k2"))
	if err != nil {
		t.Fatal(err)
	}
	ok(renewed, "1", false)
	ok(renewed, "2", true)

	// The answer was lost: the old one renews again.
	renewed, err = nodes.Renew(renewed, "1", later, now, credential(3, "k3"))
	if err != nil {
		t.Fatal(err)
	}
	ok(renewed, "1", false)
	ok(renewed, "3", true)

	// Once the new one is used, the old one and the lost one are a sign of a copy.
	used := nodes.Promote(*renewed, registry.Credential{Serial: "3"})
	ok(&used, "3", false)
	for _, serial := range []string{"1", "2", "", "4"} {
		if _, err := nodes.Authenticate(&used, serial, later, now); fault.ReasonOf(err) != nodes.ReasonNotActive {
			t.Errorf("Authenticate(%q) = %v, want %s", serial, err, nodes.ReasonNotActive)
		}
	}
	// Renewing with the next one promotes it.
	chained, err := nodes.Renew(renewed, "3", later, now, credential(4, "k4"))
	if err != nil || chained.Current.Serial != "3" || chained.Next.Serial != "4" {
		t.Errorf("Renew() = %+v, %v, want 3 and 4", chained, err)
	}
	if _, err := nodes.Renew(&used, "3", later, now, credential(5, "k3")); fault.ReasonOf(err) != "key_reused" { // C38
		t.Errorf("same key: %v, want key_reused", err)
	}
	if _, err := nodes.Renew(renewed, "1", later, now, credential(5, "k3")); err != nil {
		t.Errorf("a retry with the key of the lost answer: %v", err)
	}
}

func TestAuthenticateRefusals(t *testing.T) { // Q5
	node, _, _ := nodes.Admit(nil, token(), candidate(1, "k1"))
	outcast := *node
	outcast.Banned = true
	reattests := *node
	reattests.CanReattest = true
	for _, c := range []struct {
		name   string
		node   *registry.Node
		serial string
		expiry time.Time
		reason string
	}{
		{"unknown", nil, "1", now.Add(time.Hour), nodes.ReasonNotAttested},
		{"expired now", node, "1", now, nodes.ReasonExpired},
		{"banned", &outcast, "1", now.Add(time.Hour), nodes.ReasonBanned},
		{"banned and expired", &outcast, "1", now, nodes.ReasonBanned},
		{"superseded", node, "0", now.Add(time.Hour), nodes.ReasonNotActive},
		{"must re-attest", &reattests, "1", now.Add(time.Hour), nodes.ReasonMustReattest},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := nodes.Renew(c.node, c.serial, c.expiry, now, credential(2, "k2")); fault.ReasonOf(err) != c.reason || fault.KindOf(err) != fault.Denied {
				t.Errorf("Renew() = %v, want %s", err, c.reason)
			}
		})
	}
}

// TestInterleavings runs attestations, renewals, first uses, bans, their ends and evictions
// as the registry does, each as read, decide, commit-if-unchanged, in 10,000
// random orders, and checks the history.
func TestInterleavings(t *testing.T) { // R20, R29, A46, A47, A48
	for seed := range uint64(10_000) {
		if msg := interleave(rand.New(rand.NewPCG(seed, 1))); msg != "" {
			t.Fatalf("seed %d: %s", seed, msg)
		}
	}
}

type world struct {
	revision int
	node     *registry.Node
	token    *registry.Token
	// what the history shows
	evicted    bool
	bannedAt   int // revision of the standing ban, 0: none
	lineages   map[string]bool
	violations string
}

// task is one transaction: decide runs on a snapshot, commit when nothing changed since.
type task struct {
	name   string
	decide func(node *registry.Node, token *registry.Token) (*registry.Node, *registry.Token, error)
	read   int // revision of the snapshot, 0: not read
	node   *registry.Node
	token  *registry.Token
	done   bool
}

func interleave(rnd *rand.Rand) string {
	w := &world{revision: 1, token: token(), lineages: map[string]bool{}}
	var tasks []*task
	serial := 0
	add := func(name string, decide func(*registry.Node, *registry.Token) (*registry.Node, *registry.Token, error)) {
		tasks = append(tasks, &task{name: name, decide: decide})
	}
	for range 2 + rnd.IntN(3) {
		serial++
		c := candidate(serial, fmt.Sprint("k", rnd.IntN(3)))
		add("attest", func(n *registry.Node, tok *registry.Token) (*registry.Node, *registry.Token, error) {
			return nodes.Admit(n, tok, c)
		})
	}
	for range 1 + rnd.IntN(3) {
		serial++
		next, presented := credential(serial, fmt.Sprint("r", serial)), fmt.Sprint(1+rnd.IntN(5))
		add("renew", func(n *registry.Node, _ *registry.Token) (*registry.Node, *registry.Token, error) {
			renewed, err := nodes.Renew(n, presented, now.Add(time.Hour), now, next)
			return renewed, nil, err
		})
		add("use", func(n *registry.Node, _ *registry.Token) (*registry.Node, *registry.Token, error) {
			promote, err := nodes.Authenticate(n, presented, now.Add(time.Hour), now)
			if err != nil || !promote {
				return nil, nil, err
			}
			used := nodes.Promote(*n, registry.Credential{Serial: presented})
			return &used, nil, nil
		})
	}
	add("ban", func(n *registry.Node, _ *registry.Token) (*registry.Node, *registry.Token, error) {
		if n == nil {
			return nil, nil, fault.New(fault.NotFound, "node_unknown", "")
		}
		b := *n
		b.Banned = true
		return &b, nil, nil
	})
	if rnd.IntN(4) == 0 {
		add("evict", func(n *registry.Node, _ *registry.Token) (*registry.Node, *registry.Token, error) {
			return nil, nil, nil
		})
	}
	if rnd.IntN(4) == 0 {
		add("unban", func(n *registry.Node, _ *registry.Token) (*registry.Node, *registry.Token, error) {
			if n == nil {
				return nil, nil, fault.New(fault.NotFound, "node_unknown", "")
			}
			return nil, nil, nodes.Unban(n)
		})
	}
	for steps := 0; w.violations == "" && steps < 500; steps++ {
		var open []*task
		for _, k := range tasks {
			if !k.done {
				open = append(open, k)
			}
		}
		if len(open) == 0 {
			return ""
		}
		w.step(open[rnd.IntN(len(open))])
	}
	return w.violations
}

// step is half of a task: reading, or judging and committing.
func (w *world) step(k *task) {
	if k.read == 0 {
		k.read, k.node, k.token = w.revision, w.node, w.token
		return
	}
	node, tok, err := k.decide(k.node, k.token)
	if k.read != w.revision { // the registry's conditions failed: read again
		k.read = 0
		return
	}
	k.done = true
	if err != nil {
		return
	}
	switch k.name {
	case "attest":
		if w.bannedAt != 0 {
			w.violations = "a banned node was admitted"
		}
		w.lineages[string(node.Lineage)] = true
		if len(w.lineages) > 1 {
			w.violations = "one token began two lineages"
		}
		if w.evicted {
			w.violations = "a used token admitted an evicted node"
		}
	case "renew":
		if w.bannedAt != 0 {
			w.violations = "a banned node was renewed"
		}
		if !bytes.Equal(node.Lineage, w.node.Lineage) {
			w.violations = "a renewal changed the lineage"
		}
	case "ban":
		w.bannedAt = w.revision + 1
	case "evict", "unban":
		if w.node == nil {
			return
		}
		if k.name == "unban" && w.bannedAt == 0 {
			w.violations = "a node was unbanned that was not banned"
		}
		w.evicted, w.bannedAt, w.node = true, 0, nil
		w.revision++
		return
	}
	if node == nil {
		return
	}
	if w.bannedAt != 0 && !node.Banned {
		w.violations = k.name + " cleared a ban"
	}
	w.node = node
	if tok != nil {
		w.token = tok
	}
	w.revision++
}
