package registry

import (
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxPending is how many items a follower remembers between two Deltas. Past
// it the follower only remembers that it must look at everything.
const maxPending = 1024

// Follower hears what changes for one agent. It never queues: it remembers
// which items changed, and what they are is read when the agent is ready.
//
// To begin: Follow, then Delta. If the agent's hash equals Delta's, the agent is
// current. Else send the Inventory, then the Bodies that the agent wants,
// followed by the next Delta, which holds what changed meanwhile.
type Follower struct {
	r     *Registry
	agent spiffeid.ID
	rules bool // the agent knows rules; one that does not never hears of them
	wake  chan struct{}

	// mu orders callers of one follower; the registry's own lock is held with it,
	// for reading, and the observer writes under that lock alone.
	mu       sync.Mutex
	position store.Position
	pending  map[Item]struct{} // fingerprints are zero
	resync   bool
}

// ItemKind is what an item is.
type ItemKind uint8

// The kinds of items.
const (
	ItemGrant ItemKind = iota + 1
	ItemBundle
)

// Item is one thing that an agent holds.
type Item struct {
	Kind        ItemKind
	ID          string // grant id, or trust domain name
	Fingerprint uint64 // the first 8 bytes, big endian, of SHA-256 of the body
}

// Delta leads an agent from one position to another.
type Delta struct {
	Previous, Position store.Position
	Hash               [32]byte // of what the agent holds afterwards
	Bodies             [][]byte // shared with other followers: not to be written to
	Resync             bool     // too much changed: go on with Inventory; Bodies is empty
	Gone               bool     // the agent was deleted or banned: nothing more is for it
}

// Inventory is everything that an agent holds.
type Inventory struct {
	Position store.Position
	Hash     [32]byte
	Items    []Item // in the order of kind and ID
	Gone     bool
}

// Follow begins to follow what an agent is granted; rules says whether it knows rules.
func (r *Registry) Follow(agent spiffeid.ID, rules bool) *Follower {
	f := &Follower{r: r, agent: agent, rules: rules, wake: make(chan struct{}, 1), pending: make(map[Item]struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	f.position = r.state.position
	if r.followers[agent.Path()] == nil {
		r.followers[agent.Path()] = make(map[*Follower]struct{})
	}
	r.followers[agent.Path()][f] = struct{}{}
	return f
}

// Wake is sent to when something changed since the last Delta or Inventory.
func (f *Follower) Wake() <-chan struct{} { return f.wake }

// Close ends following.
func (f *Follower) Close() {
	f.r.mu.Lock()
	defer f.r.mu.Unlock()
	path := f.agent.Path()
	if delete(f.r.followers[path], f); len(f.r.followers[path]) == 0 {
		delete(f.r.followers, path)
	}
}

// Told returns the position that the last Delta or Inventory led to, and whether
// nothing that the agent holds has changed between there and the snapshot: then
// whoever has acknowledged the one holds the other. It is called in a View.
func (f *Follower) Told(v *Snapshot) (upTo store.Position, all bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.position, !f.resync && len(f.pending) == 0 && f.position.Epoch == v.s.position.Epoch
}

// Delta returns what changed since the last Delta or Inventory. An item that
// did not change, or that the agent never had, may be among it.
func (f *Follower) Delta() Delta {
	f.r.mu.RLock()
	defer f.r.mu.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.r.state
	d := Delta{Previous: f.position, Position: s.position}
	h, live := s.live(f.agent)
	if !live {
		d.Gone = true
		return d
	}
	d.Hash = s.hash(h, f.rules)
	if f.resync {
		d.Resync = true
		return d
	}
	groups := s.reach.reached(h)
	held := s.heldBundles(groups)
	for _, item := range slices.SortedFunc(maps.Keys(f.pending), compareItems) {
		if body := f.body(s, groups, held, item); body != nil {
			d.Bodies = append(d.Bodies, body)
		} else {
			d.Bodies = append(d.Bodies, f.r.bodies.get(item, [32]byte{}, func() []byte { return removedBody(item) }))
		}
	}
	clear(f.pending)
	f.position = s.position
	return d
}

// Inventory lists what the agent holds. Deltas go on from it.
func (f *Follower) Inventory() Inventory {
	f.r.mu.RLock()
	defer f.r.mu.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.r.state
	inv := Inventory{Position: s.position}
	h, live := s.live(f.agent)
	if !live {
		inv.Gone = true
		return inv
	}
	inv.Hash = s.hash(h, f.rules)
	groups := s.reach.reached(h)
	for e := range s.reach.granted(groups) {
		if f.rules || !s.rows.isRule(e) {
			inv.Items = append(inv.Items, Item{ItemGrant, s.rows.id(e), fingerprint(s.rows.at(e).sum)})
		}
	}
	for name := range s.heldBundles(groups) {
		inv.Items = append(inv.Items, Item{ItemBundle, name, fingerprint(s.bodies[name])})
	}
	slices.SortFunc(inv.Items, compareItems)
	clear(f.pending)
	f.resync = false
	f.position = s.position
	return inv
}

// Bodies returns the bodies of grants and bundles that the agent holds now;
// what it does not hold is left out.
func (f *Follower) Bodies(grantIDs, trustDomains []string) [][]byte {
	f.r.mu.RLock()
	defer f.r.mu.RUnlock()
	s := f.r.state
	h, live := s.live(f.agent)
	if !live {
		return nil
	}
	groups := s.reach.reached(h)
	held := s.heldBundles(groups)
	var bodies [][]byte
	add := func(item Item) {
		if body := f.body(s, groups, held, item); body != nil {
			bodies = append(bodies, body)
		}
	}
	for _, id := range grantIDs {
		add(Item{Kind: ItemGrant, ID: id})
	}
	for _, name := range trustDomains {
		add(Item{Kind: ItemBundle, ID: name})
	}
	return bodies
}

// body returns the body of an item if the agent holds it, which reaches these
// groups and bundles, else nil.
func (f *Follower) body(s *state, groups []uint32, held map[string]struct{}, item Item) []byte {
	if item.Kind == ItemBundle {
		if _, ok := held[item.ID]; !ok {
			return nil
		}
		return f.r.bodies.get(item, s.bodies[item.ID], func() []byte {
			b, _ := s.bundle(item.ID)
			return bundleBody(b)
		})
	}
	h := s.rows.findGrant(item.ID)
	if h == 0 || s.rows.isRule(h) && !f.rules || !s.reach.grants(groups, h) {
		return nil
	}
	return f.r.bodies.get(item, s.rows.at(h).sum, func() []byte {
		e := s.rows.entry(h)
		return grantBody(&e)
	})
}

// observe notes that a change affects an agent and marks the agent's followers.
// The registry's lock is held for writing.
func (r *Registry) observe(agent *node, what touched) {
	r.touches.add(agent)
	for f := range r.followers[agent.path] {
		f.mark(what)
		r.woken[f] = struct{}{}
	}
}

// mark notes a change. An agent that knows no rules hears nothing of them but
// where the log is, so that it acknowledges that as others do.
func (f *Follower) mark(what touched) {
	if what.whole {
		f.look()
	}
	if f.resync {
		return
	}
	if what.entry != "" && (f.rules || !what.rule) {
		f.pending[Item{Kind: ItemGrant, ID: what.entry}] = struct{}{}
	}
	for _, name := range what.domains {
		f.pending[Item{Kind: ItemBundle, ID: name}] = struct{}{}
	}
	x := f.r.state.reach
	for _, path := range what.groups {
		g := x.groups[path]
		if g == nil {
			continue // its last entry went with this change and is named itself
		}
		if len(f.pending)+g.n > maxPending {
			f.look()
			return
		}
		for h := range x.granted([]uint32{path}) {
			if f.rules || !x.rows.isRule(h) {
				f.pending[Item{Kind: ItemGrant, ID: x.rows.id(h)}] = struct{}{}
			}
		}
		for name := range g.federates {
			f.pending[Item{Kind: ItemBundle, ID: name}] = struct{}{}
		}
	}
	if len(f.pending) > maxPending {
		f.look()
	}
}

// look makes the follower look at everything.
func (f *Follower) look() {
	f.resync = true
	clear(f.pending)
}

func (f *Follower) notify() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func compareItems(a, b Item) int {
	if a.Kind != b.Kind {
		return int(a.Kind) - int(b.Kind)
	}
	return strings.Compare(a.ID, b.ID)
}

func fingerprint(sum [32]byte) uint64 { return binary.BigEndian.Uint64(sum[:]) }

// bodyCache keeps bodies that were marshalled lately, so that a change that
// touches many agents is marshalled once.
type bodyCache struct {
	mu   sync.Mutex
	held map[Item]cachedBody
	size int
}

type cachedBody struct {
	sum  [32]byte // of the body; zero: it says that the item is removed
	body []byte
}

// maxBodies is how many bytes of bodies are kept; past it all are let go.
const maxBodies = 16 << 20

func (c *bodyCache) get(item Item, sum [32]byte, marshal func() []byte) []byte {
	if sum == ([32]byte{}) {
		item.Fingerprint = 1 // beside the body of the item itself
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if held, ok := c.held[item]; ok && held.sum == sum {
		return held.body
	}
	body := marshal()
	if c.size > maxBodies || c.held == nil {
		c.held, c.size = make(map[Item]cachedBody), 0
	}
	c.size += len(item.ID) + len(body) - len(c.held[item].body)
	c.held[item] = cachedBody{sum, body}
	return body
}
