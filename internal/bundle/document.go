package bundle

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/strictjson"
)

// Limits on a bundle document.
const (
	MaxDocument = 1 << 20 // bytes
	MaxKeys     = 200
)

// maxRefreshHint bounds a hint; a longer one would mean never (B10).
const maxRefreshHint = 24 * time.Hour

// The uses of a key (X509-SVID section 6, JWT-SVID section 6, WIT-SVID section 6).
const (
	useX509 = "x509-svid"
	useJWT  = "jwt-svid"
	useWIT  = "wit-svid"
)

func errDocument(format string, args ...any) error {
	return fault.New(fault.Invalid, "bundle_invalid", "the bundle document is refused: "+format, args...)
}

// Parse reads a SPIFFE bundle document of trust domain td. The document must be
// sound as a whole; an entry that is of an unknown kind, or unsound in itself,
// is left out, so that one odd key does not end trust in the others.
func Parse(td spiffeid.TrustDomain, data []byte) (*Bundle, error) {
	if len(data) > MaxDocument {
		return nil, errDocument("it is larger than 1 MiB")
	}
	document, err := strictjson.Object(data)
	if err != nil {
		return nil, errDocument("%v", err)
	}
	b := &Bundle{TrustDomain: td}
	if v, there := document["spiffe_sequence"]; there {
		n, _ := v.(json.Number)
		if b.Sequence, err = strconv.ParseUint(string(n), 10, 64); err != nil {
			return nil, errDocument("spiffe_sequence is not an unsigned 64-bit integer")
		}
	}
	// A hint that makes no sense counts as none, one too large as the largest.
	if n, ok := document["spiffe_refresh_hint"].(json.Number); ok {
		if seconds, err := strconv.ParseUint(string(n), 10, 64); err == nil {
			b.RefreshHint = time.Duration(min(seconds, uint64(maxRefreshHint/time.Second))) * time.Second
		}
	}
	keys, ok := document["keys"].([]any)
	if !ok {
		return nil, errDocument("it has no list of keys")
	}
	if len(keys) > MaxKeys {
		return nil, errDocument("it has %d keys, the limit is %d", len(keys), MaxKeys)
	}
	ids := map[string]bool{} // of all JWT and WIT keys
	for i, v := range keys {
		jwk, ok := v.(map[string]any)
		if !ok {
			return nil, errDocument("key %d is not an object", i+1)
		}
		for _, private := range []string{"d", "p", "q", "dp", "dq", "qi", "oth"} {
			if _, there := jwk[private]; there {
				return nil, errDocument("key %d is a private key, which must never be published", i+1)
			}
		}
		id, _ := jwk["kid"].(string)
		if use := jwk["use"]; use == useJWT || use == useWIT {
			if id != "" && ids[id] {
				return nil, errDocument("key %d has the key id of another", i+1)
			}
			ids[id] = true
		}
		switch jwk["use"] {
		case useX509:
			// An entry with a key id is not one of this use (X509-SVID section 6.1).
			if _, there := jwk["kid"]; there {
				continue
			}
			der, ok := parseRoot(jwk)
			if ok && !slices.ContainsFunc(b.X509, func(a X509Authority) bool { return bytes.Equal(a.ASN1, der) }) {
				b.X509 = append(b.X509, X509Authority{ASN1: der})
			}
		case useJWT:
			key, ok := parseKey(jwk)
			if !ok || id == "" || len(id) > maxKeyID {
				continue
			}
			spki, err := x509.MarshalPKIXPublicKey(key)
			if err != nil {
				continue
			}
			b.JWT = append(b.JWT, JWTAuthority{KeyID: id, PublicKey: spki})
		}
	}
	return b, nil
}

const maxKeyID = 1024

// ParseJWKS reads the keys for signatures in a JWK set that is no bundle, as other
// issuers of tokens publish them, by key id. Keys of unknown kinds, for other uses
// and without id are left out.
func ParseJWKS(data []byte) (map[string]crypto.PublicKey, error) {
	invalid := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "jwks_invalid", "the JWK set is refused: "+format, args...)
	}
	if len(data) > MaxDocument {
		return nil, invalid("it is larger than 1 MiB")
	}
	document, err := strictjson.Object(data)
	if err != nil {
		return nil, invalid("%v", err)
	}
	list, ok := document["keys"].([]any)
	if !ok || len(list) > MaxKeys {
		return nil, invalid("it has no list of at most %d keys", MaxKeys)
	}
	keys := map[string]crypto.PublicKey{}
	for i, v := range list {
		jwk, _ := v.(map[string]any)
		if _, private := jwk["d"]; private {
			return nil, invalid("key %d is a private key, which must never be published", i+1)
		}
		id, _ := jwk["kid"].(string)
		if use, there := jwk["use"]; there && use != "sig" || id == "" || len(id) > maxKeyID {
			continue
		}
		key, ok := parseKey(jwk)
		if !ok {
			continue
		}
		if _, twice := keys[id]; twice {
			return nil, invalid("key %d has the key id of another", i+1)
		}
		keys[id] = key
	}
	if len(keys) == 0 {
		return nil, invalid("it has no key that can be used")
	}
	return keys, nil
}

