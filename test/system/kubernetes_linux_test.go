package system_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/fakes/kubelet"
	"github.com/plastron/plastron/internal/fakes/kubepods"
	"go.yaml.in/yaml/v3"
)

// manifest is an object of deploy/kubernetes, as far as anything here looks at it.
type manifest struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Metadata   struct{ Name, Namespace string }
	Data       map[string]string
	Rules      []struct {
		APIGroups     []string `yaml:"apiGroups"`
		Resources     []string
		ResourceNames []string `yaml:"resourceNames"`
		Verbs         []string
	}
	RoleRef  struct{ Kind, Name string } `yaml:"roleRef"`
	Subjects []struct{ Kind, Name, Namespace string }
	Spec     struct {
		Template struct{ Spec podSpec }
	}
}

type podSpec struct {
	ServiceAccountName string `yaml:"serviceAccountName"`
	HostNetwork        bool   `yaml:"hostNetwork"`
	Containers         []containerSpec
	InitContainers     []containerSpec `yaml:"initContainers"`
}

type containerSpec struct {
	Name, Image     string
	Args            []string
	SecurityContext struct {
		Privileged             bool
		AllowEscalation        *bool `yaml:"allowPrivilegeEscalation"`
		ReadOnlyRootFilesystem bool  `yaml:"readOnlyRootFilesystem"`
		Capabilities           struct{ Add, Drop []string }
	} `yaml:"securityContext"`
}

const deployed = "../../deploy/kubernetes"

// manifests reads the objects of a file, by kind and name.
func manifests(t *testing.T, file string) map[string]manifest {
	t.Helper()
	src, err := os.ReadFile(filepath.Join(deployed, file))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]manifest{}
	for d := yaml.NewDecoder(bytes.NewReader(src)); ; {
		var m manifest
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			return out
		} else if err != nil || m.APIVersion == "" || m.Kind == "" || m.Metadata.Name == "" {
			t.Fatalf("%s: %+v, %v", file, m, err)
		}
		key := m.Kind + " " + m.Metadata.Name
		if _, twice := out[key]; twice {
			t.Errorf("%s: %s is there twice", file, key)
		}
		out[key] = m
	}
}

// grants gives a service account on the fake what the file's roles give it, and
// returns that in words.
func grants(api *kubeapi.Server, objects map[string]manifest, account string) (words []string) {
	for _, b := range objects {
		if !strings.HasSuffix(b.Kind, "RoleBinding") || b.Subjects[0].Name != account || b.Subjects[0].Namespace != "plastron" {
			continue
		}
		for _, r := range objects[b.RoleRef.Kind+" "+b.RoleRef.Name].Rules {
			api.Grant("system:serviceaccount:plastron:"+account, kubeapi.Rule{
				Namespace: b.Metadata.Namespace, Groups: r.APIGroups, Resources: r.Resources, Names: r.ResourceNames, Verbs: r.Verbs})
			words = append(words, fmt.Sprintf("%s%q: %q on %q %q", b.Metadata.Namespace, r.APIGroups, r.Verbs, r.Resources, r.ResourceNames))
		}
	}
	slices.Sort(words)
	return words
}

// runGuide runs the commands of docs/kubernetes.md but the one that makes an image.
// Its kubectl only looks whether the cluster would have what it is asked for; what is
// executed in the server's container is executed here.
func (d *deployment) runGuide() {
	d.t.Helper()
	text, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		d.t.Fatal(err)
	}
	d.write("kubectl", `#!/bin/sh
case "$1" in
apply) [ -f "$3" ] ;;
rollout) grep -q "kind: ${5%%/*}$" -i deploy/kubernetes/*.yaml && grep -q "name: ${5#*/}, namespace: $4 " deploy/kubernetes/*.yaml ;;
exec) while [ "$1" != /plastron ]; do shift; done && shift && exec "$PLASTRON" "$@" ;;
logs) ;;
*) exit 1 ;;
esac
`)
	if err := os.Chmod(d.path("kubectl"), 0o755); err != nil {
		d.t.Fatal(err)
	}
	ran := 0
	for _, part := range strings.Split(string(text), "```sh\n")[1:] {
		block, _, _ := strings.Cut(part, "```")
		if strings.HasPrefix(block, "deploy/kubernetes/image ") {
			continue
		}
		cmd := exec.Command("bash", "-ec", block)
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), "PATH="+d.dir+":"+os.Getenv("PATH"), "PLASTRON="+plastron, "SPIRE_SERVER_PRIVATE_SOCKET="+d.adminSocket())
		if out, err := cmd.CombinedOutput(); err != nil {
			d.t.Errorf("%s%v\n%s", block, err, out)
		}
		ran++
	}
	if ran < 4 {
		d.t.Errorf("the guide has %d blocks of commands", ran)
	}
}

