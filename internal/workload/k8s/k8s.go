// Package k8s proves which pod of Kubernetes a local process belongs to: the
// kernel names the pod and the container (package container), and the node's
// kubelet says what they are. Both must agree. Selectors have the type "k8s" and
// SPIRE's names and forms.
//
// The facts for rules are k8s.ns, k8s.sa, k8s.pod, k8s.pod_uid, k8s.node and
// k8s.container.
//
// What must always hold: a process outside of any pod has no selector here, and
// what only looks like a pod is outside; a pod that the kubelet does not list is
// an error, never an empty answer; while the kubelet does not answer, a process
// that was proved before keeps what it had, and no other gets anything.
package k8s

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/container"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/workload"
)

const (
	selectorType = "k8s"
	maxAge       = time.Minute // of an answer of the kubelet that is used again
	maxLabels    = 512         // of a pod that are looked at
	maxShared    = 256         // containers of which what was said last is known
	maxProved    = 4096        // processes that keep what they had while the kubelet is away
	sweepEvery   = 10 * time.Second
)

// Config is the plugin's configuration, with SPIRE's keys. In a pod with a
// service account that may "get" "nodes/pods" (before Kubernetes 1.33
// "nodes/proxy"), and on the host's network or with the node's name in
// MY_NODE_NAME, its zero value works.
type Config struct {
	// KubeletSecurePort is the kubelet's port with TLS. Default 10250.
	KubeletSecurePort int `hcl:"kubelet_secure_port"`
	// KubeletReadOnlyPort is asked instead, at 127.0.0.1: without TLS, without credentials.
	KubeletReadOnlyPort int `hcl:"kubelet_read_only_port"`
	// KubeletCAPath is a file with the CA of the kubelet's certificate. Default: the
	// cluster's CA, as pods have it.
	KubeletCAPath string `hcl:"kubelet_ca_path"`
	// KubeletCertificatePath is a file with the kubelet's own certificate: nothing
	// else is accepted then.
	KubeletCertificatePath string `hcl:"kubelet_certificate_path"`
	// SkipKubeletVerification believes, and shows the token to, whoever answers.
	SkipKubeletVerification bool `hcl:"skip_kubelet_verification"`
	// TokenPath is a file with the token that is shown. Default: the pod's.
	TokenPath string `hcl:"token_path"`
	// CertificatePath and PrivateKeyPath are a client certificate and its key, instead of a token.
	CertificatePath string `hcl:"certificate_path"`
	PrivateKeyPath  string `hcl:"private_key_path"`
	// UseAnonymousAuthentication shows nothing.
	UseAnonymousAuthentication bool `hcl:"use_anonymous_authentication"`

	// NodeName is the kubelet's host, a name or an address. Default: what NodeNameEnv says (MY_NODE_NAME),
	// else 127.0.0.1, with this host's name in the certificate.
	NodeName    string `hcl:"node_name"`
	NodeNameEnv string `hcl:"node_name_env"`

	// MaxPollAttempts times PollRetryInterval is how long a pod that the kubelet does
	// not list yet is waited for. Default 60 times 500ms.
	MaxPollAttempts   int             `hcl:"max_poll_attempts"`
	PollRetryInterval config.Duration `hcl:"poll_retry_interval"`
	// ReloadInterval is how old what the kubelet said may be when it is used for
	// another process, a minute at most. Its files are read for each request.
	ReloadInterval config.Duration `hcl:"reload_interval"`

	// DisableContainerSelectors leaves out what is about the container, and waits
	// for the pod only.
	DisableContainerSelectors bool `hcl:"disable_container_selectors"`
	// CgroupRoots are directories of control groups, "/a/b", below which a kubelet
	// with --cgroup-root makes its pods.
	CgroupRoots []string `hcl:"cgroup_roots"`

	// What follows is SPIRE's and either has no effect or is refused, see Validate.
	UseNewContainerLocator      *bool       `hcl:"use_new_container_locator"`
	VerboseContainerLocatorLogs bool        `hcl:"verbose_container_locator_logs"`
	DisableKubeletClient        bool        `hcl:"disable_kubelet_client"`
	EnableNamespaceLabels       bool        `hcl:"enable_namespace_labels"`
	Sigstore                    config.Node `hcl:"sigstore"`
	Experimental                config.Node `hcl:"experimental"`
}

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c *Config) Validate() error {
	faults := []error{c.kubelet().Validate()}
	refuse := func(it bool, format string, args ...any) {
		if it {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", format, args...))
		}
	}
	refuse(c.MaxPollAttempts < 0 || c.patience() > 10*time.Minute, "max_poll_attempts, poll_retry_interval: a call is not kept waiting for more than 10 minutes")
	for _, root := range c.CgroupRoots {
		refuse(!strings.HasPrefix(root, "/") || root == "/" || path.Clean(root) != root, "cgroup_roots: %q is not an absolute path below /", root)
	}
	refuse(c.UseNewContainerLocator != nil && !*c.UseNewContainerLocator, "use_new_container_locator: there is one way to find a process's container; remove it")
	refuse(c.DisableKubeletClient, "disable_kubelet_client is not offered: without the kubelet nothing is known of a pod; remove it, or the plugin")
	refuse(c.EnableNamespaceLabels, "enable_namespace_labels is not offered: the kubelet does not know the labels of namespaces; remove it, and use the selector k8s:ns")
	refuse(c.Sigstore.Present(), "sigstore is not offered: remove the block, and use the selector k8s:container-image with the image's digest")
	refuse(c.Experimental.Present(), "experimental is not offered: remove the block")
	return errors.Join(faults...)
}

