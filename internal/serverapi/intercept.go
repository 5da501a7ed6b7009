package serverapi

import (
	"context"
	"errors"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/rpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// admit runs before every handler. done gives the room back and must be called once.
func (s *Server) admit(ctx context.Context, method string) (admitted context.Context, r rule, done func(), err error) {
	_, err = s.guard.Contain(method, func() (_ any, err error) {
		admitted, r, done, err = s.judge(ctx, method)
		return nil, err
	})
	return admitted, r, done, err
}

// judge says who calls, whether they may, and whether there is room.
func (s *Server) judge(ctx context.Context, method string) (_ context.Context, r rule, done func(), err error) {
	now := time.Now()
	c, err := s.identify(ctx, now)
	if err != nil {
		return nil, rule{}, nil, err
	}
	ctx = context.WithValue(ctx, callerKey{}, c)
	r, known := s.table[method]
	if !known || r.who&c.kinds == 0 {
		// Refusals are put on record, so a flood of them has to stand in line too.
		if wait, ok := s.gates[queueRead].take(c.key(), 1, now); !ok {
			return nil, rule{}, nil, busy(wait)
		}
		err := c.refused()
		s.recordRefusal(ctx, method, err)
		return nil, rule{}, nil, err
	}
	done = func() {}
	if g := s.gates[r.queue]; g != nil && c.kinds&operators == 0 {
		if done, err = g.enter(c.key(), now); err != nil {
			return nil, rule{}, nil, err
		}
	}
	return ctx, r, done, nil
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, r, done, err := s.admit(ctx, info.FullMethod)
	if err != nil {
		return nil, toStatus(err)
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, r.limit)
	defer cancel()
	if callerFrom(ctx).kinds&operators != 0 {
		if err := s.reach(ctx); err != nil {
			return nil, toStatus(err)
		}
		ctx = noteReceipts(ctx)
	}
	resp, err := s.guard.Contain(info.FullMethod, func() (any, error) { return handler(ctx, req) })
	return resp, s.finish(ctx, info.FullMethod, err)
}

// stream runs a handler that may block in Recv or Send for as long as the peer
// likes. Returning is what ends such a call, so the handler has a goroutine of
// its own when there is a limit to keep (A4, A5).
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, r, done, err := s.admit(ss.Context(), info.FullMethod)
	if err != nil {
		return toStatus(err)
	}
	if r.limit == 0 {
		defer done()
		_, err := s.guard.Contain(info.FullMethod, func() (any, error) { return nil, handler(srv, &stream{ss, ctx}) })
		return s.finish(ctx, info.FullMethod, err)
	}
	ctx, cancel := context.WithTimeout(ctx, r.limit)
	defer cancel()
	result := make(chan error, 1)
	go func() {
		defer done()
		_, err := s.guard.Contain(info.FullMethod, func() (any, error) { return nil, handler(srv, &stream{ss, ctx}) })
		result <- err
	}()
	select {
	case err := <-result:
		return s.finish(ctx, info.FullMethod, err)
	case <-ctx.Done():
		return toStatus(ctx.Err())
	}
}

// stream carries the context that admit made.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s *stream) Context() context.Context { return s.ctx }

// finish maps a handler's error to the wire, logs what is not the caller's
// doing and puts refusals on record.
func (s *Server) finish(ctx context.Context, method string, err error) error {
	if err == nil {
		return nil
	}
	switch {
	case denies(err):
		s.recordRefusal(ctx, method, err)
	case fault.KindOf(err) == fault.Internal && rpc.Code(err) == codes.Internal && rpc.Ours(err):
		s.cfg.Log.ErrorContext(ctx, "call failed", "rpc", method, "caller", callerFrom(ctx).name(), "err", err)
	}
	return toStatus(err)
}

// underGrant is why something is not signed under a grant of the caller's.
type underGrant struct {
	error
	grant string
	facts map[string]string // of a rule: what the caller states
}

// Unwrap returns the reason.
func (u *underGrant) Unwrap() error { return u.error }

// recordRefusal puts refusals of a call, or of items of its batch, on record.
func (s *Server) recordRefusal(ctx context.Context, method string, errs ...error) {
	c := callerFrom(ctx)
	var events []audit.Event
	for _, err := range errs {
		event := audit.Refusal{Caller: c.name(), Address: c.link.address, Call: method, Kind: fault.KindOf(err).String(), Reason: fault.ReasonOf(err)}
		if u, ok := errors.AsType[*underGrant](err); ok {
			event.Subject, event.Detail = u.grant, audit.Text(fault.MessageOf(err))
			for name, value := range u.facts {
				if event.Facts == nil {
					event.Facts = map[string]string{}
				}
				event.Facts[name] = audit.Text(value)
			}
		}
		events = append(events, event)
	}
	if err := s.cfg.Audit.Append(events...); err != nil {
		// They are refused either way.
		s.cfg.Log.ErrorContext(ctx, "refusal not on record", "rpc", method, "count", len(events), "err", err)
	}
}

// denies reports whether an error is a refusal that belongs on record.
func denies(err error) bool {
	kind := fault.KindOf(err)
	return err != nil && (kind == fault.Denied || kind == fault.Unauthenticated)
}
