// Package monitor is what a process shows to those who watch over it, by HTTP:
// whether it lives and is ready, and its metrics. What is measured and what
// makes a process ready is decided by its role.
//
// What must always hold: whoever can reach a listener learns nothing secret and
// costs little, whatever it sends and however slowly (R97); nothing is computed
// unless somebody asks.
package monitor

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// Limits of a listener (R97).
const (
	maxConnections = 64 // those beyond are closed
	headerLimit    = 5 * time.Second
	readLimit      = 10 * time.Second
	answerLimit    = 5 * time.Second
	writeLimit     = 30 * time.Second
	idleLimit      = 30 * time.Second
	drainLimit     = 2 * time.Second
	maxHeader      = 8 << 10 // bytes
)

// Serve opens a listener and answers at it until stop is called, whatever ctx is
// at. key names the part of the configuration that asked for it. A listener that
// breaks later does not take the process down.
func Serve(ctx context.Context, key, address string, handler http.Handler, log *slog.Logger) (stop func(), err error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fault.New(fault.Precondition, "listen_failed", "%s: cannot listen on %s: %v", key, address, err).
			Fix("stop what listens there, or choose another address or port")
	}
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: headerLimit, ReadTimeout: readLimit, WriteTimeout: writeLimit, IdleTimeout: idleLimit, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0), // strangers decide what would be in it (R104)
	}
	var ended sync.WaitGroup
	ended.Go(func() {
		if err := server.Serve(&bounded{Listener: l, room: make(chan struct{}, maxConnections)}); !errors.Is(err, http.ErrServerClosed) {
			log.ErrorContext(ctx, "listener ended", "kind", key, "err", err)
		}
	})
	log.InfoContext(ctx, "listener ready", "kind", key, "peer", l.Addr().String())
	return func() {
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
		defer cancel()
		if server.Shutdown(drain) != nil {
			server.Close()
		}
		ended.Wait()
	}, nil
}

// bounded is a listener with room for so many connections.
type bounded struct {
	net.Listener
	room chan struct{}
}

// Accept implements net.Listener.
func (b *bounded) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case b.room <- struct{}{}:
			return &held{Conn: c, leave: sync.OnceFunc(func() { <-b.room })}, nil
		default:
			c.Close()
		}
	}
}

// held is a connection that takes room.
type held struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (h *held) Close() error {
	h.leave()
	return h.Conn.Close()
}