// parseRoot reads the certificate of an x509-svid entry: the first of x5c, for
// the key that the entry's own members give.
func parseRoot(jwk map[string]any) ([]byte, bool) {
	x5c, _ := jwk["x5c"].([]any)
	if len(x5c) == 0 {
		return nil, false
	}
	text, _ := x5c[0].(string)
	der, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || strings.ContainsAny(text, "\r\n") {
		return nil, false
	}
	c, err := x509.ParseCertificate(der)
	if err != nil || CheckRoot(c) != "" {
		return nil, false
	}
	key, ok := parseKey(jwk)
	if !ok {
		return nil, false
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	return der, err == nil && bytes.Equal(spki, c.RawSubjectPublicKeyInfo)
}

// CheckRoot says what keeps a certificate from being an authority of a bundle, or "".
func CheckRoot(c *x509.Certificate) string {
	if c.Version != 3 || !c.BasicConstraintsValid || !c.IsCA {
		return "it is not an authority's certificate"
	}
	// Roots above us that are not SPIFFE's may leave out what they may be used for,
	// as RFC 5280 allows: what "openssl req -x509" makes does.
	said := slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.String() == "2.5.29.15" })
	if said && c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return "it has no key usage that lets it sign certificates"
	}
	for _, u := range c.URIs {
		if u.Scheme == "spiffe" && strings.Trim(u.Path, "/") != "" {
			return "it carries the SPIFFE ID of a workload"
		}
	}
	if !soundKey(c.PublicKey) {
		return "its key is weak or of a kind that is not supported"
	}
	return ""
}

// soundKey accepts RSA of 2048 to 8192 bits and EC on P-256, P-384 and P-521.
func soundKey(key crypto.PublicKey) bool {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return key.N.BitLen() >= 2048 && key.N.BitLen() <= 8192 && key.E >= 3 && key.E&1 == 1
	case *ecdsa.PublicKey:
		return key.Curve.Params().BitSize >= 256
	}
	return false
}

// parseKey reads the public key of a JWK (RFC 7518 section 6).
func parseKey(jwk map[string]any) (crypto.PublicKey, bool) {
	member := func(name string) []byte {
		text, _ := jwk[name].(string)
		b, err := base64.RawURLEncoding.Strict().DecodeString(text)
		if err != nil || strings.ContainsAny(text, "\r\n") {
			return nil
		}
		return b
	}
	switch jwk["kty"] {
	case "EC":
		var curve elliptic.Curve
		switch jwk["crv"] {
		case "P-256":
			curve = elliptic.P256()
		case "P-384":
			curve = elliptic.P384()
		case "P-521":
			curve = elliptic.P521()
		default:
			return nil, false
		}
		x, y, size := member("x"), member("y"), (curve.Params().BitSize+7)/8
		if len(x) != size || len(y) != size {
			return nil, false
		}
		key, err := ecdsa.ParseUncompressedPublicKey(curve, append(append([]byte{4}, x...), y...))
		return key, err == nil
	case "RSA":
		n, e := member("n"), member("e")
		if len(n) > 1024 || len(e) == 0 || len(e) > 4 || e[0] == 0 || len(n) == 0 || n[0] == 0 {
			return nil, false
		}
		exponent := new(big.Int).SetBytes(e).Int64()
		if exponent > 1<<31-1 {
			return nil, false
		}
		key := &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(exponent)}
		return key, soundKey(key)
	}
	return nil, false
}

// document and jwk are what is written; the order of fields is that of the
// output. Their members are those that the standard defines and no others.
type document struct {
	Keys        []jwk  `json:"keys"`
	Sequence    uint64 `json:"spiffe_sequence"`
	RefreshHint int64  `json:"spiffe_refresh_hint,omitempty"`
}

type jwk struct {
	Use string   `json:"use,omitempty"`
	KTY string   `json:"kty"`
	KID string   `json:"kid,omitempty"`
	CRV string   `json:"crv,omitempty"`
	X   string   `json:"x,omitempty"`
	Y   string   `json:"y,omitempty"`
	N   string   `json:"n,omitempty"`
	E   string   `json:"e,omitempty"`
	X5C []string `json:"x5c,omitempty"`
}

// Marshal writes b as a SPIFFE bundle document. Taint has no member there.
func (b *Bundle) Marshal() []byte {
	d := document{Keys: []jwk{}, Sequence: b.Sequence, RefreshHint: int64(b.RefreshHint / time.Second)}
	for _, c := range b.Roots() {
		if k, ok := jwkOf(c.PublicKey); ok {
			k.Use, k.X5C = useX509, []string{base64.StdEncoding.EncodeToString(c.Raw)}
			d.Keys = append(d.Keys, k)
		}
	}
	d.Keys = append(d.Keys, b.jwtKeys(useJWT)...)
	return write(d)
}

// MarshalJWKS writes the JWT keys alone, as the Workload API sends them:
// without use, which verifiers of the OpenID kind do not expect (T-JWT-7).
func (b *Bundle) MarshalJWKS() []byte {
	return write(struct {
		Keys []jwk `json:"keys"`
	}{b.jwtKeys("")})
}

func write(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("bundle: JSON of strings and numbers: %v", err)) // cannot happen
	}
	return data
}

// jwtKeys leaves out a key that nobody could verify with.
func (b *Bundle) jwtKeys(use string) []jwk {
	keys := make([]jwk, 0, len(b.JWT))
	for _, a := range b.JWT {
		key, err := x509.ParsePKIXPublicKey(a.PublicKey)
		if err != nil {
			continue
		}
		if k, ok := jwkOf(key); ok {
			k.Use, k.KID = use, a.KeyID
			keys = append(keys, k)
		}
	}
	return keys
}

func jwkOf(key crypto.PublicKey) (k jwk, ok bool) {
	encode := base64.RawURLEncoding.EncodeToString
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		point, err := key.Bytes()
		if err != nil {
			return jwk{}, false
		}
		half := (len(point) - 1) / 2
		return jwk{KTY: "EC", CRV: key.Curve.Params().Name, X: encode(point[1 : 1+half]), Y: encode(point[1+half:])}, true
	case *rsa.PublicKey:
		return jwk{KTY: "RSA", N: encode(key.N.Bytes()), E: encode(big.NewInt(int64(key.E)).Bytes())}, true
	}
	return jwk{}, false
}
