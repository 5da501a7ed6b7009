package kube

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

const (
	kubeletPort   = 10250
	kubeletTime   = 10 * time.Second // for one request, all in all
	maxPodList    = 64 << 20
	maxSecret     = 1 << 20 // of a file that is read: token, certificate, key
	serviceSecret = "/var/run/secrets/kubernetes.io/serviceaccount/"
)

// KubeletConfig says how to reach this node's kubelet, how it is recognised, and
// as whom to ask. Its zero value asks the secure port with what Kubernetes puts
// into each pod: a token, and the cluster's CA.
type KubeletConfig struct {
	// NodeName is the kubelet's host, a name or an address, and what is in its
	// certificate. Empty: it is asked at 127.0.0.1, and its certificate names this host.
	NodeName     string
	SecurePort   int // 0: 10250, unless ReadOnlyPort is set
	ReadOnlyPort int // without TLS and without credentials, at 127.0.0.1 whatever NodeName is

	// One of these three says which certificate is the kubelet's.
	CAPath           string // of a CA that signs kubelets' certificates; default: the cluster's
	Pinned           string // the kubelet's own certificate, whoever signed it and whatever its name
	SkipVerification bool   // any: whoever answers is believed, and is given the token

	// Credentials: at most one kind. None: the pod's token.
	TokenPath                string
	CertificatePath, KeyPath string
	Anonymous                bool
}

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c KubeletConfig) Validate() error {
	var faults []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", format, args...))
		}
	}
	count := func(set ...bool) (n int) {
		for _, s := range set {
			if s {
				n++
			}
		}
		return n
	}
	port := func(n int) bool { return n >= 0 && n <= 65535 }
	check(port(c.SecurePort) && port(c.ReadOnlyPort), "kubelet_secure_port, kubelet_read_only_port: not a port")
	check(c.SecurePort == 0 || c.ReadOnlyPort == 0, "kubelet_secure_port and kubelet_read_only_port: only one of them can be asked")
	check(count(c.CAPath != "", c.Pinned != "", c.SkipVerification) <= 1,
		"kubelet_ca_path, kubelet_certificate_path and skip_kubelet_verification: only one of them can say which certificate is the kubelet's")
	check((c.CertificatePath == "") == (c.KeyPath == ""), "certificate_path and private_key_path must be set together")
	check(count(c.TokenPath != "", c.CertificatePath != "" || c.KeyPath != "", c.Anonymous) <= 1,
		"token_path, certificate_path and use_anonymous_authentication: only one of them can say as whom the kubelet is asked")
	check(c.ReadOnlyPort == 0 || c == KubeletConfig{NodeName: c.NodeName, ReadOnlyPort: c.ReadOnlyPort},
		"kubelet_read_only_port: that port has neither TLS nor credentials; remove what is about them")
	address, err := netip.ParseAddr(c.NodeName)
	check(c.NodeName == "" || isSubdomain(c.NodeName) || err == nil && address.Zone() == "", "node_name: %q is not the name of a node, nor its address", c.NodeName)
	return errors.Join(faults...)
}

// Open reads the files once, so that mistakes show. It connects to nothing. The
// files are read again for each request: tokens rotate, and so may the rest.
func (c KubeletConfig) Open() (*Kubelet, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	k := &Kubelet{config: c}
	k.list = k.pods
	if _, _, err := k.connection(); err != nil {
		return nil, err
	}
	return k, nil
}

// Kubelet asks a kubelet for the pods of its node. It may be used concurrently;
// one request at a time is under way.
//
// Its faults: Precondition (the files cannot be used), Denied (the kubelet does
// not let us), Unavailable (not now), Internal (a bug of ours in reading its answer).
type Kubelet struct {
	config KubeletConfig
	list   func(ctx context.Context, began time.Time) (*Pods, error) // asks once; tests have another

	mu     sync.Mutex // guards everything below
	last   *Pods      // the newest answer; nil: none yet
	flight *flight    // the request that is under way
}

