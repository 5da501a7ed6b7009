package x509pop

import (
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/template"
	"text/template/parse"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Sizes in bytes. No ID may be longer than 2,048, so no path can.
const (
	maxTemplate = 4 << 10
	maxPath     = 2 << 10
)

// What a template may call. There are no loops and no templates in templates,
// and no function returns more than maxPath, so a template of maxTemplate bytes
// does a bounded amount of work (F20). Nothing reads the server's surroundings (F19).
func functions() template.FuncMap {
	return template.FuncMap{
		"lower":      func(s string) (string, error) { return capped(strings.ToLower(s)) },
		"upper":      func(s string) (string, error) { return capped(strings.ToUpper(s)) },
		"trim":       strings.TrimSpace,
		"trimAll":    func(cut, s string) string { return strings.Trim(s, cut) },
		"trimPrefix": func(prefix, s string) string { return strings.TrimPrefix(s, prefix) },
		"trimSuffix": func(suffix, s string) string { return strings.TrimSuffix(s, suffix) },
		"contains":   func(part, s string) bool { return strings.Contains(s, part) },
		"hasPrefix":  func(prefix, s string) bool { return strings.HasPrefix(s, prefix) },
		"hasSuffix":  func(suffix, s string) bool { return strings.HasSuffix(s, suffix) },
		"default": func(otherwise, s string) string {
			if s == "" {
				return otherwise
			}
			return s
		},
		"trunc": func(n int, s string) (string, error) {
			if n < 0 {
				return "", errors.New("trunc of less than nothing")
			}
			return s[:min(n, len(s))], nil
		},
		"repeat": func(n int, s string) (string, error) {
			if n < 0 || n > maxPath || n*len(s) > maxPath {
				return "", errTooLong
			}
			return strings.Repeat(s, n), nil
		},
		"replace": func(from, to, s string) (string, error) {
			if n := strings.Count(s, from); from == "" || len(s)+n*(len(to)-len(from)) > maxPath {
				return "", errTooLong
			}
			return strings.ReplaceAll(s, from, to), nil
		},
		"join": func(separator string, list []string) (string, error) {
			size := 0
			for _, s := range list {
				size += len(separator) + len(s)
			}
			if size > maxPath {
				return "", errTooLong
			}
			return strings.Join(list, separator), nil
		},
		"sha256sum": func(s string) string {
			sum := sha256.Sum256([]byte(s))
			return hex.EncodeToString(sum[:])
		},
	}
}

// isBuiltin tells what text/template brings along and is offered too. The others
// print, format or escape without a bound, or call what they are given.
func isBuiltin(function string) bool {
	return slices.Contains([]string{"and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge", "len", "index", "slice"}, function)
}

var errTooLong = errors.New("the text becomes longer than an ID can be")

func capped(s string) (string, error) {
	if len(s) > maxPath {
		return "", errTooLong
	}
	return s, nil
}

// pathTemplate makes the agent's path of what the certificate says.
type pathTemplate struct {
	template *template.Template
	outside  bool // it may leave /x509pop, by the operator's explicit word
	sanKeys  []string
}

func parseTemplate(text string, outside bool) (*pathTemplate, error) {
	invalid := func(format string, args ...any) (*pathTemplate, error) {
		return nil, fault.New(fault.Invalid, "agent_path_template_invalid", "agent_path_template: %s", fmt.Sprintf(format, args...))
	}
	if len(text) > maxTemplate {
		return invalid("it is longer than %d bytes", maxTemplate)
	}
	t, err := template.New("agent_path_template").Option("missingkey=error").Funcs(functions()).Parse(text)
	if err != nil {
		return invalid("%v", err)
	}
	p := &pathTemplate{template: t, outside: outside}
	if len(t.Templates()) > 1 {
		return invalid("it defines templates, which is not offered")
	}
	if t.Tree == nil || t.Root == nil {
		return invalid("it is empty")
	}
	if err := p.check(t.Root); err != nil {
		return invalid("%v", err)
	}
	return p, nil
}

// check refuses what text/template has beyond fields, conditions and the
// functions above, and collects the keys of SAN pairs that are asked for.
func (p *pathTemplate) check(n parse.Node) error {
	switch n := n.(type) {
	case *parse.ListNode:
		if n == nil {
			return nil
		}
		return p.checkAll(n.Nodes)
	case *parse.TextNode, *parse.CommentNode, *parse.DotNode, *parse.NilNode, *parse.VariableNode,
		*parse.BoolNode, *parse.NumberNode, *parse.StringNode:
		return nil
	case *parse.ActionNode:
		return p.check(n.Pipe)
	case *parse.IfNode:
		return p.checkAll([]parse.Node{n.Pipe, n.List, n.ElseList})
	case *parse.WithNode:
		return p.checkAll([]parse.Node{n.Pipe, n.List, n.ElseList})
	case *parse.PipeNode:
		for _, c := range n.Cmds {
			if err := p.checkAll(c.Args); err != nil {
				return err
			}
		}
		return nil
	case *parse.ChainNode:
		return p.check(n.Node)
	case *parse.FieldNode:
		if len(n.Ident) == 2 && n.Ident[0] == "URISanSelectors" {
			p.sanKeys = append(p.sanKeys, n.Ident[1])
		}
		return nil
	case *parse.IdentifierNode:
		if _, ours := functions()[n.Ident]; ours || isBuiltin(n.Ident) {
			return nil
		}
		return fmt.Errorf("the function %q is not offered", n.Ident)
	}
	return fmt.Errorf("%q is not offered", n.String())
}

func (p *pathTemplate) checkAll(nodes []parse.Node) error {
	for _, n := range nodes {
		if err := p.check(n); err != nil {
			return err
		}
	}
	return nil
}

// path executes the template. The result lies below /spire/agent and begins
// with a slash; inside says that it lies below /spire/agent/x509pop, and then
// that part is taken off.
func (p *pathTemplate) path(d pathData) (path string, inside bool, err error) {
	refuse := func(why string, err error) (string, bool, error) {
		return "", false, fault.New(fault.Denied, "agent_path_invalid", "the agent path template yields no path for this node: %s", why).Because(err)
	}
	var out boundedText
	if err := p.template.Execute(&out, d); err != nil {
		return refuse("it cannot be evaluated", err)
	}
	path = "/" + strings.TrimPrefix(out.String(), "/")
	if err := spiffeid.ValidatePath(path); err != nil { // F21
		return refuse("the result is not the path of a SPIFFE ID", err)
	}
	if below, ok := strings.CutPrefix(path, "/"+Name); ok && strings.HasPrefix(below, "/") {
		return below, true, nil
	}
	if !p.outside {
		return refuse("the result does not lie below /"+Name, nil)
	}
	return path, false, nil
}

// sample is what the template would yield for a made-up certificate, so that a
// mistake shows when the server starts.
func (p *pathTemplate) sample(td spiffeid.TrustDomain) (string, error) {
	four := []string{"a", "b", "c", "d"}
	made := name{pkix.Name{CommonName: "common-name", SerialNumber: "1", Country: four, Organization: four, OrganizationalUnit: four,
		Locality: four, Province: four, StreetAddress: four, PostalCode: four}}
	d := pathData{PluginName: Name, TrustDomain: td.Name(), Fingerprint: strings.Repeat("0a", 20), SerialNumberHex: "0a0b",
		SVIDPathTrimmed: "node", Subject: made, Issuer: made, dns: four}
	for _, key := range p.sanKeys {
		if !slices.ContainsFunc(d.pairs, func(q pair) bool { return q.key == key }) {
			d.pairs = append(d.pairs, pair{key, "value"})
		}
	}
	path, inside, err := p.path(d)
	if err != nil {
		return "", fault.New(fault.Invalid, "agent_path_template_invalid", "agent_path_template: %v", err).
			Fix("begin it with /%s/, or set agent_path_outside = true if agents shall have IDs beside those", Name).Because(err)
	}
	if inside {
		path = "/" + Name + path
	}
	return "spiffe://" + td.Name() + "/spire/agent" + path, nil
}

// boundedText collects at most maxPath bytes.
type boundedText struct{ strings.Builder }

func (b *boundedText) Write(text []byte) (int, error) {
	if b.Len()+len(text) > maxPath {
		return 0, errTooLong
	}
	return b.Builder.Write(text)
}

// WriteString hides the Builder's, which has no bound.
func (b *boundedText) WriteString(text string) (int, error) { return b.Write([]byte(text)) }

// pathData is what a template sees. Names from the certificate are methods:
// they refuse a text with a slash, which would make several segments of one (A15).
type pathData struct {
	PluginName      string
	TrustDomain     string
	Fingerprint     string
	SerialNumberHex string
	SVIDPathTrimmed string // mode spiffe only; may have several segments
	Subject, Issuer name

	dns   []string
	pairs []pair
}

// DNSNames are the certificate's DNS names.
func (d pathData) DNSNames() ([]string, error) { return segments(d.dns) }

// URISanSelectors are the values of the certificate's SAN pairs by key.
func (d pathData) URISanSelectors() (map[string]string, error) {
	out := map[string]string{}
	for _, p := range d.pairs {
		value, err := segment(p.value)
		if err != nil {
			return nil, err
		}
		if before, twice := out[p.key]; twice && before != value {
			return nil, errors.New("the certificate has a SAN key with two values")
		}
		out[p.key] = value
	}
	return out, nil
}

type name struct{ of pkix.Name }

func (n name) CommonName() (string, error)           { return segment(n.of.CommonName) }
func (n name) SerialNumber() (string, error)         { return segment(n.of.SerialNumber) }
func (n name) Country() ([]string, error)            { return segments(n.of.Country) }
func (n name) Organization() ([]string, error)       { return segments(n.of.Organization) }
func (n name) OrganizationalUnit() ([]string, error) { return segments(n.of.OrganizationalUnit) }
func (n name) Locality() ([]string, error)           { return segments(n.of.Locality) }
func (n name) Province() ([]string, error)           { return segments(n.of.Province) }
func (n name) StreetAddress() ([]string, error)      { return segments(n.of.StreetAddress) }
func (n name) PostalCode() ([]string, error)         { return segments(n.of.PostalCode) }

func segment(s string) (string, error) {
	if strings.Contains(s, "/") {
		return "", errors.New("a name in the certificate holds a slash")
	}
	return capped(s)
}

func segments(list []string) ([]string, error) {
	for _, s := range list {
		if _, err := segment(s); err != nil {
			return nil, err
		}
	}
	return list, nil
}
