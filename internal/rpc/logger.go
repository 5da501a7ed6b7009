package rpc

import (
	"log/slog"

	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/logging"
)

// Logger is what SPIRE's Logger services of both roles do.
type Logger struct{ Log *slog.Logger }

// State says from which level on there is a log, now and as configured.
func (l Logger) State() *spiretypes.Logger {
	dial := logging.DialOf(l.Log)
	return &spiretypes.Logger{CurrentLevel: spiretypes.LogLevel(dial.Current()), LaunchLevel: spiretypes.LogLevel(dial.Launch())}
}

// Set changes the level until the next change or start.
func (l Logger) Set(wire spiretypes.LogLevel, caller string) (*spiretypes.Logger, error) {
	level := logging.Level(wire) // the same words in the same order
	if !level.Valid() || spiretypes.LogLevel(level) != wire {
		return nil, fault.New(fault.Invalid, "log_level", "new_level: %s is not a level", wire).Fix("use PANIC, FATAL, ERROR, WARN, INFO, DEBUG or TRACE")
	}
	// It is said before a log falls silent.
	l.Log.Warn("log level changed", "caller", caller, "kind", level.String())
	logging.DialOf(l.Log).Set(level)
	return l.State(), nil
}

// Reset returns to the level that is configured.
func (l Logger) Reset(caller string) (*spiretypes.Logger, error) {
	return l.Set(spiretypes.LogLevel(logging.DialOf(l.Log).Launch()), caller)
}
