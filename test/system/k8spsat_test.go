package system_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/kube"
)

// kubeCluster is a cluster with the pod of the deployment's agent on its node.
type kubeCluster struct {
	api  *kubeapi.Server
	node kube.Node
	pod  kube.Pod
}

// newKubeCluster grants "server" what k8s_psat needs, and lets anybody read the
// issuer's keys.
func newKubeCluster(t *testing.T) *kubeCluster {
	c := &kubeCluster{api: kubeapi.New(t)}
	c.node = c.api.AddNode("node-1", map[string]string{"zone": "a"})
	c.pod = c.api.AddPod(kubeapi.Pod{Namespace: "spire", Name: "agent-x", ServiceAccount: "spire-agent", Node: "node-1"})
	c.api.Grant("server",
		kubeapi.Rule{Groups: []string{""}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get"}},
		kubeapi.Rule{Groups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}})
	c.api.Grant("system:unauthenticated", kubeapi.Rule{Verbs: []string{"get"}, URLs: []string{"/.well-known/openid-configuration", "/openid/v1/jwks"}})
	return c
}

// attestByPSAT has the server know clusters, and the agent be of the first.
func (d *deployment) attestByPSAT(clusters ...string) {
	d.serverAttestor = `NodeAttestor "k8s_psat" { plugin_data { clusters = {`
	for n, c := range clusters {
		d.serverAttestor += fmt.Sprintf("\n      c%d = { service_account_allow_list = [\"spire:spire-agent\"], %s }", n+1, c)
	}
	d.serverAttestor += "\n    } } }"
	d.agentOf("c1")
}

func (d *deployment) agentOf(cluster string) {
	d.agentAttestor = fmt.Sprintf(`NodeAttestor "k8s_psat" { plugin_data { cluster = %q, token_path = %q } }`, cluster, d.path("token"))
}

func (d *deployment) writeToken(c *kubeCluster) {
	d.t.Helper()
	d.write("token", c.api.Token(c.pod, kubeapi.TokenOptions{Audience: "spire-server"})+"\n")
}

// TestK8sPSAT joins a node without any secret of ours, attests again as the token
// renews, and ends with the pod (claims 17, 18, 21).
func TestK8sPSAT(t *testing.T) {
	t.Parallel()
	c := newKubeCluster(t)
	d := newDeployment(t)
	d.serverOptions = `agent_ttl = "1h"
  agent_reattest_period = "4s"`
	d.attestByPSAT(fmt.Sprintf(`kube_config_file = %q, allowed_node_label_keys = ["zone"]`, c.api.Kubeconfig("server")))
	d.startServer()
	d.writeToken(c)
	d.startAgent("")
	id := "spiffe://" + d.trustDomain + "/spire/agent/k8s_psat/c1/" + c.node.Meta.UID
	all := d.agents()
	if len(all) != 1 || all[0].AttestationType != "k8s_psat" || !all[0].CanReattest || "spiffe://"+all[0].Id.TrustDomain+all[0].Id.Path != id {
		t.Fatalf("agents: %v, want %s", all, id)
	}
	if text := fmt.Sprint(all[0].Selectors); !strings.Contains(text, "agent_node_label:zone:a") || !strings.Contains(text, "cluster:c1") {
		t.Errorf("selectors: %s", text)
	}
	d.createEntry(id, "/web", nil, mine())
	d.waitServed()

	// What the kubelet puts in the token's place is what it attests with next.
	d.writeToken(c)
	renewed, shown := strings.TrimSpace(d.read("token")), make(chan struct{})
	var once sync.Once
	c.api.Intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if body, err := io.ReadAll(r.Body); err == nil && strings.Contains(string(body), renewed) {
			once.Do(func() { close(shown) })
		}
		return false
	})
	select {
	case <-shown:
	case <-time.After(patience):
		t.Fatal("the renewed token was never shown")
	}
	eventually(t, "a new agent certificate", func() bool { return d.agents()[0].X509SvidSerialNumber != all[0].X509SvidSerialNumber })
	d.waitServed()
	if log := d.server.Output(); strings.Contains(log, "replaced agent certificate used") || strings.Contains(log, "node_changed") {
		t.Errorf("a re-attestation looks like a clone:\n%s", log)
	}

	c.api.DeletePod("spire", "agent-x")
	select {
	case <-d.agent.done:
	case <-time.After(patience):
		t.Fatal("the agent goes on without its pod")
	}
	if out := d.agent.Output(); !strings.Contains(out, "the service-account token is refused") {
		t.Errorf("it does not say why:\n%s", out)
	}
}

