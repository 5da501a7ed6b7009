package rpc

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc"
)

// Serve serves until ctx is done, then ends all calls at once.
func Serve(ctx context.Context, g *grpc.Server, l net.Listener) error {
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	err := g.Serve(l)
	if ctx.Err() != nil && (err == nil || errors.Is(err, grpc.ErrServerStopped) || errors.Is(err, net.ErrClosed)) {
		return ctx.Err()
	}
	return err
}
