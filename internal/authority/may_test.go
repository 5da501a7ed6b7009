package authority

import (
	"context"
	"sync"
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
