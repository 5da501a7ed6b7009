// Package upstream is the seam to the authority above ours: who signs the
// certificates of this trust domain's own authorities, and which roots they lead
// to. An upstream answers; whether the answer is fit for use, when it is asked
// and what is done with it is decided by the engine authority, never here.
package upstream

import (
	"context"
	"iter"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/bundle"
)

// Request is an intermediate authority that is wished for.
type Request struct {
	// CSR is a DER PKCS#10 request for its key, made out to the trust domain's ID.
	CSR []byte
	// TTL is how long it should live; the answer may end sooner.
	TTL time.Duration
}

// Minted is an upstream's answer to a Request.
type Minted struct {
	Chain [][]byte // DER, the new certificate first; the root may be left out
	Trust Trust
}

// Trust is what an upstream trusts at one moment.
type Trust struct {
	Roots []bundle.X509Authority
	// JWT are the keys of the whole trust domain, of an upstream that is a Publisher.
	JWT []bundle.JWTAuthority
	// Version grows with each change. What an upstream has told in one answer, all
	// answers of that version or a later one know of too.
	Version uint64
}

// Authority is an upstream. All methods may be called concurrently.
type Authority interface {
	// Mint has an intermediate signed. Errors: fault.Unavailable (ask again later),
	// anything else says what an operator has to do.
	Mint(ctx context.Context, r Request) (Minted, error)
	// Watch yields what the upstream trusts: at once, and whenever it changes, until
	// ctx is done. An error says why it cannot be told at the moment, once for each
	// reason; what was known last goes on, and Watch too.
	Watch(ctx context.Context) iter.Seq2[Trust, error]
}

// Publisher is an Authority that passes JWT keys on, so that tokens of this
// server verify in the whole trust domain.
type Publisher interface {
	// PublishJWT makes a key known and returns what is trusted then, the key included.
	PublishJWT(ctx context.Context, key bundle.JWTAuthority) (Trust, error)
}

// Env is what a server lends its upstream.
type Env struct {
	TrustDomain spiffeid.TrustDomain
	Log         *slog.Logger
}

// Config opens an upstream; a plugin's decoded configuration is its factory. Open
// fails if the upstream could not be used, as far as this machine alone can tell.
type Config interface {
	Open(ctx context.Context, env Env) (Authority, error)
}
