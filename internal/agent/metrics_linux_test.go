package agent_test

import (
	"context"
	"crypto/tls"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/agent"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/monitor/monitortest"
	"github.com/plastron/plastron/internal/server"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// Every metric that is documented is there once there was something to measure,
// says what happened, and names nobody (R22, R112).
func TestMetrics(t *testing.T) {
	t.Parallel()
	d := newDomain(t, disk)
	d.stop()
	port := 0
	ofServer, ofAgent := monitortest.New(), monitortest.New()
	d.log, d.cfg.Telemetry.Prometheus = ofServer, &monitor.Prometheus{Port: &port}
	d.start()

	cfg := d.agentConfig()
	cfg.Telemetry.Prometheus = &monitor.Prometheus{Port: &port}
	token := cfg.Agent.JoinToken
	a, err := agent.New(cfg, slog.New(ofAgent))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(run(t, a.Run))
	within(t, a.Ready())
	c := client(t, a)
	if _, err := c.FetchX509SVID(t.Context()); err == nil {
		t.Fatal("an SVID without an entry")
	}
	d.entry("/very-private")
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	eventually(t, "an SVID", func() bool { _, err := c.FetchX509SVID(ctx); return err == nil })
	jwt, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "somebody"})
	if err != nil {
		t.Fatal(err)
	}
	// Refused: another agent with the same token, and a caller that has no right.
	thief := cfg
	thief.Telemetry.Prometheus = nil
	thief.Agent.DataDir, thief.Agent.SocketPath = cfg.Agent.DataDir+"2", cfg.Agent.SocketPath+"2"
	second, err := agent.New(thief, logger(t, "thief"))
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(ctx); err == nil {
		t.Fatal("a token worked twice")
	}
	if _, err := agentv1.NewAgentClient(d.stranger()).ListAgents(ctx, &agentv1.ListAgentsRequest{}); err == nil {
		t.Fatal("a stranger may list agents")
	}

	// The metric of alarms has no series before there is one, a server alone with its
	// store has no lease, and one without a Notifier publishes nothing.
	for _, tt := range []struct {
		of      *monitortest.Listeners
		all     []monitor.Metric
		empty   []string
		samples []string
	}{
		{ofServer, server.Metrics(), []string{"plastron_server_alarms_total", "plastron_server_lease_seconds", "plastron_server_bundle_publications_total"}, []string{
			"plastron_server_entries 1", "plastron_server_nodes 1", `plastron_server_sync_agents{state="current"} 1`, `plastron_server_sync_agents{state="behind"} 0`,
			`plastron_server_attestations_total{attestor="join_token",result="ok"} 1`, `plastron_server_attestations_total{attestor="join_token",result="join_token_refused"} 1`,
			`plastron_server_svids_issued_total{kind="jwt"} 1`, `plastron_server_svids_issued_total{kind="agent"} 1`,
			`plastron_server_rpc_total{code="OK",method="/spire.api.server.agent.v1.Agent/AttestAgent"} 1`,
			`plastron_server_refusals_total{reason="identity_required"} 1`, `plastron_server_rpc_errors_total{reason="identity_required"} 1`,
			`plastron_server_authority_keys{kind="x509",state="active"} 1`, `plastron_server_health_check{check="x509_authority"} 0`,
			`plastron_server_panics_total 0`, `plastron_server_audit_lost_total 0`,
		}},
		{ofAgent, agent.Metrics(), nil, []string{
			"plastron_agent_grants 1", `plastron_agent_svids{kind="x509"} 1`, `plastron_agent_svids{kind="jwt"} 1`, "plastron_agent_sync_following 1",
			`plastron_agent_identity_jobs_total{job="attest",result="ok"} 1`, `plastron_agent_workload_rpc_total{code="OK",method="/SpiffeWorkloadAPI/FetchJWTSVID"} 1`,
			`plastron_agent_health_check{check="attested"} 0`, `plastron_agent_panics_total 0`,
			`plastron_agent_workload_over_limit_total{limit="rate"} 0`, `plastron_agent_workload_slow_readers_total 0`,
		}},
	} {
		var text string
		for _, want := range tt.samples {
			eventually(t, want, func() bool {
				_, text = tt.of.Get(t, "telemetry.Prometheus", "/metrics")
				return slices.Contains(strings.Split(text, "\n"), want)
			})
		}
		for _, m := range tt.all {
			line := "\n# TYPE " + m.Name + " " + m.Kind + "\n"
			if strings.Contains(text, line) || slices.Contains(tt.empty, m.Name) {
				continue
			}
			eventually(t, m.Kind+" "+m.Name+", which is documented", func() bool {
				_, text = tt.of.Get(t, "telemetry.Prometheus", "/metrics")
				return strings.Contains(text, line)
			})
		}
		known := func(name string) bool {
			return slices.ContainsFunc(tt.all, func(m monitor.Metric) bool { return m.Name == name })
		}
		for line := range strings.Lines(text) {
			if name, ok := strings.CutPrefix(line, "# TYPE plastron_"); ok && !known("plastron_"+strings.Fields(name)[0]) {
				t.Errorf("%s is not documented", name)
			}
		}
		for _, secret := range []string{token, jwt.Marshal(), "spiffe://", "very-private", "somebody", "example.org", "127.0.0.1"} {
			if strings.Contains(text, secret) {
				t.Errorf("the metrics name %s", secret)
			}
		}
	}
}

// eventually asks again until f says yes.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	late := time.Now().Add(wait)
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for !f() {
		if time.Now().After(late) {
			t.Fatalf("%s: not in time", what)
		}
		<-look.C
	}
}

// stranger connects to the server without a certificate.
func (d *domain) stranger() *grpc.ClientConn {
	d.t.Helper()
	conn, err := grpc.NewClient(d.addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	return conn
}
