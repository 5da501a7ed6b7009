package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	applyv1 "github.com/plastron/plastron/api/plastron/apply/v1"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/strictjson"
	"go.yaml.in/yaml/v3"
)

const (
	maxDeclarations = 32 << 20 // bytes of a file
	maxDeclared     = 100_000  // objects in it
)

// declarations is what a file of server apply holds.
type declarations struct {
	owner   string
	entries []declaredEntry
}

type declaredEntry struct {
	line  int
	entry *applyv1.Entry
}

// readDeclarations reads a file, or the standard input for "-", as YAML or JSON.
func readDeclarations(path string, stdin io.Reader) (*declarations, error) {
	name, from := path, path
	if path == "-" {
		name, from = "standard input", ""
	}
	src, err := readSmall(from, stdin, maxDeclarations)
	if err != nil {
		return nil, err
	}
	if len(src) > maxDeclarations {
		return nil, fault.New(fault.Invalid, "file_too_large", "%s is larger than %d MiB", name, maxDeclarations>>20).Fix("split it, and give each part its owner")
	}
	return parseDeclarations(name, src)
}

// parseDeclarations reads strictly: an unknown key, one that is there twice and a
// value of another type are errors, and what YAML has beyond data is refused.
func parseDeclarations(name string, src []byte) (*declarations, error) {
	f := fileReader{name}
	if !utf8.Valid(src) {
		return nil, fault.New(fault.Invalid, "file_invalid", "%s is not UTF-8 text", name)
	}
	read := f.yaml
	if trimmed := bytes.TrimSpace(src); len(trimmed) > 0 && trimmed[0] == '{' {
		read = f.json
	}
	root, err := read(src)
	if err != nil {
		return nil, err
	}
	d := &declarations{}
	err = f.object(root, "", fields{
		"owner":   f.text(&d.owner),
		"entries": f.list("entries", func(n *yaml.Node) error { return f.entry(n, d) }),
	}, "entries")
	if err != nil {
		return nil, err
	}
	return d, f.distinct(d)
}

// fileReader reads one file; its errors name the line.
type fileReader struct{ name string }

func (f fileReader) errorf(n *yaml.Node, format string, args ...any) *fault.Error {
	e := fault.New(fault.Invalid, "file_invalid", format, args...)
	e.Message = f.name + ":" + strconv.Itoa(n.Line) + ": " + e.Message
	return e
}

// at names the line of an error.
func (f fileReader) at(n *yaml.Node, err error) error {
	if err == nil {
		return nil
	}
	return about(f.name+":"+strconv.Itoa(n.Line), err)
}

func (f fileReader) yaml(src []byte) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(src))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, fault.New(fault.Invalid, "file_invalid", "%s is empty", f.name).Fix("write 'entries: []' if there shall be none")
	case err != nil:
		return nil, fault.New(fault.Invalid, "file_invalid", "%s: %s", f.name, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := f.plain(&doc); err != nil {
		return nil, err
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, f.errorf(&more, "the file holds more than one document")
	}
	return doc.Content[0], nil
}

// plain refuses what stands for something else: an alias could stand for
// gigabytes, and a tag for another type than it shows.
func (f fileReader) plain(n *yaml.Node) error {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		return f.errorf(n, "anchors and aliases are not read").Fix("write the value out")
	case n.Style&yaml.TaggedStyle != 0:
		return f.errorf(n, "tags such as %s are not read", n.Tag)
	}
	for _, child := range n.Content {
		if err := f.plain(child); err != nil {
			return err
		}
	}
	return nil
}

// json reads JSON into the same tree.
func (f fileReader) json(src []byte) (*yaml.Node, error) {
	if _, err := strictjson.Parse(src); err != nil { // what follows may then be lenient
		return nil, fault.New(fault.Invalid, "file_invalid", "%s: %v", f.name, err)
	}
	dec := json.NewDecoder(bytes.NewReader(src))
	dec.UseNumber()
	line, seen := 1, 0
	var value func() (*yaml.Node, error)
	value = func() (*yaml.Node, error) {
		token, err := dec.Token()
		if err != nil {
			return nil, err
		}
		at := int(dec.InputOffset())
		line, seen = line+bytes.Count(src[seen:at], []byte("\n")), at
		n := &yaml.Node{Kind: yaml.ScalarNode, Line: line}
		switch t := token.(type) {
		case json.Delim:
			n.Kind = yaml.SequenceNode
			if t == '{' {
				n.Kind = yaml.MappingNode
			}
			for dec.More() {
				child, err := value() // of an object: its names and values in turn
				if err != nil {
					return nil, err
				}
				n.Content = append(n.Content, child)
			}
			_, err = dec.Token()
		case string:
			n.Tag, n.Value = "!!str", t
		case json.Number:
			n.Tag, n.Value = "!!int", t.String()
		case bool:
			n.Tag, n.Value = "!!bool", strconv.FormatBool(t)
		default:
			n.Tag = "!!null"
		}
		return n, err
	}
	return value()
}

// fields says how the value of each key is read.
type fields map[string]func(*yaml.Node) error

// object reads an object; where is the key that it stands under.
func (f fileReader) object(n *yaml.Node, where string, known fields, required ...string) error {
	if where != "" {
		where += ": "
	}
	if n.Kind != yaml.MappingNode {
		return f.errorf(n, "%swant an object of keys and values", where)
	}
	var names []string
	for name := range known {
		names = append(names, name)
	}
	lines := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		read, ok := known[key.Value]
		if key.Kind != yaml.ScalarNode || !ok {
			e := f.errorf(key, "%sunknown key %q", where, cut(key.Value))
			if nearest := config.Nearest(key.Value, names); nearest != "" {
				return e.Fix("did you mean %q?", nearest)
			}
			slices.Sort(names)
			return e.Fix("there are %s", strings.Join(names, ", "))
		}
		if first := lines[key.Value]; first != 0 {
			return f.errorf(key, "%sthe key %q is there already, in line %d", where, key.Value, first)
		}
		lines[key.Value] = key.Line
		if err := read(value); err != nil {
			return err
		}
	}
	for _, name := range required {
		if lines[name] == 0 {
			return f.errorf(n, "%sthe key %q is missing", where, name)
		}
	}
	return nil
}

