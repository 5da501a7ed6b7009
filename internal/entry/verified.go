package entry

import (
	"slices"
	"strings"
)

// Facts that tell which pod a process runs in. With whatever fact of a pod a
// template names, an agent states these, so that a server can look at that pod.
const (
	FactNamespace = "k8s.ns"
	FactPod       = "k8s.pod"
	FactPodUID    = "k8s.pod_uid"
)

// maxNamed is how long a fact may be that tells which thing is meant: no object of
// Kubernetes has a longer name.
const maxNamed = 253

// Verifiable reports whether a server can find out a fact by itself, if it may ask
// the platform. It is what a node cannot change of a pod: which container of the
// pod a process is in, for example, only its node knows.
func Verifiable(fact string) bool {
	switch fact {
	case FactNamespace, FactPod, FactPodUID, "k8s.sa", "k8s.node":
		return true
	}
	return false
}

// Verifiable reports the same of what a selector states. Images are left out: what
// the API server knows of those that run is what the node has told it.
func (s Selector) Verifiable() bool {
	kind, _, _ := strings.Cut(s.Value, ":")
	if s.Type != "k8s" {
		return false
	}
	switch kind {
	case "ns", "sa", "node-name", "pod-name", "pod-uid", "pod-label", "pod-owner", "pod-owner-uid":
		return true
	}
	return false
}

// stated returns the facts that an agent states for a template that names these:
// them, and what tells which thing they are true of; sorted.
func stated(facts []string) []string {
	if !slices.ContainsFunc(facts, func(name string) bool { return strings.HasPrefix(name, "k8s.") }) {
		return facts
	}
	all := append([]string{FactNamespace, FactPod, FactPodUID}, facts...)
	slices.Sort(all)
	return slices.Compact(all)
}

// notAName says why a value cannot tell which thing is meant; empty: it can.
func notAName(value string) string {
	if len(value) > maxNamed {
		return "it is too long for a name"
	}
	return notInSegment(segment{}, value)
}
