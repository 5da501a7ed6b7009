package server

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/publish"
)

// scriptedPlace fails as long as it is told to.
type scriptedPlace struct {
	fails   atomic.Pointer[fault.Error]
	panics  atomic.Bool
	tries   atomic.Int64
	content atomic.Uint64 // sequence number
}

func (*scriptedPlace) Name() string { return "place" }

func (p *scriptedPlace) Publish(_ context.Context, e publish.Edition) error {
	p.tries.Add(1)
	if p.panics.Load() {
		panic("a bug")
	}
	if f := p.fails.Load(); f != nil {
		return f
	}
	p.content.Store(e.Bundle.Sequence)
	return nil
}

const anyTries = -1

func TestPublisher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var held atomic.Pointer[bundle.Bundle]
		held.Store(&bundle.Bundle{Sequence: 1})
		var log bytes.Buffer
		results := map[string]int{}
		place := &scriptedPlace{}
		p := &publisher{place: place, log: slog.New(slog.NewTextHandler(&log, nil)), wake: make(chan struct{}, 1),
			count:   func(_, result string) { results[result]++ },
			edition: func() (publish.Edition, error) { return publish.Edition{Bundle: held.Load()}, nil }}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- p.run(ctx) }()
		expect := func(what string, sequence uint64, tries int64, state monitor.State) {
			t.Helper()
			synctest.Wait()
			if got := monitor.Examine(publisherCheck([]*publisher{p})).Status; place.content.Load() != sequence || tries != anyTries && place.tries.Load() != tries || got != state {
				t.Errorf("%s: the place has %d after %d tries, %s; want %d, %d, %s", what, place.content.Load(), place.tries.Load(), got, sequence, tries, state)
			}
		}
		expect("at the start", 1, 1, monitor.OK)
		tries := func(n int64) { // in the hour that has passed: a minute at most between two, half of it at least
			t.Helper()
			if n < 59 || n > 130 {
				t.Errorf("%d tries in an hour", n)
			}
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		tries(place.tries.Load())
		place.content.Store(0) // somebody empties it
		time.Sleep(publishLook)
		expect("after a look", 1, anyTries, monitor.OK)

		before := place.tries.Load()
		held.Store(&bundle.Bundle{Sequence: 2})
		p.changed()
		expect("after a change", 2, before+1, monitor.OK)

		place.fails.Store(fault.New(fault.Unavailable, "away", "it is away"))
		time.Sleep(time.Hour)
		expect("while it is away without a change", 2, anyTries, monitor.OK)
		if log.Len() > 0 {
			t.Errorf("the log has: %s", &log)
		}
		place.fails.Store(fault.New(fault.Precondition, "gone", "it is gone"))
		time.Sleep(publishLook)
		expect("when it is gone", 2, anyTries, monitor.Degraded)
		place.fails.Store(nil)
		time.Sleep(publishMost)
		expect("when it is there", 2, anyTries, monitor.OK)

		log.Reset()
		before = place.tries.Load()
		place.fails.Store(fault.New(fault.Unavailable, "away", "it is away"))
		held.Store(&bundle.Bundle{Sequence: 3})
		p.changed()
		expect("while it is away", 2, before+1, monitor.Degraded)
		time.Sleep(time.Hour)
		synctest.Wait()
		tries(place.tries.Load() - before)
		if n := strings.Count(log.String(), "bundle not published"); n != int(place.tries.Load()-before) {
			t.Errorf("%d lines in the log for %d failures", n, place.tries.Load()-before)
		}
		place.fails.Store(nil)
		held.Store(&bundle.Bundle{Sequence: 4})
		time.Sleep(publishMost)
		expect("when it is back", 4, anyTries, monitor.OK) // with what is new by then

		before = place.tries.Load()
		place.panics.Store(true) // R99: it costs that attempt alone
		p.changed()
		expect("when it panics", 4, before+1, monitor.Degraded)
		place.panics.Store(false)
		time.Sleep(publishMost)
		expect("when it does not", 4, anyTries, monitor.OK)

		before = place.tries.Load()
		place.fails.Store(fault.New(fault.Unavailable, "busy", "it is busy").NotBefore(10 * time.Minute))
		p.changed()
		expect("when it is busy", 4, before+1, monitor.Degraded)
		time.Sleep(9 * time.Minute)
		expect("before it wants to be asked", 4, before+1, monitor.Degraded)
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if results["ok"] < 60 || results["panic"] != 1 || results["gone"] == 0 || results["away"] < 100 || results["busy"] != 1 {
			t.Errorf("counted %v", results)
		}
	})
}