// flight is a request that is under way.
type flight struct {
	began time.Time
	done  chan struct{}
	pods  *Pods // after done: the answer, or why there is none
	err   error
}

// Pods returns the pods of the node as they are now.
func (k *Kubelet) Pods(ctx context.Context) ([]Pod, error) {
	pods, err := k.Since(ctx, time.Now())
	if err != nil {
		return nil, err
	}
	return pods.All, nil
}

// Since returns what a request that began at this time or later has brought.
// Whoever waits for one shares it with all for whom it is new enough. Failures
// are not remembered.
func (k *Kubelet) Since(ctx context.Context, at time.Time) (*Pods, error) {
	for {
		k.mu.Lock()
		if last := k.last; last != nil && !last.Began.Before(at) {
			k.mu.Unlock()
			return last, nil
		}
		f := k.flight
		if f == nil {
			f = &flight{began: time.Now(), done: make(chan struct{})}
			k.flight = f
			go k.fly(f)
		}
		k.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, fault.New(fault.Unavailable, "kubelet_unavailable", "the kubelet has not answered in time").Because(ctx.Err())
		case <-f.done:
		}
		if !f.began.Before(at) {
			return f.pods, f.err
		}
	}
}

// fly makes a request, whoever still waits for it. No caller's guard is around it.
func (k *Kubelet) fly(f *flight) {
	ctx, cancel := context.WithTimeout(context.Background(), kubeletTime)
	defer cancel()
	f.err = fault.Contain(func() (err error) { f.pods, err = k.list(ctx, f.began); return err })
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.flight = nil; f.err == nil {
		k.last = f.pods
	}
	close(f.done)
}

func (k *Kubelet) pods(ctx context.Context, began time.Time) (*Pods, error) {
	data, err := k.ask(ctx)
	if err != nil {
		return nil, err
	}
	return parsePods(data, began)
}

func (k *Kubelet) ask(ctx context.Context) ([]byte, error) {
	client, token, err := k.connection()
	if err != nil {
		return nil, err
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.address(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "plastron")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := client.Do(req)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err
		}
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok || errors.Is(err, errNotPinned) {
			return nil, fault.New(fault.Unavailable, "kubelet_unverified", "what answers at %s does not show the kubelet's certificate", k.host()).
				Fix("name the CA that signed it in kubelet_ca_path, or the certificate itself, such as /var/lib/kubelet/pki/kubelet.crt, in kubelet_certificate_path").Because(err)
		}
		return nil, fault.New(fault.Unavailable, "kubelet_unavailable", "the kubelet at %s cannot be reached", k.host()).Because(err)
	}
	defer resp.Body.Close()
	switch code := resp.StatusCode; code {
	case http.StatusOK:
	case http.StatusUnauthorized:
		return nil, fault.New(fault.Denied, "kubelet_denied", "the kubelet does not accept our credentials").
			Fix("see that the token or client certificate has not expired, that the kubelet has token authentication (webhook) on, and that it reaches the API server")
	case http.StatusForbidden:
		return nil, fault.New(fault.Denied, "kubelet_denied", "our credentials have no right to see the kubelet's pods").
			Fix(`grant "get" on "nodes/pods" in a ClusterRole; before Kubernetes 1.33, on "nodes/proxy"`)
	default:
		return nil, unexpectedKubelet("it answers with HTTP status %d", code)
	}
	if resp.ContentLength > maxPodList {
		return nil, unexpectedKubelet("its answer: %w", errTooLarge)
	}
	data, err := readBounded(resp.Body, maxPodList)
	if errors.Is(err, errTooLarge) {
		return nil, unexpectedKubelet("its answer: %w", err)
	}
	if err != nil {
		return nil, fault.New(fault.Unavailable, "kubelet_unavailable", "the kubelet broke off its answer").Because(err)
	}
	return data, nil
}

func unexpectedKubelet(format string, args ...any) error {
	return fault.New(fault.Unavailable, "kubelet_unexpected", "what answers for the kubelet is not one").Because(fmt.Errorf(format, args...))
}

