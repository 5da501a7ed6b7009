package agentapi_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/agentapi"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/localsocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// service answers, panics, or fails in words that nobody may read.
type service struct {
	grpc_health_v1.UnimplementedHealthServer
}

func (service) Check(ctx context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	switch req.GetService() {
	case "panic":
		panic("at the disco")
	case "refuse":
		return nil, fault.New(fault.NotFound, "nothing_there", "there is nothing").Fix("look elsewhere")
	case "internal":
		return nil, os.ErrClosed
	}
	if _, ok := ctx.Deadline(); !ok {
		return nil, fault.New(fault.Precondition, "no_deadline", "the call may last for ever")
	}
	return &grpc_health_v1.HealthCheckResponse{}, nil
}

// serve runs a server and returns a client of it.
func serve(t *testing.T) (*agentapi.Server, grpc_health_v1.HealthClient, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "pl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "private", "admin.sock")
	s, err := agentapi.Open(agentapi.Config{SocketPath: path, Log: slog.New(slog.DiscardHandler),
		Services: []func(grpc.ServiceRegistrar){func(r grpc.ServiceRegistrar) { grpc_health_v1.RegisterHealthServer(r, service{}) }}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != context.Canceled {
			t.Errorf("Run() = %v", err)
		}
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("the socket after Run: %v", err)
		}
	})
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return s, grpc_health_v1.NewHealthClient(conn), path
}

func TestCalls(t *testing.T) {
	s, client, path := serve(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, c := range []struct {
		ask  string
		code codes.Code
		text string
	}{
		{"", codes.OK, ""},
		{"refuse", codes.NotFound, "there is nothing; look elsewhere"},
		{"internal", codes.Internal, "internal error"}, // and not its text
		{"panic", codes.Internal, "internal error"},    // R99
		{strings.Repeat("x", 1<<20), codes.ResourceExhausted, "larger than max"},
		{"", codes.OK, ""},
	} {
		_, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: c.ask})
		if status.Code(err) != c.code || !strings.Contains(status.Convert(err).Message(), c.text) || strings.Contains(status.Convert(err).Message(), "closed") {
			t.Errorf("%.10q: %v, want %v %q", c.ask, err, c.code, c.text)
		}
	}
	if n := s.Panics(); n != 1 {
		t.Errorf("%d panics, want 1", n)
	}
	for at, mode := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if info, err := os.Stat(at); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, %v, want %v", at, info.Mode(), err, mode)
		}
	}
}

// Not even an operator's own program may take all the room (R97).
func TestConnectionsAreBounded(t *testing.T) {
	_, client, path := serve(t)
	var held []net.Conn
	for range 200 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	// The server has counted them all once it has closed those it has no room for.
	closed := 0
	for _, c := range held {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		b := make([]byte, 1<<10)
		if n, _ := c.Read(b); n == 0 { // those within get the settings of HTTP/2
			closed++
		}
	}
	if closed != 100 {
		t.Errorf("%d of 200 connections were closed, want 100", closed)
	}
	for _, c := range held {
		c.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Errorf("after they have gone: %v", err)
	}
}

func TestAdmitted(t *testing.T) {
	me := uint32(os.Geteuid())
	for _, c := range []struct {
		peer localsocket.Peer
		want bool
	}{
		{localsocket.Peer{Known: true, UID: 0}, true},
		{localsocket.Peer{Known: true, UID: me}, true},
		{localsocket.Peer{Known: true, UID: me + 12345}, false},
		{localsocket.Peer{}, !localsocket.Tells},
	} {
		if got := agentapi.Admitted(c.peer); got != c.want {
			t.Errorf("admitted(%+v) = %v, want %v", c.peer, got, c.want)
		}
	}
}

func TestCheckPath(t *testing.T) {
	const public = "/run/agent/public/api.sock"
	for path, ok := range map[string]bool{
		"/run/agent/private/admin.sock":     true,
		"/run/agent/admin.sock":             true,
		"/run/agent/public2/admin.sock":     true,
		"/run/agent/public/admin.sock":      false,
		"/run/agent/public/x/admin.sock":    false,
		"/run/agent/x/../public/admin.sock": false,
		"admin.sock":                        false,
		"/" + strings.Repeat("x", 107):      false,
	} {
		if err := agentapi.CheckPath(path, public); (err == nil) != ok {
			t.Errorf("%s: %v, want ok %v", path, err, ok)
		}
	}
}
