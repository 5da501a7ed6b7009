package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
)

// securityHeader shows that the caller meant to call this API, and was not
// talked into it by someone else (Workload Endpoint section 3).
const securityHeader = "workload.spiffe.io"

var errHeader = fault.New(fault.Invalid, "security_header_missing",
	"the request does not carry the security header").
	Fix("send the metadata " + securityHeader + ": true, exactly once")

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	err = s.guard(ctx, info.FullMethod, func() (err error) {
		resp, err = handler(ctx, req)
		return err
	})
	return resp, toStatus(err)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return toStatus(s.guard(ss.Context(), info.FullMethod, func() error { return handler(srv, ss) }))
}

// guard is what every call passes: the header first, before any work (W1), then
// the limits; a panic costs only its call (R99).
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
	if err := s.users.begin(c.uid); err != nil {
		if n := s.quiet.due(); n > 0 {
			s.cfg.Log.Info("call refused", "rpc", method, "uid", c.uid, "reason", fault.ReasonOf(err), "count", n)
		}
		return err
	}
	defer s.users.end(c.uid)
	defer func() {
		if p := recover(); p != nil {
			s.panics.Add(1)
			s.cfg.Log.Error("call panicked", "rpc", method, "err", fmt.Sprint(p), "kind", string(debug.Stack()))
			err = errors.New("panic")
		}
	}()
	err = call()
	if err != nil && fault.KindOf(err) == fault.Internal && ctx.Err() == nil {
		if n := s.quiet.due(); n > 0 {
			s.cfg.Log.Info("call failed", "rpc", method, "uid", c.uid, "err", err, "count", n)
		}
	}
	return err
}

func needsHeader(method string) bool { return strings.HasPrefix(method, "/SpiffeWorkloadAPI/") }

// unknown answers calls of methods that are not offered, such as the profile
// for WIT-SVIDs; the header comes first there, too (guard).
func unknown(any, grpc.ServerStream) error {
	return fault.New(fault.Unsupported, "method_unknown", "this method is not offered here")
}

// toStatus is the error that leaves: code, text, and for machines the reason
// (R131). Over a limit is Unavailable here, which clients take as "try again" (WEP-6-c).
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, library := status.FromError(err); library && fault.KindOf(err) == fault.Internal {
		return err
	}
	if code := codeOf(err); code == codes.Canceled {
		return status.Error(code, "canceled") // nobody reads it
	}
	st := status.New(codeOf(err), textOf(err))
	detailed, derr := st.WithDetails(protoadapt.MessageV1Of(&errdetails.ErrorInfo{Reason: fault.ReasonOf(err), Domain: "plastron"}))
	if derr != nil {
		return st.Err()
	}
	return detailed.Err()
}

func codeOf(err error) codes.Code {
	switch fault.KindOf(err) {
	case fault.Invalid:
		return codes.InvalidArgument
	case fault.Denied, fault.Unauthenticated:
		return codes.PermissionDenied
	case fault.Unsupported:
		return codes.Unimplemented
	case fault.Internal:
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			return codes.DeadlineExceeded
		case errors.Is(err, context.Canceled):
			return codes.Canceled
		}
		return codes.Internal
	}
	return codes.Unavailable
}

func textOf(err error) string {
	e, ok := errors.AsType[*fault.Error](err)
	switch {
	case ok && e.Remedy != "":
		return e.Message + "; " + e.Remedy
	case ok:
		return e.Message
	}
	return "internal error; the agent's log has the details"
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