// host is where the kubelet is asked: without TLS on this machine alone, for
// nothing shows who answers elsewhere.
func (k *Kubelet) host() string {
	if port := k.config.ReadOnlyPort; port != 0 {
		return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	}
	return net.JoinHostPort(cmp.Or(k.config.NodeName, "127.0.0.1"), strconv.Itoa(cmp.Or(k.config.SecurePort, kubeletPort)))
}

func (k *Kubelet) address() string {
	if k.config.ReadOnlyPort != 0 {
		return "http://" + k.host() + "/pods"
	}
	return "https://" + k.host() + "/pods"
}

// connection reads the files and returns a client that trusts and shows what they
// say now, and the token.
func (k *Kubelet) connection() (*http.Client, string, error) {
	transport := &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10} // no proxy
	client := &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the token goes nowhere else
	}
	c := k.config
	if c.ReadOnlyPort != 0 {
		return client, "", nil
	}
	config, err := c.verification()
	if err != nil {
		return nil, "", err
	}
	transport.TLSClientConfig = config
	if c.CertificatePath != "" {
		certificate, err := c.read("certificate_path", c.CertificatePath)
		if err != nil {
			return nil, "", err
		}
		key, err := c.readSecret("private_key_path", c.KeyPath)
		if err != nil {
			return nil, "", err
		}
		pair, err := tls.X509KeyPair(certificate, key)
		if err != nil {
			return nil, "", c.unusable("certificate_path and private_key_path", errors.New("not a certificate and its key in PEM"))
		}
		config.Certificates = []tls.Certificate{pair}
	}
	if c.Anonymous || c.CertificatePath != "" {
		return client, "", nil
	}
	read, path := c.readSecret, c.TokenPath
	if path == "" { // it is in a pod
		read, path = c.read, serviceSecret+"token"
	}
	text, err := read("token_path", path)
	if err != nil {
		return nil, "", err
	}
	token := string(bytes.TrimSpace(text))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return nil, "", c.unusable("token_path", errors.New("it is empty, or holds what no token does"))
	}
	return client, token, nil
}

var errNotPinned = errors.New("its certificate is another than the one in kubelet_certificate_path")

// verification says whose certificate is accepted.
func (c KubeletConfig) verification() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.NodeName}
	switch {
	case c.SkipVerification:
		config.InsecureSkipVerify = true
	case c.Pinned != "":
		text, err := c.read("kubelet_certificate_path", c.Pinned)
		if err != nil {
			return nil, err
		}
		block, _ := pem.Decode(text) // the kubelet's own comes first
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, c.unusable("kubelet_certificate_path", errors.New("it does not begin with a certificate in PEM"))
		}
		want := sha256.Sum256(block.Bytes)
		config.InsecureSkipVerify = true // of the chain and the name; its key is proved all the same
		config.VerifyConnection = func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || sha256.Sum256(s.PeerCertificates[0].Raw) != want {
				return errNotPinned
			}
			return nil
		}
	default:
		text, err := c.read("kubelet_ca_path", cmp.Or(c.CAPath, serviceSecret+"ca.crt"))
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(text) {
			return nil, c.unusable("kubelet_ca_path", errors.New("it holds no certificate in PEM"))
		}
		if config.ServerName == "" {
			if config.ServerName, err = os.Hostname(); err != nil {
				return nil, c.unusable("node_name", err)
			}
		}
	}
	return config, nil
}

func (c KubeletConfig) unusable(key string, err error) error {
	return fault.New(fault.Precondition, "kubelet_config_unusable", "%s: the kubelet cannot be asked with what is there", key).Because(err)
}

func (c KubeletConfig) read(key, path string) ([]byte, error) {
	data, err := readSmall(path, maxSecret)
	if err != nil {
		return nil, c.unusable(key, err)
	}
	return data, nil
}

func (c KubeletConfig) readSecret(key, path string) ([]byte, error) {
	data, err := readSecret(path, maxSecret)
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return nil, fmt.Errorf("%s: %w", key, err) // its place or mode
	}
	if err != nil {
		return nil, c.unusable(key, err)
	}
	return data, nil
}
