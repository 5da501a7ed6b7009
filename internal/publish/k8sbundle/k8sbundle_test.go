package k8sbundle_test

import (
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/publish"
	"github.com/plastron/plastron/internal/publish/k8sbundle"
	"github.com/plastron/plastron/internal/publish/publishtest"
)

// rights are all that the plugin needs.
var rights = kubeapi.Rule{Namespace: "spire", Groups: []string{""}, Resources: []string{"configmaps"}, Names: []string{"spire-bundle"}, Verbs: []string{"get", "patch"}}

func cluster(t *testing.T) (*kubeapi.Server, *k8sbundle.Config) {
	api := kubeapi.New(t)
	api.PutConfigMap("spire", "spire-bundle", map[string]string{"other": "stays"})
	api.Grant("plastron", rights)
	return api, &k8sbundle.Config{Cluster: k8sbundle.Cluster{KubeConfigFilePath: api.Kubeconfig("plastron")}}
}

func open(t *testing.T, c *k8sbundle.Config) publish.Place {
	t.Helper()
	places, err := c.Open(t.Context())
	if err != nil || len(places) != 1 {
		t.Fatalf("Open() = %d places, %v", len(places), err)
	}
	return places[0]
}

func TestContract(t *testing.T) {
	publishtest.Run(t, func(t *testing.T) publishtest.Subject {
		api, c := cluster(t)
		t.Cleanup(func() {
			if api.ConfigMap("spire", "spire-bundle")["other"] != "stays" {
				t.Error("another key of the ConfigMap was changed")
			}
		})
		return publishtest.Subject{
			Place: open(t, c), Again: func() publish.Place { return open(t, c) },
			Holds:  func() string { return api.ConfigMap("spire", "spire-bundle")["bundle.crt"] },
			Text:   func(b *bundle.Bundle) string { return string(b.MarshalPEM()) },
			Writes: func() int { return api.Calls("patch configmaps") },
		}
	})
}

// Between looking and writing another server may write.
func TestNoLostUpdate(t *testing.T) {
	api, c := cluster(t)
	older, newer := publish.Edition{Bundle: publishtest.Bundle(t, 1), Epoch: "a"}, publish.Edition{Bundle: publishtest.Bundle(t, 2), Epoch: "a"}
	slow, quick := open(t, c), open(t, c)
	var once atomic.Bool
	api.Intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPatch && once.CompareAndSwap(false, true) {
			if err := quick.Publish(r.Context(), newer); err != nil {
				t.Error(err)
			}
		}
		return false
	})
	if err := slow.Publish(t.Context(), older); fault.KindOf(err) != fault.Conflict {
		t.Errorf("Publish() = %v, want a conflict", err)
	}
	if err := slow.Publish(t.Context(), older); err != nil {
		t.Error(err)
	}
	if got := api.ConfigMap("spire", "spire-bundle")["bundle.crt"]; got != string(newer.Bundle.MarshalPEM()) {
		t.Errorf("the ConfigMap has %q", got)
	}
}

// What somebody else has changed or emptied is put right by the next look, which
// else writes nothing.
func TestPutRight(t *testing.T) {
	api, c := cluster(t)
	edition, p := publish.Edition{Bundle: publishtest.Bundle(t, 1), Epoch: "a"}, open(t, c)
	want := string(edition.Bundle.MarshalPEM())
	for i, text := range []string{"", "", "-----BEGIN CERTIFICATE-----"} {
		if err := p.Publish(t.Context(), edition); err != nil {
			t.Fatal(err)
		}
		if m := api.ConfigMap("spire", "spire-bundle"); m["bundle.crt"] != want || m["other"] != "stays" || api.Calls("patch configmaps") != i+1 {
			t.Errorf("%d: the ConfigMap has %v after %d writes", i, m, api.Calls("patch configmaps"))
		}
		if err := p.Publish(t.Context(), edition); err != nil || api.Calls("patch configmaps") != i+1 {
			t.Errorf("a look at what is right: %v, %d writes", err, api.Calls("patch configmaps"))
		}
		api.PutConfigMap("spire", "spire-bundle", map[string]string{"other": "stays", "bundle.crt": text})
	}
}

