// Package rpc is what our gRPC listeners have in common: how faults, times and
// selectors look on the wire, and that a call that panics costs itself only.
//
// What must always hold: a caller reads a fault's message and remedy, never its
// cause, and nothing of an error that is no fault; each refusal carries its
// reason for machines (R131).
package rpc

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"

	"github.com/plastron/plastron/internal/fault"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Code is the gRPC code that an error has, if its wire has no other for it.
func Code(err error) codes.Code {
	switch fault.KindOf(err) {
	case fault.Invalid:
		return codes.InvalidArgument
	case fault.NotFound:
		return codes.NotFound
	case fault.Exists:
		return codes.AlreadyExists
	case fault.Conflict:
		return codes.Aborted
	case fault.Precondition:
		return codes.FailedPrecondition
	case fault.Denied:
		return codes.PermissionDenied
	case fault.Unauthenticated:
		return codes.Unauthenticated
	case fault.Exhausted:
		return codes.ResourceExhausted
	case fault.Unavailable:
		return codes.Unavailable
	case fault.Unsupported:
		return codes.Unimplemented
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	return codes.Internal
}

// InternalText is what a caller reads of an error that is no fault.
const InternalText = "internal error; the log on the other side has the details"

// Text is what a caller may read of an error.
func Text(err error) string {
	e, ok := errors.AsType[*fault.Error](err)
	switch {
	case ok && e.Remedy != "":
		return e.Message + "; " + e.Remedy
	case ok:
		return e.Message
	case errors.Is(err, context.DeadlineExceeded):
		return "the call took too long"
	case errors.Is(err, context.Canceled):
		return "the caller went away"
	}
	return InternalText
}

// Ours tells our errors from those of the library, which are statuses already: a
// message over the limit, a stream that ended.
func Ours(err error) bool {
	_, ok := errors.AsType[*fault.Error](err)
	_, library := status.FromError(err)
	return ok || !library
}

// Status is the error that leaves the process: code, text, details, and for
// machines the reason and when to come again.
func Status(err error, code codes.Code, details ...protoadapt.MessageV1) error {
	if err == nil || !Ours(err) {
		return err
	}
	st := status.New(code, Text(err))
	if code == codes.Canceled {
		return st.Err() // nobody reads it
	}
	details = append(details, protoadapt.MessageV1Of(&errdetails.ErrorInfo{Reason: fault.ReasonOf(err), Domain: "plastron"}))
	if after := fault.AfterOf(err); after > 0 {
		details = append(details, protoadapt.MessageV1Of(&errdetails.RetryInfo{RetryDelay: durationpb.New(after)}))
	}
	if detailed, err := st.WithDetails(details...); err == nil {
		return detailed.Err()
	}
	return st.Err()
}

// Guard contains panics. Any number of them but zero is a bug (R99).
type Guard struct {
	Log    *slog.Logger
	Panics atomic.Uint64
}

// Contain turns a panic in f into a failure of this call alone.
func (g *Guard) Contain(method string, f func() (any, error)) (resp any, err error) {
	returned := false
	err = fault.Contain(func() (err error) {
		resp, err = f()
		returned = true
		return err
	})
	if returned {
		return resp, err
	}
	g.Panics.Add(1)
	g.Log.Error("call panicked", "rpc", method, "err", err)
	return nil, fault.New(fault.Internal, fault.Panicked, InternalText)
}
