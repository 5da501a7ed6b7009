package kube_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
)

const audience = "spire-server"

// cluster has one node, one pod, and a user "plastron" who may what attestation needs.
func cluster(t *testing.T) (*kubeapi.Server, kube.Pod) {
	api := kubeapi.New(t)
	api.AddNode("node-1", map[string]string{"zone": "a"})
	pod := api.AddPod(kubeapi.Pod{Namespace: "spire", Name: "agent-x", ServiceAccount: "spire-agent", Node: "node-1", Labels: map[string]string{"app": "agent"}})
	grant(api, "plastron")
	return api, pod
}

func grant(api *kubeapi.Server, user string) {
	api.Grant(user,
		kubeapi.Rule{Groups: []string{""}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get"}},
		kubeapi.Rule{Groups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}})
}

func open(t *testing.T, path string) *kube.Client {
	t.Helper()
	c, err := kube.ClientConfig{Kubeconfig: path}.Open()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func wantKind(t *testing.T, err error, want fault.Kind, words ...string) {
	t.Helper()
	if err == nil || fault.KindOf(err) != want {
		t.Fatalf("error = %v (%v), want %v", err, fault.KindOf(err), want)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not name %s", err, w)
		}
	}
}

func TestQuestions(t *testing.T) {
	api, pod := cluster(t)
	c := open(t, api.Kubeconfig("plastron"))

	got, err := c.Pod(t.Context(), "spire", "agent-x")
	if err != nil || got.Meta.UID != pod.Meta.UID || got.Spec.NodeName != "node-1" || got.Spec.ServiceAccount != "spire-agent" ||
		got.Meta.Labels["app"] != "agent" || got.Status.HostIP == "" {
		t.Errorf("Pod() = %+v, %v", got, err)
	}
	node, err := c.Node(t.Context(), "node-1")
	if err != nil || node.Meta.UID == "" || node.Meta.Labels["zone"] != "a" || len(node.Status.Addresses) != 2 {
		t.Errorf("Node() = %+v, %v", node, err)
	}
	_, err = c.Pod(t.Context(), "spire", "agent-y")
	wantKind(t, err, fault.NotFound)
	_, err = c.Node(t.Context(), "node-2")
	wantKind(t, err, fault.NotFound)

	review, err := c.ReviewToken(t.Context(), api.Token(pod, kubeapi.TokenOptions{Audience: audience}), []string{audience})
	if err != nil || !review.Authenticated || review.User.Name != "system:serviceaccount:spire:spire-agent" || len(review.Audiences) != 1 ||
		review.User.Extra["authentication.kubernetes.io/pod-uid"][0] != pod.Meta.UID || review.User.Extra["authentication.kubernetes.io/node-uid"][0] != node.Meta.UID {
		t.Errorf("ReviewToken() = %+v, %v", review, err)
	}
	for name, token := range map[string]string{
		"another audience": api.Token(pod, kubeapi.TokenOptions{Audience: "x"}),
		"expired":          api.Token(pod, kubeapi.TokenOptions{Audience: audience, Lifetime: -time.Second}),
		"no token":         "x",
	} {
		review, err := c.ReviewToken(t.Context(), token, []string{audience})
		if err != nil || review.Authenticated || review.Error == "" {
			t.Errorf("%s: ReviewToken() = %+v, %v", name, review, err)
		}
	}
	api.DeletePod("spire", "agent-x")
	api.AddPod(kubeapi.Pod{Namespace: "spire", Name: "agent-x", ServiceAccount: "spire-agent", Node: "node-1"})
	review, err = c.ReviewToken(t.Context(), api.Token(pod, kubeapi.TokenOptions{Audience: audience}), []string{audience})
	if err != nil || review.Authenticated {
		t.Errorf("a pod that is gone: ReviewToken() = %+v, %v", review, err)
	}
}

