package x509pop

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	modeExternal = "external_pki"
	modeSPIFFE   = "spiffe"

	defaultPrefix        = "/spire-exchange/"
	defaultIntermediates = 4
	defaultRSABits       = 8192
	leastRSABits         = 2048
)

// Config is the server's half.
type Config struct {
	// Mode is external_pki (default) or spiffe.
	Mode string `hcl:"mode"`
	// CABundlePath or CABundlePaths name files with the roots of the PKI that nodes
	// have their certificates from. Mode external_pki only, and required there.
	CABundlePath  string   `hcl:"ca_bundle_path"`
	CABundlePaths []string `hcl:"ca_bundle_paths"`
	// SPIFFEPrefix or SVIDPrefix is the path below which the IDs of SVIDs lie that
	// may be exchanged. Mode spiffe only. Default: /spire-exchange/.
	SPIFFEPrefix *string `hcl:"spiffe_prefix"`
	SVIDPrefix   *string `hcl:"svid_prefix"`
	// AgentPathTemplate makes the agent's path; it lies below /x509pop.
	AgentPathTemplate string `hcl:"agent_path_template"`
	// AgentPathOutside lets the template yield any path below /spire/agent that
	// is not another attestor's.
	AgentPathOutside bool `hcl:"agent_path_outside"`
	// MaxIntermediates and MaxRSAKeySize bound what a stranger can make the server
	// compute. Default: 4 and 8192.
	MaxIntermediates *int `hcl:"max_intermediates"`
	MaxRSAKeySize    *int `hcl:"max_rsa_key_size"`
	// VerifyClientIP is not offered.
	VerifyClientIP bool `hcl:"verify_client_ip"`
}

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c *Config) Validate() error {
	var faults []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", format, args...))
		}
	}
	check(c.Mode == "" || c.Mode == modeExternal || c.Mode == modeSPIFFE, "mode: %q is neither external_pki nor spiffe", c.Mode)
	check(c.CABundlePath == "" || len(c.CABundlePaths) == 0, "ca_bundle_path and ca_bundle_paths exclude each other")
	check(c.SPIFFEPrefix == nil || c.SVIDPrefix == nil, "spiffe_prefix and svid_prefix are one key with two names; give one")
	if c.Mode == modeSPIFFE {
		check(len(c.bundlePaths()) == 0, "ca_bundle_path: mode spiffe uses the trust domain's own bundle; remove it")
		prefix := strings.TrimSuffix(c.prefix(), "/")
		check(spiffeid.ValidatePath(prefix) == nil, "svid_prefix: %q is not a path", c.prefix())
		check(!reserved(c.prefix()), "svid_prefix: no ID below /spire/ can be exchanged")
	} else {
		check(len(c.bundlePaths()) > 0, "ca_bundle_path or ca_bundle_paths: one must be set in mode external_pki")
		check(!slices.Contains(c.bundlePaths(), ""), "ca_bundle_paths: a path is empty")
		check(c.SPIFFEPrefix == nil && c.SVIDPrefix == nil, "svid_prefix: it has a meaning in mode spiffe only; remove it")
	}
	n, bits := c.intermediates(), c.rsaBits()
	check(n >= 0 && n <= 16, "max_intermediates: %d is not from 0 to 16", n)
	check(bits >= leastRSABits && bits <= 16384, "max_rsa_key_size: %d is not from %d to 16384", bits, leastRSABits)
	check(!c.VerifyClientIP, "verify_client_ip is not offered: behind a proxy or NAT the address says nothing about the node; remove it")
	t, err := c.template()
	if err == nil { // what it yields is known well enough without the trust domain's own name
		_, err = t.sample(spiffeid.RequireTrustDomainFromString("example.org"))
	}
	if err != nil {
		faults = append(faults, err)
	}
	return errors.Join(faults...)
}

func (c *Config) bundlePaths() []string {
	if c.CABundlePath != "" {
		return []string{c.CABundlePath}
	}
	return c.CABundlePaths
}

// prefix ends in a slash, so that /spire-exchangeX is not below /spire-exchange (A16).
func (c *Config) prefix() string {
	for _, p := range []*string{c.SPIFFEPrefix, c.SVIDPrefix} {
		if p != nil {
			return strings.TrimSuffix(*p, "/") + "/"
		}
	}
	return defaultPrefix
}

