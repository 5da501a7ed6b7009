package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// selfSigned returns an identity that is its own authority.
func selfSigned(t *testing.T, id, hint string) (*x509svid.SVID, *x509bundle.Set) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{uri},
		KeyUsage: x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	svid := &x509svid.SVID{ID: spiffeid.RequireFromString(id), Certificates: []*x509.Certificate{cert}, PrivateKey: key, Hint: hint}
	return svid, x509bundle.NewSet(x509bundle.FromX509Authorities(svid.ID.TrustDomain(), svid.Certificates))
}

func TestFilesDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs")
	files, err := openFilesDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openFilesDir(dir); err == nil || !strings.Contains(err.Error(), "another plastron run") {
		t.Errorf("a second run in the same directory: %v", err)
	}
	svid, bundles := selfSigned(t, "spiffe://a.test/x", "")
	if err := files.write(svid, bundles); err != nil {
		t.Fatal(err)
	}
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem")); err != nil {
		t.Error(err)
	}
	info, err := os.Stat(filepath.Join(dir, "key.pem"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key.pem has mode %v, %v", info.Mode(), err)
	}
	files.Close()

	// What a killed run left is cleared by the next, which keeps the last files.
	stale := filepath.Join(dir, versionPrefix+"stale")
	if err := os.Mkdir(stale, 0o700); err != nil {
		t.Fatal(err)
	}
	if files, err = openFilesDir(dir); err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	if _, err := os.Stat(stale); !os.IsNotExist(err) {
		t.Errorf("the stale directory is still there: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "svid.pem")); err != nil {
		t.Errorf("the last files are gone: %v", err)
	}
}

func TestFilesDirOfOthers(t *testing.T) {
	for name, make := range map[string]func(dir string) error{
		"foreign key": func(dir string) error { return os.WriteFile(filepath.Join(dir, "key.pem"), nil, 0o600) },
		"foreign link": func(dir string) error {
			return os.Symlink("/etc/passwd", filepath.Join(dir, "svid.pem"))
		},
	} {
		dir := t.TempDir()
		if err := make(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := openFilesDir(dir); err == nil || !strings.Contains(err.Error(), "did not write") {
			t.Errorf("%s: %v", name, err)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openFilesDir(file); err == nil {
		t.Error("a file was taken for a directory")
	}
}

// A reader who opens ..data once never sees files that do not fit together, and
// one who opens svid.pem never misses it. A read lasts through at most one renewal.
func TestFilesSwap(t *testing.T) {
	dir := t.TempDir()
	files, err := openFilesDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	svid, bundles := selfSigned(t, "spiffe://a.test/x", "")
	other, otherBundles := selfSigned(t, "spiffe://a.test/y", "")
	if err := files.write(svid, bundles); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var readers sync.WaitGroup
	var reads [2]atomic.Int64
	for reader := range reads {
		readers.Go(func() {
			for ; ; reads[reader].Add(1) {
				select {
				case <-done:
					return
				default:
				}
				if _, err := os.ReadFile(filepath.Join(dir, "svid.pem")); err != nil {
					t.Errorf("svid.pem was missing: %v", err)
					return
				}
				root, err := os.OpenRoot(filepath.Join(dir, linkName))
				if err != nil {
					t.Errorf("..data was missing: %v", err)
					return
				}
				cert, err1 := fs.ReadFile(root.FS(), "svid.pem")
				key, err2 := fs.ReadFile(root.FS(), "key.pem")
				root.Close()
				if err := errors.Join(err1, err2); err != nil {
					t.Errorf("..data lost its files: %v", err)
					return
				}
				if _, err := tls.X509KeyPair(cert, key); err != nil {
					t.Errorf("certificate and key do not fit: %v", err)
					return
				}
			}
		})
	}
	for i := range 40 {
		next, nextBundles := svid, bundles
		if i%2 == 0 {
			next, nextBundles = other, otherBundles
		}
		err := files.write(next, nextBundles)
		if err != nil {
			t.Fatal(err)
		}
		for reader := range reads {
			for seen := reads[reader].Load(); reads[reader].Load() == seen && !t.Failed(); {
				runtime.Gosched()
			}
		}
	}
	close(done)
	readers.Wait()
	left, _ := filepath.Glob(filepath.Join(dir, versionPrefix+"*"))
	if len(left) != 2 {
		t.Errorf("%d inner directories are left, want the present and the one before", len(left))
	}
}

func TestChoice(t *testing.T) {
	a, _ := selfSigned(t, "spiffe://a.test/a", "")
	b, _ := selfSigned(t, "spiffe://a.test/b", "blue")
	all := []*x509svid.SVID{a, b}
	for _, tt := range []struct {
		choice choice
		svids  []*x509svid.SVID
		want   *x509svid.SVID
		err    string
	}{
		{choice{}, all[:1], a, ""},
		{choice{id: "spiffe://a.test/b"}, all, b, ""},
		{choice{hint: "blue"}, all, b, ""},
		{choice{}, all, nil, "this process has several identities:\n    spiffe://a.test/a\n    spiffe://a.test/b (hint \"blue\")"},
		{choice{id: "spiffe://a.test/c"}, all, nil, "this process has no such identity, but:\n    spiffe://a.test/a\n"},
		{choice{id: "spiffe://a.test/a", hint: "blue"}, all, nil, "this process has no such identity"},
	} {
		got, err := tt.choice.from(tt.svids)
		if got != tt.want || (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%+v: %v, %v", tt.choice, got, err)
		}
	}
}
