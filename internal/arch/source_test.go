package arch_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/token"
	"os/exec"
	"path"
	"slices"
	"strings"
)

func checkNames(t *tree) (breaches []string) {
	forbidden := []string{"util", "utils", "common", "helper", "helpers", "base", "core", "types", "shared", "misc"}
	first := make(map[string]string)
	for _, p := range t.sorted() {
		name := p.name()
		if name == "" || name == "main" || p.generated() {
			continue
		}
		if slices.Contains(forbidden, name) || strings.HasSuffix(name, "util") {
			breaches = append(breaches, fmt.Sprintf("%s: package %s says nothing; name it for what it decides", p.dir, name))
		}
		if name != path.Base(p.dir) {
			breaches = append(breaches, fmt.Sprintf("%s: package %s is not named like its directory", p.dir, name))
		}
		if other, ok := first[name]; ok {
			breaches = append(breaches, fmt.Sprintf("%s and %s are both package %s", other, p.dir, name))
		}
		first[name] = p.dir
	}
	return breaches
}

// checkComments wants one package comment in each package, in the file that bears
// its name.
func checkComments(t *tree) (breaches []string) {
	for _, p := range t.sorted() {
		sources := p.sources()
		if len(sources) == 0 {
			continue
		}
		home, found := path.Join(p.dir, p.name()+".go"), false
		for _, f := range sources {
			if f.Doc.Text() == "" {
				continue
			}
			if f.path != home {
				breaches = append(breaches, fmt.Sprintf("%s: the package comment belongs in %s", f.path, home))
				continue
			}
			found = true
			if start := "Package " + p.name() + " "; p.name() != "main" && !strings.HasPrefix(f.Doc.Text(), start) {
				breaches = append(breaches, fmt.Sprintf("%s: the package comment begins with %q", f.path, start))
			}
		}
		if !found {
			breaches = append(breaches, fmt.Sprintf("%s has no package comment in %s", p.dir, home))
		}
	}
	return breaches
}

// checkState refuses init functions and package variables that could change.
func checkState(t *tree) (breaches []string) {
	for _, p := range t.sorted() {
		for _, f := range p.sources() {
			for _, decl := range f.Decls {
				switch d := decl.(type) {
				case *ast.FuncDecl:
					if d.Recv == nil && d.Name.Name == "init" {
						breaches = append(breaches, fmt.Sprintf("%s: init runs before anybody asked for it", t.at(d)))
					}
				case *ast.GenDecl:
					if d.Tok != token.VAR {
						continue
					}
					for _, spec := range d.Specs {
						breaches = append(breaches, checkVar(t, d, spec.(*ast.ValueSpec))...)
					}
				}
			}
		}
	}
	return breaches
}

func checkVar(t *tree, decl *ast.GenDecl, spec *ast.ValueSpec) (breaches []string) {
	for i, name := range spec.Names {
		constant := i < len(spec.Values) && isConstantCall(spec.Values[i])
		if name.Name != "_" && !constant && !embeds(decl.Doc) && !embeds(spec.Doc) {
			breaches = append(breaches, fmt.Sprintf("%s: package variable %s could change; only errors, compiled patterns and embedded files may be variables", t.at(name), name.Name))
		}
	}
	return breaches
}

// isConstantCall tells a call whose result nobody changes: an error or a pattern.
func isConstantCall(e ast.Expr) bool {
	call, ok := e.(*ast.CallExpr)
	if !ok {
		return false
	}
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	if on, ok := sel.X.(*ast.Ident); ok {
		return slices.Contains([]string{"errors.New", "fmt.Errorf", "fault.New", "regexp.MustCompile"}, on.Name+"."+sel.Sel.Name)
	}
	return sel.Sel.Name == "Fix" && isConstantCall(sel.X) // fault.New(…).Fix(…)
}

func embeds(doc *ast.CommentGroup) bool {
	return doc != nil && slices.ContainsFunc(doc.List, func(c *ast.Comment) bool { return strings.HasPrefix(c.Text, "//go:embed ") })
}

// engines decide in pure steps; only run.go (and run_*.go) of each knows what time it is.
var engines = []string{"internal/agentid", "internal/authority", "internal/nodes", "internal/mirror", "internal/servers"}

