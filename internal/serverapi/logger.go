package serverapi

import (
	"context"

	loggerv1 "github.com/plastron/plastron/internal/api/spire/api/server/logger/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/logging"
)

// loggers is spire.api.server.logger.v1.Logger.
type loggers struct {
	loggerv1.UnsafeLoggerServer
	server *Server
}

// GetLogger says from which level on there is a log.
func (l loggers) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*spiretypes.Logger, error) {
	return l.state(), nil
}

// SetLogLevel changes the level until the next change or start.
func (l loggers) SetLogLevel(ctx context.Context, req *loggerv1.SetLogLevelRequest) (*spiretypes.Logger, error) {
	level := logging.Level(req.GetNewLevel()) // the same words in the same order
	if !level.Valid() || spiretypes.LogLevel(level) != req.GetNewLevel() {
		return nil, fault.New(fault.Invalid, "log_level", "new_level: %s is not a level", req.GetNewLevel()).Fix("use PANIC, FATAL, ERROR, WARN, INFO, DEBUG or TRACE")
	}
	l.set(ctx, level)
	return l.state(), nil
}

// ResetLogLevel returns to the level that is configured.
func (l loggers) ResetLogLevel(ctx context.Context, _ *loggerv1.ResetLogLevelRequest) (*spiretypes.Logger, error) {
	l.set(ctx, logging.DialOf(l.server.cfg.Log).Launch())
	return l.state(), nil
}

func (l loggers) set(ctx context.Context, level logging.Level) {
	// It is said before a log falls silent.
	l.server.cfg.Log.WarnContext(ctx, "log level changed", "caller", callerFrom(ctx).name(), "kind", level.String())
	logging.DialOf(l.server.cfg.Log).Set(level)
}

func (l loggers) state() *spiretypes.Logger {
	dial := logging.DialOf(l.server.cfg.Log)
	return &spiretypes.Logger{CurrentLevel: spiretypes.LogLevel(dial.Current()), LaunchLevel: spiretypes.LogLevel(dial.Launch())}
}
