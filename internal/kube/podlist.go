package kube

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"
)

// Bounds of a list of pods beside its size: small JSON may stand for much memory.
const (
	maxPods       = 10_000
	maxPod        = 4 << 20 // in bytes; an object in etcd is smaller
	maxContainers = 1000    // of a pod
)

// Pods are the pods of a node at one moment.
type Pods struct {
	Began time.Time // of the request; what was so before is in it
	All   []Pod

	byUID      map[string]*Pod
	containers map[string]string // the UID of the pod of each container that has been started
}

// parsePods reads the kubelet's answer. Pods and containers are told apart by
// what Kubernetes makes unique; if the kubelet shows one twice, none of them counts.
func parsePods(data []byte, began time.Time) (*Pods, error) {
	var list struct {
		APIVersion string   `json:"apiVersion"`
		Kind       string   `json:"kind"`
		Items      podItems `json:"items"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, unexpectedKubelet("its answer cannot be read: %w", err)
	}
	if list.Kind != "PodList" || list.APIVersion != "v1" {
		return nil, unexpectedKubelet("its answer is not a PodList of v1")
	}
	p := &Pods{Began: began, All: list.Items, byUID: map[string]*Pod{}, containers: map[string]string{}}
	for i := range p.All {
		pod := &p.All[i]
		uid := pod.Meta.UID
		if _, twice := p.byUID[uid]; twice {
			pod = nil
		}
		p.byUID[uid] = pod
		for c := range p.All[i].Status.all() {
			if id := c.bareID(); id != "" {
				owner := uid
				if other, known := p.containers[id]; known && other != uid {
					owner = ""
				}
				p.containers[id] = owner
			}
		}
	}
	return p, nil
}

// podItems reads one pod at a time, so that none costs more than its bounds.
type podItems []Pod

// UnmarshalJSON implements json.Unmarshaler.
func (p *podItems) UnmarshalJSON(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('[') {
		if t == nil && err == nil {
			return nil // null: there are none
		}
		return errors.New("the items are not a list")
	}
	for dec.More() {
		var text json.RawMessage
		if err := dec.Decode(&text); err != nil {
			return err
		}
		var pod Pod
		if len(*p) == maxPods || len(text) > maxPod {
			return fmt.Errorf("there are more than %d pods, or one is larger than %d MiB", maxPods, maxPod>>20)
		}
		if err := json.Unmarshal(text, &pod); err != nil {
			return err
		}
		if len(pod.Status.Containers)+len(pod.Status.Init)+len(pod.Status.Ephemeral) > maxContainers {
			return fmt.Errorf("a pod has more than %d containers", maxContainers)
		}
		*p = append(*p, pod)
	}
	return nil
}

// Pod returns the pod with this UID, or nil.
func (p *Pods) Pod(uid string) *Pod { return p.byUID[uid] }

// PodOf returns the UID of the pod that a container belongs to; known is whether
// there is one. It is empty if several pods claim the container.
func (p *Pods) PodOf(container string) (uid string, known bool) {
	uid, known = p.containers[container]
	return uid, known
}

// Container returns the container with this ID, or nil.
func (p *Pod) Container(id string) *ContainerStatus {
	for c := range p.Status.all() {
		if c.bareID() == id && id != "" {
			return c
		}
	}
	return nil
}

func (s *PodStatus) all() iter.Seq[*ContainerStatus] {
	return func(yield func(*ContainerStatus) bool) {
		for _, list := range [][]ContainerStatus{s.Containers, s.Init, s.Ephemeral} {
			for i := range list {
				if !yield(&list[i]) {
					return
				}
			}
		}
	}
}

// bareID is the ID without the runtime's name, "containerd://".
func (c *ContainerStatus) bareID() string {
	_, id, _ := strings.Cut(c.ID, "://")
	return id
}
