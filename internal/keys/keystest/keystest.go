// Package keystest is the contract of a key keeper as tests: every keeper's own
// test calls Run, those that survive a restart RunDurable too.
package keystest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
)

// Run holds a keeper to the contract of keys.Keeper. newConfig returns the
// configuration of a fresh keeper.
func Run(t *testing.T, newConfig func(t *testing.T) keys.Config) {
	ctx := t.Context()
	t.Run("types", func(t *testing.T) {
		k := open(t, newConfig(t))
		for _, kind := range []keys.Type{keys.ECP256, keys.ECP384, keys.RSA2048, keys.RSA4096} {
			key, err := k.Generate(ctx, "key-"+string(kind), kind)
			if err != nil {
				t.Fatalf("Generate(%s) = %v", kind, err)
			}
			if key.Type != kind || key.ID != "key-"+string(kind) {
				t.Errorf("Generate(%s) = %s of type %s", kind, key.ID, key.Type)
			}
			checkSigns(t, key)
		}
		if _, err := k.Generate(ctx, "x", "dsa"); fault.KindOf(err) != fault.Invalid {
			t.Errorf("Generate(dsa) = %v", err)
		}
	})
	t.Run("ids", func(t *testing.T) {
		k := open(t, newConfig(t))
		for _, id := range []string{"", "../x", "a/b", "a b", "a\x00", string(make([]byte, 300))} {
			if _, err := k.Generate(ctx, id, keys.ECP256); fault.KindOf(err) != fault.Invalid {
				t.Errorf("Generate(%q) = %v", id, err)
			}
		}
		if _, err := k.Key(ctx, "nobody"); fault.KindOf(err) != fault.NotFound {
			t.Errorf("Key(nobody) = %v", err)
		}
		if err := k.Delete(ctx, "nobody"); err != nil {
			t.Errorf("Delete(nobody) = %v", err)
		}
	})
	t.Run("replace and delete", func(t *testing.T) {
		k := open(t, newConfig(t))
		first, second := generate(t, k, "x509-CA-A"), generate(t, k, "x509-CA-A")
		if same(t, first, second) {
			t.Error("Generate returned the same key twice")
		}
		got, err := k.Key(ctx, "x509-CA-A")
		if err != nil || !same(t, got, second) {
			t.Errorf("Key() is not the last key made, %v", err)
		}
		checkSigns(t, first) // a holder of the replaced key is not cut off in the middle
		other := generate(t, k, "x509-CA-B")
		if err := k.Delete(ctx, "x509-CA-A"); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Key(ctx, "x509-CA-A"); fault.KindOf(err) != fault.NotFound {
			t.Errorf("Key(deleted) = %v", err)
		}
		if got, err := k.Key(ctx, "x509-CA-B"); err != nil || !same(t, got, other) {
			t.Errorf("deleting one key touched another: %v", err)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		k := open(t, newConfig(t))
		canceled, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := k.Generate(canceled, "a", keys.ECP256); err == nil {
			t.Error("Generate with a canceled context succeeds")
		}
		if _, err := k.Key(ctx, "a"); fault.KindOf(err) != fault.NotFound {
			t.Errorf("a failed Generate left a key: %v", err)
		}
	})
	t.Run("concurrent", func(t *testing.T) {
		k := open(t, newConfig(t))
		var group sync.WaitGroup
		for i := range 8 {
			group.Go(func() {
				id := fmt.Sprintf("key-%d", i)
				made, err := k.Generate(ctx, id, keys.ECP256)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := k.Key(ctx, id); err != nil || !same(t, made, got) {
					t.Errorf("Key(%s) = %v", id, err)
				}
				if i%2 == 0 {
					if err := k.Delete(ctx, id); err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
		for i := range 8 {
			_, err := k.Key(ctx, fmt.Sprintf("key-%d", i))
			if gone := fault.KindOf(err) == fault.NotFound && err != nil; gone != (i%2 == 0) {
				t.Errorf("key-%d: %v", i, err)
			}
		}
	})
	// R72: no form in which a key might be shown holds the key.
	t.Run("secret", func(t *testing.T) {
		k := open(t, newConfig(t))
		key := generate(t, k, "x509-CA-A")
		private, ok := key.Signer.(keys.Private)
		if !ok {
			t.Skip("the keeper never has the key itself")
		}
		der, err := private.PKCS8()
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			t.Fatal(err)
		}
		secret := parsed.(*ecdsa.PrivateKey)
		raw, err := secret.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
			slog.New(h).Info("x", "key", key, "pointer", &key, "signer", key.Signer, "keeper", k)
		}
		shown := []string{log.String()}
		for _, v := range []any{key, &key, key.Signer, k, struct{ K any }{key}, []any{key}, map[string]any{"k": k}} {
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
				shown = append(shown, fmt.Sprintf(verb, v))
			}
			if b, err := json.Marshal(v); err == nil {
				shown = append(shown, string(b))
			}
		}
		number := fmt.Sprint(secretNumber(raw))
		for _, s := range shown {
			for _, form := range forms(raw, der) {
				if bytes.Contains([]byte(s), form) {
					t.Errorf("the key is shown: %.200s", s)
				}
			}
			if bytes.Contains([]byte(s), []byte(number)) {
				t.Errorf("the key is shown as a number: %.200s", s)
			}
		}
	})
}

// RunDurable checks that a keeper opened again with the same configuration has
// the keys.
func RunDurable(t *testing.T, newConfig func(t *testing.T) keys.Config) {
	config := newConfig(t)
	k := open(t, config)
	made := map[string]keys.Key{}
	for _, kind := range []keys.Type{keys.ECP256, keys.ECP384, keys.RSA2048} {
		id := "key-" + string(kind)
		key, err := k.Generate(t.Context(), id, kind)
		if err != nil {
			t.Fatal(err)
		}
		made[id] = key
	}
	generate(t, k, "gone")
	if err := k.Delete(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	again := open(t, config)
	for id, want := range made {
		got, err := again.Key(t.Context(), id)
		if err != nil || got.Type != want.Type || !same(t, got, want) {
			t.Errorf("after opening again: Key(%s) = %v", id, err)
			continue
		}
		checkSigns(t, got)
	}
	if _, err := again.Key(t.Context(), "gone"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a deleted key is back: %v", err)
	}
}

func open(t *testing.T, c keys.Config) keys.Keeper {
	t.Helper()
	k, err := c.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func generate(t *testing.T, k keys.Keeper, id string) keys.Key {
	t.Helper()
	key, err := k.Generate(t.Context(), id, keys.ECP256)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func same(t *testing.T, a, b keys.Key) bool {
	t.Helper()
	x, err := x509.MarshalPKIXPublicKey(a.Public())
	if err != nil {
		t.Error(err)
	}
	y, err := x509.MarshalPKIXPublicKey(b.Public())
	if err != nil {
		t.Error(err)
	}
	return bytes.Equal(x, y)
}

func checkSigns(t *testing.T, key keys.Key) {
	t.Helper()
	digest := sha256.Sum256([]byte("message"))
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Errorf("%s: Sign() = %v", key.ID, err)
		return
	}
	ok := false
	switch pub := key.Public().(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(pub, digest[:], signature)
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], signature) == nil
	}
	if !ok {
		t.Errorf("%s: the signature does not verify", key.ID)
	}
}