func TestConfigMap(t *testing.T) {
	api, _ := cluster(t)
	api.PutConfigMap("spire", "bundle", map[string]string{"other": "stays"})
	c := open(t, api.Kubeconfig("plastron"))
	err := c.PatchConfigMap(t.Context(), "spire", "bundle", kube.ConfigMapPatch{Data: map[string]string{"bundle.crt": "x"}})
	wantKind(t, err, fault.Denied, `"patch"`, `"configmaps"`, `"spire"`)
	api.Grant("plastron", kubeapi.Rule{Namespace: "spire", Groups: []string{""}, Resources: []string{"configmaps"}, Names: []string{"bundle"}, Verbs: []string{"get", "patch"}})
	if err := c.PatchConfigMap(t.Context(), "spire", "bundle", kube.ConfigMapPatch{Data: map[string]string{"bundle.crt": "x"}}); err != nil {
		t.Fatal(err)
	}
	m, err := c.ConfigMap(t.Context(), "spire", "bundle")
	if err != nil || m.Data["bundle.crt"] != "x" || m.Data["other"] != "stays" {
		t.Errorf("ConfigMap() = %+v, %v", m, err)
	}
	patch := kube.ConfigMapPatch{Version: m.Meta.Version, Annotations: map[string]string{"at": "1"}, Data: map[string]string{"bundle.crt": "y"}}
	if err := c.PatchConfigMap(t.Context(), "spire", "bundle", patch); err != nil {
		t.Fatal(err)
	}
	wantKind(t, c.PatchConfigMap(t.Context(), "spire", "bundle", patch), fault.Conflict) // it has another version now
	m, err = c.ConfigMap(t.Context(), "spire", "bundle")
	if err != nil || m.Data["bundle.crt"] != "y" || m.Data["other"] != "stays" || m.Meta.Annotations["at"] != "1" {
		t.Errorf("ConfigMap() = %+v, %v", m, err)
	}
	_, err = c.ConfigMap(t.Context(), "default", "bundle")
	wantKind(t, err, fault.Denied, `"default"`)
}

func TestRefusals(t *testing.T) {
	api, pod := cluster(t)
	t.Run("no right", func(t *testing.T) {
		c := open(t, api.Kubeconfig("stranger"))
		_, err := c.Pod(t.Context(), "spire", "agent-x")
		wantKind(t, err, fault.Denied, `"get"`, `"pods"`, `"spire"`)
		_, err = c.Node(t.Context(), "node-1")
		wantKind(t, err, fault.Denied, `"get"`, `"nodes"`)
		_, err = c.ReviewToken(t.Context(), api.Token(pod, kubeapi.TokenOptions{Audience: audience}), []string{audience})
		wantKind(t, err, fault.Denied, `"create"`, `"tokenreviews.authentication.k8s.io"`)
	})
	t.Run("another CA", func(t *testing.T) { // claim 18
		other, _ := cluster(t)
		path := api.Kubeconfig("plastron")
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		wrong := strings.ReplaceAll(string(data), api.URL, other.URL)
		if err := os.WriteFile(path, []byte(wrong), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = open(t, path).Pod(t.Context(), "spire", "agent-x")
		wantKind(t, err, fault.Unavailable, "certificate")
		if n := other.Calls("get pods"); n != 0 {
			t.Errorf("the wrong server was asked %d times", n)
		}
	})
	t.Run("names", func(t *testing.T) { // A21
		c := open(t, api.Kubeconfig("plastron"))
		for _, name := range []string{"", ".", "..", "../x", "a/b", "a?b", "A", "a_b", "-a", "a-", "a..b", "%2e", "ä", strings.Repeat("a", 254)} {
			before := api.Calls("get pods") + api.Calls("get nodes")
			_, err := c.Pod(t.Context(), "spire", name)
			wantKind(t, err, fault.Invalid)
			_, err = c.Node(t.Context(), name)
			wantKind(t, err, fault.Invalid)
			_, err = c.Pod(t.Context(), name, "agent-x")
			wantKind(t, err, fault.Invalid)
			if api.Calls("get pods")+api.Calls("get nodes") != before {
				t.Errorf("%q was sent", name)
			}
		}
		_, err := c.Pod(t.Context(), "a.b", "agent-x")
		wantKind(t, err, fault.Invalid)
		_, err = c.Pod(t.Context(), "spire", "a.b-"+strings.Repeat("c", 70))
		wantKind(t, err, fault.NotFound)
	})
	object := `{"kind":"Pod","apiVersion":"v1","metadata":{"name":"agent-x","namespace":"spire","uid":"u"}}`
	for name, a := range map[string]struct {
		code   int
		body   string
		header string
		want   fault.Kind
	}{
		"500":                 {code: 500, want: fault.Unavailable},
		"429":                 {code: 429, header: "7", want: fault.Unavailable},
		"401":                 {code: 401, want: fault.Denied},
		"a redirect":          {code: 302, want: fault.Unavailable},
		"404 of a proxy":      {code: 404, body: "<html>", want: fault.Unavailable},
		"404":                 {code: 404, body: `{"kind":"Status","reason":"NotFound"}`, want: fault.NotFound},
		"no JSON":             {code: 200, body: "<html>", want: fault.Unavailable},
		"another kind":        {code: 200, body: strings.Replace(object, "Pod", "Node", 1), want: fault.Unavailable},
		"another version":     {code: 200, body: strings.Replace(object, "v1", "v2", 1), want: fault.Unavailable},
		"another pod":         {code: 200, body: strings.Replace(object, "agent-x", "agent-y", 1), want: fault.Unavailable},
		"another namespace":   {code: 200, body: strings.Replace(object, "spire", "default", 1), want: fault.Unavailable},
		"no UID":              {code: 200, body: strings.Replace(object, `"u"`, `""`, 1), want: fault.Unavailable},
		"too large":           {code: 200, body: object[:len(object)-1] + `,"x":"` + strings.Repeat("x", 5<<20) + `"}`, want: fault.Unavailable},
		"a wrong type inside": {code: 200, body: strings.Replace(object, `"u"`, `7`, 1), want: fault.Unavailable},
		"good":                {code: 200, body: object, want: fault.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			api.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
				if a.header != "" {
					w.Header().Set("Retry-After", a.header)
				}
				if a.code == 302 {
					w.Header().Set("Location", "/elsewhere")
				}
				if r.URL.Path == "/elsewhere" {
					t.Error("a redirect was followed")
				}
				w.WriteHeader(a.code)
				fmt.Fprint(w, a.body)
				return true
			})
			defer api.Intercept(nil)
			_, err := open(t, api.Kubeconfig("plastron")).Pod(t.Context(), "spire", "agent-x")
			if a.want == fault.Internal {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantKind(t, err, a.want)
			if a.header != "" && fault.AfterOf(err) != 7*time.Second {
				t.Errorf("to be tried again after %v", fault.AfterOf(err))
			}
		})
	}
	t.Run("away", func(t *testing.T) {
		c := open(t, api.Kubeconfig("plastron"))
		api.Close()
		_, err := c.Pod(t.Context(), "spire", "agent-x")
		wantKind(t, err, fault.Unavailable)
	})
}

