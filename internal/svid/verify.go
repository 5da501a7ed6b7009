package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"iter"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
)

// Limits on a chain that a peer shows (R41).
const (
	maxChain     = 8
	maxChainSize = 64 << 10
)

const peerRefused = "the certificate is refused: "

func errPeer(reason, message string) *fault.Error {
	return fault.New(fault.Unauthenticated, reason, "%s", peerRefused+message)
}

// VerifyX509 verifies a chain (DER, leaf first) against the roots of td and
// returns the leaf's ID, which lies in td. It adds to RFC 5280 what makes a
// certificate an X509-SVID (R41).
func VerifyX509(chain [][]byte, roots []*x509.Certificate, td spiffeid.TrustDomain, now time.Time) (spiffeid.ID, error) {
	size := 0
	for _, der := range chain {
		size += len(der)
	}
	if len(chain) == 0 || len(chain) > maxChain || size > maxChainSize {
		return spiffeid.ID{}, errPeer("chain_size_invalid", "the chain is empty, longer than 8 certificates or larger than 64 KiB")
	}
	certificates := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return spiffeid.ID{}, errPeer("chain_malformed", "a certificate of the chain cannot be parsed").Because(err)
		}
		if err := checkForm(c); err != nil {
			return spiffeid.ID{}, err
		}
		certificates[i] = c
	}
	leaf := certificates[0]
	if err := checkLeaf(leaf); err != nil {
		return spiffeid.ID{}, err
	}
	id, err := PeerID(leaf)
	if err != nil {
		return spiffeid.ID{}, err
	}
	// Keys of one trust domain say nothing about another's IDs (R91).
	if !id.MemberOf(td) {
		return spiffeid.ID{}, errPeer("trust_domain_mismatch", "its SPIFFE ID is of another trust domain than the bundle")
	}
	options := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now,
		// The leaf's extended usage is judged by checkLeaf, which wants both.
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range certificates[1:] {
		if err := checkIntermediate(c); err != nil {
			return spiffeid.ID{}, err
		}
		options.Intermediates.AddCert(c)
	}
	for _, c := range roots {
		options.Roots.AddCert(c)
	}
	found, err := leaf.Verify(options)
	if err != nil {
		return spiffeid.ID{}, errPeer("chain_unverified", "the chain does not verify against the bundle of its trust domain").Because(err)
	}
	for _, path := range found {
		if len(path) <= maxChain {
			return id, nil
		}
	}
	return spiffeid.ID{}, errPeer("chain_size_invalid", "the chain is longer than 8 certificates")
}

// PeerID reads the SPIFFE ID of a leaf from the bytes of its alternative names:
// exactly one URI, compared as written. crypto/x509 offers a parsed URL, whose
// scheme is lower-cased, so that SPIFFE://… would pass.
func PeerID(c *x509.Certificate) (spiffeid.ID, error) {
	var uris []string
	for name := range altNames(c) {
		if name.tag == uriName {
			uris = append(uris, name.value)
		}
	}
	if len(uris) != 1 {
		return spiffeid.ID{}, errPeer("uri_san_count", "it does not have exactly one URI name")
	}
	id, err := identity.Parse(uris[0])
	if err != nil {
		return spiffeid.ID{}, errPeer("spiffe_id_invalid", "its URI name is not a SPIFFE ID").Because(err)
	}
	if id.Path() == "" {
		return spiffeid.ID{}, errPeer("spiffe_id_no_path", "its SPIFFE ID has no path, which only an authority's has")
	}
	return id, nil
}

// GeneralName tags (RFC 5280 section 4.2.1.6).
const (
	mailName = asn1.Tag(0x81)
	dnsName  = asn1.Tag(0x82)
	uriName  = asn1.Tag(0x86)
)

type altName struct {
	tag   asn1.Tag
	value string
}

// altNames yields the names of the subjectAltName extension. crypto/x509 has
// checked that the extension is there at most once and well formed.
func altNames(c *x509.Certificate) iter.Seq[altName] {
	return generalNames(extension(c, "2.5.29.17").Value)
}