func checkEngines(t *tree) (breaches []string) {
	impure := []string{"context", "crypto/rand", "math/rand", "math/rand/v2"}
	clock := []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}
	for _, dir := range engines {
		p := t.packages[dir]
		if p == nil {
			continue
		}
		for _, f := range p.sources() {
			if name := path.Base(f.path); name == "run.go" || strings.HasPrefix(name, "run_") && !strings.HasSuffix(name, "_test.go") {
				continue
			}
			for _, spec := range f.Imports {
				if slices.Contains(impure, importPath(spec)) {
					breaches = append(breaches, fmt.Sprintf("%s: only run.go of an engine imports %s", t.at(spec), importPath(spec)))
				}
			}
			ast.Inspect(f.File, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.GoStmt:
					breaches = append(breaches, fmt.Sprintf("%s: only run.go of an engine starts goroutines", t.at(n)))
				case *ast.SelectorExpr:
					if on, ok := n.X.(*ast.Ident); ok && on.Name == "time" && slices.Contains(clock, n.Sel.Name) {
						breaches = append(breaches, fmt.Sprintf("%s: only run.go of an engine calls time.%s", t.at(n), n.Sel.Name))
					}
				}
				return true
			})
		}
	}
	return breaches
}

// checkLogs wants constant lower-case messages and only the attribute keys that
// DESIGN.md lists, so that whoever searches the logs can know them.
func checkLogs(t *tree) (breaches []string) {
	_, list, _ := strings.Cut(t.design, "\nLog attribute keys: ")
	list, _, _ = strings.Cut(list, "\n\n")
	keys := strings.FieldsFunc(list, func(r rune) bool { return strings.ContainsRune("`, .\n", r) })
	first := map[string]int{ // where the attributes begin
		"Debug": 1, "Info": 1, "Warn": 1, "Error": 1, "With": 0,
		"DebugContext": 2, "InfoContext": 2, "WarnContext": 2, "ErrorContext": 2,
	}
	for _, p := range t.sorted() {
		for _, f := range p.sources() {
			ast.Inspect(f.File, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok || !isLogger(call.Fun) {
					return true
				}
				from, ok := first[call.Fun.(*ast.SelectorExpr).Sel.Name]
				if !ok || len(call.Args) < from {
					return true
				}
				if from > 0 {
					if message := literal(call.Args[from-1]); message == "" || message[:1] != strings.ToLower(message[:1]) {
						breaches = append(breaches, fmt.Sprintf("%s: a log message is a constant in lower case", t.at(call)))
					}
				}
				for i := from; i < len(call.Args); i += 2 {
					if key := literal(call.Args[i]); !slices.Contains(keys, key) {
						breaches = append(breaches, fmt.Sprintf("%s: DESIGN.md lists no log attribute key %q", t.at(call.Args[i]), key))
					}
				}
				return true
			})
		}
	}
	return breaches
}

// isLogger tells a method call on something that is called log, Log or slog.
func isLogger(fun ast.Expr) bool {
	sel, ok := fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	name := ""
	switch on := sel.X.(type) {
	case *ast.Ident:
		name = on.Name
	case *ast.SelectorExpr:
		name = on.Sel.Name
	}
	return name == "log" || name == "Log" || name == "slog"
}

// literal returns a string literal's text, or "".
func literal(e ast.Expr) string {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return ""
	}
	return strings.Trim(lit.Value, "\"`")
}

func checkFiles(t *tree) (breaches []string) {
	const maxLines = 800
	later := []byte("TO" + "DO")
	for _, p := range t.sorted() {
		for _, f := range p.files {
			if f.generated {
				continue
			}
			if n := bytes.Count(f.src, []byte("\n")); n > maxLines {
				breaches = append(breaches, fmt.Sprintf("%s has %d lines, at most %d are read", f.path, n, maxLines))
			}
			if before, _, ok := bytes.Cut(f.src, later); ok {
				breaches = append(breaches, fmt.Sprintf("%s:%d: say %s in an issue, or do it", f.path, 1+bytes.Count(before, []byte("\n")), later))
			}
		}
	}
	return breaches
}

// checkRenames refuses imports under another name than the package's own, except
// in tests. An explicit name is fine where the path does not end in it, as with
// …/sync/v1.
func checkRenames(t *tree) (breaches []string) {
	for _, p := range t.sorted() {
		for _, f := range p.sources() {
			for _, spec := range f.Imports {
				if spec.Name == nil || spec.Name.Name == "_" || spec.Name.Name == t.nameOf(importPath(spec)) {
					continue
				}
				breaches = append(breaches, fmt.Sprintf("%s: %s is renamed to %s", t.at(spec), importPath(spec), spec.Name.Name))
			}
		}
	}
	return breaches
}

// nameOf returns the name of any package.
func (t *tree) nameOf(importPath string) string {
	if dir, ok := own(importPath); ok && t.packages[dir] != nil {
		return t.packages[dir].name()
	}
	out, err := exec.Command("go", "list", "-find", "-f", "{{.Name}}", importPath).Output()
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(out))
}
