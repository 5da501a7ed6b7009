package serverapi

import (
	"context"

	"github.com/plastron/plastron/internal/fault"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// health is grpc.health.v1.Health on the admin socket.
type health struct {
	server *Server
}

// Check says whether this server can serve and issue (R105).
func (h health) Check(ctx context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	if req.Service != "" {
		return nil, fault.New(fault.NotFound, "service_unknown", "health is that of the whole server").Fix("leave the service name empty")
	}
	if err := h.server.cfg.Health(); err != nil {
		h.server.cfg.Log.WarnContext(ctx, "not healthy", "err", err)
		return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_NOT_SERVING}, nil
	}
	return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}, nil
}

// List is not offered.
func (health) List(context.Context, *grpc_health_v1.HealthListRequest) (*grpc_health_v1.HealthListResponse, error) {
	return nil, errCheckOnly()
}

// Watch is not offered.
func (health) Watch(*grpc_health_v1.HealthCheckRequest, grpc.ServerStreamingServer[grpc_health_v1.HealthCheckResponse]) error {
	return errCheckOnly()
}

func errCheckOnly() error {
	return fault.New(fault.Unsupported, "check_only", "health is given by Check only")
}
