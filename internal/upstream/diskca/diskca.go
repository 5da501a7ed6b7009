// Package diskca is an upstream authority whose certificate and key are files on
// this machine, such as an intermediate of a corporate PKI. The files are read
// again when they change; a set that is not fit for use leaves the one before it
// in use, and the reason is told to whoever watches.
//
// What must always hold: the key is read only from a file that nobody else could
// have read or replaced (R113); nothing is signed below a chain that verifiers
// would refuse; no error quotes a file.
package diskca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"iter"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/secretfile"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/internal/upstream"
)

const (
	maxKeyFile = 256 << 10
	// lookEvery is how soon changed files are noticed.
	lookEvery = 5 * time.Second
	// ticks is how far apart two versions of a file may be and have the same time: some
	// file systems count in steps of two seconds.
	ticks = 2 * time.Second
)

// Config names the files, all PEM.
type Config struct {
	// CertFilePath holds the signing certificate, followed by the intermediates above
	// it in the order of signing. KeyFilePath is its private key, which must be the
	// server's user's alone (or root's) to read. Required.
	CertFilePath string `hcl:"cert_file_path"`
	KeyFilePath  string `hcl:"key_file_path"`
	// BundleFilePath holds the roots, which all agents come to trust. It may be left
	// out if the signing certificate is a root itself.
	BundleFilePath string `hcl:"bundle_file_path"`

	every time.Duration // zero: lookEvery; smaller for tests
}

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c *Config) Validate() error {
	if c.CertFilePath == "" || c.KeyFilePath == "" {
		return fault.New(fault.Invalid, "config_invalid", "cert_file_path and key_file_path must be set")
	}
	return nil
}

// Open reads the files.
func (c *Config) Open(_ context.Context, env upstream.Env) (upstream.Authority, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	a := &authority{Config: *c, trustDomain: env.TrustDomain}
	if a.every == 0 {
		a.every = lookEvery
	}
	if _, err := a.look(); err != nil {
		return nil, err
	}
	return a, nil
}

// authority is the files as they were last fit for use.
type authority struct {
	Config
	trustDomain spiffeid.TrustDomain

	// mu guards everything below.
	mu    sync.Mutex
	held  material
	count uint64 // how often files have become what is held
	stamp string // of the files that held was read from; "" if others were seen since
}

// material is what the files hold.
type material struct {
	chain, roots [][]byte
	key          crypto.Signer
	version      uint64
}

// String keeps the key out of messages.
func (*authority) String() string { return "diskca" }

// GoString keeps the key out of %#v.
func (*authority) GoString() string { return "diskca" }

// Mint implements upstream.Authority. Files that have changed count at once; if
// they are not fit for use, what they were before does.
func (a *authority) Mint(ctx context.Context, r upstream.Request) (upstream.Minted, error) {
	if err := ctx.Err(); err != nil {
		return upstream.Minted{}, err
	}
	held, _ := a.look() // who watches is told of a failure
	key, err := svid.ParseCSR(r.CSR)
	if err != nil {
		return upstream.Minted{}, err
	}
	now := time.Now()
	checked, err := a.check(held, now) // it may have ended meanwhile
	if err != nil {
		return upstream.Minted{}, err
	}
	issuer, err := svid.NewX509Issuer(append(checked.Certificates, checked.Root), held.key)
	if err != nil {
		return upstream.Minted{}, err
	}
	prepared, err := issuer.PrepareAuthority(svid.Authority{
		TrustDomain: a.trustDomain, Key: key, NotBefore: now.Add(-svid.Backdate), NotAfter: now.Add(r.TTL),
	})
	if err != nil {
		return upstream.Minted{}, err
	}
	chain, err := prepared.Issue()
	if err != nil {
		return upstream.Minted{}, err
	}
	return upstream.Minted{Chain: chain, Trust: held.trust()}, nil
}