func TestFilesAreReadAgain(t *testing.T) {
	api, pod := cluster(t)
	grant(api, "system:serviceaccount:spire:spire-server")
	api.AddNode("node-2", nil)
	server := api.AddPod(kubeapi.Pod{Namespace: "spire", Name: "server", ServiceAccount: "spire-server", Node: "node-2"})
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("the token of a pod", func(t *testing.T) {
		dir := api.ServiceAccountDir(server)
		t.Setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
		t.Setenv("KUBERNETES_SERVICE_PORT", api.Port())
		c, err := kube.ClientConfig{ServiceAccountDir: dir}.Open()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Pod(t.Context(), "spire", pod.Meta.Name); err != nil {
			t.Fatal(err)
		}
		write(filepath.Join(dir, "token"), api.Token(pod, kubeapi.TokenOptions{Audience: kubeapi.Audience}))
		_, err = c.Pod(t.Context(), "spire", pod.Meta.Name)
		wantKind(t, err, fault.Denied)
		write(filepath.Join(dir, "token"), api.Token(server, kubeapi.TokenOptions{Audience: kubeapi.Audience})+"\n")
		if _, err := c.Pod(t.Context(), "spire", pod.Meta.Name); err != nil {
			t.Error(err)
		}
		other, _ := cluster(t)
		write(filepath.Join(dir, "ca.crt"), string(other.CAPEM))
		_, err = c.Pod(t.Context(), "spire", pod.Meta.Name)
		wantKind(t, err, fault.Unavailable, "certificate")
		write(filepath.Join(dir, "ca.crt"), string(other.CAPEM)+string(api.CAPEM))
		if _, err := c.Pod(t.Context(), "spire", pod.Meta.Name); err != nil {
			t.Error(err)
		}
	})
	t.Run("a kubeconfig", func(t *testing.T) {
		path := api.WriteKubeconfig(map[string]any{"tokenFile": "token"})
		token := filepath.Join(filepath.Dir(path), "token")
		_, err := kube.ClientConfig{Kubeconfig: path}.Open()
		wantKind(t, err, fault.Precondition, "token")
		write(token, api.Token(server, kubeapi.TokenOptions{Audience: kubeapi.Audience}))
		c := open(t, path)
		if _, err := c.Pod(t.Context(), "spire", pod.Meta.Name); err != nil {
			t.Fatal(err)
		}
		write(path, "not: one")
		_, err = c.Pod(t.Context(), "spire", pod.Meta.Name)
		wantKind(t, err, fault.Unavailable, "current-context")
		data, err := os.ReadFile(api.Kubeconfig("plastron"))
		if err != nil {
			t.Fatal(err)
		}
		write(path, string(data))
		if _, err := c.Pod(t.Context(), "spire", pod.Meta.Name); err != nil {
			t.Error(err)
		}
	})
}

