package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/svid"
)

// Waits of the agent's own life.
const (
	attestFloor   = time.Second
	attestCeiling = 30 * time.Second
	renewFloor    = 250 * time.Millisecond
	renewCeiling  = 30 * time.Second
	pulse         = 2 * time.Second // timers do not count a machine's sleep (R57)
	sleepAtLeast  = 5 * time.Second
	maxBundleFile = 1 << 20        // bytes
	maxWindow     = 24 * time.Hour // for which a directive may spread
)

// life keeps the agent's own credential: it attests, renews, and does what the
// server says about the agent itself.
type life struct {
	agent  *Agent
	dir    *dataDir
	keeper keys.Keeper
	link   *serverlink.Client

	trouble    chan refusal
	directives chan *syncv1.Directive
	changed    chan struct{} // the bundle is to be stored

	// Only the mirror's goroutine touches what follows.
	lastEnd string      // why the last stream ended
	shown   *credential // when the last stream was opened

	// Only begin and run touch what follows.
	pending  keys.Key  // made for a renewal whose answer has not come
	renewAt  time.Time // when the own SVID is to be renewed
	failures int
	ousted   int  // attestations in a row whose SVID was refused soon after
	fresh    bool // the bundle came from the configured source in this life
}

// refusal is a server's word that concerns the agent as such.
type refusal struct {
	err error
	own *credential // that was shown
}

// begin brings the agent to where it has an SVID of its own: the stored one if
// it is still good, else by attestation.
func (l *life) begin(ctx context.Context) error {
	a := l.agent
	td := a.cfg.Agent.TrustDomain.TrustDomain
	stored, b := l.dir.load(td)
	if b != nil {
		a.bundle.Store(b) // what was learnt wins over what is configured
		if len(stored.SVID) > 0 {
			key, err := l.keeper.Key(ctx, stored.KeyID)
			if err == nil {
				var own *credential
				if own, err = newCredential(td, b.Roots(), stored.KeyID, key, stored.SVID, time.Now()); err == nil {
					own.reattest = stored.CanReattest
					l.use(own)
					a.log.Info("stored SVID is used", "agent", own.id, "next", l.renewAt)
					return nil
				}
			}
			a.log.Warn("stored SVID is not usable", "reason", fault.ReasonOf(err), "err", err)
			// Its key stays until there is an SVID for another: what is wrong now, such
			// as the clock, may be right at the next start.
			if l.pending, err = l.keeper.Generate(ctx, otherKey(stored.KeyID), keys.ECP256); err != nil {
				return wrap("make the agent's key", err)
			}
		}
	}
	return l.admit(ctx, nil)
}

// admit attests until it is let in, or until it is told why not. Where there is
// an SVID already, mended says whether that is good after all, and a server that
// is not ours may give way to one that is.
func (l *life) admit(ctx context.Context, mended func() bool) error {
	for failures := 1; ; failures++ {
		err := l.attest(ctx)
		if err == nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		reason := fault.ReasonOf(err)
		kind, foreign := fault.KindOf(err), reason == reasonUntrusted || reason == reasonWrongRoot
		if kind != fault.Unavailable && kind != fault.Exhausted && (mended == nil || !foreign) {
			return err
		}
		wait := backoff(failures, attestFloor, attestCeiling)
		l.agent.log.Warn("attestation failed, trying again", "reason", fault.ReasonOf(err), "err", err, "next", wait)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		if mended != nil && mended() {
			return nil
		}
	}
}

// prover is made anew for each attestation, so that it reads files that have changed.
func (l *life) prover() (nodeattest.Prover, error) {
	if err := l.agent.joining.usable(time.Now()); err != nil {
		return nil, err
	}
	token, err := l.agent.cfg.Agent.joinToken()
	if err != nil {
		return nil, err
	}
	return l.agent.prover.Prover(token)
}

