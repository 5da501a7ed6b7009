//go:build kubernetes

package cluster_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// writePKI makes the cluster's CA, the certificates of its parts, the key that
// its tokens are signed with, and a kubeconfig for each client.
func writePKI(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes"}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	caKey, caDER, err := certify(ca, ca, nil)
	if err != nil {
		return err
	}
	caPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), caPEM, 0o644); err != nil {
		return err
	}
	addresses := []net.IP{net.ParseIP(nodeIP), net.ParseIP(serviceIP), net.ParseIP("127.0.0.1")}
	for i, leaf := range []struct {
		name, user, group string // a client has a user, and a kubeconfig
		dns               []string
		ips               []net.IP
	}{
		{name: "apiserver", dns: []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}, ips: addresses},
		{name: "kubelet-serving", dns: []string{NodeName}, ips: addresses[:1]},
		{name: "admin", user: "admin", group: "system:masters"},
		{name: "kubelet", user: "system:node:" + NodeName, group: "system:nodes"},
	} {
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i) + 2), Subject: pkix.Name{CommonName: leaf.name}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, DNSNames: leaf.dns, IPAddresses: leaf.ips,
		}
		if leaf.user != "" {
			c.Subject, c.ExtKeyUsage = pkix.Name{CommonName: leaf.user, Organization: []string{leaf.group}}, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}
		key, der, err := certify(c, ca, caKey)
		if err != nil {
			return err
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
		certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		if err := writeFiles(dir, map[string][]byte{leaf.name + ".crt": certPEM, leaf.name + ".key": keyPEM}); err != nil {
			return err
		}
		if leaf.user != "" {
			if err := writeFiles(dir, map[string][]byte{leaf.name + ".conf": kubeconfig(caPEM, certPEM, keyPEM)}); err != nil {
				return err
			}
		}
	}
	tokens, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(tokens)
	if err != nil {
		return err
	}
	return writeFiles(dir, map[string][]byte{"tokens.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})})
}

// certify makes a key and has it certified, by itself if there is no issuer's key.
func certify(c, issuer *x509.Certificate, issuerKey *ecdsa.PrivateKey) (key *ecdsa.PrivateKey, der []byte, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, err
	}
	if issuerKey == nil {
		issuerKey = key
	}
	der, err = x509.CreateCertificate(rand.Reader, c, issuer, key.Public(), issuerKey)
	return key, der, err
}

func writeFiles(dir string, files map[string][]byte) error {
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func kubeconfig(ca, cert, key []byte) []byte {
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://%s:6443", certificate-authority-data: %s}}]
users: [{name: u, user: {client-certificate-data: %s, client-key-data: %s}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, nodeIP, b64(ca), b64(cert), b64(key))
}
