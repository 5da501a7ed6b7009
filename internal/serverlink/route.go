package serverlink

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"
)

// Route is where the servers of the trust domain are, and to which of them an
// agent keeps. All methods may be called concurrently.
type Route struct {
	mu        sync.Mutex // guards everything below
	addresses []string
	at        int    // the one to keep to, until it is of no use
	guest     string // where a server has sent us; not of the list, and forgotten when it is left
}

// NewRoute returns a route over addresses, each HOST:PORT and at least one, that
// begins with the first.
func NewRoute(first string, others ...string) *Route {
	return &Route{addresses: append([]string{first}, others...)}
}

// Begin makes the route begin with the n-th address, so that not every agent
// begins with the same.
func (r *Route) Begin(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at = n % len(r.addresses)
}

// Current returns the address that is kept to.
func (r *Route) Current() string { return r.order()[0] }

// order returns all addresses in the order in which they are tried.
func (r *Route) order() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var order []string
	if r.guest != "" {
		order = append(order, r.guest)
	}
	return append(append(order, r.addresses[r.at:]...), r.addresses[:r.at]...)
}

// keep makes address the one that is tried first.
func (r *Route) keep(address string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.addresses, address); i >= 0 {
		r.at, r.guest = i, ""
	}
}

// lead goes where a server has sent us; empty: nowhere else.
func (r *Route) lead(address string) {
	if address == "" {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.addresses, address); i >= 0 {
		r.at, r.guest = i, ""
		return
	}
	r.guest = address
}

// leave gives up an address for the next, and reports whether there is another.
// Who finds it left already has nothing to do.
func (r *Route) leave(address string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case address == "":
	case address == r.guest:
		r.guest = ""
		return true
	case r.guest == "" && address == r.addresses[r.at] && len(r.addresses) > 1:
		r.at = (r.at + 1) % len(r.addresses)
		return true
	}
	return false
}

// dial tries the addresses in turn, and lets none take the time of those after
// it. It returns the address that it has reached.
func (r *Route) dial(ctx context.Context, dial func(context.Context, string) (net.Conn, error)) (net.Conn, string, error) {
	order := r.order()
	share := dialTimeout / time.Duration(len(order))
	var faults []error
	for _, one := range order {
		attempt, cancel := context.WithTimeout(ctx, share)
		conn, err := dial(attempt, one)
		cancel()
		if err == nil {
			r.keep(one)
			return conn, one, nil
		}
		faults = append(faults, err)
	}
	return nil, "", errors.Join(faults...)
}
