// Package kubeapi is a Kubernetes API server for tests, as strict as the real one
// where attestation depends on it. It listens on loopback with TLS, knows a caller
// by a client certificate or a service-account token, lets nobody do what was not
// granted (RBAC), mints and reviews RS256 service-account tokens, and answers with
// the objects that the test has made:
//
//	api := kubeapi.New(t)
//	node := api.AddNode("node-1", map[string]string{"zone": "a"})
//	agent := api.AddPod(kubeapi.Pod{Namespace: "spire", Name: "agent-x", ServiceAccount: "spire-agent", Node: "node-1"})
//	token := api.Token(agent, kubeapi.TokenOptions{Audience: "spire-server"})
//
//	// A kubeconfig for a caller who may do what k8s_psat needs, and nothing else.
//	api.Grant("plastron", kubeapi.Rule{Groups: []string{""}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get"}},
//		kubeapi.Rule{Groups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}})
//	client, err := kube.ClientConfig{Kubeconfig: api.Kubeconfig("plastron")}.Open()
//
// What it has: TokenReview; get of pods, nodes and namespaces; get, create and
// merge patch of ConfigMaps; version, discovery and keys of the token issuer.
// Anything else is 404. It knows no lists, no watches and no other patches.
package kubeapi

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/plastron/plastron/internal/kube"
)

// Audience is the API server's own: tokens for it open its API.
const Audience = "https://kubernetes.default.svc.cluster.local"

// Server is one cluster's API server.
type Server struct {
	URL    string // https://127.0.0.1:PORT
	CAPEM  []byte // that its certificate and those of callers are from
	Issuer string // iss of its tokens; by default the URL

	t      testing.TB
	ca     *x509.Certificate
	caKey  *ecdsa.PrivateKey
	server *httptest.Server

	mu         sync.Mutex // guards all below
	keys       []*rsa.PrivateKey
	version    int // resourceVersion of what was written last
	namespaces map[string]kube.Meta
	accounts   map[[2]string]string // namespace and name to UID
	pods       map[[2]string]*kube.Pod
	nodes      map[string]*kube.Node
	configMaps map[[2]string]*kube.ConfigMap
	grants     map[string][]Rule
	calls      map[string]int
	intercept  func(http.ResponseWriter, *http.Request) bool
}

// Rule is a PolicyRule of RBAC, in a namespace or, if that is empty, in the whole
// cluster. "*" stands for all; no names mean all names.
type Rule struct {
	Namespace string   `json:"-"`
	Verbs     []string `json:"verbs"`
	Groups    []string `json:"apiGroups"`
	Resources []string `json:"resources"`
	Names     []string `json:"resourceNames"`
	URLs      []string `json:"nonResourceURLs"`
}

// New starts an API server that ends with the test. It has a namespace "default".
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{
		t: t, version: 1, namespaces: map[string]kube.Meta{}, accounts: map[[2]string]string{}, pods: map[[2]string]*kube.Pod{},
		nodes: map[string]*kube.Node{}, configMaps: map[[2]string]*kube.ConfigMap{}, grants: map[string][]Rule{}, calls: map[string]int{},
	}
	s.caKey = ecdsaKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes " + uuid.NewString()}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, s.caKey.Public(), s.caKey)
	if err != nil {
		t.Fatal(err)
	}
	if s.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	s.CAPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	s.AddNamespace("default")

	clients := x509.NewCertPool()
	clients.AddCert(s.ca)
	cert, key := s.certificate(pkix.Name{CommonName: "kube-apiserver"}, x509.ExtKeyUsageServerAuth)
	s.server = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	s.server.TLS = &tls.Config{
		MinVersion: tls.VersionTLS12, ClientCAs: clients, ClientAuth: tls.VerifyClientCertIfGiven,
		Certificates: []tls.Certificate{pair(t, cert, key)},
	}
	s.server.Config.ErrorLog = quiet()
	s.server.StartTLS()
	t.Cleanup(func() {
		s.server.CloseClientConnections()
		s.server.Close()
	})
	s.URL = s.server.URL
	s.Issuer = s.URL
	return s
}

