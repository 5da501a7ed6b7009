// Package mirror is the agent's copy of what it was granted: grants, bundles,
// and an SVID with its key for each entry, signed before anyone asks, and for each
// process that a rule names, signed when it first asks. It follows
// the server's stream of changes, renews in time, and wakes exactly the
// subscribers whose answer has changed. Who a caller is and what the wire looks
// like is not decided here.
//
// The package is a step machine: everything but run.go is pure, takes the time
// as an argument, and from equal events makes equal steps.
//
// What must always hold: a partial answer is never applied, a delta leads from
// exactly where we stand, and a sum over everything held shows divergence; an
// SVID is verified before it is kept (R36) and its authority is in the bundle
// that is handed out with it (R58); nothing expired is handed out (R35); one bad
// item costs only itself (R59); keys leave memory only in what Keep returns, for
// its caller to seal (R48).
package mirror

import (
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Sizes and times that are not configured.
const (
	DefaultCacheSize = 1000     // SVIDs without a subscriber, and JWT-SVIDs
	maxBatch         = 500      // SVIDs signed by one call
	maxRSABatch      = 16       // the same with RSA keys, which take long to make
	maxItems         = 1 << 20  // of one inventory
	maxPending       = 64 << 20 // bytes of one delta before it is complete
	protocolVersion  = 1
	capabilityRules  = "rules" // grants may be rules
	statusInterval   = 5 * time.Minute
	// The server is told of another first end within tellSpacing, and within tellSoon
	// if it is off by more than a tellOff-th of what is left.
	tellSpacing = 10 * time.Second
	tellSoon    = time.Second
	tellOff     = 200
)

// Identity is one SVID with its key, ready to be handed out.
type Identity struct {
	GrantID   string
	ID        spiffeid.ID
	Hint      string
	Chain     []byte // DER, leaf first, one after the other
	Key       []byte // PKCS#8 DER
	ExpiresAt time.Time
}

// Bundle is what verifies one trust domain's SVIDs.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	X509        []byte // DER roots, one after the other; may be empty for a foreign trust domain
	JWKS        []byte // RFC 7517, keys of JWT-SVIDs only
	Keys        *bundle.Bundle
}

// View is everything that a caller with certain selectors may have, at one
// moment. Its bytes are shared: do not write to them.
type View struct {
	// Synced is false until the server has said once, completely, what there is.
	Synced bool
	// Matched are the caller's grants, the oldest first.
	Matched []entry.Matched
	// Identities are the matched grants that have an SVID, in the same order.
	Identities []Identity
	// Pending counts the matched grants whose SVID is on its way and worth waiting for.
	Pending int
	// Bundle is the own trust domain's, Federated those that matched grants name,
	// by name.
	Bundle    Bundle
	Federated []Bundle
	// Unknown are those that matched grants name and of which no bundle is held.
	Unknown []spiffeid.TrustDomain
	// Trace says why.
	Trace entry.Trace
}

// Stats says how much is held.
type Stats struct {
	Grants, X509SVIDs, Subscribers int
	Synced                         bool
	Following                      bool // in step, on a stream that is open
	BundleSequence                 uint64
}

// jitter spreads d by ±10 %. n numbers the things that one event spreads.
func jitter(d time.Duration, seed uint64, n int) time.Duration {
	return d - d/10 + time.Duration(fraction(seed, n)*float64(d/5))
}

// backoff is the wait after the given number of failures, the first being 1:
// from floor, doubling, at most ceiling, spread over its upper half (R110).
func backoff(failures int, floor, ceiling time.Duration, seed uint64, n int) time.Duration {
	d := floor << min(max(failures-1, 0), 16)
	d = min(d, ceiling)
	return d/2 + time.Duration(fraction(seed, n)*float64(d/2))
}

// fraction returns the n-th number in [0, 1) that follows from seed (splitmix64).
func fraction(seed uint64, n int) float64 {
	z := seed + uint64(n+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return float64((z^z>>31)>>11) / (1 << 53)
}

// due reports whether t has come. A time further away than anything waits here
// was set by a clock that has been put back since: it has come (R107).
func due(t, now time.Time, longest time.Duration) bool {
	return !now.Before(t) || t.Sub(now) > longest
}
