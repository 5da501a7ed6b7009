package authority

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
)

// A server that may not sign changes nothing that is shared, and looks at what
// others decided meanwhile before it signs again: a key that was withdrawn is not
// used once more (R69, R70).
func TestMayNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, memory(t), 24*time.Hour)
		var mu sync.Mutex
		var refuse error
		may := func(err error) {
			mu.Lock()
			defer mu.Unlock()
			refuse = err
		}
		a := w.authority("s1")
		a.May = func(time.Time) error {
			mu.Lock()
			defer mu.Unlock()
			return refuse
		}
		if err := a.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { a.Run(ctx) })
		defer running.Wait()
		defer cancel()
		x, j := authorities(t, a)

		may(fault.New(fault.Unavailable, "clock_off", "it is off"))
		before := w.reg.Position()
		time.Sleep(14 * time.Hour) // the next key was due after 12
		if w.reg.Position() != before {
			t.Error("a server that may not sign rotates its keys")
		}
		if _, err := a.X509(time.Now()); err == nil {
			t.Error("a key is handed out")
		}
		if _, err := w.reg.Update(t.Context(), "test", func(tx *registry.Tx) error {
			b, err := tx.Bundle(domain())
			if err != nil {
				return err
			}
			return tx.PutBundle(b.WithoutX509(b.X509[0].ASN1).WithoutJWT(j))
		}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		may(nil)
		if _, err := a.X509(time.Now()); err == nil {
			t.Error("a key is handed out before anybody looked")
		}
		synctest.Wait()
		if x2, j2 := authorities(t, a); x2 == x || j2 == j {
			t.Errorf("%s and %s sign, which were withdrawn", x2, j2)
		}
	})
}

// What takes trust away a server does also while it may not change anything else: that,
// and nothing of its own by the way, whether it was so before or not (R69, R70).
func TestMayNotButWithdraw(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, memory(t), 24*time.Hour)
		a := w.authority("s1")
		var off atomic.Bool
		a.May = func(time.Time) error {
			if off.Load() {
				return fault.New(fault.Unavailable, "clock_off", "it is off")
			}
			return nil
		}
		if err := a.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { a.Run(ctx) })
		defer running.Wait()
		defer cancel()
		old, _ := authorities(t, a)
		rotate(t, a, X509)
		synctest.Wait()

		off.Store(true)
		time.Sleep(14 * time.Hour) // the next key was due after 12
		for _, again := range []bool{false, true} {
			before := w.reg.Position()
			if _, err := a.Taint(t.Context(), "test", X509, old); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if after := w.reg.Position(); after.Revision-before.Revision > 1 || again && after != before {
				t.Errorf("tainted again: %t, and the store went from %s to %s", again, before, after)
			}
			if n := len(a.Slots(X509)); n != 2 {
				t.Errorf("%d keys, the third is of a server that may change nothing", n)
			}
			if _, err := a.X509(time.Now()); err == nil {
				t.Error("a key is handed out")
			}
		}
		if _, err := a.Revoke(t.Context(), "test", X509, old); err != nil || len(w.bundle().X509) != 1 {
			t.Errorf("Revoke() = %v, %d roots", err, len(w.bundle().X509))
		}
	})
}