func (c *Config) intermediates() int { return or(c.MaxIntermediates, defaultIntermediates) }
func (c *Config) rsaBits() int       { return or(c.MaxRSAKeySize, defaultRSABits) }

func or(p *int, otherwise int) int {
	if p == nil {
		return otherwise
	}
	return *p
}

// reserved tells paths of servers and agents, which are nobody's to exchange (R16).
func reserved(path string) bool { return path == "/spire" || strings.HasPrefix(path, "/spire/") }

func (c *Config) template() (*pathTemplate, error) {
	text := c.AgentPathTemplate
	switch {
	case text != "":
	case c.Mode == modeSPIFFE:
		text = "/{{ .PluginName }}/{{ .SVIDPathTrimmed }}"
	default:
		text = "/{{ .PluginName }}/{{ .Fingerprint }}"
	}
	return parseTemplate(text, c.AgentPathOutside)
}

// Open reads the CA bundles and returns the server's half.
func (c *Config) Open(ctx context.Context, env nodeattest.Env) (nodeattest.Verifier, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	v := &verifier{
		trustDomain: env.TrustDomain, spiffe: c.Mode == modeSPIFFE, prefix: c.prefix(), roots: env.Roots,
		maxCertificates: 1 + c.intermediates(), maxRSABits: c.rsaBits(),
	}
	var err error
	if v.template, err = c.template(); err != nil {
		return nil, err
	}
	sample, err := v.template.sample(env.TrustDomain)
	if err != nil {
		return nil, err
	}
	if c.AgentPathTemplate != "" {
		env.Log.InfoContext(ctx, "agents that attest by x509pop get IDs such as this", "id", sample)
	}
	if v.spiffe {
		return v, nil
	}
	var roots []*x509.Certificate
	for _, path := range c.bundlePaths() {
		more, err := readRoots(path)
		if err != nil {
			return nil, fault.New(fault.Precondition, "ca_bundle_unreadable", "the CA bundle %q cannot be used: %v", path, err).
				Fix("it must hold certificates of authorities in PEM, and nothing else").Because(err)
		}
		roots = append(roots, more...)
	}
	v.roots = func() []*x509.Certificate { return roots }
	return v, nil
}

func readRoots(path string) ([]*x509.Certificate, error) {
	data, err := readFile(path, bundle.MaxDocument)
	if err != nil {
		return nil, err
	}
	ders, err := bundle.ParsePEM(data)
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

func readFile(path string, limit int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(data) > limit {
		err = fmt.Errorf("it is larger than %d bytes", limit)
	}
	return data, err
}

type verifier struct {
	trustDomain     spiffeid.TrustDomain
	spiffe          bool
	prefix          string
	roots           func() []*x509.Certificate
	template        *pathTemplate
	maxCertificates int
	maxRSABits      int
}

// Verify implements nodeattest.Verifier.
func (v *verifier) Verify(ctx context.Context, payload []byte, ask nodeattest.Challenger) (nodeattest.Evidence, error) {
	// 1. Sizes and counts, then certificates, then the sizes of keys: all that
	// makes a signature check dear is bounded before the first one (R27).
	ders, err := parseAttestation(payload, v.maxCertificates)
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	var shown []*x509.Certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nodeattest.Evidence{}, fault.New(fault.Invalid, "x509pop_certificate_malformed", "a certificate of the node cannot be parsed").Because(err)
		}
		if key, ok := c.PublicKey.(*rsa.PublicKey); ok && (key.N.BitLen() > v.maxRSABits || key.N.BitLen() < leastRSABits) { // A11
			return nodeattest.Evidence{}, fault.New(fault.Denied, "x509pop_key_size", "an RSA key of the node's chain has %d bits; there must be %d to %d", key.N.BitLen(), leastRSABits, v.maxRSABits)
		}
		shown = append(shown, c)
	}
	leaf := shown[0]
	if err := checkLeaf(leaf); err != nil {
		return nodeattest.Evidence{}, err
	}

	// 2. Who vouches for the certificate.
	chains, err := v.chains(shown)
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	trimmed := ""
	if v.spiffe {
		if trimmed, err = v.exchanged(ders); err != nil {
			return nodeattest.Evidence{}, err
		}
	}

	// 3. That the node holds its key, now.
	if err := prove(ctx, leaf.PublicKey, ask); err != nil {
		return nodeattest.Evidence{}, err
	}

	// 4. What the certificate says.
	pairs, err := sanPairs(leaf, v.trustDomain)
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	facts, err := selectors(leaf, chains, pairs)
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	path, inside, err := v.template.path(pathData{
		PluginName: Name, TrustDomain: v.trustDomain.Name(), Fingerprint: fingerprint(leaf), SerialNumberHex: serial(leaf),
		SVIDPathTrimmed: trimmed, Subject: name{leaf.Subject}, Issuer: name{leaf.Issuer}, dns: leaf.DNSNames, pairs: pairs,
	})
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	holder := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	return nodeattest.Evidence{Path: path, Outside: !inside, Selectors: facts, CanReattest: true, Holder: holder[:]}, nil
}

