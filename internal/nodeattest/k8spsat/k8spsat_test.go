package k8spsat

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/attesttest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// world is a cluster with an agent's pod on its only node.
type world struct {
	t    testing.TB
	api  *kubeapi.Server
	node kube.Node
	pod  kube.Pod
	log  strings.Builder
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, api: kubeapi.New(t)}
	w.node = w.api.AddNode("node-1", map[string]string{"zone": "a", "topology.kubernetes.io/rack": "r1", "secret": "s"})
	w.pod = w.agent("agent-x")
	w.api.Grant("plastron",
		kubeapi.Rule{Groups: []string{""}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get"}},
		kubeapi.Rule{Groups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}})
	return w
}

func (w *world) agent(name string) kube.Pod {
	return w.api.AddPod(kubeapi.Pod{Namespace: "spire", Name: name, ServiceAccount: "spire-agent", Node: "node-1", Labels: map[string]string{"app": "agent"}})
}

// reviewed is a cluster whose API server is asked, offline one whose keys are in a file.
func (w *world) reviewed() Cluster {
	return Cluster{ServiceAccountAllowList: []string{"spire:spire-agent"}, KubeConfigFile: w.api.Kubeconfig("plastron")}
}

func (w *world) offline() Cluster {
	return Cluster{ServiceAccountAllowList: []string{"spire:spire-agent"}, Issuer: w.api.Issuer, JWKSFile: w.file("jwks", string(w.api.JWKS()))}
}

// ways are both.
func (w *world) ways() map[string]Cluster {
	return map[string]Cluster{"review": w.reviewed(), "offline": w.offline()}
}

