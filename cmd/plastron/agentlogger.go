package main

import (
	"context"

	agentloggerv1 "github.com/plastron/plastron/internal/api/spire/api/agent/logger/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/logging"
	"google.golang.org/grpc"
)

func agentLogger() logger {
	return logger{
		role: "agent", socket: agentAdminFlags,
		get: func(ctx context.Context, conn *grpc.ClientConn) (*spiretypes.Logger, error) {
			return agentloggerv1.NewLoggerClient(conn).GetLogger(ctx, &agentloggerv1.GetLoggerRequest{})
		},
		set: func(ctx context.Context, conn *grpc.ClientConn, level logging.Level) (*spiretypes.Logger, error) {
			return agentloggerv1.NewLoggerClient(conn).SetLogLevel(ctx, &agentloggerv1.SetLogLevelRequest{NewLevel: spiretypes.LogLevel(level)})
		},
		reset: func(ctx context.Context, conn *grpc.ClientConn) (*spiretypes.Logger, error) {
			return agentloggerv1.NewLoggerClient(conn).ResetLogLevel(ctx, &agentloggerv1.ResetLogLevelRequest{})
		},
	}
}
