// Package spire is an upstream authority that is another server of the same trust
// domain, Plastron's or SPIRE's. It knows itself there by an SVID that an agent on
// this machine gives it, and asks for an authority below the server's own, passes
// JWT keys on, and looks every few seconds what the server trusts.
//
// What must always hold: the server is verified against the roots that the agent
// gives, and must be a server of our trust domain; what was told once is not taken
// back by a replica that lags.
package spire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/upstream"
)

const (
	lookEvery   = 5 * time.Second
	askAgent    = 10 * time.Second
	publishWait = 10 * time.Second // until a published key shows in the bundle
	publishLook = 200 * time.Millisecond
	// laggedFor is for how long a bundle older than one that was seen is a replica's
	// that lags; later the server was restored.
	laggedFor = 10 * time.Minute
)

// Config says where the server above is, and who we are there.
type Config struct {
	// ServerAddress and ServerPort are where the server above answers. Required.
	ServerAddress string `hcl:"server_address"`
	ServerPort    int    `hcl:"server_port"`
	// WorkloadAPISocket is the socket of an agent of the server above, on this machine.
	// An entry with downstream has to give this server's process an identity there. Required.
	WorkloadAPISocket string `hcl:"workload_api_socket"`
	// Experimental is refused.
	Experimental config.Node `hcl:"experimental"`

	every time.Duration // zero: lookEvery; smaller for tests
}

// Validate reports what is wrong with the configuration itself. It connects to nobody.
func (c *Config) Validate() error {
	switch {
	case c.Experimental.Present():
		return fault.New(fault.Unsupported, "config_unsupported", "experimental: none of these is offered; key exchange is hybrid where the server above can").Fix("remove it")
	case c.ServerAddress == "" || c.WorkloadAPISocket == "":
		return fault.New(fault.Invalid, "config_invalid", "server_address, server_port and workload_api_socket must be set")
	case c.ServerPort < 1 || c.ServerPort > 65535:
		return fault.New(fault.Invalid, "config_invalid", "server_port: %d is not a port", c.ServerPort)
	case !filepath.IsAbs(c.WorkloadAPISocket):
		return fault.New(fault.Invalid, "config_invalid", "workload_api_socket: %q is not an absolute path", c.WorkloadAPISocket)
	}
	return nil
}

