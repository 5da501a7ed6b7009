package kube_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
)

// publish lets anybody read the issuer's keys, as it is done for issuers outside
// of the API server, and returns the file with the CA.
func publish(t *testing.T, api *kubeapi.Server) string {
	t.Helper()
	api.Grant("system:unauthenticated", kubeapi.Rule{Verbs: []string{"get"}, URLs: []string{"/.well-known/openid-configuration", "/openid/v1/jwks"}})
	return file(t, api.CAPEM)
}

func file(t testing.TB, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func openIssuer(t testing.TB, c kube.IssuerConfig) *kube.Issuer {
	t.Helper()
	i, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestIssuer(t *testing.T) {
	api, pod := cluster(t)
	ca := publish(t, api)
	token := api.Token(pod, kubeapi.TokenOptions{Audience: audience})
	for name, c := range map[string]kube.IssuerConfig{
		"discovery": {Issuer: api.URL, CAFile: ca},
		"URI":       {Issuer: api.URL, JWKSURI: api.URL + "/openid/v1/jwks", CAFile: ca},
		"file":      {Issuer: api.URL, JWKSFile: file(t, api.JWKS())},
	} {
		t.Run(name, func(t *testing.T) {
			i := openIssuer(t, c)
			b, err := i.Verify(t.Context(), token, []string{"other", audience})
			want := kube.Bearer{Namespace: "spire", ServiceAccount: "spire-agent", Pod: kube.Object{Name: "agent-x", UID: pod.Meta.UID}, Node: b.Node}
			if err != nil || b != want || b.Node.Name != "node-1" || b.Node.UID == "" {
				t.Errorf("Verify() = %+v, %v", b, err)
			}
			b, err = i.Verify(t.Context(), api.Token(pod, kubeapi.TokenOptions{Audience: audience, NoNode: true}), []string{audience})
			if err != nil || b.Node != (kube.Object{}) {
				t.Errorf("without a node: Verify() = %+v, %v", b, err)
			}
		})
	}
}

func TestIssuerIsSomebodyElse(t *testing.T) {
	api, pod := cluster(t)
	ca := publish(t, api)
	token := api.Token(pod, kubeapi.TokenOptions{Audience: audience})
	other := kubeapi.New(t)
	answer := func(body string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasPrefix(r.URL.Path, "/.well-known") {
				return false
			}
			fmt.Fprint(w, body)
			return true
		}
	}
	for name, c := range map[string]struct {
		config    kube.IssuerConfig
		intercept func(http.ResponseWriter, *http.Request) bool
		word      string
	}{
		"another CA":           {kube.IssuerConfig{Issuer: api.URL, CAFile: file(t, other.CAPEM)}, nil, "certificate"}, // claim 18
		"the system's CAs":     {kube.IssuerConfig{Issuer: api.URL}, nil, "certificate"},
		"not public":           {kube.IssuerConfig{Issuer: api.URL, CAFile: ca, JWKSURI: api.URL + "/api/v1/namespaces/spire/pods/agent-x"}, nil, "403"},
		"discovery of another": {kube.IssuerConfig{Issuer: api.URL, CAFile: ca}, answer(`{"issuer":"https://x","jwks_uri":"` + api.URL + `/openid/v1/jwks"}`), "another issuer"},
		"discovery twice":      {kube.IssuerConfig{Issuer: api.URL, CAFile: ca}, answer(`{"issuer":"` + api.URL + `","issuer":"https://x"}`), "twice"},
		"plain http in it":     {kube.IssuerConfig{Issuer: api.URL, CAFile: ca}, answer(`{"issuer":"` + api.URL + `","jwks_uri":"http://127.0.0.1/"}`), "https"},
		"a redirect": {kube.IssuerConfig{Issuer: api.URL, CAFile: ca}, func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "/x", http.StatusFound)
			return true
		}, "302"},
		"an answer without end":  {kube.IssuerConfig{Issuer: api.URL, CAFile: ca}, answer(`{"issuer":"` + strings.Repeat("x", 2<<20)), "larger"},
		"keys that are not JSON": {kube.IssuerConfig{Issuer: api.URL, CAFile: ca, JWKSURI: api.URL + "/.well-known/x"}, answer("<html>"), "JWK set"},
		"a private key":          {kube.IssuerConfig{Issuer: api.URL, CAFile: ca, JWKSURI: api.URL + "/.well-known/x"}, answer(`{"keys":[{"kty":"EC","kid":"a","d":"x"}]}`), "private"},
		"no key of use":          {kube.IssuerConfig{Issuer: api.URL, CAFile: ca, JWKSURI: api.URL + "/.well-known/x"}, answer(`{"keys":[{"kty":"oct","kid":"a","k":"x"}]}`), "no key"},
	} {
		t.Run(name, func(t *testing.T) {
			api.Intercept(c.intercept)
			_, err := openIssuer(t, c.config).Verify(t.Context(), token, []string{audience})
			wantKind(t, err, fault.Unavailable, c.word)
			if strings.Contains(err.Error(), token[:20]) {
				t.Error("the error tells the token") // R104
			}
		})
	}
}

