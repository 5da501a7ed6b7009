package main

import (
	"strings"
	"testing"

	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	whyv1 "github.com/plastron/plastron/api/plastron/why/v1"
)

// What the server verifies of a rule, and what it does not, can be seen.
func TestRuleShowsWhatIsVerified(t *testing.T) {
	rule := &rulev1.Rule{Id: "pods", ParentId: "spiffe://example.org/cluster", IdTemplate: "spiffe://example.org/ns/{k8s.ns}/sa/{k8s.sa}",
		Selectors: []*rulev1.Selector{{Type: "k8s", Value: "ns:shop"}, {Type: "k8s", Value: "container-name:main"}, {Type: "k8s", Value: "pod-label:app:web"}}}
	var out strings.Builder
	printRule(&out, rule, &rulev1.Reach{Agents: 1, First: []string{"spiffe://example.org/spire/agent/a"}})
	_, got, _ := strings.Cut(out.String(), "Reaches")
	want := `          : 1 agent: spiffe://example.org/spire/agent/a
Verified         : k8s.ns, k8s.sa, k8s:ns:shop, k8s:pod-label:app:web
On agents' word  : k8s:container-name:main

`
	if got != want {
		t.Errorf("printed\n%swant\n%s", got, want)
	}
	for by, want := range map[string]string{"server": "Facts            : verified by the server\n", "agent": "Facts            : on this agent's word\n", "": ""} {
		out.Reset()
		printWhy(&out, &whyv1.AskProcessResponse{Grants: []*whyv1.Grant{{Id: "g", State: whyv1.Grant_STATE_READY, FactsBy: by}}})
		if got := out.String(); strings.Contains(got, "Facts") != (want != "") || !strings.Contains(got, want) {
			t.Errorf("%q printed\n%s", by, got)
		}
	}
}
