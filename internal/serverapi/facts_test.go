package serverapi_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// cluster is a platform with pods, for nodes that say in which cluster and on which
// machine they are.
type cluster struct {
	mu    sync.Mutex
	pods  map[string]fakePod // by cluster, namespace and name
	asked int
	away  bool
}

type fakePod struct {
	uid, node string
	sa, app   string
}

func (c *cluster) Checks(fact string) bool { return entry.Verifiable(fact) }

func (c *cluster) Look(_ context.Context, node []entry.Selector, facts map[string]string) (nodeattest.Seen, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	if c.away {
		return nodeattest.Seen{}, fault.New(fault.Unavailable, "api_away", "the API server is away")
	}
	var where, machine string
	for _, s := range node {
		fmt.Sscanf(s.Value, "cluster:%s", &where)
		fmt.Sscanf(s.Value, "node:%s", &machine)
	}
	p, there := c.pods[where+"/"+facts["k8s.ns"]+"/"+facts["k8s.pod"]]
	if !there || p.uid != facts["k8s.pod_uid"] || p.node != machine {
		return nodeattest.Seen{}, fault.New(fault.Denied, "pod_unknown", "no such pod runs on this node")
	}
	return nodeattest.Seen{
		Facts:     map[string]string{"k8s.ns": facts["k8s.ns"], "k8s.sa": p.sa, "k8s.pod": facts["k8s.pod"], "k8s.pod_uid": p.uid, "k8s.node": p.node},
		Selectors: []entry.Selector{{Type: "k8s", Value: "ns:" + facts["k8s.ns"]}, {Type: "k8s", Value: "pod-label:app:" + p.app}},
	}, nil
}

func (c *cluster) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

func podRule(parent spiffeid.ID, template string) *rulev1.Rule {
	return &rulev1.Rule{ParentId: parent.String(), IdTemplate: "spiffe://example.org" + template, Selectors: []*rulev1.Selector{
		{Type: "k8s", Value: "ns:shop"}, {Type: "k8s", Value: "pod-label:app:web"}, {Type: "k8s", Value: "container-name:main"}}}
}

func podOf(name, uid string, more ...string) map[string]string {
	facts := map[string]string{"k8s.ns": "shop", "k8s.sa": "web", "k8s.pod": name, "k8s.pod_uid": uid}
	for i := 0; i < len(more); i += 2 {
		if more[i+1] == "" {
			delete(facts, more[i])
		} else {
			facts[more[i]] = more[i+1]
		}
	}
	return facts
}

// signPod has an X.509-SVID and a JWT-SVID signed and expects the same of both.
func (r *rig) signPod(conn *grpc.ClientConn, grant string, facts map[string]string) (string, string) {
	r.t.Helper()
	client := issuev1.NewIssueClient(conn)
	resp, err := client.X509(r.t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: grant, Facts: facts, Csr: newCSR(r.t, newKey(r.t))}}})
	if err != nil {
		r.t.Fatal(err)
	}
	token, err := client.JWT(r.t.Context(), &issuev1.JWTRequest{GrantId: grant, Facts: facts, Audience: []string{"a"}})
	got := resp.Results[0]
	if got.SpiffeId != token.GetSpiffeId() || err == nil && got.Refusal != nil || err != nil && reasonOf(err) != got.Refusal.GetReason() {
		r.t.Errorf("%v: X.509 %v, JWT %v, %v", facts, got, token, err)
	}
	if got.Refusal != nil && (len(got.CertChain) > 0 || got.SpiffeId != "") {
		r.t.Errorf("refused and signed: %v", got)
	}
	return got.SpiffeId, got.Refusal.GetReason()
}