func (w *world) file(name, text string) string {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

func (w *world) open(c *Config) nodeattest.Verifier {
	w.t.Helper()
	v, err := c.Open(context.Background(), nodeattest.Env{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Log: slog.New(slog.NewTextHandler(&w.log, nil)),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *world) verifier(c Cluster) nodeattest.Verifier {
	w.t.Helper()
	return w.open(&Config{Clusters: map[string]Cluster{"c1": c}})
}

func (w *world) token(pod kube.Pod) string {
	return w.api.Token(pod, kubeapi.TokenOptions{Audience: defaultAudience})
}

func (w *world) prover(token string) nodeattest.Prover {
	w.t.Helper()
	p, err := (&AgentConfig{Cluster: "c1", TokenPath: w.file("token", token+"\n")}).Prover("")
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

func show(ctx context.Context, v nodeattest.Verifier, cluster, token string) (nodeattest.Evidence, error) {
	payload, err := json.Marshal(attestation{cluster, token})
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	return v.Verify(ctx, payload, nil)
}

// refusal shows a token and wants it refused, with nothing said that is a secret.
func refusal(t *testing.T, v nodeattest.Verifier, token, reason string, kinds ...fault.Kind) {
	t.Helper()
	e, err := show(t.Context(), v, "c1", token)
	switch {
	case err == nil:
		t.Fatalf("Verify() = %+v, want a refusal", e)
	case !slices.Contains(kinds, fault.KindOf(err)):
		t.Errorf("Verify() = %v (%v), want %v", err, fault.KindOf(err), kinds)
	case reason != "" && fault.ReasonOf(err) != reason:
		t.Errorf("reason %s, want %s", fault.ReasonOf(err), reason)
	case len(token) > 40 && strings.Contains(err.Error(), token[len(token)-20:]):
		t.Errorf("the error tells the token: %v", err) // R104
	}
}

func TestContract(t *testing.T) {
	w := newWorld(t)
	for way, cluster := range w.ways() {
		t.Run(way, func(t *testing.T) {
			attesttest.Run(t, func(t *testing.T) attesttest.Pair {
				return attesttest.Pair{Name: Name, Verifier: w.verifier(cluster), Prover: w.prover(w.token(w.pod))}
			})
		})
	}
}

func TestEvidence(t *testing.T) {
	w := newWorld(t)
	labels := w.reviewed()
	labels.AllowedNodeLabelKeys = []string{"zone", "topology.kubernetes.io/rack", "none"}
	labels.AllowedPodLabelKeys = []string{"app"}
	byPod, offlineByPod := w.reviewed(), w.offline()
	byPod.UsePodUIDForAgentID, offlineByPod.UsePodUIDForAgentID = true, true
	all := "cluster:c1 agent_ns:spire agent_sa:spire-agent agent_pod_name:agent-x agent_pod_uid:" + w.pod.Meta.UID
	onNode := " agent_node_name:node-1 agent_node_uid:" + w.node.Meta.UID
	ip := " agent_node_ip:" + w.node.Status.Addresses[0].Address
	for name, c := range map[string]struct {
		cluster Cluster
		old     bool // the token does not tell the node
		path    string
		want    string
	}{
		"review":                     {w.reviewed(), false, "/c1/" + w.node.Meta.UID, all + ip + onNode},
		"review, old cluster":        {w.reviewed(), true, "/c1/" + w.node.Meta.UID, all + ip + onNode},
		"review, by pod":             {byPod, false, "/c1/pod/" + w.pod.Meta.UID, all + ip + onNode},
		"review, labels (claim 18)":  {labels, false, "/c1/" + w.node.Meta.UID, all + ip + onNode + " agent_node_label:zone:a agent_node_label:topology.kubernetes.io/rack:r1 agent_pod_label:app:agent"},
		"offline":                    {w.offline(), false, "/c1/" + w.node.Meta.UID, all + onNode},
		"offline, by pod":            {offlineByPod, false, "/c1/pod/" + w.pod.Meta.UID, all + onNode},
		"offline, by pod, old token": {offlineByPod, true, "/c1/pod/" + w.pod.Meta.UID, all},
	} {
		t.Run(name, func(t *testing.T) {
			token := w.api.Token(w.pod, kubeapi.TokenOptions{Audience: defaultAudience, NoNode: c.old})
			e, err := show(t.Context(), w.verifier(c.cluster), "c1", token)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, s := range e.Selectors {
				got = append(got, strings.TrimPrefix(s.String(), Name+":"))
			}
			want := strings.Fields(c.want)
			slices.Sort(got)
			slices.Sort(want)
			if e.Path != c.path || !slices.Equal(got, want) || !e.CanReattest || e.FirstUse || e.Outside || len(e.Holder) != 32 {
				t.Errorf("Verify() = %+v\npath      %s\nselectors %v\nwant      %v", e, c.path, got, want)
			}
		})
	}
	t.Run("offline, old token", func(t *testing.T) {
		refusal(t, w.verifier(w.offline()), w.api.Token(w.pod, kubeapi.TokenOptions{Audience: defaultAudience, NoNode: true}), "k8s_psat_node_unknown", fault.Denied)
	})
	t.Run("another pod of the node", func(t *testing.T) { // as after an update of the agents
		v := w.verifier(w.reviewed())
		first, err := show(t.Context(), v, "c1", w.token(w.pod))
		if err != nil {
			t.Fatal(err)
		}
		second, err := show(t.Context(), v, "c1", w.token(w.agent("agent-y")))
		if err != nil || first.Path != second.Path || string(first.Holder) != string(second.Holder) {
			t.Errorf("Verify() = %+v, then %+v, %v", first, second, err)
		}
	})
}

func TestCorpusA(t *testing.T) {
	w := newWorld(t)
	denied := []fault.Kind{fault.Denied, fault.Invalid}
	tokens := w.api.BadTokens(w.pod, defaultAudience)

	// A second cluster that gives itself the same issuer's name, and has an agent
	// whose pod and node have the same names and UIDs.
	second := newWorld(t)
	second.api.Issuer = w.api.Issuer
	tokens["A18 token of another cluster"] = second.token(second.pod)
	twin := second.pod
	twin.Meta.UID = w.pod.Meta.UID
	tokens["A18 token of another cluster, same UID"] = second.token(twin)
	for way, cluster := range w.ways() {
		v := w.verifier(cluster)
		for name, token := range tokens {
			t.Run(name+" "+way, func(t *testing.T) { refusal(t, v, token, "", denied...) })
		}
	}
	t.Run("A18 a lying API server", func(t *testing.T) { // whose word is held against the question
		for name, answer := range map[string]string{
			"other audience":  `{"authenticated":true,"audiences":["other"],"user":{"username":"system:serviceaccount:spire:spire-agent"}}`,
			"no audience":     `{"authenticated":true,"user":{"username":"system:serviceaccount:spire:spire-agent"}}`,
			"not bound":       `{"authenticated":true,"audiences":["spire-server"],"user":{"username":"system:serviceaccount:spire:spire-agent"}}`,
			"with an error":   `{"authenticated":true,"audiences":["spire-server"],"error":"x","user":{"username":"system:serviceaccount:spire:spire-agent","extra":{"authentication.kubernetes.io/pod-name":["agent-x"],"authentication.kubernetes.io/pod-uid":["` + w.pod.Meta.UID + `"]}}}`,
			"two pods":        `{"authenticated":true,"audiences":["spire-server"],"user":{"username":"system:serviceaccount:spire:spire-agent","extra":{"authentication.kubernetes.io/pod-name":["agent-x","b"],"authentication.kubernetes.io/pod-uid":["` + w.pod.Meta.UID + `"]}}}`,
			"A22 empty user":  `{"authenticated":true,"audiences":["spire-server"],"user":{}}`,
			"A22 nothing":     `{}`,
			"another account": `{"authenticated":true,"audiences":["spire-server"],"user":{"username":"system:serviceaccount:spire:other","extra":{"authentication.kubernetes.io/pod-name":["agent-x"],"authentication.kubernetes.io/pod-uid":["` + w.pod.Meta.UID + `"]}}}`,
			"a path":          `{"authenticated":true,"audiences":["spire-server"],"user":{"username":"system:serviceaccount:spire:spire-agent","extra":{"authentication.kubernetes.io/pod-name":["../../nodes"],"authentication.kubernetes.io/pod-uid":["u"]}}}`,
		} {
			t.Run(name, func(t *testing.T) {
				w.api.Intercept(func(rw http.ResponseWriter, r *http.Request) bool {
					if r.Method != http.MethodPost {
						return false
					}
					fmt.Fprintf(rw, `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":%s}`, answer)
					return true
				})
				defer w.api.Intercept(nil)
				refusal(t, w.verifier(w.reviewed()), w.token(w.pod), "", fault.Denied)
			})
		}
	})
	for way, cluster := range w.ways() {
		for name, list := range map[string][]string{
			"not listed": {"other:spire-agent", "spire:other"}, "extends a listed one": {"spire:spire-agen"},
			"is extended by a listed one": {"spire:spire-agent2"}, "case": {"spire:Spire-Agent"},
		} {
			t.Run("A19 "+name+" "+way, func(t *testing.T) {
				cluster.ServiceAccountAllowList = list
				before := w.api.Calls("create tokenreviews")
				refusal(t, w.verifier(cluster), w.token(w.pod), "k8s_psat_service_account", fault.Denied)
				if w.api.Calls("create tokenreviews") != before {
					t.Error("the API server was asked")
				}
			})
		}
	}
	review := w.verifier(w.reviewed())
	// The API server's review of a token ends with the pod, but lags by a moment; a
	// pod that is gone is refused whatever the review says.
	stale := func(t *testing.T, pod kube.Pod) {
		t.Helper()
		body, err := json.Marshal(map[string]any{
			"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": map[string]any{
				"authenticated": true, "audiences": []string{defaultAudience}, "user": map[string]any{
					"username": "system:serviceaccount:spire:spire-agent", "extra": map[string]any{
						"authentication.kubernetes.io/pod-name": []string{pod.Meta.Name}, "authentication.kubernetes.io/pod-uid": []string{pod.Meta.UID},
						"authentication.kubernetes.io/node-name": []string{"node-1"}, "authentication.kubernetes.io/node-uid": []string{w.node.Meta.UID},
					}}}})
		if err != nil {
			t.Fatal(err)
		}
		w.api.Intercept(func(rw http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				rw.Write(body)
			}
			return r.Method == http.MethodPost
		})
		t.Cleanup(func() { w.api.Intercept(nil) })
	}
	for name, spoil := range map[string]func(t *testing.T, pod kube.Pod){
		"A20 pod gone":                     func(t *testing.T, pod kube.Pod) { w.api.DeletePod("spire", pod.Meta.Name) },
		"A20 pod recreated with same name": func(t *testing.T, pod kube.Pod) { w.agent(pod.Meta.Name) },
		"A20 pod is being deleted": func(t *testing.T, pod kube.Pod) {
			w.change(pod, func(p *kube.Pod) { now := time.Now(); p.Meta.Deleted = &now })
		},
		"A20 pod has ended":                  func(t *testing.T, pod kube.Pod) { w.change(pod, func(p *kube.Pod) { p.Status.Phase = "Succeeded" }) },
		"A20 pod of another service account": func(t *testing.T, pod kube.Pod) { w.change(pod, func(p *kube.Pod) { p.Spec.ServiceAccount = "other" }) },
		"A20 pod on no node":                 func(t *testing.T, pod kube.Pod) { w.change(pod, func(p *kube.Pod) { p.Spec.NodeName = "" }) },
		"A20 pod on another node":            func(t *testing.T, pod kube.Pod) { w.change(pod, func(p *kube.Pod) { p.Spec.NodeName = "node-2" }) },
	} {
		for _, lag := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, review lags: %v", name, lag), func(t *testing.T) {
				pod := w.agent("agent-a20")
				if _, err := show(t.Context(), review, "c1", w.token(pod)); err != nil {
					t.Fatal(err)
				}
				token := w.token(pod)
				if lag {
					stale(t, pod)
				}
				spoil(t, pod)
				refusal(t, review, token, "", fault.Denied)
			})
		}
	}
	t.Run("A20 node gone", func(t *testing.T) {
		other := newWorld(t)
		v, token := other.verifier(other.reviewed()), other.token(other.pod)
		other.api.DeleteNode("node-1")
		refusal(t, v, token, "k8s_psat_pod_gone", fault.Denied)
		other.api.AddNode("node-1", nil) // by the same name
		refusal(t, v, token, "k8s_psat_pod_gone", fault.Denied)
		other.api.ChangeNode("node-1", func(n *kube.Node) { n.Meta.UID = "" })
		refusal(t, v, token, "", fault.Denied, fault.Unavailable)
		other.api.ChangeNode("node-1", func(n *kube.Node) { n.Meta.UID = "../../x" })
		refusal(t, v, token, "", fault.Denied, fault.Unavailable)
	})
	for name, cluster := range map[string]string{
		"unknown": "c2", "../x": "../x", "empty": "", "a slash": "c1/", "case": "C1", "1 MiB": strings.Repeat("c", 1<<20), "NUL": "c1\x00",
	} {
		t.Run("A21 "+name, func(t *testing.T) {
			before := w.api.Calls("create tokenreviews")
			_, err := show(t.Context(), review, cluster, w.token(w.pod))
			if k := fault.KindOf(err); err == nil || k != fault.Denied && k != fault.Invalid {
				t.Errorf("Verify() = %v", err)
			}
			if w.api.Calls("create tokenreviews") != before {
				t.Error("the API server was asked")
			}
		})
	}
	for name, payload := range map[string]string{
		"a member more": `{"cluster":"c1","token":"t","x":1}`, "twice": `{"cluster":"c1","token":"t","token":"u"}`,
		"case": `{"Cluster":"c1","token":"t"}`, "a number": `{"cluster":1,"token":"t"}`, "no token": `{"cluster":"c1"}`, "empty token": `{"cluster":"c1","token":""}`,
		"something behind": `{"cluster":"c1","token":"t"}{}`,
	} {
		t.Run("A3 "+name, func(t *testing.T) {
			if _, err := review.Verify(t.Context(), []byte(payload), nil); fault.KindOf(err) != fault.Invalid {
				t.Errorf("Verify() = %v", err)
			}
		})
	}
	for name, answer := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"hangs":      func(_ http.ResponseWriter, r *http.Request) bool { return wait(r) },
		"500":        func(rw http.ResponseWriter, _ *http.Request) bool { return status(rw, 500) },
		"401":        func(rw http.ResponseWriter, _ *http.Request) bool { return status(rw, 401) },
		"403":        func(rw http.ResponseWriter, _ *http.Request) bool { return status(rw, 403) },
		"404":        func(rw http.ResponseWriter, _ *http.Request) bool { return status(rw, 404) },
		"not JSON":   func(rw http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(rw, "<html>"); return true },
		"broken off": func(rw http.ResponseWriter, _ *http.Request) bool { panic(http.ErrAbortHandler) },
		"pods hang":  func(_ http.ResponseWriter, r *http.Request) bool { return r.Method == http.MethodGet && wait(r) },
		"pods refuse": func(rw http.ResponseWriter, r *http.Request) bool {
			return r.Method == http.MethodGet && status(rw, 403)
		},
	} {
		t.Run("A22 review "+name, func(t *testing.T) {
			w.api.Intercept(answer)
			defer w.api.Intercept(nil)
			w.log.Reset()
			v, want := w.verifier(w.reviewed()), 1 // in the log, however often it is tried
			ctx := t.Context()
			if strings.Contains(name, "hang") {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 300*time.Millisecond)
				defer cancel()
				want = 0 // it is the caller who has gone
			}
			began := time.Now()
			for range 2 {
				_, err := show(ctx, v, "c1", w.token(w.pod))
				if fault.KindOf(err) != fault.Unavailable || fault.ReasonOf(err) != "k8s_psat_unavailable" || strings.Contains(err.Error(), "HTTP") {
					t.Errorf("Verify() = %v", err)
				}
			}
			slow := want * int(time.Since(began)/warnEvery) // then it is said again
			if text, n := w.log.String(), strings.Count(w.log.String(), "agents of a cluster cannot be verified"); n < want || n > want+slow {
				t.Errorf("logged, not %d times: %s", want, text)
			}
		})
	}
	// A23 is about two agents: test/system.
}

