package postgres

import (
	"context"
	"log/slog"
)

// OpenFunc is the type of Config.Open.
type OpenFunc func(Config, context.Context, *slog.Logger) (*Store, error)

// OpenSmall opens with limits that a test reaches.
func OpenSmall(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	l := defaultLimits()
	l.recentRows, l.recentBytes, l.locked = 4, 2000, 0
	return open(ctx, c, log, l)
}
