package svid

import (
	"crypto"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"strconv"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/plastron/plastron/internal/fault"
)

// MaxJWT is the size in bytes above which a token is neither made nor read.
const MaxJWT = 16 << 10

// JWTIssuer signs JWT-SVIDs with one key. It may be used concurrently.
type JWTIssuer struct {
	signer   crypto.Signer
	scheme   scheme
	keyID    string
	header   string // encoded, with the dot
	notAfter time.Time
}

// JWT is what a JWT-SVID shall say.
type JWT struct {
	ID        spiffeid.ID
	Audience  []string
	IssuedAt  time.Time
	ExpiresAt time.Time
	JTI       string // optional
	Issuer    string // optional
}

// PreparedJWT is a checked token that can be signed once.
type PreparedJWT struct {
	issuer *JWTIssuer
	jwt    JWT // as capped by the issuer
	text   string
	used   atomic.Bool
}

// NewJWTIssuer makes an issuer of tokens for a key that ends at notAfter.
func NewJWTIssuer(keyID string, signer crypto.Signer, notAfter time.Time) (*JWTIssuer, error) {
	scheme, err := schemeOf(signer.Public())
	if err != nil {
		return nil, err
	}
	if keyID == "" || len(keyID) > maxKeyID || !utf8.ValidString(keyID) {
		return nil, fault.New(fault.Invalid, "key_id_invalid", "a JWT key needs a key id of 1 to %d bytes", maxKeyID)
	}
	header := `{"alg":"` + scheme.jose + `","kid":` + quote(keyID) + `,"typ":"JWT"}`
	return &JWTIssuer{
		signer: signer, scheme: scheme, keyID: keyID, notAfter: notAfter,
		header: base64.RawURLEncoding.EncodeToString([]byte(header)) + ".",
	}, nil
}

// NotAfter is when the key ends.
func (i *JWTIssuer) NotAfter() time.Time { return i.notAfter }

// KeyID is the kid of the tokens.
func (i *JWTIssuer) KeyID() string { return i.keyID }

// Prepare checks what a token shall say and cuts its end to the key's (R10).
func (i *JWTIssuer) Prepare(jwt JWT) (*PreparedJWT, error) {
	if err := checkID(jwt.ID); err != nil {
		return nil, err
	}
	if len(jwt.Audience) == 0 {
		return nil, fault.New(fault.Invalid, "audience_missing", "a JWT-SVID needs an audience")
	}
	for _, a := range jwt.Audience {
		if a == "" || !utf8.ValidString(a) {
			return nil, fault.New(fault.Invalid, "audience_invalid", "an audience is empty or not UTF-8")
		}
	}
	if !utf8.ValidString(jwt.Issuer) || !utf8.ValidString(jwt.JTI) {
		return nil, fault.New(fault.Invalid, "claim_invalid", "a claim is not UTF-8")
	}
	if jwt.ExpiresAt.After(i.notAfter) {
		jwt.ExpiresAt = i.notAfter
	}
	// Whole seconds, so that what is reported is what the token says.
	jwt.IssuedAt, jwt.ExpiresAt = jwt.IssuedAt.UTC().Truncate(time.Second), jwt.ExpiresAt.UTC().Truncate(time.Second)
	if jwt.IssuedAt.Unix() <= 0 || !jwt.IssuedAt.Before(jwt.ExpiresAt) {
		return nil, fault.New(fault.Unavailable, "lifetime_empty", "the token would end before it begins").
			Fix("the signing key may be at its end: retry, and check the server's clock")
	}
	claims := jwt.claims()
	text := i.header + base64.RawURLEncoding.EncodeToString(claims)
	if len(text)+1+base64.RawURLEncoding.EncodedLen(512) > MaxJWT {
		return nil, fault.New(fault.Invalid, "audience_too_large", "the token would be larger than %d bytes", MaxJWT).
			Fix("ask for fewer or shorter audiences")
	}
	return &PreparedJWT{issuer: i, jwt: jwt, text: text}, nil
}

// claims writes the claims as JSON, times as integers.
func (j *JWT) claims() []byte {
	b := append(make([]byte, 0, 256), `{"aud":[`...)
	for n, a := range j.Audience {
		if n > 0 {
			b = append(b, ',')
		}
		b = append(b, quote(a)...)
	}
	b = append(b, `],"exp":`...)
	b = strconv.AppendInt(b, j.ExpiresAt.Unix(), 10)
	b = append(b, `,"iat":`...)
	b = strconv.AppendInt(b, j.IssuedAt.Unix(), 10)
	if j.Issuer != "" {
		b = append(append(b, `,"iss":`...), quote(j.Issuer)...)
	}
	if j.JTI != "" {
		b = append(append(b, `,"jti":`...), quote(j.JTI)...)
	}
	b = append(append(b, `,"sub":`...), quote(j.ID.String())...)
	return append(b, '}')
}

// quote writes a JSON string.
func quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(fmt.Sprintf("svid: JSON of a string: %v", err)) // cannot happen
	}
	return string(b)
}

// ExpiresAt is the end that the token will have.
func (p *PreparedJWT) ExpiresAt() time.Time { return p.jwt.ExpiresAt }

// Issue signs. It works once.
func (p *PreparedJWT) Issue() (string, error) {
	if p.used.Swap(true) {
		return "", fault.New(fault.Precondition, "already_issued", "a prepared token can be signed only once")
	}
	signature, err := p.issuer.scheme.sign(p.issuer.signer, []byte(p.text))
	if err != nil {
		return "", err
	}
	if size := p.issuer.scheme.size; size > 0 {
		if signature, err = joseSignature(signature, size); err != nil {
			return "", err
		}
	}
	token := p.text + "." + base64.RawURLEncoding.EncodeToString(signature)
	if err := p.reread(token); err != nil {
		return "", err
	}
	return token, nil
}

// reread parses the token by the path that verifies others' and compares it
// with what was prepared; the signature is not verified again.
func (p *PreparedJWT) reread(token string) error {
	t, err := splitJWT(token)
	if err != nil {
		return fault.New(fault.Internal, "issue_unsound", "the signed token cannot be read").Because(err)
	}
	claims, err := readClaims(t.claims)
	if err != nil {
		return fault.New(fault.Internal, "issue_unsound", "the signed token cannot be read").Because(err)
	}
	if t.alg != p.issuer.scheme.jose || t.keyID != p.issuer.keyID || claims.ID != p.jwt.ID ||
		!claims.Expiry.Equal(p.jwt.ExpiresAt) || !claims.IssuedAt.Equal(p.jwt.IssuedAt) || len(claims.Audience) != len(p.jwt.Audience) {
		return fault.New(fault.Internal, "issue_unsound", "the signed token is not what was prepared")
	}
	return nil
}

// joseSignature turns an ASN.1 ECDSA signature into r and s of fixed size (RFC
// 7518 section 3.4).
func joseSignature(der []byte, size int) ([]byte, error) {
	in := cryptobyte.String(der)
	var seq cryptobyte.String
	var r, s big.Int
	if !in.ReadASN1(&seq, asn1.SEQUENCE) || !in.Empty() || !seq.ReadASN1Integer(&r) || !seq.ReadASN1Integer(&s) || !seq.Empty() ||
		r.Sign() <= 0 || s.Sign() <= 0 || r.BitLen() > 8*size || s.BitLen() > 8*size {
		return nil, fault.New(fault.Internal, "issue_unsound", "the authority's key made a malformed signature")
	}
	out := make([]byte, 2*size)
	r.FillBytes(out[:size])
	s.FillBytes(out[size:])
	return out, nil
}
