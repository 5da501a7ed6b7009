package workloadapi

import (
	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
)

// The profile for WIT-SVIDs is not offered, as a whole (WAPI-7-a).
var errWIT = fault.New(fault.Unsupported, "profile_unsupported", "WIT-SVIDs are not offered")

// FetchWITSVID is not offered.
func (*Server) FetchWITSVID(*workload.WITSVIDRequest, grpc.ServerStreamingServer[workload.WITSVIDResponse]) error {
	return errWIT
}

// FetchWITBundles is not offered.
func (*Server) FetchWITBundles(*workload.WITBundlesRequest, grpc.ServerStreamingServer[workload.WITBundlesResponse]) error {
	return errWIT
}
