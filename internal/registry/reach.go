package registry

import (
	"iter"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/entry"
)

// reach says which agents get which entries. Entries with one parent form a
// group. An agent reaches the group of its own path, the groups of its aliases,
// and from each group the groups of the SPIFFE IDs that its entries give. What
// an agent is given is the sum of the groups it reaches.
//
// Nothing is stored per pair of agent and entry: a change walks from its group
// back to the agents, so it costs what it affects.
type reach struct {
	rows    *rows
	nodes   *nodes
	groups  map[uint32]*group              // by path symbol; each has an entry
	aliases map[uint32]*alias              // by entry handle
	filed   map[uint32][]uint32            // by selector symbol: the aliases filed under it
	showing map[uint32]map[uint32]struct{} // by selector symbol: the live nodes with it
	at      map[uint32]uint32              // by path symbol: the live node there
	naming  map[string]map[uint32]struct{} // by trust domain name: the groups that federate with it
	visits  int                            // groups, entries and nodes that changes looked at; tests read it
}

// group is the entries with one parent.
type group struct {
	first     uint32         // list by nextChild
	n         int            // its length
	sum       entry.Sum      // of the bodies of entries
	rules     entry.Sum      // of the bodies of rules
	out       map[uint32]int // groups that entries of this one lead to, and how many do
	federates map[string]int // trust domains that entries name, and how many do
}

// alias is an entry that names nodes.
type alias struct {
	filed uint32 // the selector it is filed under
	nodes map[uint32]struct{}
}

func newReach(r *rows, n *nodes) *reach {
	return &reach{
		rows: r, nodes: n,
		groups:  make(map[uint32]*group),
		aliases: make(map[uint32]*alias),
		filed:   make(map[uint32][]uint32),
		showing: make(map[uint32]map[uint32]struct{}),
		at:      make(map[uint32]uint32),
		naming:  make(map[string]map[uint32]struct{}),
	}
}

// link takes an entry into the index.
func (x *reach) link(h uint32) {
	row := x.rows.at(h)
	isAlias := row.flags&flagAlias != 0
	g := x.groups[row.parent]
	if g == nil {
		g = &group{}
		x.groups[row.parent] = g
		x.redirect(row.parent, +1)
	}
	row.prevChild, row.nextChild = 0, g.first
	if g.first != 0 {
		x.rows.at(g.first).prevChild = h
	}
	g.first = h
	g.n++
	if isAlias {
		x.linkAlias(h)
		return
	}
	g.sumOf(row).Add(row.sum)
	if x.groups[row.path] != nil {
		g.lead(row.path, +1)
	}
	for _, td := range x.rows.domains(row.federates) {
		if g.federates == nil {
			g.federates = make(map[string]int)
		}
		if g.federates[td.Name()]++; g.federates[td.Name()] == 1 {
			put(x.naming, td.Name(), row.parent)
		}
	}
}

// unlink takes an entry out of the index.
func (x *reach) unlink(h uint32) {
	row := x.rows.at(h)
	g := x.groups[row.parent]
	if row.nextChild != 0 {
		x.rows.at(row.nextChild).prevChild = row.prevChild
	}
	if row.prevChild != 0 {
		x.rows.at(row.prevChild).nextChild = row.nextChild
	} else {
		g.first = row.nextChild
	}
	g.n--
	if row.flags&flagAlias != 0 {
		x.unlinkAlias(h)
	} else {
		g.sumOf(row).Sub(row.sum)
		if x.groups[row.path] != nil {
			g.lead(row.path, -1)
		}
		for _, td := range x.rows.domains(row.federates) {
			if g.federates[td.Name()]--; g.federates[td.Name()] == 0 {
				delete(g.federates, td.Name())
				remove(x.naming, td.Name(), row.parent)
			}
		}
	}
	if g.n == 0 {
		delete(x.groups, row.parent)
		x.redirect(row.parent, -1)
	}
}

