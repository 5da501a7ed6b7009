package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ownRetry is how soon a failed rotation is tried again.
const ownRetry = time.Second

// ownSVID is the certificate that the server shows to agents, renewed at half
// its life. Its key is made anew each time and never leaves memory.
type ownSVID struct {
	trustDomain spiffeid.TrustDomain
	life        lifetime.Set
	issuer      func(now time.Time) (*svid.X509Issuer, error)
	audit       *audit.Writer
	log         *slog.Logger
	wake        chan struct{} // room for one: the certificate is missed
	look        chan struct{} // room for one: the bundle has changed
	bundle      func() (*bundle.Bundle, error)

	// mu guards everything below.
	mu      sync.Mutex
	current *tls.Certificate
	begin   time.Time
	end     time.Time
	signer  string // the authority that signed it
}

// certificate returns the certificate, never one that has ended. If it has, run
// is told: its timer stood still while the machine slept, and knows nothing of a
// clock that was set.
func (o *ownSVID) certificate() (*tls.Certificate, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.current == nil || !time.Now().Before(o.end) {
		select {
		case o.wake <- struct{}{}:
		default:
		}
		return nil, fault.New(fault.Unavailable, "server_certificate_expired", "the server's own certificate has ended")
	}
	return o.current, nil
}

// rotate issues a new certificate.
func (o *ownSVID) rotate(now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	public, err := svid.ParsePublicKey(spki)
	if err != nil {
		return err
	}
	issuer, err := o.issuer(now)
	if err != nil {
		return err
	}
	id := identity.Server(o.trustDomain)
	authority, above := issuer.Ends()
	limits := o.life.Decide(lifetime.Server, lifetime.Asked{Authority: authority, Upstream: above}, now)
	prepared, err := issuer.Prepare(svid.Leaf{ID: id, Key: public, NotBefore: now.Add(-svid.Backdate), NotAfter: limits[0].End})
	if err != nil {
		return err
	}
	err = o.audit.Append(audit.Issuance{
		Caller: id.String(), Kind: "x509", ID: id.String(), Serial: prepared.Serial(), Issuer: issuer.AuthorityID(), KeyHash: public.Hash, Expiry: prepared.NotAfter(),
		Limit: limits[0].Name,
	})
	if err != nil {
		return err
	}
	issued, err := prepared.Issue()
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.current = &tls.Certificate{Certificate: issued.Chain, PrivateKey: key, Leaf: leaf}
	o.begin, o.end, o.signer = now, issued.NotAfter, issuer.AuthorityID()
	return nil
}

// due is when the certificate is to be renewed: at half of its life.
func (o *ownSVID) due() time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.begin.Add(o.end.Sub(o.begin) / 2)
}

// changed has run look whether the certificate is still trusted. It does not wait.
func (o *ownSVID) changed() {
	select {
	case o.look <- struct{}{}:
	default: // it will look anyway
	}
}

// changesBundle reports whether a batch holds a trust domain's bundle, or may stand for
// one that does: without writes everything was loaded afresh.
func changesBundle(b store.Batch, td spiffeid.TrustDomain) bool {
	return len(b.Writes) == 0 || slices.ContainsFunc(b.Writes, func(w store.Write) bool {
		return slices.ContainsFunc(w.Changes, func(c store.Change) bool { return c.Key == "/bundle/"+td.Name() })
	})
}

// trusted reports whether the certificate leads to an authority that is in the
// bundle and not tainted (R69).
func (o *ownSVID) trusted(now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	b, err := o.bundle()
	if err != nil || o.current == nil {
		return true // nothing better could be signed
	}
	untainted := b.Clone()
	untainted.X509 = slices.DeleteFunc(untainted.X509, func(a bundle.X509Authority) bool { return a.Tainted })
	_, err = svid.VerifyX509(o.current.Certificate, untainted.Roots(), o.trustDomain, now)
	return err == nil
}

// superseded reports whether another authority signs by now than signed the certificate.
func (o *ownSVID) superseded(now time.Time) bool {
	issuer, err := o.issuer(now)
	o.mu.Lock()
	defer o.mu.Unlock()
	return err == nil && issuer.AuthorityID() != o.signer
}

// run renews the certificate until ctx is done.
func (o *ownSVID) run(ctx context.Context) error {
	wait := time.NewTimer(time.Until(o.due()))
	defer wait.Stop()
	distrusted := false
	var again <-chan time.Time // what signs may not be trusted itself, and be replaced soon
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-wait.C:
		case <-o.wake:
		case <-o.look:
			if o.trusted(time.Now()) {
				continue
			}
			distrusted = true
			o.log.InfoContext(ctx, "the authority of the server's own certificate is tainted or gone")
		case <-again:
			if now := time.Now(); o.trusted(now) {
				again = nil
				continue
			} else if !o.superseded(now) {
				again = time.After(ownRetry)
				continue
			}
			distrusted = true
		}
		if err := o.rotate(time.Now()); err != nil {
			o.log.WarnContext(ctx, "server certificate not renewed", "err", err, "next", ownRetry.String())
			select { // not at every handshake that fails meanwhile
			case <-ctx.Done():
				return nil
			case <-time.After(ownRetry):
			}
			wait.Reset(0)
			continue
		}
		if distrusted {
			distrusted, again = false, time.After(ownRetry)
		}
		wait.Reset(max(time.Until(o.due()), ownRetry/10))
	}
}
