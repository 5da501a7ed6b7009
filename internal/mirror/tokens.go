package mirror

import (
	"encoding/binary"
	"slices"
	"time"
)

// tokens caches JWT-SVIDs.
type tokens struct {
	size int
	held map[string]*token
	uses uint64
}

// token is one JWT-SVID.
type token struct {
	text                string
	keyID               string
	issuedAt, expiresAt time.Time
	lastUse             uint64
}

func newTokens(size int) *tokens { return &tokens{size: size, held: map[string]*token{}} }

// tokenKey names a token: grant, its revision, the facts that fill it, and the
// exact set of audiences.
// Every part carries its length, so that no two sets share a key (R52, RG48).
func tokenKey(grantID string, revision uint64, facts map[string]string, audience []string) string {
	audience = slices.Clone(audience)
	slices.Sort(audience)
	audience = slices.Compact(audience)
	var b []byte
	for _, part := range append([]string{grantID, factsKey(facts)}, audience...) {
		b = binary.AppendUvarint(b, uint64(len(part)))
		b = append(b, part...)
	}
	return string(binary.AppendUvarint(b, revision))
}

// find returns a token that may be handed out now, and whether it should be
// replaced: half of its life is over.
func (t *tokens) find(key string, now time.Time) (tok *token, old bool) {
	tok = t.held[key]
	if tok == nil {
		return nil, true
	}
	if !now.Before(endOf(tok.issuedAt, tok.expiresAt)) {
		delete(t.held, key)
		return nil, true
	}
	t.uses++
	tok.lastUse = t.uses
	// A token from the future was cached by a clock that has been put back since (R107).
	return tok, now.Sub(tok.issuedAt) > tok.expiresAt.Sub(tok.issuedAt)/2 || now.Before(tok.issuedAt)
}

// keep remembers a token, at the cost of the one that was not used for longest.
func (t *tokens) keep(key string, tok *token) {
	t.uses++
	tok.lastUse = t.uses
	t.held[key] = tok
	if len(t.held) <= t.size {
		return
	}
	oldest := key
	for k, other := range t.held {
		if other.lastUse < t.held[oldest].lastUse {
			oldest = k
		}
	}
	delete(t.held, oldest)
}

// drop forgets every token whose key is not good any more.
func (t *tokens) drop(good func(keyID string) bool) {
	for k, tok := range t.held {
		if !good(tok.keyID) {
			delete(t.held, k)
		}
	}
}
