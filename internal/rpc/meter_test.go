package rpc_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/rpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/emptypb"
)

type health struct {
	grpc_health_v1.UnimplementedHealthServer
}

func (health) Check(_ context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	if req.Service == "" {
		return &grpc_health_v1.HealthCheckResponse{}, nil
	}
	err := fault.New(fault.Denied, "not_allowed", "no")
	return nil, rpc.Status(err, rpc.Code(err))
}

// A meter is told of each call once; a method that is not offered has no name of
// the caller's choice.
func TestMeter(t *testing.T) {
	var mu sync.Mutex
	var told []string
	meter := rpc.Meter{Tell: func(method, code, reason string, took time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, fmt.Sprintf("%s %s %q %v", method, code, reason, took >= 0))
	}}
	unary := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		return h(ctx, req)
	}
	stream := func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		return h(srv, ss)
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(meter.Unary(unary)), grpc.StreamInterceptor(meter.Stream(stream)),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
			err := fault.New(fault.Unsupported, "method_unknown", "no such method")
			return rpc.Status(err, rpc.Code(err))
		}))
	grpc_health_v1.RegisterHealthServer(s, health{})
	meter.Learn(s)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := grpc_health_v1.NewHealthClient(conn)
	if _, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "x"}); err == nil {
		t.Error("not refused")
	}
	watch, err := client.Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err == nil {
		_, err = watch.Recv()
	}
	if err == nil {
		t.Error("not refused")
	}
	if conn.Invoke(t.Context(), "/grpc.health.v1.Health/Chosen-by-the-caller", &emptypb.Empty{}, &emptypb.Empty{}) == nil {
		t.Error("not refused")
	}
	s.GracefulStop() // all calls have ended
	if err := <-served; err != nil {
		t.Error(err)
	}
	want := []string{
		`/grpc.health.v1.Health/Check OK "" true`, `/grpc.health.v1.Health/Check PermissionDenied "not_allowed" true`,
		`/grpc.health.v1.Health/Watch Unimplemented "" true`, `other Unimplemented "method_unknown" true`,
	}
	if !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
}
