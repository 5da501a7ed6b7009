package workloadapi

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/reason"
	"google.golang.org/protobuf/proto"
)

// errNothing says that there is nothing to hand out. No caller sees it: refuse
// says why.
var errNothing = errors.New("nothing to hand out")

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
		last M
		sent bool
		seen attested
		sub  *mirror.Subscription
	)
	defer func() {
		c.backlog.forget()
		if sub != nil {
			sub.Close()
		}
	}()
	timer := time.NewTimer(s.cfg.waits.reattest)
	defer timer.Stop()
	for {
		now, err := s.attest(ctx, c, sent)
		if err != nil {
			return err
		}
		if sub == nil || !slices.Equal(now.facts.Selectors, seen.facts.Selectors) || !maps.Equal(now.facts.Values, seen.facts.Values) {
			fresh := s.cfg.Mirror.Subscribe(now.facts)
			if sub != nil {
				sub.Close()
			}
			sub = fresh
		}
		seen = now
		view, err := s.ready(ctx, sub, pending)
		var msg M
		if err == nil {
			msg, err = answer(view)
		}
		if err != nil {
			return s.refuse(ctx, seen, err)
		}
		if !sent || !proto.Equal(msg, last) {
			if err := s.deliver(c, proto.Size(msg), func() error { return send(msg) }); err != nil {
				return err
			}
			last, sent = msg, true
		}
		timer.Reset(s.cfg.waits.reattest)
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
		return view, errNothing
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

// deliver sends one message of n bytes to a caller who is still what it was (R38,
// R40). A caller who does not read loses its connection (W8).
func (s *Server) deliver(c *caller, n int, send func() error) error {
	if err := c.Check(); err != nil {
		return err
	}
	c.backlog.add(n)
	return send()
}

// refuse says why there is nothing to hand out, in the words that are for
// everybody: what is nearly granted, and to whom, is told to the operator only.
func (s *Server) refuse(ctx context.Context, seen attested, err error) error {
	if !errors.Is(err, errNothing) {
		return err
	}
	r, _ := s.reasonFor(ctx, seen)
	switch {
	case r == nil, r == reason.FederatedBundleMissing:
		return reason.NotSignedYet // there was nothing a moment ago
	case r.Kind == fault.Denied:
		return reason.Say(r, "no identity issued: %s", r.Message) // what clients look for
	}
	return r
}

// reasonFor returns the row of the table for a caller, or nil, and how many
// identities are ready for it.
func (s *Server) reasonFor(ctx context.Context, seen attested) (r *fault.Error, ready int) {
	why := s.cfg.Mirror.Why(ctx, seen.facts, false)
	switch r = why.Reason; {
	case r == nil:
	case r.Kind == fault.Denied && seen.failed != nil:
		r = reason.AttestorFailed // what it did not say may be what is missing
	default:
		r = reason.Find(r.Reason)
	}
	return r, why.Ready()
}