func TestIssuerConfig(t *testing.T) {
	keys := file(t, []byte("{}"))
	for name, c := range map[string]struct {
		config kube.IssuerConfig
		want   fault.Kind
	}{
		"no issuer":           {kube.IssuerConfig{JWKSFile: keys}, fault.Invalid},
		"file and URI":        {kube.IssuerConfig{Issuer: "x", JWKSFile: keys, JWKSURI: "https://x"}, fault.Invalid},
		"plain http":          {kube.IssuerConfig{Issuer: "x", JWKSURI: "http://x"}, fault.Invalid},
		"a name to discover":  {kube.IssuerConfig{Issuer: "kubernetes/serviceaccount"}, fault.Invalid},
		"a password":          {kube.IssuerConfig{Issuer: "https://a:b@c"}, fault.Invalid},
		"a file without keys": {kube.IssuerConfig{Issuer: "x", JWKSFile: keys}, fault.Precondition},
		"no file":             {kube.IssuerConfig{Issuer: "x", JWKSFile: keys + "x"}, fault.Precondition},
		"no CA":               {kube.IssuerConfig{Issuer: "https://x", CAFile: keys}, fault.Precondition},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.config.Open()
			wantKind(t, err, c.want)
		})
	}
}

// badTokens are tokens that no way of verification may take, by the id of their
// row in the corpus of bad inputs.
func badTokens(t testing.TB, api *kubeapi.Server, pod kube.Pod) map[string]string {
	edit := func(f func(claims, private map[string]any)) string {
		c := api.Claims(pod, kubeapi.TokenOptions{Audience: audience})
		private := maps.Clone(c["kubernetes.io"].(map[string]any))
		c["kubernetes.io"] = private
		f(c, private)
		return api.Sign(c)
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
	good := api.Token(pod, kubeapi.TokenOptions{Audience: audience})
	parts := strings.Split(good, ".")
	header := func(h string) string { return base64.RawURLEncoding.EncodeToString([]byte(h)) }
	raw, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil {
		t.Fatal(err)
	}
	hs := header(strings.Replace(string(raw), "RS256", "HS256", 1)) + "." + parts[1]
	mac := hmac.New(sha256.New, api.JWKS())
	mac.Write([]byte(hs))
	now := time.Now()
	type object = map[string]any
	return map[string]string{
		"A18 wrong audience":               api.Token(pod, kubeapi.TokenOptions{Audience: "other"}),
		"A18 audience that extends it":     api.Token(pod, kubeapi.TokenOptions{Audience: audience + "x"}),
		"A18 the API server's audience":    api.Token(pod, kubeapi.TokenOptions{Audience: kubeapi.Audience}),
		"A18 no audience":                  set("aud", nil),
		"A18 empty audience":               set("aud", []string{}),
		"A18 an audience that is no text":  set("aud", []any{1}),
		"A18 expired":                      api.Token(pod, kubeapi.TokenOptions{Audience: audience, Lifetime: -11 * time.Second}),
		"A18 no expiry":                    set("exp", nil),
		"A18 expiry as text":               set("exp", "9999999999"),
		"A18 expiry in milliseconds":       set("exp", now.Add(time.Hour).UnixMilli()*1000),
		"A18 expiry as float":              set("exp", json.Number("1e15")),
		"A18 not valid yet":                set("nbf", now.Add(time.Minute).Unix()),
		"A18 other issuer":                 set("iss", "https://other"),
		"A18 issuer that extends it":       set("iss", api.Issuer+"/"),
		"A18 no issuer":                    set("iss", nil),
		"A18 alg none":                     header(`{"alg":"none"}`) + "." + parts[1] + ".",
		"A18 alg none with a key":          header(strings.Replace(string(raw), "RS256", "none", 1)) + "." + parts[1] + "." + parts[2],
		"A18 HS256 with the public key":    hs + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil)),
		"A18 RS512 with another's name":    header(strings.Replace(string(raw), "RS256", "RS512", 1)) + "." + parts[1] + "." + parts[2],
		"A18 unknown key":                  header(`{"alg":"RS256","kid":"x"}`) + "." + parts[1] + "." + parts[2],
		"A18 a key in the header":          header(`{"alg":"RS256","kid":"x","jwk":{}}`) + "." + parts[1] + "." + parts[2],
		"A18 signature changed":            good[:len(good)-8] + "AAAAAAAA",
		"A18 no signature":                 parts[0] + "." + parts[1] + ".",
		"A18 claims changed":               parts[0] + "." + strings.Split(set("x", "y"), ".")[1] + "." + parts[2],
		"A18 five parts":                   good + ".x.x",
		"A18 16 KiB and more":              set("x", strings.Repeat("x", 16<<10)),
		"A18 no JWT":                       "token",
		"A18 legacy":                       api.Sign(object{"iss": "kubernetes/serviceaccount", "sub": "system:serviceaccount:spire:spire-agent", "kubernetes.io/serviceaccount/namespace": "spire"}),
		"A18 legacy with good claims":      set("kubernetes.io", nil),
		"A18 not bound to a pod":           inside("pod", nil),
		"A18 bound to a secret":            edit(func(_, p map[string]any) { delete(p, "pod"); p["secret"] = object{"name": "a", "uid": "b"} }),
		"A18 a pod without UID":            inside("pod", object{"name": "agent-x"}),
		"A18 a pod that is no object":      inside("pod", "agent-x"),
		"A18 UID with a slash":             inside("pod", object{"name": "agent-x", "uid": "a/b"}),
		"A18 UID with dots":                inside("pod", object{"name": "agent-x", "uid": ".."}),
		"A18 node UID with a slash":        inside("node", object{"name": "node-1", "uid": "a/../b"}),
		"A18 node without UID":             inside("node", object{"name": "node-1"}),
		"A18 node that is empty":           inside("node", object{}),
		"A18 subject of another namespace": set("sub", "system:serviceaccount:default:spire-agent"),
		"A18 subject of another account":   set("sub", "system:serviceaccount:spire:other"),
		"A18 subject of a user":            set("sub", "admin"),
		"A18 subject with a colon more":    set("sub", "system:serviceaccount:spire:spire-agent:x"),
		"A18 no subject":                   set("sub", nil),
		"A18 account of another name":      inside("serviceaccount", object{"name": "other", "uid": "x"}),
		"A18 account of another namespace": inside("namespace", "default"),
		"A18 namespace with dots": edit(func(c, p map[string]any) {
			p["namespace"] = "../x"
			c["sub"] = "system:serviceaccount:../x:spire-agent"
		}),
	}
}

