// Package publish is the seam to places where the trust domain's bundle is laid
// down for those who cannot ask a server for it: agents before they attest,
// proxies, webhooks. A place keeps the newest of what it is given; when it is
// given something, and again after a failure, is decided by the server.
package publish

import (
	"context"

	"github.com/plastron/plastron/internal/bundle"
)

// Edition is a bundle as an epoch of the store has it. Within an epoch another
// bundle has another sequence number, and a newer one a greater.
type Edition struct {
	Bundle *bundle.Bundle
	Epoch  string
}

// Place is one such place. Several servers of a store may have the same.
type Place interface {
	// Name tells the place from the server's others.
	Name() string
	// Publish lays an edition down, unless the place already has it, or a newer one of
	// the same epoch. Errors: fault.Unavailable (not now), anything
	// else says what an operator has to do; either way the place has what it had.
	Publish(ctx context.Context, e Edition) error
}

// Config opens the places of a plugin; its decoded configuration is its factory.
// Open fails if they could not be used, as far as this machine alone can tell.
type Config interface {
	Open(ctx context.Context) ([]Place, error)
}
