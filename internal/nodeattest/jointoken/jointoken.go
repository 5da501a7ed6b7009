// Package jointoken proves a node by a secret that works once. Both halves are
// here: the agent sends the token, the server turns it into evidence.
//
// A token is never stored, logged or put in an ID: the store holds its SHA-256,
// the agent's ID a second one-way value of it (R22). Whether the token exists,
// is still good and unused is decided by the engine nodes, in the commit that
// admits the node.
package jointoken

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"math"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
)

// Name is the attestor's name in configuration, IDs and selectors.
const Name = "join_token"

// MaxToken is the longest token in bytes; minBits the least strength in bits.
const (
	MaxToken = 255
	minBits  = 128
)

const (
	digits   = "0123456789"
	hexLower = "abcdef"
	hexUpper = "ABCDEF"
	lower    = "abcdefghijklmnopqrstuvwxyz"
	upper    = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
)

// Token is a join token. It prints as its name; Reveal is the one way to its text.
type Token struct{ text string }

// Generate makes a token of 130 random bits.
func Generate() Token { return Token{rand.Text()} }

// Parse reads a token that a node or an operator gives. Its text is bounded and
// printable; nothing is trimmed and no case is folded (K7, K8, K10).
func Parse(text string) (Token, error) {
	if text == "" || len(text) > MaxToken {
		return Token{}, fault.New(fault.Invalid, "join_token_malformed", "a join token has 1 to %d bytes", MaxToken)
	}
	for _, c := range []byte(text) {
		if c <= ' ' || c > '~' {
			return Token{}, fault.New(fault.Invalid, "join_token_malformed", "a join token has printable ASCII characters only, and no space")
		}
	}
	return Token{text}, nil
}

// Choose is Parse for a token that an operator chose: it must be as hard to
// guess as one of ours (R22, K12).
func Choose(text string) (Token, error) {
	t, err := Parse(text)
	if err != nil {
		return Token{}, err
	}
	if strength(text) < minBits {
		return Token{}, fault.New(fault.Invalid, "join_token_weak", "the join token is too easy to guess").
			Fix("leave it out and one is made, or give at least 128 random bits, such as a random UUID")
	}
	return t, nil
}

// strength estimates how many bits a guesser lacks: the size of the smallest
// usual alphabet that holds the letters and digits, for each of them; nothing
// for text that follows a pattern. Separators count for nothing. Of random UUIDs
// one in a million falls short: it has no letter, or eight digits that climb.
func strength(text string) float64 {
	var kept []byte
	seen := map[byte]bool{}
	for _, c := range []byte(text) {
		if strings.IndexByte(digits+lower+upper, c) >= 0 {
			kept = append(kept, c)
			seen[c] = true
		}
	}
	if len(seen) < 8 || repeats(kept) || climbs(kept) {
		return 0
	}
	for _, alphabet := range []string{digits, digits + hexLower, digits + hexUpper, lower, upper, digits + lower, digits + upper, lower + upper} {
		if strings.Trim(string(kept), alphabet) == "" {
			return float64(len(kept)) * math.Log2(float64(len(alphabet)))
		}
	}
	return float64(len(kept)) * math.Log2(float64(len(digits+lower+upper)))
}

// repeats reports whether b is one block again and again.
func repeats(b []byte) bool {
	for period := 1; period <= len(b)/2; period++ {
		same := true
		for i := period; i < len(b) && same; i++ {
			same = b[i] == b[i-period]
		}
		if same {
			return true
		}
	}
	return false
}

// climbs reports whether eight neighbours are equal or count up or down.
func climbs(b []byte) bool {
	run, last := 1, 2
	for i := 1; i < len(b); i++ {
		step := int(b[i]) - int(b[i-1])
		if step >= -1 && step <= 1 && (step == last || run == 1) {
			run++
		} else {
			run = 1
		}
		last = step
		if run >= 8 {
			return true
		}
	}
	return false
}

// Reveal returns the token's text, to be shown once to who made it or sent to the server.
func (t Token) Reveal() string { return t.text }

// Hash is what the store keeps of the token.
func (t Token) Hash() []byte {
	h := sha256.Sum256([]byte(t.text))
	return h[:]
}

// Path is the agent's path below /spire/agent/join_token. It does not lead back
// to the token, and not to the stored hash.
func (t Token) Path() string {
	h := sha256.Sum256([]byte("plastron join token id" + t.text))
	return "/" + hex.EncodeToString(h[:16])
}

// String keeps the secret out of messages.
func (Token) String() string { return "jointoken.Token" }

// GoString keeps the secret out of %#v.
func (Token) GoString() string { return "jointoken.Token" }

// LogValue keeps the secret out of logs.
func (Token) LogValue() slog.Value { return slog.StringValue("jointoken.Token") }

// Config opens the server's half. It has no options.
type Config struct{}

// Open returns the server's half.
func (*Config) Open(context.Context, nodeattest.Env) (nodeattest.Verifier, error) {
	return verifier{}, nil
}

type verifier struct{}

// Verify implements nodeattest.Verifier. Any well-formed token is evidence; it
// proves something only together with the engine's stored hash.
func (verifier) Verify(_ context.Context, payload []byte, _ nodeattest.Challenger) (nodeattest.Evidence, error) {
	if len(payload) > MaxToken {
		return nodeattest.Evidence{}, fault.New(fault.Invalid, "join_token_malformed", "a join token has 1 to %d bytes", MaxToken)
	}
	t, err := Parse(string(payload))
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	return nodeattest.Evidence{Path: t.Path(), FirstUse: true, OneTime: t.Hash()}, nil
}

// Prover is the agent's half: it shows its token.
type Prover struct{ Token Token }

// Payload implements nodeattest.Prover.
func (p Prover) Payload(context.Context) ([]byte, error) { return []byte(p.Token.text), nil }

// Answer implements nodeattest.Prover. A join token has no second round, so a
// challenge means that the other side is not what it says.
func (Prover) Answer(context.Context, []byte) ([]byte, error) {
	return nil, fault.New(fault.Denied, "unexpected_challenge", "the server asked a question that join tokens do not have")
}
