package upkeep

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/store"
)

// growing is a log that gets one batch a second.
type growing struct {
	store.Store
	born   time.Time
	begin  uint64
	broken bool
	rounds int
}

func (g *growing) at(t time.Time) uint64 { return uint64(t.Sub(g.born) / time.Second) }

func (g *growing) Compactable(_ context.Context, keep uint64, before time.Time) (uint64, error) {
	if g.rounds++; g.broken {
		return 0, errors.New("away")
	}
	end := g.at(time.Now())
	if end < keep || !before.After(g.born) {
		return 0, nil
	}
	return min(end-keep, g.at(before)), nil
}

func (g *growing) Stats(context.Context) (store.Stats, error) {
	return store.Stats{Begin: store.Position{Revision: g.begin}, End: store.Position{Revision: g.at(time.Now())}}, nil
}

func (g *growing) Compact(_ context.Context, before uint64) error {
	if before <= g.begin {
		return errors.New("nothing to do")
	}
	g.begin = before
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
		if g.begin != 0 || g.rounds < 8 || g.rounds > 35 {
			t.Errorf("compacted up to %d in %d rounds, when nothing was to be", g.begin, g.rounds)
		}
		for hour := range 48 {
			g.broken = hour == 20
			time.Sleep(time.Hour)
			synctest.Wait()
			length := g.at(time.Now()) - g.begin
			if most := uint64(KeepBatches + 3*every/2/time.Second); length < KeepBatches || length > most && !g.broken {
				t.Fatalf("hour %d: the log holds %d batches, want %d to %d", hour, length, KeepBatches, most)
			}
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