func checkLeaf(leaf *x509.Certificate) error {
	switch {
	case leaf.IsCA: // A12
		return fault.New(fault.Denied, "x509pop_certificate_refused", "the node's certificate is an authority's")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return fault.New(fault.Denied, "x509pop_certificate_refused", "the node's certificate is not for signing").
			Fix("issue it with the key usage digitalSignature")
	}
	switch key := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		return nil
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() || key.Curve == elliptic.P384() || key.Curve == elliptic.P521() {
			return nil
		}
	}
	return fault.New(fault.Denied, "x509pop_key_type", "the key of the node's certificate is of a kind that cannot be used here").
		Fix("issue it for an RSA key or one on P-256, P-384 or P-521")
}

func (v *verifier) chains(shown []*x509.Certificate) ([][]*x509.Certificate, error) {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range v.roots() {
		roots.AddCert(c)
	}
	for _, c := range shown[1:] {
		intermediates.AddCert(c)
	}
	chains, err := shown[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, fault.New(fault.Denied, "x509pop_certificate_refused", "the node's certificate does not verify: %s", verifyProblem(err)).Because(err)
	}
	return chains, nil
}

// verifyProblem is in our own words: the error's may hold names from the certificate (R104).
func verifyProblem(err error) string {
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return "it, or one above it, has expired or is not yet valid"
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "it does not lead to a root that the server was given"
	}
	return "the chain breaks a rule"
}

// exchanged verifies the chain as an X509-SVID of the own trust domain and
// returns what follows the prefix in its path.
func (v *verifier) exchanged(ders [][]byte) (string, error) {
	id, err := svid.VerifyX509(ders, v.roots(), v.trustDomain, time.Now())
	if err != nil {
		return "", fault.New(fault.Denied, "x509pop_svid_refused", "the node's certificate is not an X509-SVID of this trust domain").Because(err)
	}
	trimmed, ok := strings.CutPrefix(id.Path(), v.prefix)
	if !ok || reserved(id.Path()) {
		return "", fault.New(fault.Denied, "x509pop_svid_prefix", "the node's SVID is not one that may be exchanged").
			Fix("give the node an ID below %s, or set svid_prefix", v.prefix)
	}
	return trimmed, nil
}

// prove has the node sign a fresh nonce.
func prove(ctx context.Context, public crypto.PublicKey, ask nodeattest.Challenger) error {
	mine := make([]byte, nonceSize)
	rand.Read(mine)
	c := challenge{ECDSA: &nonce{mine}}
	_, isRSA := public.(*rsa.PublicKey)
	if isRSA {
		c = challenge{RSA: &nonce{mine}}
	}
	question, err := encode(c)
	if err != nil {
		return err
	}
	reply, err := ask(ctx, question)
	if err != nil {
		return err
	}
	var holds bool
	if isRSA {
		a, err := parseRSAAnswer(reply)
		if err != nil {
			return err
		}
		holds = rsa.VerifyPSS(public.(*rsa.PublicKey), crypto.SHA256, digest(mine, a.Nonce), a.Signature, nil) == nil
	} else {
		a, err := parseECDSAAnswer(reply)
		if err != nil {
			return err
		}
		key := public.(*ecdsa.PublicKey)
		if size := (key.Params().BitSize + 7) / 8; len(a.R) > size || len(a.S) > size {
			return malformed("the signature is too large", nil)
		}
		holds = ecdsa.Verify(key, digest(mine, a.Nonce), new(big.Int).SetBytes(a.R), new(big.Int).SetBytes(a.S))
	}
	if !holds { // A13, A14
		return fault.New(fault.Denied, "x509pop_proof_failed", "the node did not prove that it holds its certificate's key")
	}
	return nil
}
