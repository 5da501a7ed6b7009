package serverapi

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// Limits of every listener (R97). Sizes are in bytes.
const (
	maxConnections  = 50_000
	maxStrangers    = 20_000           // connections that have shown no certificate
	maxPerAddress   = 5000             // of those, from one address: a fleet behind one that attests at once
	strangerBytes   = 1<<20 + 64<<10   // from one: a message of 1 MiB, the handshake and the frames
	strangerIdle    = 30 * time.Second // without a byte from a stranger
	maxStreams      = 100              // per connection
	maxHeaderList   = 16 << 10
	maxMessage      = 4 << 20
	maxAnswer       = 64 << 20
	handshakeLimit  = 10 * time.Second
	idleLimit       = 5 * time.Minute
	connectionGrace = 5 * time.Minute
	// connectionAge is the end for connections that no directive of ours moved
	// before (see followAge); the library spreads it by 10 %.
	connectionAge    = 80 * time.Minute
	tcpKeepalive     = 15 * time.Second
	tcpUserTimeout   = 45 * time.Second
	minPing          = 10 * time.Second
	streamWindow     = 256 << 10
	connectionWindow = 1 << 20
)

// Limits of requests.
const (
	maxBatch      = 10_000 // entries or ids in one call
	maxIssueBatch = 500
	maxFilter     = 1000 // selectors or trust domains in one filter
	maxPage       = 10_000
	maxBundles    = 1000 // in one call
)

// pace is what one caller may ask for: a bucket that fills at rate per second up to burst.
type pace struct{ rate, burst float64 }

// paces returns each queue's pace per caller: an identity where there is one,
// else an address (R100).
func paces() map[queue]pace {
	return map[queue]pace{
		queueAttest:    {rate: 10, burst: 50},
		queueRenew:     {rate: 1, burst: 10},
		queueSign:      {rate: 2000, burst: 5000}, // SVIDs, not calls
		queueRead:      {rate: 50, burst: 200},
		queueStatus:    {rate: 1, burst: 20},
		queueSync:      {rate: 1, burst: 20},
		queueAuthority: {rate: 1, burst: 50}, // each is kept until it ends
		queueHint:      {rate: 1, burst: 20}, // so that no agent guesses its way through others' entries
	}
}

// widths returns how many calls of a queue run at once; more are refused, so
// that none waits longer than its caller (R17).
func widths() map[queue]int {
	return map[queue]int{queueAttest: 1000, queueRenew: 1000, queueSign: 1000, queueRead: 1000, queueStatus: 1000, queueSync: maxConnections,
		queueHint: 16, queueAuthority: 100}
}

// maxBuckets bounds the table of one queue; callers beyond it share a bucket.
const maxBuckets = 100_000

type bucket struct {
	tokens float64
	at     time.Time
}

// gate is the limits of one queue.
type gate struct {
	pace  pace
	slots chan struct{}

	// mu guards everything below.
	mu       sync.Mutex
	buckets  map[string]*bucket
	overflow bucket
	swept    time.Time
}

// newGate makes a gate; a zero pace means no limit on the rate.
func newGate(p pace, width int) *gate {
	return &gate{pace: p, slots: make(chan struct{}, width), buckets: map[string]*bucket{}, overflow: bucket{tokens: p.burst}}
}

// take charges n to the caller and, if the caller may not have it, returns how
// long to wait before asking again.
func (g *gate) take(caller string, n float64, now time.Time) (wait time.Duration, ok bool) {
	if g.pace.rate == 0 {
		return 0, true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	b := g.buckets[caller]
	if b == nil {
		if len(g.buckets) >= maxBuckets {
			g.sweepLocked(now)
		}
		if len(g.buckets) >= maxBuckets {
			b = &g.overflow
		} else {
			b = &bucket{tokens: g.pace.burst, at: now}
			g.buckets[caller] = b
		}
	}
	if now.After(b.at) {
		b.tokens = min(g.pace.burst, b.tokens+now.Sub(b.at).Seconds()*g.pace.rate)
		b.at = now
	}
	if b.tokens < n {
		return time.Duration((n - b.tokens) / g.pace.rate * float64(time.Second)), false
	}
	b.tokens -= n
	return 0, true
}

// sweepLocked drops the buckets that have filled up again, not more often than
// each second: a crowd of callers must not buy a walk over the table with each call.
func (g *gate) sweepLocked(now time.Time) {
	if now.Sub(g.swept) < time.Second {
		return
	}
	g.swept = now
	for caller, b := range g.buckets {
		if b.tokens+now.Sub(b.at).Seconds()*g.pace.rate >= g.pace.burst {
			delete(g.buckets, caller)
		}
	}
}

// enter charges one call and takes a slot, which leave gives back.
func (g *gate) enter(caller string, now time.Time) (leave func(), err error) {
	select {
	case g.slots <- struct{}{}:
	default:
		return nil, busy(time.Second)
	}
	if wait, ok := g.take(caller, 1, now); !ok {
		<-g.slots
		return nil, busy(wait)
	}
	return func() { <-g.slots }, nil
}

func busy(after time.Duration) error {
	return fault.New(fault.Exhausted, "rate_limited", "too many requests").Fix("try again in %s", after.Round(time.Millisecond)).NotBefore(after)
}

// charge takes n more from the caller's share, for calls that carry a batch.
func (s *Server) charge(ctx context.Context, q queue, n int) error {
	if n <= 0 || s.gates[q] == nil {
		return nil
	}
	if wait, ok := s.gates[q].take(callerFrom(ctx).key(), float64(n), time.Now()); !ok {
		return busy(wait)
	}
	return nil
}

// addressKey is the address by which a caller without identity is known: all of
// an IPv4 address, the first 64 bits of an IPv6 one.
func addressKey(address string) string {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return address
	}
	ip := ap.Addr().Unmap().WithZone("")
	if ip.Is6() {
		if p, err := ip.Prefix(64); err == nil {
			return p.String()
		}
	}
	return ip.String()
}
