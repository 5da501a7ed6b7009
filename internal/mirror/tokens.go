package mirror

import (
	"cmp"
	"crypto"
	"encoding/binary"
	"maps"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// tokenWorkers is how many tokens are renewed at a time, without anyone waiting.
const tokenWorkers = 4

// tokens are the JWT-SVIDs that workloads have asked for, so that the next to
// ask has one at once, and is renewed one before it ends.
type tokens struct {
	size  int
	asked map[string]*ask // by askKey
	turns uint64

	failures int       // of the way to the server, in a row
	notYet   time.Time // no renewal before
	wait     time.Duration

	first end // as it was when due last looked
}

// ask is one identity and set of audiences that a workload asked for lately.
type ask struct {
	key, identity string // identity: the part of key that names whose token it is
	grantID       string
	facts         map[string]string // of a rule
	audience      []string

	token    *token        // nil: none that may be handed out
	life     time.Duration // of its last token
	used     time.Time     // by a workload
	turn     uint64
	busy     bool // its renewal is under way
	failures int
	notYet   time.Time
}

// token is one JWT-SVID.
type token struct {
	text  string
	keyID string
	of    subject
	span
}

// subject is what a grant gave when the token was asked for.
type subject struct {
	id       spiffeid.ID
	revision uint64 // of the grant
}

// usable reports whether the token may be handed out for what its grant gives now (R35, R52).
func (t *token) usable(of subject, now time.Time) bool {
	return t != nil && t.of == of && now.Before(endOf(t.issuedAt, t.expiresAt))
}

func newTokens(size int) *tokens { return &tokens{size: size, asked: map[string]*ask{}} }

// askKey names what is asked for: grant, the facts that fill it, and the exact
// set of audiences. With the grant's revision, which the token itself carries, it
// is what R52 asks for. Every part carries its length, so that no two asks share a key (RG48).
func askKey(grantID string, facts map[string]string, audience []string) string {
	return identityKey(grantID, facts) + audienceKey(audience)
}

func identityKey(grantID string, facts map[string]string) string {
	return string(appendPart(appendPart(nil, grantID), factsKey(facts)))
}

func audienceKey(audience []string) string {
	audience = slices.Clone(audience)
	slices.Sort(audience)
	var b []byte
	for _, a := range slices.Compact(audience) {
		b = appendPart(b, a)
	}
	return string(b)
}

func appendPart(b []byte, part string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(part))), part...)
}

// find returns the token that may be handed out now, or nil, and notes that
// somebody asked for it.
func (t *tokens) find(key string, of subject, now time.Time) *token {
	a := t.asked[key]
	if a == nil {
		return nil
	}
	t.turns++
	a.used, a.turn = now, t.turns
	if !a.token.usable(of, now) {
		return nil
	}
	return a.token
}

// keep remembers a token that a workload asked for.
func (t *tokens) keep(grantID string, facts map[string]string, audience []string, tok *token, now time.Time) {
	key := askKey(grantID, facts, audience)
	a := t.asked[key]
	if a == nil {
		a = &ask{key: key, identity: identityKey(grantID, facts), grantID: grantID, facts: maps.Clone(facts), audience: slices.Clone(audience)}
		t.asked[key] = a
	}
	t.turns++
	a.used, a.turn = now, t.turns
	t.renewed(a, tok)
	if len(t.asked) > t.size {
		t.evict()
	}
}

func (t *tokens) renewed(a *ask, tok *token) {
	a.token, a.life, a.failures, a.notYet = tok, tok.expiresAt.Sub(tok.issuedAt), 0, time.Time{}
	t.failures, t.notYet = 0, time.Time{}
}

// evict gives up one ask: of the identity that has the most, the one that was not
// used for longest. So one workload that asks for ever new audiences takes no
// other's place.
func (t *tokens) evict() {
	count := map[string]int{}
	most := 0
	for _, a := range t.asked {
		count[a.identity]++
		most = max(most, count[a.identity])
	}
	var oldest *ask
	for _, a := range t.asked {
		if count[a.identity] == most && (oldest == nil || a.turn < oldest.turn) {
			oldest = a
		}
	}
	delete(t.asked, oldest.key)
}

