package etcd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// authority signs certificates for both ends of a connection.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, file string) *authority {
	a := &authority{cert: &x509.Certificate{Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}}
	a.cert, a.key = a.sign(t, a.cert, file, "")
	return a
}

// sign makes a key and a certificate for 127.0.0.1, signed by the authority or,
// when it has no key yet, by itself.
func (a *authority) sign(t *testing.T, cert *x509.Certificate, certFile, keyFile string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer := a.key
	if signer == nil {
		signer = key
	}
	cert.SerialNumber = big.NewInt(time.Now().UnixNano())
	cert.NotBefore, cert.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, cert, a.cert, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	write := func(file, kind string, der []byte, mode os.FileMode) {
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode); err != nil {
			t.Fatal(err)
		}
	}
	write(certFile, "CERTIFICATE", der, 0o644)
	if keyFile != "" {
		b, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		write(keyFile, "PRIVATE KEY", b, 0o600)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func leaf(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// Both ends prove themselves; replaced files are used without a restart.
func TestMutualTLS(t *testing.T) {
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o755) // etcd runs as another user
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	ca := newAuthority(t, in("ca"))
	ca.sign(t, leaf("etcd"), in("server"), in("server-key"))
	ca.sign(t, leaf("plastron"), in("client"), in("client-key"))
	if err := os.Chmod(in("server-key"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, c := cluster(t, 1, "--cert-file="+in("server"), "--key-file="+in("server-key"), "--trusted-ca-file="+in("ca"), "--client-cert-auth")
	c.CAFile, c.CertFile, c.KeyFile = in("ca"), in("client"), in("client-key")
	commit(t, opened(t, c), put("k", "1"))

	refuse := func(c Config, kind fault.Kind, reason string) {
		t.Helper()
		s, err := c.open(t.Context(), slogTo(t), patient())
		if err == nil {
			s.Close()
		}
		must(t, err, kind, reason)
	}
	stranger := newAuthority(t, in("other-ca"))
	other := c
	other.CAFile = in("other-ca")
	refuse(other, fault.Unavailable, "store_tls")
	other.CAFile = in("missing")
	refuse(other, fault.Precondition, "store_tls")
	other = c // R113: a key that others can read
	other.CertFile, other.KeyFile = in("server"), in("server-key")
	refuse(other, fault.Precondition, "key_file_unsafe")

	// The files that a connection was made with are replaced by worthless ones, and
	// those by good ones: each new handshake reads what is there.
	files := tlsFiles{c.CAFile, c.CertFile, c.KeyFile}
	before, err := files.load()
	if err != nil {
		t.Fatal(err)
	}
	stranger.sign(t, leaf("plastron"), in("client"), in("client-key"))
	if s, err := c.open(t.Context(), slogTo(t), defaultLimits()); err == nil {
		s.Close()
		t.Fatal("opened with a certificate of another authority")
	}
	ca.sign(t, leaf("plastron"), in("client"), in("client-key"))
	after, err := files.load()
	if err != nil || string(before.Certificates[0].Certificate[0]) == string(after.Certificates[0].Certificate[0]) {
		t.Fatalf("the old certificate is still there: %v", err)
	}
	commit(t, opened(t, c), put("k", "2"))
}