func TestFailures(t *testing.T) {
	edition := publish.Edition{Bundle: publishtest.Bundle(t, 1), Epoch: "a"}
	for _, c := range []struct {
		name   string
		change func(*kubeapi.Server)
		kind   fault.Kind
		says   string
	}{
		{"no ConfigMap", func(api *kubeapi.Server) { api.DeleteConfigMap("spire", "spire-bundle") }, fault.Precondition, "kubectl create configmap -n spire spire-bundle"},
		{"no rights", func(api *kubeapi.Server) { api.Revoke("plastron") }, fault.Denied, `"get" on "configmaps"`},
		{"may only read", func(api *kubeapi.Server) {
			api.Revoke("plastron")
			read := rights
			read.Verbs = []string{"get"}
			api.Grant("plastron", read)
		}, fault.Denied, `"patch" on "configmaps"`},
		{"away", func(api *kubeapi.Server) { api.Close() }, fault.Unavailable, "cannot be reached"},
		{"in trouble", func(api *kubeapi.Server) {
			api.Intercept(func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(http.StatusServiceUnavailable)
				return true
			})
		}, fault.Unavailable, "trouble"},
	} {
		t.Run(c.name, func(t *testing.T) {
			api, config := cluster(t)
			p := open(t, config)
			c.change(api)
			err := p.Publish(t.Context(), edition)
			f, _ := errors.AsType[*fault.Error](err)
			if err == nil || fault.KindOf(err) != c.kind || !strings.Contains(f.Message+f.Remedy, c.says) {
				t.Errorf("Publish() = %v (%v), want %q", err, fault.KindOf(err), c.says)
			}
		})
	}
	t.Run("no roots", func(t *testing.T) {
		_, config := cluster(t)
		if err := open(t, config).Publish(t.Context(), publish.Edition{Bundle: publishtest.Bundle(t, 0)}); fault.KindOf(err) != fault.Unavailable {
			t.Errorf("Publish() = %v", err)
		}
	})
}

func TestConfig(t *testing.T) {
	for _, c := range []struct{ name, text, places, fault string }{
		{"defaults", `kube_config_file_path = "KC"`, "KC:spire/spire-bundle/bundle.crt", ""},
		{"named", `namespace = "n"
config_map = "c"
config_map_key = "k.pem"
kube_config_file_path = "KC"`, "KC:n/c/k.pem", ""},
		{"several", `clusters = [{ kube_config_file_path = "KC" }, { namespace = "b", kube_config_file_path = "KC" }]`,
			"KC:spire/spire-bundle/bundle.crt KC:b/spire-bundle/bundle.crt", ""},
		{"one and several", `namespace = "a"
kube_config_file_path = "KC"
clusters = [{ namespace = "b", kube_config_file_path = "KC" }]`, "KC:a/spire-bundle/bundle.crt KC:b/spire-bundle/bundle.crt", ""},
		{"twice", `clusters = [{ kube_config_file_path = "KC" }, { namespace = "spire", kube_config_file_path = "KC" }]`, "", "there twice"},
		{"webhook", `webhook_label = "spiffe.io/webhook"`, "", "webhook_label: CA bundles"},
		{"API service", `clusters = [{ api_service_label = "x" }]`, "", "api_service_label: CA bundles"},
		{"namespace", `namespace = "a/b"`, "", "not a name"},
		{"key", `config_map_key = "a/b"`, "", "cannot be a key"},
		{"no kubeconfig", `kube_config_file_path = "/nowhere"`, "", "/nowhere"},
		{"unknown key", `config_mapp = "x"`, "", "config_map"},
	} {
		t.Run(c.name, func(t *testing.T) {
			api, _ := cluster(t)
			kubeconfig := api.Kubeconfig("plastron")
			var file struct {
				Plugins []config.Plugin `hcl:"plugins"`
			}
			text := "plugins { Notifier \"k8sbundle\" { plugin_data {\n" + strings.ReplaceAll(c.text, "KC", kubeconfig) + "\n} } }"
			err := config.Decode("x.conf", []byte(text), &file)
			if err != nil {
				t.Fatal(err)
			}
			var got k8sbundle.Config
			var names []string
			if err = file.Plugins[0].Decode(&got); err == nil {
				var places []publish.Place
				places, err = got.Open(t.Context())
				for _, p := range places {
					names = append(names, strings.ReplaceAll(p.Name(), kubeconfig, "KC"))
				}
			}
			if text := strings.Join(names, " "); text != c.places {
				t.Errorf("places %q, want %q", text, c.places)
			}
			if (c.fault != "") != (err != nil) || err != nil && !strings.Contains(err.Error(), c.fault) {
				t.Errorf("error %v, want %q", err, c.fault)
			}
		})
	}
}
