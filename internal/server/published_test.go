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
			if got := monitor.Examine(publisherCheck([]*publisher{p})).Status; place.content.Load() != sequence || place.tries.Load() != tries || got != state {
				t.Errorf("%s: the place has %d after %d tries, %s; want %d, %d, %s", what, place.content.Load(), place.tries.Load(), got, sequence, tries, state)
			}
		}
		expect("at the start", 1, 1, monitor.OK)
		time.Sleep(1000 * time.Hour)
		expect("without a change", 1, 1, monitor.OK) // nothing is polled

		held.Store(&bundle.Bundle{Sequence: 2})
		p.changed()
		expect("after a change", 2, 2, monitor.OK)

		place.fails.Store(fault.New(fault.Unavailable, "away", "it is away"))
		held.Store(&bundle.Bundle{Sequence: 3})
		p.changed()
		expect("while it is away", 2, 3, monitor.Degraded)
		time.Sleep(time.Hour)
		synctest.Wait()
		if tries := place.tries.Load(); tries < 60 || tries > 130 { // a minute at most between two, half of it at least
			t.Errorf("%d tries in an hour", tries)
		}
		if n := strings.Count(log.String(), "bundle not published"); n != int(place.tries.Load())-2 {
			t.Errorf("%d lines in the log for %d failures", n, place.tries.Load()-2)
		}
		place.fails.Store(nil)
		held.Store(&bundle.Bundle{Sequence: 4})
		before := place.tries.Load()
		time.Sleep(publishMost)
		expect("when it is back", 4, before+1, monitor.OK) // with what is new by then

		place.panics.Store(true) // R99: it costs that attempt alone
		p.changed()
		expect("when it panics", 4, before+2, monitor.Degraded)
		place.panics.Store(false)
		time.Sleep(publishMost)
		expect("when it does not", 4, before+3, monitor.OK)

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
		if results["ok"] != 4 || results["panic"] != 1 || results["away"] == 0 || results["busy"] != 1 {
			t.Errorf("counted %v", results)
		}
	})
}
