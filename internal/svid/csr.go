package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/plastron/plastron/internal/fault"
)

// MaxCSR is the size in bytes above which a request is refused unread.
const MaxCSR = 64 << 10

// maxDepth bounds the nesting of a request's DER.
const maxDepth = 16

func errCSR(reason, message string) *fault.Error {
	return fault.New(fault.Invalid, reason, "the certificate request is refused: %s", message)
}

// ParseCSR reads a DER PKCS#10 request and verifies its signature (R3). Only
// the public key is taken from it (R2); everything else must merely be well
// formed. Sizes and the key policy (R4) are tested before any heavy arithmetic.
func ParseCSR(der []byte) (PublicKey, error) {
	switch {
	case len(der) == 0:
		return PublicKey{}, errCSR("csr_invalid", "it is empty")
	case len(der) > MaxCSR:
		return PublicKey{}, errCSR("csr_too_large", "it is larger than 64 KiB")
	case !wellFormed(der, maxDepth):
		return PublicKey{}, errCSR("csr_invalid", "it is not DER")
	}
	// RFC 2986 section 4.
	in := cryptobyte.String(der)
	var request, info, algorithm, signature cryptobyte.String
	var unused uint8
	if !in.ReadASN1(&request, asn1.SEQUENCE) || !in.Empty() ||
		!request.ReadASN1Element(&info, asn1.SEQUENCE) ||
		!request.ReadASN1Element(&algorithm, asn1.SEQUENCE) ||
		!request.ReadASN1(&signature, asn1.BIT_STRING) || !request.Empty() ||
		!signature.ReadUint8(&unused) || unused != 0 || signature.Empty() {
		return PublicKey{}, errCSR("csr_invalid", "it is not a PKCS#10 request")
	}
	signed := info
	var body, name, spki, attributes cryptobyte.String
	var version uint8
	if !info.ReadASN1(&body, asn1.SEQUENCE) ||
		!body.ReadASN1Integer(&version) || version != 0 ||
		!body.ReadASN1(&name, asn1.SEQUENCE) ||
		!body.ReadASN1Element(&spki, asn1.SEQUENCE) ||
		!body.ReadASN1(&attributes, asn1.Tag(0).ContextSpecific().Constructed()) || !body.Empty() {
		return PublicKey{}, errCSR("csr_invalid", "it is not a PKCS#10 request of version 1")
	}
	if !attributesDistinct(attributes) {
		return PublicKey{}, errCSR("csr_invalid", "an attribute or extension is malformed or there twice")
	}
	key, err := ParsePublicKey(slices.Clone(spki))
	if err != nil {
		return PublicKey{}, err
	}
	if !verifySignature(key.Key, algorithm, signed, signature) {
		return PublicKey{}, errCSR("csr_signature_invalid", "its signature does not prove possession of the key").
			Fix("sign it with the private key of the request, with SHA-256, SHA-384 or SHA-512")
	}
	return key, nil
}

// RequestedURIs returns the URI names that a request asks for, as written:
// crypto/x509 offers parsed URLs, in which SPIFFE://a/b# has become spiffe://a/b.
func RequestedURIs(csr *x509.CertificateRequest) (uris []string) {
	for _, e := range csr.Extensions {
		if e.Id.String() != "2.5.29.17" {
			continue
		}
		for name := range generalNames(e.Value) {
			if name.tag == uriName {
				uris = append(uris, name.value)
			}
		}
	}
	return uris
}

// NewCSR makes a request that carries nothing but the signer's key.
func NewCSR(signer crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, signer)
}

// NewAuthorityCSR makes a request for an authority of td, to be signed by one
// above. Upstreams that are not SPIFFE's may copy what it says.
func NewAuthorityCSR(td spiffeid.TrustDomain, signer crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}}, URIs: []*url.URL{td.ID().URL()},
	}, signer)
}

// wellFormed walks DER: minimal definite lengths everywhere, no trailing
// bytes, bounded depth. It looks into constructed elements, not at values.
func wellFormed(der []byte, depth int) bool {
	if depth == 0 {
		return false
	}
	in := cryptobyte.String(der)
	for !in.Empty() {
		var value cryptobyte.String
		var tag asn1.Tag
		if !in.ReadAnyASN1(&value, &tag) {
			return false
		}
		if tag&0x20 != 0 && !wellFormed(value, depth-1) {
			return false
		}
	}
	return true
}

// oidExtensionRequest is the content of 1.2.840.113549.1.9.14 (RFC 2985 section 5.4.2).
const oidExtensionRequest = "\x2a\x86\x48\x86\xf7\x0d\x01\x09\x0e"

// attributesDistinct checks that no attribute and no requested extension is
// there twice (C32). Their values are not used.
func attributesDistinct(in cryptobyte.String) bool {
	seen := map[string]bool{}
	for !in.Empty() {
		var attribute, oid, values cryptobyte.String
		if !in.ReadASN1(&attribute, asn1.SEQUENCE) ||
			!attribute.ReadASN1(&oid, asn1.OBJECT_IDENTIFIER) ||
			!attribute.ReadASN1(&values, asn1.SET) || !attribute.Empty() || seen[string(oid)] {
			return false
		}
		seen[string(oid)] = true
		if string(oid) == oidExtensionRequest && !extensionsDistinct(values) {
			return false
		}
	}
	return true
}

func extensionsDistinct(values cryptobyte.String) bool {
	var list cryptobyte.String
	if !values.ReadASN1(&list, asn1.SEQUENCE) || !values.Empty() {
		return false
	}
	seen := map[string]bool{}
	for !list.Empty() {
		var extension, oid cryptobyte.String
		if !list.ReadASN1(&extension, asn1.SEQUENCE) ||
			!extension.ReadASN1(&oid, asn1.OBJECT_IDENTIFIER) || seen[string(oid)] {
			return false
		}
		seen[string(oid)] = true
	}
	return true
}

// The whole DER AlgorithmIdentifier of each signature that is accepted and made
// (RFC 5758 section 3.2, RFC 4055 section 5). Anything older than SHA-2 and any
// RSASSA-PSS, whose parameters vary, is refused.
const (
	sigECDSA256 = "\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02"
	sigECDSA384 = "\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x03"
	sigECDSA512 = "\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x04"
	sigRSA256   = "\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b\x05\x00"
	sigRSA384   = "\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0c\x05\x00"
	sigRSA512   = "\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0d\x05\x00"
)

func verifySignature(key crypto.PublicKey, algorithm, signed, signature []byte) bool {
	var hash crypto.Hash
	switch string(algorithm) {
	case sigECDSA256, sigRSA256:
		hash = crypto.SHA256
	case sigECDSA384, sigRSA384:
		hash = crypto.SHA384
	case sigECDSA512, sigRSA512:
		hash = crypto.SHA512
	default:
		return false
	}
	h := hash.New()
	h.Write(signed)
	digest := h.Sum(nil)
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		return algorithm[1] == 0x0a && ecdsa.VerifyASN1(key, digest, signature)
	case *rsa.PublicKey:
		return algorithm[1] == 0x0d && rsa.VerifyPKCS1v15(key, hash, digest, signature) == nil
	}
	return false
}
