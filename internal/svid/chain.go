package svid

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/fault"
)

// ChainRules say what the chain of an authority below foreign roots has to be.
type ChainRules struct {
	TrustDomain spiffeid.TrustDomain // whose IDs are to be signed below it
	Key         crypto.PublicKey     // the first certificate's
	// Ours says that the first certificate is made for us: it must have what an
	// X509-SVID standard asks of a signing certificate. A certificate of somebody
	// else's PKI may be anything that RFC 5280 allows.
	Ours bool
	// Below is how many authorities stand between the first certificate and leaves.
	Below int
	Now   time.Time
}

// Chain is a chain of authorities that holds what ChainRules ask.
type Chain struct {
	Certificates [][]byte // DER, without the root
	Root         []byte   // the one, of those that were given, under which it is good for longest; DER
	ID           string   // subject key identifier of the first certificate, lower-case hex
	RootID       string   // the root's
	NotBefore    time.Time
	NotAfter     time.Time
	// Remarks are what is allowed and yet keeps some verifiers from accepting SVIDs.
	Remarks []string
}

func errChain(reason, format string, args ...any) *fault.Error {
	return fault.New(fault.Precondition, "upstream_"+reason, "the certificate chain of the authority above is refused: "+format, args...)
}

// CheckChain holds a chain (DER, in the order of signing, with or without its
// root at the end) and the roots that it should lead to against the rules: what
// is accepted here verifies with VerifyX509 and with others that follow RFC 5280.
func CheckChain(chain, roots [][]byte, r ChainRules) (Chain, error) {
	size := 0
	for _, der := range chain {
		size += len(der)
	}
	switch {
	case len(chain) == 0 || len(roots) == 0:
		return Chain{}, errChain("chain_empty", "there is no certificate, or no root")
	case len(chain) > maxChain || size > maxChainSize:
		return Chain{}, errChain("chain_too_long", "it has more than %d certificates or 64 KiB", maxChain)
	}
	certificates, err := parseAll(chain)
	if err != nil {
		return Chain{}, err
	}
	anchors, err := parseAll(roots)
	if err != nil {
		return Chain{}, err
	}
	if err := checkFirst(certificates[0], r); err != nil {
		return Chain{}, err
	}
	// A root at the end is not part of what is sent.
	if last := len(certificates) - 1; last > 0 && selfSigned(certificates[last]) {
		certificates = certificates[:last]
	}
	for i, c := range certificates {
		if err := checkAuthority(c, r.Now); err != nil {
			return Chain{}, err
		}
		if i == 0 {
			continue
		}
		// Each by the next, as it is sent.
		below := certificates[i-1]
		if err := signedBy(below, c); err != nil {
			return Chain{}, err
		}
	}
	return leading(certificates, anchors, r)
}

func parseAll(ders [][]byte) (out []*x509.Certificate, err error) {
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, errChain("certificate_malformed", "a certificate cannot be parsed").Because(err)
		}
		out = append(out, c)
	}
	return out, nil
}

// checkFirst looks at what the signing certificate is for.
func checkFirst(c *x509.Certificate, r ChainRules) error {
	key, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !key.Equal(r.Key) {
		return errChain("key_mismatch", "%s is for another key", shown(c))
	}
	if len(c.SubjectKeyId) == 0 || len(c.Subject.Names) == 0 {
		return errChain("certificate_invalid", "%s has no subject or no subject key identifier, which RFC 5280 wants of every authority", shown(c))
	}
	if !r.Ours {
		return nil
	}
	if usage := extension(c, "2.5.29.15"); len(usage.Id) == 0 {
		return errChain("certificate_invalid", "%s has no key usage, which a signing certificate of SPIFFE must have", shown(c))
	}
	var uris []string
	for name := range altNames(c) {
		if name.tag == uriName {
			uris = append(uris, name.value)
		}
	}
	// Without one it is allowed (X509-SVID section 3.2), and some CAs leave it out.
	if len(uris) > 1 || len(uris) == 1 && uris[0] != r.TrustDomain.IDString() {
		return errChain("trust_domain_mismatch", "%s is made out to %q instead of %q", shown(c), strings.Join(uris, " "), r.TrustDomain.IDString())
	}
	return nil
}