func wait(r *http.Request) bool {
	<-r.Context().Done()
	return true
}

func status(rw http.ResponseWriter, code int) bool {
	rw.WriteHeader(code)
	return true
}

func (w *world) change(pod kube.Pod, f func(*kube.Pod)) { w.api.ChangePod("spire", pod.Meta.Name, f) }

// Several clusters: each token counts for its own only.
func TestClusters(t *testing.T) {
	one, two := newWorld(t), newWorld(t)
	v := one.open(&Config{Clusters: map[string]Cluster{"one": one.reviewed(), "two": two.reviewed(), "three": two.offline()}})
	for _, c := range []struct {
		cluster string
		w       *world
		ok      bool
	}{{"one", one, true}, {"one", two, false}, {"two", two, true}, {"two", one, false}, {"three", two, true}, {"three", one, false}} {
		e, err := show(t.Context(), v, c.cluster, c.w.token(c.w.pod))
		if (err == nil) != c.ok || c.ok && e.Path != "/"+c.cluster+"/"+c.w.node.Meta.UID {
			t.Errorf("cluster %s: Verify() = %+v, %v", c.cluster, e, err)
		}
	}
}

func TestConfig(t *testing.T) {
	w := newWorld(t)
	kubeconfig, jwks := w.api.Kubeconfig("plastron"), w.file("jwks", string(w.api.JWKS()))
	for name, c := range map[string]struct {
		text string
		want string // in the faults; empty: it is good
	}{
		"SPIRE's": {`clusters = { "c1" = { service_account_allow_list = ["spire:spire-agent"], audience = ["a", "b"], kube_config_file = "KUBECONFIG",
			allowed_node_label_keys = ["zone"], allowed_pod_label_keys = ["app"], use_pod_uid_for_agent_id = true } }`, ""},
		"blocks":            {`clusters { "c1" { service_account_allow_list = ["a:b"] kube_config_file = "KUBECONFIG" } "c2" { service_account_allow_list = ["a:b"] issuer = "x" jwks_file = "JWKS" } }`, ""},
		"none":              {``, "clusters: name one"},
		"empty":             {`clusters = {}`, "clusters: name one"},
		"no account":        {`clusters { "c1" { kube_config_file = "KUBECONFIG" } }`, "service_account_allow_list"},
		"a pattern":         {`clusters { "c1" { service_account_allow_list = ["spire:*"] kube_config_file = "KUBECONFIG" } }`, "no patterns"},
		"an account alone":  {`clusters { "c1" { service_account_allow_list = ["spire-agent"] kube_config_file = "KUBECONFIG" } }`, "NAMESPACE:NAME"},
		"no audience":       {`clusters { "c1" { service_account_allow_list = ["a:b"] audience = [] kube_config_file = "KUBECONFIG" } }`, "audience"},
		"a path":            {`clusters { "../c1" { service_account_allow_list = ["a:b"] kube_config_file = "KUBECONFIG" } }`, "part of an ID"},
		"a slash":           {`clusters { "a/b" { service_account_allow_list = ["a:b"] kube_config_file = "KUBECONFIG" } }`, "part of an ID"},
		"both ways":         {`clusters { "c1" { service_account_allow_list = ["a:b"] kube_config_file = "KUBECONFIG" issuer = "x" jwks_file = "JWKS" } }`, "remove one"},
		"keys alone":        {`clusters { "c1" { service_account_allow_list = ["a:b"] jwks_file = "JWKS" } }`, "issuer: must be set"},
		"labels offline":    {`clusters { "c1" { service_account_allow_list = ["a:b"] issuer = "x" jwks_file = "JWKS" allowed_pod_label_keys = ["a"] } }`, "tokens tell no labels"},
		"a label's value":   {`clusters { "c1" { service_account_allow_list = ["a:b"] kube_config_file = "KUBECONFIG" allowed_pod_label_keys = ["a:b"] } }`, "key of a label"},
		"an unknown key":    {`clusters { "c1" { service_account_allowlist = ["a:b"] } }`, "service_account_allow_list"},
		"no kubeconfig":     {`clusters { "c1" { service_account_allow_list = ["a:b"] kube_config_file = "/nowhere" } }`, `cluster "c1": the kubeconfig "/nowhere"`},
		"no such key file":  {`clusters { "c1" { service_account_allow_list = ["a:b"] issuer = "x" jwks_file = "/nowhere" } }`, "/nowhere"},
		"two key sources":   {`clusters { "c1" { service_account_allow_list = ["a:b"] issuer = "x" jwks_file = "JWKS" jwks_uri = "https://a.test" } }`, "clusters.c1.jwks_file"},
		"plain keys":        {`clusters { "c1" { service_account_allow_list = ["a:b"] issuer = "x" jwks_uri = "http://a.test" } }`, "clusters.c1.jwks_uri"},
		"issuer is no name": {`clusters { "c1" { service_account_allow_list = ["a:b"] issuer = "kubernetes/serviceaccount" } }`, "https"},
	} {
		t.Run(name, func(t *testing.T) {
			var decoded Config
			err := config.Decode("f", []byte(strings.NewReplacer("KUBECONFIG", kubeconfig, "JWKS", jwks).Replace(c.text)), &decoded)
			if err == nil {
				// What no file is needed for shows before anything is opened.
				if err := decoded.Validate(); (err == nil) != (c.want == "" || strings.Contains(c.want, "/nowhere")) {
					t.Errorf("Validate() = %v", err)
				}
				_, err = decoded.Open(t.Context(), nodeattest.Env{Log: slog.New(slog.DiscardHandler)})
			}
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

func TestProver(t *testing.T) {
	w := newWorld(t)
	path := w.file("token", "one\n")
	c := &AgentConfig{Cluster: "c1", TokenPath: path}
	for _, token := range []string{"one", "two"} { // it is read again each time (claim 21)
		if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := c.Prover("")
		if err != nil {
			t.Fatal(err)
		}
		payload, err := p.Payload(t.Context())
		if want := `{"cluster":"c1","token":"` + token + `"}`; err != nil || string(payload) != want { // as SPIRE's agents send it
			t.Errorf("Payload() = %s, %v, want %s", payload, err, want)
		}
		if text := fmt.Sprintf("%v %+v %#v %s", p, p, p, p); strings.Contains(text, token) {
			t.Errorf("it prints as %s", text) // R104
		}
		if _, err := p.Answer(t.Context(), []byte("x")); fault.KindOf(err) != fault.Invalid {
			t.Errorf("Answer() = %v", err)
		}
	}
	for name, c := range map[string]struct {
		config AgentConfig
		want   fault.Kind
	}{
		"no cluster":         {AgentConfig{TokenPath: path}, fault.Invalid},
		"a path":             {AgentConfig{Cluster: "a/b", TokenPath: path}, fault.Invalid},
		"no file":            {AgentConfig{Cluster: "c1", TokenPath: path + "x"}, fault.Precondition},
		"an empty file":      {AgentConfig{Cluster: "c1", TokenPath: w.file("token", "\n")}, fault.Precondition},
		"a file without end": {AgentConfig{Cluster: "c1", TokenPath: "/dev/zero"}, fault.Precondition},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := c.config.Prover(""); fault.KindOf(err) != c.want {
				t.Errorf("Prover() = %v", err)
			}
		})
	}
}

func FuzzVerify(f *testing.F) {
	w := newWorld(f)
	v := w.verifier(w.offline())
	f.Add([]byte(`{"cluster":"c1","token":"` + w.token(w.pod) + `x"}`))
	for _, name := range slices.Sorted(maps.Keys(w.api.BadTokens(w.pod, defaultAudience)))[:5] {
		f.Add([]byte(`{"cluster":"c1","token":"` + name + `"}`))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		if e, err := v.Verify(t.Context(), payload, nil); err == nil {
			t.Errorf("Verify() = %+v", e)
		}
	})
}
