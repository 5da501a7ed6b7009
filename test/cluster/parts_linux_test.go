//go:build kubernetes

package cluster_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/plastron/plastron/test/parts"
)

const (
	serviceNet = "10.0.0.0/24"
	serviceIP  = "10.0.0.1" // of the API server
	podNet     = "10.1.0.0/24"
)

// part is one program of the cluster.
type part struct {
	program string
	args    []string
	files   map[string]string // below Dir, written before
	ready   func(context.Context) error
}

// parts are the cluster's programs in the order in which they start.
func (c *Cluster) parts() []part {
	pki := func(name string) string { return filepath.Join(c.Dir, "pki", name) }
	in := func(name string) string { return filepath.Join(c.Dir, name) }
	admin := pki("admin.conf")
	return []part{
		{program: "etcd", args: []string{"--data-dir", in("etcd"), "--unsafe-no-fsync", "--log-level", "warn", "--listen-client-urls", "http://127.0.0.1:2379",
			"--advertise-client-urls", "http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380"}},
		{program: "kube-apiserver", args: []string{
			"--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", "--secure-port=6443", "--advertise-address=" + nodeIP,
			"--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"), "--client-ca-file=" + pki("ca.crt"),
			"--kubelet-client-certificate=" + pki("admin.crt"), "--kubelet-client-key=" + pki("admin.key"), "--kubelet-certificate-authority=" + pki("ca.crt"),
			"--kubelet-preferred-address-types=InternalIP", "--service-account-issuer=" + Issuer, "--service-account-key-file=" + pki("tokens.key"),
			"--service-account-signing-key-file=" + pki("tokens.key"), "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--service-cluster-ip-range=" + serviceNet, "--allow-privileged",
		}, ready: func(ctx context.Context) error {
			_, err := c.Kubectl(ctx, "", "get", "--raw", "/readyz")
			return err
		}},
		{program: "kube-controller-manager", args: []string{"--kubeconfig=" + admin, "--authentication-kubeconfig=" + admin, "--authorization-kubeconfig=" + admin,
			"--service-account-private-key-file=" + pki("tokens.key"), "--root-ca-file=" + pki("ca.crt"), "--use-service-account-credentials", "--leader-elect=false",
			"--bind-address=127.0.0.1", "--service-cluster-ip-range=" + serviceNet}},
		{program: "kube-scheduler", args: []string{"--kubeconfig=" + admin, "--authentication-kubeconfig=" + admin, "--authorization-kubeconfig=" + admin,
			"--leader-elect=false", "--bind-address=127.0.0.1"}},
		{program: "containerd", args: []string{"--config", in("containerd.toml")}, files: map[string]string{
			"containerd.toml": containerdConfig(in("cni")),
			"cni/pods.conflist": `{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,
				"ipam":{"type":"host-local","ranges":[[{"subnet":"` + podNet + `"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}`,
		}, ready: func(ctx context.Context) error {
			image := in("busybox.tar")
			if err := busyboxArchive(image); err != nil {
				return err
			}
			return c.Import(ctx, image)
		}},
		{program: "kubelet", args: []string{"--config=" + in("kubelet.yaml"), "--kubeconfig=" + pki("kubelet.conf"), "--hostname-override=" + NodeName,
			"--node-ip=" + nodeIP}, files: map[string]string{"kubelet.yaml": kubeletConfig(pki)}},
		{program: "kube-proxy", args: []string{"--kubeconfig=" + admin, "--hostname-override=" + NodeName, "--proxy-mode=nftables", "--cluster-cidr=" + podNet,
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0"}},
	}
}

func containerdConfig(cni string) string {
	return `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "` + cni + `"
`
}

// kubeletConfig lets in who has a certificate or token of the cluster and is
// granted what he asks for, as clusters do. The port without either is for tests.
func kubeletConfig(pki func(string) string) string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true, cacheTTL: 1s}, x509: {clientCAFile: %q}}
authorization: {mode: Webhook, webhook: {cacheAuthorizedTTL: 1s, cacheUnauthorizedTTL: 1s}}
tlsCertFile: %q
tlsPrivateKeyFile: %q
readOnlyPort: 10255
clusterDNS: [%q]
clusterDomain: cluster.local
resolvConf: ""
enforceNodeAllocatable: []
evictionHard: {memory.available: 100Mi, nodefs.available: 1%%, imagefs.available: 1%%, nodefs.inodesFree: 1%%}
failSwapOn: false
imageGCHighThresholdPercent: 100 # of a disk that is not ours alone
imageGCLowThresholdPercent: 99
syncFrequency: 10s
`, pki("ca.crt"), pki("kubelet-serving.crt"), pki("kubelet-serving.key"), nodeIP)
}

// start starts a part and waits until it is ready. Its log is PROGRAM.log.
func (c *Cluster) start(ctx context.Context, p part) error {
	for name, text := range p.files {
		path := filepath.Join(c.Dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	log := filepath.Join(c.Dir, p.program+".log")
	args := append([]string{"-c", `exec "$@" >>"$0" 2>&1`, log, c.program(p.program)}, p.args...)
	process, err := parts.StartProgram(c.Command(context.WithoutCancel(ctx), "/bin/sh", args...))
	if err != nil {
		return err
	}
	if p.ready == nil {
		return nil
	}
	return c.Until(ctx, p.program+" is ready", func() error {
		select {
		case <-process.Done():
			return fmt.Errorf("%s has ended", p.program)
		default:
			return p.ready(ctx)
		}
	})
}
