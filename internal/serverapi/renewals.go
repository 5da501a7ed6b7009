package serverapi

import (
	"crypto/sha256"
	"maps"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxRemembered bounds what a server remembers to have signed: some 60 MB.
const maxRemembered = 1 << 20

// renewals remembers for which agent, grant and facts something was signed here.
// A server that cannot see what others change goes on with those and grants
// nothing else (R77). It is kept in memory: a server that restarts has to reach
// its store first in any case.
type renewals struct {
	keep time.Duration // how long a pair is remembered, at least
	max  int

	// mu guards everything below.
	mu    sync.Mutex
	until map[renewal]int64 // Unix seconds
	sweep int               // look for what has ended when there are so many
}

// renewal stands for an agent, a grant and facts.
type renewal [16]byte

func newRenewals(keep time.Duration) *renewals {
	return &renewals{keep: keep, max: maxRemembered, until: map[renewal]int64{}, sweep: 1024}
}

func renewalOf(agent spiffeid.ID, what pair) renewal {
	h := sha256.Sum256(append(what[:], agent.String()...))
	return renewal(h[:16])
}

// note remembers what is signed until then. When there is no room, anything else
// is forgotten, which can only refuse too much.
func (r *renewals) note(agent spiffeid.ID, what pair, end, now time.Time) {
	if kept := now.Add(r.keep); kept.After(end) {
		end = kept
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.until) >= min(r.sweep, r.max) {
		maps.DeleteFunc(r.until, func(_ renewal, end int64) bool { return end <= now.Unix() })
		r.sweep = max(1024, 2*len(r.until))
	}
	key := renewalOf(agent, what)
	if _, known := r.until[key]; !known && len(r.until) >= r.max {
		for any := range r.until {
			delete(r.until, any)
			break
		}
	}
	r.until[key] = max(r.until[key], end.Unix())
}

// has reports whether it was signed before.
func (r *renewals) has(agent spiffeid.ID, what pair, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return now.Unix() < r.until[renewalOf(agent, what)]
}

// stale says why nothing is to be granted that was not granted before, or nil.
func (s *Server) stale() error {
	if s.cfg.Stale == nil {
		return nil
	}
	return s.cfg.Stale()
}

// mayGrant says why an agent is not to get something for a grant now, or nil:
// what is stale is the answer of stale, asked once for a whole batch.
func (s *Server) mayGrant(stale error, agent spiffeid.ID, what pair, now time.Time) error {
	if stale == nil || s.renewals.has(agent, what, now) {
		return nil
	}
	return fault.New(fault.Unavailable, fault.ReasonOf(stale), "%s", fault.MessageOf(stale)).
		Fix("try again, or at another server of the trust domain")
}
