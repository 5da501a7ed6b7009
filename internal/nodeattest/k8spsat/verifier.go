package k8spsat

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const defaultAudience = "spire-server"

// Config is the server's half.
type Config struct {
	// Clusters are those whose nodes may join, by the name that agents give.
	Clusters map[string]Cluster `hcl:"clusters"`
}

// Cluster is one cluster. With issuer, tokens are verified by the issuer's keys;
// without, by the cluster's API server.
type Cluster struct {
	// ServiceAccountAllowList are the service accounts of agents, as NAMESPACE:NAME.
	// Required.
	ServiceAccountAllowList []string `hcl:"service_account_allow_list"`
	// Audience lists what tokens may be for; one of them must be. Default: spire-server.
	Audience *[]string `hcl:"audience"`
	// KubeConfigFile says how to reach the API server. Default: as a pod of the
	// cluster does.
	KubeConfigFile string `hcl:"kube_config_file"`
	// AllowedNodeLabelKeys and AllowedPodLabelKeys are the labels that become
	// selectors. Default: none. Not with issuer.
	AllowedNodeLabelKeys []string `hcl:"allowed_node_label_keys"`
	AllowedPodLabelKeys  []string `hcl:"allowed_pod_label_keys"`
	// UsePodUIDForAgentID makes the agent's ID of its pod's UID instead of its node's.
	UsePodUIDForAgentID bool `hcl:"use_pod_uid_for_agent_id"`

	// Issuer is the tokens' iss. The API server is not asked then.
	Issuer string `hcl:"issuer"`
	// JWKSFile or JWKSURI is where the issuer's keys are. Default: where its
	// discovery document says.
	JWKSFile string `hcl:"jwks_file"`
	JWKSURI  string `hcl:"jwks_uri"`
	// IssuerCAFile holds the roots for jwks_uri and discovery. Default: the system's.
	IssuerCAFile string `hcl:"issuer_ca_file"`
}

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c *Config) Validate() error {
	var faults []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", format, args...))
		}
	}
	check(len(c.Clusters) > 0, "clusters: name one at least")
	for _, name := range slices.Sorted(maps.Keys(c.Clusters)) {
		cluster, at := c.Clusters[name], "clusters."+name
		if err := checkCluster(name); err != nil {
			faults = append(faults, err)
			continue
		}
		check(len(cluster.ServiceAccountAllowList) > 0, "%s.service_account_allow_list: must name the agents' service account as NAMESPACE:NAME", at)
		for _, account := range cluster.ServiceAccountAllowList {
			namespace, name, ok := strings.Cut(account, ":")
			check(ok && namespace != "" && name != "" && !strings.ContainsAny(name, ":*") && !strings.Contains(namespace, "*"),
				"%s.service_account_allow_list: %q is not NAMESPACE:NAME; there are no patterns", at, account)
		}
		check(len(cluster.audiences()) > 0 && !slices.Contains(cluster.audiences(), ""),
			"%s.audience: must name an audience; without one, agents would have to send tokens with which one can use the cluster's API", at)
		offline := cluster.Issuer != ""
		check(offline || cluster.JWKSFile == "" && cluster.JWKSURI == "" && cluster.IssuerCAFile == "",
			"%s.issuer: must be set if jwks_file, jwks_uri or issuer_ca_file is", at)
		check(!offline || cluster.KubeConfigFile == "", "%s.kube_config_file: with issuer, the API server is not asked; remove one of them", at)
		check(!offline || len(cluster.AllowedNodeLabelKeys) == 0 && len(cluster.AllowedPodLabelKeys) == 0,
			"%s.allowed_node_label_keys, allowed_pod_label_keys: tokens tell no labels; remove them, or issuer", at)
		if offline {
			err := cluster.issuerConfig().Validate()
			check(err == nil, "%s.%s", at, fault.MessageOf(err))
		}
		for _, key := range slices.Concat(cluster.AllowedNodeLabelKeys, cluster.AllowedPodLabelKeys) {
			check(key != "" && !strings.ContainsAny(key, ": \t\n"), "%s: %q is not the key of a label", at, key)
		}
	}
	return errors.Join(faults...)
}

func (c Cluster) issuerConfig() kube.IssuerConfig {
	return kube.IssuerConfig{Issuer: c.Issuer, JWKSFile: c.JWKSFile, JWKSURI: c.JWKSURI, CAFile: c.IssuerCAFile}
}

