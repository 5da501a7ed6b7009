package system_test

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fakes/kubelet"
	"github.com/plastron/plastron/internal/fakes/kubepods"
)

// cluster is a deployment whose agent knows processes by their pods.
type cluster struct {
	*deployment
	kubelet *kubelet.Kubelet
	agentID string
}

func newCluster(t *testing.T, options string) *cluster {
	t.Helper()
	c := &cluster{deployment: newDeployment(t), kubelet: kubelet.New(t)}
	c.agentPlugins = fmt.Sprintf(`WorkloadAttestor "k8s" { plugin_data {
    kubelet_secure_port = %d
    kubelet_ca_path     = %q
    token_path          = %q
    node_name           = "127.0.0.1"
    %s
  } }`, c.kubelet.SecurePort(), c.kubelet.CAPath, c.kubelet.TokenPath, options)
	c.agentID = c.start()
	return c
}

// pod makes the control group of a pod's only container, and lists the pod.
func (c *cluster) pod(namespace, account string, path func(uid, id string) string, in kubepods.Version) (kubelet.Pod, *kubepods.Group) {
	c.t.Helper()
	p := kubelet.Pod{Namespace: namespace, Name: account + "-1", UID: kubepods.NewUID(), ServiceAccount: account,
		Containers: []kubelet.Container{{Name: "main", Image: "shop/" + account + ":1", ImageID: "shop/" + account + "@sha256:1", ID: kubepods.NewID()}}}
	g := kubepods.Make(c.t, path(p.UID, p.Containers[0].ID), in)
	c.kubelet.Put(p)
	return p, g
}

// register makes an entry for processes of pods, and waits until the agent has it.
func (c *cluster) register(path string, selectors ...string) {
	c.t.Helper()
	args := []string{"server", "entry", "create", "-socketPath", c.adminSocket(), "-parentID", c.agentID, "-spiffeID", "spiffe://" + c.trustDomain + path, "-wait", "120s"}
	for _, s := range selectors {
		args = append(args, "-selector", s)
	}
	c.run(args...)
}

// call prepares a call of the Workload API by a process of a pod, with a stream or one answer.
func (c *cluster) call(g *kubepods.Group, what ...string) *exec.Cmd {
	return g.Command(plastron, append(append([]string{"agent", "api"}, what...), "-socketPath", c.workloadSocket())...)
}

// fetched returns the IDs that a process of a pod gets, or why it gets none.
func (c *cluster) fetched(g *kubepods.Group) (ids []string, out string) {
	text, err := c.call(g, "fetch", "x509", "-timeout", "120s").CombinedOutput()
	for line := range strings.Lines(string(text)) {
		if id, ok := strings.CutPrefix(line, "SPIFFE ID:"); ok {
			ids = append(ids, strings.TrimSpace(id))
		}
	}
	if (err == nil) != (len(ids) > 0) {
		c.t.Errorf("%v, %v:\n%s", ids, err, text)
	}
	return ids, string(text)
}

// gets checks what a process gets, in any order: entries of one second have none.
func (c *cluster) gets(g *kubepods.Group, paths ...string) {
	c.t.Helper()
	var want []string
	for _, path := range paths {
		want = append(want, "spiffe://"+c.trustDomain+path)
	}
	ids, out := c.fetched(g)
	slices.Sort(ids)
	if slices.Sort(want); !slices.Equal(ids, want) {
		c.t.Errorf("got %v, want %v\n%s", ids, want, out)
	}
}

func (c *cluster) refused(g *kubepods.Group, reason string) {
	c.t.Helper()
	if ids, out := c.fetched(g); ids != nil || !strings.Contains(out, "("+reason+")") {
		c.t.Errorf("got %v, want %s\n%s", ids, reason, out)
	}
}

