// Package monitortest finds the HTTP listeners of a process under test by what
// the process logs of them, and asks them.
package monitortest

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"time"
)

const deadline = 60 * time.Second

// Listeners is a log handler that remembers where listeners are. Other events
// are dropped.
type Listeners struct {
	mu    sync.Mutex // guards what follows
	peers map[string]string
	more  chan struct{} // closed and replaced with each
}

// New returns a handler that has seen none.
func New() *Listeners {
	return &Listeners{peers: map[string]string{}, more: make(chan struct{})}
}

// Enabled implements slog.Handler.
func (l *Listeners) Enabled(context.Context, slog.Level) bool { return true }

// WithAttrs implements slog.Handler.
func (l *Listeners) WithAttrs([]slog.Attr) slog.Handler { return l }

// WithGroup implements slog.Handler.
func (l *Listeners) WithGroup(string) slog.Handler { return l }

// Handle implements slog.Handler.
func (l *Listeners) Handle(_ context.Context, r slog.Record) error {
	if r.Message != "listener ready" {
		return nil
	}
	attrs := map[string]string{}
	r.Attrs(func(a slog.Attr) bool { attrs[a.Key] = a.Value.String(); return true })
	l.mu.Lock()
	defer l.mu.Unlock()
	l.peers[attrs["kind"]] = attrs["peer"]
	close(l.more)
	l.more = make(chan struct{})
	return nil
}

// Address waits for a listener and returns where it is.
func (l *Listeners) Address(t testing.TB, kind string) string {
	t.Helper()
	late := time.After(deadline)
	for {
		l.mu.Lock()
		peer, more := l.peers[kind], l.more
		l.mu.Unlock()
		if peer != "" {
			return peer
		}
		select {
		case <-more:
		case <-late:
			t.Fatalf("there is no listener %s", kind)
		}
	}
}

// Get asks a listener.
func (l *Listeners) Get(t testing.TB, kind, path string) (status int, body string) {
	t.Helper()
	client := http.Client{Timeout: deadline, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + l.Address(t, kind) + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}
