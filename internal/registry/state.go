package registry

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// state is the trust domain at one position: everything in the store, folded
// into memory. It is pure; whoever holds it keeps readers and the writer apart.
type state struct {
	td       spiffeid.TrustDomain
	position store.Position
	digest   entry.Sum // over (key, revision) of every live key
	format   int       // in which rows are written
	reader   int       // the oldest format whose readers understand the store

	rows    *rows
	orphans map[[32]byte]uint64 // content keys without an entry of that content: their revisions
	nodes   *nodes
	reach   *reach
	values  [kinds]map[string]value // the kinds that are few
	bodies  map[string][32]byte     // by trust domain name: hash of the bundle's body
	bad     map[string]badRow       // rows that cannot be read, by key (R79)
}

// value is a stored value whose payload is read when it is asked for.
type value struct {
	revision uint64
	payload  []byte
}

type badRow struct {
	revision uint64
	err      error
}

func newState(td spiffeid.TrustDomain) *state {
	s := &state{
		td: td, format: oldestFormat, reader: oldestFormat, rows: newRows(td), orphans: make(map[[32]byte]uint64), nodes: newNodes(),
		bodies: make(map[string][32]byte), bad: make(map[string]badRow),
	}
	s.reach = newReach(s.rows, s.nodes)
	for k := range s.values {
		s.values[k] = make(map[string]value)
	}
	return s
}

// apply folds a batch into the state and tells on, which may be nil, which
// agents it affects, and wrote when a transaction is through.
func (s *state) apply(b store.Batch, on observer, wrote func(store.Write)) {
	for _, w := range b.Writes {
		for _, c := range w.Changes {
			if c.Deleted {
				s.delete(c.Key, on)
			} else {
				s.set(c.Key, b.Position.Revision, c.Value, on)
			}
		}
		wrote(w)
	}
	s.position = b.Position
}

// revision returns the revision that last wrote a key, or 0.
func (s *state) revision(key string) uint64 {
	if bad, ok := s.bad[key]; ok {
		return bad.revision
	}
	switch k, name := split(key); k {
	case kindEntry:
		if h := s.rows.find(name); h != 0 {
			return s.rows.at(h).revision
		}
	case kindRule:
		if h := s.rows.findRule(name); h != 0 {
			return s.rows.at(h).revision
		}
	case kindContent:
		if hash, ok := contentHash(name); ok {
			if h := s.rows.findContent(hash); h != 0 {
				return s.rows.at(h).contentRevision
			}
			return s.orphans[hash]
		}
	case kindNode:
		if n := s.nodeNamed(name); n != nil {
			return n.revision
		}
	default:
		return s.values[k][name].revision
	}
	return 0
}

// set stores the value of a key. What cannot be read is kept aside by name and
// stands in nobody's way; the row that it replaces is gone.
func (s *state) set(key string, rev uint64, val []byte, on observer) {
	if was := s.revision(key); was != 0 {
		s.digest.Sub(keyHash(key, was))
	}
	delete(s.bad, key)
	r := readStored(s.td, key, rev, val)
	s.place(&r, on)
}

// place puts a row that was read into memory. The digest does not count what
// the key had before.
func (s *state) place(r *storedRow, on observer) {
	s.digest.Add(r.keyHash)
	if r.err != nil {
		s.forget(r.key, on)
		s.bad[r.key] = badRow{r.revision, r.err}
		return
	}
	switch r.kind {
	case kindEntry, kindRule:
		s.putEntry(&r.entry, r.unknown, r.content, r.body, on)
	case kindContent:
		s.putContent(r.content, r.revision)
	case kindNode:
		s.putNode(&r.node, r.revision, r.payload, on)
	case kindBundle:
		s.values[r.kind][r.name] = value{r.revision, r.payload}
		s.bundleChanged(r.name, r.body, on)
	default:
		s.values[r.kind][r.name] = value{r.revision, r.payload}
	}
	if r.kind == kindFormat {
		s.formatChanged()
	}
}