// The configurations of deploy/kubernetes, with no more rights than its roles
// give, take a pod from nothing to its identity by the one rule.
func TestKubernetesManifests(t *testing.T) {
	t.Parallel()
	server, agent := manifests(t, "server.yaml"), manifests(t, "agent.yaml")
	example := manifests(t, "example.yaml")
	api := kubeapi.New(t)
	want := []string{
		`[""]: ["get"] on ["pods" "nodes"] []`,
		`["authentication.k8s.io"]: ["create"] on ["tokenreviews"] []`,
		`plastron[""]: ["get" "patch"] on ["configmaps"] ["plastron-bundle"]`,
	}
	if got := grants(api, server, "plastron-server"); !slices.Equal(got, want) {
		t.Errorf("the server may %q, want %q", got, want)
	}
	if got, want := grants(api, agent, "plastron-agent"), []string{`[""]: ["get"] on ["nodes/pods"] []`}; !slices.Equal(got, want) {
		t.Errorf("the agent may %q, want %q", got, want)
	}
	for _, m := range []manifest{server["StatefulSet plastron-server"], agent["DaemonSet plastron-agent"], example["Deployment web"]} {
		if m.Spec.Template.Spec.HostNetwork || m.Spec.Template.Spec.ServiceAccountName != m.Metadata.Name {
			t.Errorf("%s: %+v", m.Metadata.Name, m.Spec.Template.Spec)
		}
		for _, c := range slices.Concat(m.Spec.Template.Spec.Containers, m.Spec.Template.Spec.InitContainers) {
			s := c.SecurityContext
			if s.Privileged || s.AllowEscalation == nil || *s.AllowEscalation || !s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []string{"ALL"}) ||
				len(s.Capabilities.Add) > 0 && (c.Name != "directory" || !slices.Equal(s.Capabilities.Add, []string{"CHOWN"})) {
				t.Errorf("%s/%s: %+v", m.Metadata.Name, c.Name, s)
			}
		}
	}

	// 1. The server, as a user of the cluster with just these rights.
	d := newDeployment(t)
	change := func(text string, oldnew ...string) string {
		t.Helper()
		for i := 0; i < len(oldnew); i += 2 {
			if !strings.Contains(text, oldnew[i]) {
				t.Errorf("there is no %q in\n%s", oldnew[i], text)
			}
		}
		return strings.NewReplacer(oldnew...).Replace(text)
	}
	api.PutConfigMap("plastron", "plastron-bundle", server["ConfigMap plastron-bundle"].Data)
	kubeconfig := api.Kubeconfig("system:serviceaccount:plastron:plastron-server")
	d.write("server.conf", change(server["ConfigMap plastron-server"].Data["server.conf"],
		`"/var/lib/plastron/server"`, fmt.Sprintf("%q", d.path("server")), `"/var/lib/plastron/server/api.sock"`, fmt.Sprintf("%q", d.adminSocket()),
		"0.0.0.0", "127.0.0.1", "8081", fmt.Sprint(d.port), "= 8080", "= 0",
		"service_account_allow_list", fmt.Sprintf("kube_config_file = %q, service_account_allow_list", kubeconfig),
		`namespace  = "plastron"`, fmt.Sprintf("namespace  = \"plastron\"\nkube_config_file_path = %q", kubeconfig)))
	d.server = start(t, exec.Command(plastron, "server", "run", "-config", d.path("server.conf")))
	d.waitHealthy("server")
	var published string
	for deadline := time.Now().Add(patience); published == ""; time.Sleep(10 * time.Millisecond) {
		if published = api.ConfigMap("plastron", "plastron-bundle")["bundle.crt"]; time.Now().After(deadline) {
			t.Fatalf("no bundle is published\n%s", d.server.Output())
		}
	}

	// 2. The agent, with what its pod would have.
	api.AddNode("node-1", nil)
	agentPod := api.AddPod(kubeapi.Pod{Namespace: "plastron", Name: "plastron-agent-x", ServiceAccount: agent["DaemonSet plastron-agent"].Spec.Template.Spec.ServiceAccountName, Node: "node-1"})
	node := kubelet.New(t)
	d.write("bundle.crt", published)
	d.write("token", api.Token(agentPod, kubeapi.TokenOptions{Audience: "spire-server"}))
	d.write("agent.conf", change(agent["ConfigMap plastron-agent"].Data["agent.conf"],
		`"plastron-server.plastron.svc"`, `"127.0.0.1"`, "= 8081", fmt.Sprintf("= %d", d.port), `"/run/bundle/bundle.crt"`, fmt.Sprintf("%q", d.path("bundle.crt")),
		`"/var/lib/plastron/agent"`, fmt.Sprintf("%q", d.path("agent")), `"/run/plastron/api.sock"`, fmt.Sprintf("%q", d.workloadSocket()),
		`"/var/run/secrets/tokens/plastron-agent"`, fmt.Sprintf("%q", d.path("token")), "0.0.0.0", "127.0.0.1", "= 8080", "= 0",
		`node_name_env = "HOST_IP"`, fmt.Sprintf("node_name_env = \"HOST_IP\"\nkubelet_secure_port = %d\nkubelet_ca_path = %q\ntoken_path = %q\n", node.SecurePort(), node.CAPath, node.TokenPath)))
	cmd := exec.Command(plastron, "agent", "run", "-config", d.path("agent.conf"))
	cmd.Env = append(os.Environ(), "HOST_IP=127.0.0.1")
	d.agent = start(t, cmd)
	d.waitHealthy("agent")

	// 3. The guide's commands, the rule among them, and pods that it is for.
	d.runGuide()
	c := &cluster{deployment: d, kubelet: node}
	for _, account := range []string{"web", "db"} {
		p := api.AddPod(kubeapi.Pod{Namespace: "shop", Name: account + "-1", ServiceAccount: account, Node: "node-1"})
		id := kubepods.NewID()
		node.Put(kubelet.Pod{Namespace: "shop", Name: p.Meta.Name, UID: p.Meta.UID, ServiceAccount: account, Containers: []kubelet.Container{{Name: "main", Image: "i", ImageID: "i@sha256:1", ID: id}}})
		c.gets(kubepods.Make(t, kubepods.Cgroupfs(p.Meta.UID, id), kubepods.Hybrid), "/ns/shop/sa/"+account)
	}
}
