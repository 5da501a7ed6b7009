package serverapi

import (
	"testing"
	"testing/synctest"
	"time"
)

// A stream that ends while a message is under way takes its connection, and the other
// streams on it, with it only if the message is not read (R30).
func TestEndOfAStream(t *testing.T) {
	for name, c := range map[string]struct {
		read   time.Duration // when the message was read; 0: never
		closed bool
	}{
		"read":     {time.Millisecond, false},
		"not read": {0, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				closed := false
				f := &follow{stuck: true, sent: make(chan error, 1)}
				f.caller.link = &link{close: func() error { closed = true; return nil }}
				if c.read > 0 {
					time.AfterFunc(c.read, func() { f.sent <- nil })
				}
				begin := time.Now()
				if f.end(errReconnect()) == nil {
					t.Error("there is no reason")
				}
				if took := time.Since(begin); closed != c.closed || took > lastWords {
					t.Errorf("closed %t after %s, want %t", closed, took, c.closed)
				}
			})
		})
	}
}
