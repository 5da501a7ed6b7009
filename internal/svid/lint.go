package svid

import (
	"bytes"
	"math/big"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/plastron/plastron/internal/fault"
)

func errLint(what string) error {
	return fault.New(fault.Internal, "lint_failed", "the certificate to be signed breaks the profile: %s", what)
}

// lint reads a TBSCertificate back and holds it against the leaf profile (R6)
// and against what was asked for. It shares no code with assemble and fails on
// anything it does not know.
func (i *X509Issuer) lint(tbs []byte, leaf *Leaf) error {
	in := cryptobyte.String(tbs)
	var body, version, algorithm, issuer, validity, subject, spki, wrapper, extensions cryptobyte.String
	var serial, v big.Int
	if !in.ReadASN1(&body, asn1.SEQUENCE) || !in.Empty() ||
		!body.ReadASN1(&version, asn1.Tag(0).ContextSpecific().Constructed()) ||
		!version.ReadASN1Integer(&v) || !version.Empty() ||
		!body.ReadASN1Integer(&serial) ||
		!body.ReadASN1Element(&algorithm, asn1.SEQUENCE) ||
		!body.ReadASN1Element(&issuer, asn1.SEQUENCE) ||
		!body.ReadASN1(&validity, asn1.SEQUENCE) ||
		!body.ReadASN1(&subject, asn1.SEQUENCE) ||
		!body.ReadASN1Element(&spki, asn1.SEQUENCE) ||
		!body.ReadASN1(&wrapper, asn1.Tag(3).ContextSpecific().Constructed()) || !body.Empty() ||
		!wrapper.ReadASN1(&extensions, asn1.SEQUENCE) || !wrapper.Empty() {
		return errLint("structure")
	}
	notBefore, ok1 := readTime(&validity)
	notAfter, ok2 := readTime(&validity)
	switch {
	case v.Cmp(big.NewInt(2)) != 0:
		return errLint("version")
	case serial.Sign() <= 0 || serial.BitLen() > 127:
		return errLint("serial number")
	case string(algorithm) != i.scheme.algorithm:
		return errLint("signature algorithm")
	case !bytes.Equal(issuer, i.name):
		return errLint("issuer")
	case !ok1 || !ok2 || !validity.Empty() || !notBefore.Equal(leaf.NotBefore) || !notAfter.Equal(leaf.NotAfter) ||
		!notBefore.Before(notAfter) || notAfter.After(i.notAfter):
		return errLint("validity")
	case subject.Empty():
		return errLint("subject") // then the alternative name had to be critical
	case !bytes.Equal(spki, leaf.Key.SPKI):
		return errLint("public key")
	}
	return i.lintExtensions(extensions, leaf)
}

func (i *X509Issuer) lintExtensions(in cryptobyte.String, leaf *Leaf) error {
	seen := make([]string, 0, 6)
	for !in.Empty() {
		var extension, oid, value cryptobyte.String
		var critical bool
		if !in.ReadASN1(&extension, asn1.SEQUENCE) ||
			!extension.ReadASN1(&oid, asn1.OBJECT_IDENTIFIER) ||
			// FALSE is the default, which DER leaves out.
			extension.PeekASN1Tag(asn1.BOOLEAN) && (!extension.ReadASN1Boolean(&critical) || !critical) ||
			!extension.ReadASN1(&value, asn1.OCTET_STRING) || !extension.Empty() ||
			slices.Contains(seen, string(oid)) {
			return errLint("extension structure")
		}
		seen = append(seen, string(oid))
		var ok bool
		switch string(oid) {
		case oidKeyUsage:
			ok = critical && lintKeyUsage(value)
		case oidExtKeyUsage:
			ok = !critical && lintExtKeyUsage(value)
		case oidBasicConstraints:
			var empty cryptobyte.String
			ok = critical && value.ReadASN1(&empty, asn1.SEQUENCE) && value.Empty() && empty.Empty()
		case oidSubjectKeyID:
			var id cryptobyte.String
			ok = !critical && value.ReadASN1(&id, asn1.OCTET_STRING) && value.Empty() && len(id) == 20
		case oidAuthorityKeyID:
			var seq, id cryptobyte.String
			ok = !critical && value.ReadASN1(&seq, asn1.SEQUENCE) && value.Empty() &&
				seq.ReadASN1(&id, asn1.Tag(0).ContextSpecific()) && seq.Empty() && bytes.Equal(id, i.keyID)
		case oidSubjectAltName:
			ok = !critical && lintAltNames(value, leaf)
		}
		if !ok {
			return errLint("extension")
		}
	}
	if len(seen) != 6 {
		return errLint("missing extension")
	}
	return nil
}

// lintKeyUsage wants digitalSignature (bit 0) and nothing else.
func lintKeyUsage(value cryptobyte.String) bool {
	var usage cryptobyte.String
	return value.ReadASN1(&usage, asn1.BIT_STRING) && value.Empty() && bytes.Equal(usage, []byte{7, 1 << 7})
}

// lintExtKeyUsage wants 1.3.6.1.5.5.7.3.1 and .2.
func lintExtKeyUsage(value cryptobyte.String) bool {
	var list, server, client cryptobyte.String
	return value.ReadASN1(&list, asn1.SEQUENCE) && value.Empty() &&
		list.ReadASN1(&server, asn1.OBJECT_IDENTIFIER) && bytes.Equal(server, []byte{43, 6, 1, 5, 5, 7, 3, 1}) &&
		list.ReadASN1(&client, asn1.OBJECT_IDENTIFIER) && bytes.Equal(client, []byte{43, 6, 1, 5, 5, 7, 3, 2}) && list.Empty()
}

// lintAltNames wants exactly the leaf's ID as the one URI, and its DNS names.
func lintAltNames(value cryptobyte.String, leaf *Leaf) bool {
	var names cryptobyte.String
	if !value.ReadASN1(&names, asn1.SEQUENCE) || !value.Empty() {
		return false
	}
	dns, uris := 0, 0
	for !names.Empty() {
		var name cryptobyte.String
		var tag asn1.Tag
		if !names.ReadAnyASN1(&name, &tag) {
			return false
		}
		switch tag {
		case asn1.Tag(2).ContextSpecific():
			if dns >= len(leaf.DNSNames) || leaf.DNSNames[dns] != string(name) {
				return false
			}
			dns++
		case asn1.Tag(6).ContextSpecific():
			if leaf.ID.String() != string(name) {
				return false
			}
			uris++
		default:
			return false
		}
	}
	return uris == 1 && dns == len(leaf.DNSNames)
}

func readTime(in *cryptobyte.String) (t time.Time, ok bool) {
	if in.PeekASN1Tag(asn1.UTCTime) {
		ok = in.ReadASN1UTCTime(&t)
		return t, ok && t.Year() < 2050
	}
	ok = in.ReadASN1GeneralizedTime(&t)
	return t, ok && t.Year() >= 2050
}
