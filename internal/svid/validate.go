package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"math"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/strictjson"
)

// Leeway is how far clocks may differ when a token's times are judged (R53).
const Leeway = 10 * time.Second

const (
	maxKeyID    = 1024
	maxAudience = 1000
	// maxLifetime is beyond what any issuer may promise; a token that ends later
	// has its times in another unit (J32).
	maxLifetime = (1<<31 - 1) * time.Second
)

// Claims are those of a verified JWT-SVID.
type Claims struct {
	ID       spiffeid.ID
	Audience []string
	Expiry   time.Time
	IssuedAt time.Time      // zero if the token does not say
	All      map[string]any // every claim; whole numbers as int64, others as float64
}

func errJWT(reason, message string) *fault.Error {
	return fault.New(fault.Invalid, reason, "the token is refused: %s", message)
}

// ValidateJWT verifies a JWT-SVID for one of the given audiences with a key of
// the trust domain that its subject names. It is stricter than RFC 7519 asks:
// no header but alg, kid and typ, no member twice, no padding (R53).
func ValidateJWT(token string, audience []string, keys func(td spiffeid.TrustDomain, keyID string) (crypto.PublicKey, bool), now time.Time) (Claims, error) {
	if len(audience) == 0 || slices.Contains(audience, "") {
		return Claims{}, fault.New(fault.Invalid, "audience_missing", "a token is validated for an audience, and none was given")
	}
	t, err := splitJWT(token)
	if err != nil {
		return Claims{}, err
	}
	c, err := readClaims(t.claims)
	if err != nil {
		return Claims{}, err
	}
	// The key is looked for in the subject's own trust domain only (R91).
	key, ok := keys(c.ID.TrustDomain(), t.keyID)
	if !ok {
		return Claims{}, errJWT("jwt_key_unknown", "its key is not in the bundle of its trust domain")
	}
	if !verifyJOSE(key, t.alg, t.signed, t.signature) {
		return Claims{}, errJWT("jwt_signature_invalid", "its signature does not verify")
	}
	switch {
	case !slices.ContainsFunc(c.Audience, func(a string) bool { return slices.Contains(audience, a) }):
		return Claims{}, errJWT("audience_mismatch", "it is for another audience")
	case !now.Before(c.Expiry.Add(Leeway)):
		return Claims{}, errJWT("jwt_expired", "it has expired")
	case c.Expiry.Sub(now) > maxLifetime:
		return Claims{}, errJWT("jwt_lifetime_excessive", "it ends too far in the future")
	case c.IssuedAt.After(now.Add(Leeway)):
		return Claims{}, errJWT("jwt_not_yet_valid", "it was issued in the future")
	}
	if n, ok := c.All["nbf"].(int64); ok && time.Unix(n, 0).After(now.Add(Leeway)) {
		return Claims{}, errJWT("jwt_not_yet_valid", "it is not valid yet")
	}
	return c, nil
}

// JWS is a signed token that is no JWT-SVID, as another issuer makes them for us
// to verify. It is taken apart and not verified yet.
type JWS struct {
	KeyID   string
	Payload []byte
	token   splitToken
}

// ParseJWS takes a token apart. It may be as large, say as much in its header, and
// be signed by the same algorithms as a JWT-SVID.
func ParseJWS(token string) (JWS, error) {
	t, err := splitJWT(token)
	return JWS{KeyID: t.keyID, Payload: t.claims, token: t}, err
}

// Verify reports whether it was signed with the key; the algorithm must fit it.
func (j JWS) Verify(key crypto.PublicKey) bool {
	return verifyJOSE(key, j.token.alg, j.token.signed, j.token.signature)
}

type splitToken struct {
	alg, keyID string
	claims     []byte
	signed     string
	signature  []byte
}

// splitJWT takes a compact JWS apart and checks its header. Nothing is decoded
// of a token that is too long.
func splitJWT(token string) (splitToken, error) {
	if len(token) > MaxJWT {
		return splitToken{}, errJWT("jwt_too_large", "it is larger than 16 KiB")
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return splitToken{}, errJWT("jwt_malformed", "it is not a compact JWS of three parts")
	}
	var raw [3][]byte
	for i, part := range parts {
		var err error
		// Strict refuses non-zero trailing bits. The decoder skips line ends, which
		// are no part of the alphabet.
		if raw[i], err = base64.RawURLEncoding.Strict().DecodeString(part); err != nil || len(raw[i]) == 0 || strings.ContainsAny(part, "\r\n") {
			return splitToken{}, errJWT("jwt_malformed", "a part is empty or not canonical base64url")
		}
	}
	header, err := strictjson.Object(raw[0])
	if err != nil {
		return splitToken{}, errJWT("jwt_header_invalid", "its header is not a JSON object")
	}
	for name := range header {
		if name != "alg" && name != "kid" && name != "typ" {
			return splitToken{}, errJWT("jwt_header_invalid", "its header has a member besides alg, kid and typ")
		}
	}
	alg, _ := header["alg"].(string)
	if _, known := joseHash(alg); !known {
		return splitToken{}, errJWT("jwt_alg_invalid", "its algorithm is not allowed")
	}
	keyID, _ := header["kid"].(string)
	if keyID == "" || len(keyID) > maxKeyID {
		return splitToken{}, errJWT("jwt_header_invalid", "its header names no key")
	}
	if typ, there := header["typ"]; there && typ != "JWT" && typ != "JOSE" {
		return splitToken{}, errJWT("jwt_header_invalid", "its type is neither JWT nor JOSE")
	}
	return splitToken{alg, keyID, raw[1], token[:len(parts[0])+1+len(parts[1])], raw[2]}, nil
}

