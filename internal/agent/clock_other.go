//go:build !linux

package agent

import "time"

// bootClock counts from a fixed day on: without a clock that counts sleep and
// cannot be set, the wall clock has to do.
func bootClock() time.Duration { return time.Since(time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)) }