func (s *state) delete(key string, on observer) {
	if was := s.revision(key); was != 0 {
		s.digest.Sub(keyHash(key, was))
	}
	delete(s.bad, key)
	s.forget(key, on)
}

// forget takes a key's value out of memory; whether there is one does not matter.
func (s *state) forget(key string, on observer) {
	switch k, name := split(key); k {
	case kindEntry, kindRule:
		if h := s.rows.findIn(s.rows.idsOf(k == kindRule), name); h != 0 {
			s.reach.change(h, nil, func() {
				s.reach.unlink(h)
				s.keepContent(h)
				s.rows.drop(h)
			}, on)
		}
	case kindContent:
		if hash, ok := contentHash(name); ok {
			if h := s.rows.findContent(hash); h != 0 {
				s.rows.at(h).contentRevision = 0
			}
			delete(s.orphans, hash)
		}
	case kindNode:
		if n := s.nodeNamed(name); n != nil {
			s.dropNode(n, on)
		}
	case kindBundle:
		if _, ok := s.values[k][name]; ok {
			delete(s.values[k], name)
			s.bundleChanged(name, [32]byte{}, on)
		}
	default:
		delete(s.values[k], name)
		if k == kindFormat {
			s.formatChanged()
		}
	}
}

// putEntry takes in an entry or a rule; content is the hash of its content, sum that of its body.
func (s *state) putEntry(e *entry.Entry, unknown []byte, content, sum [32]byte, on observer) {
	was := s.rows.findIn(s.rows.idsOf(e.Rule != nil), e.ID)
	s.reach.change(was, e, func() {
		if was != 0 {
			s.reach.unlink(was)
			s.keepContent(was)
		}
		h := s.rows.put(e, unknown, content, sum)
		if rev := s.orphans[content]; rev != 0 {
			s.rows.at(h).contentRevision = rev
			delete(s.orphans, content)
		}
		s.reach.link(h)
	}, on)
}

// putContent takes in a content key.
func (s *state) putContent(hash [32]byte, rev uint64) {
	if h := s.rows.findContent(hash); h != 0 {
		s.rows.at(h).contentRevision = rev
		delete(s.orphans, hash)
	} else {
		s.orphans[hash] = rev
	}
}

// keepContent sets aside the revision of an entry's content key, before the
// entry goes or changes; it is the new one's if that has the same content.
func (s *state) keepContent(h uint32) {
	if row := s.rows.at(h); row.contentRevision != 0 {
		s.orphans[row.contentHash] = row.contentRevision
	}
}

func (s *state) putNode(n *Node, rev uint64, payload []byte, on observer) {
	path := n.ID.Path()
	syms := make([]uint32, len(n.Selectors))
	for i, sel := range n.Selectors {
		syms[i] = s.rows.sets.texts.intern(sel.String())
	}
	row := &node{
		path: path, hash: hashPath(path), revision: rev, payload: payload, live: !n.Banned, follows: n.Follows,
		until: max(unixOf(n.Current.ExpiresAt), unixOf(n.Next.ExpiresAt)),
		sym:   s.rows.paths.intern(path), selectors: syms, aliases: make(map[uint32]struct{}),
	}
	h, known := s.nodes.byPath[path]
	var before []uint32
	wasLive := false
	if known {
		was := s.nodes.at(h)
		if wasLive = was.live; wasLive {
			if on != nil {
				before = s.reach.reached(h)
			}
			s.reach.unlinkNode(h)
		}
		s.releaseNode(was)
		s.nodes.list[h] = row
	} else {
		h = s.nodes.add(row)
	}
	if row.live {
		s.reach.linkNode(h)
	}
	if on == nil || !row.live && !wasLive {
		return
	}
	if row.live != wasLive {
		on(row, touched{whole: true})
	} else if groups := difference(before, s.reach.reached(h)); len(groups) > 0 {
		on(row, touched{groups: groups})
	}
}

