package arch_test

import (
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden file")

// TestModules compares what go.mod requires directly with testdata/modules.golden,
// so that a new dependency shows in a review as one line of its own.
func TestModules(t *testing.T) {
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = filepath.Join("..", "..")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, r := range mod.Require {
		if !r.Indirect {
			got.WriteString(r.Path + "\n")
		}
	}
	golden := filepath.Join("testdata", "modules.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("direct dependencies:\n%swant:\n%sIf that is meant, say in DESIGN.md what the new one replaces and pulls in, and run with -update.", got.String(), want)
	}
}
