package serverapi

import (
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/rpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/protoadapt"
)

// toStatus is the error that leaves the process; besides the reason it says what
// SPIRE agents look for (R131).
func toStatus(err error) error {
	var details []protoadapt.MessageV1
	if reason, ok := deniedReason(fault.ReasonOf(err)); ok {
		details = append(details, protoadapt.MessageV1Of(&spiretypes.PermissionDeniedDetails{Reason: reason}))
	}
	return rpc.Status(err, rpc.Code(err), details...)
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
	return &spiretypes.Status{Code: int32(rpc.Code(err)), Message: rpc.Text(err)}
}
