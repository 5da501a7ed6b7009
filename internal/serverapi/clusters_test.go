package serverapi_test

import (
	"encoding/json"
	"errors"
	"io"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/kube"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/k8spsat"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
)

// region is two clusters that the server knows, and a third that it does not.
type region map[string]*kubeapi.Server

func newRegion(t *testing.T) (region, option) {
	r, config := region{}, &k8spsat.Config{Clusters: map[string]k8spsat.Cluster{}}
	for _, name := range []string{"east", "west", "foreign"} {
		api := kubeapi.New(t)
		api.AddNode("n1", nil)
		api.AddNode("n2", nil)
		api.Grant("plastron", kubeapi.Rule{Groups: []string{""}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get"}},
			kubeapi.Rule{Groups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}})
		if r[name] = api; name != "foreign" {
			config.Clusters[name] = k8spsat.Cluster{ServiceAccountAllowList: []string{"spire:agent"}, KubeConfigFile: api.Kubeconfig("plastron")}
		}
	}
	return r, func(cfg *serverapi.Config, n *nodes.Config) {
		v, err := config.Open(t.Context(), nodeattest.Env{Log: cfg.Log})
		if err != nil {
			t.Fatal(err)
		}
		n.Verifiers[k8spsat.Name] = v
		cfg.Checkers = map[string]nodeattest.FactChecker{k8spsat.Name: v.(nodeattest.FactChecker)}
	}
}

// join attests an agent over the wire by the token of its pod on a node.
func (r *rig) join(in *kubeapi.Server, node, as string) (holder, error) {
	r.t.Helper()
	pod := in.AddPod(kubeapi.Pod{Namespace: "spire", Name: "agent-" + node, ServiceAccount: "agent", Node: node})
	payload, err := json.Marshal(map[string]string{"cluster": as, "token": in.Token(pod, kubeapi.TokenOptions{Audience: "spire-server"})})
	if err != nil {
		r.t.Fatal(err)
	}
	stream, err := agentv1.NewAgentClient(r.connect(nil)).AttestAgent(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	defer stream.CloseSend()
	key := newKey(r.t)
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &spiretypes.AttestationData{Type: k8spsat.Name, Payload: payload}, Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(r.t, key)},
	}}})
	if err != nil && !errors.Is(err, io.EOF) {
		r.t.Fatal(err)
	}
	reply, err := stream.Recv()
	if err != nil {
		return holder{}, err
	}
	return holderOf(reply.GetResult().GetSvid(), key), nil
}

func statedOf(p kube.Pod) map[string]string {
	return map[string]string{"k8s.ns": p.Meta.Namespace, "k8s.sa": p.Spec.ServiceAccount, "k8s.pod": p.Meta.Name, "k8s.pod_uid": p.Meta.UID}
}

// Same labels in another cluster, same pod UID reused, token of another cluster,
// deleted pod: nothing. Claims 18, 34.
func TestNothingForOtherPods(t *testing.T) {
	clusters, with := newRegion(t)
	r := newRig(t, with)
	east, west := clusters["east"], clusters["west"]
	agents, rules := map[string]holder{}, map[string]string{}
	for name, in := range map[string]*kubeapi.Server{"east": east, "west": west} {
		h, err := r.join(in, "n1", name)
		if err != nil {
			t.Fatal(err)
		}
		agents[name], rules[name] = h, r.rule(podRule(h.id, "/ns/{k8s.ns}/sa/{k8s.sa}")).Rule.Id
	}
	sign := func(agent string, facts map[string]string, want string) {
		t.Helper()
		h := agents[agent]
		id, reason := r.signPod(r.connect(&h), rules[agent], facts)
		if reason != want || (want == "") != (id == "spiffe://example.org/ns/shop/sa/web") {
			t.Errorf("%s for %v: %q, %q, want %q", agent, facts, id, reason, want)
		}
	}
	web := kubeapi.Pod{Namespace: "shop", Name: "web-1", ServiceAccount: "web", Node: "n1", Labels: map[string]string{"app": "web"}}
	pod := east.AddPod(web)
	sign("east", statedOf(pod), "")

	// A token of another cluster lets no agent in, whatever cluster it names.
	for _, as := range []string{"east", "west", "foreign"} {
		if h, err := r.join(clusters["foreign"], "n1", as); err == nil {
			t.Errorf("%s was admitted with a token of another cluster that it called %s", h.id, as)
		}
	}
	if h, err := r.join(west, "n2", "east"); err == nil {
		t.Errorf("%s was admitted with the other cluster's token", h.id)
	}

	// The same names, labels and UID in another cluster.
	sign("west", statedOf(pod), "k8s_pod_unknown")
	twin := web
	twin.Name = "web-2"
	first := east.AddPod(twin)
	twin.Node = "n2"
	west.AddPod(twin)
	west.ChangePod("shop", "web-2", func(p *kube.Pod) { p.Meta.UID = first.Meta.UID })
	sign("west", statedOf(first), "k8s_pod_elsewhere")

	// A UID that was another pod's.
	db := east.AddPod(kubeapi.Pod{Namespace: "shop", Name: "db-1", ServiceAccount: "db", Node: "n1", Labels: map[string]string{"app": "db"}})
	reused := statedOf(pod)
	reused["k8s.pod_uid"] = db.Meta.UID
	sign("east", reused, "k8s_pod_replaced")
	sign("east", statedOf(db), "rule_facts_refuted") // its labels are not the rule's

	// A pod that was deleted before anybody asked, and one made anew by its name.
	gone := web
	gone.Name = "web-3"
	deleted := east.AddPod(gone)
	east.DeletePod("shop", "web-3")
	sign("east", statedOf(deleted), "k8s_pod_unknown")
	gone.Name = "web-4"
	deleted = east.AddPod(gone)
	again := east.AddPod(gone)
	sign("east", statedOf(deleted), "k8s_pod_replaced")
	sign("east", statedOf(again), "")
	// A pod of another node of the same cluster.
	far := web
	far.Name, far.Node = "web-5", "n2"
	sign("east", statedOf(east.AddPod(far)), "k8s_pod_elsewhere")

	// The API server goes: what was seen goes on, and the rest waits (R59).
	east.Close()
	sign("east", statedOf(pod), "")
	newcomer := statedOf(pod)
	newcomer["k8s.pod"] = "web-9"
	began := time.Now()
	sign("east", newcomer, entry.FactsUnavailable)
	if took := time.Since(began); took > deadline {
		t.Errorf("it took %v to say so", took)
	}
	if n := countInTrail(t, r, `"kind":"issuance"`, `"trust":"server"`, pod.Meta.UID, agents["east"].id.String()); n != 4 { // R14
		t.Errorf("%d records of issuances for the pod, want 4", n)
	}
}
