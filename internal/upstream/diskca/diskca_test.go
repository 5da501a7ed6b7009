package diskca

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/upstream"
	"github.com/plastron/plastron/internal/upstream/upstreamtest"
)

const patience = 30 * time.Second

// corp is the PKI of a company, made by openssl.
type corp struct {
	t   *testing.T
	dir string
}

func newCorp(t *testing.T) *corp {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("openssl is not installed")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return &corp{t, dir}
}

func (c *corp) path(name string) string { return filepath.Join(c.dir, name) }

func (c *corp) openssl(args ...string) {
	c.t.Helper()
	cmd := exec.Command("openssl", args...)
	cmd.Dir = c.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("openssl %v: %v\n%s", args, err, out)
	}
}

func (c *corp) key(name string, how ...string) {
	c.t.Helper()
	if len(how) == 0 {
		how = []string{"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"}
	}
	c.openssl(append([]string{"genpkey", "-out", name + ".key"}, how...)...)
	if err := os.Chmod(c.path(name+".key"), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// root makes a root as the shortest command does: without a word on key usage.
func (c *corp) root(name string, how ...string) {
	c.t.Helper()
	if _, err := os.Stat(c.path(name + ".key")); err != nil {
		c.key(name)
	}
	c.openssl(append([]string{"req", "-x509", "-new", "-key", name + ".key", "-out", name + ".pem", "-subj", "/O=Example Corp/CN=" + name, "-days", "30"}, how...)...)
}

const usual = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"

// below makes an authority that another signs.
func (c *corp) below(name, parent, extensions string, how ...string) {
	c.t.Helper()
	c.ensure(parent)
	if _, err := os.Stat(c.path(name + ".key")); err != nil {
		c.key(name)
	}
	c.openssl("req", "-new", "-key", name+".key", "-out", name+".csr", "-subj", "/O=Example Corp/CN="+name)
	if err := os.WriteFile(c.path(name+".ext"), []byte(extensions), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.openssl(append([]string{"x509", "-req", "-in", name + ".csr", "-CA", parent + ".pem", "-CAkey", parent + ".key", "-CAcreateserial",
		"-out", name + ".pem", "-days", "10", "-extfile", name + ".ext"}, how...)...)
}

// join writes certificates one after the other.
func (c *corp) join(to string, names ...string) {
	c.t.Helper()
	var all []byte
	for _, name := range names {
		c.ensure(name)
		b, err := os.ReadFile(c.path(name + ".pem"))
		if err != nil {
			c.t.Fatal(err)
		}
		all = append(all, b...)
	}
	c.write(to, all)
}

// write replaces a file as a whole.
func (c *corp) write(name string, data []byte) {
	c.t.Helper()
	if err := os.WriteFile(c.path(name+".new"), data, 0o600); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Rename(c.path(name+".new"), c.path(name)); err != nil {
		c.t.Fatal(err)
	}
}

func (c *corp) config(cert, key, roots string) *Config {
	config := &Config{CertFilePath: c.path(cert), KeyFilePath: c.path(key), every: time.Millisecond}
	if roots != "" {
		config.BundleFilePath = c.path(roots)
	}
	return config
}

func TestContract(t *testing.T) {
	c := newCorp(t)
	c.below("middle", "root", usual)
	c.below("issuing", "middle", usual)
	c.join("chain.pem", "issuing", "middle")
	upstreamtest.Run(t, func(t *testing.T) upstream.Config { return c.config("chain.pem", "issuing.key", "root.pem") })
}

func TestRootAlone(t *testing.T) {
	c := newCorp(t)
	c.root("root")
	a, err := c.config("root.pem", "root.key", "").Open(t.Context(), upstreamtest.Env())
	if err != nil {
		t.Fatal(err)
	}
	if got := upstreamtest.Mint(t, a, keys.ECP256, time.Hour); len(got.Certificates) != 1 {
		t.Errorf("%d certificates are sent, want ours alone", len(got.Certificates))
	}
	c.below("ca", "root", usual)
	if _, err := c.config("ca.pem", "ca.key", "").Open(t.Context(), upstreamtest.Env()); fault.ReasonOf(err) != "upstream_root_missing" {
		t.Errorf("without a root: %v", err)
	}
}

// Odd but valid authorities of outside makers are accepted, at start and on
// reload; what is not fit is refused with the reason both times, and leaves what
// was there in use (RG32, R67).
func TestFiles(t *testing.T) {
	const p384, rsa = "ec_paramgen_curve:P-384", "rsa_keygen_bits:"
	good := newCorp(t)
	good.finish()
	for _, c := range []struct {
		name   string
		make   func(c *corp) // chain.pem, ca.key, roots.pem
		reason string
	}{
		{"usual", func(c *corp) {}, ""},
		{"RSA 2048 below RSA 4096", func(c *corp) {
			c.key("root", "-algorithm", "RSA", "-pkeyopt", rsa+"4096")
			c.key("ca", "-algorithm", "RSA", "-pkeyopt", rsa+"2048")
		}, ""},
		{"RSA 3072 in the old form", func(c *corp) {
			c.openssl("genrsa", "-traditional", "-out", "ca.key", "3072")
		}, ""},
		{"P-384", func(c *corp) {
			c.key("root", "-algorithm", "EC", "-pkeyopt", p384)
			c.key("ca", "-algorithm", "EC", "-pkeyopt", p384)
		}, ""},
		{"EC key with parameters in the old form", func(c *corp) {
			c.openssl("ecparam", "-name", "prime256v1", "-genkey", "-out", "ca.key")
		}, ""},
		{"text around the certificates", func(c *corp) {
			c.below("ca", "root", usual, "-text")
		}, ""},
		{"policies, CRL and other extensions", func(c *corp) {
			c.below("ca", "root", usual+"crlDistributionPoints=URI:http://10.0.0.1/crl\nauthorityInfoAccess=OCSP;URI:http://10.0.0.1/\ncertificatePolicies=1.2.3.4\n1.2.3.5=ASN1:UTF8String:anything\n")
		}, ""},
		{"path length 1", func(c *corp) { c.below("ca", "root", strings.Replace(usual, "CA:TRUE", "CA:TRUE,pathlen:1", 1)) }, ""},
		{"two roots", func(c *corp) { c.root("other"); c.join("roots.pem", "other", "root") }, ""},
		{"SHA-1 signature of the root on itself", func(c *corp) { c.root("root", "-sha1") }, ""}, // nobody looks at it

		{"path length 0", func(c *corp) {
			c.below("ca", "root", strings.Replace(usual, "CA:TRUE", "CA:TRUE,pathlen:0", 1))
		}, "upstream_path_length"},
		{"CA:FALSE", func(c *corp) { c.below("ca", "root", "basicConstraints=CA:FALSE\nsubjectKeyIdentifier=hash\n") }, "upstream_not_an_authority"},
		{"no basic constraints", func(c *corp) { c.below("ca", "root", "keyUsage=keyCertSign\nsubjectKeyIdentifier=hash\n") }, "upstream_not_an_authority"},
		{"no keyCertSign", func(c *corp) { c.below("ca", "root", strings.Replace(usual, "keyCertSign,", "", 1)) }, "upstream_not_an_authority"},
		{"ended", func(c *corp) { c.below("ca", "root", usual, "-days", "-1") }, "upstream_expired"},
		{"name constraints that exclude us", func(c *corp) {
			c.below("ca", "root", usual+"nameConstraints=critical,permitted;URI:example.com\n")
		}, "upstream_name_constraints"},
		{"name constraints that permit us", func(c *corp) {
			c.below("ca", "root", usual+"nameConstraints=critical,permitted;URI:example.org\n")
		}, ""},
		{"SHA-1", func(c *corp) { c.below("ca", "root", usual, "-sha1") }, "upstream_signature_weak"},
		{"MD5", func(c *corp) {
			c.key("root", "-algorithm", "RSA", "-pkeyopt", rsa+"2048")
			c.root("root")
			c.below("ca", "root", usual, "-md5")
		}, "upstream_signature_weak"},
		{"wrong order", func(c *corp) {
			c.below("middle", "root", usual)
			c.below("low", "middle", usual)
			c.below("ca", "low", usual)
			c.join("chain.pem", "ca", "middle", "low")
		}, "upstream_chain_order"},
		{"unrelated key", func(c *corp) { c.below("ca", "root", usual); c.key("ca") }, "upstream_key_mismatch"},
		{"unrelated root", func(c *corp) { c.root("other"); c.join("roots.pem", "other") }, "upstream_root_unrelated"},
		{"weak RSA", func(c *corp) { c.key("ca", "-algorithm", "RSA", "-pkeyopt", rsa+"1024") }, "upstream_certificate_invalid"},
		{"no root", func(c *corp) { c.write("roots.pem", nil) }, "upstream_file_unusable"},
		{"a leaf among the roots", func(c *corp) {
			c.below("leaf", "root", "basicConstraints=CA:FALSE\n")
			c.join("roots.pem", "root", "leaf")
		}, "upstream_root_invalid"},
		{"an intermediate for a root", func(c *corp) { c.below("ca", "root", usual); c.join("roots.pem", "ca") }, "upstream_root_not_self_signed"},
		{"encrypted key", func(c *corp) {
			c.key("ca", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-aes256", "-pass", "pass:x")
			c.write("ca.pem", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
		}, "upstream_file_unusable"},
		{"key file empty", func(c *corp) { c.below("ca", "root", usual); c.write("ca.key", nil) }, "upstream_file_unusable"},
		{"R113 key file that a group may read", func(c *corp) {
			c.below("ca", "root", usual)
			group := -1
			if os.Geteuid() == 0 { // one that root is not in
				group = 65534
			}
			if err := errors.Join(os.Chown(c.path("ca.key"), os.Geteuid(), group), os.Chmod(c.path("ca.key"), 0o640)); err != nil {
				c.t.Fatal(err)
			}
		}, "key_file_unsafe"},
		{"certificate in place of the key", func(c *corp) { c.below("ca", "root", usual); c.join("ca.key", "ca") }, "upstream_file_unusable"},
		{"key in place of the certificate", func(c *corp) {
			c.key("ca")
			b, err := os.ReadFile(c.path("ca.key"))
			if err != nil {
				c.t.Fatal(err)
			}
			c.write("chain.pem", b)
		}, "upstream_file_unusable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// The set that is to be judged, made in a directory of its own.
			set := newCorp(t)
			c.make(set)
			set.finish()
			_, err := set.config("chain.pem", "ca.key", "roots.pem").Open(t.Context(), upstreamtest.Env())
			if got := fault.ReasonOf(err); err != nil && got != c.reason || err == nil && c.reason != "" {
				t.Fatalf("at start: %v, want reason %q", err, c.reason)
			}
			reload(t, good, set, c.reason)
		})
	}
}

// ensure makes an authority that the case has not made.
func (c *corp) ensure(name string) {
	c.t.Helper()
	if _, err := os.Stat(c.path(name + ".pem")); err == nil {
		return
	}
	if name == "ca" {
		c.below("ca", "root", usual)
	} else {
		c.root(name)
	}
}

// finish makes what the case has not made.
func (c *corp) finish() {
	c.t.Helper()
	for to, from := range map[string]string{"chain.pem": "ca", "roots.pem": "root"} {
		if _, err := os.Stat(c.path(to)); err != nil {
			c.join(to, from)
		}
	}
	c.ensure("ca")
}

// reload puts a set in the place of a good one, at once, as orchestrators do:
// by another target of a symbolic link.
func reload(t *testing.T, good, set *corp, reason string) {
	t.Helper()
	link := filepath.Join(t.TempDir(), "current")
	point := func(at *corp) {
		t.Helper()
		if err := errors.Join(os.Symlink(at.dir, link+".new"), os.Rename(link+".new", link)); err != nil {
			t.Fatal(err)
		}
	}
	point(good)
	in := corp{t, link}
	a, err := in.config("chain.pem", "ca.key", "roots.pem").Open(t.Context(), upstreamtest.Env())
	if err != nil {
		t.Fatal(err)
	}
	rootOf := func(c *corp) string {
		t.Helper()
		ders, err := readCertificates(c.path("roots.pem"))
		if err != nil {
			t.Fatal(err)
		}
		return string(ders[0])
	}
	old := rootOf(good)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	seen := 0
	for trust, err := range a.Watch(ctx) {
		seen++
		switch {
		case seen == 1:
			if err != nil || string(trust.Roots[0].ASN1) != old {
				t.Fatalf("before: %v", err)
			}
			point(set)
			continue
		case reason == "" && (err != nil || string(trust.Roots[0].ASN1) != rootOf(set)):
			t.Errorf("on reload: %v, want the new roots", err)
		case reason != "" && fault.ReasonOf(err) != reason:
			t.Errorf("on reload: %v, want reason %q", err, reason)
		}
		break
	}
	if seen < 2 {
		t.Fatal("the change was not noticed")
	}
	got := upstreamtest.Mint(t, a, keys.ECP256, time.Hour) // and verified
	if reason != "" && string(got.Root) != old {
		t.Error("what was refused is in use")
	}
	if reason == "" && string(got.Root) == old {
		t.Error("what was accepted is not in use")
	}
	// Back to what was good.
	point(good)
	again := upstreamtest.Mint(t, a, keys.ECP256, time.Hour)
	if string(again.Root) != old {
		t.Error("the first set is not in use again")
	}
}

// Files that are replaced within one tick of the file system's clock, by others of the
// same size, are noticed.
func TestReplacedAtOnce(t *testing.T) {
	c := newCorp(t)
	c.root("other")
	now := time.Now().Add(time.Hour) // the same for both, and for as long as the test takes
	roots := func(names ...string) string {
		t.Helper()
		c.join("roots.pem", names...)
		if err := os.Chtimes(c.path("roots.pem"), now, now); err != nil {
			t.Fatal(err)
		}
		ders, err := readCertificates(c.path("roots.pem"))
		if err != nil {
			t.Fatal(err)
		}
		return string(ders[0])
	}
	was := roots("root", "other")
	c.finish()
	a, err := c.config("chain.pem", "ca.key", "roots.pem").Open(t.Context(), upstreamtest.Env())
	if err != nil {
		t.Fatal(err)
	}
	is := roots("other", "root")
	held, err := a.(*authority).look()
	if err != nil || string(held.roots[0]) != is || is == was {
		t.Errorf("the new files are not seen: %v", err)
	}
}

// An authority ends with the first certificate above it (R8), and an upstream
// that has ended says so.
func TestEnds(t *testing.T) {
	c := newCorp(t)
	c.finish()
	a, err := c.config("chain.pem", "ca.key", "roots.pem").Open(t.Context(), upstreamtest.Env())
	if err != nil {
		t.Fatal(err)
	}
	left := time.Until(upstreamtest.Mint(t, a, keys.ECP256, 365*24*time.Hour).NotAfter)
	if left > 10*24*time.Hour {
		t.Errorf("it lives for %v, longer than the authority above it", left)
	}
	held := a.(*authority)
	if _, err := held.check(held.held, time.Now().Add(11*24*time.Hour)); fault.ReasonOf(err) != "upstream_expired" {
		t.Errorf("after its end: %v", err)
	}
}

func TestSecretsStay(t *testing.T) { // R72
	c := newCorp(t)
	c.finish()
	a, err := c.config("chain.pem", "ca.key", "roots.pem").Open(t.Context(), upstreamtest.Env())
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(verb, a); got != "diskca" {
			t.Errorf("%s shows %q", verb, got)
		}
	}
}
