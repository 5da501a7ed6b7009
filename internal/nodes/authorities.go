package nodes

import (
	"crypto/sha256"
	"slices"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// publishedFor is how long the JWT key of a downstream server stays in the bundle
// after its end: for validators whose clock is slow, and for ours that is fast.
const publishedFor = time.Hour

// forgetAuthorities has the keys looked up anew once they may have changed.
func (e *Engine) forgetAuthorities(b store.Batch) {
	changed := len(b.Writes) == 0 // loaded afresh
	for _, w := range b.Writes {
		changed = changed || slices.ContainsFunc(w.Changes, func(c store.Change) bool {
			return strings.HasPrefix(c.Key, "/bundle/") || strings.HasPrefix(c.Key, "/authority/") || strings.HasPrefix(c.Key, "/downstream/")
		})
	}
	if changed {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.authorities = nil
	}
}

// checkAuthorities compares the key with every key of our bundle, with those of
// servers, which are not in it below an upstream, and of authorities below ours (R4).
func (e *Engine) checkAuthorities(key svid.PublicKey) error {
	own := false
	e.cfg.Registry.View(func(s *registry.Snapshot) {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.authorities == nil {
			e.authorities = authorityKeys(s, e.cfg.TrustDomain)
		}
		own = e.authorities[key.Hash]
	})
	if own {
		return fault.New(fault.Invalid, "key_of_authority", "the key is one of the trust domain's own").Fix("make a new key")
	}
	return nil
}

func authorityKeys(s *registry.Snapshot, td spiffeid.TrustDomain) map[[32]byte]bool {
	hashes := map[[32]byte]bool{}
	if b, err := s.Bundle(td); err == nil {
		hashes = b.KeyHashes()
	}
	for _, a := range s.Authorities("") {
		for _, slot := range a.Slots {
			hashes[sha256.Sum256(slot.PublicKey)] = true
		}
	}
	for d := range s.Downstreams() {
		if len(d.KeyHash) == sha256.Size {
			hashes[[32]byte(d.KeyHash)] = true
		}
	}
	return hashes
}

// endedDownstream are the serial numbers of authorities below ours that have ended.
func endedDownstream(s *registry.Snapshot, now time.Time) (serials []string) {
	for d := range s.Downstreams() {
		if !now.Before(d.NotAfter) {
			serials = append(serials, d.Serial)
		}
	}
	return serials
}

// endedPublished are the key ids of downstream servers' JWT keys that have ended.
// Servers' own leave the bundle by their life cycle.
func endedPublished(s *registry.Snapshot, td spiffeid.TrustDomain, now time.Time) (ids []string) {
	b, err := s.Bundle(td)
	if err != nil {
		return nil
	}
	own := map[string]bool{}
	for _, a := range s.Authorities("") {
		for _, slot := range a.Slots {
			own[slot.AuthorityID] = true
		}
	}
	for _, k := range b.JWT {
		if !k.ExpiresAt.IsZero() && now.After(k.ExpiresAt.Add(publishedFor)) && !own[k.KeyID] {
			ids = append(ids, k.KeyID)
		}
	}
	return ids
}
