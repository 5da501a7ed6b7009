package registry

import (
	"encoding/hex"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Snapshot is the trust domain at one position. It and what it yields lazily
// are only used inside the closure that got it; values it returns may be kept.
type Snapshot struct {
	s *state
}

// Position returns where in the log this is.
func (v *Snapshot) Position() store.Position { return v.s.position }

// Digest is an order-independent sum over the key and revision of everything
// stored. Replicas at one position have one digest (R78).
func (v *Snapshot) Digest() [32]byte { return v.s.digest.Bytes() }

// Unreadable yields the key of each stored row that is left aside, and why.
func (v *Snapshot) Unreadable() iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for _, key := range slices.Sorted(maps.Keys(v.s.bad)) {
			if !yield(key, v.s.bad[key].err) {
				return
			}
		}
	}
}

// Entry returns the entry with an id, or fault.NotFound.
func (v *Snapshot) Entry(id string) (entry.Entry, error) {
	h := v.s.rows.find(id)
	if h == 0 {
		return entry.Entry{}, notFound("entry", id)
	}
	return v.s.rows.entry(h), nil
}

// EntryCount returns the number of entries.
func (v *Snapshot) EntryCount() int { return v.s.rows.entries.n }

// Entries yields the entries whose id is greater than after, in the order of ids.
func (v *Snapshot) Entries(after string) iter.Seq[entry.Entry] {
	return func(yield func(entry.Entry) bool) {
		for h := range v.s.rows.after(&v.s.rows.entries, after) {
			if !yield(v.s.rows.entry(h)) {
				return
			}
		}
	}
}

// Authorized yields the entries that a live agent is granted, in no order, and no
// rules; nothing for an agent that is unknown or banned. Entries that ended count
// until they are removed.
func (v *Snapshot) Authorized(agent spiffeid.ID) iter.Seq[entry.Entry] {
	return v.granted(agent, false)
}

// AuthorizedGrants is Authorized with the rules.
func (v *Snapshot) AuthorizedGrants(agent spiffeid.ID) iter.Seq[entry.Entry] {
	return v.granted(agent, true)
}

// Reachable yields, in no order, the entries and rules that an agent is granted, or
// would be if it were not banned; nothing for one that is unknown.
func (v *Snapshot) Reachable(agent spiffeid.ID) iter.Seq[entry.Entry] {
	return func(yield func(entry.Entry) bool) {
		n := v.s.nodes.find(agent.Path())
		if n == nil || !agent.MemberOf(v.s.td) {
			return
		}
		for h := range v.s.reach.granted(v.s.reach.from(n.sym, v.s.reach.named(n))) {
			if !yield(v.s.rows.entry(h)) {
				return
			}
		}
	}
}

func (v *Snapshot) granted(agent spiffeid.ID, rules bool) iter.Seq[entry.Entry] {
	return func(yield func(entry.Entry) bool) {
		n, live := v.s.live(agent)
		if !live {
			return
		}
		for h := range v.s.reach.granted(v.s.reach.reached(n)) {
			if (rules || !v.s.rows.isRule(h)) && !yield(v.s.rows.entry(h)) {
				return
			}
		}
	}
}

// Rule returns the rule with an id, or fault.NotFound.
func (v *Snapshot) Rule(id string) (entry.Entry, error) {
	h := v.s.rows.findRule(id)
	if h == 0 {
		return entry.Entry{}, notFound("rule", id)
	}
	return v.s.rows.entry(h), nil
}

// RuleCount returns the number of rules.
func (v *Snapshot) RuleCount() int { return v.s.rows.rules.n }

// Rules yields the rules whose id is greater than after, in the order of ids.
func (v *Snapshot) Rules(after string) iter.Seq[entry.Entry] {
	return func(yield func(entry.Entry) bool) {
		for h := range v.s.rows.after(&v.s.rows.rules, after) {
			if !yield(v.s.rows.entry(h)) {
				return
			}
		}
	}
}

// EndedRules returns the ids of the rules whose own end has come by then.
func (v *Snapshot) EndedRules(by time.Time) []string {
	var ended []string
	for h := range v.s.rows.after(&v.s.rows.rules, "") {
		if end := v.s.rows.at(h).expires; end != 0 && end <= by.Unix() {
			ended = append(ended, v.s.rows.id(h))
		}
	}
	return ended
}

// AuthorizedGrant returns an entry or a rule if a live agent is granted it. Whether
// it has ended is for the caller to see.
func (v *Snapshot) AuthorizedGrant(agent spiffeid.ID, id string) (entry.Entry, bool) {
	return v.authorized(agent, v.s.rows.findGrant(id))
}

// AuthorizedEntry is AuthorizedGrant for an entry alone.
func (v *Snapshot) AuthorizedEntry(agent spiffeid.ID, id string) (entry.Entry, bool) {
	return v.authorized(agent, v.s.rows.find(id))
}

func (v *Snapshot) authorized(agent spiffeid.ID, h uint32) (entry.Entry, bool) {
	n, live := v.s.live(agent)
	if !live || h == 0 || !v.s.reach.grants(v.s.reach.reached(n), h) {
		return entry.Entry{}, false
	}
	return v.s.rows.entry(h), true
}

