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

// engines decide in pure steps; only run.go of each knows what time it is.
var engines = []string{"internal/authority", "internal/nodes", "internal/mirror"}

func checkEngines(t *tree) (breaches []string) {
	impure := []string{"context", "crypto/rand", "math/rand", "math/rand/v2"}
	clock := []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}
	for _, dir := range engines {
		p := t.packages[dir]
		if p == nil {
			continue
		}
		for _, f := range p.sources() {
			if path.Base(f.path) == "run.go" {
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
