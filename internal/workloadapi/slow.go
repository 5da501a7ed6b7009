package workloadapi

import (
	"sync"
	"time"
)

// backlog is what was handed to the library for a connection's streams and has
// not left yet. The library takes messages of a stream that nobody reads without
// a word, so only the bytes that leave show whether somebody does (W8).
type backlog struct {
	patience time.Duration
	stalled  func() // nothing has left for that long

	mu      sync.Mutex // guards everything below
	waiting int        // bytes in the DATA frames that are due
	timer   *time.Timer
	frames  frames
}

// add counts a message of n bytes.
func (b *backlog) add(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiting == 0 {
		if b.timer == nil {
			b.timer = time.AfterFunc(b.patience, b.stalled)
		} else {
			b.timer.Reset(b.patience)
		}
	}
	b.waiting += messagePrefix + n
}

// wrote takes away what has left.
func (b *backlog) wrote(p []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.frames.data(p)
	if n == 0 || b.waiting == 0 {
		return
	}
	if b.waiting -= min(n, b.waiting); b.waiting == 0 {
		b.timer.Stop()
		return
	}
	b.timer.Reset(b.patience)
}

// forget is for when a stream has ended: what was due on it may never leave. It
// errs on the side of the reader.
func (b *backlog) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiting = 0; b.timer != nil {
		b.timer.Stop()
	}
}

// messagePrefix is what gRPC puts before each message.
const messagePrefix = 5

// frames reads a stream of HTTP/2 frames as far as to know which bytes are data
// (RFC 9113, section 4.1).
type frames struct {
	header [9]byte
	have   int // bytes of header
	left   int // bytes of the payload
}

// data returns how many of the next bytes are in DATA frames.
func (f *frames) data(p []byte) (n int) {
	for len(p) > 0 {
		if f.left == 0 {
			took := copy(f.header[f.have:], p)
			p = p[took:]
			if f.have += took; f.have < len(f.header) {
				return n
			}
			f.have = 0
			f.left = int(f.header[0])<<16 | int(f.header[1])<<8 | int(f.header[2])
			continue
		}
		took := min(f.left, len(p))
		if f.header[3] == 0 {
			n += took
		}
		f.left -= took
		p = p[took:]
	}
	return n
}
