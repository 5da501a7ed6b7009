package monitor_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/monitor/monitortest"
	"github.com/plastron/plastron/test/parts"
)

const deadline = 60 * time.Second

func fails(reason string) func() error {
	return func() error {
		return fault.New(fault.Unavailable, reason, "it is away").Fix("bring it back").Because(errors.New("s3cret"))
	}
}

func works() error { return nil }

// handler answers with the same checks at both paths.
func handler(checks ...monitor.Check) http.Handler {
	all := func() []monitor.Check { return checks }
	return monitor.HealthHandler(monitor.DefaultHealthChecks(), func() []monitor.Check { return nil }, all)
}

func TestReport(t *testing.T) { // R105
	ok := monitor.Check{Name: "a", Run: works}
	degraded := monitor.Check{Name: "b", Run: fails("slow"), Degrades: true}
	failing := monitor.Check{Name: "c", Run: fails("away")}
	for name, tt := range map[string]struct {
		checks []monitor.Check
		status int
		want   monitor.State
	}{
		"no checks":                  {nil, 200, monitor.OK},
		"all well":                   {[]monitor.Check{ok}, 200, monitor.OK},
		"one degrades":               {[]monitor.Check{ok, degraded}, 200, monitor.Degraded},
		"degraded is not forgotten":  {[]monitor.Check{degraded, ok}, 200, monitor.Degraded},
		"one fails":                  {[]monitor.Check{ok, failing}, 503, monitor.Failing},
		"failing is worse":           {[]monitor.Check{failing, degraded}, 503, monitor.Failing},
		"failing is worse, the last": {[]monitor.Check{degraded, failing}, 503, monitor.Failing},
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			handler(tt.checks...).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/ready", nil))
			var got monitor.Report
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Fatalf("%s: %v", w.Body, err)
			}
			if w.Code != tt.status || got.Status != tt.want || len(got.Checks) != len(tt.checks) {
				t.Errorf("%d %s, want %d %s", w.Code, w.Body, tt.status, tt.want)
			}
			if (monitor.Ready(tt.checks) == nil) != (tt.status == 200) {
				t.Errorf("Ready() = %v, but the status is %d", monitor.Ready(tt.checks), tt.status)
			}
			if strings.Contains(w.Body.String(), "s3cret") { // R112
				t.Errorf("the cause is told: %s", w.Body)
			}
		})
	}
	want := monitor.Report{Status: monitor.Failing, Checks: map[string]monitor.Result{
		"c": {Status: monitor.Failing, Reason: "away", Message: "it is away", Fix: "bring it back"},
		"d": {Status: monitor.Failing, Reason: "internal", Message: "internal error; the log has the details"},
	}}
	bug := monitor.Check{Name: "d", Run: func() error { return errors.New("s3cret") }}
	if diff := cmp.Diff(want, monitor.Examine([]monitor.Check{failing, bug})); diff != "" {
		t.Errorf("Examine() (-want +got):\n%s", diff)
	}
}

func TestHealthRequests(t *testing.T) {
	h := handler(monitor.Check{Name: "c", Run: fails("away")})
	for _, tt := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/live", 200}, {"HEAD", "/live", 200}, {"GET", "/ready", 503}, {"HEAD", "/ready", 503}, {"GET", "/ready?verbose", 503},
		{"GET", "/", 404}, {"GET", "/ready/", 404}, {"GET", "/metrics", 404}, {"POST", "/ready", 405}, {"DELETE", "/live", 405},
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(tt.method, tt.path, nil))
		if w.Code != tt.want {
			t.Errorf("%s %s: %d, want %d", tt.method, tt.path, w.Code, tt.want)
		}
	}
}

func TestCheckThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck, begun := make(chan struct{}), new(atomic.Int64)
		h := handler(monitor.Check{Name: "c", Run: func() error { begun.Add(1); <-stuck; return nil }})
		for range 20 {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/ready", nil))
			var got monitor.Report
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != 503 || got.Checks["answer"].Reason != "hung" {
				t.Errorf("%d %s, %v", w.Code, w.Body, err)
			}
		}
		if n := begun.Load(); n > 8 { // R106
			t.Errorf("%d examinations hang", n)
		}
		close(stuck)
		synctest.Wait()
		w := httptest.NewRecorder()
		if h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/ready", nil)); w.Code != 200 {
			t.Errorf("when it hangs no more: %d %s", w.Code, w.Body)
		}
	})
}

func TestSocketCheck(t *testing.T) { // the file of a socket that is listened on is removed
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	check := monitor.Socket("socket", path)
	if err := check.Run(); err != nil {
		t.Errorf("an open socket: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := check.Run(); fault.ReasonOf(err) != "socket_unreachable" {
		t.Errorf("a socket without its file: %v", err)
	}
}

func serve(t *testing.T, h http.Handler) (address string, stop func()) {
	t.Helper()
	listeners := monitortest.New()
	stop, err := monitor.Serve(t.Context(), "test", "127.0.0.1:0", h, slog.New(listeners))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return listeners.Address(t, "test"), stop
}

func TestServe(t *testing.T) {
	port, err := parts.ReservePort() // so that nobody else listens there after stop
	if err != nil {
		t.Fatal(err)
	}
	defer port.Release()
	listeners := monitortest.New()
	stop, err := monitor.Serve(t.Context(), "test", fmt.Sprintf("127.0.0.1:%d", port.Number), handler(), slog.New(listeners))
	if err != nil {
		t.Fatal(err)
	}
	if status, body := listeners.Get(t, "test", "/ready"); status != 200 || body != `{"status":"ok","checks":{}}`+"\n" {
		t.Errorf("%d %q", status, body)
	}
	if _, err := monitor.Serve(t.Context(), "other", listeners.Address(t, "test"), handler(), slog.New(slog.DiscardHandler)); fault.ReasonOf(err) != "listen_failed" {
		t.Errorf("Serve() at an address in use = %v", err) // F14
	}
	stop()
	if c, err := net.Dial("tcp", listeners.Address(t, "test")); err == nil {
		c.Close()
		t.Error("it listens after stop")
	}
}

// Whoever connects and says nothing, or too much, is not waited for, and those
// beyond the room are closed (R97).
func TestRoom(t *testing.T) {
	at, _ := serve(t, handler())
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	dial := func() net.Conn {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		limit, _ := ctx.Deadline()
		c.SetDeadline(limit)
		return c
	}
	long := dial()
	fmt.Fprintf(long, "GET /ready HTTP/1.1\r\nHost: x\r\nX-Long: %s\r\n\r\n", strings.Repeat("a", 64<<10))
	if line, _ := bufio.NewReader(long).ReadString('\n'); !strings.Contains(line, " 431 ") {
		t.Errorf("a header of 64 KiB: %q, want 431", line)
	}
	long.Close()

	silent := make([]net.Conn, 200)
	for i := range silent {
		silent[i] = dial()
	}
	began := time.Now()
	for i, c := range silent {
		if _, err := io.ReadAll(c); err != nil && ctx.Err() != nil {
			t.Fatalf("connection %d is open after %v", i, time.Since(began))
		}
	}
	resp, err := http.Get("http://" + at + "/ready")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("after that: %s", resp.Status)
	}
}

func TestHealthChecksValidate(t *testing.T) {
	bad := monitor.HealthChecks{BindPort: 65536, LivePath: "live", ReadyPath: "live"}
	err := bad.Validate()
	for _, part := range []string{"health_checks.bind_address", "health_checks.bind_port", "health_checks.live_path", "health_checks.ready_path"} {
		if err == nil || !strings.Contains(err.Error(), part+": ") {
			t.Errorf("Validate() = %v, want %s in it", err, part)
		}
	}
	if err := monitor.DefaultHealthChecks().Validate(); err != nil {
		t.Errorf("the default: %v", err)
	}
}
