package workloadapi

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// However a stream of frames is cut into writes, its data is counted.
func TestFrames(t *testing.T) {
	for seed := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, 0))
		var stream bytes.Buffer
		framer := http2.NewFramer(&stream, nil)
		want := 0
		for range 20 {
			payload := make([]byte, random.IntN(20))
			switch random.IntN(3) {
			case 0:
				want += len(payload)
				framer.WriteData(1, false, payload)
			case 1:
				framer.WriteSettings()
			case 2:
				framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: payload})
			}
		}
		var f frames
		got := 0
		for stream.Len() > 0 {
			got += f.data(stream.Next(1 + random.IntN(30)))
		}
		if got != want {
			t.Errorf("seed %d: %d bytes of data, want %d", seed, got, want)
		}
	}
}

// A reader that takes something now and then is no slow reader; what is due on a
// stream that ended is not waited for.
func TestBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stalls := 0
		b := &backlog{patience: time.Second, stalled: func() { stalls++ }}
		data := func(n int) []byte { return append([]byte{0, 0, byte(n), 0, 0, 0, 0, 0, 1}, make([]byte, n)...) }
		wait := func(d time.Duration, want int) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if stalls != want {
				t.Errorf("it stalled %d times, want %d", stalls, want)
			}
		}
		b.add(95)
		for range 9 {
			wait(900*time.Millisecond, 0)
			b.wrote(data(10))
		}
		b.wrote(data(10)) // all of it
		wait(time.Hour, 0)
		b.add(95)
		b.wrote(make([]byte, 900)) // settings
		b.forget()
		wait(time.Hour, 0)
		b.add(95)
		wait(time.Second, 1)
	})
}
