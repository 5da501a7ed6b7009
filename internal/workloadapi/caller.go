package workloadapi

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/workload"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Attestor is a workload attestor and the name it has in configuration and logs.
type Attestor struct {
	Name string
	workload.Attestor
}

// caller is who is at the other end of a connection. It rides along as the
// connection's AuthInfo.
type caller struct {
	*process.Conn
	credentials.CommonAuthInfo
	uid  int64
	gone func()

	mu       sync.Mutex // guards everything below
	known    []entry.Selector
	attested time.Time // when known was found out; zero: never
}

// AuthType names the kind of connection, as the library asks.
func (c *caller) AuthType() string { return "plastron-workload" }

// Close ends the connection and stops counting it.
func (c *caller) Close() error {
	c.gone()
	return c.Conn.Close()
}

// handshake makes a caller of a connection. When the peer exits, its connection
// is closed, and with it every stream (R38).
func (s *Server) handshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, ok := raw.(*process.Conn)
	if !ok {
		return nil, nil, errors.New("not a connection of our listener")
	}
	c := &caller{Conn: conn, uid: noUser}
	c.SecurityLevel = credentials.PrivacyAndIntegrity // it does not leave the kernel
	p, err := conn.Peer()
	if err == nil {
		c.uid = int64(p.UID)
	}
	if err := s.users.connect(c.uid); err != nil {
		if n := s.quiet.due(); n > 0 {
			s.cfg.Log.Info("connection refused", "uid", c.uid, "reason", fault.ReasonOf(err), "count", n)
		}
		return nil, nil, err
	}
	c.gone = sync.OnceFunc(func() { s.users.disconnect(c.uid) })
	if p != nil {
		go func() {
			p.Wait() // also ends when the connection is closed
			c.Close()
		}()
	}
	return c, c, nil
}

func callerOf(ctx context.Context) (*caller, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.AuthInfo.(*caller); ok {
			return c, nil
		}
	}
	return nil, errors.New("a call without a connection of ours")
}

// attest returns what the caller is. It is judged before and after: what was
// learnt in between belongs to the process that connected, or counts for nothing (R37).
//
// An attestor that fails only takes its selectors away (R47); if all fail, that
// is not the same as a caller without selectors (RG43).
//
// What all attestors said a moment ago of a connection's process is good for its
// next calls, too, unless anew is set: what Check looks at has not changed, and
// the rest could have been asked for that moment ago (R62).
func (s *Server) attest(ctx context.Context, c *caller, anew bool) ([]entry.Selector, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	if known, ok := c.remembered(time.Now()); ok && !anew {
		return known, nil
	}
	began := time.Now()
	p, err := c.Peer()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, attestWait)
	defer cancel()
	found := make([]workload.Attested, len(s.cfg.Attestors))
	errs := make([]error, len(s.cfg.Attestors))
	var wg sync.WaitGroup
	for i, a := range s.cfg.Attestors[1:] {
		wg.Go(func() { found[i+1], errs[i+1] = a.Attest(ctx, p.PID) })
	}
	found[0], errs[0] = s.cfg.Attestors[0].Attest(ctx, p.PID)
	wg.Wait()
	if err := c.Check(); err != nil {
		return nil, err
	}
	var selectors []entry.Selector
	failed := 0
	for i, a := range found {
		if errs[i] != nil {
			failed++
			if n := s.quiet.due(); n > 0 {
				s.cfg.Log.Info("attestor failed", "kind", s.cfg.Attestors[i].Name, "pid", p.PID, "err", errs[i], "count", n)
			}
			continue
		}
		selectors = append(selectors, a.Selectors...)
		for _, why := range a.Omitted {
			s.cfg.Log.Debug("selector left out", "pid", p.PID, "reason", why)
		}
	}
	if failed == len(found) {
		return nil, fault.New(fault.Unavailable, "attestation_failed", "what the calling process is could not be found out").
			Because(errors.Join(errs...))
	}
	slices.SortFunc(selectors, entry.Selector.Compare)
	selectors = slices.Compact(selectors)
	if failed == 0 {
		c.mu.Lock()
		c.known, c.attested = selectors, began
		c.mu.Unlock()
	}
	return selectors, nil
}

func (c *caller) remembered(now time.Time) ([]entry.Selector, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known, !c.attested.IsZero() && now.Sub(c.attested) < attestLife
}
