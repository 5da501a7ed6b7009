package system_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/fakes/kubelet"
	"github.com/plastron/plastron/internal/fakes/kubepods"
)

// Claim 32: one rule, no entry and no secret, and a process of a pod has its ID with
// its first call, because the server has found out that the pod is on that node. What
// only the node says of a pod gives nothing.
func TestRuleOverPods(t *testing.T) {
	t.Parallel()
	k := newKubeCluster(t)
	k.api.AddNode("node-2", nil)
	c := &cluster{deployment: newDeployment(t), kubelet: kubelet.New(t)}
	c.kubelet.Node = "node-1"
	c.attestByPSAT(fmt.Sprintf(`kube_config_file = %q`, k.api.Kubeconfig("server")))
	c.agentPlugins = fmt.Sprintf(`WorkloadAttestor "k8s" { plugin_data {
    kubelet_secure_port = %d
    kubelet_ca_path     = %q
    token_path          = %q
    node_name           = "127.0.0.1"
    reload_interval     = "1ms"
  } }`, c.kubelet.SecurePort(), c.kubelet.CAPath, c.kubelet.TokenPath)
	c.startServer()
	c.writeToken(k)
	c.startAgent("")
	c.run("server", "entry", "create", "-socketPath", c.adminSocket(), "-node", "-spiffeID", "spiffe://"+c.trustDomain+"/cluster", "-selector", "k8s_psat:cluster:c1")
	out := c.run("server", "rule", "create", "-socketPath", c.adminSocket(), "-parentID", "spiffe://"+c.trustDomain+"/cluster", "-selector", "k8s:ns:shop",
		"-selector", "k8s:pod-label:app:web", "-selector", "k8s:container-name:main", "-idTemplate", "spiffe://"+c.trustDomain+"/ns/{k8s.ns}/sa/{k8s.sa}", "-wait", "120s")
	for _, want := range []string{"Verified         : k8s.ns, k8s.sa, k8s:ns:shop, k8s:pod-label:app:web\n", "On agents' word  : k8s:container-name:main\n", "Reaches          : 1 agent"} {
		if !strings.Contains(out, want) {
			t.Errorf("rule create did not print %q:\n%s", want, out)
		}
	}

	// pod makes a pod as the API server has it, and as the node's kubelet says it is.
	pod := func(name, node string, differs func(*kubelet.Pod)) (string, *kubepods.Group) {
		t.Helper()
		real := k.api.AddPod(kubeapi.Pod{Namespace: "shop", Name: name, ServiceAccount: "web", Node: node, Labels: map[string]string{"app": "web"}, Containers: []string{"main"}})
		p := kubelet.Pod{Namespace: "shop", Name: name, UID: real.Meta.UID, ServiceAccount: "web", Labels: map[string]string{"app": "web"},
			Containers: []kubelet.Container{{Name: "main", Image: "shop/web:1", ImageID: "shop/web@sha256:1", ID: kubepods.NewID()}}}
		if differs != nil {
			differs(&p)
		}
		g := kubepods.Make(t, kubepods.Cgroupfs(p.UID, p.Containers[0].ID), kubepods.Hybrid)
		c.kubelet.Put(p)
		return p.UID, g
	}
	uid, web := pod("web-1", "node-1", nil)
	c.gets(web, "/ns/shop/sa/web")
	if out, err := c.call(web, "fetch", "jwt", "-audience", "x").CombinedOutput(); err != nil || !strings.Contains(string(out), "/ns/shop/sa/web") {
		t.Errorf("a token: %v\n%s", err, out)
	}
	_, second := pod("web-2", "node-1", nil) // of the same account
	c.gets(second, "/ns/shop/sa/web")

	refused := func(name, node string, lie func(*kubelet.Pod)) {
		t.Helper()
		_, g := pod("lie-"+name, node, lie)
		if out, err := c.call(g, "watch").CombinedOutput(); err == nil || !strings.Contains(string(out), "(signing_refused)") {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	refused("account", "node-1", func(p *kubelet.Pod) { p.ServiceAccount = "admin" })
	refused("name", "node-1", func(p *kubelet.Pod) { p.Name = "none" })
	refused("uid", "node-1", func(p *kubelet.Pod) { p.UID = kubepods.NewUID() })
	refused("elsewhere", "node-2", nil)
	if n := c.countEntries(); n != 1 {
		t.Errorf("there are %d entries, want the alias", n)
	}
	trail := c.read("server/audit.log")
	for _, want := range []string{`"k8s.pod":"web-1","k8s.pod_uid":"` + uid + `"`, `"trust":"server"`} { // R14
		if !strings.Contains(trail, want) {
			t.Errorf("the audit trail does not hold %s", want)
		}
	}
	for line := range strings.Lines(trail) { // what was refused is on record, too
		if strings.Contains(line, `"kind":"issuance"`) && strings.Contains(line, "lie-") {
			t.Errorf("something was signed for a lie: %s", line)
		}
	}
}