func (s *state) dropNode(n *node, on observer) {
	if n.live {
		s.reach.unlinkNode(s.nodes.byPath[n.path])
	}
	s.releaseNode(n)
	s.nodes.drop(n.path)
	if on != nil && n.live {
		on(n, touched{whole: true})
	}
}

func (s *state) releaseNode(n *node) {
	s.rows.paths.release(n.sym)
	for _, sym := range n.selectors {
		s.rows.sets.texts.release(sym)
	}
}

// nodeNamed finds a node by the name in its key.
func (s *state) nodeNamed(name string) *node {
	if name[0] != '/' {
		return s.nodes.find("/" + name)
	}
	for path := range s.nodes.byPath { // a path too long for a key; almost none is
		if nodeName(path) == name {
			return s.nodes.find(path)
		}
	}
	return nil
}

// bundleChanged tells who holds a bundle that its body is another; a zero sum
// says that it is gone.
func (s *state) bundleChanged(name string, sum [32]byte, on observer) {
	was := s.bodies[name]
	if sum == ([32]byte{}) {
		delete(s.bodies, name)
	} else {
		s.bodies[name] = sum
	}
	if on == nil || was == sum {
		return
	}
	what := touched{domains: []string{name}}
	if name == s.td.Name() {
		for _, h := range s.reach.at {
			on(s.nodes.at(h), what)
		}
		return
	}
	agents := make(map[uint32]struct{})
	var groups []uint32
	for path := range s.reach.naming[name] {
		groups = append(groups, path)
	}
	s.reach.back(agents, groups...)
	for h := range agents {
		on(s.nodes.at(h), what)
	}
}

// hash is the state hash of what a live agent holds, who may or may not know rules.
func (s *state) hash(h uint32, rules bool) [32]byte {
	groups := s.reach.reached(h)
	var sum entry.Sum
	for _, path := range groups {
		sum.AddSum(s.reach.groups[path].sum)
		if rules {
			sum.AddSum(s.reach.groups[path].rules)
		}
	}
	for name := range s.heldBundles(groups) {
		sum.Add(s.bodies[name])
	}
	return sum.Bytes()
}

// heldBundles returns the trust domains whose bundles an agent holds that
// reaches these groups: its own, and those that are named and known (RG60).
func (s *state) heldBundles(groups []uint32) map[string]struct{} {
	names := s.reach.federates(groups)
	names[s.td.Name()] = struct{}{}
	for name := range names {
		if _, known := s.bodies[name]; !known {
			delete(names, name)
		}
	}
	return names
}

// live returns the handle of an agent that is there and not banned.
func (s *state) live(agent spiffeid.ID) (uint32, bool) {
	if !agent.MemberOf(s.td) {
		return 0, false
	}
	h, ok := s.nodes.byPath[agent.Path()]
	return h, ok && s.nodes.at(h).live
}

func (s *state) bundle(name string) (*bundle.Bundle, bool) {
	v, ok := s.values[kindBundle][name]
	if !ok {
		return nil, false
	}
	b, err := readBundle(name, v.payload)
	if err != nil {
		panic("registry: a bundle that was read once cannot be read: " + err.Error())
	}
	return b, true
}

// keyHash is what a key adds to the digest.
func keyHash(key string, rev uint64) [32]byte {
	return sha256.Sum256(binary.BigEndian.AppendUint64(append(make([]byte, 0, 256), key...), rev))
}

// contentHash reads the name of a content key.
func contentHash(name string) (hash [32]byte, ok bool) {
	if len(name) != hex.EncodedLen(len(hash)) || strings.ContainsAny(name, "ABCDEF") { // one text for one hash
		return hash, false
	}
	_, err := hex.Decode(hash[:], []byte(name))
	return hash, err == nil
}
