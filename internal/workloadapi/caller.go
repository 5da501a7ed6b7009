package workloadapi

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/workload"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Attestor is a workload attestor and the name it has in configuration and logs.
type Attestor = workload.Named

// caller is who is at the other end of a connection. It rides along as the
// connection's AuthInfo.
type caller struct {
	*process.Conn
	credentials.CommonAuthInfo
	users   *users
	uid     int64
	gone    func()
	backlog backlog

	mu       sync.Mutex // guards everything below
	known    attested
	attested time.Time // when known was found out; zero: never
}

// attested is what is known of a caller, and what could not be found out.
type attested struct {
	facts  entry.Facts
	failed error // of the attestors that did not answer
}

// AuthType names the kind of connection, as the library asks.
func (c *caller) AuthType() string { return "plastron-workload" }

// Read reads and counts. A user who has sent far too much loses the connection.
func (c *caller) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && err == nil {
		err = c.users.moved(c.uid, n)
	}
	return n, err
}

// Write writes and counts. A peer that takes nothing loses the connection.
func (c *caller) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.backlog.patience)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(b)
	_ = c.users.moved(c.uid, n) // counts against what the user sends next
	c.backlog.wrote(b[:n])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.backlog.stalled() // the library would leave it to a reader that waits for this writer
	}
	return n, err
}

// Close ends the connection and stops counting it.
func (c *caller) Close() error {
	c.backlog.forget()
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
	c := &caller{Conn: conn, users: s.users, uid: noUser}
	c.SecurityLevel = credentials.PrivacyAndIntegrity // it does not leave the kernel
	c.backlog.patience = s.cfg.waits.send
	c.backlog.stalled = sync.OnceFunc(func() {
		s.slow.Add(1)
		if n := s.quiet.Due(); n > 0 {
			s.cfg.Log.Info("connection closed", "uid", c.uid, "reason", "slow_reader", "count", n)
		}
		c.Close()
	})
	p, err := conn.Peer()
	if err == nil {
		c.uid = int64(p.UID)
	}
	if err := s.users.connect(c.uid); err != nil {
		if n := s.quiet.Due(); n > 0 {
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
func (s *Server) attest(ctx context.Context, c *caller, anew bool) (attested, error) {
	if err := c.Check(); err != nil {
		return attested{}, err
	}
	if known, ok := c.remembered(time.Now()); ok && !anew {
		return known, nil
	}
	began := time.Now()
	s.attested.Add(1)
	p, err := c.Peer()
	if err != nil {
		return attested{}, err
	}
	answers := workload.Ask(ctx, s.cfg.Attestors, p.PID)
	if err := c.Check(); err != nil {
		return attested{}, err
	}
	seen := attested{facts: workload.Facts(answers)}
	var errs []error
	for _, a := range answers {
		if a.Err != nil {
			errs = append(errs, a.Err)
			if fault.ReasonOf(a.Err) == fault.Panicked { // R99
				s.contain.Panics.Add(1)
			}
			if n := s.quiet.Due(); n > 0 {
				s.cfg.Log.Info("attestor failed", "kind", a.Name, "pid", p.PID, "err", a.Err, "count", n)
			}
			continue
		}
		for _, why := range a.Omitted {
			s.cfg.Log.Debug("selector left out", "pid", p.PID, "reason", why)
		}
	}
	seen.failed = errors.Join(errs...)
	if len(errs) == len(answers) {
		return attested{}, reason.AttestorFailed.Because(seen.failed)
	}
	if seen.failed == nil {
		c.mu.Lock()
		c.known, c.attested = seen, began
		c.mu.Unlock()
	}
	return seen, nil
}

func (c *caller) remembered(now time.Time) (attested, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known, !c.attested.IsZero() && now.Sub(c.attested) < attestLife
}