func (l *life) attest(ctx context.Context) error {
	a := l.agent
	prover, err := l.prover()
	if err != nil {
		return err
	}
	if a.bundle.Load() == nil {
		b, err := l.bootstrap(ctx)
		if err != nil {
			return err
		}
		a.bundle.Store(b)
		l.fresh = true
	}
	// The same key is shown again if the answer to an attestation was lost: then it
	// is the same attestation (K18).
	if l.pending.Signer == nil {
		if l.pending, err = l.keeper.Key(ctx, l.nextKey()); err != nil {
			if l.pending, err = l.keeper.Generate(ctx, l.nextKey(), keys.ECP256); err != nil {
				return wrap("make the agent's key", err)
			}
		}
	}
	csr, err := svid.NewCSR(l.pending)
	if err != nil {
		return err
	}
	got, err := l.link.Attest(ctx, a.attestor, prover, csr)
	if fault.ReasonOf(err) == reasonUntrusted && !l.fresh && !a.cfg.Agent.InsecureBootstrap {
		// What was learnt in an earlier life may be outdated; what the operator has
		// configured is asked once more.
		a.log.Warn("the stored bundle does not fit the server, using the configured one")
		b, berr := l.bootstrap(ctx)
		if berr != nil {
			return berr
		}
		a.bundle.Store(b)
		l.fresh = true
		if err := l.link.Redial(""); err != nil {
			return err
		}
		got, err = l.link.Attest(ctx, a.attestor, prover, csr)
	}
	if fault.ReasonOf(err) == "key_taken" {
		// The key of an earlier identity of this node; with a new one it goes on.
		if l.pending, err = l.keeper.Generate(ctx, l.pending.ID, keys.ECP256); err != nil {
			return wrap("make the agent's key", err)
		}
		return fault.New(fault.Unavailable, "key_taken", "the agent's key was used before")
	}
	if err != nil {
		return a.joining.explain(err)
	}
	if err := l.adopt(got); err != nil {
		return err
	}
	a.log.Info("attested", "agent", a.own.Load().id, "kind", a.attestor, "next", l.renewAt)
	return nil
}

// bootstrap returns the first bundle, from the configured source.
func (l *life) bootstrap(ctx context.Context) (*bundle.Bundle, error) {
	s := l.agent.cfg.Agent
	switch {
	case s.TrustBundlePath != "":
		return readBundle(s)
	case s.TrustBundleHash != "":
		pin, err := serverlink.ParseRootHash(s.TrustBundleHash)
		if err != nil {
			return nil, err
		}
		return serverlink.Pinned(ctx, l.agent.linkConfig(), pin)
	case len(l.agent.joining.roots) > 0:
		b, err := serverlink.Pinned(ctx, l.agent.linkConfig(), l.agent.joining.roots...)
		return b, l.agent.joining.explain(err)
	}
	l.agent.log.Warn("insecure bootstrap: the server is trusted because it answered")
	return serverlink.Insecure(ctx, l.agent.linkConfig())
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
	case s.TrustBundleFormat == "spiffe":
		b, err := bundle.Parse(s.TrustDomain.TrustDomain, data)
		if err != nil {
			return nil, bad(err)
		}
		return b, nil
	}
	roots, err := bundle.ParsePEM(data)
	if err != nil {
		return nil, bad(err)
	}
	b := &bundle.Bundle{TrustDomain: s.TrustDomain.TrustDomain}
	for _, der := range roots {
		b.X509 = append(b.X509, bundle.X509Authority{ASN1: der})
	}
	return b, nil
}

// adopt takes over a new SVID: verified, then durable, then used. The one before
// stays with its key until the next.
func (l *life) adopt(got serverlink.SVID) error {
	a := l.agent
	td := a.cfg.Agent.TrustDomain.TrustDomain
	own, err := newCredential(td, a.bundle.Load().Roots(), l.pending.ID, l.pending, got.Chain, time.Now())
	if err != nil {
		return fault.New(fault.Unavailable, "svid_refused", "the server gave the agent an SVID that does not verify").Because(err)
	}
	own.reattest = got.CanReattest
	if err := l.dir.save(td, own, a.bundle.Load()); err != nil {
		return err
	}
	l.pending = keys.Key{}
	l.use(own)
	return l.show(true)
}

// show says whether connections from now on show the agent's own SVID.
func (l *life) show(own bool) error {
	l.agent.anonymous.Store(!own)
	return l.link.Redial("")
}

func (l *life) use(own *credential) {
	l.agent.own.Store(own)
	half := max(time.Until(own.expiresAt), 0) / 2 // a slow disk or a set clock may have used it up
	l.renewAt = time.Now().Round(0).Add(half - half/10 + rand.N(half/5+1))
	l.failures = 0
}

// nextKey returns the name of the key that is not in use.
func (l *life) nextKey() string {
	if own := l.agent.own.Load(); own != nil {
		return otherKey(own.keyID)
	}
	return keyA
}

func otherKey(name string) string {
	if name == keyA {
		return keyB
	}
	return keyA
}

