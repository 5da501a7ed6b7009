package authority

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/registry"
)

// R64: servers below this one acknowledge nothing; a key that is new to them signs once
// they have had the time to look, and they are not said to be passed over then.
func TestWaitsForServersBelow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, memory(t), 24*time.Hour)
		w.peers = Known
		a, stop := w.start("s1")
		defer stop()
		w.update(func(tx *registry.Tx) error {
			return tx.PutDownstream(registry.Downstream{Serial: "1", Caller: "spiffe://example.org/below", EntryID: "e", Server: "s1",
				Issuer: "i", AuthorityID: "a", KeyHash: make([]byte, 32), NotAfter: time.Now().Add(time.Hour)})
		})
		replace := func(kind string) (took time.Duration) {
			t.Helper()
			begin := time.Now()
			s, err := a.Prepare(t.Context(), "test", kind)
			if err != nil {
				t.Fatal(err)
			}
			s, passed, err := a.Activate(t.Context(), "test", kind, s.AuthorityID, false)
			if err != nil || len(passed) != 0 || s.Unready != 0 {
				t.Errorf("Activate() = %+v, %v, %v", s, passed, err)
			}
			return time.Since(begin)
		}
		for _, kind := range []string{X509, JWT} {
			if took := replace(kind); took != belowWait {
				t.Errorf("%s after %s", kind, took)
			}
		}
		time.Sleep(time.Hour) // what is below has ended
		if took := replace(X509); took != 0 {
			t.Errorf("after %s, and there are no servers below", took)
		}
	})
}