func (c Cluster) audiences() []string {
	if c.Audience == nil {
		return []string{defaultAudience}
	}
	return *c.Audience
}

// checkCluster holds a cluster's name to what can be part of an ID.
func checkCluster(name string) error {
	if len(name) > maxCluster || strings.Contains(name, "/") || spiffeid.ValidatePath("/"+name) != nil {
		return fault.New(fault.Invalid, "config_invalid", "k8s_psat: cluster: %q cannot be part of an ID", name).
			Fix("name the cluster with letters, digits, '.', '_' and '-'")
	}
	return nil
}

// Open reads the files that are named and returns the server's half. It connects to nothing.
func (c *Config) Open(_ context.Context, env nodeattest.Env) (nodeattest.Verifier, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	v := &verifier{clusters: map[string]*cluster{}, log: env.Log}
	for _, name := range slices.Sorted(maps.Keys(c.Clusters)) {
		configured := c.Clusters[name]
		opened := &cluster{Cluster: configured, name: name, looks: looks{slots: make(chan struct{}, maxLooks), turn: turnWait, wait: lookWait}}
		var err error
		if configured.Issuer != "" {
			opened.issuer, err = configured.issuerConfig().Open()
		} else {
			opened.api, err = kube.ClientConfig{Kubeconfig: configured.KubeConfigFile}.Open()
		}
		if err != nil {
			return nil, fault.New(fault.KindOf(err), fault.ReasonOf(err), "cluster %q: %s", name, fault.MessageOf(err)).Because(err)
		}
		v.clusters[name] = opened
	}
	return v, nil
}

type verifier struct {
	clusters map[string]*cluster
	log      *slog.Logger
}

// cluster has either issuer or api.
type cluster struct {
	Cluster
	name   string
	issuer *kube.Issuer
	api    *kube.Client
	looks  looks
}

// node is what is known of who showed the token.
type node struct {
	kube.Bearer
	ip                   string
	podLabels, nodeLabel map[string]string
}

// Verify implements nodeattest.Verifier.
func (v *verifier) Verify(ctx context.Context, payload []byte, _ nodeattest.Challenger) (nodeattest.Evidence, error) {
	a, err := parseAttestation(payload)
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	c, known := v.clusters[a.Cluster]
	if !known { // A21
		return nodeattest.Evidence{}, fault.New(fault.Denied, "k8s_psat_cluster_unknown", "the server does not know the cluster that the node names").
			Fix("give it in clusters of the server's k8s_psat by the same name")
	}
	// What cannot be good is refused before somebody is asked: strangers send it.
	said, err := kube.Inspect(a.Token, c.audiences())
	if err == nil {
		err = c.allows(said)
	}
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	var n node
	if c.issuer != nil {
		n.Bearer, err = c.issuer.Verify(ctx, a.Token, c.audiences())
	} else {
		n, err = c.look(ctx, a.Token)
	}
	if err == nil {
		err = c.allows(n.Bearer)
	}
	if err != nil {
		return nodeattest.Evidence{}, v.mayTell(ctx, c, err)
	}
	return c.evidence(n)
}

// mayTell keeps from strangers what is between the server and the cluster; it is
// in the log, which strangers cannot fill.
func (v *verifier) mayTell(ctx context.Context, c *cluster, err error) error {
	k := fault.KindOf(err)
	if fault.ReasonOf(err) != "kube_denied" && k != fault.Unavailable {
		return err
	}
	if ctx.Err() == nil && c.looks.mayWarn(time.Now()) {
		v.log.WarnContext(ctx, "agents of a cluster cannot be verified", "kind", Name, "id", c.name, "err", err)
	}
	return fault.New(fault.Unavailable, "k8s_psat_unavailable", "the cluster cannot say now whether the node is one of it").NotBefore(fault.AfterOf(err))
}

func (c *cluster) allows(b kube.Bearer) error {
	if !slices.Contains(c.ServiceAccountAllowList, b.Namespace+":"+b.ServiceAccount) { // A19
		return fault.New(fault.Denied, "k8s_psat_service_account", "the token is of a service account that agents of this cluster do not have").
			Fix("run the agent with another, or add it to service_account_allow_list")
	}
	return nil
}

