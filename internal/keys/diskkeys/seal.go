package diskkeys

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"

	"github.com/plastron/plastron/internal/keys"
)

const (
	saltSize    = 32
	sealPurpose = "plastron seal 1"
)

// Seal implements keys.Sealer: a salt, and AES-256-GCM under a key that follows
// from the kept key and the salt (HKDF with SHA-256). Each seal has its own key, so
// that no nonce can repeat.
func (k *Keeper) Seal(ctx context.Context, id string, plain, bound []byte) ([]byte, error) {
	salt := make([]byte, saltSize)
	rand.Read(salt) // never fails (crypto/rand)
	aead, err := k.aead(ctx, id, salt)
	if err != nil {
		return nil, err
	}
	out := make([]byte, saltSize, saltSize+len(plain)+aead.Overhead())
	copy(out, salt)
	return aead.Seal(out, nil, plain, bound), nil
}

// Unseal implements keys.Sealer.
func (k *Keeper) Unseal(ctx context.Context, id string, sealed, bound []byte) ([]byte, error) {
	if len(sealed) < saltSize {
		return nil, keys.NotSealed(id)
	}
	aead, err := k.aead(ctx, id, sealed[:saltSize])
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, nil, sealed[saltSize:], bound)
	if err != nil {
		return nil, keys.NotSealed(id)
	}
	return plain, nil
}

func (k *Keeper) aead(ctx context.Context, id string, salt []byte) (cipher.AEAD, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	k.mu.Lock()
	s, ok := k.keys[id]
	k.mu.Unlock()
	if !ok {
		return nil, keys.NotFound(id)
	}
	secret, err := hkdf.Key(sha256.New, s.pkcs8, salt, sealPurpose, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}
