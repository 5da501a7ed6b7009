// Package nodeattest is the seam for proving what machine an agent runs on. An
// attestor is a conversation with both halves in one package (nodeattest/jointoken).
// It returns evidence; whether the node is admitted, banned or renewed is
// decided by the engine nodes, never here.
package nodeattest

import (
	"context"

	"github.com/plastron/plastron/internal/entry"
)

// Limits on what outsiders may send. Sizes are in bytes.
const (
	MaxPayload = 1 << 20
	MaxType    = 255
)

// Evidence is what a verified conversation proved.
type Evidence struct {
	// Path is the agent's path below /spire/agent/TYPE, such as "/5f3c…"; it
	// begins with a slash. The engine refuses a path that is not a valid one.
	Path string
	// Selectors are facts about the node; their type is the attestor's name.
	Selectors []entry.Selector
	// CanReattest says that the node may prove itself again at any time.
	CanReattest bool
	// FirstUse says that the proof is only good for the first node that shows it.
	FirstUse bool
	// OneTime, if not empty, is the hash of a one-time secret. The engine consumes
	// it in the commit that admits the node.
	OneTime []byte
}

// Challenger carries the server's half of a conversation: it sends a challenge
// and returns the answer. One challenge is at most MaxPayload.
type Challenger func(ctx context.Context, challenge []byte) (answer []byte, err error)

// Verifier is the server's half. Verify reads the payload of a node and may ask
// for more. Errors: fault.Invalid (malformed payload), fault.Denied (proof does
// not hold), fault.Unavailable (cannot tell now). It may be called concurrently.
type Verifier interface {
	Verify(ctx context.Context, payload []byte, ask Challenger) (Evidence, error)
}

// Prover is the agent's half: it makes the first payload and answers challenges.
type Prover interface {
	Payload(ctx context.Context) ([]byte, error)
	Answer(ctx context.Context, challenge []byte) ([]byte, error)
}