// Watch implements upstream.Authority.
func (a *authority) Watch(ctx context.Context) iter.Seq2[upstream.Trust, error] {
	return func(yield func(upstream.Trust, error) bool) {
		tick := time.NewTicker(a.every)
		defer tick.Stop()
		var told, failure string
		for ctx.Err() == nil {
			held, err := a.look()
			is := string(bytes.Join(held.roots, nil))
			switch {
			case err != nil && err.Error() != failure:
				failure = err.Error()
				if !yield(upstream.Trust{}, err) {
					return
				}
			case err == nil && (is != told || failure != ""):
				told, failure = is, ""
				if !yield(held.trust(), nil) {
					return
				}
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	}
}

// look reads the files and, if they are fit for use, puts them in the place of
// what is held. It returns what is held, and why it is not what was read.
func (a *authority) look() (material, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	stamp := a.stampOf()
	if stamp != "" && stamp == a.stamp {
		return a.held, nil
	}
	a.stamp = "" // until it is known that these are good, each look reads them
	m, err := a.read()
	if err == nil {
		_, err = a.check(m, time.Now())
	}
	if err != nil {
		return a.held, err
	}
	a.count++
	m.version = a.count
	a.held, a.stamp = m, stamp
	return m, nil
}

// stampOf tells versions of the files apart without reading them. It is empty while
// that cannot be: of files that are too young another version may have the same one.
func (a *authority) stampOf() string {
	var b strings.Builder
	for _, path := range []string{a.KeyFilePath, a.CertFilePath, a.BundleFilePath} {
		if path == "" {
			continue
		}
		info, err := os.Stat(path)
		if err != nil || time.Since(info.ModTime()) < ticks {
			return ""
		}
		fmt.Fprintln(&b, info.ModTime().UnixNano(), info.Size(), info.Mode())
	}
	return b.String()
}

func (a *authority) read() (m material, err error) {
	if m.key, err = readKey(a.KeyFilePath); err != nil {
		return m, unfit("key_file_path", a.KeyFilePath, err)
	}
	if m.chain, err = readCertificates(a.CertFilePath); err != nil {
		return m, unfit("cert_file_path", a.CertFilePath, err)
	}
	if a.BundleFilePath == "" {
		last, err := x509.ParseCertificate(m.chain[len(m.chain)-1])
		if err != nil || string(last.RawIssuer) != string(last.RawSubject) {
			return m, fault.New(fault.Precondition, "upstream_root_missing", "cert_file_path %q does not end in a root", a.CertFilePath).
				Fix("name the file with the root in bundle_file_path")
		}
		m.roots = m.chain[len(m.chain)-1:]
		return m, nil
	}
	if m.roots, err = readCertificates(a.BundleFilePath); err != nil {
		return m, unfit("bundle_file_path", a.BundleFilePath, err)
	}
	for _, der := range m.roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return m, unfit("bundle_file_path", a.BundleFilePath, err)
		}
		if what := bundle.CheckRoot(root); what != "" {
			return m, fault.New(fault.Precondition, "upstream_root_invalid", "%q in bundle_file_path: %s", root.Subject, what)
		}
		// X509-SVID section 6.1: verifiers that want a root to be one would refuse all.
		if string(root.RawIssuer) != string(root.RawSubject) {
			return m, fault.New(fault.Precondition, "upstream_root_not_self_signed", "%q in bundle_file_path is no root, but signed by somebody else", root.Subject).
				Fix("put it into cert_file_path, and its root into bundle_file_path")
		}
	}
	return m, nil
}

func (a *authority) check(m material, now time.Time) (svid.Chain, error) {
	return svid.CheckChain(m.chain, m.roots, svid.ChainRules{TrustDomain: a.trustDomain, Key: m.key.Public(), Below: 1, Now: now})
}

func (m material) trust() (t upstream.Trust) {
	t.Version = m.version
	for _, der := range m.roots {
		t.Roots = append(t.Roots, bundle.X509Authority{ASN1: der})
	}
	return t
}

func unfit(key, path string, err error) error {
	if fault.KindOf(err) != fault.Internal {
		return fmt.Errorf("%s: %w", key, err)
	}
	return fault.New(fault.Precondition, "upstream_file_unusable", "%s %q cannot be used: %v", key, path, err).Because(err)
}

// readCertificates reads PEM blocks. Text around them is let pass: PKI tools like
// to describe the certificate there.
func readCertificates(path string) (out [][]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	rest, err := io.ReadAll(io.LimitReader(f, bundle.MaxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(rest) > bundle.MaxDocument {
		return nil, fmt.Errorf("it is larger than %d bytes", bundle.MaxDocument)
	}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it holds something else than certificates")
		}
		out = append(out, block.Bytes)
	}
	if len(out) == 0 || len(out) > bundle.MaxKeys {
		return nil, fmt.Errorf("it holds %d certificates in PEM", len(out))
	}
	return out, nil
}

// readKey reads the one private key of a PEM file. Errors never quote the file.
func readKey(path string) (crypto.Signer, error) {
	text, err := secretfile.ReadGiven(path, maxKeyFile)
	if err != nil {
		return nil, err
	}
	return secretfile.ParseKey(text)
}
