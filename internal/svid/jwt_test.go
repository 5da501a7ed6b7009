package svid

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/plastron/plastron/internal/fault"
)

func b64(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// signText signs header and claims as they are, with any of the algorithms.
func signText(t testing.TB, key crypto.Signer, alg, header, claims string) string {
	t.Helper()
	text := b64(header) + "." + b64(claims)
	return text + "." + base64.RawURLEncoding.EncodeToString(signJOSE(t, key, alg, text))
}

func signJOSE(t testing.TB, key crypto.Signer, alg, text string) []byte {
	t.Helper()
	hash, _ := joseHash(alg)
	h := hash.New()
	h.Write([]byte(text))
	digest := h.Sum(nil)
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, key, digest)
		if err != nil {
			t.Fatal(err)
		}
		size := (key.Curve.Params().BitSize + 7) / 8
		out := make([]byte, 2*size)
		r.FillBytes(out[:size])
		s.FillBytes(out[size:])
		return out
	case *rsa.PrivateKey:
		var out []byte
		var err error
		if strings.HasPrefix(alg, "PS") {
			out, err = rsa.SignPSS(rand.Reader, key, hash, digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			out, err = rsa.SignPKCS1v15(rand.Reader, key, hash, digest)
		}
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	t.Fatalf("no signature with %T", key)
	return nil
}

// TestCorpusJ holds ValidateJWT to corpus J. R10, R53.
func TestCorpusJ(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	ec, ec384, ec521, rs := newEC(t, elliptic.P256()), newEC(t, elliptic.P384()), newEC(t, elliptic.P521()), newRSA(t, 2048)
	foreign := newEC(t, elliptic.P256())
	keys := func(td spiffeid.TrustDomain, id string) (crypto.PublicKey, bool) {
		switch td.Name() + " " + id {
		case "example.org ec":
			return &ec.PublicKey, true
		case "example.org ec384":
			return &ec384.PublicKey, true
		case "example.org ec521":
			return &ec521.PublicKey, true
		case "example.org rsa":
			return &rs.PublicKey, true
		case "foreign.test ec", "foreign.test f":
			return &foreign.PublicKey, true
		case "example.org oct":
			return []byte("secret"), true
		}
		return nil, false
	}
	header := func(alg, kid string) string { return fmt.Sprintf(`{"alg":%q,"kid":%q,"typ":"JWT"}`, alg, kid) }
	claims := `{"sub":"spiffe://example.org/a","aud":["me"],"exp":1800000300,"iat":1800000000}`
	token := func(claims string) string { return signText(t, ec, "ES256", header("ES256", "ec"), claims) }
	headed := func(h string) string { return signText(t, ec, "ES256", h, claims) }
	with := func(member string) string { return token(claims[:len(claims)-1] + "," + member + "}") }
	edit := func(old, new string) string { return token(strings.Replace(claims, old, new, 1)) }
	part := func(n int, f func(string) string) string {
		parts := strings.Split(token(claims), ".")
		parts[n] = f(parts[n])
		return strings.Join(parts, ".")
	}
	// resigned is a token whose claims part is that very text.
	resigned := func(claims string) string {
		text := b64(header("ES256", "ec")) + "." + claims
		return text + "." + base64.RawURLEncoding.EncodeToString(signJOSE(t, ec, "ES256", text))
	}
	signature := func(f func(sig []byte) []byte) string {
		return part(2, func(s string) string {
			sig, err := base64.RawURLEncoding.DecodeString(s)
			if err != nil {
				t.Fatal(err)
			}
			return base64.RawURLEncoding.EncodeToString(f(sig))
		})
	}
	half := func(which int, v *big.Int) string {
		return signature(func(sig []byte) []byte { v.FillBytes(sig[32*which : 32*which+32]); return sig })
	}
	hs := func(secret []byte) string {
		text := b64(`{"alg":"HS256","kid":"rsa","typ":"JWT"}`) + "." + b64(claims)
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(text))
		return text + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
	}
	n := elliptic.P256().Params().N
	unsigned := func(alg string) string { return b64(header(alg, "ec")) + "." + b64(claims) + "." }
	list := func(n int) string { return `"` + strings.Repeat(`x","`, n-1) + `me"` }
	jwkHeader := fmt.Sprintf(`{"alg":"ES256","kid":"ec","typ":"JWT","jwk":{"kty":"EC","crv":"P-256","x":"%s","y":"%s"}}`,
		base64.RawURLEncoding.EncodeToString(foreign.X.FillBytes(make([]byte, 32))), base64.RawURLEncoding.EncodeToString(foreign.Y.FillBytes(make([]byte, 32))))
	flattened, err := json.Marshal(map[string]string{"protected": b64(header("ES256", "ec")), "payload": b64(claims), "signature": "AA"})
	if err != nil {
		t.Fatal(err)
	}

	reject := map[string]string{
		"J1 none":                         unsigned("none"),
		"J1 none with a signature":        headed(header("none", "ec")),
		"J2 None":                         unsigned("None"),
		"J2 nOnE":                         unsigned("nOnE"),
		"J2 NONE":                         unsigned("NONE"),
		"J3 HS256 with the RSA key's PEM": hs(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spkiOf(t, &rs.PublicKey)})),
		"J4 HS256 with the JWK":           hs([]byte(jwkHeader)),
		"J5 RS256 with an EC key":         signText(t, ec, "ES256", header("RS256", "ec"), claims),
		"J5 ES256 with an RSA key":        signText(t, rs, "RS256", header("ES256", "rsa"), claims),
		"J6 ES256 with a P-384 key":       signText(t, ec384, "ES256", header("ES256", "ec384"), claims),
		"J6 ES384 with a P-256 key":       signText(t, ec, "ES384", header("ES384", "ec"), claims),
		"J7 DER signature": signature(func(sig []byte) []byte {
			return mustDER(t, []*big.Int{new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])})
		}),
		"J8 r zero":                      half(0, new(big.Int)),
		"J8 s zero":                      half(1, new(big.Int)),
		"J8 both zero":                   signature(func([]byte) []byte { return make([]byte, 64) }),
		"J9 r = n":                       half(0, n),
		"J9 s = n":                       half(1, n),
		"J9 s beyond n":                  half(1, new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 256), big.NewInt(1))),
		"J10 short by one":               signature(func(sig []byte) []byte { return sig[:63] }),
		"J10 long by one":                signature(func(sig []byte) []byte { return append(sig, 0) }),
		"J11 PS256 signed as RS256":      signText(t, rs, "RS256", header("PS256", "rsa"), claims),
		"J11 RS256 signed as PS256":      signText(t, rs, "PS256", header("RS256", "rsa"), claims),
		"J12 EdDSA":                      headed(header("EdDSA", "ec")),
		"J12 ES256K":                     headed(header("ES256K", "ec")),
		"J12 RS1":                        headed(header("RS1", "ec")),
		"J12 HS512":                      headed(header("HS512", "ec")),
		"J13 alg missing":                headed(`{"kid":"ec","typ":"JWT"}`),
		"J13 alg number":                 headed(`{"alg":256,"kid":"ec"}`),
		"J13 alg array":                  headed(`{"alg":["ES256"],"kid":"ec"}`),
		"J14 kid missing":                headed(`{"alg":"ES256","typ":"JWT"}`),
		"J14 kid empty":                  headed(header("ES256", "")),
		"J14 kid number":                 headed(`{"alg":"ES256","kid":1}`),
		"J15 kid unknown":                headed(header("ES256", "nobody")),
		"J16 kid path":                   headed(header("ES256", "../../etc/passwd")),
		"J16 kid SQL":                    headed(header("ES256", "' OR 1=1 --")),
		"J16 kid of 2 KiB":               headed(header("ES256", strings.Repeat("k", 2048))),
		"J16 kid of 1 MiB":               headed(header("ES256", strings.Repeat("k", 1<<20))),
		"J17 jku":                        headed(`{"alg":"ES256","kid":"ec","jku":"https://evil.example/keys"}`),
		"J17 x5u":                        headed(`{"alg":"ES256","kid":"ec","x5u":"https://evil.example/cert"}`),
		"J18 jwk embedded":               signText(t, foreign, "ES256", jwkHeader, claims),
		"J18 x5c embedded":               headed(`{"alg":"ES256","kid":"ec","x5c":["AA=="]}`),
		"J19 crit unknown":               headed(`{"alg":"ES256","kid":"ec","crit":["x"]}`),
		"J19 crit empty":                 headed(`{"alg":"ES256","kid":"ec","crit":[]}`),
		"J20 b64":                        headed(`{"alg":"ES256","kid":"ec","b64":false}`),
		"J21 zip":                        headed(`{"alg":"ES256","kid":"ec","zip":"DEF"}`),
		"J23 typ jwt":                    headed(`{"alg":"ES256","kid":"ec","typ":"jwt"}`),
		"J23 typ at+jwt":                 headed(`{"alg":"ES256","kid":"ec","typ":"at+jwt"}`),
		"J23 J57 typ wit+jwt":            headed(`{"alg":"ES256","kid":"ec","typ":"wit+jwt"}`),
		"J23 typ number":                 headed(`{"alg":"ES256","kid":"ec","typ":1}`),
		"J23 typ null":                   headed(`{"alg":"ES256","kid":"ec","typ":null}`),
		"J24 another header":             headed(`{"alg":"ES256","kid":"ec","cty":"JWT"}`),
		"J24 header in other case":       headed(`{"alg":"ES256","kid":"ec","KID":"x"}`),
		"J24 header member twice":        headed(`{"alg":"none","alg":"ES256","kid":"ec"}`),
		"J25 flattened":                  string(flattened),
		"J25 general":                    `{"payload":"` + b64(claims) + `","signatures":[{"protected":"` + b64(header("ES256", "ec")) + `","signature":"AA"}]}`,
		"J26 two signatures":             token(claims) + "." + strings.Split(token(claims), ".")[2],
		"J27 five parts":                 "a.b.c.d.e",
		"J28 two parts":                  token(claims)[:strings.LastIndex(token(claims), ".")],
		"J28 empty middle":               part(1, func(string) string { return "" }),
		"J28 empty header":               part(0, func(string) string { return "" }),
		"J28 empty":                      "",
		"J29 exp missing":                edit(`"exp":1800000300,`, ``),
		"J30 exp past the leeway":        edit(`1800000300`, `1799999989`),
		"J31 exp string":                 edit(`1800000300`, `"1800000300"`),
		"J31 exp null":                   edit(`1800000300`, `null`),
		"J31 exp negative":               edit(`1800000300`, `-1`),
		"J31 exp 1e300":                  edit(`1800000300`, `1e300`),
		"J31 exp beyond int64":           edit(`1800000300`, `18446744073709551617`),
		"J31 exp NaN":                    edit(`1800000300`, `NaN`),
		"J31 exp .5":                     edit(`1800000300`, `1800000300.5`),
		"J32 exp in milliseconds":        edit(`1800000300`, `1800000300000`),
		"J32 exp in the year 2100":       edit(`1800000300`, `4102444800`),
		"J33 nbf ahead":                  with(`"nbf":1800000300`),
		"J33 nbf string":                 with(`"nbf":"1800000000"`),
		"J34 iat ahead":                  edit(`"iat":1800000000`, `"iat":1800000290`),
		"J34 iat string":                 edit(`"iat":1800000000`, `"iat":"1800000000"`),
		"J35 aud missing":                edit(`"aud":["me"],`, ``),
		"J35 aud null":                   edit(`["me"]`, `null`),
		"J35 aud empty":                  edit(`["me"]`, `[]`),
		"J36 aud of one empty":           edit(`["me"]`, `[""]`),
		"J36 aud with an empty":          edit(`["me"]`, `["me",""]`),
		"J37 aud number":                 edit(`["me"]`, `1`),
		"J37 aud object":                 edit(`["me"]`, `{"me":1}`),
		"J37 aud nested":                 edit(`["me"]`, `[["me"]]`),
		"J37 aud with a number":          edit(`["me"]`, `["me",1]`),
		"J38 aud case":                   edit(`"me"`, `"Me"`),
		"J38 aud prefix":                 edit(`"me"`, `"m"`),
		"J38 aud suffix":                 edit(`"me"`, `"mee"`),
		"J38 aud slash":                  edit(`"me"`, `"me/"`),
		"J40 aud of 10,000":              edit(`"me"`, list(10000)),
		"J40 aud of 1,001":               edit(`"me"`, list(1001)),
		"J41 sub missing":                edit(`"sub":"spiffe://example.org/a",`, ``),
		"J41 sub empty":                  edit(`spiffe://example.org/a`, ``),
		"J41 sub no SPIFFE ID":           edit(`spiffe://example.org/a`, `https://example.org/a`),
		"J41 sub number":                 edit(`"spiffe://example.org/a"`, `1`),
		"J41 sub S4":                     edit(`spiffe://example.org/a`, `SPIFFE://example.org/a`),
		"J41 sub S15":                    edit(`spiffe://example.org/a`, `spiffe://example.org/a/`),
		"J41 sub S42":                    edit(`spiffe://example.org/a`, `spiffe://example.org`),
		"J42 foreign sub, our key":       edit(`spiffe://example.org/a`, `spiffe://foreign.test/a`),
		"J43 our sub, federated key":     signText(t, foreign, "ES256", header("ES256", "f"), claims),
		"J43 same key id":                signText(t, foreign, "ES256", header("ES256", "ec"), claims),
		"J44 unfederated sub":            edit(`spiffe://example.org/a`, `spiffe://nowhere.test/a`),
		"J45 oct key":                    headed(header("ES256", "oct")),
		"J47 sub twice":                  with(`"sub":"spiffe://example.org/admin"`),
		"J47 aud twice":                  with(`"aud":["other"]`),
		"J47 exp twice":                  with(`"exp":1900000000`),
		"J47 sub twice, escaped":         with(`"s\u0075b":"spiffe://example.org/admin"`),
		"J48 Sub":                        with(`"Sub":"spiffe://example.org/admin"`),
		"J48 AUD":                        with(`"AUD":["other"]`),
		"J49 padding":                    part(1, func(s string) string { return s + "=" }),
		"J49 padded and signed":          resigned(base64.URLEncoding.EncodeToString([]byte(claims + " "))),
		"J49 newline inside":             part(1, func(s string) string { return s[:8] + "\n" + s[8:] }),
		"J49 newline inside, signed":     resigned(b64(claims)[:8] + "\n" + b64(claims)[8:]),
		"J49 carriage return at the end": part(2, func(s string) string { return s + "\r" }),
		"J49 standard alphabet":          resigned(base64.RawStdEncoding.EncodeToString([]byte(claims[:len(claims)-1] + `,"x":"` + "\u00ff\u00fe\u00ff???>>>" + `"}`))),
		"J50 trailing bits":              part(2, func(s string) string { return s[:len(s)-1] + nextBase64(s[len(s)-1]) }),
		"J51 claims an array":            token(`[]`),
		"J51 claims a string":            token(`"x"`),
		"J51 claims not JSON":            token(`x`),
		"J51 trailing bytes":             token(claims + `{}`),
		"J51 byte order mark":            token("\ufeff" + claims),
		"J52 depth":                      with(`"x":` + strings.Repeat("[", 4000) + strings.Repeat("]", 4000)),
		"J52 depth 100,000":              with(`"x":` + strings.Repeat("[", 100000)),
		"J53 invalid UTF-8":              with("\"x\":\"\xff\""),
		"J53 lone surrogate":             with(`"x":"\ud800"`),
		"J53 NUL in sub":                 edit(`spiffe://example.org/a`, `spiffe://example.org/a\u0000`),
		"J54 16 KiB and a byte":          strings.Repeat("a", MaxJWT+1),
		"J54 10 MiB":                     strings.Repeat("a", 10<<20),
		"J55 1e400":                      with(`"x":1e400`),
		"J55 long integer":               with(`"x":` + strings.Repeat("1", 9000)),
		"J55 long integer, deep":         with(`"x":[{"y":1e999}]`),
		"changed after signing":          part(1, func(string) string { return b64(strings.Replace(claims, "/a", "/b", 1)) }),
	}
	for name, text := range reject {
		t.Run(name, func(t *testing.T) {
			c, err := ValidateJWT(text, []string{"me"}, keys, now)
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("ValidateJWT() = %v, %v; want invalid", c, err)
			}
			for _, p := range strings.Split(text, ".") {
				if len(p) > 20 && strings.Contains(err.Error(), p[:20]) {
					t.Errorf("the error quotes the token: %v", err)
				}
			}
		})
	}
	accept := map[string]string{
		"plain":                          token(claims),
		"J22 typ JOSE":                   headed(`{"alg":"ES256","kid":"ec","typ":"JOSE"}`),
		"J22 no typ":                     headed(`{"alg":"ES256","kid":"ec"}`),
		"J30 exp within the leeway":      edit(`1800000300`, `1799999991`),
		"J33 nbf within the leeway":      with(`"nbf":1800000009`),
		"J34 iat within the leeway":      edit(`"iat":1800000000`, `"iat":1800000009`),
		"no iat":                         edit(`,"iat":1800000000`, ``),
		"J39 third of 50":                edit(`"me"`, `"x","y","me"`+strings.Repeat(`,"z"`, 47)),
		"aud a string (T-JWT-1)":         edit(`["me"]`, `"me"`),
		"ES384":                          signText(t, ec384, "ES384", header("ES384", "ec384"), claims),
		"ES512":                          signText(t, ec521, "ES512", header("ES512", "ec521"), claims),
		"RS256":                          signText(t, rs, "RS256", header("RS256", "rsa"), claims),
		"RS384":                          signText(t, rs, "RS384", header("RS384", "rsa"), claims),
		"RS512":                          signText(t, rs, "RS512", header("RS512", "rsa"), claims),
		"PS256":                          signText(t, rs, "PS256", header("PS256", "rsa"), claims),
		"PS384":                          signText(t, rs, "PS384", header("PS384", "rsa"), claims),
		"PS512":                          signText(t, rs, "PS512", header("PS512", "rsa"), claims),
		"other claims":                   with(`"https://example.org/env":{"n":1,"f":1.5,"l":[true,null]}`),
		"foreign sub, foreign key":       signText(t, foreign, "ES256", header("ES256", "f"), strings.Replace(claims, "example.org", "foreign.test", 1)),
		"white space in JSON (RFC 8259)": token(" " + strings.ReplaceAll(claims, ",", " ,\n")),
	}
	for name, text := range accept {
		t.Run(name, func(t *testing.T) {
			c, err := ValidateJWT(text, []string{"me"}, keys, now)
			if err != nil {
				t.Fatal(err)
			}
			if c.ID.Path() != "/a" || c.Expiry.IsZero() || c.All["sub"] != c.ID.String() {
				t.Errorf("claims %+v", c)
			}
		})
	}
	t.Run("numbers", func(t *testing.T) {
		c, err := ValidateJWT(with(`"i":9007199254740993,"f":1.5,"e":1e3`), []string{"me"}, keys, now)
		if err != nil || c.All["i"] != int64(9007199254740993) || c.All["f"] != 1.5 || c.All["e"] != 1000.0 {
			t.Errorf("claims %v, %v", c.All, err)
		}
	})
	t.Run("no audience to validate for", func(t *testing.T) {
		for _, audience := range [][]string{nil, {}, {""}, {"me", ""}} {
			if _, err := ValidateJWT(token(claims), audience, keys, now); fault.ReasonOf(err) != "audience_missing" {
				t.Errorf("ValidateJWT(%q) = %v", audience, err)
			}
		}
	})
	t.Run("J15 J17 asks for no key before the header is sound", func(t *testing.T) {
		ValidateJWT(reject["J17 jku"], []string{"me"}, func(spiffeid.TrustDomain, string) (crypto.PublicKey, bool) {
			t.Error("a key was looked for")
			return nil, false
		}, now)
	})
	t.Run("J59 bundle has become empty", func(t *testing.T) {
		none := func(spiffeid.TrustDomain, string) (crypto.PublicKey, bool) { return nil, false }
		if _, err := ValidateJWT(token(claims), []string{"me"}, none, now); fault.ReasonOf(err) != "jwt_key_unknown" {
			t.Errorf("ValidateJWT() = %v", err)
		}
	})
}

