package keystest

import (
	"bytes"
	"context"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
)

// RunSealer holds a keeper that can seal to the contract of keys.Sealer.
func RunSealer(t *testing.T, newConfig func(t *testing.T) keys.Config) {
	ctx := t.Context()
	config := newConfig(t)
	k := open(t, config)
	s, ok := k.(keys.Sealer)
	if !ok {
		t.Fatalf("%v cannot seal", k)
	}
	plain, bound := []byte("what nobody else may read"), []byte("what it is for")
	if _, err := s.Seal(ctx, "a", plain, bound); fault.KindOf(err) != fault.NotFound {
		t.Errorf("Seal without a key = %v", err)
	}
	generate(t, k, "a")
	generate(t, k, "b")
	sealed, err := s.Seal(ctx, "a", plain, bound)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, plain[:8]) {
		t.Error("what was sealed can be read")
	}
	if again, err := s.Seal(ctx, "a", plain, bound); err != nil || bytes.Equal(again[:16], sealed[:16]) || bytes.Equal(again[32:], sealed[32:]) {
		t.Errorf("two seals are alike, %v", err)
	}
	restarted := open(t, config).(keys.Sealer)
	for _, opener := range []keys.Sealer{s, restarted} {
		if got, err := opener.Unseal(ctx, "a", sealed, bound); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("Unseal = %q, %v", got, err)
		}
	}
	refused := func(what, id string, sealed, bound []byte) {
		t.Helper()
		if got, err := s.Unseal(ctx, id, sealed, bound); fault.KindOf(err) != fault.Precondition || got != nil {
			t.Errorf("Unseal of %s = %q, %v", what, got, err)
		}
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		refused("a changed byte", "a", changed, bound)
		refused("a torn end", "a", sealed[:i], bound)
	}
	refused("a longer one", "a", append(bytes.Clone(sealed), 0), bound)
	refused("one of another key", "b", sealed, bound)
	refused("one that is for something else", "a", sealed, []byte("what it is for."))
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Unseal(canceled, "a", sealed, bound); err == nil {
		t.Error("Unseal with a canceled context succeeds")
	}
	generate(t, k, "a")
	refused("one of the key before", "a", sealed, bound)
	if err := k.Delete(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Unseal(ctx, "a", sealed, bound); fault.KindOf(err) != fault.NotFound {
		t.Errorf("Unseal without the key = %v", err)
	}
}
