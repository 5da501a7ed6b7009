package kubeapi

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/kube"
)

// BadTokens are tokens that nobody may take who expects one of the pod for the
// audience, by the id of their row in the corpus of bad inputs.
func (s *Server) BadTokens(pod kube.Pod, audience string) map[string]string {
	s.t.Helper()
	edit := func(f func(claims, private map[string]any)) string {
		c := s.Claims(pod, TokenOptions{Audience: audience})
		private := maps.Clone(c["kubernetes.io"].(map[string]any))
		c["kubernetes.io"] = private
		f(c, private)
		return s.Sign(c)
	}
	set := func(name string, v any) string {
		return edit(func(c, _ map[string]any) {
			if c[name] = v; v == nil {
				delete(c, name)
			}
		})
	}
	inside := func(name string, v any) string {
		return edit(func(_, p map[string]any) {
			if p[name] = v; v == nil {
				delete(p, name)
			}
		})
	}
	good := s.Token(pod, TokenOptions{Audience: audience})
	parts := strings.Split(good, ".")
	encodeText := func(h string) string { return base64.RawURLEncoding.EncodeToString([]byte(h)) }
	raw, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil {
		s.t.Fatal(err)
	}
	hs := encodeText(strings.Replace(string(raw), "RS256", "HS256", 1)) + "." + parts[1]
	mac := hmac.New(sha256.New, s.JWKS())
	mac.Write([]byte(hs))
	now := time.Now()
	type claims = map[string]any
	return map[string]string{
		"A18 wrong audience":               s.Token(pod, TokenOptions{Audience: "other"}),
		"A18 audience that extends it":     s.Token(pod, TokenOptions{Audience: audience + "x"}),
		"A18 the API server's audience":    s.Token(pod, TokenOptions{Audience: Audience}),
		"A18 no audience":                  set("aud", nil),
		"A18 empty audience":               set("aud", []string{}),
		"A18 an audience that is no text":  set("aud", []any{1}),
		"A18 expired":                      s.Token(pod, TokenOptions{Audience: audience, Lifetime: -11 * time.Second}),
		"A18 no expiry":                    set("exp", nil),
		"A18 expiry as text":               set("exp", "9999999999"),
		"A18 expiry in milliseconds":       set("exp", now.Add(time.Hour).UnixMilli()*1000),
		"A18 expiry as float":              set("exp", json.Number("1e15")),
		"A18 not valid yet":                set("nbf", now.Add(30*time.Minute).Unix()),
		"A18 other issuer":                 set("iss", "https://other"),
		"A18 issuer that extends it":       set("iss", s.Issuer+"/"),
		"A18 no issuer":                    set("iss", nil),
		"A18 alg none":                     encodeText(`{"alg":"none"}`) + "." + parts[1] + ".",
		"A18 alg none with a key":          encodeText(strings.Replace(string(raw), "RS256", "none", 1)) + "." + parts[1] + "." + parts[2],
		"A18 HS256 with the public key":    hs + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil)),
		"A18 RS512 with another's name":    encodeText(strings.Replace(string(raw), "RS256", "RS512", 1)) + "." + parts[1] + "." + parts[2],
		"A18 unknown key":                  encodeText(`{"alg":"RS256","kid":"x"}`) + "." + parts[1] + "." + parts[2],
		"A18 a key in the header":          encodeText(`{"alg":"RS256","kid":"x","jwk":{}}`) + "." + parts[1] + "." + parts[2],
		"A18 signature changed":            good[:len(good)-8] + "AAAAAAAA",
		"A18 no signature":                 parts[0] + "." + parts[1] + ".",
		"A18 claims changed":               parts[0] + "." + strings.Split(set("x", "y"), ".")[1] + "." + parts[2],
		"A18 five parts":                   good + ".x.x",
		"A18 16 KiB and more":              set("x", strings.Repeat("x", 16<<10)),
		"A18 no JWT":                       "token",
		"A18 legacy":                       s.Sign(claims{"iss": "kubernetes/serviceaccount", "sub": "system:serviceaccount:spire:spire-agent", "kubernetes.io/serviceaccount/namespace": "spire"}),
		"A18 legacy with good claims":      set("kubernetes.io", nil),
		"A18 not bound to a pod":           inside("pod", nil),
		"A18 bound to a secret":            edit(func(_, p map[string]any) { delete(p, "pod"); p["secret"] = claims{"name": "a", "uid": "b"} }),
		"A18 a pod without UID":            inside("pod", claims{"name": "agent-x"}),
		"A18 a pod that is no object":      inside("pod", "agent-x"),
		"A18 UID with a slash":             inside("pod", claims{"name": "agent-x", "uid": "a/b"}),
		"A18 UID with dots":                inside("pod", claims{"name": "agent-x", "uid": ".."}),
		"A18 node UID with a slash":        inside("node", claims{"name": "node-1", "uid": "a/../b"}),
		"A18 node without UID":             inside("node", claims{"name": "node-1"}),
		"A18 node that is empty":           inside("node", claims{}),
		"A18 subject of another namespace": set("sub", "system:serviceaccount:default:spire-agent"),
		"A18 subject of another account":   set("sub", "system:serviceaccount:spire:other"),
		"A18 subject of a user":            set("sub", "admin"),
		"A18 subject with a colon more":    set("sub", "system:serviceaccount:spire:spire-agent:x"),
		"A18 no subject":                   set("sub", nil),
		"A18 account of another name":      inside("serviceaccount", claims{"name": "other", "uid": "x"}),
		"A18 account of another namespace": inside("namespace", "default"),
		"A18 namespace with dots": edit(func(c, p map[string]any) {
			p["namespace"] = "../x"
			c["sub"] = "system:serviceaccount:../x:spire-agent"
		}),
	}
}