// nextBase64 is the character whose value differs in the last bit only, which a
// signature of 64 bytes does not use.
func nextBase64(c byte) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return alphabet[strings.IndexByte(alphabet, c)^1:][:1]
}

// What is issued has the one form that R10 lets it have, and others accept it.
func TestIssueJWT(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		key crypto.Signer
		alg string
	}{"P-256": {newEC(t, elliptic.P256()), "ES256"}, "P-384": {newEC(t, elliptic.P384()), "ES384"}, "RSA": {newRSA(t, 2048), "RS256"}} {
		t.Run(name, func(t *testing.T) {
			issuer, err := NewJWTIssuer("key-1", c.key, now.Add(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			id := spiffeid.RequireFromString("spiffe://example.org/a")
			jwt := JWT{ID: id, Audience: []string{`a"<b>`, "é"}, IssuedAt: now, ExpiresAt: now.Add(5 * time.Minute), JTI: "j", Issuer: "https://issuer"}
			p, err := issuer.Prepare(jwt)
			if err != nil {
				t.Fatal(err)
			}
			token, err := p.Issue()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Issue(); fault.ReasonOf(err) != "already_issued" {
				t.Errorf("second Issue() = %v", err)
			}
			parts := strings.Split(token, ".")
			head, err := base64.RawURLEncoding.DecodeString(parts[0])
			if want := `{"alg":"` + c.alg + `","kid":"key-1","typ":"JWT"}`; err != nil || string(head) != want {
				t.Errorf("header %s, want %s", head, want)
			}
			body, err := base64.RawURLEncoding.DecodeString(parts[1])
			if err != nil {
				t.Fatal(err)
			}
			var got map[string]any
			if err := json.Unmarshal(body, &got); err != nil {
				t.Fatal(err)
			}
			want := map[string]any{"sub": id.String(), "aud": []any{`a"<b>`, "é"}, "exp": float64(jwt.ExpiresAt.Unix()), "iat": float64(now.Unix()), "jti": "j", "iss": "https://issuer"}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("claims %v, want %v", got, want)
			}
			if bytes.ContainsAny(body, "eE+") && strings.Contains(string(body), `e+`) {
				t.Errorf("exponent in %s (T-JWT-5)", body)
			}
			claims, err := ValidateJWT(token, []string{"é"}, func(td spiffeid.TrustDomain, kid string) (crypto.PublicKey, bool) {
				return c.key.Public(), td == id.TrustDomain() && kid == "key-1"
			}, now)
			if err != nil || claims.ID != id || !claims.Expiry.Equal(p.ExpiresAt()) {
				t.Errorf("ValidateJWT() = %+v, %v", claims, err)
			}
			bundle := jwtbundle.FromJWTAuthorities(id.TrustDomain(), map[string]crypto.PublicKey{"key-1": c.key.Public()})
			if parsed, err := jwtsvid.ParseAndValidate(token, bundle, []string{"é"}); err != nil || parsed.ID != id {
				t.Errorf("go-spiffe: %v, %v", parsed, err)
			}
		})
	}
}