// Claims 26 and 28: a process in a pod gets exactly its pod's SVID, with control
// groups of both versions and drivers; one in another pod does not, one of no pod
// neither (R46), and with its pod goes what a process had.
func TestPods(t *testing.T) {
	t.Parallel()
	c := newCluster(t, `reload_interval = "1ms"
    max_poll_attempts = 3
    poll_retry_interval = "50ms"`)
	c.register("/ns/shop/sa/web", "k8s:ns:shop", "k8s:sa:web")
	c.register("/image", "k8s:container-image:shop/db@sha256:1")
	c.run("server", "rule", "create", "-socketPath", c.adminSocket(), "-parentID", c.agentID, "-selector", "k8s:ns:by-rule",
		"-idTemplate", "spiffe://example.org/ns/{k8s.ns}/sa/{k8s.sa}", "-trust", "agent", "-wait", "120s")
	crio := func(uid, id string) string { return kubepods.Systemd("crio", uid, id) }
	for name, in := range map[string]kubepods.Version{"v1": kubepods.V1, "v2": kubepods.V2} {
		web, webs := c.pod("shop", "web", kubepods.Cgroupfs, in)
		_, dbs := c.pod("shop", "db", crio, in)
		_, others := c.pod("other", "web", kubepods.Cgroupfs, in)
		_, ruled := c.pod("by-rule", "api", crio, in)
		c.gets(webs, "/ns/shop/sa/web")
		c.gets(dbs, "/image") // claim 27
		c.gets(ruled, "/ns/by-rule/sa/api")
		c.refused(others, "selector_mismatch")
		// The names of a pod in another part of the tree, and below a pod's own group.
		c.refused(kubepods.Make(t, "/user.slice/user-1000.slice"+kubepods.Cgroupfs(web.UID, web.Containers[0].ID), in), "no_grant")
		c.refused(kubepods.Make(t, crio(kubepods.NewUID(), kubepods.NewID())+kubepods.Cgroupfs(web.UID, web.Containers[0].ID), in), "attestor_failed")
		c.refused(kubepods.Make(t, kubepods.Cgroupfs(kubepods.NewUID(), web.Containers[0].ID), in), "attestor_failed")

		c.kubelet.Remove(web.UID)
		c.refused(webs, "attestor_failed")
		if t.Failed() {
			t.Fatal(name)
		}
	}
}

// A process that has its identity keeps it, and gets what is added, while the
// kubelet is away; a process that comes meanwhile is refused until it is back.
func TestKubeletIsAway(t *testing.T) {
	t.Parallel()
	c := newCluster(t, `reload_interval = "1ms"`) // each look at a process asks the kubelet
	c.register("/first", "k8s:ns:shop")
	_, g := c.pod("shop", "web", kubepods.Cgroupfs, kubepods.Hybrid)
	c.gets(g, "/first")
	stream := start(t, c.call(g, "watch"))
	has := func(path string) {
		t.Helper()
		eventually(t, path+" in the stream", func() bool { return strings.Contains(stream.Output(), "spiffe://example.org"+path+"\n") })
	}
	has("/first")
	c.kubelet.Kill()
	c.createEntry(c.agentID, "/second", nil, "k8s:ns:shop") // with the push the process is looked at again (R42)
	has("/second")
	c.refused(g, "attestor_failed")
	if log := c.agent.Output(); !strings.Contains(log, "attestor failed") || !strings.Contains(log, "the kubelet at 127.0.0.1") {
		t.Errorf("the agent's log does not say why:\n%s", log)
	}
	c.kubelet.Revive()
	c.gets(g, "/first", "/second")
	select {
	case <-stream.done:
		t.Errorf("the stream ended:\n%s", stream.Output())
	default:
	}
}

// R62: 100 processes of ten pods that start at once are one request to the kubelet.
func TestManyProcessesOneRequest(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "")
	c.register("/ns/shop", "k8s:ns:shop")
	var groups []*kubepods.Group
	for range 10 {
		_, g := c.pod("shop", "web", kubepods.Cgroupfs, kubepods.Hybrid)
		groups = append(groups, g)
	}
	release := c.kubelet.Hold()
	before := time.Now()
	var callers sync.WaitGroup
	for i := range 100 {
		callers.Go(func() { c.gets(groups[i%len(groups)], "/ns/shop") })
	}
	eventually(t, "a request to the kubelet", func() bool { return c.kubelet.Requests() > 0 })
	release()
	callers.Wait()
	took := time.Since(before)
	if n, most := c.kubelet.Requests(), 1+int(took/time.Minute); n > most { // an answer is good for a minute
		t.Errorf("%d requests, want at most %d", n, most)
	}
	t.Logf("100 processes had their SVIDs after %v", took.Round(time.Millisecond))
}
