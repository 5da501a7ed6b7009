// Package kubelet is a kubelet as far as it tells which pods run on its node:
// GET /pods on a secure and on a read-only port. It refuses what a real one
// refuses, with the same status and text, and counts what it is asked.
package kubelet

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Pod is a pod of the node. A container without ID has not started.
type Pod struct {
	Namespace, Name, UID, ServiceAccount string
	Labels                               map[string]string
	Owners                               []Owner
	Containers, Init, Ephemeral          []Container
}

// Owner is what a pod belongs to.
type Owner struct{ Kind, Name, UID string }

// Container is a container of a pod. ImageID is the image by digest, ID 64 hexadecimal digits.
type Container struct{ Name, Image, ImageID, ID string }

// Kubelet is a running fake. Its methods may be called concurrently.
type Kubelet struct {
	Node string // the node's name
	// Where callers find its CA, its own certificate, and credentials that it lets
	// in: a token, or a client certificate and key.
	CAPath, ServingPath, TokenPath, CertificatePath, KeyPath string

	t                testing.TB
	secure, readOnly string // addresses
	config           *tls.Config

	mu        sync.Mutex // guards everything below
	pods      map[string]Pod
	tokens    map[string]bool // known; true: it may see the node's pods
	anonymous bool
	requests  int
	waiting   chan struct{} // not nil: answers wait until it is closed
	answer    http.HandlerFunc
	dead      bool
	conns     map[net.Conn]bool // that are open
}

// New starts a kubelet. It stops with the test.
func New(t testing.TB) *Kubelet {
	t.Helper()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	k := &Kubelet{t: t, Node: "node-1", pods: map[string]Pod{}, tokens: map[string]bool{}, conns: map[net.Conn]bool{},
		CAPath: at("ca.pem"), ServingPath: at("kubelet.pem"), TokenPath: at("token"), CertificatePath: at("client.pem"), KeyPath: at("client-key.pem")}
	ca := newAuthority(t)
	pair, pool := ca.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: host}, DNSNames: []string{host, k.Node, "localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}), x509.NewCertPool()
	pool.AddCert(ca.certificate)
	k.config = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool}
	client := ca.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "agent", Organization: []string{"system:masters"}}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	key, err := x509.MarshalPKCS8PrivateKey(client.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	k.write(k.CAPath, "CERTIFICATE", ca.certificate.Raw)
	k.write(k.ServingPath, "CERTIFICATE", pair.Certificate[0])
	k.write(k.CertificatePath, "CERTIFICATE", client.Certificate[0])
	k.write(k.KeyPath, "PRIVATE KEY", key)
	k.Rotate("first")
	secure, readOnly := k.listen(), k.listen()
	k.secure, k.readOnly = secure.Addr().String(), readOnly.Addr().String()
	k.serving(tls.NewListener(secure, k.config), k.serveSecure)
	k.serving(readOnly, k.serve)
	return k
}

// door is a port that the kubelet keeps while it is dead, or somebody else might
// get it: who knocks is sent away at once.
type door struct {
	net.Listener
	k *Kubelet
}

func (k *Kubelet) listen() net.Listener {
	k.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		k.t.Fatal(err)
	}
	return &door{l, k}
}

// Accept implements net.Listener.
func (d *door) Accept() (net.Conn, error) {
	for {
		c, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		d.k.mu.Lock()
		dead := d.k.dead
		if !dead {
			d.k.conns[c] = true
		}
		d.k.mu.Unlock()
		if !dead {
			return guest{c, d.k}, nil
		}
		reset(c)
	}
}

// guest is a connection of the living kubelet.
type guest struct {
	net.Conn
	k *Kubelet
}

// Close implements net.Conn.
func (g guest) Close() error {
	g.k.mu.Lock()
	delete(g.k.conns, g.Conn)
	g.k.mu.Unlock()
	return g.Conn.Close()
}