// maySign reports whether a certificate is an authority's. One without key usage
// may sign (RFC 5280 section 6.1.4 n).
func maySign(c *x509.Certificate) bool {
	return c.Version == 3 && c.BasicConstraintsValid && c.IsCA &&
		(c.KeyUsage&x509.KeyUsageCertSign != 0 || len(extension(c, "2.5.29.15").Id) == 0)
}

// checkAuthority looks at what every authority must be, by itself.
func checkAuthority(c *x509.Certificate, now time.Time) error {
	switch {
	case !c.IsCA || !c.BasicConstraintsValid || c.Version != 3:
		return errChain("not_an_authority", "%s is not an authority's (CA:TRUE is missing)", shown(c))
	case !maySign(c):
		return errChain("not_an_authority", "%s has a key usage without keyCertSign", shown(c))
	case now.Before(c.NotBefore):
		return errChain("not_yet_valid", "%s begins only on %s", shown(c), c.NotBefore.UTC().Format(time.RFC3339)).Fix("compare the clocks")
	case !now.Before(c.NotAfter):
		return errChain("expired", "%s ended on %s", shown(c), c.NotAfter.UTC().Format(time.RFC3339))
	case len(c.UnhandledCriticalExtensions) > 0:
		return errChain("extension_unknown", "%s has the critical extension %s, which verifiers do not know", shown(c), c.UnhandledCriticalExtensions[0])
	}
	if !selfSigned(c) { // what a root says of itself proves nothing, so it is not looked at
		if err := checkForm(c); err != nil {
			return errChain("certificate_invalid", "%s: %s", shown(c), cutPeer(err))
		}
		switch c.SignatureAlgorithm {
		case x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.ECDSAWithSHA1, x509.DSAWithSHA1, x509.DSAWithSHA256, x509.UnknownSignatureAlgorithm:
			return errChain("signature_weak", "%s is signed with %s", shown(c), c.SignatureAlgorithm)
		}
	}
	if err := checkKey(c.PublicKey); err != nil {
		return errChain("key_weak", "%s: %s", shown(c), cutPeer(err))
	}
	if _, ok := c.PublicKey.(ed25519.PublicKey); ok {
		return errChain("key_weak", "%s has an Ed25519 key, which many verifiers of SVIDs do not know", shown(c))
	}
	if err := checkIntermediate(c); err != nil {
		return errChain("certificate_invalid", "%s: %s", shown(c), cutPeer(err))
	}
	return nil
}

// cutPeer is what is wrong with a certificate, without saying again that it is refused.
func cutPeer(err error) string { return strings.TrimPrefix(fault.MessageOf(err), peerRefused) }

// signedBy checks one link of a chain.
func signedBy(c, parent *x509.Certificate) error {
	if !bytes.Equal(c.RawIssuer, parent.RawSubject) {
		return errChain("chain_order", "%s does not follow the one that it signed", shown(parent)).
			Fix("give the certificates in the order of signing: the signing one first, each followed by its issuer")
	}
	if len(c.AuthorityKeyId) > 0 && !bytes.Equal(c.AuthorityKeyId, parent.SubjectKeyId) { // L21: many find issuers by it
		return errChain("chain_order", "%s names another key identifier for its issuer than %s has", shown(c), shown(parent))
	}
	if err := c.CheckSignatureFrom(parent); err != nil {
		return errChain("signature_wrong", "%s is not signed by the key of %s", shown(c), shown(parent)).Because(err)
	}
	return nil
}

// leading finds the root that the chain leads to: of several the one that lasts
// longest, for cross-signed roots share a key.
func leading(certificates, anchors []*x509.Certificate, r ChainRules) (Chain, error) {
	first, last := certificates[0], certificates[len(certificates)-1]
	options := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: r.Now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range certificates[1:] {
		options.Intermediates.AddCert(c)
	}
	out := Chain{}
	refusal := error(errChain("root_unrelated", "it leads to none of the roots that were given"))
	for _, root := range anchors {
		whole := append(append([]*x509.Certificate{}, certificates...), root)
		if bytes.Equal(last.Raw, root.Raw) { // the first is a root itself
			whole = certificates
		} else if !bytes.Equal(last.RawIssuer, root.RawSubject) || len(last.AuthorityKeyId) > 0 && !bytes.Equal(last.AuthorityKeyId, root.SubjectKeyId) ||
			last.CheckSignatureFrom(root) != nil && maySign(root) {
			continue
		}
		err := checkAuthority(root, r.Now)
		if err == nil {
			err = checkWhole(whole, r)
		}
		if err != nil {
			refusal = err
			continue
		}
		notBefore, notAfter := within(whole...)
		if out.Root != nil && !notAfter.After(out.NotAfter) {
			continue
		}
		options.Roots.AddCert(root)
		out.Root, out.ID, out.RootID, out.NotBefore, out.NotAfter, out.Remarks = root.Raw, keyIDOf(first), keyIDOf(root), notBefore, notAfter, remarks(whole)
	}
	if out.Root == nil {
		return Chain{}, refusal
	}
	// All that was not thought of above.
	if _, err := first.Verify(options); err != nil {
		return Chain{}, errChain("chain_unverified", "it does not verify").Because(err)
	}
	for _, c := range certificates {
		if !selfSigned(c) {
			out.Certificates = append(out.Certificates, c.Raw)
		}
	}
	return out, nil
}

