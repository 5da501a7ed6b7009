package workloadapi

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/rpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

// securityHeader shows that the caller meant to call this API, and was not
// talked into it by someone else (Workload Endpoint section 3).
const securityHeader = "workload.spiffe.io"

var errHeader = fault.New(fault.Invalid, "security_header_missing",
	"the request does not carry the security header").
	Fix("send the metadata " + securityHeader + ": true, exactly once")

// call is what the tap knows of a call.
type call struct{ late *time.Timer }

type callKey struct{}

// tap sees the headers of each call before anything is kept for it. It counts the
// call until the library has done with it, whatever becomes of it, and gives its
// request a limited time to arrive, else its memory would be held for as long as
// the caller likes.
func (s *Server) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return ctx, toStatus(err)
	}
	if err := s.users.begin(c.uid); err != nil {
		s.note(c, info.FullMethodName, err)
		err = toStatus(s.refusals.count(err))
		s.meter.Ended(info.FullMethodName, err, 0)
		return ctx, err
	}
	late := time.AfterFunc(s.cfg.waits.request, func() { c.Close() })
	context.AfterFunc(ctx, func() {
		late.Stop()
		s.users.end(c.uid)
	})
	return context.WithValue(ctx, callKey{}, call{late}), nil
}

// arrived says that the request of a call is complete.
func arrived(ctx context.Context) {
	if c, ok := ctx.Value(callKey{}).(call); ok {
		c.late.Stop()
	}
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	arrived(ctx)
	err = s.guard(ctx, info.FullMethod, func() (err error) {
		resp, err = handler(ctx, req)
		return err
	})
	return resp, toStatus(s.refusals.count(err))
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	r := &requests{ServerStream: ss, users: s.users}
	return toStatus(s.refusals.count(s.guard(ss.Context(), info.FullMethod, func() error { return handler(srv, r) })))
}

// requests notes when the request of a stream has arrived. Each that follows
// counts as a call begun.
type requests struct {
	grpc.ServerStream
	users *users
	begun bool
}

// RecvMsg receives a request.
func (r *requests) RecvMsg(m any) error {
	err := r.ServerStream.RecvMsg(m)
	if !r.begun || err != nil {
		arrived(r.Context())
		r.begun = true
		return err
	}
	c, err := callerOf(r.Context())
	if err != nil {
		return err
	}
	return r.users.goOn(c.uid)
}

// guard is what every call passes: the header first, before any work (W1); a
// panic costs only its call (R99).
func (s *Server) guard(ctx context.Context, method string, call func() error) (err error) {
	if needsHeader(method) {
		if v := metadata.ValueFromIncomingContext(ctx, securityHeader); len(v) != 1 || v[0] != "true" {
			return errHeader
		}
	}
	c, err := callerOf(ctx)
	if err != nil {
		return err
	}
	if _, err = s.contain.Contain(method, func() (any, error) { return nil, call() }); ctx.Err() == nil {
		s.note(c, method, err)
	}
	if err != nil && fault.KindOf(err) == fault.Internal && ctx.Err() == nil {
		if n := s.quiet.Due(); n > 0 {
			s.cfg.Log.Info("call failed", "rpc", method, "uid", c.uid, "err", err, "count", n)
		}
	}
	return err
}

// note leaves a trace for the operator of who is refused what. It names no
// selector: they may be private (RG72).
func (s *Server) note(c *caller, method string, err error) {
	switch fault.KindOf(err) {
	case fault.Denied, fault.Unavailable, fault.Exhausted:
	default:
		return
	}
	n := s.refusals.due(refusal{c.uid, fault.ReasonOf(err)}, time.Now())
	if n == 0 {
		return
	}
	pid := 0
	if p, perr := c.Peer(); perr == nil {
		pid = p.PID
	}
	s.cfg.Log.Info("workload refused", "rpc", method, "uid", c.uid, "pid", pid, "reason", fault.ReasonOf(err), "count", n)
}

func needsHeader(method string) bool {
	return strings.HasPrefix(method, "/SpiffeWorkloadAPI/") || strings.HasPrefix(method, "/plastron.why.v1.Self/")
}

// unknown answers calls of methods that are not offered, such as the profile
// for WIT-SVIDs; the header comes first there, too (guard).
func unknown(any, grpc.ServerStream) error {
	return fault.New(fault.Unsupported, "method_unknown", "this method is not offered here")
}

// toStatus is the error that leaves: code, text, and for machines the reason
// (R131). Over a limit is Unavailable here, which clients take as "try again" (WEP-6-c).
func toStatus(err error) error {
	code := codes.Unavailable
	switch fault.KindOf(err) {
	case fault.Invalid, fault.Denied, fault.Unsupported, fault.Internal:
		code = rpc.Code(err)
	case fault.Unauthenticated:
		code = codes.PermissionDenied
	}
	if e, ok := errors.AsType[*fault.Error](err); ok {
		err = reason.Say(e, "%s (%s)", e.Message, e.Reason) // many clients show the text alone
	}
	return rpc.Status(err, code)
}

// health says whether the agent is ready (R105).
type health struct {
	grpc_health_v1.UnimplementedHealthServer
	server *Server
}

// Check implements grpc_health_v1.HealthServer.
func (h health) Check(_ context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	if s := req.GetService(); s != "" && s != "SpiffeWorkloadAPI" {
		return nil, status.Error(codes.NotFound, "no such service")
	}
	st := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if h.server.cfg.Health() == nil {
		st = grpc_health_v1.HealthCheckResponse_SERVING
	}
	return &grpc_health_v1.HealthCheckResponse{Status: st}, nil
}