// What an agent states of a pod is signed for only if the platform says so too. A
// compromised node cannot mint for pods elsewhere.
func TestVerifiedFacts(t *testing.T) { // R1, R2
	c := &cluster{pods: map[string]fakePod{
		"east/shop/web-1":  {"u1", "n1", "web", "web"},
		"east/shop/web-2":  {"u2", "n2", "web", "web"},
		"east/shop/db-1":   {"u3", "n1", "db", "db"},
		"east/other/web-1": {"u4", "n1", "web", "web"},
		"west/shop/web-1":  {"u5", "n1", "web", "web"},
	}}
	r := newRig(t, func(cfg *serverapi.Config, _ *nodes.Config) {
		cfg.Checkers = map[string]nodeattest.FactChecker{jointoken.Name: c}
		cfg.RulePairs = 2
	})
	agent, west := r.agentOn("fake:cluster:east", "fake:node:n1"), r.agentOn("fake:cluster:west", "fake:node:n1")
	rule := r.rule(podRule(agent.id, "/ns/{k8s.ns}/sa/{k8s.sa}")).Rule
	westRule := r.rule(podRule(west.id, "/ns/{k8s.ns}/sa/{k8s.sa}")).Rule
	if rule.Trust != "" {
		t.Errorf("trust %q", rule.Trust)
	}
	conn, westConn := r.connect(&agent), r.connect(&west)

	if id, reason := r.signPod(conn, rule.Id, podOf("web-1", "u1")); id != "spiffe://example.org/ns/shop/sa/web" {
		t.Errorf("%q, %q", id, reason)
	}
	if c.asked != 1 {
		t.Errorf("the platform was asked %d times for one pod, want 1", c.asked)
	}
	if n := countInTrail(t, r, `"kind":"issuance"`, rule.Id, `"facts":{"k8s.ns":"shop","k8s.pod":"web-1","k8s.pod_uid":"u1","k8s.sa":"web"}`, `"trust":"server"`, agent.id.String()); n != 2 { // R14
		t.Errorf("%d records of the issuance, want 2", n)
	}
	for name, lie := range map[string]struct {
		facts  map[string]string
		reason string
	}{
		"a pod of another node":            {podOf("web-2", "u2"), "pod_unknown"},
		"its uid under a name of ours":     {podOf("web-1", "u2"), "pod_unknown"},
		"a pod that was":                   {podOf("web-1", "u0"), "pod_unknown"},
		"a pod of another cluster":         {podOf("web-1", "u5"), "pod_unknown"},
		"another service account":          {podOf("web-1", "u1", "k8s.sa", "admin"), "rule_facts_refuted"},
		"another pod's labels":             {podOf("db-1", "u3", "k8s.sa", "db"), "rule_facts_refuted"},
		"another namespace than the rules": {podOf("web-1", "u4", "k8s.ns", "other"), "rule_facts_refuted"},
		"no pod":                           {podOf("", "u1", "k8s.pod", ""), "rule_fact_missing"},
		"no uid":                           {podOf("web-1", "", "k8s.pod_uid", ""), "rule_fact_missing"},
		"a path for a pod":                 {podOf("web-1/../x", "u1"), "rule_fact_invalid"},
		"one more fact":                    {podOf("web-1", "u1", "k8s.node", "n1"), "facts_unexpected"},
		"an unknown fact":                  {podOf("web-1", "u1", "unix.user", "root"), "facts_unexpected"},
		"no facts":                         {nil, "rule_fact_missing"},
	} {
		if id, reason := r.signPod(conn, rule.Id, lie.facts); reason != lie.reason {
			t.Errorf("%s: %q, %q, want %s", name, id, reason, lie.reason)
		}
	}
	// The same labels, names and uid in another cluster are another pod's.
	for _, facts := range []map[string]string{podOf("web-1", "u1"), podOf("db-1", "u3")} {
		if id, reason := r.signPod(westConn, westRule.Id, facts); reason != "pod_unknown" {
			t.Errorf("%v in another cluster: %q, %q", facts, id, reason)
		}
	}
	if id, reason := r.signPod(westConn, rule.Id, podOf("web-1", "u1")); reason != "grant_unknown" {
		t.Errorf("by an agent without the rule: %q, %q", id, reason)
	}
	if id, reason := r.signPod(westConn, westRule.Id, podOf("web-1", "u5")); id != "spiffe://example.org/ns/shop/sa/web" {
		t.Errorf("west: %q, %q", id, reason)
	}

	// While the API is away those that were seen go on; what the others hear says that
	// it may change. One that cannot be checked costs the rest of its batch nothing (R59).
	c.change(func() { c.away = true; c.pods["east/shop/web-3"] = fakePod{"u6", "n1", "web", "web"} })
	if id, reason := r.signPod(conn, rule.Id, podOf("web-1", "u1")); reason != "" {
		t.Errorf("a renewal while the API is away: %q, %q", id, reason)
	}
	_, err := issuev1.NewIssueClient(conn).JWT(t.Context(), &issuev1.JWTRequest{GrantId: rule.Id, Facts: podOf("web-3", "u6"), Audience: []string{"a"}})
	wantCode(t, "a new pod while the API is away", err, codes.Unavailable, entry.FactsUnavailable)
	plain := r.create(entryUnder(agent.id, "/web"))[0]
	resp, err := issuev1.NewIssueClient(conn).X509(t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{
		{GrantId: rule.Id, Facts: podOf("web-3", "u6"), Csr: newCSR(t, newKey(t))}, {GrantId: plain.Id, Csr: newCSR(t, newKey(t))},
	}})
	if err != nil || resp.Results[0].Refusal.GetReason() != entry.FactsUnavailable || resp.Results[0].Refusal.GetRemedy() == "" || resp.Results[1].Refusal != nil {
		t.Errorf("%v, %v", resp, err)
	}

	// Any number of pods with one ID are one pair (they are what rule_pairs_per_agent bounds).
	c.change(func() {
		c.away = false
		for i := range 10 {
			c.pods[fmt.Sprint("east/shop/more-", i)] = fakePod{fmt.Sprint("m", i), "n1", "web", "web"}
		}
	})
	for i := range 10 {
		if id, reason := r.signPod(conn, rule.Id, podOf(fmt.Sprint("more-", i), fmt.Sprint("m", i))); reason != "" {
			t.Errorf("pod %d: %q, %q", i, id, reason)
		}
	}
	// With the agent's word instead, nobody is asked, and the trail says so.
	asked := c.asked
	word := podRule(agent.id, "/word/{k8s.ns}/{k8s.pod}")
	word.Trust = "agent"
	made := r.rule(word).Rule
	if id, reason := r.signPod(conn, made.Id, map[string]string{"k8s.ns": "any", "k8s.pod": "thing", "k8s.pod_uid": "x"}); id != "spiffe://example.org/word/any/thing" || c.asked != asked {
		t.Errorf("on the agent's word: %q, %q", id, reason)
	}
	if n := countInTrail(t, r, `"kind":"issuance"`, made.Id, `"k8s.pod_uid":"x"`, `"trust":"agent"`); n != 2 {
		t.Errorf("%d records, want 2", n)
	}
	count, err := entryv1.NewEntryClient(r.admin).CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	if err != nil || count.Count != 1 {
		t.Errorf("%v, %v: pods must not make entries", count, err)
	}
}