// R10: a token ends with its key, and no token is made that is none.
func TestPrepareJWT(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	issuer, err := NewJWTIssuer("key-1", newEC(t, elliptic.P256()), now.Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	good := JWT{ID: spiffeid.RequireFromString("spiffe://example.org/a"), Audience: []string{"x"}, IssuedAt: now, ExpiresAt: now.Add(time.Hour)}
	p, err := issuer.Prepare(good)
	if err != nil || !p.ExpiresAt().Equal(now.Add(time.Minute)) {
		t.Errorf("Prepare() ends %v, %v; want the key's end", p.ExpiresAt(), err)
	}
	for name, edit := range map[string]func(j *JWT){
		"audience_missing":   func(j *JWT) { j.Audience = nil },
		"audience_invalid":   func(j *JWT) { j.Audience = []string{"x", ""} },
		"audience_too_large": func(j *JWT) { j.Audience = []string{strings.Repeat("x", MaxJWT)} },
		"spiffe_id_no_path":  func(j *JWT) { j.ID = spiffeid.RequireFromString("spiffe://example.org") },
		"claim_invalid":      func(j *JWT) { j.Issuer = "\xff" },
		"lifetime_empty":     func(j *JWT) { j.ExpiresAt = j.IssuedAt },
	} {
		j := good
		edit(&j)
		if _, err := issuer.Prepare(j); fault.ReasonOf(err) != name {
			t.Errorf("Prepare() = %v, want %s", err, name)
		}
	}
	if _, err := NewJWTIssuer("", newEC(t, elliptic.P256()), now); err == nil {
		t.Error("an issuer without a key id")
	}
	if _, err := NewJWTIssuer("k", newEC(t, elliptic.P521()), now); err == nil {
		t.Error("an issuer with P-521")
	}
	// A key whose signatures are malformed is noticed before the token leaves (R5).
	broken, err := NewJWTIssuer("k", brokenSigner{newEC(t, elliptic.P256())}, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if p, err = broken.Prepare(good); err != nil {
		t.Fatal(err)
	}
	if token, err := p.Issue(); err == nil {
		t.Errorf("Issue() = %s", hex.EncodeToString([]byte(token)))
	}
}

type brokenSigner struct{ crypto.Signer }

func (brokenSigner) Sign(_ io.Reader, _ []byte, _ crypto.SignerOpts) ([]byte, error) {
	return []byte{0x30, 6, 2, 1, 0, 2, 1, 1}, nil
}
