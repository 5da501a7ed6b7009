package kube

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/secretfile"
	"go.yaml.in/yaml/v3"
)

const (
	maxConfigFile = 1 << 20
	maxToken      = 64 << 10
)

// ClientConfig says which API server to speak to, and as whom.
type ClientConfig struct {
	// Kubeconfig is a kubeconfig file; its current context counts. Empty: this
	// process runs in a pod of the cluster and uses the pod's service account.
	Kubeconfig string
	// ServiceAccountDir is where a pod finds its token and its cluster's CA.
	// Default: /var/run/secrets/kubernetes.io/serviceaccount.
	ServiceAccountDir string
}

// Open reads the files once, so that mistakes show. It connects to nothing. The
// files are read again for each call: tokens rotate, and so may the rest.
func (c ClientConfig) Open() (*Client, error) {
	client := &Client{config: c}
	if _, _, err := client.connection(); err != nil {
		return nil, err
	}
	return client, nil
}

// access is what a kubeconfig, or the surroundings of a pod, say of an API
// server. What is inline has no file; a file's name is absolute.
type access struct {
	server, serverName string

	ca, certificate, key, token                 []byte
	caFile, certificateFile, keyFile, tokenFile string
}

func (c ClientConfig) unusable(format string, args ...any) *fault.Error {
	where := "the pod's service account"
	if c.Kubeconfig != "" {
		where = fmt.Sprintf("the kubeconfig %q", c.Kubeconfig)
	}
	return fault.New(fault.Precondition, "kubeconfig_unusable", "%s cannot be used: %s", where, fmt.Sprintf(format, args...))
}

// unreadable keeps what secretfile says of a file's place or mode.
func (c ClientConfig) unreadable(err error) error {
	if f, ok := errors.AsType[*fault.Error](err); ok {
		return f
	}
	return c.unusable("%v", err)
}

// inCluster is what Kubernetes tells each container.
func (c ClientConfig) inCluster() (*access, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, c.unusable("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set, so this is no pod").
			Fix("outside of the cluster, name a kubeconfig file")
	}
	dir := cmp.Or(c.ServiceAccountDir, "/var/run/secrets/kubernetes.io/serviceaccount")
	return &access{
		server: "https://" + net.JoinHostPort(host, port),
		caFile: filepath.Join(dir, "ca.crt"), tokenFile: filepath.Join(dir, "token"),
	}, nil
}

// The parts of a kubeconfig that count. What would weaken or change who speaks
// to whom, and is not offered, is here to be refused; the rest is passed over, as
// kubectl does.
type (
	kubeconfig struct {
		Clusters []struct {
			Name    string      `yaml:"name"`
			Cluster kubeCluster `yaml:"cluster"`
		} `yaml:"clusters"`
		Users []struct {
			Name string   `yaml:"name"`
			User kubeUser `yaml:"user"`
		} `yaml:"users"`
		Contexts []struct {
			Name    string `yaml:"name"`
			Context struct {
				Cluster string `yaml:"cluster"`
				User    string `yaml:"user"`
			} `yaml:"context"`
		} `yaml:"contexts"`
		Current string `yaml:"current-context"`
	}
	kubeCluster struct {
		Server     string `yaml:"server"`
		ServerName string `yaml:"tls-server-name"`
		CAData     string `yaml:"certificate-authority-data"`
		CAFile     string `yaml:"certificate-authority"`
		Insecure   bool   `yaml:"insecure-skip-tls-verify"`
		Proxy      string `yaml:"proxy-url"`
	}
	kubeUser struct {
		CertificateData string `yaml:"client-certificate-data"`
		CertificateFile string `yaml:"client-certificate"`
		KeyData         string `yaml:"client-key-data"`
		KeyFile         string `yaml:"client-key"`
		Token           string `yaml:"token"`
		TokenFile       string `yaml:"tokenFile"`

		Username     string    `yaml:"username"`
		Password     string    `yaml:"password"`
		Impersonate  yaml.Node `yaml:"as"`
		AsUID        yaml.Node `yaml:"as-uid"`
		AsGroups     yaml.Node `yaml:"as-groups"`
		AsExtra      yaml.Node `yaml:"as-user-extra"`
		Exec         yaml.Node `yaml:"exec"`
		AuthProvider yaml.Node `yaml:"auth-provider"`
	}
)

