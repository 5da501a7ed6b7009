package agent

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/fault"
)

// The roots by URL: over HTTPS from who the machine trusts, in both formats; and
// what does not come as R89 asks is refused, whatever it is.
func TestBundleByURL(t *testing.T) {
	ca := newTestAuthority(t)
	pemText := ca.bundle.MarshalPEM()
	mux := http.NewServeMux()
	mux.HandleFunc("/pem", func(w http.ResponseWriter, _ *http.Request) { w.Write(pemText) })
	mux.HandleFunc("/spiffe", func(w http.ResponseWriter, _ *http.Request) { w.Write(ca.bundle.Marshal()) })
	mux.HandleFunc("/rubbish", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") })
	mux.HandleFunc("/empty", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/huge", func(w http.ResponseWriter, _ *http.Request) {
		for range 2 << 10 {
			w.Write(make([]byte, 1<<10))
		}
	})
	mux.HandleFunc("/missing", http.NotFound)
	mux.HandleFunc("/once", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/pem", http.StatusFound) })
	mux.HandleFunc("/round", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/round", http.StatusFound) })
	plain := httptest.NewServer(mux)
	defer plain.Close()
	mux.HandleFunc("/plain", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, plain.URL+"/pem", http.StatusFound) })
	secure := httptest.NewTLSServer(mux)
	defer secure.Close()
	pool := x509.NewCertPool()
	pool.AddCert(secure.Certificate())
	for path, c := range map[string]struct{ format, want string }{
		"/pem": {}, "/spiffe": {format: "spiffe"}, "/once": {},
		"/pem?format": {format: "spiffe", want: "could not be fetched"}, "/rubbish": {want: "could not be fetched"}, "/empty": {want: "could not be fetched"},
		"/huge": {want: "too large"}, "/missing": {want: "404"}, "/round": {want: "redirects too often"}, "/plain": {want: "something else than https"},
	} {
		t.Run(path, func(t *testing.T) {
			l := testLife(t, ca, func(c *Config) {
				c.Agent.InsecureBootstrap, c.Agent.TrustBundleURL = false, secure.URL+path+"?password=hunter2"
			})
			l.agent.cfg.Agent.TrustBundleFormat = or(c.format, "pem")
			l.agent.webRoots = pool
			b, err := l.agent.configuredBundle(t.Context())
			switch {
			case c.want == "" && (err != nil || len(b.X509) != 1):
				t.Errorf("%v, %v", b, err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%v, want %q", err, c.want)
			case err != nil && (strings.Contains(err.Error(), "hunter2") || fault.KindOf(err) != fault.Unavailable):
				t.Errorf("%v: tells a secret, or is not tried again", err)
			}
		})
	}
	t.Run("a stranger", func(t *testing.T) {
		l := testLife(t, ca, func(c *Config) { c.Agent.InsecureBootstrap, c.Agent.TrustBundleURL = false, secure.URL+"/pem" })
		if _, err := l.agent.configuredBundle(t.Context()); err == nil {
			t.Error("a certificate that the machine does not trust is taken")
		}
	})
}

func or(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

// Over a socket a local program learns what it may decide by.
func TestBundleFromLocalProgram(t *testing.T) {
	ca := newTestAuthority(t)
	dir, err := os.MkdirTemp("", "p") // socket paths are short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var seen []url.Values
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = append(seen, r.URL.Query())
		w.Write(ca.bundle.MarshalPEM())
	})}
	go server.Serve(listener)
	defer server.Close()
	l := testLife(t, ca, func(c *Config) {
		c.Agent.InsecureBootstrap = false
		c.Agent.TrustBundleURL, c.Agent.TrustBundleUnixSocket = "http://local/bundle?who=me", socket
	})
	l.agent.bundle.Store(nil)
	for range 2 {
		if _, err := l.Do(t.Context(), agentid.Job{Kind: agentid.Bootstrap}); err != nil {
			t.Fatal(err)
		}
	}
	if len(seen) != 2 || seen[0].Get("who") != "me" || seen[0].Get("spire-attest-mode") != "bootstrap" || seen[1].Get("spire-attest-mode") != "rebootstrap" ||
		seen[1].Get("spire-connection-attempts") != "2" || seen[0].Get("spire-server-address") != "127.0.0.1" || seen[0].Get("spire-server-port") != "1" ||
		seen[0].Get("spiffe-trust-domain") != testDomain.Name() {
		t.Errorf("%v", seen)
	}
	if _, err := time.Parse(time.RFC3339, seen[0].Get("spire-attest-start-time")); err != nil {
		t.Error(err)
	}
}

// A Workload API that is not there is tried again.
func TestBundleFromNoWorkloadAPI(t *testing.T) {
	ca := newTestAuthority(t)
	l := testLife(t, ca, func(c *Config) {
		c.Agent.InsecureBootstrap = false
		c.Agent.TrustBundleWorkloadAPI = "tcp://127.0.0.1:1"
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // it waits for one to come
	defer cancel()
	if _, err := l.agent.configuredBundle(ctx); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("%v", err)
	}
}
