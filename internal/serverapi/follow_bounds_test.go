package serverapi_test

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// over waits for the end of a stream.
func (f *follower) over() error {
	f.t.Helper()
	for {
		select {
		case <-f.heard:
		case err := <-f.ended:
			return err
		case <-time.After(deadline):
			f.t.Fatal("the stream is still open")
		}
	}
}

// An agent that opens streams without end keeps the newest: what it costs the
// server has a bound (R98).
func TestStreamsOfOneAgentAreBounded(t *testing.T) {
	r := newRig(t)
	a := r.agent()
	conn := r.connect(&a)
	const many = 12
	var open []*follower
	for range many {
		f := follow(t, conn, nil)
		f.sync()
		open = append(open, f)
	}
	const kept = 4
	for _, f := range open[:many-kept] {
		wantCode(t, "an old stream", f.over(), codes.Unavailable, "reconnect")
	}
	r.create(entryUnder(a.id, "/web"))
	for i, f := range open[many-kept:] {
		if d := f.delta(); len(d.Bodies) == 0 {
			t.Errorf("stream %d hears nothing", i)
		}
	}
	until(t, "rows of ended streams are gone", func() bool { n, _ := r.api.Acknowledged(1); return n == kept })
}