// run renews in time, stores what changes, and acts on what the server says.
func (l *life) run(ctx context.Context) error {
	var redialAt time.Time
	var redialTo string
	for last := time.Now(); ; {
		woke := time.Now()
		if slept(woke.Round(0).Sub(last.Round(0)), woke.Sub(last)) {
			// The connection is most likely dead, and silence would tell only in a
			// minute or more.
			if err := l.link.Redial(""); err != nil {
				l.agent.log.Warn("connection could not be moved", "err", err)
			}
		}
		last = woke
		now := woke.Round(0)
		wait := min(pulse, max(l.renewAt.Sub(now), 0))
		if !redialAt.IsZero() {
			wait = min(wait, max(redialAt.Sub(now), 0))
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case refused := <-l.trouble:
			if refused.own != l.agent.own.Load() {
				break // there is another by now
			}
			if err := l.recover(ctx, refused.err); err != nil {
				return err
			}
		case <-l.changed:
			if err := l.dir.save(l.agent.cfg.Agent.TrustDomain.TrustDomain, l.agent.own.Load(), l.agent.bundle.Load()); err != nil {
				l.agent.log.Warn("bundle was not stored", "err", err)
			}
		case d := <-l.directives:
			switch d := d.GetDirective().(type) {
			case *syncv1.Directive_Renew:
				if at := now.Add(within(d.Renew.GetWithinMs())); at.Before(l.renewAt) {
					l.renewAt = at
				}
			case *syncv1.Directive_Reconnect:
				redialAt, redialTo = now.Add(within(d.Reconnect.GetWithinMs())), d.Reconnect.GetAddress()
			case *syncv1.Directive_Reattest:
				l.agent.log.Info("the server asks for a new attestation", "reason", d.Reattest.GetReason())
				if err := l.recover(ctx, fault.New(fault.Denied, "agent_must_reattest", "the server asks for a new attestation")); err != nil {
					return err
				}
			}
		case <-timer.C:
		}
		timer.Stop()
		now = time.Now().Round(0)
		if !redialAt.IsZero() && due(redialAt, now, maxWindow) {
			if err := l.link.Redial(redialTo); err != nil {
				l.agent.log.Warn("connection could not be moved", "err", err)
			}
			redialAt = time.Time{}
		}
		if due(l.renewAt, now, max(l.agent.own.Load().expiresAt.Sub(now), renewCeiling)) {
			if err := l.renew(ctx); err != nil {
				return err
			}
		}
	}
}

