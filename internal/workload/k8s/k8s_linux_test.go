package k8s

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fakes/kubelet"
	"github.com/plastron/plastron/internal/fakes/kubepods"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/workload"
	"github.com/plastron/plastron/internal/workload/workloadtest"
)

// node is a node with a kubelet and control groups.
type node struct {
	t *testing.T
	*kubelet.Kubelet
}

func newNode(t *testing.T) node { return node{t, kubelet.New(t)} }

func (n node) config() Config {
	return Config{KubeletSecurePort: n.SecurePort(), KubeletCAPath: n.CAPath, TokenPath: n.TokenPath, NodeNameEnv: "NO_SUCH_VARIABLE",
		MaxPollAttempts: 3, PollRetryInterval: config.Duration(20 * time.Millisecond)}
}

func (n node) open(c Config) *Attestor {
	n.t.Helper()
	a, err := c.Open(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	return a.(*Attestor)
}

// pod makes the control group of a pod's container "main", and lists the pod.
func (n node) pod() (kubelet.Pod, *kubepods.Group) {
	n.t.Helper()
	p := kubelet.Pod{Namespace: "shop", Name: "web-1", UID: kubepods.NewUID(), ServiceAccount: "web",
		Containers: []kubelet.Container{{Name: "main", Image: "shop/web:1", ImageID: "shop/web@sha256:1", ID: kubepods.NewID()}}}
	g := kubepods.Make(n.t, kubepods.Cgroupfs(p.UID, p.Containers[0].ID), kubepods.Hybrid)
	n.Put(p)
	return p, g
}

func values(a workload.Attested) (all []string) {
	for _, s := range a.Selectors {
		all = append(all, s.Value)
	}
	return all
}

func (n node) attest(a *Attestor, pid int) workload.Attested {
	n.t.Helper()
	said, err := a.Attest(n.t.Context(), pid)
	if err != nil {
		n.t.Fatal(err)
	}
	return said
}

func (n node) refused(a *Attestor, pid int, reason string) {
	n.t.Helper()
	if said, err := a.Attest(n.t.Context(), pid); fault.ReasonOf(err) != reason {
		n.t.Errorf("Attest() = %+v, %v, want %s", said, err, reason)
	}
}

func TestContract(t *testing.T) {
	n := newNode(t)
	_, g := n.pod()
	workloadtest.RunOn(t, g.Start(t), func(*testing.T) workload.Attestor { return n.open(n.config()) })
}

func TestSelectors(t *testing.T) {
	n := newNode(t)
	p, g := n.pod()
	p.Labels = map[string]string{"app": "web", "example.org/tier": "front", "empty": "", "a:b": "c"}
	p.Owners = []kubelet.Owner{{Kind: "ReplicaSet", Name: "web-abc", UID: "owner-1"}}
	p.Containers = append(p.Containers, kubelet.Container{Name: "side", Image: "shop/side:2", ImageID: "docker-pullable://shop/side@sha256:2", ID: kubepods.NewID()}, kubelet.Container{Name: "late"})
	p.Init = []kubelet.Container{{Name: "init", Image: "shop/init", ImageID: "sha256:3", ID: kubepods.NewID()}}
	n.Put(p)
	pid := g.Start(t)
	said := n.attest(n.open(n.config()), pid)
	pod := []string{
		"node-name:node-1", "ns:shop", "pod-image-count:3",
		"pod-image:docker-pullable://shop/side@sha256:2", "pod-image:shop/side:2", "pod-image:shop/web:1", "pod-image:shop/web@sha256:1",
		"pod-init-image-count:1", "pod-init-image:sha256:3", "pod-init-image:shop/init",
		"pod-label:app:web", "pod-label:empty:", "pod-label:example.org/tier:front",
		"pod-name:web-1", "pod-owner-uid:ReplicaSet:owner-1", "pod-owner:ReplicaSet:web-abc", "pod-uid:" + p.UID, "pod:any", "sa:web",
	}
	own := []string{"container-image:shop/web:1", "container-image:shop/web@sha256:1", "container-name:main"}
	if diff := cmp.Diff(append(own, pod...), values(said)); diff != "" {
		t.Error(diff)
	}
	facts := map[string]string{"k8s.ns": "shop", "k8s.sa": "web", "k8s.pod": "web-1", "k8s.pod_uid": p.UID, "k8s.node": "node-1", "k8s.container": "main"}
	if diff := cmp.Diff(facts, said.Facts); diff != "" {
		t.Error(diff)
	}
	// R43, E44: a colon in a key would let one label pass for another.
	if want := []string{`k8s:pod-label is left out: "a:b" is not a name that Kubernetes allows`}; !slices.Equal(said.Omitted, want) {
		t.Errorf("left out: %q", said.Omitted)
	}

	c := n.config()
	c.DisableContainerSelectors = true
	delete(facts, "k8s.container")
	said = n.attest(n.open(c), pid)
	if diff := cmp.Diff(pod, values(said)) + cmp.Diff(facts, said.Facts); diff != "" {
		t.Error(diff)
	}
}

// Init and ephemeral containers are containers, too. The image by digest is that
// of the running container, wherever its tag points now (R44, T9).
func TestEachKindOfContainer(t *testing.T) {
	n := newNode(t)
	for kind, put := range map[string]func(*kubelet.Pod){
		"init":      func(p *kubelet.Pod) { p.Init, p.Containers = p.Containers, nil },
		"ephemeral": func(p *kubelet.Pod) { p.Ephemeral, p.Containers = p.Containers, nil },
	} {
		p, g := n.pod()
		put(&p)
		n.Put(p)
		said := values(n.attest(n.open(n.config()), g.Start(t)))
		if !slices.Contains(said, "container-name:main") || !slices.Contains(said, "container-image:shop/web@sha256:1") {
			t.Errorf("%s: %v", kind, said)
		}
	}
}

// A process outside of any pod has no selector, and the kubelet is not asked for it.
func TestOutside(t *testing.T) {
	n := newNode(t)
	a := n.open(n.config())
	p, _ := n.pod()
	id := p.Containers[0].ID
	for name, c := range map[string]struct {
		pid  int
		said string
	}{
		"host":            {os.Getpid(), ""},
		"docker":          {kubepods.Make(t, "/docker/"+id, kubepods.Hybrid).Start(t), ""},
		"below a user":    {kubepods.Make(t, "/user.slice/user-1000.slice"+kubepods.Cgroupfs(p.UID, id), kubepods.Hybrid).Start(t), `below "user.slice"`}, // T7
		"below something": {kubepods.Make(t, "/somewhere"+kubepods.Cgroupfs(p.UID, id), kubepods.Hybrid).Start(t), `below "somewhere"`},
		"pod's own group": {kubepods.Make(t, "/kubepods/burstable/pod"+p.UID, kubepods.Hybrid).Start(t), "in none of its containers"},
	} {
		said := n.attest(a, c.pid)
		if len(said.Selectors) != 0 || len(said.Facts) != 0 || !strings.Contains(fmt.Sprint(said.Omitted), c.said) || c.said == "" && said.Omitted != nil {
			t.Errorf("%s: %+v", name, said)
		}
	}
	if n.Requests() != 0 {
		t.Errorf("the kubelet was asked %d times", n.Requests())
	}
	c := n.config()
	c.CgroupRoots = []string{"/somewhere"}
	if said := n.attest(n.open(c), kubepods.Make(t, "/somewhere"+kubepods.Cgroupfs(p.UID, id), kubepods.Hybrid).Start(t)); !slices.Contains(values(said), "ns:shop") {
		t.Errorf("below a root that is configured: %+v", said)
	}
}

// W28: kernel and kubelet must agree on pod and container. What is not listed is
// waited for, and then an error.
func TestDisagreement(t *testing.T) {
	n := newNode(t)
	a := n.open(n.config())
	p, _ := n.pod()
	other, _ := n.pod()
	in := func(uid, id string) int {
		return kubepods.Make(t, kubepods.Systemd("cri-containerd", uid, id), kubepods.Hybrid).Start(t)
	}
	n.refused(a, in(other.UID, p.Containers[0].ID), "container_mismatch")
	n.refused(a, in(kubepods.NewUID(), p.Containers[0].ID), "container_mismatch")
	n.refused(a, in(p.UID, kubepods.NewID()), "pod_not_listed")
	n.refused(a, in(kubepods.NewUID(), kubepods.NewID()), "pod_not_listed")

	// Without container selectors the pod's word is enough, but not against another's container.
	c := n.config()
	c.DisableContainerSelectors = true
	a = n.open(c)
	n.refused(a, in(other.UID, p.Containers[0].ID), "container_mismatch")
	n.refused(a, in(kubepods.NewUID(), kubepods.NewID()), "pod_not_listed")
	if said := n.attest(a, in(p.UID, kubepods.NewID())); !slices.Contains(values(said), "pod-uid:"+p.UID) {
		t.Errorf("%+v", said)
	}
}

// A pod that somebody made too large to be read takes nothing from the others (R59).
func TestLargePod(t *testing.T) {
	n := newNode(t)
	a := n.open(n.config())
	p, g := n.pod()
	large, of := n.pod()
	large.Labels = map[string]string{"x": strings.Repeat("x", 5<<20)}
	n.Put(large)
	if said := n.attest(a, g.Start(t)); !slices.Contains(values(said), "pod-uid:"+p.UID) {
		t.Errorf("%+v", said)
	}
	n.refused(a, of.Start(t), "pod_too_large")
	if n.Requests() > 2 {
		t.Errorf("%d requests: it is waited for in vain", n.Requests())
	}
}

// Who may make pods decides how much there is to say of one. What is kept of it does
// not grow with the processes that call, and is bounded for each container (R98).
func TestWhatIsSaidIsBounded(t *testing.T) {
	n := newNode(t)
	a := n.open(n.config())
	p, g := n.pod()
	p.Labels = map[string]string{}
	for i := range 600 {
		p.Labels[fmt.Sprintf("%0253d/%063d", i, i)] = strings.Repeat("x", 63)
	}
	for i := range 300 {
		p.Owners = append(p.Owners, kubelet.Owner{Kind: fmt.Sprintf("a:%0500d", i), Name: "o", UID: "u"})
	}
	for i := range 50 {
		p.Containers = append(p.Containers, kubelet.Container{Name: fmt.Sprint(i), Image: fmt.Sprintf("%030000d", i)})
	}
	n.Put(p)
	first, second := n.attest(a, g.Start(t)), n.attest(a, g.Start(t))
	size := 0
	for _, s := range first.Selectors {
		size += len(s.Type) + len(s.Value)
	}
	for _, s := range first.Omitted {
		size += len(s)
	}
	if size > workload.MaxSaid+4<<10 {
		t.Errorf("%d bytes are said", size)
	}
	for _, want := range []string{"ns:shop", "container-name:main", "container-image:shop/web@sha256:1", "pod-image-count:51"} {
		if !slices.Contains(values(first), want) {
			t.Errorf("%s is missing", want)
		}
	}
	if !slices.ContainsFunc(first.Omitted, func(s string) bool { return strings.Contains(s, "is more than 256 KiB") }) {
		t.Errorf("left out: %q", first.Omitted)
	}
	if &first.Selectors[0] != &second.Selectors[0] {
		t.Error("two processes of a container have what is said of it twice")
	}
	p.Labels = nil
	n.Put(p)
	if _, err := a.kubelet.Since(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if third := n.attest(a, g.Start(t)); len(third.Selectors) >= len(first.Selectors) {
		t.Error("what is said does not change with the pod")
	}
}

// R62: 100 processes at once are one request, and later ones none for a while.
func TestOneRequest(t *testing.T) {
	n := newNode(t)
	a := n.open(n.config())
	var pids []int
	for range 10 {
		_, g := n.pod()
		pids = append(pids, g.Start(t))
	}
	release := n.Hold()
	var callers sync.WaitGroup
	for i := range 100 {
		callers.Go(func() {
			if _, err := a.Attest(t.Context(), pids[i%len(pids)]); err != nil {
				t.Error(err)
			}
		})
	}
	release()
	callers.Wait()
	n.attest(a, pids[0])
	if n.Requests() != 1 {
		t.Errorf("%d requests", n.Requests())
	}
}

// A list from before a process says nothing about it: the kubelet is asked again at once.
func TestNewPod(t *testing.T) {
	n := newNode(t)
	c := n.config()
	c.PollRetryInterval = config.Duration(2 * time.Minute)
	a := n.open(c)
	_, old := n.pod()
	n.attest(a, old.Start(t))
	p, g := n.pod()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if said, err := a.Attest(ctx, g.Start(t)); err != nil || !slices.Contains(values(said), "pod-uid:"+p.UID) || n.Requests() != 2 {
		t.Errorf("%+v, %v after %d requests", said, err, n.Requests())
	}
}

// A pod that the kubelet does not list yet is waited for: with the first list
// that has it the call is answered. All who wait share each request.
func TestWaits(t *testing.T) {
	n := newNode(t)
	c := n.config()
	c.MaxPollAttempts = 6000 // two minutes
	a := n.open(c)
	_, old := n.pod()
	n.attest(a, old.Start(t)) // so a list is there, and too old for what follows
	p, g := n.pod()
	n.Remove(p.UID)
	pid := g.Start(t)
	var callers sync.WaitGroup
	for range 50 {
		callers.Go(func() {
			if said, err := a.Attest(t.Context(), pid); err != nil || !slices.Contains(values(said), "pod-uid:"+p.UID) {
				t.Errorf("%+v, %v", said, err)
			}
		})
	}
	for deadline := time.Now().Add(time.Minute); n.Requests() < 4; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the kubelet is not asked again")
		}
	}
	late := p
	late.Containers = []kubelet.Container{{Name: "main", Image: "shop/web:1"}} // listed, but not its container
	n.Put(late)
	asked := n.Requests()
	for deadline := time.Now().Add(time.Minute); n.Requests() < asked+2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the kubelet is not asked again")
		}
	}
	n.Put(p)
	callers.Wait()
}

