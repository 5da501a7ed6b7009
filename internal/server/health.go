package server

import (
	"context"
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
			return fault.New(fault.Unavailable, "server_starting", "the server is starting")
		}}}
	}
}

// needs lists what a server that has started needs to issue, and what it can do
// without for a while (R105).
func (s *Server) needs(serving context.Context, st *watched, auth *authority.Authority, own *ownSVID, trail *audit.Writer) []monitor.Check {
	admin := monitor.Socket("admin_socket", s.cfg.Server.SocketPath)
	admin.Degrades = true
	return []monitor.Check{
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
}

// watched is a store that remembers whether its last write failed.
type watched struct {
	store.Store
	count   func(took time.Duration, results []store.Result) // may be nil
	failure atomic.Pointer[fault.Error]                      // nil: none
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
		case fault.KindOf(r.Err) == fault.Unavailable && fault.ReasonOf(r.Err) != "canceled":
			w.failure.Store(fault.New(fault.Unavailable, fault.ReasonOf(r.Err), "the last change could not be written").
				Fix("see to the failure named in the server's log; the next change tries again"))
		}
	}
	return results
}

func (w *watched) healthy() error {
	if f := w.failure.Load(); f != nil {
		return f
	}
	return nil
}
