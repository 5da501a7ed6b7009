package serverapi

import (
	"context"

	loggerv1 "github.com/plastron/plastron/internal/api/spire/api/server/logger/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/rpc"
)

// loggers is spire.api.server.logger.v1.Logger.
type loggers struct {
	loggerv1.UnsafeLoggerServer
	rpc.Logger
}

// GetLogger says from which level on there is a log.
func (l loggers) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*spiretypes.Logger, error) {
	return l.State(), nil
}

// SetLogLevel changes the level until the next change or start.
func (l loggers) SetLogLevel(ctx context.Context, req *loggerv1.SetLogLevelRequest) (*spiretypes.Logger, error) {
	return l.Set(req.GetNewLevel(), callerFrom(ctx).name())
}

// ResetLogLevel returns to the level that is configured.
func (l loggers) ResetLogLevel(ctx context.Context, _ *loggerv1.ResetLogLevelRequest) (*spiretypes.Logger, error) {
	return l.Reset(callerFrom(ctx).name())
}
