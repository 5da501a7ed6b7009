// Package workload is the seam for proving what a local process is. An attestor
// maps a process to selectors and facts, from the kernel and the runtime, never
// from what the process itself can write. Who may have which identity is not
// decided here.
package workload

import (
	"context"

	"github.com/plastron/plastron/internal/entry"
)

// Attested is what an attestor knows of one process.
type Attested struct {
	// Selectors are what entries match on.
	Selectors []entry.Selector
	// Facts are named values that rules may expand, such as "unix.user". A name
	// begins with the attestor's own and a dot; no value is empty.
	Facts map[string]string
	// Omitted says, in a sentence each, which selectors and facts could not be had
	// and why.
	Omitted []string
}

// Attestor proves processes. Attest is called with a pid that the caller holds
// by pidfd and checks again afterwards, so an attestor need not guard against
// reuse. It may be called concurrently and honours ctx.
type Attestor interface {
	Attest(ctx context.Context, pid int) (Attested, error)
}
