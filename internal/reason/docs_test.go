package reason_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/reason"
)

// docs/why.md has exactly the rows of the table, in its order.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "why.md"))
	if err != nil {
		t.Fatal(err)
	}
	status := map[fault.Kind]string{fault.Denied: "PermissionDenied", fault.Unavailable: "Unavailable",
		fault.Exhausted: "Unavailable", fault.Invalid: "InvalidArgument"} // as the Workload API has them
	var want strings.Builder
	for _, r := range reason.All() {
		fmt.Fprintf(&want, "| `%s` | %s | %s | %s |\n", r.Reason, status[r.Kind], r.Message, r.Remedy)
	}
	_, table, found := strings.Cut(string(text), "|---|---|---|---|\n")
	if !found || !strings.HasPrefix(table, want.String()+"\n") {
		t.Errorf("docs/why.md does not have the table:\n%s", want.String())
	}
}
