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
// A pod beyond its own is left out: who may make one can make it that large.
const (
	maxPods       = 10_000
	maxPod        = 4 << 20 // in bytes
	maxContainers = 1000    // of a pod
)

// Pods are the pods of a node at one moment.
type Pods struct {
	Began time.Time // of the request; what was so before is in it
	All   []Pod

	tooLarge   map[string]bool // the UIDs of pods that are left out
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
	p := &Pods{Began: began, All: list.Items.pods, tooLarge: list.Items.tooLarge, byUID: map[string]*Pod{}, containers: map[string]string{}}
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
type podItems struct {
	pods     []Pod
	tooLarge map[string]bool
}

// podHead is what is read of a pod that is too large.
type podHead struct {
	Meta struct {
		UID string `json:"uid"`
	} `json:"metadata"`
}

// UnmarshalJSON implements json.Unmarshaler.
func (p *podItems) UnmarshalJSON(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('[') {
		if t == nil && err == nil {
			return nil // null: there are none
		}
		return errors.New("the items are not a list")
	}
	p.tooLarge = map[string]bool{}
	for n := 0; dec.More(); n++ {
		var text json.RawMessage
		if err := dec.Decode(&text); err != nil {
			return err
		}
		if n == maxPods {
			return fmt.Errorf("there are more than %d pods", maxPods)
		}
		if len(text) > maxPod {
			var head podHead
			if err := json.Unmarshal(text, &head); err != nil {
				return err
			}
			p.tooLarge[head.Meta.UID] = true
			continue
		}
		var pod Pod
		if err := json.Unmarshal(text, &pod); err != nil {
			return err
		}
		if len(pod.Status.Containers)+len(pod.Status.Init)+len(pod.Status.Ephemeral) > maxContainers {
			p.tooLarge[pod.Meta.UID] = true
			continue
		}
		p.pods = append(p.pods, pod)
	}
	return nil
}

// Pod returns the pod with this UID, or nil.
func (p *Pods) Pod(uid string) *Pod { return p.byUID[uid] }

// TooLarge reports whether the pod with this UID is listed, and left out.
func (p *Pods) TooLarge(uid string) bool { return p.tooLarge[uid] }

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