func cut(text string) string { return text[:min(len(text), 100)] }

func (f fileReader) list(where string, each func(*yaml.Node) error) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		if n.Kind != yaml.SequenceNode {
			return f.errorf(n, "%s: want a list", where)
		}
		for _, item := range n.Content {
			if err := each(item); err != nil {
				return err
			}
		}
		return nil
	}
}

func (f fileReader) text(to *string) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
			return f.errorf(n, "want text; write it in quotes")
		}
		*to = n.Value
		return nil
	}
}

func (f fileReader) texts(where string, to *[]string) func(*yaml.Node) error {
	return f.list(where, func(n *yaml.Node) error {
		var one string
		err := f.text(&one)(n)
		*to = append(*to, one)
		return err
	})
}

func (f fileReader) number(to *int64, limit int64) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		v, err := strconv.ParseInt(n.Value, 10, 64)
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || err != nil || v < 0 || v > limit || strconv.FormatInt(v, 10) != n.Value {
			return f.errorf(n, "want a whole number from 0 to %d", limit)
		}
		*to = v
		return nil
	}
}

func (f fileReader) truth(to *bool) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" || n.Value != "true" && n.Value != "false" {
			return f.errorf(n, "want true or false")
		}
		*to = n.Value == "true"
		return nil
	}
}

// entry reads one entry. Its keys are those of entry create -data.
func (f fileReader) entry(n *yaml.Node, d *declarations) error {
	if len(d.entries) == maxDeclared {
		return f.errorf(n, "there are more than %d entries", maxDeclared).Fix("split the file, and give each part its owner")
	}
	e := &applyv1.Entry{}
	const seconds = 1<<31 - 1
	var x509TTL, jwtTTL int64
	err := f.object(n, "entries", fields{
		"entry_id": f.text(&e.Id), "spiffe_id": f.text(&e.SpiffeId), "parent_id": f.text(&e.ParentId),
		"selectors":     f.list("selectors", func(n *yaml.Node) error { return f.selector(n, e) }),
		"x509_svid_ttl": f.number(&x509TTL, seconds), "jwt_svid_ttl": f.number(&jwtTTL, seconds),
		"federates_with": f.texts("federates_with", &e.FederatesWith), "dns_names": f.texts("dns_names", &e.DnsNames), "hint": f.text(&e.Hint),
		"admin": f.truth(&e.Admin), "downstream": f.truth(&e.Downstream), "store_svid": f.truth(&e.StoreSvid),
		"disable_x509_svid_prefetch": f.truth(&e.DisableX509SvidPrefetch), "jwt_svid_include_jti": f.truth(&e.JwtSvidIncludeJti),
		"entryExpiry": f.number(&e.ExpiresAt, 253402300799),
	}, "spiffe_id", "parent_id", "selectors")
	e.X509SvidTtl, e.JwtSvidTtl = int32(x509TTL), int32(jwtTTL)
	d.entries = append(d.entries, declaredEntry{n.Line, e})
	return err
}

// selector reads "TYPE:VALUE" or an object of type and value.
func (f fileReader) selector(n *yaml.Node, e *applyv1.Entry) error {
	s := &applyv1.Selector{}
	e.Selectors = append(e.Selectors, s)
	if n.Kind == yaml.MappingNode {
		return f.object(n, "selectors", fields{"type": f.text(&s.Type), "value": f.text(&s.Value)}, "type", "value")
	}
	var text string
	if err := f.text(&text)(n); err != nil {
		return err
	}
	var ok bool
	if s.Type, s.Value, ok = strings.Cut(text, ":"); !ok {
		return f.errorf(n, "the selector %q has no colon", cut(text)).Fix("write it as TYPE:VALUE, such as unix:uid:1000")
	}
	return nil
}

// distinct refuses two entries that would be one: the server is asked in groups
// and would not see it.
func (f fileReader) distinct(d *declarations) error {
	ids, contents := map[string]int{}, map[[32]byte]int{}
	for _, one := range d.entries {
		at := &yaml.Node{Line: one.line}
		e := entry.Entry{}
		var err error
		if e.SPIFFEID, err = identity.Parse(one.entry.GetSpiffeId()); err != nil {
			return f.at(at, err)
		}
		if e.ParentID, err = identity.Parse(one.entry.GetParentId()); err != nil {
			return f.at(at, err)
		}
		for _, s := range one.entry.GetSelectors() {
			e.Selectors = append(e.Selectors, entry.Selector{Type: s.GetType(), Value: s.GetValue()})
		}
		if e.Selectors, err = entry.NormalizeSelectors(e.Selectors); err != nil {
			return f.at(at, err)
		}
		hash := entry.ContentHash(&e)
		if first := contents[hash]; first != 0 {
			return f.errorf(at, "the entry in line %d has this parent, SPIFFE ID and selectors too", first)
		}
		if first := ids[one.entry.GetId()]; first != 0 {
			return f.errorf(at, "the entry in line %d has the entry_id %q too", first, one.entry.GetId())
		}
		if contents[hash] = one.line; one.entry.GetId() != "" {
			ids[one.entry.GetId()] = one.line
		}
	}
	return nil
}
