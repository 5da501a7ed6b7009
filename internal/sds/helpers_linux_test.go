package sds_test

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcmd "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

// metadata are those of a node that says something about the form it wants.
func metadata(t *testing.T, value any) *structpb.Struct {
	t.Helper()
	m, err := structpb.NewStruct(map[string]any{"disable_spiffe_cert_validation": value})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// workloadCall asks for SVIDs over the Workload API.
func workloadCall(t *testing.T, path string) codes.Code {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(grpcmd.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), &workload.X509SVIDRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	return status.Code(err)
}
