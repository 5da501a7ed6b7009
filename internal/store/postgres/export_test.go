package postgres

import (
	"context"
	"log/slog"
	"time"
)

// OpenFunc is the type of Config.Open.
type OpenFunc func(Config, context.Context, *slog.Logger) (*Store, error)

// OpenSmall opens with limits that a test reaches.
func OpenSmall(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	l := defaultLimits()
	l.recentRows, l.recentBytes, l.locked = 4, 2000, 0
	return open(ctx, c, log, l)
}

// OpenHasty opens with short limits on what the database takes.
func OpenHasty(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	l := defaultLimits()
	l.call, l.resolve = 2*time.Second, time.Second
	return open(ctx, c, log, l)
}