// Close stops the server before the test ends, as if the cluster were away.
func (s *Server) Close() {
	s.server.CloseClientConnections()
	s.server.Close()
}

// Grant lets a user do something. Users of certificates are as their certificate
// says, those of tokens system:serviceaccount:NAMESPACE:NAME; nobody at all is
// system:anonymous. A caller has what its groups are granted too.
func (s *Server) Grant(userOrGroup string, rules ...Rule) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.grants[userOrGroup] = append(s.grants[userOrGroup], rules...)
}

// Revoke takes everything from a user.
func (s *Server) Revoke(userOrGroup string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.grants, userOrGroup)
}

// Intercept has f see each call before anything else; if f returns true it has
// answered. nil ends that. It is how a test lets the API hang, fail or lie.
func (s *Server) Intercept(f func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.intercept = f
}

// Calls says how often something was asked for and answered or refused, such as
// "get pods" or "create tokenreviews".
func (s *Server) Calls(what string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[what]
}

// AddNamespace makes a namespace, with a service account default.
func (s *Server) AddNamespace(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, there := s.namespaces[name]; !there {
		s.namespaces[name] = kube.Meta{Name: name, UID: uuid.NewString(), Labels: map[string]string{"kubernetes.io/metadata.name": name}}
		s.accounts[[2]string{name, "default"}] = uuid.NewString()
	}
}

// Pod is what a pod is made from. The service account and the namespace are made too.
type Pod struct {
	Namespace, Name string // default: "default"
	ServiceAccount  string // default: "default"
	Node            string // must be there
	Labels          map[string]string
	Containers      []string
}

// AddPod makes a running pod. A pod of that name that was there before is gone.
func (s *Server) AddPod(p Pod) kube.Pod {
	s.t.Helper()
	if p.Namespace == "" {
		p.Namespace = "default"
	}
	if p.ServiceAccount == "" {
		p.ServiceAccount = "default"
	}
	s.AddNamespace(p.Namespace)
	s.mu.Lock()
	defer s.mu.Unlock()
	node, there := s.nodes[p.Node]
	if !there {
		s.t.Fatalf("kubeapi: there is no node %q", p.Node)
	}
	if account := [2]string{p.Namespace, p.ServiceAccount}; s.accounts[account] == "" {
		s.accounts[account] = uuid.NewString()
	}
	pod := &kube.Pod{
		Meta:   kube.Meta{Name: p.Name, Namespace: p.Namespace, UID: uuid.NewString(), Labels: maps.Clone(p.Labels)},
		Spec:   kube.PodSpec{NodeName: p.Node, ServiceAccount: p.ServiceAccount},
		Status: kube.PodStatus{Phase: "Running"},
	}
	for _, a := range node.Status.Addresses {
		if a.Type == "InternalIP" {
			pod.Status.HostIP = a.Address
		}
	}
	for _, name := range p.Containers {
		pod.Spec.Containers = append(pod.Spec.Containers, kube.ContainerSpec{Name: name, Image: "example.org/" + name})
	}
	s.pods[[2]string{p.Namespace, p.Name}] = pod
	return clone(*pod)
}

// ChangePod lets f change a pod as it is stored.
func (s *Server) ChangePod(namespace, name string, f func(*kube.Pod)) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	pod, there := s.pods[[2]string{namespace, name}]
	if !there {
		s.t.Fatalf("kubeapi: there is no pod %s/%s", namespace, name)
	}
	f(pod)
}

// DeletePod removes a pod at once.
func (s *Server) DeletePod(namespace, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pods, [2]string{namespace, name})
}

// AddNode makes a node with its own address. A node of that name that was there
// before is gone; its pods stay, as in a cluster whose node was made anew.
func (s *Server) AddNode(name string, labels map[string]string) kube.Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	node := &kube.Node{Meta: kube.Meta{Name: name, UID: uuid.NewString(), Labels: maps.Clone(labels)}}
	n := len(s.nodes) + 1
	node.Status.Addresses = []kube.Address{{Type: "InternalIP", Address: fmt.Sprintf("10.0.%d.%d", n/250, n%250+1)}, {Type: "Hostname", Address: name}}
	s.nodes[name] = node
	return clone(*node)
}

