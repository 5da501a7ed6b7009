package serverlink

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Bounds on what is taken over of a server's error: its text, and for how long it
// may keep us waiting.
const (
	maxText  = 1024
	hintMost = 10 * time.Minute
)

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
	var after time.Duration
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == "plastron" && d.GetReason() != "" {
				reason = clip(d.GetReason())
			}
		case *errdetails.RetryInfo:
			after = notBefore(d.GetRetryDelay())
		case *spiretypes.PermissionDeniedDetails: // all that a SPIRE server says, and the same where both are there
			if st.Code() == codes.PermissionDenied {
				reason = deniedReason(d.GetReason(), reason)
			}
		}
	}
	return fault.New(kind, reason, "%s: %s", doing, clip(undial(st.Message()))).NotBefore(after)
}

// undial takes what went wrong with a connection out of the frame in which gRPC
// tells it: what people read is what the kernel or TLS said.
func undial(text string) string {
	quoted, ok := strings.CutPrefix(text, "connection error: desc = ")
	if !ok {
		return text
	}
	said, err := strconv.Unquote(quoted)
	if err != nil {
		return text
	}
	said = strings.TrimPrefix(said, "transport: ")
	said = strings.TrimPrefix(said, "Error while dialing: ")
	return strings.ReplaceAll(said, "\n", "; ")
}

// notBefore is a server's wish when to come again, within bounds. All that were
// refused in one moment may have been told the same, so it is spread (R110).
func notBefore(d *durationpb.Duration) time.Duration {
	if d.CheckValid() != nil || d.AsDuration() <= 0 {
		return 0
	}
	after := min(d.AsDuration(), hintMost)
	return min(after+rand.N(after/4+1), hintMost)
}

// deniedReason is our name for a reason of SPIRE's; what it does not name stays.
func deniedReason(r spiretypes.PermissionDeniedDetails_Reason, otherwise string) string {
	switch r {
	case spiretypes.PermissionDeniedDetails_AGENT_EXPIRED:
		return "agent_expired"
	case spiretypes.PermissionDeniedDetails_AGENT_NOT_ATTESTED:
		return "agent_not_attested"
	case spiretypes.PermissionDeniedDetails_AGENT_NOT_ACTIVE:
		return "agent_not_active"
	case spiretypes.PermissionDeniedDetails_AGENT_BANNED:
		return "agent_banned"
	case spiretypes.PermissionDeniedDetails_AGENT_MUST_REATTEST:
		return "agent_must_reattest"
	}
	return otherwise
}

// itemFault makes a fault of the outcome of one item of a batch.
func itemFault(doing string, s *spiretypes.Status) error {
	if s.GetCode() == int32(codes.OK) {
		return nil
	}
	kind, reason := kindOf(codes.Code(s.GetCode()))
	return fault.New(kind, reason, "%s: %s", doing, clip(s.GetMessage()))
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
