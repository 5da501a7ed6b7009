package workloadapi

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/reason"
	"google.golang.org/protobuf/proto"
)

// errNothing says that there is nothing to hand out. No caller sees it: refuse
// says why.
var errNothing = errors.New("nothing to hand out")

// watch is the life of one stream: the whole state of its caller, and again
// with each change. answer makes the message for a view; the same message is not
// sent twice. pending says whether SVIDs that are being signed are worth waiting for.
func watch[M proto.Message](ctx context.Context, s *Server, pending bool, answer func(mirror.View) (M, error), send func(M) error) error {
	x, err := s.Session(ctx)
	if err != nil {
		return err
	}
	defer x.Close()
	var (
		last M
		sent bool
	)
	for {
		view, err := x.Look(ctx, pending)
		if err != nil {
			return err
		}
		msg, err := answer(view)
		if err != nil {
			return s.refuse(ctx, x.seen, err)
		}
		if !sent || !proto.Equal(msg, last) {
			if err := x.Send(proto.Size(msg), func() error { return send(msg) }); err != nil {
				return err
			}
			last, sent = msg, true
		}
		if err := x.Next(ctx, nil); err != nil {
			return err
		}
	}
}

// Session is one caller that is told of changes: what it is, looked at again with
// each of them (R42), and what it may have then. One goroutine uses it.
type Session struct {
	server *Server
	caller *caller
	seen   attested
	anew   bool // seen was good for the last answer only
	sub    *mirror.Subscription
	timer  *time.Timer
}

// Session begins one for whoever makes the call.
func (s *Server) Session(ctx context.Context) (*Session, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	return &Session{server: s, caller: c, timer: time.NewTimer(s.cfg.waits.reattest)}, nil
}

// Close ends it.
func (x *Session) Close() {
	x.timer.Stop()
	x.caller.backlog.forget()
	if x.sub != nil {
		x.sub.Close()
	}
}

// Process returns who calls, if the kernel says.
func (x *Session) Process() *process.Process {
	p, _ := x.caller.Peer() // Look tells of the error
	return p
}

// Look attests the caller and returns what it may have now. If it is to wait, it
// waits for SVIDs that are being signed, but not for long.
func (x *Session) Look(ctx context.Context, wait bool) (mirror.View, error) {
	now, err := x.server.attest(ctx, x.caller, x.anew)
	if err != nil {
		return mirror.View{}, err
	}
	if x.sub == nil || !slices.Equal(now.facts.Selectors, x.seen.facts.Selectors) || !maps.Equal(now.facts.Values, x.seen.facts.Values) {
		fresh := x.server.cfg.Mirror.Subscribe(now.facts)
		if x.sub != nil {
			x.sub.Close()
		}
		x.sub = fresh
	}
	x.seen = now
	view, err := x.server.ready(ctx, x.sub, wait)
	return view, x.server.refuse(ctx, x.seen, err)
}

// Nothing says why there is nothing to hand out.
func (x *Session) Nothing(ctx context.Context) error {
	return x.server.refuse(ctx, x.seen, errNothing)
}

// Send sends one message of n bytes to a caller who is still what it was (R38,
// R40). A caller who does not read loses its connection (W8).
func (x *Session) Send(n int, send func() error) error {
	if err := x.caller.Check(); err != nil {
		return err
	}
	x.caller.backlog.add(n)
	return send()
}

// Next returns when it is time to look again: something has changed, or nobody
// has looked for long, or there is something in again.
func (x *Session) Next(ctx context.Context, again <-chan struct{}) error {
	x.timer.Reset(x.server.cfg.waits.reattest)
	x.anew = true
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-x.sub.Changed():
	case <-x.timer.C:
	case <-again:
		x.anew = false // nothing here has changed
	}
	return nil
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
