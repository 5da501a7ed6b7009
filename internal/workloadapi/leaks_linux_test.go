package workloadapi_test

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/workloadapi"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// R50, RG73: whatever clients do, and whatever comes of it, goroutines,
// descriptors, counters and the heap return to where they were.
func TestNothingIsLeftBehind(t *testing.T) {
	const rounds = 5 // and one before, to warm up
	for _, way := range slices.Sorted(maps.Keys(ways)) {
		t.Run(way, func(t *testing.T) {
			r := newRig(t, func(c *workloadapi.Config) {
				c.Limits = workloadapi.Limits{ConnectionsPerUser: 10, CallsPerUser: 20}
				if way == "half a request" || way == "not reading" {
					c.Hurry(500*time.Millisecond, 500*time.Millisecond, time.Hour)
				}
			})
			r.grant("a", "/a")
			once := func() {
				conn, err := grpc.NewClient("unix:"+r.path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
					grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(16<<20)))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				ctx, cancel := context.WithTimeout(t.Context(), deadline)
				defer cancel()
				ways[way](t, r, header(ctx, "true"), conn)
				r.facts.set(nil, "unix:uid:1")
			}
			level := func() (goroutines, fds int) {
				once()
				until(t, func() bool {
					s := r.api.Stats()
					return s.Connections == 0 && s.Calls == 0 && r.mirror.Stats().Subscribers == 0
				})
				return runtime.NumGoroutine(), countFDs(t)
			}
			goroutines, fds := level()
			before := heap()
			for range rounds {
				level()
			}
			until(t, func() bool { return runtime.NumGoroutine() <= goroutines && countFDs(t) <= fds })
			const most = 1 << 20 // what the runtime itself moves by; a message lost each time would be seen
			until(t, func() bool { return heap() < before+most })
		})
	}
}

// heap is what is held once all that can be freed is.
func heap() uint64 {
	runtime.GC()
	runtime.GC() // what pools held
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// ways are what a client can do, for each RPC and each way to fail.
var ways = map[string]func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn){
	"each RPC, answered or refused for its argument": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		for name, call := range calls(conn) {
			if err := call(ctx); err != nil && !strings.Contains(name, "WIT") && name != "ValidateJWTSVID" {
				t.Errorf("%s: %v", name, err)
			}
		}
	},
	"each RPC, no security header": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		each(t, metadata.NewOutgoingContext(ctx, nil), conn, codes.InvalidArgument)
	},
	"each RPC, no identity": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		r.facts.set(nil)
		each(t, ctx, conn, codes.PermissionDenied, codes.InvalidArgument)
	},
	"each RPC, attestors fail": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		r.facts.set(errors.New("broken"))
		each(t, ctx, conn, codes.Unavailable, codes.InvalidArgument)
	},
	"each RPC, cancelled before it is sent": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		ctx, cancel := context.WithCancel(ctx)
		cancel()
		each(t, ctx, conn, codes.Canceled)
	},
	"each RPC, cancelled at any time": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		for i := range 10 {
			for _, call := range calls(conn) {
				ctx, cancel := context.WithTimeout(ctx, time.Duration(i)*100*time.Microsecond)
				call(ctx)
				cancel()
			}
		}
	},
	"panics": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		r.facts.mu.Lock()
		r.facts.panics = true
		r.facts.mu.Unlock()
		each(t, ctx, conn, codes.Unavailable, codes.InvalidArgument)
		r.facts.mu.Lock()
		r.facts.panics = false
		r.facts.mu.Unlock()
	},
	"bad arguments": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		api := workload.NewSpiffeWorkloadAPIClient(conn)
		for _, req := range []*workload.JWTSVIDRequest{{}, {Audience: []string{""}}, {Audience: []string{"a"}, SpiffeId: "x"}, {Audience: []string{"a"}, SpiffeId: "spiffe://example.org/x"}} {
			if _, err := api.FetchJWTSVID(ctx, req); err == nil {
				t.Errorf("%v was answered", req)
			}
		}
		token, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "b", Svid: token.GetSvids()[0].GetSvid()}); err == nil {
			t.Error("a token for another audience is valid")
		}
	},
	"limit of calls": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		api := workload.NewSpiffeWorkloadAPIClient(conn)
		for range 20 {
			s, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		each(t, ctx, conn, codes.Unavailable)
	},
	"limit of connections": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		for range 15 {
			c, err := net.Dial("unix", r.path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
		until(t, func() bool { return r.api.Stats().Connections == 10 })
	},
	"headers and messages that are too large": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		api := workload.NewSpiffeWorkloadAPIClient(conn)
		if _, err := api.FetchJWTSVID(metadata.AppendToOutgoingContext(ctx, "x", strings.Repeat("y", 1<<18)), &workload.JWTSVIDRequest{Audience: []string{"a"}}); err == nil {
			t.Error("a large header was accepted")
		}
		if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{strings.Repeat("a", 2<<20)}}); err == nil {
			t.Error("a large message was accepted")
		}
	},
	"no HTTP/2, or its beginning": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) { // W2, W3
		for _, text := range []string{"", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"} {
			c, err := net.Dial("unix", r.path)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, text)
			c.Close()
		}
	},
	"half a request": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) {
		for _, method := range []string{"FetchX509SVID", "FetchJWTSVID"} {
			c := r.raw(1 << 16)
			if err := c.begin(method); err != nil {
				t.Fatal(err)
			}
			c.WriteData(1, false, make([]byte, 3)) // the server may have lost its patience by now
			defer c.Close()
			defer closed(t, c)
		}
	},
	"not reading": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) { // W8
		for _, method := range []string{"FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"} {
			c := r.raw(0)
			if err := c.call(method); err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			defer closed(t, c)
		}
	},
	"streams reset as soon as they are begun": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) { // W7
		c := r.raw(1 << 16)
		for range 500 {
			if c.call("FetchX509SVID") != nil || c.WriteRSTStream(c.next-2, 8) != nil {
				break
			}
		}
		c.Close()
	},
	"a flood of bytes": func(t *testing.T, r *rig, ctx context.Context, conn *grpc.ClientConn) { // R49
		c := r.raw(1 << 16)
		if err := c.begin("FetchX509SVID"); err != nil {
			t.Fatal(err)
		}
		for range 1 << 8 { // what is past the window ends the connection
			if c.WriteData(1, false, make([]byte, 1<<14)) != nil {
				break
			}
		}
		c.Close()
	},
}

// each makes each call of the API and wants one of some codes.
func each(t *testing.T, ctx context.Context, conn *grpc.ClientConn, want ...codes.Code) {
	t.Helper()
	for name, call := range calls(conn) {
		if strings.Contains(name, "WIT") {
			want := append(want, codes.Unimplemented)
			if err := call(ctx); !slices.Contains(want, status.Code(err)) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err := call(ctx); !slices.Contains(want, status.Code(err)) {
			t.Errorf("%s: %v, want one of %v", name, err, want)
		}
	}
}