// TestK8sPSATOffline verifies by the issuer's keys, found by discovery; an API server
// or an issuer with another certificate than that of its CA is not believed (claim 18).
func TestK8sPSATOffline(t *testing.T) {
	t.Parallel()
	c, other := newKubeCluster(t), kubeapi.New(t)
	d := newDeployment(t)
	d.write("ca.pem", string(c.api.CAPEM))
	d.write("other.pem", string(other.CAPEM))
	kubeconfig, err := os.ReadFile(other.Kubeconfig("server"))
	if err != nil {
		t.Fatal(err)
	}
	d.write("kubeconfig", strings.ReplaceAll(string(kubeconfig), other.URL, c.api.URL)) // the right address, the wrong CA
	d.attestByPSAT(
		fmt.Sprintf(`issuer = %q, issuer_ca_file = %q`, c.api.Issuer, d.path("ca.pem")),
		fmt.Sprintf(`issuer = %q, issuer_ca_file = %q`, c.api.Issuer, d.path("other.pem")),
		fmt.Sprintf(`kube_config_file = %q`, d.path("kubeconfig")))
	d.startServer()
	d.writeToken(c)
	d.writeBundle()
	for _, cluster := range []string{"c2", "c3"} {
		d.agentOf(cluster)
		d.write("agent.conf", d.agentConfig(""))
		p := start(t, exec.Command(plastron, "agent", "run", "-config", d.path("agent.conf")))
		eventually(t, cluster+" is not believed", func() bool {
			return strings.Contains(p.Output(), "the cluster cannot say now") && strings.Contains(d.server.Output(), "id="+cluster)
		})
		p.stop(syscall.SIGTERM)
	}
	if all := d.agents(); len(all) != 0 {
		t.Fatalf("agents: %v", all)
	}
	if log := d.server.Output(); strings.Count(log, "certificate signed by unknown authority") < 2 {
		t.Errorf("the server does not say why:\n%s", log)
	}
	d.agentOf("c1")
	d.startAgent("")
	d.createEntry("spiffe://"+d.trustDomain+"/spire/agent/k8s_psat/c1/"+c.node.Meta.UID, "/web", nil, mine())
	d.waitServed()
	t.Run("A23 the same token from a second host", func(t *testing.T) {
		second := newDeployment(t)
		second.port, second.server, second.agentAttestor = d.port, d.server, d.agentAttestor
		second.write("bundle.pem", d.read("bundle.pem"))
		second.write("agent.conf", second.agentConfig(""))
		p := start(t, exec.Command(plastron, "agent", "run", "-config", second.path("agent.conf")))
		audience := 0
		eventually(t, "the clone is flagged", func() bool {
			audience++ // so that the first has something to ask, with the certificate that the second has replaced
			exec.Command(plastron, "agent", "api", "fetch", "jwt", "-audience", fmt.Sprint(audience), "-socketPath", d.workloadSocket()).Run()
			return strings.Contains(d.read("server/audit.log"), "agent_not_active")
		})
		p.stop(syscall.SIGTERM)
		if all := d.agents(); len(all) != 1 {
			t.Errorf("agents: %v", all)
		}
	})
	d.waitServed()
	if n := c.api.Calls("create tokenreviews") + c.api.Calls("get pods"); n != 0 {
		t.Errorf("the API server was asked %d times", n)
	}
	if token := strings.TrimSpace(d.read("token")); strings.Contains(d.server.Output()+d.agent.Output()+d.read("server/audit.log"), token[len(token)-40:]) {
		t.Error("the token is in a log") // R104
	}
}