// While the kubelet is away a process that was proved keeps what it had; a new one
// gets nothing. When it is back and does not know the pod, that is over, also if
// it goes away again.
func TestKubeletAway(t *testing.T) {
	n := newNode(t)
	c := n.config()
	c.ReloadInterval = config.Duration(time.Nanosecond) // each call asks
	a := n.open(c)
	p, g := n.pod()
	held, other := g.Start(t), g.Start(t)
	before := n.attest(a, held)

	n.Kill()
	said := n.attest(a, held)
	if !slices.Equal(said.Selectors, before.Selectors) || len(said.Omitted) != 1 || !strings.Contains(said.Omitted[0], "the kubelet does not answer") {
		t.Errorf("%+v, want %+v", said, before)
	}
	n.refused(a, other, "kubelet_unavailable")

	n.Revive()
	n.attest(a, other)
	if said := n.attest(a, held); len(said.Omitted) != 0 {
		t.Errorf("%+v", said)
	}
	n.Remove(p.UID)
	n.refused(a, held, "pod_not_listed")
	n.Kill()
	n.refused(a, held, "kubelet_unavailable")
	n.attest(a, other) // the last word on this one
}

// A change of a pod is seen once the list is older than reload_interval.
func TestChange(t *testing.T) {
	n := newNode(t)
	slow := n.open(n.config())
	c := n.config()
	c.ReloadInterval = config.Duration(time.Nanosecond)
	fast := n.open(c)
	p, g := n.pod()
	pid := g.Start(t)
	n.attest(slow, pid)
	n.attest(fast, pid)
	p.Labels = map[string]string{"app": "web"}
	n.Put(p)
	if said := n.attest(slow, pid); slices.Contains(values(said), "pod-label:app:web") {
		t.Error("the kubelet was asked again within a minute")
	}
	if said := n.attest(fast, pid); !slices.Contains(values(said), "pod-label:app:web") {
		t.Errorf("the change is not seen: %v", values(said))
	}
}

