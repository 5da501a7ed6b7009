package serverapi

import (
	"context"
	"crypto/x509"
	"log/slog"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// What goes wrong while a caller is judged costs that call only, like what goes
// wrong in its handler (R99).
func TestPanicBeforeTheHandler(t *testing.T) {
	s := New(Config{Log: slog.New(slog.DiscardHandler)}) // without a registry, which judging needs
	ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: &link{leaf: &x509.Certificate{}}})
	_, err := s.unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/a/b"}, func(context.Context, any) (any, error) {
		t.Error("the handler was called")
		return nil, nil
	})
	if status.Code(err) != codes.Internal || s.Panics() != 1 {
		t.Errorf("unary: %v with %d panics", err, s.Panics())
	}
	err = s.stream(nil, &stream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: "/a/c"}, nil)
	if status.Code(err) != codes.Internal || s.Panics() != 2 {
		t.Errorf("stream: %v with %d panics", err, s.Panics())
	}
}
