package rpc

import (
	"context"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// Meter tells of each call that ends: its method, gRPC code, reason if it was
// refused for one, and how long it took. The zero Meter tells nobody.
type Meter struct {
	Tell func(method, code, reason string, took time.Duration)

	methods map[string]bool // those that are offered
}

// otherMethod stands for methods that are not offered: their names are the caller's.
const otherMethod = "other"

// Learn takes note of the methods that a server offers: when all are registered
// and before it serves.
func (m *Meter) Learn(s *grpc.Server) {
	if m.methods == nil {
		m.methods = map[string]bool{}
	}
	for service, info := range s.GetServiceInfo() {
		for _, method := range info.Methods {
			m.methods["/"+service+"/"+method.Name] = true
		}
	}
}

// Unary is an interceptor around another.
func (m *Meter) Unary(inner grpc.UnaryServerInterceptor) grpc.UnaryServerInterceptor {
	if m.Tell == nil {
		return inner
	}
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		began := time.Now()
		resp, err := inner(ctx, req, info, handler)
		m.Ended(info.FullMethod, err, time.Since(began))
		return resp, err
	}
}

// Stream is an interceptor around another.
func (m *Meter) Stream(inner grpc.StreamServerInterceptor) grpc.StreamServerInterceptor {
	if m.Tell == nil {
		return inner
	}
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		began := time.Now()
		err := inner(srv, ss, info, handler)
		m.Ended(info.FullMethod, err, time.Since(began))
		return err
	}
}

// Ended tells of a call that ended with a status, for calls that end before an
// interceptor sees them.
func (m *Meter) Ended(method string, err error, took time.Duration) {
	if m.Tell == nil {
		return
	}
	if !m.methods[method] {
		method = otherMethod
	}
	st := status.Convert(err)
	reason := ""
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			reason = info.Reason
		}
	}
	m.Tell(method, st.Code().String(), reason, took)
}