// parse reads a kubeconfig. No error quotes a value of the file.
func (c ClientConfig) parse(src []byte) (*access, error) {
	var file kubeconfig
	if err := yaml.Unmarshal(src, &file); err != nil {
		if _, quotes := errors.AsType[*yaml.TypeError](err); quotes {
			return nil, c.unusable("a key in it is there twice, or has a value of another type than it must have")
		}
		return nil, c.unusable("it is neither YAML nor JSON: %v", err)
	}
	if file.Current == "" {
		return nil, c.unusable("it has no current-context").Fix("kubectl config use-context NAME")
	}
	var clusterName, userName string
	var cluster *kubeCluster
	var user *kubeUser
	for _, x := range file.Contexts {
		if x.Name == file.Current {
			clusterName, userName = x.Context.Cluster, x.Context.User
		}
	}
	for i, x := range file.Clusters {
		if x.Name == clusterName {
			cluster = &file.Clusters[i].Cluster
		}
	}
	for i, x := range file.Users {
		if x.Name == userName {
			user = &file.Users[i].User
		}
	}
	switch {
	case clusterName == "" || cluster == nil || user == nil:
		return nil, c.unusable("its current context %q does not name a cluster and a user that are in it", file.Current)
	case cluster.Insecure:
		return nil, c.unusable("it says insecure-skip-tls-verify, with which anybody could answer for the cluster").
			Fix("give it certificate-authority-data")
	case cluster.Proxy != "":
		return nil, c.unusable("it names a proxy-url, which is not offered")
	case !user.Exec.IsZero() || !user.AuthProvider.IsZero():
		return nil, c.unusable("its user gets credentials from a program (exec or auth-provider), which is not offered: this process starts no programs").
			Fix("make a service account for it with 'kubectl create serviceaccount', and name its token in tokenFile or a client certificate in client-certificate")
	case user.Username != "" || user.Password != "":
		return nil, c.unusable("its user has a password, which Kubernetes does not take any more")
	case !user.Impersonate.IsZero() || !user.AsUID.IsZero() || !user.AsGroups.IsZero() || !user.AsExtra.IsZero():
		return nil, c.unusable("its user impersonates another, which is not offered")
	}
	a := &access{server: cluster.Server, serverName: cluster.ServerName, token: []byte(user.Token)}
	for _, x := range []struct {
		data, file, key string
		inline          *[]byte
		path            *string
	}{
		{cluster.CAData, cluster.CAFile, "certificate-authority", &a.ca, &a.caFile},
		{user.CertificateData, user.CertificateFile, "client-certificate", &a.certificate, &a.certificateFile},
		{user.KeyData, user.KeyFile, "client-key", &a.key, &a.keyFile},
		{"", user.TokenFile, "tokenFile", new([]byte), &a.tokenFile},
	} {
		data, err := base64.StdEncoding.DecodeString(x.data)
		if err != nil {
			return nil, c.unusable("%s-data is not base64", x.key)
		}
		if *x.inline = data; len(data) == 0 && x.file != "" { // inline wins, as for kubectl
			if *x.path = x.file; !filepath.IsAbs(x.file) {
				*x.path = filepath.Join(filepath.Dir(c.Kubeconfig), x.file)
			}
		}
	}
	if (len(a.certificate) == 0 && a.certificateFile == "") != (len(a.key) == 0 && a.keyFile == "") {
		return nil, c.unusable("its user has a client certificate without its key, or a key without a certificate")
	}
	return a, nil
}

// address reads where the server is: always https, for the token goes there.
func (c ClientConfig) address(server string) (*url.URL, error) {
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" {
		return nil, c.unusable("its server is not a plain https:// address")
	}
	return u, nil
}

// material is what the files say at this moment, ready for a connection. It is a secret.
type material struct {
	ca, certificate, key []byte
	token                string
}

// hasSecret reports whether the kubeconfig itself holds one.
func (a *access) hasSecret() bool { return len(a.key) > 0 || len(a.token) > 0 }

func (a *access) read(c ClientConfig) (material, error) {
	var m material
	var token []byte
	readToken := readSecret
	if c.Kubeconfig == "" {
		readToken = readSmall
	}
	for _, x := range []struct {
		inline []byte
		file   string
		read   func(path string, limit int64) ([]byte, error)
		limit  int64
		to     *[]byte
	}{
		{a.ca, a.caFile, readSmall, maxConfigFile, &m.ca}, {a.certificate, a.certificateFile, readSmall, maxConfigFile, &m.certificate},
		{a.key, a.keyFile, readSecret, maxConfigFile, &m.key}, {a.token, a.tokenFile, readToken, maxToken, &token},
	} {
		*x.to = x.inline
		if x.file != "" { // a token's file wins over the token, as for kubectl
			data, err := x.read(x.file, x.limit)
			if err != nil {
				return m, c.unreadable(err)
			}
			*x.to = data
		}
	}
	m.token = string(bytes.TrimSpace(token))
	if strings.ContainsFunc(m.token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return m, c.unusable("its token holds what no token does")
	}
	return m, nil
}

// readSecret reads a file that nobody else can read or exchange (R113). Those in a
// pod's volumes are for whom Kubernetes says, often for everybody in the container.
func readSecret(path string, limit int64) ([]byte, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	if secretfile.Mounted(path) {
		return readSmall(path, limit)
	}
	return secretfile.ReadGiven(path, limit)
}

// tls returns how to connect, with no trust in anything but the given CA. Without
// one it is the system's roots that count, for managed clusters that have a public certificate.
func (m material) tls(c ClientConfig, serverName string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: serverName}
	if len(m.ca) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(m.ca) {
			return nil, c.unusable("its certificate authority is not a certificate in PEM")
		}
	}
	if len(m.certificate) > 0 {
		pair, err := tls.X509KeyPair(m.certificate, m.key)
		if err != nil {
			return nil, c.unusable("its client certificate and key do not belong together, or are not in PEM")
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}