func reset(c net.Conn) {
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

func (k *Kubelet) serving(l net.Listener, h http.HandlerFunc) {
	s := &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
	go s.Serve(l)
	k.t.Cleanup(func() { s.Close() })
}

// Rotate makes another token the one that is let in, and writes it to TokenPath.
func (k *Kubelet) Rotate(token string) {
	k.t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.tokens)
	k.tokens[token] = true
	if err := os.WriteFile(k.TokenPath, []byte(token), 0o600); err != nil {
		k.t.Fatal(err)
	}
}

// Know makes a token known, of somebody who may not see the node's pods.
func (k *Kubelet) Know(token string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tokens[token] = false
}

// AllowAnonymous lets in who shows no credentials.
func (k *Kubelet) AllowAnonymous() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.anonymous = true
}

// Put adds pods, or replaces them.
func (k *Kubelet) Put(pods ...Pod) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range pods {
		k.pods[p.UID] = p
	}
}

// Remove forgets a pod.
func (k *Kubelet) Remove(uid string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.pods, uid)
}

// Requests returns how many requests for pods came, refused ones included.
func (k *Kubelet) Requests() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.requests
}

// Hold lets answers wait until the returned function is called. A waiting request
// counts, and gets what is true when the answer leaves.
func (k *Kubelet) Hold() (release func()) {
	wait := make(chan struct{})
	k.mu.Lock()
	defer k.mu.Unlock()
	k.waiting = wait
	return sync.OnceFunc(func() {
		k.mu.Lock()
		k.waiting = nil
		k.mu.Unlock()
		close(wait)
	})
}

// Answer replaces what is answered to those who are let in; nil: the pods.
func (k *Kubelet) Answer(with http.HandlerFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.answer = with
}

// SecurePort and ReadOnlyPort say where on 127.0.0.1 the kubelet listens.
func (k *Kubelet) SecurePort() int { return port(k.secure) }

// ReadOnlyPort is the port without TLS and without questions.
func (k *Kubelet) ReadOnlyPort() int { return port(k.readOnly) }

func port(address string) (n int) {
	_, text, _ := net.SplitHostPort(address)
	fmt.Sscan(text, &n)
	return n
}

// Kill breaks all connections, and each that comes.
func (k *Kubelet) Kill() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dead = true
	for c := range k.conns {
		reset(c)
	}
	clear(k.conns)
}

// Revive answers again, on the same ports.
func (k *Kubelet) Revive() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dead = false
}

// serveSecure authenticates and authorizes the way a kubelet does: a client
// certificate counts first, then a token; nodes/proxy is what /pods needs.
func (k *Kubelet) serveSecure(w http.ResponseWriter, r *http.Request) {
	user, may := "system:anonymous", false
	token, bears := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	k.mu.Lock()
	granted, known := k.tokens[token]
	anonymous := k.anonymous
	k.mu.Unlock()
	switch {
	case len(r.TLS.PeerCertificates) > 0:
		user, may = r.TLS.PeerCertificates[0].Subject.CommonName, true
	case bears && known:
		user, may = "system:serviceaccount:plastron:agent", granted
	case bears, !anonymous:
		k.count()
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
		return
	default:
		may = true
	}
	if !may {
		k.count()
		http.Error(w, fmt.Sprintf("Forbidden (user=%s, verb=get, resource=nodes, subresource(s)=[proxy])", user), http.StatusForbidden)
		return
	}
	k.serve(w, r)
}

func (k *Kubelet) count() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.requests++
}

