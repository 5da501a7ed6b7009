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
	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
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
	maxSeconds      = 1<<31 - 1
	maxTime         = 253402300799 // Unix seconds: the end of the year 9999
)

// declarations is what a file of server apply holds.
type declarations struct {
	owner string
	items []declaredItem
}

// declaredItem is one entry or rule.
type declaredItem struct {
	line int
	item *applyv1.Item
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
		"rules":   f.list("rules", func(n *yaml.Node) error { return f.rule(n, d) }),
	})
	if err == nil && len(d.items) == 0 && !f.says(root, "entries") && !f.says(root, "rules") {
		err = f.errorf(root, "there are neither entries nor rules").Fix("write 'entries: []' if there shall be none")
	}
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

// says reports whether an object has a key.
func (f fileReader) says(n *yaml.Node, key string) bool {
	for i := 0; i < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return true
		}
	}
	return false
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
	e := &applyv1.Entry{}
	var x509TTL, jwtTTL int64
	err := f.object(n, "entries", fields{
		"entry_id": f.text(&e.Id), "spiffe_id": f.text(&e.SpiffeId), "parent_id": f.text(&e.ParentId),
		"selectors": f.list("selectors", func(n *yaml.Node) error {
			kind, value, err := f.selector(n)
			e.Selectors = append(e.Selectors, &applyv1.Selector{Type: kind, Value: value})
			return err
		}),
		"x509_svid_ttl": f.number(&x509TTL, maxSeconds), "jwt_svid_ttl": f.number(&jwtTTL, maxSeconds),
		"federates_with": f.texts("federates_with", &e.FederatesWith), "dns_names": f.texts("dns_names", &e.DnsNames), "hint": f.text(&e.Hint),
		"admin": f.truth(&e.Admin), "downstream": f.truth(&e.Downstream), "store_svid": f.truth(&e.StoreSvid),
		"disable_x509_svid_prefetch": f.truth(&e.DisableX509SvidPrefetch), "jwt_svid_include_jti": f.truth(&e.JwtSvidIncludeJti),
		"entryExpiry": f.number(&e.ExpiresAt, maxTime),
	}, "spiffe_id", "parent_id", "selectors")
	e.X509SvidTtl, e.JwtSvidTtl = int32(x509TTL), int32(jwtTTL)
	if err != nil {
		return err
	}
	return f.add(n, d, &applyv1.Item{Want: &applyv1.Item_Entry{Entry: e}})
}

// rule reads one rule.
func (f fileReader) rule(n *yaml.Node, d *declarations) error {
	r := &rulev1.Rule{}
	var x509TTL, jwtTTL int64
	err := f.object(n, "rules", fields{
		"rule_id": f.text(&r.Id), "id_template": f.text(&r.IdTemplate), "id_prefix": f.text(&r.IdPrefix), "trust": f.text(&r.Trust),
		"parent_id": f.text(&r.ParentId),
		"selectors": f.list("selectors", func(n *yaml.Node) error {
			kind, value, err := f.selector(n)
			r.Selectors = append(r.Selectors, &rulev1.Selector{Type: kind, Value: value})
			return err
		}),
		"x509_svid_ttl": f.number(&x509TTL, maxSeconds), "jwt_svid_ttl": f.number(&jwtTTL, maxSeconds),
		"federates_with": f.texts("federates_with", &r.FederatesWith), "hint": f.text(&r.Hint), "ruleExpiry": f.number(&r.ExpiresAt, maxTime),
	}, "id_template", "parent_id", "selectors")
	r.X509SvidTtl, r.JwtSvidTtl = int32(x509TTL), int32(jwtTTL)
	if err != nil {
		return err
	}
	return f.add(n, d, &applyv1.Item{Want: &applyv1.Item_Rule{Rule: r}})
}

func (f fileReader) add(n *yaml.Node, d *declarations, item *applyv1.Item) error {
	if len(d.items) == maxDeclared {
		return f.errorf(n, "there are more than %d objects", maxDeclared).Fix("split the file, and give each part its owner")
	}
	d.items = append(d.items, declaredItem{n.Line, item})
	return nil
}

// selector reads "TYPE:VALUE" or an object of type and value.
func (f fileReader) selector(n *yaml.Node) (kind, value string, err error) {
	if n.Kind == yaml.MappingNode {
		return kind, value, f.object(n, "selectors", fields{"type": f.text(&kind), "value": f.text(&value)}, "type", "value")
	}
	var text string
	if err := f.text(&text)(n); err != nil {
		return "", "", err
	}
	kind, value, ok := strings.Cut(text, ":")
	if !ok {
		return "", "", f.errorf(n, "the selector %q has no colon", cut(text)).Fix("write it as TYPE:VALUE, such as unix:uid:1000")
	}
	return kind, value, nil
}

// distinct refuses two objects that would be one: the server is asked in groups
// and would not see it.
func (f fileReader) distinct(d *declarations) error {
	ids, contents := map[string]int{}, map[[32]byte]int{}
	for _, one := range d.items {
		at := &yaml.Node{Line: one.line}
		e, err := contentOf(one.item)
		if err != nil {
			return f.at(at, err)
		}
		hash := entry.ContentHash(e)
		if first := contents[hash]; first != 0 {
			return f.errorf(at, "what stands in line %d has this parent, SPIFFE ID or template, and selectors too", first)
		}
		if first := ids[e.ID]; first != 0 {
			return f.errorf(at, "what stands in line %d has the id %q too", first, e.ID)
		}
		if contents[hash] = one.line; e.ID != "" {
			ids[e.ID] = one.line
		}
	}
	return nil
}

// contentOf reads what makes an object another than the rest.
func contentOf(item *applyv1.Item) (*entry.Entry, error) {
	e := &entry.Entry{}
	parent := ""
	var err error
	switch want := item.GetWant().(type) {
	case *applyv1.Item_Entry:
		e.ID, parent = want.Entry.GetId(), want.Entry.GetParentId()
		if e.SPIFFEID, err = identity.Parse(want.Entry.GetSpiffeId()); err != nil {
			return nil, err
		}
		for _, s := range want.Entry.GetSelectors() {
			e.Selectors = append(e.Selectors, entry.Selector{Type: s.GetType(), Value: s.GetValue()})
		}
	case *applyv1.Item_Rule:
		e.ID, parent = want.Rule.GetId(), want.Rule.GetParentId()
		for _, s := range want.Rule.GetSelectors() {
			e.Selectors = append(e.Selectors, entry.Selector{Type: s.GetType(), Value: s.GetValue()})
		}
	}
	if e.ParentID, err = identity.Parse(parent); err != nil {
		return nil, err
	}
	if rule := item.GetRule(); rule != nil {
		e.Rule, err = entry.ParseRule(e.ParentID.TrustDomain(), rule.GetIdTemplate(), rule.GetIdPrefix(), rule.GetTrust())
		if err != nil {
			return nil, err
		}
	}
	e.Selectors, err = entry.NormalizeSelectors(e.Selectors)
	return e, err
}
