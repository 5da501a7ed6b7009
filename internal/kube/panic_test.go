package kube

import (
	"context"
	"crypto"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// A panic while the kubelet's list is read is an error for all who wait for it,
// and the next request is made as if nothing had been (R99).
func TestKubeletPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bug := true
		k := &Kubelet{list: func(_ context.Context, began time.Time) (*Pods, error) {
			time.Sleep(time.Second)
			if bug {
				var none *Pods
				_ = none.All // a bug
			}
			return &Pods{Began: began}, nil
		}}
		var waiters sync.WaitGroup
		for range 50 {
			waiters.Go(func() {
				if pods, err := k.Since(t.Context(), time.Now()); pods != nil || fault.ReasonOf(err) != fault.Panicked || fault.KindOf(err) != fault.Internal {
					t.Errorf("%v, %v", pods, err)
				}
			})
		}
		waiters.Wait()
		bug = false
		if _, err := k.Since(t.Context(), time.Now()); err != nil {
			t.Error(err)
		}
	})
}

// The same for an issuer's keys: who waits for the one who fetches does not wait for ever.
func TestIssuerPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bug := true
		i := &Issuer{asked: time.Minute, fetch: func(context.Context) (map[string]crypto.PublicKey, error) {
			time.Sleep(time.Second)
			if bug {
				panic("a bug")
			}
			return keysOf("a"), nil
		}}
		var waiters sync.WaitGroup
		for range 50 {
			waiters.Go(func() {
				if _, err := i.key(t.Context(), "a"); fault.ReasonOf(err) != "kube_issuer_unavailable" {
					t.Error(err)
				}
			})
		}
		waiters.Wait()
		bug = false
		time.Sleep(time.Minute)
		if _, err := i.key(t.Context(), "a"); err != nil {
			t.Error(err)
		}
	})
}
