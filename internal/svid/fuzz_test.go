package svid

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/fault"
)

// FuzzParseCSR: what is accepted is a request for crypto/x509 too, with the
// same key and a good signature; what is refused is a fault.
func FuzzParseCSR(f *testing.F) {
	f.Fuzz(func(t *testing.T, der []byte) {
		key, err := ParseCSR(der)
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("ParseCSR() = %v", err)
			}
			return
		}
		want, err := x509.ParseCertificateRequest(der)
		if err != nil {
			// crypto/x509 reads names and extensions, which we do not use.
			return
		}
		if !bytes.Equal(key.SPKI, want.RawSubjectPublicKeyInfo) {
			t.Fatal("another key than crypto/x509 reads")
		}
		if err := want.CheckSignature(); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzValidateJWT: no token verifies that nobody signed, whatever it looks like.
func FuzzValidateJWT(f *testing.F) {
	f.Fuzz(func(t *testing.T, token string) {
		now := time.Unix(1_800_000_000, 0)
		looked := 0
		_, err := ValidateJWT(token, []string{"me"}, func(td spiffeid.TrustDomain, id string) (crypto.PublicKey, bool) {
			if td.IsZero() || id == "" {
				t.Errorf("a key is looked for in %q by %q", td, id)
			}
			looked++
			return nil, false
		}, now)
		if fault.KindOf(err) != fault.Invalid || looked > 1 {
			t.Fatalf("ValidateJWT() = %v, %d keys looked for", err, looked)
		}
		split, err := splitJWT(token)
		if err != nil {
			return
		}
		// Header and claims as read are those of the standard library, and only the
		// canonical text was read.
		if strings.Count(token, ".") != 2 || strings.ContainsAny(token, "=+/ \r\n") {
			t.Fatalf("not canonical: %q", token)
		}
		if claims, err := readClaims(split.claims); err == nil {
			if claims.ID.Path() == "" || len(claims.Audience) == 0 || claims.Expiry.Unix() < 0 {
				t.Fatalf("claims %+v", claims)
			}
		}
	})
}

// FuzzVerifyX509: a certificate that nobody trusted signed never verifies, and
// an ID that is read is one as the standard writes it.
func FuzzVerifyX509(f *testing.F) {
	f.Fuzz(func(t *testing.T, der []byte) {
		td := spiffeid.RequireTrustDomainFromString("example.org")
		if id, err := VerifyX509([][]byte{der}, nil, td, time.Unix(1_800_000_000, 0)); fault.KindOf(err) != fault.Unauthenticated {
			t.Fatalf("VerifyX509() = %v, %v", id, err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		id, err := PeerID(c)
		if err != nil {
			return
		}
		if len(c.URIs) != 1 || id.Path() == "" || !bytes.Contains(der, []byte(id.String())) {
			t.Fatalf("PeerID() = %v, URIs %v", id, c.URIs)
		}
	})
}
