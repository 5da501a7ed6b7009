package agent_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/doctor"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func verdicts(found []doctor.Finding) map[string]doctor.Verdict {
	out := map[string]doctor.Verdict{}
	for _, f := range found {
		out[f.Check] = f.Verdict
	}
	return out
}

// writeRoots writes a root of a trust domain that nobody uses.
func writeRoots(t *testing.T, path, td string, end time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := svid.SelfSignedCA(spiffeid.RequireTrustDomainFromString(td), key, end.Add(-2*time.Hour), end)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Each thing that is broken shows in its own check, and in no other.
func TestExamine(t *testing.T) {
	d := newDomain(t)
	cfg := d.agentConfig()
	cfg.Plugins[0] = config.Plugin{Type: "KeyManager", Name: "disk"}
	base := filepath.Dir(cfg.Agent.DataDir)
	cfg.Agent.SocketPath = filepath.Join(base, "run", "public", "api.sock")
	admin := filepath.Join(base, "run", "private", "admin.sock")
	_, stop := d.agent(cfg)
	defer stop()
	conn, err := grpc.NewClient("unix:"+admin, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var running *statusv1.AgentStatus
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for late := time.After(wait); !running.GetFollowing().GetInStep(); {
		if running, err = statusv1.NewAgentClient(conn).Status(t.Context(), &statusv1.AgentStatusRequest{}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-late:
			t.Fatalf("it does not come in step: %v", running)
		case <-look.C:
		}
	}
	good := verdicts(agent.Examine(t.Context(), agent.Subject{Config: &cfg, Running: running}, time.Now()))
	want := map[string]doctor.Verdict{"configuration": "ok", "running": "ok", "data_dir": "ok", "keys": "ok", "disk": good["disk"], "workload_api_socket": "ok",
		"admin_socket": "ok", "identity": "ok", "bundle": "ok", "trust_domain": "ok", "server": "ok", "clock": "ok"}
	if diff := cmp.Diff(want, good); diff != "" {
		t.Fatalf("a healthy agent (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(good, verdicts(append(agent.Examine(t.Context(), agent.Subject{Running: running}, time.Now()), doctor.Say("configuration", doctor.OK, "")))); diff != "" {
		t.Errorf("without its configuration (-want +got):\n%s", diff)
	}
	mode := func(path string, broken os.FileMode) func(*testing.T, *agent.Subject) {
		return func(t *testing.T, _ *agent.Subject) {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, broken); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.Chmod(path, info.Mode().Perm()) })
		}
	}
	status := func(f func(*statusv1.AgentStatus)) func(*testing.T, *agent.Subject) {
		return func(_ *testing.T, s *agent.Subject) { f(s.Running) }
	}
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer nobody.Close() // accepts, and says nothing that TLS would
	go func() {
		for {
			c, err := nobody.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	roots := filepath.Join(base, "other.pem")
	writeRoots(t, roots, "other.org", time.Now().Add(time.Hour))
	for _, tc := range []struct {
		check    string
		verdict  doctor.Verdict
		breaking func(*testing.T, *agent.Subject)
	}{
		{"configuration", doctor.Fail, func(_ *testing.T, s *agent.Subject) { s.Config.Agent.JWTSVIDCacheMaxSize = -1 }},
		{"running", doctor.Warn, status(func(s *statusv1.AgentStatus) { s.Following.InStep = false })},
		{"data_dir", doctor.Fail, mode(cfg.Agent.DataDir, 0o777)},
		{"keys", doctor.Fail, mode(filepath.Join(cfg.Agent.DataDir, "keys.json"), 0o604)},
		{"workload_api_socket", doctor.Fail, mode(cfg.Agent.SocketPath, 0o600)},
		{"workload_api_socket", doctor.Fail, mode(filepath.Dir(cfg.Agent.SocketPath), 0o777)},
		{"admin_socket", doctor.Fail, mode(admin, 0o660)},
		{"identity", doctor.Fail, status(func(s *statusv1.AgentStatus) { s.ExpiresAt = time.Now().Add(-time.Second).Unix() })},
		{"identity", doctor.Warn, status(func(s *statusv1.AgentStatus) { s.IssuedAt -= 10 * 3600 })},
		{"trust_domain", doctor.Fail, func(_ *testing.T, s *agent.Subject) {
			s.Config.Agent.TrustBundlePath, s.Config.Agent.TrustBundleHash = roots, ""
		}},
		{"trust_domain", doctor.Fail, status(func(s *statusv1.AgentStatus) { s.TrustDomain = "other.org" })},
		{"server", doctor.Fail, func(_ *testing.T, s *agent.Subject) { s.Config.Agent.ServerPort = nobody.Addr().(*net.TCPAddr).Port }},
		{"server", doctor.Warn, func(_ *testing.T, s *agent.Subject) {
			s.Config.Agent.ServerAddresses = []string{nobody.Addr().String(), net.JoinHostPort(cfg.Agent.ServerAddress, strconv.Itoa(cfg.Agent.ServerPort))}
			s.Config.Agent.ServerAddress, s.Config.Agent.ServerPort = "", 0
		}},
		{"clock", doctor.Fail, status(func(s *statusv1.AgentStatus) { s.Following.ClockAheadMs = 60_000 })},
	} {
		t.Run(tc.check, func(t *testing.T) {
			changed := cfg
			s := agent.Subject{Config: &changed, Running: proto.CloneOf(running)}
			tc.breaking(t, &s)
			want := maps.Clone(good)
			want[tc.check] = tc.verdict
			found := agent.Examine(t.Context(), s, time.Now())
			if diff := cmp.Diff(want, verdicts(found)); diff != "" {
				t.Errorf("(-want +got):\n%s\n%v", diff, found)
			}
		})
	}

	// An agent that does not run is examined by what it has left.
	stop()
	stopped := func(c agent.Config, now time.Time) map[string]doctor.Verdict {
		return verdicts(agent.Examine(t.Context(), agent.Subject{Config: &c, Err: fault.New(fault.Unavailable, "unavailable", "nobody answers")}, now))
	}
	want = maps.Clone(good)
	want["running"], want["workload_api_socket"], want["admin_socket"], want["clock"] = doctor.Warn, doctor.Skipped, doctor.Skipped, doctor.Skipped
	if diff := cmp.Diff(want, stopped(cfg, time.Now())); diff != "" {
		t.Errorf("stopped (-want +got):\n%s", diff)
	}
	other := cfg
	other.Agent.TrustDomain = config.TrustDomain{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")}
	want["trust_domain"] = doctor.Fail
	if diff := cmp.Diff(want, stopped(other, time.Now())); diff != "" {
		t.Errorf("of another trust domain (-want +got):\n%s", diff)
	}
	// Long after, what is stored is over.
	want["trust_domain"], want["identity"], want["bundle"] = doctor.OK, doctor.Fail, doctor.Fail
	if diff := cmp.Diff(want, stopped(cfg, time.Now().Add(1000*24*time.Hour))); diff != "" {
		t.Errorf("long after (-want +got):\n%s", diff)
	}
	// A bundle that is over, at an agent that has learnt none yet.
	fresh := cfg
	fresh.Agent.DataDir = filepath.Join(base, "fresh")
	fresh.Agent.TrustBundlePath, fresh.Agent.TrustBundleHash = filepath.Join(base, "old.pem"), ""
	writeRoots(t, fresh.Agent.TrustBundlePath, "example.org", time.Now().Add(-time.Hour))
	got := stopped(fresh, time.Now())
	if got["bundle"] != doctor.Fail || got["server"] != doctor.Fail || got["data_dir"] != doctor.Warn || got["identity"] != doctor.Skipped {
		t.Errorf("a fresh agent with an old bundle: %v", got)
	}
	if _, err := os.Stat(fresh.Agent.DataDir); !os.IsNotExist(err) {
		t.Errorf("something was made: %v", err)
	}
}
