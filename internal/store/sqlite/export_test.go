package sqlite

import (
	"context"
	"log/slog"
)

// OpenFunc is the type of Config.Open.
type OpenFunc func(Config, context.Context, *slog.Logger) (*Store, error)

// OpenSmall opens with limits that a test reaches.
func OpenSmall(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	return open(ctx, c.Dir, log, limits{recentRows: 4, recentBytes: 2000, fold: 3000, foldChunk: 5, foldBytes: 4000, checkpoint: 20000})
}

// OpenCheckpointing opens with a small limit for the WAL alone.
func OpenCheckpointing(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	l := defaultLimits()
	l.checkpoint = 64 << 10
	return open(ctx, c.Dir, log, l)
}
