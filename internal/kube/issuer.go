package kube

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/strictjson"
)

const (
	maxKeys = 1 << 20 // bytes of a JWK set or of a discovery document

	// keysRefreshed is the age at which keys are asked for again when one is needed,
	// and keysAskedFor the least time between two such questions, whatever strangers
	// send. keysEnd is the age at which they are not used any more.
	keysRefreshed = 10 * time.Minute
	keysAskedFor  = time.Minute
	keysEnd       = 24 * time.Hour
)

// IssuerConfig says who issues the service-account tokens of a cluster, and where
// its public keys are.
type IssuerConfig struct {
	// Issuer is the tokens' iss, byte by byte. Required.
	Issuer string
	// JWKSFile or JWKSURI is where the keys are. Without either they are found by
	// OpenID discovery, below the issuer.
	JWKSFile, JWKSURI string
	// CAFile holds the roots for JWKSURI and discovery. Default: the system's.
	CAFile string
}

// Issuer verifies tokens of one cluster with the cluster's public keys. It may be
// used concurrently. That a pod is gone it cannot know.
type Issuer struct {
	issuer string
	fetch  func(context.Context) (map[string]crypto.PublicKey, error)
	asked  time.Duration // the least time between two questions

	mu       sync.Mutex // guards all below
	keys     map[string]crypto.PublicKey
	got      time.Time // when keys were
	tried    time.Time
	err      error         // of the last try
	fetching chan struct{} // closed when the one who fetches has; nil: nobody does
}

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c IssuerConfig) Validate() error {
	invalid := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "config_invalid", format, args...)
	}
	switch {
	case c.Issuer == "":
		return invalid("issuer: must be set to what the cluster's tokens have as iss")
	case c.JWKSFile != "" && (c.JWKSURI != "" || c.CAFile != ""):
		return invalid("jwks_file: with it, jwks_uri and issuer_ca_file have no meaning")
	case c.JWKSFile != "":
		return nil
	case c.JWKSURI != "" && !isHTTPS(c.JWKSURI):
		return invalid("jwks_uri: must be an https:// address")
	case c.JWKSURI == "" && !isHTTPS(c.Issuer):
		return invalid("issuer: keys can be found by discovery only below an https:// address; set jwks_uri or jwks_file")
	}
	return nil
}

// Open reads files, so that mistakes show. It connects to nothing: keys are fetched
// when the first token comes.
func (c IssuerConfig) Open() (*Issuer, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	i := &Issuer{issuer: c.Issuer, asked: keysAskedFor}
	if c.JWKSFile != "" {
		i.asked = time.Second
		i.fetch = func(context.Context) (map[string]crypto.PublicKey, error) { return readKeys(c.JWKSFile) }
		keys, err := i.fetch(context.Background())
		if err != nil {
			return nil, fault.New(fault.Precondition, "jwks_unusable", "the keys in %q cannot be used: %v", c.JWKSFile, err).Because(err)
		}
		i.keys, i.got = keys, time.Now()
		return i, nil
	}
	source := web{uri: c.JWKSURI, issuer: c.Issuer, caFile: c.CAFile}
	if _, err := source.client(); err != nil {
		return nil, fault.New(fault.Precondition, "issuer_ca_unusable", "the roots in %q cannot be used: %v", c.CAFile, err).Because(err)
	}
	i.fetch = source.keys
	return i, nil
}

// Verify returns what a token for one of the audiences says. fault.Unavailable: its key may
// be one of the issuer's, who cannot be asked now.
func (i *Issuer) Verify(ctx context.Context, token string, audiences []string) (Bearer, error) {
	jws, c, err := split(token)
	if err != nil {
		return Bearer{}, err
	}
	if c.issuer != i.issuer { // before its key is looked for
		return Bearer{}, refused("kube_token_issuer", "it is of another issuer")
	}
	key, err := i.key(ctx, jws.KeyID)
	if err != nil {
		return Bearer{}, err
	}
	if !jws.Verify(key) {
		return Bearer{}, refused("kube_token_signature", "its signature does not verify")
	}
	if err := c.check(audiences, time.Now()); err != nil {
		return Bearer{}, err
	}
	return c.Bearer, nil
}

