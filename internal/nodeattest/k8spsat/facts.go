package k8spsat

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
	"github.com/plastron/plastron/internal/nodeattest"
)

const (
	maxLooks  = 16        // at pods of one cluster at a time; attesting goes on beside them
	maxLabels = 512       // of a pod that count
	maxSaid   = 128 << 10 // bytes of all selectors of a pod
	maxNodes  = 10_000    // of one cluster that are remembered
	turnWait  = 3 * time.Second
	lookWait  = 3 * time.Second
	nodeLife  = time.Minute // for which a node of a name is taken for the same
	warnEvery = 10 * time.Second
)

// looks is what a cluster needs to look at pods.
type looks struct {
	slots      chan struct{}
	turn, wait time.Duration // turnWait and lookWait; longer in tests

	mu     sync.Mutex // guards everything below
	nodes  map[string]seenNode
	warned time.Time
}

type seenNode struct {
	uid string
	at  time.Time
}

// Checks implements nodeattest.FactChecker. Without an API server there is nobody
// who could say what runs where.
func (v *verifier) Checks(fact string) bool {
	for _, c := range v.clusters {
		if c.api != nil {
			return entry.Verifiable(fact)
		}
	}
	return false
}

// Look implements nodeattest.FactChecker: it asks for the pod by its name.
func (v *verifier) Look(ctx context.Context, node []entry.Selector, facts map[string]string) (nodeattest.Seen, error) {
	of := func(name string) string {
		i := slices.IndexFunc(node, func(s entry.Selector) bool { return s.Type == Name && strings.HasPrefix(s.Value, name+":") })
		if i < 0 {
			return ""
		}
		return node[i].Value[len(name)+1:]
	}
	c, machine := v.clusters[of("cluster")], kube.Object{Name: of("agent_node_name"), UID: of("agent_node_uid")}
	switch {
	case c == nil || c.api == nil:
		return nodeattest.Seen{}, fault.New(fault.Precondition, "rule_facts_unverifiable", "this server does not ask the API server of the cluster %q", of("cluster")).
			Fix("give the cluster to the server's k8s_psat without issuer, or set the rule's trust to %q", entry.TrustAgent)
	case machine.Name == "" || machine.UID == "":
		return nodeattest.Seen{}, fault.New(fault.Precondition, "rule_facts_unverifiable", "when the agent attested, its token did not tell on which node of the cluster %q it is", c.name).
			Fix("let it attest again, now that the API server is asked, or set the rule's trust to %q", entry.TrustAgent)
	}
	turn, cancel := context.WithTimeout(ctx, c.looks.turn)
	defer cancel()
	select {
	case c.looks.slots <- struct{}{}:
		defer func() { <-c.looks.slots }()
	case <-turn.Done():
		return nodeattest.Seen{}, fault.New(fault.Unavailable, "k8s_psat_unavailable", "many pods of the cluster are looked at").Because(turn.Err())
	}
	ctx, cancel = context.WithTimeout(ctx, c.looks.wait) // from here on, however long the turn took
	defer cancel()
	seen, err := c.pod(ctx, machine, facts)
	if err == nil || fault.KindOf(err) == fault.Denied && fault.ReasonOf(err) != "kube_denied" {
		return seen, err
	}
	if c.looks.mayWarn(time.Now()) {
		v.log.WarnContext(ctx, "pods of a cluster cannot be verified", "kind", Name, "id", c.name, "err", err)
	}
	return nodeattest.Seen{}, fault.New(fault.Unavailable, "k8s_psat_unavailable", "the cluster's API server gives no answer that counts").Because(err)
}

func (l *looks) mayWarn(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.warned) < warnEvery {
		return false
	}
	l.warned = now
	return true
}

