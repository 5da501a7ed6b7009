package agent_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/monitor/monitortest"
	"github.com/plastron/plastron/internal/server"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// becomes asks for the agent's health until it is as wanted: the status of all,
// and of each check that is not well its reason.
func becomes(t *testing.T, l *monitortest.Listeners, want monitor.State, reasons map[string]string) {
	t.Helper()
	late := time.Now().Add(wait)
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for ; ; <-look.C {
		status, body := l.Get(t, "health_checks", "/ready")
		var got monitor.Report
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatalf("%s: %v", body, err)
		}
		same := got.Status == want && (status == 200) == (want != monitor.Failing) && len(got.Checks) == 4
		for check, result := range got.Checks {
			same = same && result.Reason == reasons[check]
		}
		if same {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("%d %s, want %s %v", status, body, want, reasons)
		}
	}
}

// The agent is ready when it is attested, in step and can be reached, and says
// which of it is missing (R105).
func TestHealthListener(t *testing.T) {
	t.Parallel()
	d := newDomain(t, disk)
	cfg := d.agentConfig()
	cfg.HealthChecks.ListenerEnabled, cfg.HealthChecks.BindPort = true, 0
	d.stop() // the server is away when the agent starts

	listeners := monitortest.New()
	a, err := agent.New(cfg, slog.New(listeners))
	if err != nil {
		t.Fatal(err)
	}
	stop := run(t, a.Run)
	t.Cleanup(stop)
	away := map[string]string{"attested": "agent_not_attested", "in_step": "not_synced", "server": "server_away"}
	becomes(t, listeners, monitor.Failing, away)
	if got := grpcHealth(t, cfg.Agent.SocketPath); got != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("gRPC health: %v", got)
	}
	if status, body := listeners.Get(t, "health_checks", "/live"); status != 200 || !strings.HasPrefix(body, `{"status":"ok"`) {
		t.Errorf("/live of an agent that waits for its server: %d %s", status, body)
	}

	d.start()
	within(t, a.Ready())
	becomes(t, listeners, monitor.OK, nil)
	if got := grpcHealth(t, cfg.Agent.SocketPath); got != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("gRPC health: %v", got)
	}

	d.stop() // what is granted is still handed out (R56)
	becomes(t, listeners, monitor.Degraded, map[string]string{"server": "server_away"})
	if got := grpcHealth(t, cfg.Agent.SocketPath); got != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("gRPC health while the server is away: %v", got)
	}
	d.start()
	becomes(t, listeners, monitor.OK, nil)

	if err := os.Remove(cfg.Agent.SocketPath); err != nil {
		t.Fatal(err)
	}
	becomes(t, listeners, monitor.Failing, map[string]string{"workload_api": "socket_unreachable"})
}

// An agent whose own SVID has ended while the server was away is not ready.
func TestHealthOfAnExpiredAgent(t *testing.T) {
	t.Parallel()
	// Long enough for the agent to renew it in time, however busy the machine is.
	d := newDomain(t, func(c *server.Config) { c.Server.AgentTTL = config.Duration(15 * time.Second) })
	cfg := d.agentConfig()
	cfg.HealthChecks.ListenerEnabled, cfg.HealthChecks.BindPort = true, 0
	listeners := monitortest.New()
	a, err := agent.New(cfg, slog.New(listeners))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	within(t, a.Ready())
	becomes(t, listeners, monitor.OK, nil)
	d.stop()
	becomes(t, listeners, monitor.Failing, map[string]string{"attested": "agent_expired", "server": "server_away"})
	cancel()
	<-ended // it may have given up by itself
}

func grpcHealth(t *testing.T, path string) grpc_health_v1.HealthCheckResponse_ServingStatus {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	resp, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetStatus()
}
