package server

import (
	"context"
	"errors"
	"iter"
	"sync/atomic"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/store"
)

// showHealth opens the health listener, if there is to be one.
func (s *Server) showHealth(ctx context.Context) (stop func(), err error) {
	c := s.cfg.HealthChecks
	if !c.ListenerEnabled {
		return func() {}, nil
	}
	return monitor.Serve(ctx, "health_checks", c.Address(), monitor.HealthHandler(c, s.living, s.readiness), s.log)
}

// living is what a process that lives can do, whatever state its store is in
// (R105): its memory can be read.
func (s *Server) living() []monitor.Check {
	select {
	case <-s.ready:
	default:
		return nil
	}
	return []monitor.Check{{Name: "memory", Run: func() error {
		s.registry.Position() // hangs if the lock is never given back
		return nil
	}}}
}

// readiness is what a server needs to be ready, at any time of its life.
func (s *Server) readiness() []monitor.Check {
	select {
	case <-s.ready:
		return s.checks
	default:
		return []monitor.Check{{Name: "serving", Run: func() error {
			if fleet := s.fleet.Load(); fleet != nil {
				if err := fleet.MaySign(time.Now()); err != nil { // it may have to wait for a lease
					return err
				}
			}
			return fault.New(fault.Unavailable, "server_starting", "the server is starting")
		}}}
	}
}

// needs lists what a server that has started needs to issue, and what it can do
// without for a while (R105).
func (s *Server) needs(serving context.Context, st *watched, auth *authority.Authority, own *ownSVID, trail *audit.Writer) []monitor.Check {
	admin := monitor.Socket("admin_socket", s.cfg.Server.SocketPath)
	admin.Degrades = true
	checks := []monitor.Check{
		{Name: "serving", Run: func() error {
			if serving.Err() != nil {
				return fault.New(fault.Unavailable, "server_stopping", "the server is shutting down")
			}
			return nil
		}},
		{Name: "x509_authority", Run: func() error { _, err := auth.X509(time.Now()); return err }},
		{Name: "jwt_authority", Run: func() error { _, err := auth.JWT(time.Now()); return err }},
		{Name: "certificate", Run: func() error { _, err := own.certificate(); return err }},
		// With strict audit nothing is signed that is not on record.
		{Name: "audit", Run: trail.Healthy, Degrades: !s.cfg.Server.AuditStrict},
		// What is granted is signed from memory; only changes, attestations and
		// renewals of agents wait.
		{Name: "store", Run: st.healthy, Degrades: true},
		admin,
	}
	if s.plan.upstream != nil {
		// What signs goes on; only its replacement waits (R67).
		checks = append(checks, monitor.Check{Name: "upstream_authority", Run: auth.UpstreamHealth, Degrades: true})
	}
	return checks
}

// watched is a store that remembers whether its last write failed, and whether
// it could not be read since it was last loaded.
type watched struct {
	store.Store
	count   func(took time.Duration, results []store.Result) // may be nil
	failure atomic.Pointer[fault.Error]                      // nil: none
	damaged atomic.Pointer[fault.Error]                      // nil: none
	written atomic.Uint64                                    // transactions
}

// Load implements store.Store.
func (w *watched) Load(ctx context.Context, f func(key string, rev uint64, value []byte) error) (store.Position, error) {
	at, err := w.Store.Load(ctx, f)
	w.damaged.Store(damage(err))
	return at, err
}

// Watch implements store.Store.
func (w *watched) Watch(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		for b, err := range w.Store.Watch(ctx, after) {
			if d := damage(err); d != nil {
				w.damaged.Store(d)
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

// damage is err if it says that what is stored makes no sense, else nil.
func damage(err error) *fault.Error {
	if f, ok := errors.AsType[*fault.Error](err); ok && f.Reason == "store_corrupt" {
		return fault.New(fault.Unavailable, f.Reason, "%s", f.Message).Fix("%s", f.Remedy)
	}
	return nil
}

// Commit implements store.Store.
func (w *watched) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	began := time.Now()
	results := w.Store.Commit(ctx, txns)
	if w.count != nil {
		w.count(time.Since(began), results)
	}
	for i, r := range results {
		switch {
		case r.Err == nil && len(txns[i].Puts)+len(txns[i].Deletes) > 0:
			w.failure.Store(nil)
			w.written.Add(1)
		case fault.KindOf(r.Err) == fault.Unavailable && fault.ReasonOf(r.Err) != "canceled":
			w.failure.Store(fault.New(fault.Unavailable, fault.ReasonOf(r.Err), "the last change could not be written").
				Fix("see to the failure named in the server's log; the next change tries again"))
		}
	}
	return results
}

func (w *watched) healthy() error {
	for _, f := range []*fault.Error{w.damaged.Load(), w.failure.Load()} {
		if f != nil {
			return f
		}
	}
	return nil
}
