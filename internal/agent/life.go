package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"sync"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/machine"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/svid"
)

// life is the agent's own identity in practice: agentid decides, life attests,
// renews, stores and asks for roots.
type life struct {
	agent    *Agent
	dir      *dataDir
	keeper   keys.Keeper
	link     *serverlink.Client
	identity *agentid.Identity
	cache    *cache // nil: nothing is kept

	admitted chan struct{} // closed once there is an SVID
	once     sync.Once

	// Only the mirror's goroutine touches what follows.
	lastEnd string      // why the last stream ended
	shown   *credential // when the last stream was opened

	// Only the job under way touches what follows.
	pending keys.Key // made for an attempt whose answer has not come
}

// newLife takes up what an earlier life has stored.
func newLife(ctx context.Context, a *Agent, dir *dataDir, keeper keys.Keeper, link *serverlink.Client) *life {
	l := &life{agent: a, dir: dir, keeper: keeper, link: link, admitted: make(chan struct{})}
	s := a.cfg.Agent
	cfg := agentid.Config{
		Settings: agentid.Settings{
			Source:           !s.InsecureBootstrap,
			Rebootstrap:      rebootstrap(s.RebootstrapMode),
			RebootstrapDelay: time.Duration(s.RebootstrapDelay),
			Remedy:           "mend what the node proves itself with and start the agent again",
		},
		Role: l, Boot: machine.Uptime, Log: a.log,
	}
	if a.attestor == jointoken.Name {
		cfg.Remedy = "make a join token with 'plastron server token generate' and start the agent with it"
	}
	td := s.TrustDomain.TrustDomain
	stored, b := dir.load(td)
	if b != nil {
		a.bundle.Store(b) // what was learnt wins over what is configured
		cfg.Trusted = true
	}
	if b != nil && len(stored.SVID) > 0 {
		key, err := keeper.Key(ctx, stored.KeyID)
		var own *credential
		if err == nil {
			// An SVID that is over by our clock is kept: the clock may be wrong.
			own, err = newCredential(td, b.Roots(), stored.KeyID, key, stored.SVID, lastMoment(stored.SVID))
		}
		if err != nil {
			a.log.Warn("stored SVID is not usable", "reason", fault.ReasonOf(err), "err", err)
		} else {
			own.reattest = stored.CanReattest
			a.log.Info("stored SVID is used", "agent", own.id)
			cfg.Own = own.own()
			cfg.Own.Stored = true
			l.use(own)
		}
	}
	l.identity = agentid.New(cfg)
	return l
}

// rebootstrap returns the mode; how "always" differs is decided when the
// configuration is checked.
func rebootstrap(mode string) agentid.Mode {
	if mode == string(agentid.Never) {
		return agentid.Never
	}
	return agentid.Auto
}

// use makes own the SVID that connections show.
func (l *life) use(own *credential) {
	l.agent.own.Store(own)
	l.once.Do(func() { close(l.admitted) })
}

// Do implements agentid.Role.
func (l *life) Do(ctx context.Context, job agentid.Job) (*agentid.Own, error) {
	own, err := l.do(ctx, job)
	l.cache.heed(err)
	if count := l.agent.count.job; count != nil {
		count(job.Kind, err)
	}
	return own, err
}

func (l *life) do(ctx context.Context, job agentid.Job) (*agentid.Own, error) {
	switch job.Kind {
	case agentid.Bootstrap:
		return nil, l.bootstrap(ctx)
	case agentid.Save:
		return nil, l.dir.save(l.agent.cfg.Agent.TrustDomain.TrustDomain, l.agent.own.Load(), l.agent.bundle.Load())
	case agentid.Renew:
		if !l.agent.own.Load().reattest {
			return l.renew(ctx, job)
		}
	}
	return l.attest(ctx, job)
}

// Redial implements agentid.Role.
func (l *life) Redial(address string) error { return l.link.Redial(address) }

// Forget implements agentid.Role.
func (l *life) Forget() error {
	l.cache.forget()
	return l.dir.save(l.agent.cfg.Agent.TrustDomain.TrustDomain, nil, l.agent.bundle.Load())
}

// bootstrap takes the roots that the configured source offers, less those that
// the trust domain is known to have dropped (R55).
func (l *life) bootstrap(ctx context.Context) error {
	a := l.agent
	learnt := a.bundle.Load()
	b, err := a.configuredBundle(ctx)
	if err != nil {
		return err
	}
	if b = l.dir.dropped.without(b); len(b.X509) == 0 {
		return fault.New(fault.Precondition, agentid.ReasonSuperseded, "all roots that the configured source offers are ones that the trust domain has dropped").
			Fix("give it a newer bundle, or make a ticket")
	}
	if a.bundle.CompareAndSwap(learnt, b) && learnt != nil { // else the server has told another one meanwhile
		a.log.Warn("the bundle that was learnt does not fit the server, the configured one is used")
	}
	return nil
}

