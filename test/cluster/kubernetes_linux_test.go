//go:build kubernetes

package cluster_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	trustDomain = "spiffe://example.org"
	webID       = trustDomain + "/ns/shop/sa/web"
)

// volume is the server's: a directory of the node that everybody may write, as some
// clusters give it out.
const volume = `
apiVersion: v1
kind: PersistentVolume
metadata: { name: data }
spec:
  accessModes: [ReadWriteOnce]
  capacity: { storage: 1Gi }
  hostPath: { path: /var/lib/volume, type: Directory }
`

// TestKubernetes does what docs/kubernetes.md says, on a real cluster, and then
// what happens in one.
func TestKubernetes(t *testing.T) {
	programs := os.Getenv("PLASTRON_KUBERNETES")
	if programs == "" || os.Geteuid() != 0 {
		t.Fatal("run it with make test-k8s, as root: it builds Kubernetes first")
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	lap := func(what string) {
		t.Logf("%6.1f s  %s", time.Since(began).Seconds(), what)
		began = time.Now()
	}
	c, err := Start(t.Context(), programs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, args := range [][]string{{"get", "pods", "-A", "-o", "wide"}, {"get", "events", "-A"}, {"logs", "-n", "plastron", "ds/plastron-agent"},
				{"logs", "-n", "plastron", "plastron-server-0", "-c", "server"}, {"logs", "-n", "shop", "deploy/web"}} {
				out, err := c.Kubectl(context.Background(), "", args...)
				t.Logf("kubectl %v: %v\n%s", args, err, out)
			}
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	lap("the node is ready")
	if out, err := c.Command(t.Context(), "/bin/sh", "-c", "mkdir -m 777 /var/lib/volume").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := c.Kubectl(t.Context(), volume, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	kubectl := func(args ...string) string {
		t.Helper()
		out, err := c.Kubectl(t.Context(), "", args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	server := func(stdin string, args ...string) string {
		t.Helper()
		out, err := c.Kubectl(t.Context(), stdin, append([]string{"exec", "-i", "-n", "plastron", "plastron-server-0", "-c", "server", "--", "/plastron", "server"}, args...)...)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return out
	}
	until := func(what string, done func() error) {
		t.Helper()
		if err := c.Until(t.Context(), what, done); err != nil {
			t.Fatal(err)
		}
		lap(what)
	}

	// 1. The guide, command by command.
	for _, block := range guide(t, root) {
		out, err := c.shell(t, root, block)
		if err != nil {
			t.Fatalf("%s%v\n%s", block, err, out)
		}
		lap(strings.TrimSpace(block))
		if strings.HasPrefix(block, "deploy/kubernetes/image ") {
			if err := c.Import(t.Context(), filepath.Join(root, "bin", "plastron.tar")); err != nil {
				t.Fatal(err)
			}
		}
		if strings.Contains(block, "apply -f -") && !strings.Contains(out, "in force on 1/1 agent") {
			t.Errorf("%s%s", block, out)
		}
	}
	until("both pods of the example have their identity", func() error { return c.shown("shop", "app=web", 2, webID) })

	// 2. Another namespace and account, by the same rule; nothing was registered for it.
	kubectl("create", "namespace", "bank")
	kubectl("create", "serviceaccount", "-n", "bank", "teller")
	example, err := os.ReadFile(filepath.Join(root, "deploy", "kubernetes", "example.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	bank := strings.NewReplacer("shop", "bank", "name: web", "name: teller", "app: web", "app: teller", "serviceAccountName: web", "serviceAccountName: teller").Replace(string(example))
	if _, err := c.Kubectl(t.Context(), bank, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	until("pods of another namespace have theirs", func() error { return c.shown("bank", "app=teller", 2, trustDomain+"/ns/bank/sa/teller") })
	if out := server("", "entry", "count"); !strings.HasPrefix(out, "1 ") {
		t.Errorf("entry count: %s; no entry is stored for any pod", out)
	}

	// 3. The bundle follows a new authority.
	before := c.bundle(t)
	prepared := server("", "localauthority", "x509", "prepare", "-output", "json")
	var authority struct {
		Prepared struct {
			ID string `json:"authority_id"`
		} `json:"prepared_authority"`
	}
	if err := json.Unmarshal([]byte(prepared), &authority); err != nil || authority.Prepared.ID == "" {
		t.Fatalf("%v: %s", err, prepared)
	}
	until("the ConfigMap has the prepared authority", func() error {
		if now := c.bundle(t); strings.Count(now, "BEGIN") != 2 || !strings.Contains(now, strings.TrimSpace(before)) {
			return fmt.Errorf("it has %d roots", strings.Count(now, "BEGIN"))
		}
		return nil
	})
	server("", "localauthority", "x509", "activate", "-authorityID", authority.Prepared.ID)

	// 4. An agent's pod is replaced: it goes on with what its node holds.
	agents := server("", "agent", "count")
	kubectl("delete", "pod", "-n", "plastron", "-l", "app=plastron-agent")
	kubectl("rollout", "status", "-n", "plastron", "daemonset/plastron-agent", "--timeout=3m")
	lap("another pod is the agent")
	kubectl("rollout", "restart", "-n", "shop", "deployment/web")
	kubectl("rollout", "status", "-n", "shop", "deployment/web", "--timeout=3m")
	until("new pods have their identity from it", func() error { return c.shown("shop", "app=web", 2, webID) })

	// 5. It has nothing left, and attests again: the same agent.
	if out, err := c.Command(t.Context(), "/bin/sh", "-c", "rm -r /var/lib/plastron/agent").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	kubectl("delete", "pod", "-n", "plastron", "-l", "app=plastron-agent")
	kubectl("rollout", "status", "-n", "plastron", "daemonset/plastron-agent", "--timeout=3m")
	until("an agent without its data has attested again", func() error {
		if out := c.agentLog(); !strings.Contains(out, "msg=attested") {
			return errors.New(out)
		}
		return nil
	})
	if now := server("", "agent", "count"); now != agents {
		t.Errorf("%s, and before %s", now, agents)
	}

	// 6. Who gets nothing.
	t.Run("refused", func(t *testing.T) {
		out, err := c.onNode(t, "agent", "api", "fetch", "x509", "-socketPath", "/run/plastron/api.sock")
		if err == nil || !strings.Contains(out, "no_") {
			t.Errorf("a process of the node that is in no pod: %v: %s", err, out)
		}
		pod := func(namespace, label string) string {
			return strings.Fields(kubectl("get", "pods", "-n", namespace, "-l", label, "-o", "jsonpath={.items[*].metadata.name}"))[0]
		}
		token := func(namespace, account, pod string, more ...string) string {
			args := append([]string{"create", "token", "-n", namespace, account, "--bound-object-kind", "Pod", "--bound-object-name", pod}, more...)
			return strings.TrimSpace(kubectl(args...))
		}
		agent := pod("plastron", "app=plastron-agent")
		tokens := map[string]string{
			"of another account":        token("shop", "web", pod("shop", "app=web"), "--audience", "spire-server"),
			"for the cluster's own API": token("plastron", "plastron-agent", agent),
			"of a deleted pod":          token("plastron", "plastron-agent", agent, "--audience", "spire-server"),
			"of no pod":                 strings.TrimSpace(kubectl("create", "token", "-n", "plastron", "plastron-agent", "--audience", "spire-server")),
		}
		kubectl("delete", "pod", "-n", "plastron", agent)
		for what, token := range tokens {
			if out := c.attest(t, token); !strings.Contains(out, "Error: attest this node: the ") || strings.Contains(out, "msg=attested") {
				t.Errorf("a token %s: %s", what, out)
			}
		}
		lap("processes of no pod and wrong tokens are refused")
	})
}

// guide is what docs/kubernetes.md has a reader type, block by block.
func guide(t *testing.T, root string) (blocks []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs", "kubernetes.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range strings.Split(string(text), "```sh\n")[1:] {
		block, _, _ := strings.Cut(part, "```")
		blocks = append(blocks, block)
	}
	if len(blocks) < 5 {
		t.Fatalf("the guide has %d blocks", len(blocks))
	}
	return blocks
}

// shell runs a block in the source tree, with a kubectl for the cluster.
func (c *Cluster) shell(t *testing.T, root, block string) (string, error) {
	t.Helper()
	dir := filepath.Join(c.Dir, "path")
	wrapper := fmt.Sprintf("#!/bin/sh\nexec nsenter --target %d --net -- %s --kubeconfig %s/pki/admin.conf \"$@\"\n", c.pid, c.program("kubectl"), c.Dir)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "kubectl"), []byte(wrapper), 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-ec", block)
	cmd.Dir, cmd.Env = root, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// shown holds what the pods print against the ID that each should have.
func (c *Cluster) shown(namespace, label string, pods int, id string) error {
	ctx := context.Background()
	names, err := c.Kubectl(ctx, "", "get", "pods", "-n", namespace, "-l", label, "--field-selector=status.phase=Running", "-o", "jsonpath={.items[*].metadata.name}")
	if err != nil {
		return err
	}
	have := 0
	for name := range strings.FieldsSeq(names) {
		out, err := c.Kubectl(ctx, "", "logs", "-n", namespace, name)
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if got, ok := strings.CutPrefix(strings.TrimSpace(line), "SPIFFE ID:"); ok {
				if strings.TrimSpace(got) != id {
					return fmt.Errorf("%s is %s, want %s", name, got, id)
				}
				have++
				break
			}
		}
	}
	if have < pods {
		return fmt.Errorf("%d of %d pods have an identity", have, pods)
	}
	return nil
}

// bundle is what is published.
func (c *Cluster) bundle(t *testing.T) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), "", "get", "configmap", "-n", "plastron", "plastron-bundle", "-o", `jsonpath={.data.bundle\.crt}`)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// agentLog is what the running agent has logged.
func (c *Cluster) agentLog() string {
	out, err := c.Kubectl(context.Background(), "", "logs", "-n", "plastron", "-l", "app=plastron-agent", "--tail=-1")
	if err != nil {
		return err.Error()
	}
	return out
}

// attest has an agent beside the cluster's try a token, for a few seconds at most,
// and returns what it logs.
func (c *Cluster) attest(t *testing.T, token string) string {
	t.Helper()
	dir, err := os.MkdirTemp(c.Dir, "agent")
	if err != nil {
		t.Fatal(err)
	}
	address := strings.TrimSpace(must(t)(c.Kubectl(t.Context(), "", "get", "service", "-n", "plastron", "plastron-server", "-o", "jsonpath={.spec.clusterIP}")))
	conf := fmt.Sprintf(`agent {
  trust_domain = "example.org"
  server_address = %q
  server_port = 8081
  trust_bundle_path = "%[2]s/bundle.crt"
  data_dir = "%[2]s/data"
  socket_path = "%[2]s/run/api.sock"
}
plugins {
  KeyManager "memory" { plugin_data {} }
  NodeAttestor "k8s_psat" { plugin_data {
    cluster = "demo"
    token_path = "%[2]s/token"
  } }
  WorkloadAttestor "unix" { plugin_data {} }
}`, address, dir)
	for name, text := range map[string]string{"agent.conf": conf, "token": token, "bundle.crt": c.bundle(t)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, _ := c.onNode(t, "agent", "run", "-config", filepath.Join(dir, "agent.conf"))
	return out
}

// onNode runs plastron on the node, in no pod, for some seconds at most.
func (c *Cluster) onNode(t *testing.T, args ...string) (string, error) {
	t.Helper()
	archive, err := filepath.Abs(filepath.Join("..", "..", "bin", "plastron.tar"))
	if err != nil {
		t.Fatal(err)
	}
	script := `cd "$0" && { [ -x plastron ] || { tar -xf "$1" layer.tar && tar -xf layer.tar; }; } && shift && exec timeout 5 ./plastron "$@"`
	out, err := c.Command(t.Context(), "/bin/sh", append([]string{"-c", script, c.Dir, archive}, args...)...).CombinedOutput()
	return string(out), err
}

func must(t *testing.T) func(string, error) string {
	return func(s string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}
