package main

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/server"
	"github.com/spf13/cobra"
)

// generated compares the part of a document below the mark with what the program
// says of itself, or writes it anew with -update.
func generated(t *testing.T, name, want string) {
	t.Helper()
	const mark = "<!-- what follows is written by go test ./cmd/plastron -update -->\n"
	path := filepath.Join("..", "..", "docs", name)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, got, ok := strings.Cut(string(text), mark)
	if !ok {
		t.Fatalf("%s has no line %s", name, mark)
	}
	if *update {
		if err := os.WriteFile(path, []byte(head+mark+"\n"+want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff("\n"+want, got); diff != "" {
		t.Errorf("docs/%s is not what the program says (-want +got):\n%s", name, diff)
	}
}

// commands calls f for every command that a person may call.
func commands(f func(*cobra.Command)) {
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		f(c)
		for _, child := range c.Commands() {
			if child.IsAvailableCommand() && child.Name() != "help" && child.Name() != "completion" {
				walk(child)
			}
		}
	}
	walk((&program{stdin: new(bytes.Buffer), stdout: new(bytes.Buffer), stderr: new(bytes.Buffer)}).root())
}

// TestCommandDocs keeps docs/cli.md equal to what -h prints.
func TestCommandDocs(t *testing.T) {
	var text bytes.Buffer
	commands(func(c *cobra.Command) {
		if c.HasAvailableSubCommands() && !c.HasAvailableLocalFlags() {
			return
		}
		fmt.Fprintf(&text, "### %s\n\n```text\n", c.CommandPath())
		help(&text, c)
		fmt.Fprint(&text, "```\n\n")
	})
	generated(t, "cli.md", text.String())
}

// TestConfigurationDocs keeps docs/configuration.md equal to the comments of the
// structs that the files are decoded into: the comment is the manual.
func TestConfigurationDocs(t *testing.T) {
	var text bytes.Buffer
	for _, role := range []string{"server", "agent"} {
		m := manual{t: t, w: &text, structs: map[string]*ast.StructType{}}
		m.load(filepath.Join("..", "..", "internal", role))
		m.block(role, "Settings", "")
		fmt.Fprintf(&text, "### Plugins of %s\n\n", role)
		plugins(&text, role)
		fmt.Fprintln(&text)
	}
	m := manual{t: t, w: &text, structs: map[string]*ast.StructType{}}
	m.load(filepath.Join("..", "..", "internal", "monitor"))
	m.block("telemetry", "Telemetry", "In the files of server and agent alike, beside `server` or `agent`.")
	m.block("health_checks", "HealthChecks", "In the files of server and agent alike, beside `server` or `agent`.")
	generated(t, "configuration.md", text.String())
}

// TestPages reads every page as a reader's tool does: a heading stands alone, and
// a link leads to a file and a heading that are there.
func TestPages(t *testing.T) {
	root := filepath.Join("..", "..")
	pages, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"README.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md"} {
		pages = append(pages, filepath.Join(root, name))
	}
	var (
		heading = regexp.MustCompile("(?m)^#{1,6} (.*)$")
		crowded = regexp.MustCompile("(?m)^.+\n(#{1,6} .*)$")
		code    = regexp.MustCompile("(?ms)^ *```.*?^ *```")
		link    = regexp.MustCompile(`\]\(([^):#]*)(?:#([^)]*))?\)`)
		word    = regexp.MustCompile(`[^a-z0-9_ -]`)
	)
	texts, anchors := map[string]string{}, map[string]bool{}
	for _, path := range pages {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		texts[path] = code.ReplaceAllString(string(text), "")
		for _, m := range heading.FindAllStringSubmatch(texts[path], -1) {
			anchors[path+"#"+strings.ReplaceAll(word.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")] = true
		}
		for _, m := range crowded.FindAllStringSubmatch(texts[path], -1) {
			t.Errorf("%s: no empty line above %q", path, m[1])
		}
	}
	for path, text := range texts {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			to := path
			if m[1] != "" {
				to = filepath.Join(filepath.Dir(path), m[1])
			}
			if _, err := os.Stat(to); err != nil || m[2] != "" && !anchors[to+"#"+m[2]] {
				t.Errorf("%s: nothing is at %s", path, m[0])
			}
		}
	}
}

// TestMetricsDocs keeps docs/metrics.md equal to what the roles measure.
func TestMetricsDocs(t *testing.T) {
	var text bytes.Buffer
	table := func(role string, metrics []monitor.Metric) {
		fmt.Fprintf(&text, "## %s\n\n| name | kind | labels | |\n|---|---|---|---|\n", role)
		for _, m := range metrics {
			labels := ""
			if len(m.Labels) > 0 {
				labels = "`" + strings.Join(m.Labels, "` `") + "`"
			}
			fmt.Fprintf(&text, "| `%s` | %s | %s | %s |\n", m.Name, m.Kind, labels, m.Help)
		}
		fmt.Fprintln(&text)
	}
	table("Server", server.Metrics())
	table("Agent", agent.Metrics())
	generated(t, "metrics.md", text.String())
}

// plugins lists what is built in, with the keys of plugin_data.
func plugins(w *bytes.Buffer, role string) {
	row := func(kind, name, doc string, config any) {
		fmt.Fprintf(w, "- `%s \"%s\"`: %s", kind, name, doc)
		var keys []string
		for _, f := range reflect.VisibleFields(reflect.TypeOf(config).Elem()) {
			if key, _, _ := strings.Cut(f.Tag.Get("hcl"), ","); key != "" {
				keys = append(keys, "`"+key+"`")
			}
		}
		if len(keys) > 0 {
			fmt.Fprintf(w, " (%s)", strings.Join(keys, ", "))
		}
		fmt.Fprintln(w)
	}
	if role == "server" {
		for _, p := range builtin.Stores() {
			row("DataStore", p.Name, p.Doc, p.New())
		}
		for _, p := range builtin.KeyManagers() {
			row("KeyManager", p.Name, p.Doc, p.New())
		}
		for _, p := range builtin.Upstreams() {
			row("UpstreamAuthority", p.Name, p.Doc, p.New())
		}
		for _, p := range builtin.NodeAttestors() {
			row("NodeAttestor", p.Name, p.Doc, p.New())
		}
		for _, p := range builtin.Notifiers() {
			row("Notifier", p.Name, p.Doc, p.New())
		}
		return
	}
	for _, p := range builtin.AgentKeepers() {
		row("KeyManager", p.Name, p.Doc, p.New())
	}
	for _, p := range builtin.NodeProvers() {
		row("NodeAttestor", p.Name, p.Doc, p.New())
	}
	for _, p := range builtin.WorkloadAttestors() {
		row("WorkloadAttestor", p.Name, p.Doc, p.New())
	}
}

// manual writes a configuration struct as a page.
type manual struct {
	t       *testing.T
	w       *bytes.Buffer
	structs map[string]*ast.StructType
}

func (m *manual) load(dir string) {
	m.t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(files) == 0 {
		m.t.Fatalf("no source in %s: %v", dir, err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			m.t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if spec, ok := n.(*ast.TypeSpec); ok {
				if s, ok := spec.Type.(*ast.StructType); ok {
					m.structs[spec.Name.Name] = s
				}
			}
			return true
		})
	}
}

// block writes the keys of one struct, then the blocks inside it. A comment is
// about its field and those after it that have none. Keys of type Node are
// those that SPIRE has and we refuse.
func (m *manual) block(path, name, doc string) {
	type inner struct{ path, name, doc string }
	var blocks []inner
	var items, refused, names []string
	keys := map[string]string{}
	about := ""
	flush := func() {
		switch {
		case len(items) > 0 && about != "":
			fmt.Fprintf(m.w, "- %s: %s\n", strings.Join(items, ", "), about)
		case len(items) > 0:
			fmt.Fprintf(m.w, "- %s\n", strings.Join(items, ", "))
		}
		items = nil
	}
	fields := m.structs[name].Fields.List
	for _, f := range fields {
		if key := keyOf(m.t, f); key != "" {
			keys[f.Names[0].Name] = "`" + key + "`"
			names = append(names, f.Names[0].Name)
		}
	}
	word := regexp.MustCompile(`\b(` + strings.Join(names, "|") + `)\b`)
	comment := func(f *ast.Field) string {
		text := strings.Join(strings.Fields(f.Doc.Text()+" "+f.Comment.Text()), " ")
		return word.ReplaceAllStringFunc(text, func(name string) string { return keys[name] })
	}
	fmt.Fprintf(m.w, "## %s\n\n", path)
	if doc != "" {
		fmt.Fprintf(m.w, "%s\n\n", doc)
	}
	for _, f := range fields {
		key := keyOf(m.t, f)
		if key == "" {
			continue
		}
		kind, nested := m.kind(f.Type)
		if kind == refusedKind {
			refused = append(refused, "`"+key+"`")
			continue
		}
		if text := comment(f); text != "" {
			flush()
			about = text
		} else if len(items) == 0 && doc == "" {
			m.t.Errorf("%s: the field of %q has no comment, so the manual says nothing of it", path, key)
		}
		if nested != "" {
			blocks = append(blocks, inner{path + "." + key, nested, about})
			continue
		}
		items = append(items, fmt.Sprintf("`%s` (%s)", key, kind))
	}
	flush()
	if len(refused) > 0 {
		fmt.Fprintf(m.w, "\nSPIRE has these too; they are refused, since they are not offered yet: %s.\n", strings.Join(refused, ", "))
	}
	fmt.Fprintln(m.w)
	for _, b := range blocks {
		m.block(b.path, b.name, b.doc)
	}
}

// keyOf returns the key of a field, or nothing.
func keyOf(t *testing.T, f *ast.Field) string {
	t.Helper()
	if f.Tag == nil {
		return ""
	}
	tag, err := strconv.Unquote(f.Tag.Value)
	if err != nil {
		t.Fatal(err)
	}
	key, _, _ := strings.Cut(reflect.StructTag(tag).Get("hcl"), ",")
	return key
}

const refusedKind = "refused"

// kind says how a value of a type is written, or which struct a block is.
func (m *manual) kind(e ast.Expr) (kind, nested string) {
	switch e := e.(type) {
	case *ast.StarExpr:
		return m.kind(e.X)
	case *ast.ArrayType:
		kind, nested = m.kind(e.Elt)
		return "list of " + kind, nested
	case *ast.MapType:
		_, nested = m.kind(e.Value)
		return "blocks with a label", nested
	case *ast.SelectorExpr:
		names := map[string]string{"Duration": "duration", "TrustDomain": "trust domain", "Node": refusedKind}
		if name, ok := names[e.Sel.Name]; ok {
			return name, ""
		}
		return strings.ToLower(e.Sel.Name), ""
	case *ast.Ident:
		if m.structs[e.Name] != nil {
			return "", e.Name
		}
		names := map[string]string{"string": "string", "bool": "true or false", "int": "number", "int64": "number", "uint16": "number", "uint32": "number", "float64": "number"}
		if name, ok := names[e.Name]; ok {
			return name, ""
		}
		return strings.ToLower(e.Name), ""
	}
	m.t.Fatalf("a field of type %T has no place in the manual", e)
	return "", ""
}