// Open makes ready. It connects when it is first asked.
func (c *Config) Open(_ context.Context, env upstream.Env) (upstream.Authority, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	a := &Authority{cfg: *c, td: env.TrustDomain, log: env.Log}
	if a.cfg.every == 0 {
		a.cfg.every = lookEvery
	}
	var err error
	a.link, err = serverlink.New(serverlink.Config{
		Route: serverlink.NewRoute(net.JoinHostPort(c.ServerAddress, strconv.Itoa(c.ServerPort))), TrustDomain: env.TrustDomain,
		Roots:       func() []*x509.Certificate { a.mu.Lock(); defer a.mu.Unlock(); return a.roots },
		Certificate: func() *tls.Certificate { a.mu.Lock(); defer a.mu.Unlock(); return a.certificate },
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// Authority is a server above.
type Authority struct {
	cfg  Config
	td   spiffeid.TrustDomain
	log  *slog.Logger
	link *serverlink.Client

	// mu guards everything below.
	mu          sync.Mutex
	certificate *tls.Certificate // our identity there; nil: none yet
	renewAt     time.Time
	roots       []*x509.Certificate
	trust       upstream.Trust
	sequence    uint64
	seen        time.Time // when that sequence was
}

// Close ends the connection.
func (a *Authority) Close() error { return a.link.Close() }

// Mint implements upstream.Authority.
func (a *Authority) Mint(ctx context.Context, r upstream.Request) (m upstream.Minted, err error) {
	err = a.call(ctx, func() error {
		if m.Chain, err = a.link.Authority(ctx, r.CSR, r.TTL); err != nil {
			return err
		}
		m.Trust, err = a.look(ctx)
		return err
	})
	return m, err
}

// PublishJWT implements upstream.Publisher.
func (a *Authority) PublishJWT(ctx context.Context, key bundle.JWTAuthority) (trust upstream.Trust, err error) {
	ctx, cancel := context.WithTimeout(ctx, publishWait)
	defer cancel()
	if err := a.call(ctx, func() error { return a.link.PublishJWT(ctx, key) }); err != nil {
		return trust, err
	}
	// The server that is asked next may not have it yet.
	for {
		trust, err = a.look(ctx)
		if err == nil && slices.ContainsFunc(trust.JWT, func(k bundle.JWTAuthority) bool { return k.KeyID == key.KeyID }) {
			return trust, nil
		}
		select {
		case <-ctx.Done():
			return trust, fault.New(fault.Unavailable, "upstream_key_not_shown", "the server above does not show a JWT key that it has taken").Because(err)
		case <-time.After(publishLook):
		}
	}
}

// Watch implements upstream.Authority.
func (a *Authority) Watch(ctx context.Context) iter.Seq2[upstream.Trust, error] {
	return func(yield func(upstream.Trust, error) bool) {
		var told uint64
		reason := ""
		for ctx.Err() == nil {
			var trust upstream.Trust
			err := a.call(ctx, func() (err error) { trust, err = a.look(ctx); return err })
			switch {
			case ctx.Err() != nil:
				return
			case err != nil && fault.ReasonOf(err) != reason:
				reason = fault.ReasonOf(err)
				if !yield(upstream.Trust{}, err) {
					return
				}
			case err == nil && (trust.Version != told || reason != ""):
				told, reason = trust.Version, ""
				if !yield(trust, nil) {
					return
				}
			}
			wait := time.NewTimer(a.cfg.every)
			select {
			case <-ctx.Done():
			case <-wait.C:
			}
			wait.Stop()
		}
	}
}

// call makes sure that we have an identity, and asks for it anew once if the
// server does not like it or we do not trust the server: either may have changed.
func (a *Authority) call(ctx context.Context, f func() error) error {
	if err := a.identify(ctx, false); err != nil {
		return err
	}
	err := f()
	if kind := fault.KindOf(err); kind != fault.Unauthenticated && kind != fault.Denied || err == nil {
		return err
	}
	if renewed := a.identify(ctx, true); renewed != nil {
		return err
	}
	err = f()
	if denied, ok := errors.AsType[*fault.Error](err); ok && denied.Kind == fault.Denied && denied.Remedy == "" {
		return denied.Fix("give this server's process an entry with -downstream at the server above; of several identities that of its oldest entry is used")
	}
	return err
}

// identify asks the agent who we are, if that is not known or was not asked for
// half of the SVID's life.
func (a *Authority) identify(ctx context.Context, again bool) error {
	a.mu.Lock()
	held := a.certificate != nil && time.Now().Before(a.renewAt)
	a.mu.Unlock()
	if held && !again {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, askAgent)
	defer cancel()
	away := func(err error) error {
		return fault.New(fault.Unavailable, "upstream_identity_missing", "the agent at %s gives this server no identity: %v", a.cfg.WorkloadAPISocket, err).
			Fix("see that the agent runs, and that an entry with -downstream fits this server's process").Because(err)
	}
	got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+a.cfg.WorkloadAPISocket))
	if err != nil {
		return away(err)
	}
	own := got.DefaultSVID()
	roots, ok := got.Bundles.Get(a.td)
	if own.ID.TrustDomain() != a.td || !ok {
		return away(fmt.Errorf("it is of the trust domain %q, and this server of %q", own.ID.TrustDomain().Name(), a.td.Name()))
	}
	certificate := &tls.Certificate{PrivateKey: own.PrivateKey, Leaf: own.Certificates[0]}
	for _, c := range own.Certificates {
		certificate.Certificate = append(certificate.Certificate, c.Raw)
	}
	a.mu.Lock()
	changed := a.certificate == nil || !slices.EqualFunc(a.certificate.Certificate, certificate.Certificate, slices.Equal[[]byte])
	now := time.Now()
	a.certificate, a.roots = certificate, roots.X509Authorities()
	a.renewAt = now.Add(certificate.Leaf.NotAfter.Sub(now) / 2)
	a.mu.Unlock()
	if changed || again {
		return a.link.Redial("") // with the new identity
	}
	return nil
}

// look asks what the server trusts.
func (a *Authority) look(ctx context.Context) (upstream.Trust, error) {
	b, err := a.link.Bundle(ctx)
	if err != nil {
		return upstream.Trust{}, err
	}
	return a.take(b, time.Now()), nil
}

// take judges a bundle by what was seen before. A server that was restored may come
// to the same sequence with other content.
func (a *Authority) take(b *bundle.Bundle, now time.Time) upstream.Trust {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.trust.Version != 0 && b.Sequence < a.sequence && now.Sub(a.seen) < laggedFor {
		return a.trust
	}
	was := &bundle.Bundle{X509: a.trust.Roots, JWT: a.trust.JWT}
	changed := a.trust.Version == 0 || b.Sequence != a.sequence || !was.Equal(&bundle.Bundle{X509: b.X509, JWT: b.JWT})
	a.sequence, a.seen = b.Sequence, now
	if changed {
		a.trust = upstream.Trust{Roots: b.X509, JWT: b.JWT, Version: a.trust.Version + 1}
	}
	return a.trust
}