func (c *Config) kubelet() kube.KubeletConfig {
	return kube.KubeletConfig{
		NodeName:   cmp.Or(c.NodeName, os.Getenv(cmp.Or(c.NodeNameEnv, "MY_NODE_NAME"))),
		SecurePort: c.KubeletSecurePort, ReadOnlyPort: c.KubeletReadOnlyPort,
		CAPath: c.KubeletCAPath, Pinned: c.KubeletCertificatePath, SkipVerification: c.SkipKubeletVerification,
		TokenPath: c.TokenPath, CertificatePath: c.CertificatePath, KeyPath: c.PrivateKeyPath, Anonymous: c.UseAnonymousAuthentication,
	}
}

func (c *Config) interval() time.Duration { return c.PollRetryInterval.Or(500 * time.Millisecond) }

func (c *Config) patience() time.Duration {
	return time.Duration(cmp.Or(c.MaxPollAttempts, 60)) * c.interval()
}

// ReadsFiles reports whether the attestor goes on reading files that its
// configuration names.
func (c *Config) ReadsFiles() bool { return c.KubeletReadOnlyPort == 0 }

// Open returns an attestor. It reads the files that the configuration names, so
// that mistakes show, and connects to nothing.
func (c *Config) Open(context.Context) (workload.Attestor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	kubelet, err := c.kubelet().Open()
	if err != nil {
		return nil, err
	}
	return &Attestor{Config: *c, kubelet: kubelet, proved: map[instance]proof{}, shared: map[string]workload.Attested{}}, nil
}

// Attestor is made by Config.Open.
type Attestor struct {
	Config
	kubelet *kube.Kubelet

	mu     sync.Mutex // guards everything below
	proved map[instance]proof
	swept  time.Time                    // when those that have exited were looked for
	shared map[string]workload.Attested // by container: what was said last
}

// instance is one life of a process.
type instance struct {
	pid   int
	start uint64
}

// proof is what was last said of a process, while the kubelet answered.
type proof struct {
	in   container.Container
	said workload.Attested
	at   time.Time
}

// Patience is how long a call may take: that of waiting for a pod, and of a last request.
func (a *Attestor) Patience() time.Duration { return a.patience() + 15*time.Second }