// What is remembered is bounded; processes that have exited make room.
func TestMemory(t *testing.T) {
	n := newNode(t)
	a := n.open(n.config())
	for i := range maxProved {
		a.remember(instance{1 << 30, uint64(i)}, proof{at: time.Now()})
	}
	_, g := n.pod()
	pid := g.Start(t)
	n.attest(a, pid)
	if len(a.proved) != 1 {
		t.Errorf("%d are remembered", len(a.proved))
	}
	n.Kill()
	n.attest(a, pid)
}

func TestConfig(t *testing.T) {
	n := newNode(t)
	no := false
	var block struct {
		Sigstore config.Node `hcl:"sigstore"`
	}
	if err := config.Decode("x", []byte("sigstore { }"), &block); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"locator":          {func(c *Config) { c.UseNewContainerLocator = &no }, "use_new_container_locator"},
		"no kubelet":       {func(c *Config) { c.DisableKubeletClient = true }, "disable_kubelet_client is not offered"},
		"namespace labels": {func(c *Config) { c.EnableNamespaceLabels = true }, "enable_namespace_labels is not offered"},
		"sigstore":         {func(c *Config) { c.Sigstore = block.Sigstore }, "sigstore is not offered"},
		"experimental":     {func(c *Config) { c.Experimental = block.Sigstore }, "experimental is not offered"},
		"long wait":        {func(c *Config) { c.MaxPollAttempts = 1 << 20 }, "more than 10 minutes"},
		"negative":         {func(c *Config) { c.MaxPollAttempts = -1 }, "max_poll_attempts"},
		"root":             {func(c *Config) { c.CgroupRoots = []string{"/"} }, "cgroup_roots"},
		"relative root":    {func(c *Config) { c.CgroupRoots = []string{"a"} }, "cgroup_roots"},
		"two ports":        {func(c *Config) { c.KubeletReadOnlyPort = 10255 }, "only one of them"},
		"no token":         {func(c *Config) { c.TokenPath = "/nonexistent" }, "token_path"},
	} {
		t.Run(name, func(t *testing.T) {
			config := n.config()
			c.change(&config)
			if _, err := config.Open(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Open() = %v, want it to say %q", err, c.want)
			}
		})
	}
	yes, c := true, n.config()
	c.UseNewContainerLocator, c.VerboseContainerLocatorLogs = &yes, true // SPIRE's defaults and habits
	n.open(c)
	t.Setenv("MY_NODE_NAME", "localhost")
	c.NodeNameEnv = ""
	_, g := n.pod()
	n.attest(n.open(c), g.Start(t))
	if want := (entry.Selector{Type: "k8s", Value: "ns:shop"}); !slices.Contains(n.attest(n.open(c), g.Start(t)).Selectors, want) {
		t.Errorf("no selector %s", want)
	}
	c.NodeName = "127.0.0.2"
	n.refused(n.open(c), g.Start(t), "kubelet_unavailable")
	if _, err := n.open(c).Attest(t.Context(), g.Start(t)); !errors.Is(err, errKubelet) {
		t.Error(err)
	}
}