// Who states what is not so is on record, for an item of a batch as for a call of its
// own: who asked for what, what was stated, and what was said to that (R14).
func TestRefutedFactsAreOnRecord(t *testing.T) {
	c := &cluster{pods: map[string]fakePod{"east/shop/web-1": {"u1", "n1", "web", "web"}, "east/shop/web-2": {"u2", "n2", "web", "web"}}}
	r := newRig(t, func(cfg *serverapi.Config, _ *nodes.Config) {
		cfg.Checkers = map[string]nodeattest.FactChecker{jointoken.Name: c}
	})
	agent := r.agentOn("fake:cluster:east", "fake:node:n1")
	rule := r.rule(podRule(agent.id, "/ns/{k8s.ns}/sa/{k8s.sa}")).Rule
	client := issuev1.NewIssueClient(r.connect(&agent))
	item := func(facts map[string]string) *issuev1.X509Item {
		return &issuev1.X509Item{GrantId: rule.Id, Facts: facts, Csr: newCSR(t, newKey(t))}
	}
	for _, lie := range []struct {
		facts          map[string]string
		reason, detail string
	}{
		{podOf("web-1", "u1", "k8s.sa", "admin"), "rule_facts_refuted", `the platform does not say that k8s.sa is \"admin\"`},
		{podOf("web-2", "u2"), "pod_unknown", "no such pod runs on this node"},
	} {
		resp, err := client.X509(t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{item(podOf("web-1", "u1")), item(lie.facts), item(podOf("web-1", "", "k8s.pod_uid", ""))}})
		if err != nil || resp.Results[0].Refusal != nil || resp.Results[1].Refusal.GetReason() != lie.reason || resp.Results[2].Refusal.GetReason() != "rule_fact_missing" {
			t.Fatalf("%v, %v", resp, err)
		}
		_, err = client.JWT(t.Context(), &issuev1.JWTRequest{GrantId: rule.Id, Facts: lie.facts, Audience: []string{"a"}})
		wantCode(t, "JWT", err, codes.PermissionDenied, lie.reason)
		facts := fmt.Sprintf(`"facts":{"k8s.ns":"shop","k8s.pod":%q,"k8s.pod_uid":%q,"k8s.sa":%q}`, lie.facts["k8s.pod"], lie.facts["k8s.pod_uid"], lie.facts["k8s.sa"])
		for _, call := range []string{"X509", "JWT"} {
			if n := countInTrail(t, r, `"kind":"refusal"`, `"caller":"`+agent.id.String()+`"`, `"call":"/plastron.issue.v1.Issue/`+call+`"`, `"subject":"`+rule.Id+`"`,
				`"kind":"denied"`, `"reason":"`+lie.reason+`"`, `"detail":"`+lie.detail+`"`, facts); n != 1 {
				t.Errorf("%d records of %s over %s, want 1", n, lie.reason, call)
			}
		}
	}
	// What is merely incomplete is no refusal of a caller, and SPIRE's API knows no rules.
	batch, err := svidv1.NewSVIDClient(r.connect(&agent)).BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: rule.Id, Csr: newCSR(t, newKey(t))}}})
	if err != nil || codes.Code(batch.Results[0].Status.Code) != codes.NotFound {
		t.Errorf("%v, %v", batch, err)
	}
	if n := countInTrail(t, r, `"kind":"refusal"`); n != 4 {
		t.Errorf("%d refusals on record, want 4", n)
	}
}