// key returns a key of the issuer. One caller fetches when they are old, or the
// key is not among them; only who has none yet waits for it.
func (i *Issuer) key(ctx context.Context, id string) (crypto.PublicKey, error) {
	for {
		i.mu.Lock()
		now := time.Now()
		var key crypto.PublicKey
		if now.Sub(i.got) < keysEnd {
			key = i.keys[id]
		}
		switch {
		case key != nil && now.Sub(i.got) < min(keysRefreshed, 10*i.asked), key != nil && now.Sub(i.tried) < i.asked, key != nil && i.fetching != nil:
			i.mu.Unlock()
			return key, nil
		case i.fetching != nil:
			done := i.fetching
			i.mu.Unlock()
			select {
			case <-done:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			continue
		case now.Sub(i.tried) < i.asked:
			err := i.err
			i.mu.Unlock()
			if err != nil {
				return nil, fault.New(fault.Unavailable, "kube_issuer_unavailable", "the keys of the cluster's issuer could not be fetched").
					Because(err).NotBefore(i.asked)
			}
			return nil, refused("kube_token_key", "its key is not one of the issuer's")
		}
		done := make(chan struct{})
		i.fetching, i.tried = done, now
		i.mu.Unlock()
		// Whoever sent the token may go; the answer is of use to the others.
		asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTime)
		var keys map[string]crypto.PublicKey
		err := fault.Contain(func() (err error) { keys, err = i.fetch(asking); return err }) // others wait for it
		cancel()
		i.mu.Lock()
		i.tried = time.Now()
		if i.err = err; err == nil {
			i.keys, i.got = keys, time.Now()
		}
		i.fetching = nil
		i.mu.Unlock()
		close(done)
	}
}

func readKeys(path string) (map[string]crypto.PublicKey, error) {
	data, err := readSmall(path, maxKeys)
	if err != nil {
		return nil, err
	}
	return bundle.ParseJWKS(data)
}

// web is where keys are published.
type web struct{ uri, issuer, caFile string }

func (w web) client() (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if w.caFile != "" {
		data, err := readSmall(w.caFile, maxConfigFile)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(data) {
			return nil, errors.New("there is no certificate in PEM in it")
		}
	}
	return &http.Client{
		Transport:     &http.Transport{TLSClientConfig: config, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// keys fetches them, by way of the issuer's discovery document if need be.
func (w web) keys(ctx context.Context) (map[string]crypto.PublicKey, error) {
	client, err := w.client()
	if err != nil {
		return nil, err
	}
	uri := w.uri
	if uri == "" {
		data, err := fetch(ctx, client, strings.TrimSuffix(w.issuer, "/")+"/.well-known/openid-configuration")
		if err != nil {
			return nil, err
		}
		document, err := strictjson.Object(data)
		if err != nil {
			return nil, err
		}
		if document["issuer"] != w.issuer {
			return nil, errors.New("the discovery document is of another issuer")
		}
		if uri, _ = document["jwks_uri"].(string); !isHTTPS(uri) {
			return nil, errors.New("the discovery document has no jwks_uri that begins with https://")
		}
	}
	data, err := fetch(ctx, client, uri)
	if err != nil {
		return nil, err
	}
	return bundle.ParseJWKS(data)
}

func fetch(ctx context.Context, client *http.Client, uri string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, uri, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json, application/jwk-set+json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers with HTTP status %d", uri, resp.StatusCode)
	}
	data, err := readBounded(resp.Body, maxKeys)
	if err != nil {
		err = fmt.Errorf("what %s answers: %w", uri, err)
	}
	return data, err
}

// isHTTPS tells an address that says where to go and nothing else.
func isHTTPS(s string) bool {
	u, err := url.Parse(s)
	return err == nil && u.Scheme == "https" && u.Host != "" && u.User == nil && u.Fragment == "" && u.RawQuery == ""
}
