package serverlink

import (
	"context"
	"errors"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// An address that swallows packets does not take the time of those after it, and
// what was reached is kept to.
func TestRouteDials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dialled []string
		open := map[string]bool{"open": true}
		dial := func(ctx context.Context, address string) (net.Conn, error) {
			dialled = append(dialled, address)
			switch {
			case address == "hole":
				<-ctx.Done()
				return nil, ctx.Err()
			case !open[address]:
				return nil, errors.New("refused")
			}
			ours, theirs := net.Pipe()
			theirs.Close()
			return ours, nil
		}
		reach := func(r *Route, want string, through ...string) {
			t.Helper()
			dialled = nil
			ctx, cancel := context.WithTimeout(t.Context(), dialTimeout) // as grpc gives
			defer cancel()
			began := time.Now()
			conn, address, err := r.dial(ctx, dial)
			if err == nil {
				conn.Close()
			}
			if took := time.Since(began); took > dialTimeout || address != want || !slices.Equal(dialled, through) {
				t.Errorf("reached %q through %v in %v, %v; want %q through %v", address, dialled, took, err, want, through)
			}
		}
		r := NewRoute("hole", "closed", "open", "last")
		reach(r, "open", "hole", "closed", "open")
		reach(r, "open", "open") // kept to
		open["closed"] = true
		reach(r, "open", "open") // also when an earlier one is there again
		open["open"] = false
		reach(r, "closed", "open", "last", "hole", "closed")
		r.lead("guest")
		reach(r, "closed", "guest", "closed")
		open["closed"] = false
		reach(r, "", "closed", "open", "last", "hole")
	})
}

// Leaving goes on by one, however many notice, and a guest is only forgotten.
func TestRouteLeaves(t *testing.T) {
	r := NewRoute("a", "b", "c")
	for _, step := range []struct {
		leave string
		moved bool
		next  string
	}{
		{"a", true, "b"}, {"a", false, "b"}, {"", false, "b"}, {"x", false, "b"}, {"b", true, "c"}, {"c", true, "a"},
	} {
		if moved := r.leave(step.leave); moved != step.moved || r.Current() != step.next {
			t.Errorf("leave(%q) = %v, then %q; want %v, %q", step.leave, moved, r.Current(), step.moved, step.next)
		}
	}
	r.lead("guest")
	if r.Current() != "guest" || !r.leave("guest") || r.Current() != "a" {
		t.Errorf("after a guest: %q", r.Current())
	}
	r.lead("b")
	if r.Current() != "b" {
		t.Errorf("led to %q", r.Current())
	}
	if alone := NewRoute("a"); alone.leave("a") || alone.Current() != "a" {
		t.Error("the only server was left")
	}
	r.Begin(5)
	if r.Current() != "c" {
		t.Errorf("begins with %q", r.Current())
	}
}