// redirect tells the groups with entries that give this path that it has
// become a group, or is none any more. No entry is its own parent, so the entry
// that caused this is not among them.
func (x *reach) redirect(path uint32, by int) {
	for h := range x.rows.withPath(path) {
		x.visits++
		if row := x.rows.at(h); row.flags&flagAlias == 0 {
			x.groups[row.parent].lead(path, by)
		}
	}
}

// sumOf returns the sum that a row counts in.
func (g *group) sumOf(row *row) *entry.Sum {
	if row.flags&flagRule != 0 {
		return &g.rules
	}
	return &g.sum
}

func (g *group) lead(to uint32, by int) {
	if g.out == nil {
		g.out = make(map[uint32]int)
	}
	if g.out[to] += by; g.out[to] == 0 {
		delete(g.out, to)
	}
}

// linkAlias files an alias under the selector that the fewest others are filed
// under, and finds its nodes.
func (x *reach) linkAlias(h uint32) {
	syms := x.rows.sets.symbols(x.rows.at(h).set)
	least := slices.MinFunc(syms, func(a, b uint32) int { return len(x.filed[a]) - len(x.filed[b]) })
	a := &alias{filed: least, nodes: x.matching(syms)}
	x.filed[least] = append(x.filed[least], h)
	x.aliases[h] = a
	for n := range a.nodes {
		x.nodes.at(n).aliases[h] = struct{}{}
	}
}

func (x *reach) unlinkAlias(h uint32) {
	a := x.aliases[h]
	for n := range a.nodes {
		delete(x.nodes.at(n).aliases, h)
	}
	list := x.filed[a.filed]
	i := slices.Index(list, h)
	list[i] = list[len(list)-1]
	if x.filed[a.filed] = list[:len(list)-1]; len(list) == 1 {
		delete(x.filed, a.filed)
	}
	delete(x.aliases, h)
}

// matching returns the live nodes that show all of these selectors.
func (x *reach) matching(syms []uint32) map[uint32]struct{} {
	rarest := slices.MinFunc(syms, func(a, b uint32) int { return len(x.showing[a]) - len(x.showing[b]) })
	nodes := make(map[uint32]struct{})
	for n := range x.showing[rarest] {
		x.visits++
		if x.shows(n, syms) {
			nodes[n] = struct{}{}
		}
	}
	return nodes
}

func (x *reach) shows(n uint32, syms []uint32) bool {
	for _, sym := range syms {
		if _, ok := x.showing[sym][n]; !ok {
			return false
		}
	}
	return true
}

// linkNode takes a live node into the index.
func (x *reach) linkNode(n uint32) {
	node := x.nodes.at(n)
	x.at[node.sym] = n
	for _, sym := range node.selectors {
		put(x.showing, sym, n)
	}
	for _, sym := range node.selectors {
		for _, h := range x.filed[sym] {
			x.visits++
			if x.shows(n, x.rows.sets.symbols(x.rows.at(h).set)) {
				x.aliases[h].nodes[n] = struct{}{}
				node.aliases[h] = struct{}{}
			}
		}
	}
}

func (x *reach) unlinkNode(n uint32) {
	node := x.nodes.at(n)
	delete(x.at, node.sym)
	for _, sym := range node.selectors {
		remove(x.showing, sym, n)
	}
	for h := range node.aliases {
		delete(x.aliases[h].nodes, n)
	}
	clear(node.aliases)
}

// back adds to agents all live nodes that reach any of these groups, whether
// or not a group has entries yet.
func (x *reach) back(agents map[uint32]struct{}, paths ...uint32) {
	seen := make(map[uint32]struct{}, len(paths))
	for len(paths) > 0 {
		path := paths[len(paths)-1]
		paths = paths[:len(paths)-1]
		if _, again := seen[path]; again {
			continue
		}
		seen[path] = struct{}{}
		x.visits++
		if n, ok := x.at[path]; ok {
			agents[n] = struct{}{}
		}
		for h := range x.rows.withPath(path) {
			x.visits++
			if a := x.aliases[h]; a != nil {
				for n := range a.nodes {
					x.visits++
					agents[n] = struct{}{}
				}
				continue
			}
			paths = append(paths, x.rows.at(h).parent)
		}
	}
}

