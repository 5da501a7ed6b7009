// Package kube speaks to Kubernetes: to an API server and to a node's kubelet, for
// the few questions that attestation asks. It believes an answer only over a
// verified connection, up to a stated size, and keeps no copy of the cluster.
package kube