// drop forgets every token whose key is not good any more. What was asked for is
// remembered, so that it is signed anew.
func (t *tokens) drop(good func(keyID string) bool) {
	for _, a := range t.asked {
		if a.token != nil && !good(a.token.keyID) {
			a.token = nil
		}
	}
}

// follow tells the tokens that the wall clock was set.
func (t *tokens) follow(at moment) {
	for _, a := range t.asked {
		if a.token != nil {
			a.token.follow(at)
		}
	}
}

// retry lets renewals begin at once: the server is back, or its keys have changed.
func (t *tokens) retry() {
	t.failures, t.notYet = 0, time.Time{}
	for _, a := range t.asked {
		a.notYet = time.Time{}
	}
}

// failed decides when a renewal is tried again.
func (t *tokens) failed(a *ask, err error, now time.Time, seed uint64) {
	switch fault.KindOf(err) {
	case fault.Unavailable, fault.Exhausted, fault.Internal: // the next would most likely fail too
		t.failures++
		t.wait = max(backoff(t.failures, signFloor, signCeiling, seed, 0), fault.AfterOf(err))
		t.notYet = now.Add(t.wait)
	default:
		a.failures++
		a.notYet = now.Add(backoff(a.failures, grantFloor, grantCeiling, seed, 0))
	}
}

// held counts the tokens that may be handed out.
func (t *tokens) held() (n int) {
	for _, a := range t.asked {
		if a.token != nil {
			n++
		}
	}
	return n
}

// due picks what to renew now, so that at most n renewals are under way, the
// soonest to end first, and says when to look again. gives says what the grant
// gives now, if it may be cached. What nobody has asked for during a token's whole
// life ends with the token.
func (t *tokens) due(now time.Time, n int, gives func(*ask) (of subject, ends bool, ok bool)) (asks []*ask, next time.Time) {
	next, t.first = now.Add(statusInterval), end{}
	soon := func(at time.Time) {
		if at.Before(next) {
			next = at
		}
	}
	busy := 0
	for key, a := range t.asked {
		of, ends, there := gives(a)
		unused := now.Sub(a.used) > a.life
		if a.token != nil && !now.Before(endOf(a.token.issuedAt, a.token.expiresAt)) {
			a.token = nil
		}
		if there && !unused && a.token.usable(of, now) && !ends {
			t.first.add(of.id, endOf(a.token.issuedAt, a.token.expiresAt))
		}
		switch {
		case !there, unused && a.token == nil && !a.busy:
			delete(t.asked, key)
		case a.busy:
			busy++
		case a.token != nil && a.token.of == of && !due(a.token.renewAt, now, a.life):
			soon(a.token.renewAt)
		case unused:
			soon(endOf(a.token.issuedAt, a.token.expiresAt))
		case !due(a.notYet, now, grantCeiling):
			soon(a.notYet)
		default:
			asks = append(asks, a)
		}
	}
	if len(asks) > 0 && !due(t.notYet, now, t.wait) {
		soon(t.notYet)
		return nil, next
	}
	slices.SortFunc(asks, func(a, b *ask) int {
		return cmp.Or(a.end().Compare(b.end()), cmp.Compare(a.turn, b.turn))
	})
	return asks[:min(len(asks), max(n-busy, 0))], next // the end of each renewal has us look again
}

// end is the zero time of an ask without a token: it comes first.
func (a *ask) end() time.Time {
	if a.token == nil {
		return time.Time{}
	}
	return a.token.expiresAt
}

// verifyJWT checks a token that the server signed, and notes whose key it was.
func verifyJWT(tok *token, own *trust, audience []string, now time.Time) (svid.Claims, error) {
	return svid.ValidateJWT(tok.text, audience, func(td spiffeid.TrustDomain, keyID string) (crypto.PublicKey, bool) {
		tok.keyID = keyID
		if td != own.bundle.TrustDomain {
			return nil, false
		}
		return own.bundle.JWTKey(keyID)
	}, now)
}
