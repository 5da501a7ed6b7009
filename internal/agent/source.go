package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Limits of a source (R89).
const (
	maxBundleFile = 1 << 20 // bytes
	maxRedirects  = 3
	fetchMost     = 30 * time.Second
	askMost       = time.Minute
)

const reasonNoBundle = "trust_bundle_unavailable"

// configuredBundle returns the trust domain's roots from the configured source.
func (a *Agent) configuredBundle(ctx context.Context) (*bundle.Bundle, error) {
	s := a.cfg.Agent
	switch {
	case s.TrustBundlePath != "":
		return readBundle(s)
	case s.TrustBundleHash != "":
		pin, err := serverlink.ParseRootHash(s.TrustBundleHash)
		if err != nil {
			return nil, err
		}
		return serverlink.Pinned(ctx, a.linkConfig(), pin)
	case s.TrustBundleURL != "":
		return a.fetchBundle(ctx)
	case s.TrustBundleWorkloadAPI != "":
		return askWorkloadAPI(ctx, s)
	case len(a.joining.roots) > 0:
		b, err := serverlink.Pinned(ctx, a.linkConfig(), a.joining.roots...)
		return b, a.joining.explain(err)
	}
	a.log.Warn("insecure bootstrap: the server is trusted because it answered")
	return serverlink.Insecure(ctx, a.linkConfig())
}

func readBundle(s Settings) (*bundle.Bundle, error) {
	bad := func(err error) error {
		return fault.New(fault.Precondition, "trust_bundle_unreadable", "the trust bundle %q cannot be used: %v", s.TrustBundlePath, err).
			Fix("write it with 'plastron server bundle show'")
	}
	f, err := os.Open(s.TrustBundlePath)
	if err != nil {
		return nil, bad(err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBundleFile+1))
	switch {
	case err != nil:
		return nil, bad(err)
	case len(data) > maxBundleFile:
		return nil, bad(errors.New("it is too large"))
	}
	b, err := parseBundle(s, data)
	if err != nil {
		return nil, bad(err)
	}
	return b, nil
}

// parseBundle reads a bundle in the configured format.
func parseBundle(s Settings, data []byte) (*bundle.Bundle, error) {
	if s.TrustBundleFormat == "spiffe" {
		return bundle.Parse(s.TrustDomain.TrustDomain, data)
	}
	roots, err := bundle.ParsePEM(data)
	if err != nil {
		return nil, err
	}
	b := &bundle.Bundle{TrustDomain: s.TrustDomain.TrustDomain}
	for _, der := range roots {
		b.X509 = append(b.X509, bundle.X509Authority{ASN1: der})
	}
	return b, nil
}

// fetchBundle gets the bundle from a URL, over HTTPS or over the socket of a local
// program. What is on the way is not asked for more than R89 allows.
func (a *Agent) fetchBundle(ctx context.Context) (*bundle.Bundle, error) {
	s := a.cfg.Agent
	away := func(err error) error {
		return fault.New(fault.Unavailable, reasonNoBundle, "the trust bundle could not be fetched from %s: %v", shown(s.TrustBundleURL), err).
			Fix("see what answers there")
	}
	ctx, cancel := context.WithTimeout(ctx, fetchMost)
	defer cancel()
	transport := &http.Transport{
		Proxy: nil, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: a.webRoots}, DisableKeepAlives: true,
		MaxResponseHeaderBytes: 64 << 10,
	}
	if s.TrustBundleUnixSocket != "" {
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.TrustBundleUnixSocket)
		}
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(to *http.Request, via []*http.Request) error {
		switch {
		case len(via) > maxRedirects:
			return errors.New("it redirects too often")
		case s.TrustBundleUnixSocket == "" && to.URL.Scheme != "https":
			return errors.New("it redirects to something else than https")
		}
		return nil
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.TrustBundleURL, nil)
	if err != nil {
		return nil, away(err)
	}
	if s.TrustBundleUnixSocket != "" {
		req.URL.RawQuery = a.circumstances(req.URL.Query()).Encode()
	}
	resp, err := client.Do(req)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err // without the URL, which may hold a password
		}
		return nil, away(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, away(fmt.Errorf("it answers %q", resp.Status))
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxBundleFile+1))
	switch {
	case err != nil:
		return nil, away(err)
	case len(data) > maxBundleFile:
		return nil, away(errors.New("it is too large"))
	}
	b, err := parseBundle(s, data)
	if err != nil {
		return nil, away(err)
	}
	return b, nil
}

// asked is how often a local program was asked for the roots since they were
// missing. Only the job under way touches it.
type asked struct {
	times int
	since time.Time
}

// circumstances tells a local program what it may decide by, in SPIRE's words.
func (a *Agent) circumstances(query url.Values) url.Values {
	if a.asked.times++; a.asked.times == 1 {
		a.asked.since = time.Now()
	}
	mode := "bootstrap"
	if a.bundle.Load() != nil {
		mode = "rebootstrap"
	}
	host, port, err := net.SplitHostPort(a.route.Current())
	if err != nil {
		host, port = a.route.Current(), ""
	}
	query.Set("spire-attest-mode", mode)
	query.Set("spire-connection-attempts", strconv.Itoa(a.asked.times))
	query.Set("spire-attest-start-time", a.asked.since.UTC().Format(time.RFC3339))
	query.Set("spire-server-address", host)
	query.Set("spire-server-port", port)
	query.Set("spiffe-trust-domain", a.cfg.Agent.TrustDomain.Name())
	return query
}

// askWorkloadAPI takes the bundle that another agent on this machine gives, such
// as one of a trust domain above this one.
func askWorkloadAPI(ctx context.Context, s Settings) (*bundle.Bundle, error) {
	away := func(err error) error {
		return fault.New(fault.Unavailable, reasonNoBundle, "the Workload API at %s does not give the bundle: %v", s.TrustBundleWorkloadAPI, err).
			Fix("see that an agent answers there, and that this user has an identity of it")
	}
	ctx, cancel := context.WithTimeout(ctx, askMost)
	defer cancel()
	set, err := workloadapi.FetchX509Bundles(ctx, workloadapi.WithAddr(s.TrustBundleWorkloadAPI))
	if err != nil {
		return nil, away(err)
	}
	held, ok := set.Get(s.TrustDomain.TrustDomain)
	if !ok || len(held.X509Authorities()) == 0 {
		return nil, away(fmt.Errorf("there is none of %s", s.TrustDomain.Name()))
	}
	b := &bundle.Bundle{TrustDomain: s.TrustDomain.TrustDomain}
	for _, root := range held.X509Authorities() {
		b.X509 = append(b.X509, bundle.X509Authority{ASN1: root.Raw})
	}
	return b, nil
}

// checkBundleURL refuses what would make the first trust worthless.
func checkBundleURL(s Settings) error {
	u, err := url.Parse(s.TrustBundleURL)
	switch {
	case err != nil || u.Host == "":
		return errors.New("it is not a URL")
	case s.TrustBundleUnixSocket == "" && u.Scheme != "https":
		return errors.New("it must begin with https://, or come over trust_bundle_unix_socket")
	case s.TrustBundleUnixSocket != "" && u.Scheme != "http":
		return errors.New("over trust_bundle_unix_socket it must begin with http://")
	}
	for name := range u.Query() {
		if strings.HasPrefix(name, "spire-") || strings.HasPrefix(name, "spiffe-") {
			return fmt.Errorf("the parameter %q is one that the agent sets", name)
		}
	}
	return nil
}

// shown is a URL without what may be secret in it.
func shown(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return "the configured URL"
	}
	u.RawQuery, u.Fragment = "", ""
	return u.Redacted()
}