// pod says what is true of a pod that runs on a node. A pod's status counts for
// little: it is the node that writes it. Its name, labels, owners, service account
// and node are not for the node to change.
func (c *cluster) pod(ctx context.Context, machine kube.Object, facts map[string]string) (nodeattest.Seen, error) {
	no := func(reason, why string) (nodeattest.Seen, error) {
		return nodeattest.Seen{}, fault.New(fault.Denied, reason, "the pod that the agent names %s", why).
			Fix("see what 'plastron agent why' says of the process; an agent that goes on naming it may be compromised")
	}
	p, err := c.api.Pod(ctx, facts[entry.FactNamespace], facts[entry.FactPod])
	ending := err == nil && p.Meta.Deleted != nil
	switch {
	case fault.KindOf(err) == fault.NotFound || fault.KindOf(err) == fault.Invalid:
		return no("k8s_pod_unknown", "does not exist in its cluster")
	case err != nil:
		return nodeattest.Seen{}, err
	case p.Spec.ServiceAccount == "":
		// A pod that a node has made by itself (a mirror of a static one, which has a UID
		// of its own), with any name, namespace and labels that it liked. Only of a
		// service account it can have none.
		return nodeattest.Seen{}, fault.New(fault.Denied, "k8s_pod_static", "the pod that the agent names has no service account, as pods that nodes make by themselves").
			Fix("run it as a DaemonSet, or give it its identity by an entry or by a rule with trust %q", entry.TrustAgent)
	case p.Meta.UID != facts[entry.FactPodUID]:
		return no("k8s_pod_replaced", "is not the one that has its name now")
	case p.Spec.NodeName != machine.Name:
		return no("k8s_pod_elsewhere", "is not on its node")
	case p.Status.Phase == "Succeeded" || p.Status.Phase == "Failed" || ending && !time.Now().Before(*p.Meta.Deleted):
		return no("k8s_pod_ended", "has ended")
	}
	uid, err := c.nodeUID(ctx, machine.Name)
	switch {
	case fault.KindOf(err) == fault.NotFound || err == nil && uid != machine.UID:
		return no("k8s_pod_elsewhere", "is on another node of the same name")
	case err != nil:
		return nodeattest.Seen{}, err
	}
	seen := nodeattest.Seen{Facts: map[string]string{
		entry.FactNamespace: p.Meta.Namespace, entry.FactPod: p.Meta.Name, entry.FactPodUID: p.Meta.UID,
		"k8s.sa": p.Spec.ServiceAccount, "k8s.node": p.Spec.NodeName,
	}}
	if ending { // it may go on for as long as it was given
		seen.Until = *p.Meta.Deleted
	}
	room := maxSaid
	add := func(kind string, value ...string) {
		text := kind + ":" + strings.Join(value, ":")
		if room -= len(text); room >= 0 && !strings.Contains(value[0], ":") { // no such key of a label or kind of an owner exists (R43)
			seen.Selectors = append(seen.Selectors, entry.Selector{Type: "k8s", Value: text})
		}
	}
	add("ns", p.Meta.Namespace)
	add("sa", p.Spec.ServiceAccount)
	add("node-name", p.Spec.NodeName)
	add("pod-name", p.Meta.Name)
	add("pod-uid", p.Meta.UID)
	for i, key := range slices.Sorted(maps.Keys(p.Meta.Labels)) {
		if i < maxLabels {
			add("pod-label", key, p.Meta.Labels[key])
		}
	}
	for _, o := range p.Meta.Owners {
		add("pod-owner", o.Kind, o.Name)
		add("pod-owner-uid", o.Kind, o.UID)
	}
	slices.SortFunc(seen.Selectors, entry.Selector.Compare)
	return seen, nil
}

// nodeUID returns the UID of the node that has a name, as it was a moment ago.
func (c *cluster) nodeUID(ctx context.Context, name string) (string, error) {
	l := &c.looks
	now := time.Now()
	l.mu.Lock()
	known := l.nodes[name]
	l.mu.Unlock()
	if age := now.Sub(known.at); age >= 0 && age < nodeLife {
		return known.uid, nil
	}
	n, err := c.api.Node(ctx, name)
	if err != nil {
		return "", err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nodes == nil || len(l.nodes) >= maxNodes {
		l.nodes = map[string]seenNode{}
	}
	l.nodes[name] = seenNode{n.Meta.UID, now}
	return n.Meta.UID, nil
}
