package server

import (
	"context"
	"crypto"
	"io"
	"time"

	"github.com/plastron/plastron/internal/keys"
)

// gate lets the server sign as long as it may. Every signature of a trust domain
// is made by a key of the keeper, so none passes it by, whoever asks for it (R68).
type gate struct {
	keys.Keeper
	may func(now time.Time) error
}

// Generate implements keys.Keeper.
func (g gate) Generate(ctx context.Context, id string, t keys.Type) (keys.Key, error) {
	return g.guard(g.Keeper.Generate(ctx, id, t))
}

// Key implements keys.Keeper.
func (g gate) Key(ctx context.Context, id string) (keys.Key, error) {
	return g.guard(g.Keeper.Key(ctx, id))
}

func (g gate) guard(key keys.Key, err error) (keys.Key, error) {
	if err != nil {
		return keys.Key{}, err
	}
	key.Signer = guarded{key.Signer, g.may}
	return key, nil
}

// guarded is a key behind the gate.
type guarded struct {
	key crypto.Signer
	may func(now time.Time) error
}

// Public implements crypto.Signer.
func (g guarded) Public() crypto.PublicKey { return g.key.Public() }

// Sign implements crypto.Signer.
func (g guarded) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := g.may(time.Now()); err != nil {
		return nil, err
	}
	return g.key.Sign(rand, digest, opts)
}

// ask wraps who hands out an issuer, so that it is asked before anything is
// prepared or put on record: a refusal leaves no trace of a document that was
// not signed.
func ask[Issuer any](may func(now time.Time) error, issuer func(time.Time) (*Issuer, error)) func(time.Time) (*Issuer, error) {
	return func(now time.Time) (*Issuer, error) {
		if err := may(now); err != nil {
			return nil, err
		}
		return issuer(now)
	}
}