// generalNames yields the names of a GeneralNames as written.
func generalNames(extension []byte) iter.Seq[altName] {
	return func(yield func(altName) bool) {
		der := cryptobyte.String(extension)
		var names, value cryptobyte.String
		if !der.ReadASN1(&names, asn1.SEQUENCE) {
			return
		}
		for !names.Empty() {
			var tag asn1.Tag
			if !names.ReadAnyASN1(&value, &tag) || !yield(altName{tag, string(value)}) {
				return
			}
		}
	}
}

// extension returns the extension of that OID, or a zero one without Id.
func extension(c *x509.Certificate, oid string) pkix.Extension {
	for _, e := range c.Extensions {
		if e.Id.String() == oid {
			return e
		}
	}
	return pkix.Extension{}
}

// checkForm refuses what crypto/x509 parses although RFC 5280 or our key policy
// does not allow it, in any certificate of a chain.
func checkForm(c *x509.Certificate) error {
	if c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() > 159 {
		return errPeer("serial_invalid", "a serial number is not positive or longer than 20 bytes")
	}
	if err := checkKey(c.PublicKey); err != nil {
		return err
	}
	for name := range altNames(c) {
		switch name.tag {
		case mailName, dnsName, uriName:
			if strings.ContainsFunc(name.value, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
				return errPeer("san_invalid", "an alternative name holds a space, a control byte or a byte beyond ASCII")
			}
		}
	}
	return nil
}

// checkKey refuses keys that are weak, or so large that verifying costs too much.
func checkKey(key crypto.PublicKey) error {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < 2048 || bits > 8192 || key.E < 3 || key.E&1 == 0 {
			return errPeer("key_weak", "an RSA key is too small, too large or has a bad exponent")
		}
	case *ecdsa.PublicKey:
		if key.Curve.Params().BitSize < 256 {
			return errPeer("key_weak", "an EC key is on a curve that is too small")
		}
	case ed25519.PublicKey:
	default:
		return errPeer("key_weak", "a key is of a kind that is not allowed")
	}
	return nil
}

// checkLeaf holds a leaf against X509-SVID sections 4 and 5.2.
func checkLeaf(c *x509.Certificate) error {
	switch usage := extension(c, "2.5.29.15"); {
	case c.IsCA || c.Version != 3:
		return errPeer("leaf_profile", "it is an authority's certificate, not a leaf")
	case len(usage.Id) == 0 || !usage.Critical || c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errPeer("leaf_profile", "its key usage is missing, not critical or without digitalSignature")
	case c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errPeer("leaf_profile", "its key usage lets it sign certificates or CRLs")
	case len(extension(c, "2.5.29.30").Id) != 0:
		return errPeer("leaf_profile", "it has name constraints, which only an authority may have")
	case len(c.Subject.Names) == 0 && !extension(c, "2.5.29.17").Critical:
		return errPeer("leaf_profile", "its subject is empty and its alternative names are not critical")
	}
	if len(extension(c, "2.5.29.37").Id) != 0 {
		var server, client bool
		for _, u := range c.ExtKeyUsage {
			server = server || u == x509.ExtKeyUsageServerAuth
			client = client || u == x509.ExtKeyUsageClientAuth
		}
		if !server || !client {
			return errPeer("leaf_profile", "its extended key usage lacks serverAuth or clientAuth")
		}
	}
	return nil
}

// checkIntermediate refuses a signing certificate that carries a workload's ID
// (X509-SVID section 3.2). Its trust domain may be another (L12): what binds a
// leaf to td is that td's bundle holds the root above it.
func checkIntermediate(c *x509.Certificate) error {
	if !c.IsCA || !c.BasicConstraintsValid {
		return errPeer("chain_unverified", "a certificate that is no authority's follows the leaf")
	}
	for name := range altNames(c) {
		if rest, ok := strings.CutPrefix(name.value, "spiffe://"); ok && name.tag == uriName && strings.Contains(strings.TrimSuffix(rest, "/"), "/") {
			return errPeer("chain_unverified", "an authority of the chain carries the ID of a workload")
		}
	}
	return nil
}