// half checks less than a rule may need.
type half struct{ cluster }

func (*half) Checks(fact string) bool { return fact != "k8s.sa" && entry.Verifiable(fact) }

// A rule that nobody here can verify is refused when it is written, and when the
// agent's node is not one of which something can be found out.
func TestUnverifiableFacts(t *testing.T) {
	checkers := map[string]nodeattest.FactChecker{"elsewhere": &half{}}
	r := newRig(t, func(cfg *serverapi.Config, _ *nodes.Config) { cfg.Checkers = checkers })
	agent := r.agent()
	create := func(template string) string {
		t.Helper()
		resp, err := rulev1.NewRulesClient(r.admin).Create(t.Context(), &rulev1.CreateRequest{Rules: []*rulev1.Rule{podRule(agent.id, template)}})
		if err != nil {
			t.Fatal(err)
		}
		refusal := resp.Results[0].GetRefusal()
		if refusal != nil && refusal.Remedy == "" {
			t.Errorf("no fix in %v", refusal)
		}
		return refusal.GetReason()
	}
	for _, template := range []string{"/user/{unix.user}", "/ns/{k8s.ns}/user/{unix.user}", "/c/{k8s.container}", "/ns/{k8s.ns}/sa/{k8s.sa}"} {
		if reason := create(template); reason != "rule_trust_missing" {
			t.Errorf("%s: %q", template, reason)
		}
	}
	rule := r.rule(podRule(agent.id, "/ns/{k8s.ns}/pod/{k8s.pod}")).Rule
	resp, err := issuev1.NewIssueClient(r.connect(&agent)).X509(t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{
		{GrantId: rule.Id, Facts: map[string]string{"k8s.ns": "shop", "k8s.pod": "web-1", "k8s.pod_uid": "u1"}, Csr: newCSR(t, newKey(t))}}})
	if err != nil || resp.Results[0].Refusal.GetReason() != "rule_facts_unverifiable" || resp.Results[0].Refusal.GetRemedy() == "" {
		t.Errorf("%v, %v", resp, err)
	}
	clear(checkers) // the attestor is configured no more
	if reason := create("/pod/{k8s.pod}"); reason != "rule_trust_missing" {
		t.Errorf("without a checker: %q", reason)
	}
}
