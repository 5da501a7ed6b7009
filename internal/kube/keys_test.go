package kube

import (
	"context"
	"crypto"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// source is an issuer that counts how often it is asked.
type source struct {
	mu    sync.Mutex
	asked int
	keys  map[string]crypto.PublicKey
	err   error
	takes time.Duration
}

func (s *source) fetch(ctx context.Context) (map[string]crypto.PublicKey, error) {
	s.mu.Lock()
	s.asked++
	keys, err, takes := s.keys, s.err, s.takes
	s.mu.Unlock()
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return keys, err
}

func keysOf(ids ...string) map[string]crypto.PublicKey {
	out := map[string]crypto.PublicKey{}
	for _, id := range ids {
		out[id] = id
	}
	return out
}

func TestKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{keys: keysOf("a")}
		i := &Issuer{asked: keysAskedFor, fetch: s.fetch}
		want := func(id string, kind fault.Kind, asked int) {
			t.Helper()
			_, err := i.key(t.Context(), id)
			if (err == nil) != (kind == fault.Internal) || err != nil && fault.KindOf(err) != kind {
				t.Errorf("key %q: %v, want %v", id, err, kind)
			}
			if s.asked != asked {
				t.Errorf("key %q: the issuer was asked %d times, want %d", id, s.asked, asked)
			}
		}
		const good = fault.Internal
		want("a", good, 1)
		for range 100 { // strangers cannot have it asked more often
			want("x", fault.Denied, 1)
			want("a", good, 1)
		}
		time.Sleep(keysAskedFor)
		s.keys = keysOf("a", "b")
		want("b", good, 2)
		time.Sleep(keysAskedFor)
		want("x", fault.Denied, 3)

		// A key that is withdrawn is not used for long.
		s.keys = keysOf("b")
		time.Sleep(keysRefreshed)
		want("a", fault.Denied, 4)
		want("b", good, 4)

		// The issuer is away: keys go on for a day, and no longer.
		s.err = errors.New("away")
		asked := 4
		for range int(keysEnd/keysRefreshed) - 1 {
			time.Sleep(keysRefreshed)
			asked++
			want("b", good, asked)
		}
		want("x", fault.Unavailable, asked)
		time.Sleep(keysRefreshed)
		want("b", fault.Unavailable, asked+1)
		s.err = nil
		want("b", fault.Unavailable, asked+1)
		time.Sleep(keysAskedFor)
		want("b", good, asked+2)
	})
}

// One asks, the others wait, and nobody waits who has what he needs.
func TestKeysTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{keys: keysOf("a"), takes: 5 * time.Second}
		i := &Issuer{asked: keysAskedFor, fetch: s.fetch}
		var all sync.WaitGroup
		gone, leave := context.WithCancel(t.Context())
		all.Go(func() { // the one who asks goes away; what he asked for is had all the same
			if _, err := i.key(gone, "a"); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		leave()
		for range 50 {
			all.Go(func() {
				if _, err := i.key(t.Context(), "a"); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if s.asked != 1 {
			t.Errorf("the issuer was asked %d times", s.asked)
		}
		time.Sleep(keysRefreshed)
		s.takes = time.Hour // it hangs
		all.Go(func() { i.key(t.Context(), "a") })
		synctest.Wait()
		before := time.Now()
		if _, err := i.key(t.Context(), "a"); err != nil || time.Since(before) > 0 {
			t.Errorf("key: %v after %v", err, time.Since(before))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := i.key(ctx, "x"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("who waits for a key that is not there: %v", err)
		}
		all.Wait()
		if since := time.Since(before); since > callTime {
			t.Errorf("who asked was held for %v", since)
		}
	})
}
