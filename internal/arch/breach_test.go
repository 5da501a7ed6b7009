package arch_test

import (
	"strings"
	"testing"
	"testing/fstest"
)

// TestBreaches shows that every check bites: each tree breaks one rule.
func TestBreaches(t *testing.T) {
	const design = "# D\n\nLog attribute keys: `count`,\n`id`.\n\n## Rooms\n\n| 4 | `keys` | seams |\n\n## More\n"
	const doc = "// Package entry says.\n"
	imports := func(name string, paths ...string) string {
		return "// Package " + name + " says.\npackage " + name + "\nimport (\"" + strings.Join(paths, "\"\n\"") + "\")\n"
	}
	ours := func(dir string) string { return module + "/" + dir }
	chain := map[string]string{"cmd/a/main.go": "// A.\npackage main\nimport \"" + ours("internal/p0") + "\"\n"}
	for i := range 9 {
		dir, next := "p"+string(rune('0'+i)), "p"+string(rune('1'+i))
		chain["internal/"+dir+"/"+dir+".go"] = imports(dir, ours("internal/"+next))
	}
	chain["internal/p9/p9.go"] = "package p9\n"

	tests := []struct {
		name, check string
		files       map[string]string
		want        string // part of the only breach; "" if there is none
	}{
		{"import upwards", "rows", map[string]string{"internal/entry/entry.go": imports("entry", ours("internal/registry"))}, "(row 3) imports internal/registry (row 7)"},
		{"import of the own row", "rows", map[string]string{"internal/entry/entry.go": imports("entry", ours("internal/svid"))}, "(row 3) imports internal/svid (row 3)"},
		{"import downwards", "rows", map[string]string{"internal/entry/entry.go": imports("entry", ours("internal/fault"))}, ""},
		{"a test imports upwards", "rows", map[string]string{"internal/entry/entry_test.go": imports("entry", ours("internal/server"))}, ""},
		{"no row", "rows", map[string]string{"internal/stuff/stuff.go": "package stuff\n"}, "has no row"},
		{"import of a command", "rows", map[string]string{"internal/entry/entry.go": imports("entry", ours("cmd/plastron"))}, "is for nobody"},
		{"import of a suite", "rows", map[string]string{"internal/agent/agent.go": imports("agent", ours("internal/keys/keystest"))}, "is for tests"},
		{"a leaf imports its seam", "rows", map[string]string{"internal/nodeattest/jointoken/jointoken.go": imports("jointoken", ours("internal/nodeattest"))}, ""},
		{"a suite imports its seam", "rows", map[string]string{"internal/keys/keystest/keystest.go": imports("keystest", ours("internal/keys"))}, ""},
		{"an example looks inside", "rows", map[string]string{"examples/a/main.go": imports("main", ours("internal/entry"))}, "what any user can use"},
		{"api imports code", "rows", map[string]string{"api/a/a.pb.go": imports("a", ours("internal/entry"))}, "is generated"},

		{"long chain", "chain", chain, "11 packages import one another"},

		{"unknown library", "third parties", map[string]string{"internal/agent/agent.go": imports("agent", "example.com/x")}, "imports example.com/x"},
		{"library of another room", "third parties", map[string]string{"internal/agent/agent.go": imports("agent", "modernc.org/sqlite")}, "imports modernc.org/sqlite"},
		{"library for tests", "third parties", map[string]string{"internal/agent/agent.go": imports("agent", "github.com/google/go-cmp/cmp")}, "imports github.com/google/go-cmp"},
		{"library in a test", "third parties", map[string]string{"internal/agent/agent_test.go": imports("agent", "github.com/google/go-cmp/cmp")}, ""},
		{"library in its room", "third parties", map[string]string{"internal/entry/entry.go": imports("entry", "github.com/spiffe/go-spiffe/v2/spiffeid", "net/http")}, ""},

		{"status inside", "grpc status", map[string]string{"internal/agent/agent.go": imports("agent", "google.golang.org/grpc/codes")}, "return a fault"},
		{"status on the wire", "grpc status", map[string]string{"internal/serverapi/serverapi.go": imports("serverapi", "google.golang.org/grpc/codes")}, ""},

		{"empty word", "names", map[string]string{"internal/helper/helper.go": "package helper\n"}, "says nothing"},
		{"ends in util", "names", map[string]string{"internal/timeutil/timeutil.go": "package timeutil\n"}, "says nothing"},
		{"one name twice", "names", map[string]string{"internal/a/x/x.go": "package x\n", "internal/b/x/x.go": "package x\n"}, "are both package x"},
		{"unlike its directory", "names", map[string]string{"internal/a/a.go": "package b\n"}, "not named like its directory"},

		{"no comment", "comments", map[string]string{"internal/entry/entry.go": "package entry\n"}, "has no package comment"},
		{"comment elsewhere", "comments", map[string]string{"internal/entry/entry.go": doc + "package entry\n", "internal/entry/b.go": doc + "package entry\n"}, "b.go: the package comment belongs in"},
		{"comment of another", "comments", map[string]string{"internal/entry/entry.go": "// Entries.\npackage entry\n"}, "begins with"},
		{"good comment", "comments", map[string]string{"internal/entry/entry.go": doc + "package entry\n", "internal/entry/b.go": "package entry\n"}, ""},

		{"init", "state", map[string]string{"internal/entry/entry.go": "package entry\nfunc init() {}\n"}, "init runs"},
		{"variable", "state", map[string]string{"internal/entry/entry.go": "package entry\nvar x = map[string]int{}\n"}, "variable x"},
		{"variable without value", "state", map[string]string{"internal/entry/entry.go": "package entry\nvar x int\n"}, "variable x"},
		{"constant variables", "state", map[string]string{"internal/entry/entry.go": `package entry
var _ I = T{}
var (
	errA = errors.New("a")
	errB = fault.New(fault.Invalid, "b", "b").Fix("c")
	re   = regexp.MustCompile("a")
)
//go:embed x
var text string
func (T) init() {}
`}, ""},

		{"log key", "logs", map[string]string{"internal/a/a.go": "package a\nfunc f() { s.Log.InfoContext(ctx, \"done\", \"secret\", 1, \"count\", 2) }\n"}, "no log attribute key \"secret\""},
		{"log message", "logs", map[string]string{"internal/a/a.go": "package a\nfunc f() { log.Info(\"Done\") }\n"}, "a log message is a constant"},
		{"log message that varies", "logs", map[string]string{"internal/a/a.go": "package a\nfunc f() { log.Info(text) }\n"}, "a log message is a constant"},
		{"good log", "logs", map[string]string{"internal/a/a.go": "package a\nfunc f() { log.With(\"id\", 1).Info(\"done\", \"count\", 2) }\n"}, ""},

		{"other row in DESIGN.md", "design", map[string]string{"internal/entry/entry.go": "package entry\n", "DESIGN.md": "\n## Rooms\n| 4 | `entry` | words |\n"}, "internal/entry is in row 3, but DESIGN.md says row 4"},
		{"not in DESIGN.md", "design", map[string]string{"internal/agent/agent.go": "package agent\n"}, "internal/agent is in row 11, but DESIGN.md says row 0"},
		{"planned elsewhere", "design", map[string]string{"DESIGN.md": "\n## Rooms\n| 4 | `agent` | roles |\n"}, "DESIGN.md has internal/agent in row 4"},
		{"planned", "design", map[string]string{}, ""},

		{"clock in a step", "engines", map[string]string{"internal/nodes/step.go": "package nodes\nvar _ = time.Now()\n"}, "calls time.Now"},
		{"goroutine in a step", "engines", map[string]string{"internal/nodes/step.go": "package nodes\nfunc f() { go f() }\n"}, "starts goroutines"},
		{"context in a step", "engines", map[string]string{"internal/mirror/step.go": imports("mirror", "context")}, "imports context"},
		{"pure step", "engines", map[string]string{"internal/mirror/step.go": imports("mirror", "time"), "internal/mirror/run.go": imports("mirror", "context")}, ""},

		{"long file", "files", map[string]string{"internal/a/a.go": "package a\n" + strings.Repeat("\n", 800)}, "has 801 lines"},
		{"long generated file", "files", map[string]string{"internal/a/a.go": "// Code generated by x. DO NOT EDIT.\npackage a\n" + strings.Repeat("\n", 800)}, ""},
		{"put off", "files", map[string]string{"internal/a/a.go": "package a\n// " + "TO" + "DO\n"}, "a.go:2: say"},

		{"renamed library", "renames", map[string]string{"internal/a/a.go": "package a\nimport f \"fmt\"\n"}, "fmt is renamed to f"},
		{"import of all names", "renames", map[string]string{"internal/a/a.go": "package a\nimport . \"fmt\"\n"}, "fmt is renamed to ."},
		{"renamed in a test", "renames", map[string]string{"internal/a/a_test.go": "package a\nimport f \"fmt\"\n"}, ""},
		{"explicit name of a library", "renames", map[string]string{"internal/a/a.go": "package a\nimport sqlite3 \"modernc.org/sqlite/lib\"\n"}, ""},
		{"explicit name", "renames", map[string]string{"internal/a/a.go": "package a\nimport syncv1 \"" + ours("api/sync/v1") + "\"\n", "api/sync/v1/s.go": "package syncv1\n"}, ""},
	}
	all := checks()
	tested := make(map[string]bool)
	for _, test := range tests {
		tested[test.check] = true
		t.Run(test.name, func(t *testing.T) {
			fsys := fstest.MapFS{"DESIGN.md": {Data: []byte(design)}}
			for name, src := range test.files {
				fsys[name] = &fstest.MapFile{Data: []byte(src)}
			}
			tree, err := load(fsys)
			if err != nil {
				t.Fatal(err)
			}
			got := all[test.check](tree)
			if test.want == "" && len(got) == 0 {
				return
			}
			if test.want == "" || len(got) != 1 || !strings.Contains(got[0], test.want) {
				t.Errorf("%s = %q, want one with %q", test.check, got, test.want)
			}
		})
	}
	for name := range all {
		if !tested[name] {
			t.Errorf("nothing shows that check %q bites", name)
		}
	}
}