// renew gets a new SVID for a new key. A lost answer costs nothing: the server
// accepts the old SVID until the new one is used (R33).
func (l *life) renew(ctx context.Context) error {
	err := l.renewOnce(ctx)
	if err == nil {
		l.agent.log.Info("own SVID renewed", "agent", l.agent.own.Load().id, "next", l.renewAt)
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// What the server has just signed and our clock refuses, attesting does not mend.
	if lost(err) || l.ended() && fault.ReasonOf(err) != "svid_refused" {
		return l.recover(ctx, err)
	}
	l.failures++
	wait := backoff(l.failures, renewFloor, renewCeiling)
	l.renewAt = time.Now().Round(0).Add(wait)
	l.agent.log.Warn("own SVID was not renewed, trying again", "reason", fault.ReasonOf(err), "err", err, "next", wait)
	return nil
}

func (l *life) renewOnce(ctx context.Context) (err error) {
	if l.pending.Signer == nil {
		if l.pending, err = l.keeper.Generate(ctx, l.nextKey(), keys.ECP256); err != nil {
			return wrap("make the agent's key", err)
		}
	}
	csr, err := svid.NewCSR(l.pending)
	if err != nil {
		return err
	}
	renew := l.link.Renew
	if l.agent.own.Load().reattest {
		renew = l.reattest
	}
	got, err := renew(ctx, csr)
	if err != nil {
		return err
	}
	return l.adopt(got)
}

// reattest proves the node again, where that is how an agent renews. It takes a
// connection of its own that shows no SVID; the one in use, with the stream of
// changes on it, goes on meanwhile.
func (l *life) reattest(ctx context.Context, csr []byte) (serverlink.SVID, error) {
	prover, err := l.prover()
	if err != nil {
		return serverlink.SVID{}, err
	}
	config := l.agent.linkConfig()
	config.Certificate = func() *tls.Certificate { return nil }
	link, err := serverlink.New(config)
	if err != nil {
		return serverlink.SVID{}, err
	}
	defer link.Close()
	return link.Attest(ctx, l.agent.attestor, prover, csr)
}

// ended reports whether the own SVID has expired by our clock.
func (l *life) ended() bool { return !time.Now().Before(l.agent.own.Load().expiresAt) }

// lost reports whether the server says that the agent's own credential is no
// longer good.
func lost(err error) bool {
	switch fault.ReasonOf(err) {
	case "agent_expired", "agent_not_attested", "agent_not_active", "agent_must_reattest", "agent_banned":
		return fault.KindOf(err) == fault.Denied || fault.KindOf(err) == fault.Unauthenticated
	}
	return false
}

// recover attests again where that is possible, else ends the agent with what it needs.
func (l *life) recover(ctx context.Context, why error) error {
	a := l.agent
	if fault.ReasonOf(why) == "agent_banned" {
		// A ban ends the credential: it must not come back with the next start.
		saved := l.dir.save(a.cfg.Agent.TrustDomain.TrustDomain, nil, a.bundle.Load())
		return errors.Join(stuck(why, "ask the operator of the server why this node is banned"), saved)
	}
	a.log.Warn("the server does not accept the agent's SVID, attesting again", "reason", fault.ReasonOf(why))
	if err := l.takeTurns(ctx); err != nil {
		return err
	}
	l.pending = keys.Key{}
	key, err := l.keeper.Generate(ctx, l.nextKey(), keys.ECP256)
	if err != nil {
		return wrap("make the agent's key", err)
	}
	l.pending = key
	// A server that does not know the authority of the old SVID any more breaks off
	// connections that show it, and with them the attestation.
	if err := l.show(false); err != nil {
		return err
	}
	own := a.own.Load()
	if err := l.admit(ctx, func() bool { return !lost(why) && !l.ended() }); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		remedy := "mend what the node proves itself with and start the agent again"
		if a.attestor == jointoken.Name {
			remedy = "make a join token with 'plastron server token generate' and start the agent with it"
		}
		return stuck(errors.Join(why, err), remedy)
	}
	if a.own.Load() == own { // the clock was wrong and is right again (R107)
		l.renewAt = time.Now().Round(0)
		return l.show(true)
	}
	return nil
}

// takeTurns waits before the agent attests again soon after it did: if another
// node proves to be this one, each takes the other's place, and not at full speed.
func (l *life) takeTurns(ctx context.Context) error {
	if time.Since(l.agent.own.Load().since) > 2*attestCeiling {
		l.ousted = 0
	}
	l.ousted++
	if l.ousted == 1 {
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(backoff(l.ousted-1, attestFloor, attestCeiling)):
		return nil
	}
}

// direct takes a directive of the server.
func (l *life) direct(d *syncv1.Directive) {
	select {
	case l.directives <- d:
	default: // a server that floods us with them is not obeyed in each
	}
}

// setBundle follows the own trust domain's bundle.
func (l *life) setBundle(b *bundle.Bundle) {
	l.agent.bundle.Store(b) // every handshake from now on is judged by it
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// streamEnded looks at why the stream of changes ended.
func (l *life) streamEnded(err error) {
	reason := fault.ReasonOf(err)
	if reason != l.lastEnd && reason != "call_ended" { // it is said once, not at each attempt
		l.agent.log.Warn("not following the server", "reason", reason, "err", err)
	}
	l.lastEnd = reason
	if lost(err) {
		select {
		case l.trouble <- refusal{err, l.shown}:
		default:
		}
	}
}

// due reports whether t has come. A time further away than the longest wait was
// set by a clock that has been put back since: it has come (R107).
func due(t, now time.Time, longest time.Duration) bool {
	return !now.Before(t) || t.Sub(now) > longest
}

// slept reports whether the machine was suspended, from what the wall clock and
// the monotonic clock, which stands still then, say of the same time. A clock that
// was set forward looks the same (R57).
func slept(wall, monotonic time.Duration) bool { return wall-monotonic > sleepAtLeast }

// within picks a moment in the next milliseconds (R110).
func within(ms int64) time.Duration {
	window := min(max(time.Duration(ms)*time.Millisecond, 0), maxWindow)
	return rand.N(window + 1)
}

// backoff is the wait after so many failures, spread over its upper half (R110).
func backoff(failures int, floor, ceiling time.Duration) time.Duration {
	d := min(floor<<min(failures-1, 16), ceiling)
	return d/2 + rand.N(d/2+1)
}
