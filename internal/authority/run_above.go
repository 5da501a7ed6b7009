package authority

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/internal/upstream"
)

// above is what this server knows of the authority above it.
type above struct {
	publisher upstream.Publisher // nil: it takes no JWT keys

	// mu guards everything below.
	mu     sync.Mutex
	known  bool
	trust  upstream.Trust
	since  map[string]time.Time // that roots are known to be tainted
	told   error                // why it cannot tell what it trusts
	refuse error                // why its last answer could not be used
}

// aboveNow is what steps may know of the authority above, nil without one.
func (a *Authority) aboveNow() *Above {
	if a.Upstream == nil {
		return nil
	}
	a.above.mu.Lock()
	defer a.above.mu.Unlock()
	return &Above{Publishes: a.above.publisher != nil, Known: a.above.known, Trust: a.above.trust, TaintedSince: a.above.since}
}

// UpstreamHealth says why the authority above cannot be used at the moment; nil
// also without one.
func (a *Authority) UpstreamHealth() error {
	a.above.mu.Lock()
	defer a.above.mu.Unlock()
	if a.above.refuse != nil {
		return a.above.refuse
	}
	return a.above.told
}

// learn takes in what the authority above trusts, unless something newer is known.
func (a *Authority) learn(t upstream.Trust) {
	u := &a.above
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.known && t.Version <= u.trust.Version {
		return
	}
	since := map[string]time.Time{} // a new one: steps hold the old
	for _, root := range t.Roots {
		if root.Tainted {
			since[string(root.ASN1)] = time.Now()
			if was, ok := u.since[string(root.ASN1)]; ok {
				since[string(root.ASN1)] = was
			}
		}
	}
	u.known, u.trust, u.since = true, t, since
	a.poke()
}

// watchAbove follows what the authority above trusts until ctx is done. If what it
// says makes anything panic, it is asked anew a minute later.
func (a *Authority) watchAbove(ctx context.Context) {
	for ctx.Err() == nil {
		if err := fault.Contain(func() error { a.hearAbove(ctx); return nil }); err != nil {
			a.told(ctx, err)
		}
		again := time.NewTimer(retryMost)
		select {
		case <-ctx.Done():
		case <-again.C:
		}
		again.Stop()
	}
}

func (a *Authority) hearAbove(ctx context.Context) {
	for trust, err := range a.Upstream.Watch(ctx) {
		if a.told(ctx, err); err == nil {
			a.learn(trust)
		}
	}
}

// told remembers whether the authority above says what it trusts.
func (a *Authority) told(ctx context.Context, err error) {
	a.above.mu.Lock()
	a.above.told = err
	a.above.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		a.Log.WarnContext(ctx, "upstream authority does not say what it trusts", "err", err)
	}
}

// judged remembers whether the authority above gave an answer that can be used.
func (a *Authority) judged(err error) error {
	a.above.mu.Lock()
	defer a.above.mu.Unlock()
	a.above.refuse = err
	return err
}

// mint has the authority above sign the key of a slot. What is not fit for use is
// an error, and what signs goes on.
func (a *Authority) mint(ctx context.Context, key keys.Key, s *registry.Slot) error {
	ctx, cancel := context.WithTimeout(ctx, aboveWait)
	defer cancel()
	csr, err := svid.NewAuthorityCSR(a.TrustDomain, key)
	if err != nil {
		return fmt.Errorf("make certificate request: %w", err)
	}
	minted, err := a.Upstream.Mint(ctx, upstream.Request{CSR: csr, TTL: a.TTL})
	if err != nil {
		return a.judged(fmt.Errorf("ask the upstream authority to sign: %w", err))
	}
	a.learn(minted.Trust)
	chain, err := a.checkMinted(minted, key)
	if a.judged(err) != nil {
		return err
	}
	for _, remark := range chain.Remarks {
		a.Log.WarnContext(ctx, "upstream authority works but may surprise", "reason", remark)
	}
	s.AuthorityID, s.Certificate, s.Chain, s.Root = chain.ID, chain.Certificates[0], chain.Certificates[1:], chain.Root
	s.NotBefore, s.NotAfter = chain.NotBefore, chain.NotAfter
	return nil
}

// checkMinted holds an answer to what may sign here. A root that is tainted is
// not led to while there are others.
func (a *Authority) checkMinted(minted upstream.Minted, key keys.Key) (svid.Chain, error) {
	var good, all [][]byte
	for _, root := range minted.Trust.Roots {
		all = append(all, root.ASN1)
		if !root.Tainted {
			good = append(good, root.ASN1)
		}
	}
	rules := svid.ChainRules{TrustDomain: a.TrustDomain, Key: key.Public(), Ours: true, Now: time.Now()}
	chain, err := svid.CheckChain(minted.Chain, all, rules)
	if err != nil {
		return svid.Chain{}, err
	}
	if len(good) > 0 && !slices.ContainsFunc(good, func(der []byte) bool { return bytes.Equal(der, chain.Root) }) {
		if chain, err = svid.CheckChain(minted.Chain, good, rules); err != nil {
			return svid.Chain{}, fault.New(fault.Precondition, "upstream_root_tainted", "the upstream authority signs below a root that it has tainted").Because(err)
		}
	}
	if left := chain.NotAfter.Sub(rules.Now); left < MinTTL {
		return svid.Chain{}, fault.New(fault.Unavailable, "upstream_lifetime_short", "the upstream authority gives an authority %s, which is too short to be used", left.Round(time.Second)).
			Fix("it may be about to be replaced: see what is above it")
	}
	// What is known by now may be newer than the answer.
	a.above.mu.Lock()
	defer a.above.mu.Unlock()
	if !slices.ContainsFunc(a.above.trust.Roots, func(r bundle.X509Authority) bool { return bytes.Equal(r.ASN1, chain.Root) }) {
		return svid.Chain{}, fault.New(fault.Unavailable, "upstream_root_unrelated", "the upstream authority signs below a root that it does not have any more")
	}
	return chain, nil
}

// PublishJWT makes a JWT key known above, and returns all keys that are.
func (a *Authority) PublishJWT(ctx context.Context, key bundle.JWTAuthority) ([]bundle.JWTAuthority, error) {
	ctx, cancel := context.WithTimeout(ctx, aboveWait)
	defer cancel()
	trust, err := a.above.publisher.PublishJWT(ctx, key)
	if err != nil {
		return nil, a.judged(fmt.Errorf("publish a JWT key above: %w", err))
	}
	a.judged(nil)
	a.learn(trust)
	return trust.JWT, nil
}

// Publisher returns PublishJWT, or nil if nobody above takes JWT keys.
func (a *Authority) Publisher() func(context.Context, bundle.JWTAuthority) ([]bundle.JWTAuthority, error) {
	if a.above.publisher == nil {
		return nil
	}
	return a.PublishJWT
}

// others are the keys of a kind that other servers have.
func others(snap *registry.Snapshot, server, kind string) (slots []registry.Slot) {
	for _, stored := range snap.Authorities("") {
		if stored.Kind == kind && stored.Server != server {
			slots = append(slots, stored.Slots...)
		}
	}
	return slots
}

// jitter draws a time of at most limit.
func jitter(limit time.Duration) time.Duration {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return time.Duration(binary.LittleEndian.Uint64(b[:]) % uint64(limit+1))
}
