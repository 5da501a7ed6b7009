package config

import "strings"

// Node is a piece of a configuration file as it was written: a value or a
// block. It is how a key is kept whose meaning is known only later, such as
// plugin_data. The zero Node stands for a key that is absent.
type Node struct {
	file  string
	block string // path of the enclosing blocks, for errors: "plugins.KeyManager.disk"
	line  int
	kind  kind
	text  string // the value of a scalar
	list  []Node // the elements of a list
	items []item // the content of a block, in file order
}

// item is one `key = value` or `key "label" … { … }`. Labels are kept as nested
// blocks, which is what they mean in HCL 1 and how JSON writes them.
type item struct {
	key      string
	line     int
	labelled bool // labels stood on the line of the key
	value    Node
}

type kind uint8

const (
	absent kind = iota
	str
	integer
	float
	boolean
	list
	object
)

func (k kind) String() string {
	return [...]string{"nothing", "a string", "a whole number", "a number with a decimal point", "true or false", "a list", "a block"}[k]
}

// Present reports whether the key was in the file.
func (n Node) Present() bool { return n.kind != absent }

// String returns the type's name: a file may hold secrets.
func (Node) String() string { return "config.Node" }

// GoString is String.
func (n Node) GoString() string { return n.String() }

// Name returns the string that the node is, or the label of the block that it
// is: "a" for both `key = "a"` and `key "a" { … }`. Else it is empty.
func (n Node) Name() string {
	if n.kind == object && len(n.items) == 1 {
		return n.items[0].key
	}
	if n.kind == str {
		return n.text
	}
	return ""
}

// Line returns the line the node begins at, 0 if it is absent.
func (n Node) Line() int { return n.line }

// Decode stores the node, which must be a block or absent, in dst; see the
// function Decode.
func (n Node) Decode(dst any) error {
	found := &faults{file: n.file}
	if n.kind == absent {
		n = Node{kind: object, line: n.line, file: n.file, block: n.block}
	}
	decodeRoot(found, n, dst)
	return found.err()
}

// Fault returns an error about the node: its file and line, its key and the text.
func (n Node) Fault(format string, args ...any) error {
	found := &faults{file: n.file}
	found.add(n.line, n.block, format, args...)
	return found.err()
}

// LineOf returns the line of the key that a path such as "server.bind_port"
// names, or of the innermost block on the way to it that is there.
func (n Node) LineOf(path string) int {
	line, _ := n.follow(path)
	return line
}

// Has reports whether the key that a path names is there.
func (n Node) Has(path string) bool {
	_, depth := n.follow(path)
	return depth == strings.Count(path, ".")+1
}

// follow is LineOf, and how many keys of the path are there. Of blocks of the
// same name it takes the one that leads farthest.
func (n Node) follow(path string) (line, depth int) {
	line = n.line
	key, rest, more := strings.Cut(path, ".")
	for _, it := range n.items {
		if it.key != key {
			continue
		}
		if depth == 0 {
			line, depth = it.line, 1
		}
		blocks := []Node{it.value}
		if it.value.kind == list {
			blocks = it.value.list
		}
		for _, b := range blocks {
			if b.kind != object || !more {
				continue
			}
			b.line = it.line
			if l, d := b.follow(rest); d+1 > depth {
				line, depth = l, d+1
			}
		}
	}
	return line, depth
}
