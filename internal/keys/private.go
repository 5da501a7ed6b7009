package keys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"regexp"

	"github.com/plastron/plastron/internal/fault"
)

// Private is a private key in memory. It signs; printed, logged or encoded in
// any way it shows its name only (R72).
type Private struct {
	signer crypto.Signer
}

const redacted = "keys.Private"

// NewPrivate makes a key.
func NewPrivate(t Type) (Private, error) {
	var signer crypto.Signer
	var err error
	switch t {
	case ECP256:
		signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ECP384:
		signer, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA2048:
		signer, err = rsa.GenerateKey(rand.Reader, 2048)
	case RSA4096:
		signer, err = rsa.GenerateKey(rand.Reader, 4096)
	default:
		_, err = ParseType(string(t))
	}
	if err != nil {
		return Private{}, fmt.Errorf("make %s key: %w", t, err)
	}
	return Private{signer}, nil
}

// ParsePrivate reads an unencrypted PKCS#8 key of one of the types. Its errors
// never quote the input.
func ParsePrivate(der []byte) (Private, Type, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return Private{}, "", fault.New(fault.Invalid, "key_malformed", "a private key is not PKCS#8")
	}
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		switch key.Curve {
		case elliptic.P256():
			return Private{key}, ECP256, nil
		case elliptic.P384():
			return Private{key}, ECP384, nil
		}
	case *rsa.PrivateKey:
		switch key.N.BitLen() {
		case 2048:
			return Private{key}, RSA2048, nil
		case 4096:
			return Private{key}, RSA4096, nil
		}
	}
	return Private{}, "", fault.New(fault.Invalid, "key_type_invalid", "a private key is of a kind that is not supported")
}

// PKCS8 returns the secret itself, for a keeper to store and for nothing else.
func (p Private) PKCS8() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(p.signer) }

// Public returns the public key.
func (p Private) Public() crypto.PublicKey { return p.signer.Public() }

// Sign signs a digest.
func (p Private) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return p.signer.Sign(random, digest, opts)
}

// String returns the type's name.
func (Private) String() string { return redacted }

// Format prints the type's name for every verb.
func (Private) Format(s fmt.State, _ rune) { io.WriteString(s, redacted) }

// MarshalText encodes the type's name.
func (Private) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue logs the type's name.
func (Private) LogValue() slog.Value { return slog.StringValue(redacted) }

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$`)

// CheckID refuses a key id that some keeper could not hold as it is.
func CheckID(id string) error {
	if !validID.MatchString(id) {
		return fault.New(fault.Invalid, "key_id_invalid", "%q is not a key id", id).
			Fix("use 1 to 255 of A-Z a-z 0-9 . _ -, beginning with a letter or digit")
	}
	return nil
}

// NotFound is what a keeper returns for an id that it does not hold.
func NotFound(id string) error {
	return fault.New(fault.NotFound, "key_not_found", "no key %q is kept", id)
}
