// Package keys is the seam to private keys: who makes them, keeps them and
// signs with them. A key has a name of ours ("x509-CA-A") and never leaves its
// keeper except as a crypto.Signer. What a key is used for is not decided here.
package keys

import (
	"context"
	"crypto"

	"github.com/plastron/plastron/internal/fault"
)

// Type is a kind of key, spelled as in configuration files.
type Type string

// The types that authorities and workloads may have.
const (
	ECP256  Type = "ec-p256"
	ECP384  Type = "ec-p384"
	RSA2048 Type = "rsa-2048"
	RSA4096 Type = "rsa-4096"
)

// ParseType reads a key type as configuration spells it.
func ParseType(s string) (Type, error) {
	switch t := Type(s); t {
	case ECP256, ECP384, RSA2048, RSA4096:
		return t, nil
	}
	return "", fault.New(fault.Invalid, "key_type_invalid", "%q is not a key type", s).
		Fix("use ec-p256, ec-p384, rsa-2048 or rsa-4096")
}

// Key is one key pair in a keeper's custody.
type Key struct {
	ID   string
	Type Type
	crypto.Signer
}

// Keeper makes and keeps keys. All methods may be called concurrently.
type Keeper interface {
	// Generate makes a key and keeps it under id, replacing a key of that id. When
	// it returns the key is as durable as the keeper makes keys at all.
	Generate(ctx context.Context, id string, t Type) (Key, error)
	// Key returns the key of that id, or fault.NotFound.
	Key(ctx context.Context, id string) (Key, error)
	// Delete forgets a key. An unknown id is not an error.
	Delete(ctx context.Context, id string) error
}

// Config opens a keeper; a plugin's decoded configuration is its factory.
type Config interface {
	Open(ctx context.Context) (Keeper, error)
}

// Sealer is what a keeper is besides if its keys outlive the process: it locks
// data away under a key that it keeps.
type Sealer interface {
	// Seal encrypts plain, so that only who holds the kept key of that id can read it,
	// and nobody else can change it unseen. bound is not stored: Unseal needs the same.
	// A key that seals is used for nothing else.
	Seal(ctx context.Context, id string, plain, bound []byte) ([]byte, error)
	// Unseal returns what Seal was given: fault.NotFound without the key,
	// fault.Precondition if it was sealed with another key or bound, or was changed.
	Unseal(ctx context.Context, id string, sealed, bound []byte) ([]byte, error)
}

// NotSealed is what Unseal returns for what does not open.
func NotSealed(id string) error {
	return fault.New(fault.Precondition, "seal_broken", "it was not sealed with the key %q for this purpose, or was changed since", id)
}