// Many ask at once while the token is exchanged, as the kubelet does it.
func TestTogether(t *testing.T) {
	api, pod := cluster(t)
	grant(api, "system:serviceaccount:spire:spire-agent")
	path := api.WriteKubeconfig(map[string]any{"tokenFile": "token"})
	exchange := func() {
		token := filepath.Join(filepath.Dir(path), "token")
		if err := os.WriteFile(token+".new", []byte(api.Token(pod, kubeapi.TokenOptions{Audience: kubeapi.Audience})), 0o600); err != nil {
			t.Error(err)
		}
		if err := os.Rename(token+".new", token); err != nil {
			t.Error(err)
		}
	}
	exchange()
	c := open(t, path)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 5 {
				if _, err := c.Pod(t.Context(), "spire", pod.Meta.Name); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 5 {
		exchange()
	}
	all.Wait()
	if n := api.Calls("get pods"); n != 40 {
		t.Errorf("the API server was asked %d times", n)
	}
}

func TestKubeconfig(t *testing.T) {
	secret := base64.StdEncoding.EncodeToString([]byte("do not tell"))
	good := `
apiVersion: v1
kind: Config
preferences: {}
extensions: [{name: x, extension: {a: b}}]
current-context: it
contexts: [{name: other, context: {cluster: b, user: b}}, {name: it, context: {cluster: a, user: a, namespace: n}}]
clusters: [{name: a, cluster: {server: "https://127.0.0.1:6443"}}]
users: [{name: a, user: {token: ` + secret + `}}]
`
	load := func(t *testing.T, text string) error {
		path := filepath.Join(t.TempDir(), "config")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := kube.ClientConfig{Kubeconfig: path}.Open()
		return err
	}
	if err := load(t, good); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ from, to, word string }{
		"not YAML":         {"kind: Config", "kind: [", "YAML"},
		"a key twice":      {"users:", "users: []\nusers:", "twice"},
		"a type":           {"current-context: it", "current-context: [" + secret + "]", "type"},
		"no context":       {"current-context: it", "current-context: ''", "current-context"},
		"a missing user":   {"user: a", "user: x", "current context"},
		"http":             {"https://", "http://", "https"},
		"a password":       {"https://", "https://me:" + secret + "@", "https"},
		"not verified":     {"{server:", "{insecure-skip-tls-verify: true, server:", "insecure"},
		"a proxy":          {"{server:", "{proxy-url: http://x, server:", "proxy"},
		"exec":             {"token: " + secret, "exec: {command: aws}", "exec"},
		"auth-provider":    {"token: " + secret, "auth-provider: {name: gcp}", "auth-provider"},
		"basic":            {"token: " + secret, "username: a, password: " + secret, "password"},
		"as":               {"token: " + secret, "as: x, token: " + secret, "impersonates"},
		"CA not base64":    {"{server:", "{certificate-authority-data: '*', server:", "base64"},
		"CA not PEM":       {"{server:", "{certificate-authority-data: " + secret + ", server:", "PEM"},
		"a lone key":       {"token: " + secret, "client-key-data: " + secret, "without"},
		"no pair":          {"token: " + secret, "client-key-data: " + secret + ", client-certificate-data: " + secret, "PEM"},
		"a line in it":     {"token: " + secret, `token: "a\nb"`, "token"},
		"a missing file":   {"token: " + secret, "tokenFile: /nowhere/token", "/nowhere/token"},
		"too many aliases": {"preferences: {}", "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\nclusters: *f", ""},
		"too large":        {"preferences: {}", "x: " + strings.Repeat("x", 1<<20), "larger"},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(good, c.from, c.to, 1)
			if text == good {
				t.Fatal("the case changes nothing")
			}
			err := load(t, text)
			wantKind(t, err, fault.Precondition, c.word)
			if strings.Contains(err.Error(), secret[:6]) || strings.Contains(fmt.Sprintf("%+v", errors.Unwrap(err)), secret[:6]) {
				t.Errorf("the error tells a secret: %v", err) // R104
			}
		})
	}
	t.Run("no pod", func(t *testing.T) {
		t.Setenv("KUBERNETES_SERVICE_HOST", "")
		_, err := kube.ClientConfig{}.Open()
		wantKind(t, err, fault.Precondition, "KUBERNETES_SERVICE_HOST")
	})
}

func FuzzKubeconfig(f *testing.F) {
	f.Add([]byte("current-context: a\ncontexts: [{name: a, context: {cluster: a, user: a}}]\nclusters: [{name: a, cluster: {server: 'https://a'}}]\nusers: [{name: a, user: {token: a}}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "config")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := (kube.ClientConfig{Kubeconfig: path}).Open(); err != nil && fault.KindOf(err) != fault.Precondition {
			t.Error(err)
		}
	})
}