// attest proves the node. It takes a connection of its own that shows no SVID:
// the one in use, with the stream of changes on it, goes on meanwhile, and a
// server that does not know the authority of the old SVID any more would break
// off a connection that shows it.
func (l *life) attest(ctx context.Context, job agentid.Job) (*agentid.Own, error) {
	a := l.agent
	config := a.linkConfig()
	config.Certificate = func() *tls.Certificate { return nil }
	link, err := serverlink.New(config)
	if err != nil {
		return nil, err
	}
	defer link.Close()
	if job.Probe {
		if _, err := link.Bundle(ctx); err != nil {
			return nil, a.joining.explain(err)
		}
	}
	if err := a.joining.usable(time.Now()); err != nil {
		return nil, err
	}
	token, err := a.cfg.Agent.joinToken()
	if err != nil {
		return nil, err
	}
	prover, err := a.prover.Prover(token) // made anew, so that it reads files that have changed
	if err != nil {
		return nil, err
	}
	csr, err := l.request(ctx, job)
	if err != nil {
		return nil, err
	}
	got, err := link.Attest(ctx, a.attestor, prover, csr)
	if fault.ReasonOf(err) == "key_taken" {
		// It is of an earlier identity of this node; with a new one it goes on.
		if l.pending, err = l.keeper.Generate(ctx, l.pending.ID, keys.ECP256); err != nil {
			return nil, wrap("make the agent's key", err)
		}
		return nil, fault.New(fault.Unavailable, "key_taken", "the agent's key was used before")
	}
	if err != nil {
		return nil, a.joining.explain(err)
	}
	own, err := l.adopt(got, job)
	if err == nil {
		a.log.Info("attested", "agent", own.ID, "kind", a.attestor)
	}
	return own, err
}

// renew gets a new SVID for a new key. A lost answer costs nothing: the server
// accepts the old SVID until the new one is used (R33).
func (l *life) renew(ctx context.Context, job agentid.Job) (*agentid.Own, error) {
	csr, err := l.request(ctx, job)
	if err != nil {
		return nil, err
	}
	got, err := l.link.Renew(ctx, csr)
	if err != nil {
		return nil, err
	}
	return l.adopt(got, job)
}

// request makes a certificate request for a key that is not in use. The same key
// is shown again if the answer to an attempt was lost: then it is the same
// attempt (K18).
func (l *life) request(ctx context.Context, job agentid.Job) ([]byte, error) {
	name := l.nextKey()
	if job.NewKey {
		l.pending = keys.Key{}
	} else if l.pending.Signer == nil && l.agent.own.Load() == nil {
		if key, err := l.keeper.Key(ctx, name); err == nil { // of a life that ended before the answer came
			l.pending = key
		}
	}
	if l.pending.Signer == nil || l.pending.ID != name {
		key, err := l.keeper.Generate(ctx, name, keys.ECP256)
		if err != nil && job.Volatile {
			// Better an identity that ends with this process than none.
			l.agent.log.Warn("the new key cannot be stored and is kept in memory", "key_id", name, "err", err)
			key = keys.Key{ID: name, Type: keys.ECP256}
			key.Signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		}
		if err != nil {
			return nil, wrap("make the agent's key", err)
		}
		l.pending = key
	}
	return svid.NewCSR(l.pending)
}

// adopt takes over a new SVID: verified, then durable, then used. The one before
// stays with its key until the next.
func (l *life) adopt(got serverlink.SVID, job agentid.Job) (*agentid.Own, error) {
	a := l.agent
	td := a.cfg.Agent.TrustDomain.TrustDomain
	own, err := newCredential(td, a.bundle.Load().Roots(), l.pending.ID, l.pending, got.Chain, time.Now())
	if err != nil {
		return nil, fault.New(fault.Unavailable, agentid.ReasonRefused, "the server gave the agent an SVID that does not verify").Because(err)
	}
	own.reattest = got.CanReattest
	if err := l.dir.save(td, own, a.bundle.Load()); err != nil {
		if !job.Volatile {
			return nil, err
		}
		a.log.Warn("the new SVID cannot be stored and is kept in memory", "err", err)
	}
	l.pending = keys.Key{}
	l.use(own)
	return own.own(), nil
}

// nextKey returns the name of the key that is not in use.
func (l *life) nextKey() string {
	if own := l.agent.own.Load(); own != nil && own.keyID == keyA {
		return keyB
	}
	return keyA
}

// direct takes a directive of the server.
func (l *life) direct(d *syncv1.Directive) {
	switch d := d.GetDirective().(type) {
	case *syncv1.Directive_Renew:
		l.identity.Post(agentid.Renewal{Within: milliseconds(d.Renew.GetWithinMs())})
	case *syncv1.Directive_Reconnect:
		l.identity.Post(agentid.Reconnection{Address: d.Reconnect.GetAddress(), Within: milliseconds(d.Reconnect.GetWithinMs())})
	case *syncv1.Directive_Reattest:
		l.identity.Post(agentid.Reattestation{Reason: d.Reattest.GetReason()})
	}
}

func milliseconds(n int64) time.Duration {
	return time.Duration(min(max(n, 0), int64(24*time.Hour/time.Millisecond))) * time.Millisecond
}

// setBundle follows the own trust domain's bundle. Every handshake from now on is
// judged by it.
func (l *life) setBundle(b *bundle.Bundle) {
	l.dir.dropped.learn(l.agent.bundle.Swap(b), b)
	l.identity.Post(agentid.BundleChanged{Authority: l.agent.own.Load().standing(b)})
}

// streamEnded looks at why the stream of changes ended.
func (l *life) streamEnded(err error) {
	reason := fault.ReasonOf(err)
	if reason != l.lastEnd && reason != "call_ended" { // it is said once, not at each attempt
		l.agent.log.Warn("not following the server", "reason", reason, "err", err)
	}
	l.lastEnd = reason
	l.cache.heed(err)
	if reason == "server_behind" {
		if err := l.link.Leave(); err != nil {
			l.agent.log.Warn("connection could not be moved", "err", err)
		}
	}
	if l.shown != nil {
		l.identity.Post(agentid.Ended{Serial: l.shown.serial, Err: err})
	}
}
