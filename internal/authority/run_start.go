package authority

import (
	"context"
	"fmt"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// startPatience is for how long a start bears what fails for a passing reason.
const startPatience = 30 * time.Second

// Start brings every kind to an active key, making what is missing. Where other
// servers are, a first key waits until they and their agents have it, a minute at
// the longest. What fails for a passing reason is tried again for half a minute.
// The registry must be running. Nothing is served before Start has returned.
func (a *Authority) Start(ctx context.Context) error {
	var failing time.Time // since when
	for {
		var next time.Time
		var failed error
		for _, l := range a.lines {
			due, err := a.settle(ctx, l)
			switch {
			case err != nil && l.active != "" && ctx.Err() == nil: // what signs goes on; Run tries again
				a.Log.WarnContext(ctx, "authority step failed", "kind", l.name, "err", err)
				a.poke()
			case err != nil && !fault.Passing(err):
				return fmt.Errorf("prepare %s authority: %w", l.name, err)
			case err != nil:
				failed = fmt.Errorf("prepare %s authority: %w", l.name, err)
				due = time.Now().Add(retryFirst)
			}
			if l.active == "" && (next.IsZero() || due.Before(next)) {
				next = due
			}
		}
		switch {
		case failed == nil && next.IsZero():
			return nil
		case failed == nil:
			failing = time.Time{}
		case failing.IsZero():
			failing = time.Now()
			a.Log.WarnContext(ctx, "authority step failed", "err", failed)
		case time.Since(failing) >= startPatience:
			return failed
		}
		wake := a.wake
		if failed != nil {
			wake = nil // what failed is not asked more often than this
		}
		timer := time.NewTimer(time.Until(next))
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("wait for others to have the first key: %w", ctx.Err())
		case <-timer.C:
		case <-wake:
		}
		timer.Stop()
	}
}