// readClaims reads the claims that every JWT-SVID must have and those whose
// form is fixed.
func readClaims(data []byte) (Claims, error) {
	all, err := strictjson.Object(data)
	if err != nil {
		return Claims{}, errJWT("jwt_claims_invalid", "its claims are not a JSON object")
	}
	for name := range all {
		for _, ours := range [...]string{"sub", "aud", "exp", "iat", "nbf"} {
			if name != ours && strings.EqualFold(name, ours) {
				return Claims{}, errJWT("jwt_claims_invalid", "a claim differs from a registered one in case only") // J48
			}
		}
	}
	for name, v := range all {
		if all[name], err = plain(v); err != nil {
			return Claims{}, err
		}
	}
	c := Claims{All: all}
	sub, ok := all["sub"].(string)
	if !ok {
		return Claims{}, errJWT("jwt_subject_invalid", "it has no subject")
	}
	if c.ID, err = identity.Parse(sub); err != nil || c.ID.Path() == "" {
		return Claims{}, errJWT("jwt_subject_invalid", "its subject is not the SPIFFE ID of a workload")
	}
	switch aud := all["aud"].(type) {
	case string:
		c.Audience = []string{aud}
	case []any:
		for _, v := range aud {
			s, _ := v.(string) // not a string: refused as empty below
			c.Audience = append(c.Audience, s)
		}
	}
	if n := len(c.Audience); n == 0 || n > maxAudience || slices.Contains(c.Audience, "") {
		return Claims{}, errJWT("jwt_audience_invalid", "its audience is missing, empty or malformed")
	}
	for _, name := range [...]string{"exp", "iat", "nbf"} {
		v, there := all[name]
		n, whole := v.(int64)
		switch {
		case !there && name != "exp":
			continue
		case !whole || n < 0 || n > 253402300799: // the year 9999
			return Claims{}, errJWT("jwt_time_invalid", "a time is missing, or not a whole number of seconds")
		}
		switch name {
		case "exp":
			c.Expiry = time.Unix(n, 0).UTC()
		case "iat":
			c.IssuedAt = time.Unix(n, 0).UTC()
		}
	}
	return c, nil
}

// plain turns numbers into int64 where they are written as whole numbers of
// that size, into float64 where they are finite, and refuses others (J55).
func plain(v any) (any, error) {
	var err error
	switch v := v.(type) {
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n, nil
		}
		f, err := v.Float64()
		if err != nil || math.IsInf(f, 0) || len(v) > 64 {
			return nil, errJWT("jwt_claims_invalid", "a number is out of range")
		}
		return f, nil
	case []any:
		for i := range v {
			if v[i], err = plain(v[i]); err != nil {
				return nil, err
			}
		}
	case map[string]any:
		for name := range v {
			if v[name], err = plain(v[name]); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}

// joseHash knows the nine algorithms of JWT-SVID section 2.1.
func joseHash(alg string) (crypto.Hash, bool) {
	switch alg {
	case "RS256", "PS256", "ES256":
		return crypto.SHA256, true
	case "RS384", "PS384", "ES384":
		return crypto.SHA384, true
	case "RS512", "PS512", "ES512":
		return crypto.SHA512, true
	}
	return 0, false
}

// verifyJOSE verifies a JWS signature; the algorithm must fit the key.
func verifyJOSE(key crypto.PublicKey, alg, signed string, signature []byte) bool {
	hash, known := joseHash(alg)
	if !known {
		return false
	}
	h := hash.New()
	h.Write([]byte(signed))
	digest := h.Sum(nil)
	switch key := key.(type) {
	case *rsa.PublicKey:
		switch alg[:2] {
		case "RS":
			return rsa.VerifyPKCS1v15(key, hash, digest, signature) == nil
		case "PS":
			return rsa.VerifyPSS(key, hash, digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
	case *ecdsa.PublicKey:
		bits := key.Curve.Params().BitSize
		fits := alg == "ES256" && bits == 256 || alg == "ES384" && bits == 384 || alg == "ES512" && bits == 521
		size := (bits + 7) / 8
		if !fits || len(signature) != 2*size {
			return false
		}
		r, s := new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])
		return ecdsa.Verify(key, digest, r, s)
	}
	return false
}
