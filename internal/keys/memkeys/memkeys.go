// Package memkeys keeps keys in memory: they end with the process, so every
// restart makes new authorities while the old ones stay in the bundle until
// their last document has expired.
package memkeys

import (
	"context"
	"sync"

	"github.com/plastron/plastron/internal/keys"
)

// Config is the configuration of the keeper; it has no settings.
type Config struct{}

// Open returns an empty keeper.
func (*Config) Open(context.Context) (keys.Keeper, error) {
	return &Keeper{keys: map[string]keys.Key{}}, nil
}

// Keeper holds keys in memory.
type Keeper struct {
	mu   sync.Mutex // guards keys
	keys map[string]keys.Key
}

// Generate makes a key and keeps it until the process ends.
func (k *Keeper) Generate(ctx context.Context, id string, t keys.Type) (keys.Key, error) {
	if err := keys.CheckID(id); err != nil {
		return keys.Key{}, err
	}
	if err := ctx.Err(); err != nil {
		return keys.Key{}, err
	}
	private, err := keys.NewPrivate(t)
	if err != nil {
		return keys.Key{}, err
	}
	key := keys.Key{ID: id, Type: t, Signer: private}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys[id] = key
	return key, nil
}

// Key returns the key of that id.
func (k *Keeper) Key(_ context.Context, id string) (keys.Key, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	key, ok := k.keys[id]
	if !ok {
		return keys.Key{}, keys.NotFound(id)
	}
	return key, nil
}

// Delete forgets a key.
func (k *Keeper) Delete(_ context.Context, id string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.keys, id)
	return nil
}