// ChangeNode lets f change a node as it is stored.
func (s *Server) ChangeNode(name string, f func(*kube.Node)) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	node, there := s.nodes[name]
	if !there {
		s.t.Fatalf("kubeapi: there is no node %q", name)
	}
	f(node)
}

// DeleteNode removes a node.
func (s *Server) DeleteNode(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.nodes, name)
}

// PutConfigMap makes or replaces a ConfigMap.
func (s *Server) PutConfigMap(namespace, name string, data map[string]string) {
	s.AddNamespace(namespace)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.configMaps[[2]string{namespace, name}] = &kube.ConfigMap{
		Meta: kube.ConfigMapMeta{Meta: kube.Meta{Name: name, Namespace: namespace, UID: uuid.NewString()}, Version: strconv.Itoa(s.version)}, Data: maps.Clone(data),
	}
}

// DeleteConfigMap removes a ConfigMap.
func (s *Server) DeleteConfigMap(namespace, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.configMaps, [2]string{namespace, name})
}

// ConfigMap returns the data of a ConfigMap, or nil.
func (s *Server) ConfigMap(namespace, name string) map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.configMaps[[2]string{namespace, name}]
	if m == nil {
		return nil
	}
	return maps.Clone(m.Data)
}

// Kubeconfig writes a kubeconfig for a user with a client certificate, in a
// directory of the test, and returns its path.
func (s *Server) Kubeconfig(user string, groups ...string) string {
	s.t.Helper()
	cert, key := s.certificate(pkix.Name{CommonName: user, Organization: groups}, x509.ExtKeyUsageClientAuth)
	return s.WriteKubeconfig(map[string]any{
		"client-certificate-data": base64.StdEncoding.EncodeToString(cert), "client-key-data": base64.StdEncoding.EncodeToString(key),
	})
}

// WriteKubeconfig writes a kubeconfig whose user has these members.
func (s *Server) WriteKubeconfig(user map[string]any) string {
	s.t.Helper()
	type object = map[string]any
	data, err := json.Marshal(object{
		"apiVersion": "v1", "kind": "Config", "current-context": "it",
		"clusters": []any{object{"name": "cluster", "cluster": object{"server": s.URL, "certificate-authority-data": base64.StdEncoding.EncodeToString(s.CAPEM)}}},
		"users":    []any{object{"name": "user", "user": user}},
		"contexts": []any{object{"name": "it", "context": object{"cluster": "cluster", "user": "user"}}},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	path := filepath.Join(s.t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// ServiceAccountDir writes what a container of the pod finds below
// /var/run/secrets/kubernetes.io/serviceaccount, and returns the directory.
func (s *Server) ServiceAccountDir(pod kube.Pod) string {
	s.t.Helper()
	dir := s.t.TempDir()
	for name, data := range map[string]string{
		"token": s.Token(pod, TokenOptions{Audience: Audience}), "ca.crt": string(s.CAPEM), "namespace": pod.Meta.Namespace,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	return dir
}

// Port is the port of the URL, for KUBERNETES_SERVICE_PORT.
func (s *Server) Port() string { return strconv.Itoa(s.server.Listener.Addr().(*net.TCPAddr).Port) }

func (s *Server) certificate(subject pkix.Name, use x509.ExtKeyUsage) (cert, key []byte) {
	s.t.Helper()
	private := ecdsaKey(s.t)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		s.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: subject, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{use},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"kubernetes.default.svc"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, s.ca, private.Public(), s.caKey)
	if err != nil {
		s.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		s.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

func pair(t testing.TB, cert, key []byte) tls.Certificate {
	p, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func ecdsaKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// clone copies all the way down.
func clone[T any](v T) T {
	data, err := json.Marshal(v)
	var out T
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	if err != nil {
		panic(err)
	}
	return out
}
