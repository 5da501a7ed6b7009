// Package arch_test holds the tree to the shape that DESIGN.md gives it: who may
// import whom, what a package is called, where a thing may be used. It has no
// code of its own and needs nothing but the standard library.
package arch_test

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/plastron/plastron"

// tree is every Go file of the module, whatever system it is for.
type tree struct {
	fset     *token.FileSet
	packages map[string]*pkg // by directory, relative to the module
	design   string          // DESIGN.md
}

// pkg is one directory.
type pkg struct {
	dir   string
	files []*file
}

type file struct {
	*ast.File
	path      string
	src       []byte
	generated bool
	test      bool
}

// sources returns the hand-written files that are not tests.
func (p *pkg) sources() []*file {
	return slices.DeleteFunc(slices.Clone(p.files), func(f *file) bool { return f.test || f.generated })
}

// generated reports whether the package was written by a program.
func (p *pkg) generated() bool {
	return slices.ContainsFunc(p.files, func(f *file) bool { return f.generated }) && len(p.sources()) == 0
}

// name returns the package's name, or "" if it has nothing but tests.
func (p *pkg) name() string {
	for _, f := range p.files {
		if !f.test {
			return f.Name.Name
		}
	}
	return ""
}

// imports returns what the package's files import, tests or all others.
func (p *pkg) imports(test bool) []string {
	seen := make(map[string]bool)
	for _, f := range p.files {
		for _, spec := range f.Imports {
			if f.test == test {
				seen[importPath(spec)] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// own returns the directory of one of our own packages.
func own(importPath string) (dir string, ok bool) {
	return strings.CutPrefix(importPath, module+"/")
}

func importPath(spec *ast.ImportSpec) string {
	s, err := strconv.Unquote(spec.Path.Value)
	if err != nil {
		panic(err) // the parser has accepted it
	}
	return s
}

func load(fsys fs.FS) (*tree, error) {
	t := &tree{fset: token.NewFileSet(), packages: make(map[string]*pkg)}
	design, err := fs.ReadFile(fsys, "DESIGN.md")
	if err != nil {
		return nil, err
	}
	t.design = string(design)
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name == "." {
				return nil
			}
			// A go.mod of its own makes it another module.
			_, err := fs.Stat(fsys, path.Join(name, "go.mod"))
			if err == nil || d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") {
				return fs.SkipDir
			}
			if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		}
		if path.Ext(name) != ".go" {
			return nil
		}
		src, err := fs.ReadFile(fsys, name)
		if err != nil {
			return err
		}
		parsed, err := parser.ParseFile(t.fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir := path.Dir(name)
		if t.packages[dir] == nil {
			t.packages[dir] = &pkg{dir: dir}
		}
		t.packages[dir].files = append(t.packages[dir].files, &file{
			File: parsed, path: name, src: src,
			generated: ast.IsGenerated(parsed), test: strings.HasSuffix(name, "_test.go"),
		})
		return nil
	})
	return t, err
}

// sorted returns the packages in the order of their directories.
func (t *tree) sorted() []*pkg {
	var all []*pkg
	for _, dir := range slices.Sorted(maps.Keys(t.packages)) {
		all = append(all, t.packages[dir])
	}
	return all
}

// at says where a node is.
func (t *tree) at(n ast.Node) string {
	p := t.fset.Position(n.Pos())
	return fmt.Sprintf("%s:%d", p.Filename, p.Line)
}

// checks are all rules on source; each returns one line for every breach.
func checks() map[string]func(*tree) []string {
	return map[string]func(*tree) []string{
		"rows":          checkRows,
		"design":        checkDesign,
		"chain":         checkChain,
		"third parties": checkThirdParties,
		"grpc status":   checkStatus,
		"names":         checkNames,
		"comments":      checkComments,
		"state":         checkState,
		"engines":       checkEngines,
		"logs":          checkLogs,
		"files":         checkFiles,
		"renames":       checkRenames,
	}
}

func TestTree(t *testing.T) {
	tree, err := load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	if len(tree.packages) < 5 {
		t.Fatalf("only %d packages found", len(tree.packages))
	}
	for name, check := range checks() {
		t.Run(name, func(t *testing.T) {
			for _, breach := range check(tree) {
				t.Error(breach)
			}
		})
	}
}