var errNotListed = fault.New(fault.Unavailable, "pod_not_listed", "the kubelet does not list the pod, or not the container, that the process is in").
	Fix("see whether the pod still exists; a container that was just started takes the kubelet a moment")

// Attest says which pod process pid is in, and what it is.
func (a *Attestor) Attest(ctx context.Context, pid int) (workload.Attested, error) {
	if err := ctx.Err(); err != nil {
		return workload.Attested{}, err
	}
	start, err := process.Started(pid)
	if err != nil {
		return workload.Attested{}, err
	}
	in, err := container.Places(a.CgroupRoots).Of(pid)
	if err != nil {
		return workload.Attested{}, err
	}
	switch {
	case in.PodUID == "":
		return workload.Attested{}, nil
	case in.Within != "":
		return outside("the process is in what looks like a pod, below %q, which others than the kubelet may manage; if it is the kubelet's --cgroup-root, name it in cgroup_roots", in.Within), nil
	case in.ID == "":
		return outside("the process is in the control group of a pod, and in none of its containers"), nil
	}
	me := instance{pid, start}
	pod, status, err := a.find(ctx, in)
	if errors.Is(err, errKubelet) {
		if before, ok := a.before(me, in); ok {
			before.said.Omitted = append(slices.Clone(before.said.Omitted),
				fmt.Sprintf("k8s: the kubelet does not answer; what is said here is of %s", before.at.UTC().Format(time.RFC3339)))
			return before.said, nil
		}
	}
	if err != nil {
		a.forget(me)
		return workload.Attested{}, err
	}
	said := a.share(in.ID, a.describe(pod, status))
	a.remember(me, proof{in, said, time.Now()})
	return said, nil
}

func outside(format string, args ...any) workload.Attested {
	return workload.Attested{Omitted: []string{"k8s: " + fmt.Sprintf(format, args...)}}
}

// errKubelet is why there is no list of pods, as opposed to one without the pod.
var errKubelet = errors.New("ask the kubelet")

// find waits until the kubelet lists the container in its pod. A list from before
// the call counts if it has both: neither is ever used again for another. If it
// has not, only one that is asked for from now on can tell.
func (a *Attestor) find(ctx context.Context, in container.Container) (*kube.Pod, *kube.ContainerStatus, error) {
	began := time.Now()
	until, at := began.Add(a.patience()), began.Add(-min(a.ReloadInterval.Or(maxAge), maxAge))
	for {
		pods, err := a.kubelet.Since(ctx, at)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errKubelet, err)
		}
		pod, status, err := a.agree(pods, in)
		if !errors.Is(err, errNotListed) {
			return pod, status, err
		}
		if pods.Began.Before(began) {
			at = began
			continue
		}
		if at = pods.Began.Add(a.interval()); at.After(until) {
			return nil, nil, err
		}
		// All who wait ask again at the same time, with one request.
		timer := time.NewTimer(time.Until(at))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, nil, errNotListed.Because(ctx.Err())
		case <-timer.C:
		}
	}
}

// agree holds the kernel's word against the kubelet's.
func (a *Attestor) agree(pods *kube.Pods, in container.Container) (*kube.Pod, *kube.ContainerStatus, error) {
	owner, listed := pods.PodOf(in.ID)
	if listed && owner != in.PodUID {
		return nil, nil, fault.New(fault.Denied, "container_mismatch", "by the kernel's word the process's container is in another pod than by the kubelet's").
			Fix("only the container runtime may move processes between control groups")
	}
	pod := pods.Pod(in.PodUID)
	if pod == nil || !listed && !a.DisableContainerSelectors {
		if pods.TooLarge(in.PodUID) {
			return nil, nil, fault.New(fault.Denied, "pod_too_large", "the pod that the process is in is larger than this agent reads").
				Fix("make it smaller than 4 MiB of JSON and 1,000 containers")
		}
		return nil, nil, errNotListed
	}
	return pod, pod.Container(in.ID), nil
}