// Hash is the state hash of what a live agent holds who knows rules; zero for one that is
// unknown or banned.
func (v *Snapshot) Hash(agent spiffeid.ID) [32]byte {
	h, live := v.s.live(agent)
	if !live {
		return [32]byte{}
	}
	return v.s.hash(h, true)
}

// Node returns the node with an agent ID, banned or not, or fault.NotFound.
func (v *Snapshot) Node(id spiffeid.ID) (Node, error) {
	n := v.s.nodes.find(id.Path())
	if n == nil || !id.MemberOf(v.s.td) {
		return Node{}, notFound("node", id.String())
	}
	return v.s.node(n), nil
}

// NodeVersion returns where in the log a node was last written.
func (v *Snapshot) NodeVersion(id spiffeid.ID) (store.Position, bool) {
	n := v.s.nodes.find(id.Path())
	if n == nil || !id.MemberOf(v.s.td) {
		return store.Position{}, false
	}
	return store.Position{Epoch: v.s.position.Epoch, Revision: n.revision}, true
}

// NodeCount returns the number of nodes, banned ones included.
func (v *Snapshot) NodeCount() int { return len(v.s.nodes.byPath) }

// Nodes yields the nodes whose ID is greater than after, in the order of IDs.
// after is the text of an agent ID; empty: from the first.
func (v *Snapshot) Nodes(after string) iter.Seq[Node] {
	return func(yield func(Node) bool) {
		for n := range v.s.nodes.after(strings.TrimPrefix(after, v.s.td.IDString())) {
			if !yield(v.s.node(n)) {
				return
			}
		}
	}
}

// Bundle returns the bundle of a trust domain, or fault.NotFound.
func (v *Snapshot) Bundle(td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	b, ok := v.s.bundle(td.Name())
	if !ok {
		return nil, notFound("bundle", td.Name())
	}
	return b, nil
}

// BundleVersion returns where in the log the bundle of a trust domain was last
// written. A bundle that was deleted and came back has another version, whatever
// its sequence number.
func (v *Snapshot) BundleVersion(td spiffeid.TrustDomain) (store.Position, bool) {
	val, ok := v.s.values[kindBundle][td.Name()]
	return store.Position{Epoch: v.s.position.Epoch, Revision: val.revision}, ok
}

// BundleCount returns the number of bundles, the own one included.
func (v *Snapshot) BundleCount() int { return len(v.s.values[kindBundle]) }

// Bundles yields all bundles, the own one included, in the order of trust domains.
func (v *Snapshot) Bundles() iter.Seq[*bundle.Bundle] {
	return func(yield func(*bundle.Bundle) bool) {
		for _, name := range slices.Sorted(maps.Keys(v.s.values[kindBundle])) {
			if b, _ := v.s.bundle(name); !yield(b) {
				return
			}
		}
	}
}

// Authorities returns the signing keys of a server, of every kind, or of all
// servers if server is empty.
func (v *Snapshot) Authorities(server string) []Authority {
	var out []Authority
	for _, name := range slices.Sorted(maps.Keys(v.s.values[kindAuthority])) {
		a, err := readAuthority(name, v.s.values[kindAuthority][name].payload)
		if err == nil && (server == "" || a.Server == server) {
			out = append(out, a)
		}
	}
	return out
}

// Downstreams yields the authorities below ours in no order, those that have
// ended too.
func (v *Snapshot) Downstreams() iter.Seq[Downstream] {
	return func(yield func(Downstream) bool) {
		for serial, val := range v.s.values[kindDownstream] {
			if d, err := readDownstream(serial, val.payload); err == nil && !yield(d) {
				return
			}
		}
	}
}

// Server returns the row of a server, or fault.NotFound.
func (v *Snapshot) Server(id string) (Server, error) {
	val, ok := v.s.values[kindServer][id]
	if !ok {
		return Server{}, notFound("server", id)
	}
	return readServer(v.s.td, val.payload)
}

// Servers returns the servers of the trust domain, without those that are expelled.
func (v *Snapshot) Servers() []Server {
	var out []Server
	for _, name := range slices.Sorted(maps.Keys(v.s.values[kindServer])) {
		if server, err := readServer(v.s.td, v.s.values[kindServer][name].payload); err == nil && !v.s.expelled(name) {
			out = append(out, server)
		}
	}
	return out
}

// Token returns the join token with a hash, or fault.NotFound.
func (v *Snapshot) Token(hash []byte) (Token, error) {
	val, ok := v.s.values[kindToken][hex.EncodeToString(hash)]
	if !ok {
		return Token{}, fault.New(fault.NotFound, "token_not_found", "there is no such token")
	}
	return readToken(hash, val.payload)
}

// Tokens yields the join tokens in no order.
func (v *Snapshot) Tokens() iter.Seq[Token] {
	return func(yield func(Token) bool) {
		for name, val := range v.s.values[kindToken] {
			hash, err := hex.DecodeString(name)
			if err != nil {
				continue
			}
			if t, err := readToken(hash, val.payload); err == nil && !yield(t) {
				return
			}
		}
	}
}

func (s *state) node(n *node) Node {
	out, err := readNode(s.td, s.position.Epoch, nodeName(n.path), n.payload)
	if err != nil {
		panic("registry: a node that was read once cannot be read: " + err.Error())
	}
	return out
}
