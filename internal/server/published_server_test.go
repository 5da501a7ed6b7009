package server_test

import (
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/publish/publishtest"
)

// A server publishes its bundle when it starts, and each change of it, also when
// the API server was away meanwhile.
func TestServerPublishesItsBundle(t *testing.T) {
	api := kubeapi.New(t)
	api.PutConfigMap("spire", "spire-bundle", nil)
	api.Grant("plastron", kubeapi.Rule{Namespace: "spire", Groups: []string{""}, Resources: []string{"configmaps"}, Names: []string{"spire-bundle"}, Verbs: []string{"get", "patch"}})
	cfg := configFor(shortDir(t))
	var plugins struct {
		Plugins []config.Plugin `hcl:"plugins"`
	}
	text := `plugins { Notifier "k8sbundle" { plugin_data { kube_config_file_path = "` + filepath.ToSlash(api.Kubeconfig("plastron")) + `" } } }`
	if err := config.Decode("x.conf", []byte(text), &plugins); err != nil {
		t.Fatal(err)
	}
	cfg.Plugins = append(cfg.Plugins, plugins.Plugins...)
	r := start(t, cfg)
	published := func() string { return api.ConfigMap("spire", "spire-bundle")["bundle.crt"] }
	degraded := func() bool { // as the operator sees it
		got, err := statusv1.NewServerClient(r.admin).Status(t.Context(), &statusv1.ServerStatusRequest{})
		return err == nil && strings.Contains(got.String(), "bundle_not_published")
	}
	wait := func(what string, done func() bool) {
		t.Helper()
		for late := time.Now().Add(4 * time.Minute); !done(); time.Sleep(10 * time.Millisecond) { // it may be a minute until the next try
			if time.Now().After(late) {
				t.Fatalf("not in time: %s", what)
			}
		}
	}
	same := func() bool {
		b, err := r.Bundle()
		return err == nil && published() == string(b.MarshalPEM())
	}
	wait("the bundle is published", same)
	before := published()
	var away atomic.Bool
	away.Store(true)
	api.Intercept(func(w http.ResponseWriter, _ *http.Request) bool {
		if away.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		return away.Load()
	})
	root := &spiretypes.X509Certificate{Asn1: publishtest.Bundle(t, 1).X509[0].ASN1}
	_, err := bundlev1.NewBundleClient(r.admin).AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*spiretypes.X509Certificate{root}})
	if err != nil {
		t.Fatal(err)
	}
	wait("the failure shows", degraded)
	if published() != before {
		t.Error("the ConfigMap changed while the API server was away")
	}
	away.Store(false)
	wait("the bundle is published again", same)
	wait("the failure is gone", func() bool { return !degraded() })
	if published() == before {
		t.Error("the bundle has not changed")
	}
}