// describe says what a pod is, and one of its containers.
func (a *Attestor) describe(pod *kube.Pod, status *kube.ContainerStatus) workload.Attested {
	c := workload.Collector{Type: selectorType}
	add := func(key, value string) { c.Omit(key, c.Add(key, value)) }
	// both adds a selector and a fact. Kubernetes allows no colon in these names.
	both := func(key, fact, value string) {
		err := c.Add(key, value)
		if err == nil {
			err = c.Fact(fact, value)
		}
		c.Omit(key, err)
	}
	// named adds a selector of a name and a value, which may be empty (R43).
	named := func(key, name, value string) {
		if name == "" || strings.Contains(name, ":") {
			c.Omit(key, fmt.Errorf("%q is not a name that Kubernetes allows", name))
			return
		}
		add(key, name+":"+value)
	}
	images := func(key string, of ...kube.ContainerStatus) {
		for _, s := range of {
			for _, image := range []string{s.Image, s.ImageID} {
				if image != "" { // not started yet
					add(key, image)
				}
			}
		}
	}
	add("pod", "any") // for rules that are for every pod
	both("ns", "ns", pod.Meta.Namespace)
	both("sa", "sa", pod.Spec.ServiceAccount)
	both("pod-name", "pod", pod.Meta.Name)
	both("pod-uid", "pod_uid", pod.Meta.UID)
	both("node-name", "node", pod.Spec.NodeName)
	if status != nil && !a.DisableContainerSelectors {
		both("container-name", "container", status.Name)
		images("container-image", *status)
	}
	add("pod-image-count", strconv.Itoa(len(pod.Status.Containers)))
	add("pod-init-image-count", strconv.Itoa(len(pod.Status.Init)))
	for i, key := range slices.Sorted(maps.Keys(pod.Meta.Labels)) {
		if i == maxLabels {
			c.Omit("pod-label", fmt.Errorf("only the first %d labels are looked at", maxLabels))
			break
		}
		named("pod-label", key, pod.Meta.Labels[key])
	}
	for _, o := range pod.Meta.Owners {
		named("pod-owner", o.Kind, o.Name)
		named("pod-owner-uid", o.Kind, o.UID)
	}
	images("pod-image", pod.Status.Containers...)
	images("pod-init-image", pod.Status.Init...)
	return c.Attested()
}

// share returns what was said of a container before, if it is the same, so that
// many processes of a pod with much to say of it are no more to keep than one.
func (a *Attestor) share(id string, said workload.Attested) workload.Attested {
	a.mu.Lock()
	defer a.mu.Unlock()
	before, ok := a.shared[id]
	if ok && slices.Equal(before.Selectors, said.Selectors) && maps.Equal(before.Facts, said.Facts) && slices.Equal(before.Omitted, said.Omitted) {
		return before
	}
	if len(a.shared) >= maxShared {
		clear(a.shared)
	}
	a.shared[id] = said
	return said
}

// before returns what was proved of a process, if it is where it was.
func (a *Attestor) before(me instance, in container.Container) (proof, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, ok := a.proved[me]
	return p, ok && p.in == in
}

// remember keeps what was proved of a process. When there is no room, those that
// have exited go; a process for which there is still none is not remembered.
func (a *Attestor) remember(me instance, p proof) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.proved[me]; !known && len(a.proved) >= maxProved {
		if p.at.Sub(a.swept) < sweepEvery {
			return
		}
		a.swept = p.at
		maps.DeleteFunc(a.proved, func(other instance, _ proof) bool {
			start, err := process.Started(other.pid)
			return err != nil || start != other.start
		})
		if len(a.proved) >= maxProved {
			return
		}
	}
	a.proved[me] = p
}

func (a *Attestor) forget(me instance) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.proved, me)
}