// reached returns the groups that a live node reaches, each once.
func (x *reach) reached(n uint32) []uint32 {
	node := x.nodes.at(n)
	return x.from(node.sym, node.aliases)
}

// named returns the aliases that name a node, banned or not.
func (x *reach) named(n *node) map[uint32]struct{} {
	if n.live {
		return n.aliases
	}
	aliases := make(map[uint32]struct{})
	for _, sym := range n.selectors {
		for _, h := range x.filed[sym] {
			if !slices.ContainsFunc(x.rows.sets.symbols(x.rows.at(h).set), func(s uint32) bool { return !slices.Contains(n.selectors, s) }) {
				aliases[h] = struct{}{}
			}
		}
	}
	return aliases
}

// from returns the groups that a path and aliases lead to, each once.
func (x *reach) from(sym uint32, aliases map[uint32]struct{}) []uint32 {
	var found []uint32
	var seen map[uint32]struct{} // only for long lists
	add := func(path uint32) {
		if x.groups[path] == nil {
			return
		}
		if seen == nil && len(found) < 16 {
			if slices.Contains(found, path) {
				return
			}
		} else {
			if seen == nil {
				seen = make(map[uint32]struct{}, 64)
				for _, p := range found {
					seen[p] = struct{}{}
				}
			}
			if _, again := seen[path]; again {
				return
			}
			seen[path] = struct{}{}
		}
		found = append(found, path)
	}
	add(sym)
	for h := range aliases {
		add(x.rows.at(h).path)
	}
	for i := 0; i < len(found); i++ {
		for path := range x.groups[found[i]].out {
			add(path)
		}
	}
	return found
}

// granted yields the entries of groups, those that are there.
func (x *reach) granted(groups []uint32) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for _, path := range groups {
			g := x.groups[path]
			if g == nil {
				continue
			}
			for h := g.first; h != 0; h = x.rows.at(h).nextChild {
				if !yield(h) {
					return
				}
			}
		}
	}
}

// grants reports whether an entry is in one of these groups. An alias never
// is: nothing reaches the server's path.
func (x *reach) grants(groups []uint32, h uint32) bool {
	return slices.Contains(groups, x.rows.at(h).parent)
}

// federates returns the names of the trust domains that a node's entries name.
func (x *reach) federates(groups []uint32) map[string]struct{} {
	names := make(map[string]struct{})
	for _, path := range groups {
		for name := range x.groups[path].federates {
			names[name] = struct{}{}
		}
	}
	return names
}

// touched is what a change means for one agent.
type touched struct {
	entry   string   // an entry or a rule that changed, came or went; empty: none
	rule    bool     // it is a rule
	domains []string // trust domains whose bundle changed or may be named anew or no more
	groups  []uint32 // groups gained or lost, with all their entries
	whole   bool     // the agent itself came or went: everything is to be looked at
}

// observer hears of each agent that a change affects, after the change.
type observer func(agent *node, what touched)

