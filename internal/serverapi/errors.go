package serverapi

import (
	"context"
	"errors"

	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// codeOf is the one place that says which gRPC code a kind of fault has.
func codeOf(err error) codes.Code {
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

// textOf is what a caller may read of an error: message and remedy of a fault,
// nothing of anything else, and never a cause.
func textOf(err error) string {
	e, ok := errors.AsType[*fault.Error](err)
	switch {
	case ok && e.Remedy != "":
		return e.Message + "; " + e.Remedy
	case ok:
		return e.Message
	}
	switch codeOf(err) {
	case codes.DeadlineExceeded:
		return "the call took too long"
	case codes.Canceled:
		return "the caller went away"
	}
	return "internal error; the server's log has the details"
}

// toStatus is the error that leaves the process: code, text, and for machines
// the reason, when to come again, and what SPIRE agents look for (R131).
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if !isOurs(err) {
		return err
	}
	st := status.New(codeOf(err), textOf(err))
	var details []protoadapt.MessageV1
	if reason, ok := deniedReason(fault.ReasonOf(err)); ok {
		details = append(details, protoadapt.MessageV1Of(&spiretypes.PermissionDeniedDetails{Reason: reason}))
	}
	details = append(details, protoadapt.MessageV1Of(&errdetails.ErrorInfo{Reason: fault.ReasonOf(err), Domain: "plastron"}))
	if b, ok := errors.AsType[*busyError](err); ok {
		details = append(details, protoadapt.MessageV1Of(&errdetails.RetryInfo{RetryDelay: durationpb.New(b.after)}))
	}
	detailed, err := st.WithDetails(details...)
	if err != nil {
		return st.Err()
	}
	return detailed.Err()
}

// isOurs tells our errors from those of the library, which are statuses
// already: a message over the limit, a stream that ended.
func isOurs(err error) bool {
	_, ok := errors.AsType[*fault.Error](err)
	_, library := status.FromError(err)
	return ok || !library
}

func deniedReason(reason string) (spiretypes.PermissionDeniedDetails_Reason, bool) {
	switch reason {
	case nodes.ReasonExpired:
		return spiretypes.PermissionDeniedDetails_AGENT_EXPIRED, true
	case nodes.ReasonNotAttested:
		return spiretypes.PermissionDeniedDetails_AGENT_NOT_ATTESTED, true
	case nodes.ReasonNotActive:
		return spiretypes.PermissionDeniedDetails_AGENT_NOT_ACTIVE, true
	case nodes.ReasonBanned:
		return spiretypes.PermissionDeniedDetails_AGENT_BANNED, true
	case nodes.ReasonMustReattest:
		return spiretypes.PermissionDeniedDetails_AGENT_MUST_REATTEST, true
	}
	return 0, false
}

// itemStatus is the outcome of one item of a batch.
func itemStatus(err error) *spiretypes.Status {
	if err == nil {
		return &spiretypes.Status{Code: int32(codes.OK), Message: "OK"}
	}
	return &spiretypes.Status{Code: int32(codeOf(err)), Message: textOf(err)}
}
