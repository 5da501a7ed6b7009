// Package nodeattest is the seam for proving what machine an agent runs on. An
// attestor is a conversation with both halves in one package (nodeattest/jointoken).
// It returns evidence; whether the node is admitted, banned or renewed is
// decided by the engine nodes, never here.
package nodeattest

import (
	"context"
	"crypto/x509"
	"log/slog"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
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
	// Outside says that Path lies below /spire/agent itself, as the operator has
	// allowed. The engine still refuses a path below another attestor's name.
	Outside bool
	// Selectors are facts about the node; their type is the attestor's name.
	Selectors []entry.Selector
	// CanReattest says that the node may prove itself again at any time.
	CanReattest bool
	// FirstUse says that the proof is only good for the first node that shows it.
	FirstUse bool
	// OneTime, if not empty, is the hash of a one-time secret. The engine consumes
	// it in the commit that admits the node.
	OneTime []byte
	// Holder, if not empty, is a SHA-256 that tells who proved the node: another
	// value means other evidence. Not together with OneTime.
	Holder []byte
}

// Env is what a server lends its verifiers.
type Env struct {
	TrustDomain spiffeid.TrustDomain
	// Roots are the X.509 authorities of the own bundle at this moment.
	Roots func() []*x509.Certificate
	Log   *slog.Logger
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

// FactChecker is what a Verifier may also be: one that can ask the platform itself
// what runs on a node that it has admitted.
type FactChecker interface {
	// Checks reports whether a fact, such as "k8s.ns", can be found out as things are
	// configured.
	Checks(fact string) bool
	// Look asks what is true of the thing that facts name, which an agent states and
	// which is to run now on the node with these selectors. It believes nothing of
	// what is stated: the facts say where to look. Errors: fault.Denied (it does not
	// run on that node), fault.Precondition (nothing can be found out of that node),
	// fault.Unavailable (cannot tell now). It honours ctx and may be called
	// concurrently; of one platform it has a bounded number of calls under way.
	Look(ctx context.Context, node []entry.Selector, facts map[string]string) (Seen, error)
}

// Seen is what a platform says of one thing. Nobody writes to it.
type Seen struct {
	// Facts are all that the checker can find out.
	Facts map[string]string
	// Selectors are all that hold of those that are entry.Selector.Verifiable; sorted.
	Selectors []entry.Selector
	// Until is when the thing will be gone, as far as that is known; zero: it is not.
	Until time.Time
}
