package registry

import (
	"iter"
	"strings"
)

// nodes holds the agents. They are far fewer than entries and are ordinary
// values; handles serve the index. Handle 0 is none.
type nodes struct {
	list   []*node
	free   []uint32
	byPath map[string]uint32
	order  order // by path
}

type node struct {
	path      string
	hash      uint64 // of path, as in rosters
	revision  uint64
	payload   []byte // a statev1.Node
	live      bool   // not banned
	follows   bool
	until     int64  // Unix seconds; when the last of its certificates ends
	sym       uint32 // of path
	selectors []uint32
	aliases   map[uint32]struct{} // handles of the aliases that name it; kept by reach
	touched   uint64              // kept by touches
}

func newNodes() *nodes {
	return &nodes{list: make([]*node, 1), byPath: make(map[string]uint32)}
}

func (n *nodes) at(h uint32) *node { return n.list[h] }

func (n *nodes) find(path string) *node { return n.list[n.byPath[path]] }

func (n *nodes) add(node *node) uint32 {
	var h uint32
	if last := len(n.free) - 1; last >= 0 {
		h, n.free = n.free[last], n.free[:last]
		n.list[h] = node
	} else {
		h = uint32(len(n.list))
		n.list = append(n.list, node)
	}
	n.byPath[node.path] = h
	n.order.insert(h, n.comparePath(node.path))
	return h
}

func (n *nodes) drop(path string) {
	h := n.byPath[path]
	n.order.remove(n.comparePath(path))
	delete(n.byPath, path)
	n.list[h] = nil
	n.free = append(n.free, h)
}

// after yields the nodes whose path is greater.
func (n *nodes) after(path string) iter.Seq[*node] {
	return func(yield func(*node) bool) {
		for h := range n.order.from(func(h uint32) int {
			if n.list[h].path > path {
				return 1
			}
			return -1
		}) {
			if !yield(n.list[h]) {
				return
			}
		}
	}
}

func (n *nodes) comparePath(path string) func(uint32) int {
	return func(h uint32) int { return strings.Compare(n.list[h].path, path) }
}
