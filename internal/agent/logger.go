package agent

import (
	"context"

	agentloggerv1 "github.com/plastron/plastron/internal/api/spire/api/agent/logger/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/rpc"
	"google.golang.org/grpc"
)

// loggers is spire.api.agent.logger.v1.Logger.
type loggers struct {
	agentloggerv1.UnsafeLoggerServer
	rpc.Logger
}

const operator = "on the admin socket"

func (l loggers) register(to grpc.ServiceRegistrar) { agentloggerv1.RegisterLoggerServer(to, l) }

// GetLogger says from which level on there is a log.
func (l loggers) GetLogger(context.Context, *agentloggerv1.GetLoggerRequest) (*spiretypes.Logger, error) {
	return l.State(), nil
}

// SetLogLevel changes the level until the next change or start.
func (l loggers) SetLogLevel(_ context.Context, req *agentloggerv1.SetLogLevelRequest) (*spiretypes.Logger, error) {
	return l.Set(req.GetNewLevel(), operator)
}

// ResetLogLevel returns to the level that is configured.
func (l loggers) ResetLogLevel(context.Context, *agentloggerv1.ResetLogLevelRequest) (*spiretypes.Logger, error) {
	return l.Reset(operator)
}
