package serverlink

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxText bounds what is taken over of a server's error text.
const maxText = 1024

// fault makes a fault of what a call returned: the kind follows the code, the
// reason is the server's own if it gave one. It is the only place that reads
// gRPC codes here.
func (c *connection) fault(doing string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF):
		return fault.New(fault.Unavailable, "server_closed", "%s: the server ended the conversation", doing)
	}
	st, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%s: %w", doing, err)
	}
	kind, reason := kindOf(st.Code())
	if kind == fault.Unavailable {
		if verdict := c.untrusted(); verdict != nil {
			return fmt.Errorf("%s: %w", doing, verdict)
		}
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == "plastron" && info.GetReason() != "" {
			reason = clip(info.GetReason())
		}
	}
	return fault.New(kind, reason, "%s: %s", doing, clip(st.Message()))
}

func kindOf(code codes.Code) (fault.Kind, string) {
	switch code {
	case codes.InvalidArgument, codes.OutOfRange:
		return fault.Invalid, "server_refused"
	case codes.NotFound:
		return fault.NotFound, "not_found"
	case codes.AlreadyExists:
		return fault.Exists, "exists"
	case codes.Aborted:
		return fault.Conflict, "conflict"
	case codes.FailedPrecondition:
		return fault.Precondition, "server_refused"
	case codes.PermissionDenied:
		return fault.Denied, "server_denied"
	case codes.Unauthenticated:
		return fault.Unauthenticated, "server_unauthenticated"
	case codes.ResourceExhausted:
		return fault.Exhausted, "server_exhausted"
	case codes.Unimplemented:
		return fault.Unsupported, "server_unsupported"
	case codes.Canceled:
		return fault.Unavailable, "call_ended" // by us
	case codes.Unavailable, codes.DeadlineExceeded:
		return fault.Unavailable, "server_unavailable"
	}
	return fault.Unavailable, "server_failed"
}

// clip bounds a text and makes it one line (R104).
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "…"
	}
	return s
}
