package svid

import (
	"crypto/fips140"
	"crypto/sha1"
	"crypto/sha256"
	"math/big"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// Contents of the object identifiers of a leaf's extensions (RFC 5280 section 4.2.1).
const (
	oidSubjectKeyID     = "\x55\x1d\x0e"
	oidKeyUsage         = "\x55\x1d\x0f"
	oidSubjectAltName   = "\x55\x1d\x11"
	oidBasicConstraints = "\x55\x1d\x13"
	oidAuthorityKeyID   = "\x55\x1d\x23"
	oidExtKeyUsage      = "\x55\x1d\x25"
)

// Parts that are the same in every leaf, DER.
const (
	versionThree = "\xa0\x03\x02\x01\x02"
	// C=US, O=SPIRE, as PrintableString, without the outer SEQUENCE.
	subjectRDNs = "\x31\x0b\x30\x09\x06\x03\x55\x04\x06\x13\x02US" +
		"\x31\x0e\x30\x0c\x06\x03\x55\x04\x0a\x13\x05SPIRE"
	// keyUsage, critical: digitalSignature.
	extKeyUsage = "\x30\x0e\x06\x03" + oidKeyUsage + "\x01\x01\xff\x04\x04\x03\x02\x07\x80"
	// extKeyUsage: serverAuth, clientAuth.
	extExtKeyUsage = "\x30\x1d\x06\x03" + oidExtKeyUsage + "\x04\x16\x30\x14" +
		"\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x01\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x02"
	// basicConstraints, critical: not a CA.
	extBasicConstraints = "\x30\x0c\x06\x03" + oidBasicConstraints + "\x01\x01\xff\x04\x02\x30\x00"
)

// assemble writes the TBSCertificate of a leaf.
func (i *X509Issuer) assemble(leaf *Leaf, serial *big.Int) ([]byte, error) {
	_, point, err := splitSPKI(leaf.Key.SPKI)
	if err != nil {
		return nil, err
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, 640+len(leaf.Key.SPKI)))
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes([]byte(versionThree))
		b.AddASN1BigInt(serial)
		b.AddBytes([]byte(i.scheme.algorithm))
		b.AddBytes(i.name)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, leaf.NotBefore)
			addTime(b, leaf.NotAfter)
		})
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddBytes([]byte(subjectRDNs))
			addCommonName(b, leaf.DNSNames)
		})
		b.AddBytes(leaf.Key.SPKI)
		b.AddASN1(asn1.Tag(3).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddBytes([]byte(extKeyUsage))
				b.AddBytes([]byte(extExtKeyUsage))
				b.AddBytes([]byte(extBasicConstraints))
				addExtension(b, oidSubjectKeyID, func(b *cryptobyte.Builder) {
					b.AddASN1OctetString(keyIdentifier(point))
				})
				b.AddBytes(i.authority)
				// Not critical: the subject is never empty (RFC 5280 section 4.1.2.6).
				addExtension(b, oidSubjectAltName, func(b *cryptobyte.Builder) {
					b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
						for _, name := range leaf.DNSNames {
							addString(b, asn1.Tag(2).ContextSpecific(), name)
						}
						addString(b, asn1.Tag(6).ContextSpecific(), leaf.ID.String())
					})
				})
			})
		})
	})
	return b.Bytes()
}

// keyIdentifier is method 1 of RFC 5280 section 4.2.1.2: SHA-1 over the key's
// bits. It names, it protects nothing; a FIPS-only process has no SHA-1.
func keyIdentifier(bits []byte) []byte {
	if fips140.Enforced() {
		sum := sha256.Sum256(bits)
		return sum[:20]
	}
	sum := sha1.Sum(bits)
	return sum[:]
}

// authorityKeyID is the extension of that name, which all leaves of an
// authority share.
func authorityKeyID(keyID []byte) ([]byte, error) {
	var b cryptobyte.Builder
	addExtension(&b, oidAuthorityKeyID, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(keyID) })
		})
	})
	return b.Bytes()
}

// addExtension adds one that is not critical.
func addExtension(b *cryptobyte.Builder, oid string, value cryptobyte.BuilderContinuation) {
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		addString(b, asn1.OBJECT_IDENTIFIER, oid)
		b.AddASN1(asn1.OCTET_STRING, value)
	})
}

func addString(b *cryptobyte.Builder, tag asn1.Tag, s string) {
	b.AddASN1(tag, func(b *cryptobyte.Builder) { b.AddBytes([]byte(s)) })
}

// addTime writes UTCTime through 2049 and GeneralizedTime from 2050 on (RFC
// 5280 section 4.1.2.5).
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t.Year() < 2050 {
		b.AddASN1UTCTime(t)
	} else {
		b.AddASN1GeneralizedTime(t)
	}
}

// addCommonName adds the first DNS name as CN, if it fits. PrintableString has
// neither '_' nor '*'.
func addCommonName(b *cryptobyte.Builder, names []string) {
	if len(names) == 0 || len(names[0]) > maxCommonName {
		return
	}
	tag := asn1.PrintableString
	for _, c := range []byte(names[0]) {
		if c == '_' || c == '*' {
			tag = asn1.UTF8String
		}
	}
	b.AddASN1(asn1.SET, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addString(b, asn1.OBJECT_IDENTIFIER, "\x55\x04\x03")
			addString(b, tag, names[0])
		})
	})
}
