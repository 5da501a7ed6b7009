package kube_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

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

// R25, by "claims changed" and "signature changed" among others.
func TestCorpusATokens(t *testing.T) {
	api, pod := cluster(t)
	i := openIssuer(t, kube.IssuerConfig{Issuer: api.URL, JWKSFile: file(t, api.JWKS())})
	another := kubeapi.New(t)
	another.Issuer = api.URL
	tokens := api.BadTokens(pod, audience)
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
