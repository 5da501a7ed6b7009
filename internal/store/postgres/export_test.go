package postgres

import (
	"context"
	"log/slog"
	"time"

	"github.com/plastron/plastron/internal/store"
)

// CreationLock is the advisory lock of those who create the tables.
const CreationLock = creationLock

// OpenFunc is the type of Config.Open.
type OpenFunc func(Config, context.Context, *slog.Logger) (*Store, error)

// patient are the default limits for a machine that is busy with other tests.
func patient() limits {
	l := defaultLimits()
	l.call, l.commit, l.resolve, l.statement, l.idle = 80*time.Second, time.Minute, time.Minute, time.Minute, time.Minute
	return l
}

// OpenPatient opens with these.
func OpenPatient(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	return open(ctx, c, log, patient())
}

// OpenAtOnce opens with them, or gives up.
func OpenAtOnce(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	l := patient()
	l.opening = 0
	return open(ctx, c, log, l)
}

// OpenSmall opens with limits that a test reaches.
func OpenSmall(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	l := patient()
	l.recentRows, l.recentBytes, l.locked = 4, 2000, 0
	return open(ctx, c, log, l)
}

// OpenHasty opens with short limits on what others keep it waiting for.
func OpenHasty(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	l := patient()
	l.lock, l.commit, l.resolve = time.Second, 3*time.Second, time.Second
	return open(ctx, c, log, l)
}

// OpenForSilence opens with a short limit on silence, too.
func OpenForSilence(c Config, ctx context.Context, log *slog.Logger) (*Store, error) {
	l := patient()
	l.call, l.resolve = 4*time.Second, time.Second
	return open(ctx, c, log, l)
}

// Network parses a connection string and judges the network before it.
func Network(text, host string, secured bool) store.Remark {
	p, err := Config{ConnectionString: text}.parse("")
	if err != nil {
		return store.Remark{Found: err.Error(), Fix: err.Error()}
	}
	return network(p, host, secured)
}

// Connections judges how many are free.
func Connections(free int64, pooled bool) store.Remark { return connections(free, pooled) }

// Clock judges the database's clock.
func Clock(ahead time.Duration) store.Remark { return clock(ahead) }
