package workloadapi

import (
	"context"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"google.golang.org/protobuf/proto"
)

var (
	errNoIdentity = fault.New(fault.Denied, identityReason, "no identity issued")
	errNotSynced  = fault.New(fault.Unavailable, "not_synced", "the agent has not yet been told what there is").
			Fix("try again")
	errPending = fault.New(fault.Unavailable, "svid_pending", "an identity is there, but it has no valid SVID now").
			Fix("try again; if it lasts, see the agent's log")
)

// watch is the life of one stream: attest, send the whole state, wait for a
// change or for the time to look at the caller again, and so on (R42). answer
// makes the message for a view; the same message is not sent twice. pending
// says whether SVIDs that are being signed are worth waiting for.
func watch[M proto.Message](ctx context.Context, s *Server, pending bool, answer func(mirror.View) (M, error), send func(M) error) error {
	c, err := callerOf(ctx)
	if err != nil {
		return err
	}
	var (
		last      M
		sent      bool
		selectors []entry.Selector
		sub       *mirror.Subscription
	)
	defer func() {
		if sub != nil {
			sub.Close()
		}
	}()
	timer := time.NewTimer(reattestEvery)
	defer timer.Stop()
	for {
		now, err := s.attest(ctx, c, sent)
		if err != nil {
			return err
		}
		if sub == nil || !slices.Equal(now, selectors) {
			fresh := s.cfg.Mirror.Subscribe(now)
			if sub != nil {
				sub.Close()
			}
			sub, selectors = fresh, now
		}
		view, err := s.ready(ctx, sub, pending)
		if err != nil {
			return err
		}
		msg, err := answer(view)
		if err != nil {
			s.explain(c, err)
			return err
		}
		if !sent || !proto.Equal(msg, last) {
			if err := s.deliver(c, func() error { return send(msg) }); err != nil {
				return err
			}
			last, sent = msg, true
		}
		timer.Reset(reattestEvery)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-sub.Changed():
		case <-timer.C:
		}
	}
}

// ready returns the view once no SVID in it is on its way any more, or when
// waiting has been long enough. What is there already is never kept waiting.
func (s *Server) ready(ctx context.Context, sub *mirror.Subscription, pending bool) (mirror.View, error) {
	view := sub.View()
	if !view.Synced {
		return view, errNotSynced
	}
	if !pending || view.Pending == 0 {
		return view, nil
	}
	deadline := time.NewTimer(readyWait)
	defer deadline.Stop()
	for view.Pending > 0 {
		select {
		case <-ctx.Done():
			return view, ctx.Err()
		case <-deadline.C:
			return view, nil
		case <-sub.Changed():
		}
		view = sub.View()
	}
	return view, nil
}

// deliver sends one message to a caller who is still what it was (R38, R40). A
// caller who does not read loses its connection (W8).
func (s *Server) deliver(c *caller, send func() error) error {
	if err := c.Check(); err != nil {
		return err
	}
	slow := time.AfterFunc(sendWait, func() { c.Close() })
	defer slow.Stop()
	return send()
}

// explain leaves a trace for the operator of why nobody got anything. It names
// no selector: they may be private (RG72).
func (s *Server) explain(c *caller, err error) {
	p, perr := c.Peer()
	if perr != nil {
		return
	}
	if n := s.quiet.due(); n > 0 {
		s.cfg.Log.Info("no identity for a caller", "pid", p.PID, "uid", p.UID, "reason", fault.ReasonOf(err), "count", n)
	}
}
