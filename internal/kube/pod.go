package kube

import "time"

// Meta is what every object of Kubernetes carries (ObjectMeta).
type Meta struct {
	Name      string            `json:"name"`
	Namespace string            `json:"namespace"`
	UID       string            `json:"uid"`
	Labels    map[string]string `json:"labels"`
	Owners    []Owner           `json:"ownerReferences"`
	// Deleted is when the object was asked to go; nil while nobody has.
	Deleted *time.Time `json:"deletionTimestamp"`
}

// Owner is an object that this one belongs to, such as a ReplicaSet.
type Owner struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Name       string `json:"name"`
	UID        string `json:"uid"`
	Controller bool   `json:"controller"`
}

// Pod is a pod as the API server and the kubelet show it; fields that nothing
// here reads are left out.
type Pod struct {
	Meta   Meta      `json:"metadata"`
	Spec   PodSpec   `json:"spec"`
	Status PodStatus `json:"status"`
}

// PodSpec is what was asked for.
type PodSpec struct {
	NodeName       string          `json:"nodeName"`
	ServiceAccount string          `json:"serviceAccountName"`
	Containers     []ContainerSpec `json:"containers"`
	Init           []ContainerSpec `json:"initContainers"`
}

// ContainerSpec names a container and the image that was asked for.
type ContainerSpec struct {
	Name  string `json:"name"`
	Image string `json:"image"`
}

// PodStatus is what came of it.
type PodStatus struct {
	// Phase is Pending, Running, Succeeded, Failed or Unknown.
	Phase      string            `json:"phase"`
	Reason     string            `json:"reason"`
	HostIP     string            `json:"hostIP"`
	Containers []ContainerStatus `json:"containerStatuses"`
	Init       []ContainerStatus `json:"initContainerStatuses"`
	Ephemeral  []ContainerStatus `json:"ephemeralContainerStatuses"`
}

// ContainerStatus is a container as the runtime made it. ID is
// "containerd://HEX", empty before it runs; ImageID is the image by digest.
type ContainerStatus struct {
	Name    string `json:"name"`
	Image   string `json:"image"`
	ImageID string `json:"imageID"`
	ID      string `json:"containerID"`
}

// Node is a machine of a cluster.
type Node struct {
	Meta   Meta `json:"metadata"`
	Status struct {
		Addresses []Address `json:"addresses"`
	} `json:"status"`
}

// Address is one address of a node; Type is InternalIP, Hostname and others.
type Address struct {
	Type    string `json:"type"`
	Address string `json:"address"`
}
