package upkeep

import (
	"context"
	"math/rand/v2"
	"time"
)

// Run compacts the log now and then until ctx is done. A round that fails is
// logged, and the next one does its work.
func (u *Upkeep) Run(ctx context.Context) error {
	for {
		select {
		case <-time.After(every/2 + rand.N(every)):
		case <-ctx.Done():
			return nil
		}
		at, err := u.Compact(ctx, KeepBatches, KeepAge)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			u.Log.WarnContext(ctx, "log not compacted", "err", err)
		default:
			u.Log.DebugContext(ctx, "log compacted", "revision", at.Revision)
		}
	}
}
