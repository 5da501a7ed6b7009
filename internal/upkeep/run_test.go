package upkeep

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/store"
)

// growing is a log that gets one batch a second.
type growing struct {
	store.Store
	born   time.Time
	begin  atomic.Uint64
	broken atomic.Bool
	rounds atomic.Int64
}

func (g *growing) at(t time.Time) uint64 { return uint64(t.Sub(g.born) / time.Second) }

func (g *growing) Compactable(_ context.Context, keep uint64, before time.Time) (uint64, error) {
	if g.rounds.Add(1); g.broken.Load() {
		return 0, errors.New("away")
	}
	end := g.at(time.Now())
	if end < keep || !before.After(g.born) {
		return 0, nil
	}
	return min(end-keep, g.at(before)), nil
}

func (g *growing) Stats(context.Context) (store.Stats, error) {
	return store.Stats{Begin: store.Position{Revision: g.begin.Load()}, End: store.Position{Revision: g.at(time.Now())}}, nil
}

func (g *growing) Compact(_ context.Context, before uint64) error {
	if before <= g.begin.Load() {
		return errors.New("nothing to do")
	}
	g.begin.Store(before)
	return nil
}

// The log is bounded: it holds the newest batches, those of the last hour, and
// what comes between two rounds.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &growing{born: time.Now()}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() {
			ended <- New(Config{Store: g, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}).Run(ctx)
		}()
		time.Sleep(KeepBatches * time.Second)
		synctest.Wait()
		if begin, rounds := g.begin.Load(), g.rounds.Load(); begin != 0 || rounds < 8 || rounds > 35 {
			t.Errorf("compacted up to %d in %d rounds, when nothing was to be", begin, rounds)
		}
		for hour := range 48 {
			g.broken.Store(hour == 20)
			time.Sleep(time.Hour)
			synctest.Wait()
			length := g.at(time.Now()) - g.begin.Load()
			if most := uint64(KeepBatches + 3*every/2/time.Second); length < KeepBatches || length > most && hour != 20 {
				t.Fatalf("hour %d: the log holds %d batches, want %d to %d", hour, length, KeepBatches, most)
			}
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