// look has the API server review a token, and holds the pod and its node, as they
// are now, against what the token says.
func (c *cluster) look(ctx context.Context, token string) (node, error) {
	review, err := c.api.ReviewToken(ctx, token, c.audiences())
	if err != nil {
		return node{}, err
	}
	b, err := review.Bearer(c.audiences())
	if err != nil {
		return node{}, err
	}
	if err := c.allows(b); err != nil { // before names of it are asked for
		return node{}, err
	}
	gone := func(why string) error {
		return fault.New(fault.Denied, "k8s_psat_pod_gone", "the pod that the token was made for is not the agent's: %s", why)
	}
	pod, err := c.api.Pod(ctx, b.Namespace, b.Pod.Name)
	switch {
	case fault.KindOf(err) == fault.NotFound:
		return node{}, gone("it does not exist") // A20
	case err != nil:
		return node{}, err
	case pod.Meta.UID != b.Pod.UID:
		return node{}, gone("another one has its name") // A20
	case pod.Meta.Deleted != nil || pod.Status.Phase == "Succeeded" || pod.Status.Phase == "Failed":
		return node{}, gone("it has ended, or is about to")
	case pod.Spec.ServiceAccount != b.ServiceAccount:
		return node{}, gone("it has another service account")
	case pod.Spec.NodeName == "" || b.Node.Name != "" && b.Node.Name != pod.Spec.NodeName:
		return node{}, gone("it is not on the node that the token names")
	}
	machine, err := c.api.Node(ctx, pod.Spec.NodeName)
	switch {
	case fault.KindOf(err) == fault.NotFound:
		return node{}, gone("its node does not exist")
	case err != nil:
		return node{}, err
	case b.Node.UID != "" && b.Node.UID != machine.Meta.UID:
		return node{}, gone("its node was replaced by another of the same name")
	}
	b.Node = kube.Object{Name: machine.Meta.Name, UID: machine.Meta.UID}
	n := node{Bearer: b, podLabels: pod.Meta.Labels, nodeLabel: machine.Meta.Labels}
	if ip, err := netip.ParseAddr(pod.Status.HostIP); err == nil {
		n.ip = ip.String()
	}
	return n, nil
}

// evidence says what was proved. The holder is what the path names, and not the
// pod: a node's agent comes back in another pod with each update.
func (c *cluster) evidence(n node) (nodeattest.Evidence, error) {
	path := "/" + c.name + "/" + n.Node.UID
	switch {
	case c.UsePodUIDForAgentID:
		path = "/" + c.name + "/pod/" + n.Pod.UID
	case n.Node.UID == "":
		return nodeattest.Evidence{}, fault.New(fault.Denied, "k8s_psat_node_unknown", "the token does not say on which node its pod is").
			Fix("clusters before Kubernetes 1.30 do not tell: set use_pod_uid_for_agent_id, or have the API server asked instead of issuer")
	}
	selectors, err := c.selectors(n)
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	holder := sha256.Sum256([]byte(Name + path))
	return nodeattest.Evidence{Path: path, Selectors: selectors, CanReattest: true, Holder: holder[:]}, nil
}

// selectors are the facts about the node. What stands before the last part of
// each has no colon (R43): labels' keys cannot have one.
func (c *cluster) selectors(n node) ([]entry.Selector, error) {
	var out []entry.Selector
	add := func(name, value string) {
		if value != "" {
			out = append(out, entry.Selector{Type: Name, Value: name + ":" + value})
		}
	}
	add("cluster", c.name)
	add("agent_ns", n.Namespace)
	add("agent_sa", n.ServiceAccount)
	add("agent_pod_name", n.Pod.Name)
	add("agent_pod_uid", n.Pod.UID)
	add("agent_node_ip", n.ip)
	add("agent_node_name", n.Node.Name)
	add("agent_node_uid", n.Node.UID)
	for name, from := range map[string]struct {
		labels map[string]string
		keys   []string
	}{
		"agent_node_label": {n.nodeLabel, c.AllowedNodeLabelKeys}, "agent_pod_label": {n.podLabels, c.AllowedPodLabelKeys},
	} {
		for _, key := range from.keys {
			if value, there := from.labels[key]; there {
				add(name, key+":"+value)
			}
		}
	}
	return entry.NormalizeSelectors(out)
}