// checkWhole checks what certificates of a whole path, root included, say about
// one another.
func checkWhole(path []*x509.Certificate, r ChainRules) error {
	if room(path, 0) < r.Below {
		for i, c := range path {
			if (c.MaxPathLen > 0 || c.MaxPathLenZero) && c.MaxPathLen-i < r.Below {
				return errChain("path_length", "the path length %d of %s leaves no room for the authorities below it", c.MaxPathLen, shown(c)).
					Fix("have it made with a larger path length, or without one")
			}
		}
		return errChain("chain_too_long", "with an SVID it is longer than %d certificates, which is all that verifiers read", maxChain)
	}
	for _, c := range path {
		if name, ok := constrained(c, r.TrustDomain.Name()); ok {
			return errChain("name_constraints", "the name constraints of %s (%s) exclude the trust domain %q", shown(c), name, r.TrustDomain.Name())
		}
	}
	return nil
}

// constrained reports whether the URI name constraints of a certificate exclude
// a host, as RFC 5280 section 4.2.1.10 says: a name without a leading dot is that
// host alone. crypto/x509 also lets hosts below it pass, others do not.
func constrained(c *x509.Certificate, host string) (by string, ok bool) {
	match := func(name string) bool {
		if strings.HasPrefix(name, ".") {
			return strings.HasSuffix(host, strings.ToLower(name))
		}
		return strings.EqualFold(name, host)
	}
	for _, name := range c.ExcludedURIDomains {
		if match(name) || strings.HasSuffix(host, "."+strings.ToLower(name)) { // and what crypto/x509 excludes
			return "excluded: " + name, true
		}
	}
	for _, name := range c.PermittedURIDomains {
		if match(name) {
			return "", false
		}
	}
	if len(c.PermittedURIDomains) > 0 {
		return "permitted: " + strings.Join(c.PermittedURIDomains, " "), true
	}
	return "", false
}

func remarks(path []*x509.Certificate) (out []string) {
	for _, c := range path {
		if c.KeyUsage&x509.KeyUsageDigitalSignature != 0 {
			out = append(out, shown(c)+" has the key usage digitalSignature, which SPIFFE keeps for leaves")
		}
		if len(extension(c, "2.5.29.37").Id) == 0 {
			continue
		}
		var server, client bool
		for _, u := range c.ExtKeyUsage {
			server = server || u == x509.ExtKeyUsageServerAuth || u == x509.ExtKeyUsageAny
			client = client || u == x509.ExtKeyUsageClientAuth || u == x509.ExtKeyUsageAny
		}
		if !server || !client {
			out = append(out, shown(c)+" has an extended key usage without serverAuth or clientAuth: TLS libraries refuse SVIDs below it in that role")
		}
	}
	return out
}

// shown names a certificate to people.
func shown(c *x509.Certificate) string {
	name := c.Subject.String()
	if len(name) > 128 {
		name = strings.ToValidUTF8(name[:128], "") + "…"
	}
	return "the certificate \"" + strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, name) + "\""
}

// CertificateID is the subject key identifier of a DER certificate in lower-case
// hex, empty for what cannot be parsed.
func CertificateID(der []byte) string {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return ""
	}
	return keyIDOf(c)
}

// keyIDOf is a certificate's subject key identifier in lower-case hex, made up
// from its key if it says none.
func keyIDOf(c *x509.Certificate) string {
	if len(c.SubjectKeyId) > 0 {
		return fmt.Sprintf("%x", c.SubjectKeyId)
	}
	id, err := AuthorityID(c.PublicKey)
	if err != nil {
		return ""
	}
	return id
}