func (k *Kubelet) serve(w http.ResponseWriter, r *http.Request) {
	k.count()
	switch {
	case r.URL.Path != "/pods":
		http.NotFound(w, r)
		return
	case r.Method != http.MethodGet:
		http.Error(w, "405: Method Not Allowed", http.StatusMethodNotAllowed)
		return
	}
	k.mu.Lock()
	waiting, answer := k.waiting, k.answer
	k.mu.Unlock()
	if waiting != nil {
		select {
		case <-waiting:
		case <-r.Context().Done():
			return
		}
	}
	if answer != nil {
		answer(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(k.List())
}

// List returns what the kubelet answers.
func (k *Kubelet) List() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	var items []object // null when there is none, as a kubelet has it
	for _, uid := range slices.Sorted(maps.Keys(k.pods)) {
		items = append(items, k.pods[uid].object(k.Node))
	}
	text, err := json.Marshal(object{"kind": "PodList", "apiVersion": "v1", "metadata": object{}, "items": items})
	if err != nil {
		panic(err) // nothing in it cannot be marshalled
	}
	return text
}

type object map[string]any

// object is the pod as Kubernetes writes it, with some of what nobody here reads.
func (p Pod) object(node string) object {
	var owners []object
	for _, o := range p.Owners {
		owners = append(owners, object{"apiVersion": "apps/v1", "kind": o.Kind, "name": o.Name, "uid": o.UID, "controller": true, "blockOwnerDeletion": true})
	}
	spec := func(list []Container) (specs []object) {
		for _, c := range list {
			specs = append(specs, object{"name": c.Name, "image": c.Image, "env": []object{{"name": "containerID", "value": "containerd://" + strings.Repeat("0", 64)}},
				"resources": object{}, "imagePullPolicy": "IfNotPresent"})
		}
		return specs
	}
	status := func(list []Container) (all []object) {
		for _, c := range list {
			s := object{"name": c.Name, "image": c.Image, "imageID": c.ImageID, "ready": c.ID != "", "restartCount": 0, "lastState": object{}}
			if c.ID == "" {
				s["state"] = object{"waiting": object{"reason": "ContainerCreating"}}
			} else {
				s["containerID"] = "containerd://" + c.ID
				s["state"] = object{"running": object{"startedAt": "2026-01-02T03:04:05Z"}}
				s["lastState"] = object{"terminated": object{"exitCode": 1, "containerID": "containerd://" + strings.Repeat("1", 64)}}
			}
			all = append(all, s)
		}
		return all
	}
	meta := object{"name": p.Name, "namespace": p.Namespace, "uid": p.UID, "resourceVersion": "42", "creationTimestamp": "2026-01-02T03:04:05Z",
		"annotations": object{"kubernetes.io/config.source": "api"}}
	if len(p.Labels) > 0 {
		meta["labels"] = p.Labels
	}
	if len(owners) > 0 {
		meta["ownerReferences"] = owners
	}
	podSpec := object{"nodeName": node, "serviceAccountName": p.ServiceAccount, "serviceAccount": p.ServiceAccount, "containers": spec(p.Containers), "restartPolicy": "Always", "tolerations": []object{{"operator": "Exists"}}}
	podStatus := object{"phase": "Running", "hostIP": "127.0.0.1", "podIP": "10.1.2.3", "qosClass": "BestEffort", "conditions": []object{{"type": "Ready", "status": "True"}},
		"containerStatuses": status(p.Containers)}
	for key, list := range map[string][]Container{"initContainerStatuses": p.Init, "ephemeralContainerStatuses": p.Ephemeral} {
		if len(list) > 0 {
			podStatus[key] = status(list)
		}
	}
	if len(p.Init) > 0 {
		podSpec["initContainers"] = spec(p.Init)
	}
	return object{"metadata": meta, "spec": podSpec, "status": podStatus}
}

type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{key: newKey(t)}
	a.certificate = &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubelet-ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, a.certificate, a.certificate, &a.key.PublicKey, a.key)
	if err == nil {
		a.certificate, err = x509.ParseCertificate(der)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) sign(t testing.TB, c *x509.Certificate) tls.Certificate {
	t.Helper()
	key := newKey(t)
	c.SerialNumber, c.KeyUsage = big.NewInt(time.Now().UnixNano()), x509.KeyUsageDigitalSignature
	c.NotBefore, c.NotAfter = a.certificate.NotBefore, a.certificate.NotAfter
	der, err := x509.CreateCertificate(rand.Reader, c, a.certificate, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (k *Kubelet) write(path, kind string, der []byte) {
	k.t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		k.t.Fatal(err)
	}
}
