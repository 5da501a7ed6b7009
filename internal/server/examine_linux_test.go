package server_test

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/doctor"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/server"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func verdicts(found []doctor.Finding) map[string]doctor.Verdict {
	out := map[string]doctor.Verdict{}
	for _, f := range found {
		out[f.Check] = f.Verdict
	}
	return out
}

// Each thing that is broken shows in its own check, and in no other.
func TestExamine(t *testing.T) {
	dir := shortDir(t)
	c := configFor(dir)
	r := start(t, c)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	keys, socket := filepath.Join(c.Server.DataDir, "keys.json"), c.Server.SocketPath
	running, err := statusv1.NewServerClient(r.admin).Status(t.Context(), &statusv1.ServerStatusRequest{CheckStore: true})
	if err != nil {
		t.Fatal(err)
	}
	healthy := server.Subject{Config: &c, Running: running}
	good := verdicts(server.Examine(t.Context(), healthy, time.Now()))
	want := map[string]doctor.Verdict{"configuration": "ok", "running": "ok", "data_dir": "ok", "keys": "ok", "disk": good["disk"], "store": "ok", "trust_domain": "ok",
		"admin_socket": "ok", "authorities": "ok", "certificate": "ok", "bundle": "ok", "agents": "ok", "clock": "skipped"}
	if d := cmp.Diff(want, good); d != "" {
		t.Fatalf("a healthy server (-want +got):\n%s", d)
	}
	if d := cmp.Diff(good, verdicts(append(server.Examine(t.Context(), server.Subject{Running: running}, time.Now()), doctor.Say("configuration", doctor.OK, "")))); d != "" {
		t.Errorf("without its configuration (-want +got):\n%s", d)
	}
	mode := func(path string, broken os.FileMode) func(*testing.T, *server.Subject) {
		return func(t *testing.T, _ *server.Subject) {
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
	status := func(f func(*statusv1.ServerStatus)) func(*testing.T, *server.Subject) {
		return func(_ *testing.T, s *server.Subject) { f(s.Running) }
	}
	past := time.Now().Add(-time.Minute).Unix()
	for _, tc := range []struct {
		check    string
		verdict  doctor.Verdict
		breaking func(*testing.T, *server.Subject)
	}{
		{"configuration", doctor.Fail, func(_ *testing.T, s *server.Subject) { s.Config.Server.BindPort = -1 }},
		{"running", doctor.Fail, status(func(s *statusv1.ServerStatus) { s.Unhealthy = &statusv1.Fault{Reason: "x"} })},
		{"data_dir", doctor.Fail, mode(c.Server.DataDir, 0o777)},
		{"keys", doctor.Fail, mode(keys, 0o644)},
		{"store", doctor.Fail, status(func(s *statusv1.ServerStatus) { s.Store.Fault = &statusv1.Fault{Reason: "store_corrupt"} })},
		{"store", doctor.Warn, status(func(s *statusv1.ServerStatus) { s.Unreadable = 1 })},
		{"trust_domain", doctor.Fail, func(_ *testing.T, s *server.Subject) {
			s.Config.Server.TrustDomain = config.TrustDomain{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")}
		}},
		{"admin_socket", doctor.Fail, mode(socket, 0o666)},
		{"admin_socket", doctor.Fail, mode(filepath.Dir(socket), 0o777)},
		{"authorities", doctor.Fail, status(func(s *statusv1.ServerStatus) { s.Authorities = s.Authorities[1:] })},
		{"authorities", doctor.Fail, status(func(s *statusv1.ServerStatus) { s.Authorities[0].ExpiresAt = past })},
		{"certificate", doctor.Fail, status(func(s *statusv1.ServerStatus) { s.CertificateExpiresAt = past })},
		{"certificate", doctor.Warn, status(func(s *statusv1.ServerStatus) { s.CertificateIssuedAt -= 10 * 3600 })},
		{"bundle", doctor.Fail, status(func(s *statusv1.ServerStatus) { s.Bundle.ExpiresAt = past })},
		{"bundle", doctor.Warn, status(func(s *statusv1.ServerStatus) { s.Bundle.Tainted = 1 })},
		{"agents", doctor.Warn, status(func(s *statusv1.ServerStatus) { s.Attached.Agents, s.Attached.Laggards = 1, []string{"spiffe://x"} })},
		{"clock", doctor.Fail, status(func(s *statusv1.ServerStatus) { s.Attached.Clocks, s.Attached.ClockAheadMs = 1, -60_000 })},
	} {
		t.Run(tc.check, func(t *testing.T) {
			changed := c
			s := server.Subject{Config: &changed, Running: proto.CloneOf(running)}
			tc.breaking(t, &s)
			want := maps.Clone(good)
			want[tc.check] = tc.verdict
			if d := cmp.Diff(want, verdicts(server.Examine(t.Context(), s, time.Now()))); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}

	// A server that does not run is examined by what it has left.
	r.stop()
	stopped := func(s server.Subject) map[string]doctor.Verdict {
		s.Running, s.Err = nil, fault.New(fault.Unavailable, "unavailable", "nobody answers")
		return verdicts(server.Examine(t.Context(), s, time.Now()))
	}
	want = map[string]doctor.Verdict{"configuration": "ok", "running": "warn", "data_dir": "ok", "keys": "ok", "disk": good["disk"], "store": "ok", "trust_domain": "ok",
		"admin_socket": "skipped", "authorities": "skipped", "certificate": "skipped", "bundle": "skipped", "agents": "skipped", "clock": "skipped"}
	if d := cmp.Diff(want, stopped(healthy)); d != "" {
		t.Errorf("stopped (-want +got):\n%s", d)
	}
	other := c
	other.Server.TrustDomain = config.TrustDomain{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")}
	want["trust_domain"] = doctor.Fail
	if d := cmp.Diff(want, stopped(server.Subject{Config: &other})); d != "" {
		t.Errorf("of another trust domain (-want +got):\n%s", d)
	}
	want["trust_domain"], want["store"] = doctor.OK, doctor.Fail
	database := filepath.Join(c.Server.DataDir, "plastron.db")
	b, err := os.ReadFile(database)
	if err != nil {
		t.Fatal(err)
	}
	for i := 4096; i < len(b); i++ {
		b[i] = 0xff
	}
	if err := os.WriteFile(database, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, stopped(healthy)); d != "" {
		t.Errorf("with a damaged store (-want +got):\n%s", d)
	}
	// Before the first start there is nothing.
	fresh := configFor(filepath.Join(dir, "fresh"))
	got := stopped(server.Subject{Config: &fresh})
	want = map[string]doctor.Verdict{"configuration": "ok", "running": "warn", "data_dir": "warn", "keys": "skipped", "disk": "skipped", "store": "skipped", "trust_domain": "ok",
		"admin_socket": "skipped", "authorities": "skipped", "certificate": "skipped", "bundle": "skipped", "agents": "skipped", "clock": "skipped"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("before the first start (-want +got):\n%s", d)
	}
	if _, err := os.Stat(filepath.Join(dir, "fresh")); !os.IsNotExist(err) {
		t.Errorf("something was made: %v", err)
	}
}
