package k8spsat

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
	"github.com/plastron/plastron/internal/nodeattest"
)

// region is two clusters, east and west, with nodes of one name, and a third whose
// API server is not asked.
type region struct {
	t          *testing.T
	east, west *kubeapi.Server
	node       map[string]kube.Node
	log        strings.Builder
	checker    nodeattest.FactChecker
}

// mayLook is all that looking at pods takes.
var mayLook = kubeapi.Rule{Groups: []string{""}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get"}}

func newRegion(t *testing.T) *region {
	r := &region{t: t, east: kubeapi.New(t), west: kubeapi.New(t), node: map[string]kube.Node{}}
	clusters := map[string]Cluster{}
	for name, api := range map[string]*kubeapi.Server{"east": r.east, "west": r.west} {
		for _, machine := range []string{"n1", "n2"} {
			r.node[name+"/"+machine] = api.AddNode(machine, nil)
		}
		api.Grant("plastron", mayLook)
		clusters[name] = Cluster{ServiceAccountAllowList: []string{"spire:spire-agent"}, KubeConfigFile: api.Kubeconfig("plastron")}
	}
	clusters["offline"] = Cluster{ServiceAccountAllowList: []string{"spire:spire-agent"}, Issuer: "https://issuer.test", JWKSURI: "https://issuer.test/keys"}
	v, err := (&Config{Clusters: clusters}).Open(t.Context(), nodeattest.Env{Log: slog.New(slog.NewTextHandler(&r.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range v.(*verifier).clusters {
		c.looks.turn, c.looks.wait = time.Minute, time.Minute
	}
	r.checker = v.(nodeattest.FactChecker)
	return r
}

// on is what the agent of a machine has for selectors.
func (r *region) on(cluster, machine string) []entry.Selector {
	return r.at(cluster, machine, r.node[cluster+"/"+machine].Meta.UID)
}

func (r *region) at(cluster, machine, uid string) []entry.Selector {
	out, err := entry.NormalizeSelectors([]entry.Selector{{Type: Name, Value: "cluster:" + cluster}, {Type: Name, Value: "agent_ns:spire"},
		{Type: Name, Value: "agent_node_name:" + machine}, {Type: Name, Value: "agent_node_uid:" + uid}, {Type: "other", Value: "cluster:west"}})
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

func shopPod(machine string) kubeapi.Pod {
	return kubeapi.Pod{Namespace: "shop", Name: "web-1", ServiceAccount: "web", Node: machine, Labels: map[string]string{"app": "web", "empty": ""}}
}

func named(p kube.Pod) map[string]string {
	return map[string]string{"k8s.ns": p.Meta.Namespace, "k8s.pod": p.Meta.Name, "k8s.pod_uid": p.Meta.UID, "k8s.sa": "anything"}
}

// Whoever makes a pod decides how much there is to say of it; what is remembered of
// each is bounded (R98).
func TestLookIsBounded(t *testing.T) {
	r := newRegion(t)
	p := r.east.AddPod(shopPod("n1"))
	r.east.ChangePod("shop", "web-1", func(p *kube.Pod) {
		for i := range 5000 {
			p.Meta.Owners = append(p.Meta.Owners, kube.Owner{Kind: "ReplicaSet", Name: fmt.Sprintf("%0200d", i), UID: fmt.Sprint(i)})
		}
	})
	seen, err := r.checker.Look(t.Context(), r.on("east", "n1"), named(p))
	if err != nil {
		t.Fatal(err)
	}
	size := 0
	for _, s := range seen.Selectors {
		size += len(s.Value)
	}
	if size > maxSaid || len(seen.Selectors) < 10 {
		t.Errorf("%d selectors of %d bytes", len(seen.Selectors), size)
	}
	if !slices.Contains(seen.Selectors, entry.Selector{Type: "k8s", Value: "pod-label:app:web"}) {
		t.Error("a label is missing")
	}
}

func (r *region) refused(what string, node []entry.Selector, facts map[string]string, reason string, kind fault.Kind) {
	r.t.Helper()
	seen, err := r.checker.Look(r.t.Context(), node, facts)
	if fault.ReasonOf(err) != reason || fault.KindOf(err) != kind || seen.Facts != nil {
		r.t.Errorf("%s: %+v, %v, want %s", what, seen, err, reason)
	}
}

func TestLook(t *testing.T) {
	r := newRegion(t)
	p := r.east.AddPod(shopPod("n1"))
	r.east.ChangePod("shop", "web-1", func(p *kube.Pod) {
		p.Meta.Owners = []kube.Owner{{Kind: "ReplicaSet", Name: "web", UID: "o1"}}
		p.Meta.Labels["a:b"] = "c"
	})
	seen, err := r.checker.Look(t.Context(), r.on("east", "n1"), named(p))
	if err != nil {
		t.Fatal(err)
	}
	// What is stated besides where to look is not believed.
	want := map[string]string{"k8s.ns": "shop", "k8s.sa": "web", "k8s.pod": "web-1", "k8s.pod_uid": p.Meta.UID, "k8s.node": "n1"}
	if fmt.Sprint(seen.Facts) != fmt.Sprint(want) || !seen.Until.IsZero() {
		t.Errorf("facts %v until %v, want %v", seen.Facts, seen.Until, want)
	}
	var selectors []string
	for _, s := range seen.Selectors {
		if !s.Verifiable() {
			t.Errorf("%s counts for nothing", s)
		}
		selectors = append(selectors, s.String())
	}
	all := []string{"k8s:node-name:n1", "k8s:ns:shop", "k8s:pod-label:app:web", "k8s:pod-label:empty:", "k8s:pod-name:web-1", "k8s:pod-owner-uid:ReplicaSet:o1",
		"k8s:pod-owner:ReplicaSet:web", "k8s:pod-uid:" + p.Meta.UID, "k8s:sa:web"}
	if !slices.Equal(selectors, all) {
		t.Errorf("selectors %q, want %q", selectors, all)
	}
	// One call for a pod, and one a minute for its node.
	if _, err := r.checker.Look(t.Context(), r.on("east", "n1"), named(p)); err != nil || r.east.Calls("get pods") != 2 || r.east.Calls("get nodes") != 1 || r.west.Calls("get pods") != 0 {
		t.Errorf("%v, %d and %d calls", err, r.east.Calls("get pods"), r.east.Calls("get nodes"))
	}
	for fact, checks := range map[string]bool{"k8s.ns": true, "k8s.node": true, "k8s.container": false, "unix.uid": false} {
		if r.checker.Checks(fact) != checks {
			t.Errorf("%s: %v", fact, !checks)
		}
	}
}

// Nothing for what is not a pod that runs on that node now.
func TestLookElsewhere(t *testing.T) {
	r := newRegion(t)
	p := r.east.AddPod(shopPod("n1"))
	twin := r.west.AddPod(shopPod("n2")) // the same in another cluster, but for its node
	r.west.ChangePod("shop", "web-1", func(w *kube.Pod) { w.Meta.UID = p.Meta.UID })
	twin.Meta.UID = p.Meta.UID

	r.refused("from another node", r.on("east", "n2"), named(p), "k8s_pod_elsewhere", fault.Denied)
	r.refused("the same labels and UID from another cluster", r.on("west", "n1"), named(p), "k8s_pod_elsewhere", fault.Denied)
	other := named(p)
	other["k8s.pod_uid"] = r.east.AddPod(kubeapi.Pod{Namespace: "shop", Name: "db-1", Node: "n1"}).Meta.UID
	r.refused("the UID of another pod", r.on("east", "n1"), other, "k8s_pod_replaced", fault.Denied)
	for _, field := range []string{"k8s.ns", "k8s.pod"} {
		for _, value := range []string{"none", "../../../nodes/n1", "", "a/b", strings.Repeat("x", 300)} {
			facts := named(p)
			facts[field] = value
			r.refused(field+" "+value, r.on("east", "n1"), facts, "k8s_pod_unknown", fault.Denied)
		}
	}
	r.refused("a node made anew by the same name", r.at("east", "n1", "u0"), named(p), "k8s_pod_elsewhere", fault.Denied)
	if _, err := r.checker.Look(t.Context(), r.on("west", "n2"), named(twin)); err != nil {
		t.Errorf("the other cluster's own: %v", err)
	}

	spoil := func(what, reason string, f func(*kube.Pod)) {
		t.Helper()
		p := r.east.AddPod(shopPod("n1"))
		r.east.ChangePod("shop", "web-1", f)
		r.refused(what, r.on("east", "n1"), named(p), reason, fault.Denied)
	}
	past, soon := time.Now().Add(-time.Second).UTC(), time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	spoil("ended well", "k8s_pod_ended", func(p *kube.Pod) { p.Status.Phase = "Succeeded" })
	spoil("ended badly", "k8s_pod_ended", func(p *kube.Pod) { p.Status.Phase = "Failed" })
	spoil("over its time", "k8s_pod_ended", func(p *kube.Pod) { p.Meta.Deleted = &past })
	spoil("on no node yet", "k8s_pod_elsewhere", func(p *kube.Pod) { p.Spec.NodeName = "" })
	// A node may make pods of any name and with any labels (mirrors of static ones), but
	// none with a service account: those would let it have any namespace.
	spoil("made by the node", "k8s_pod_static", func(p *kube.Pod) { p.Spec.ServiceAccount = "" })
	// The kubelet names a static pod by another UID than its mirror has.
	spoil("static", "k8s_pod_static", func(p *kube.Pod) { p.Meta.UID, p.Spec.ServiceAccount = "mirror", "" })

	// One that is asked to go has the time that it was given.
	p = r.east.AddPod(shopPod("n1"))
	r.east.ChangePod("shop", "web-1", func(p *kube.Pod) { p.Meta.Deleted = &soon })
	if seen, err := r.checker.Look(t.Context(), r.on("east", "n1"), named(p)); err != nil || !seen.Until.Equal(soon) {
		t.Errorf("ending: until %v, %v", seen.Until, err)
	}
	r.east.DeletePod("shop", "web-1")
	r.refused("deleted", r.on("east", "n1"), named(p), "k8s_pod_unknown", fault.Denied)
	again := r.east.AddPod(shopPod("n1"))
	r.refused("made anew by the same name", r.on("east", "n1"), named(p), "k8s_pod_replaced", fault.Denied)
	r.east.DeleteNode("n2")
	onGone := r.east.AddPod(kubeapi.Pod{Namespace: "shop", Name: "x", Node: "n1"})
	r.east.ChangePod("shop", "x", func(p *kube.Pod) { p.Spec.NodeName = "n2" })
	r.refused("on a node that is gone", r.on("east", "n2"), named(onGone), "k8s_pod_elsewhere", fault.Denied)

	// Where nobody can be asked nothing is found out.
	for _, node := range [][]entry.Selector{r.at("offline", "n1", "u1"), r.at("north", "n1", "u1"), r.at("east", "n1", ""), r.on("east", "n1")[:1], nil} {
		r.refused("nobody to ask", node, named(again), "rule_facts_unverifiable", fault.Precondition)
	}
	if _, err := r.checker.Look(t.Context(), r.at("east", "n1", ""), named(again)); err == nil || !strings.Contains(err.Error(), "its token did not tell") {
		t.Errorf("a node that is not known: %v", err)
	}
}

func TestLookWhileTheClusterIsAway(t *testing.T) {
	r := newRegion(t)
	p := r.east.AddPod(shopPod("n1"))
	began := time.Now()
	for name, answer := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"500":            func(rw http.ResponseWriter, _ *http.Request) bool { rw.WriteHeader(500); return true },
		"not JSON":       func(rw http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(rw, "<html>"); return true },
		"404 of a proxy": func(rw http.ResponseWriter, _ *http.Request) bool { rw.WriteHeader(404); return true },
		"broken off":     func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
	} {
		r.east.Intercept(answer)
		r.refused(name, r.on("east", "n1"), named(p), "k8s_psat_unavailable", fault.Unavailable)
	}
	r.east.Intercept(nil)
	r.east.Revoke("plastron") // an operator's mistake says nothing about the pod
	r.refused("no right", r.on("east", "n1"), named(p), "k8s_psat_unavailable", fault.Unavailable)
	most := 1 + int(time.Since(began)/warnEvery)
	if n := strings.Count(r.log.String(), "\n"); n < 1 || n > most || !strings.Contains(r.log.String(), "east") { // R104
		t.Errorf("%d lines:\n%s", n, r.log.String())
	}
	r.east.Grant("plastron", mayLook)

	// A silent cluster has a bounded number of calls, and costs no other anything.
	hung := make(chan struct{}, 100)
	r.east.Intercept(func(_ http.ResponseWriter, req *http.Request) bool {
		hung <- struct{}{}
		<-req.Context().Done()
		return true
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	began = time.Now()
	for range maxLooks + 10 {
		go func() {
			_, err := r.checker.Look(ctx, r.on("east", "n1"), named(p))
			ended <- err
		}()
	}
	for range maxLooks {
		<-hung
	}
	if _, err := r.checker.Look(t.Context(), r.on("west", "n1"), named(r.west.AddPod(shopPod("n1")))); err != nil {
		t.Errorf("the other cluster: %v", err)
	}
	// After 10 s a call ends and makes room for the next.
	if n := len(hung); n != 0 && time.Since(began) < 10*time.Second {
		t.Errorf("%d calls more are under way", n)
	}
	cancel()
	for range maxLooks + 10 {
		if err := <-ended; err == nil {
			t.Error("a silent cluster has confirmed something")
		}
	}
	r.east.Intercept(nil)
	if _, err := r.checker.Look(t.Context(), r.on("east", "n1"), named(p)); err != nil {
		t.Errorf("after that: %v", err)
	}
}