func TestCorpusATokens(t *testing.T) {
	api, pod := cluster(t)
	i := openIssuer(t, kube.IssuerConfig{Issuer: api.URL, JWKSFile: file(t, api.JWKS())})
	another := kubeapi.New(t)
	another.Issuer = api.URL
	tokens := badTokens(t, api, pod)
	tokens["A18 of a cluster that calls itself the same"] = another.Sign(api.Claims(pod, kubeapi.TokenOptions{Audience: audience}))
	for name, token := range tokens {
		t.Run(name, func(t *testing.T) {
			b, err := i.Verify(t.Context(), token, []string{audience})
			if err == nil {
				t.Fatalf("Verify() = %+v, want a refusal", b)
			}
			if k := fault.KindOf(err); k != fault.Denied && k != fault.Invalid {
				t.Errorf("Verify() = %v (%v)", err, k)
			}
			if len(token) > 30 && strings.Contains(err.Error(), token[len(token)-20:]) {
				t.Error("the error tells the token") // R104
			}
		})
	}
}

// Keys of an issuer that rotates them are found by the token that has a new one.
func TestIssuerRotation(t *testing.T) {
	api, pod := cluster(t)
	path := file(t, api.JWKS())
	i := openIssuer(t, kube.IssuerConfig{Issuer: api.URL, JWKSFile: path})
	api.RotateKey()
	if err := os.WriteFile(path, api.JWKS(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Verify(t.Context(), api.Token(pod, kubeapi.TokenOptions{Audience: audience}), []string{audience}); err != nil {
		t.Error(err)
	}
}

func FuzzToken(f *testing.F) {
	api := kubeapi.New(f)
	api.AddNode("node-1", nil)
	pod := api.AddPod(kubeapi.Pod{Namespace: "spire", Name: "agent-x", ServiceAccount: "spire-agent", Node: "node-1"})
	i := openIssuer(f, kube.IssuerConfig{Issuer: api.URL, JWKSFile: file(f, api.JWKS())})
	claims, err := json.Marshal(api.Claims(pod, kubeapi.TokenOptions{Audience: audience}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(claims)
	f.Add([]byte(`{"aud":"spire-server","exp":4102444800,"nbf":1,"sub":"system:serviceaccount:a:b","kubernetes.io":{"namespace":"a","pod":{"name":"p","uid":"u"},"serviceaccount":{"name":"b","uid":"u"},"node":null}}`))
	f.Fuzz(func(t *testing.T, claims []byte) {
		// What is read of the claims holds whoever signed them.
		unsigned := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","kid":"x"}`)) + "." + base64.RawURLEncoding.EncodeToString(claims) + ".AAAA"
		b, err := kube.Inspect(unsigned, []string{audience})
		if err == nil {
			for _, s := range []string{b.Namespace, b.ServiceAccount, b.Pod.Name, b.Pod.UID, b.Node.Name, b.Node.UID} {
				if strings.ContainsAny(s, "/:%\\ \n\x00") || strings.Trim(s, ".") != s {
					t.Errorf("%q is read as %+v", claims, b)
				}
			}
		}
		if b, err := i.Verify(t.Context(), unsigned, []string{audience}); err == nil {
			t.Errorf("Verify() = %+v without a signature", b)
		}
	})
}
