package authority

import (
	"bytes"
	"context"
	"crypto/sha256"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/registry"
)

// failingKeeper fails after some reads.
type failingKeeper struct {
	keys.Keeper
	reads int
}

func (k *failingKeeper) Key(ctx context.Context, id string) (keys.Key, error) {
	if k.reads--; k.reads < 0 {
		return keys.Key{}, fault.New(fault.Precondition, "keeper_broken", "broken")
	}
	return k.Keeper.Key(ctx, id)
}

// R63, R69: a store that was put back to where a key that was revoked since signed. The
// key signs nothing, not even between the step that takes it out of the bundle and the
// one that ends its use; and it may be gone.
func TestRevokedWasActive(t *testing.T) {
	w := newWorld(t, memory(t), 24*time.Hour)
	a, stop := w.start("s1")
	_, before := authorities(t, a)
	stop()
	var slots []registry.Slot
	for _, kind := range []string{X509, JWT} {
		slots = append(slots, a.Slots(kind)[0])
	}
	for _, s := range slots {
		w.revoked = append(w.revoked, bundle.Revocation{KeyHash: sha256.Sum256(s.PublicKey), Until: s.NotAfter})
	}
	whole := w.keeper
	w.keeper = &failingKeeper{Keeper: whole, reads: 2}
	a = w.authority("s1")
	if err := a.Start(t.Context()); fault.ReasonOf(err) != "keeper_broken" {
		t.Fatalf("Start() = %v", err)
	}
	if b := w.bundle(); len(b.X509) != 0 || len(b.Revoked) != 2 {
		t.Fatalf("the first step was another one: %+v", b)
	}
	if i, err := a.X509(time.Now()); err == nil {
		t.Errorf("%v signs and is in no bundle", i)
	}
	// Once more from the start, without the keys.
	w.update(func(tx *registry.Tx) error {
		b, err := tx.Bundle(domain())
		if err != nil {
			return err
		}
		b.Revoked = nil
		return tx.PutBundle(b)
	})
	w.keeper = memory(t)
	a, stop = w.start("s1")
	defer stop()
	if _, now := authorities(t, a); now == before {
		t.Errorf("%s signs", now)
	}
}

// R69: what a server remembers as revoked it takes out of a store that was restored,
// and keeps from coming back; it signs no more with such a key.
func TestRevokedAndRestored(t *testing.T) {
	w := newWorld(t, memory(t), 24*time.Hour)
	var kept []bundle.Revocation
	w.remember = func(r []bundle.Revocation) error { kept = r; return nil }
	a, stop := w.start("s1")
	first, _ := authorities(t, a)
	before := w.bundle()
	rotate(t, a, X509)
	for _, do := range []func(context.Context, string, string, string) (registry.Slot, error){a.Taint, a.Revoke} {
		if _, err := do(t.Context(), "test", X509, first); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	if len(kept) != 1 || len(w.bundle().X509) != 1 || len(w.bundle().Revoked) != 1 {
		t.Fatalf("remembered %v, the bundle is %+v", kept, w.bundle())
	}
	// The store as it was before.
	restored := before.Clone()
	restored.Sequence = w.bundle().Sequence + 1
	w.update(func(tx *registry.Tx) error { return tx.PutBundle(restored) })
	w.revoked = kept
	a, stop = w.start("s1")
	defer stop()
	b := w.bundle()
	if !b.IsRevoked(kept[0].KeyHash) || bytes.Contains(b.X509DER(), before.X509[0].ASN1) {
		t.Errorf("after the restore: %+v", b)
	}
	if x, _ := authorities(t, a); x == first {
		t.Errorf("%s signs", x)
	}
}