// change runs apply, which links, replaces or unlinks one entry, and tells
// which agents that affects. was is the entry's handle before, or 0; is is what
// it will be, or nil.
func (x *reach) change(was uint32, is *entry.Entry, apply func(), on observer) {
	if on == nil {
		apply()
		return
	}
	var old *row
	if was != 0 {
		old = x.rows.at(was)
	}
	// Agents that get the entry, before or after: they all hear of it.
	direct := make(map[uint32]struct{})
	var domains []string
	id := ""
	rule := old != nil && old.flags&flagRule != 0 || is != nil && is.Rule != nil
	wasAlias := old != nil && old.flags&flagAlias != 0
	if old != nil && !wasAlias {
		id = x.rows.id(was)
		x.back(direct, old.parent)
		domains = names(x.rows.domains(old.federates))
	}
	if is != nil && !is.Alias() {
		id = is.ID
		if sym := x.rows.paths.find(is.ParentID.Path()); sym != 0 {
			x.back(direct, sym)
		}
		if old != nil && string(x.rows.paths.bytes(old.parent)) == is.ParentID.Path() {
			domains = difference(domains, names(is.FederatesWith))
		} else {
			domains = append(domains, names(is.FederatesWith)...)
		}
	}
	// Agents that may gain or lose whole groups, because the entry is an alias or
	// gives an ID that is a parent.
	asked := make(map[uint32]struct{})
	if moved := !x.sameShape(old, is); moved {
		if wasAlias {
			for n := range x.aliases[was].nodes {
				asked[n] = struct{}{}
			}
		}
		if is != nil && is.Alias() {
			if syms, known := x.symbols(is.Selectors); known {
				for n := range x.matching(syms) {
					asked[n] = struct{}{}
				}
			}
		}
		leads := old != nil && x.groups[old.path] != nil
		if is != nil && !leads {
			sym := x.rows.paths.find(is.SPIFFEID.Path())
			leads = sym != 0 && x.groups[sym] != nil
		}
		if leads {
			for n := range direct {
				asked[n] = struct{}{}
			}
		}
	}
	before := make(map[uint32][]uint32, len(asked))
	for n := range asked {
		before[n] = x.reached(n)
		x.visits += 1 + len(before[n])
	}

	apply()

	if wasAlias && is != nil && !is.Alias() { // who came to its parent through it does not any more
		clear(direct)
		x.back(direct, x.rows.paths.find(is.ParentID.Path()))
	}
	for n := range direct {
		if _, both := asked[n]; !both {
			on(x.nodes.at(n), touched{entry: id, rule: rule, domains: domains})
		}
	}
	for n := range asked {
		after := x.reached(n)
		x.visits += 1 + len(after)
		groups := difference(before[n], after)
		if _, both := direct[n]; both {
			on(x.nodes.at(n), touched{entry: id, rule: rule, domains: domains, groups: groups})
		} else if len(groups) > 0 {
			on(x.nodes.at(n), touched{groups: groups})
		}
	}
}

// sameShape reports whether a change leaves every path of reach as it is.
func (x *reach) sameShape(old *row, is *entry.Entry) bool {
	if old == nil || is == nil {
		return false
	}
	if string(x.rows.paths.bytes(old.path)) != is.SPIFFEID.Path() || string(x.rows.paths.bytes(old.parent)) != is.ParentID.Path() {
		return false
	}
	return !is.Alias() || slices.Equal(x.rows.sets.selectors(old.set), is.Selectors)
}

// symbols returns the symbols of selectors; known is false if one has none.
func (x *reach) symbols(sels []entry.Selector) (syms []uint32, known bool) {
	for _, s := range sels {
		sym := x.rows.sets.texts.find(s.String())
		if sym == 0 {
			return nil, false
		}
		syms = append(syms, sym)
	}
	return syms, true
}

func names(tds []spiffeid.TrustDomain) []string {
	var out []string
	for _, td := range tds {
		out = append(out, td.Name())
	}
	return out
}

// difference returns what is in one list only.
func difference[T comparable](a, b []T) []T {
	in := make(map[T]int, len(a)+len(b))
	for _, v := range a {
		in[v]++
	}
	for _, v := range b {
		in[v]--
	}
	var out []T
	for v, n := range in {
		if n != 0 {
			out = append(out, v)
		}
	}
	return out
}

func put[K comparable](m map[K]map[uint32]struct{}, k K, v uint32) {
	if m[k] == nil {
		m[k] = make(map[uint32]struct{})
	}
	m[k][v] = struct{}{}
}

func remove[K comparable](m map[K]map[uint32]struct{}, k K, v uint32) {
	if delete(m[k], v); len(m[k]) == 0 {
		delete(m, k)
	}
}
