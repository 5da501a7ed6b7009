package mirror

import (
	"fmt"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A report names the SVIDs that end first, in that order, and no more than asked for.
func TestReportNamesWhatEndsFirst(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	m := newMachine(td, 10, "test")
	now := time.Unix(1_800_000_000, 0)
	for i := range 20 {
		id := fmt.Sprintf("g%02d", i)
		m.grants[id] = hold(entry.Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id)})
		m.grants[id].own.cert = &cert{id: m.grants[id].entry.SPIFFEID, span: span{expiresAt: now.Add(time.Duration(i*7%20/2) * time.Hour)}} // two end together
	}
	m.grants["g00"].own.cert = nil
	for n, want := range map[int]string{0: "[]", 1: "[g03]", 5: "[g03 g06 g09 g12 g15]"} {
		got := []string{}
		for _, h := range m.report(n).First {
			got = append(got, h.GrantID)
		}
		if fmt.Sprint(got) != want {
			t.Errorf("the first %d: %v, want %s", n, got, want)
		}
	}
	if r := m.report(100); len(r.First) != 19 || r.X509SVIDs != 19 {
		t.Errorf("%d of %d", len(r.First), r.X509SVIDs)
	}
}
