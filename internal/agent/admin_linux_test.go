package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// The admin socket lies beside the public one's directory or in the data
// directory, and is for the agent's user only. A default that cannot be made does
// not stop the agent; one that was asked for does.
func TestAdminSocket(t *testing.T) {
	d := newDomain(t)
	base := shortDir(t)
	inTheWay := filepath.Join(base, "taken")
	if err := os.WriteFile(inTheWay, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		public, admin string // as configured
		want          string // where it is then; empty: nowhere
		reason        string
	}{
		"beside public":           {public: filepath.Join(base, "1", "public", "api.sock"), want: filepath.Join(base, "1", "private", "admin.sock")},
		"in data_dir":             {public: filepath.Join(base, "2", "api.sock"), want: "admin.sock"},
		"asked for":               {public: filepath.Join(base, "3", "public", "api.sock"), admin: filepath.Join(base, "3", "own", "a"), want: filepath.Join(base, "3", "own", "a")},
		"not possible":            {public: filepath.Join(inTheWay, "..", "4", "public", "api.sock")},
		"asked for, not possible": {public: filepath.Join(base, "5", "public", "api.sock"), admin: inTheWay, reason: "socket_path_taken"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := d.agentConfig()
			cfg.Agent.SocketPath, cfg.Agent.AdminSocketPath = c.public, c.admin
			if name == "not possible" {
				if err := os.MkdirAll(filepath.Join(base, "4"), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(base, "4", "private"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if c.reason != "" {
				a, err := agent.New(cfg, logger(t, "agent"))
				if err != nil {
					t.Fatal(err)
				}
				if err := a.Run(t.Context()); fault.ReasonOf(err) != c.reason {
					t.Errorf("Run() = %v, want %s", err, c.reason)
				}
				return
			}
			_, stop := d.agent(cfg)
			defer stop()
			want := c.want
			if want == "admin.sock" {
				want = filepath.Join(cfg.Agent.DataDir, want)
			}
			if want == "" {
				return // it runs
			}
			if info, err := os.Stat(want); err != nil || info.Mode() != os.ModeSocket|0o600 {
				t.Errorf("%s: %v, %v", want, info, err)
			}
			stop()
			if _, err := os.Lstat(want); !os.IsNotExist(err) {
				t.Errorf("after the agent's end: %v", err)
			}
		})
	}
}

// An operator is told what the agent holds, and that it is out of step when the
// server goes away, while it serves on (R56).
func TestStatus(t *testing.T) {
	d := newDomain(t)
	cfg := d.agentConfig()
	_, stop := d.agent(cfg)
	defer stop()
	conn, err := grpc.NewClient("unix:"+filepath.Join(cfg.Agent.DataDir, "admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	status := func() *statusv1.AgentStatus {
		t.Helper()
		got, err := statusv1.NewAgentClient(conn).Status(t.Context(), &statusv1.AgentStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	until := func(what string, holds func(*statusv1.AgentStatus) bool) *statusv1.AgentStatus {
		t.Helper()
		look, late := time.NewTicker(5*time.Millisecond), time.After(wait)
		defer look.Stop()
		for {
			got := status()
			if holds(got) {
				return got
			}
			select {
			case <-look.C:
			case <-late:
				t.Fatalf("it does not come that %s: %v", what, got)
			}
		}
	}
	fetch := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		defer cancel()
		_, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+cfg.Agent.SocketPath))
		return err
	}
	if err := fetch(); err == nil {
		t.Fatal("there is an identity already")
	}
	got := until("it is in step", func(s *statusv1.AgentStatus) bool { return s.Following.InStep })
	refused := uint64(0)
	for _, n := range got.Refusals {
		refused += n
	}
	f := got.Following
	if got.Id == "" || got.TrustDomain != "example.org" || got.Attestor != "join_token" || got.ExpiresAt <= time.Now().Unix() || got.DataDir != cfg.Agent.DataDir ||
		got.X509Authorities != 1 || got.BundleSequence == 0 || refused == 0 || f.Mode != "push" || f.Address != d.addr || f.Since == 0 || f.HeardAt == 0 ||
		f.AcknowledgedAt == 0 || len(f.Position.GetEpoch()) != 32 || !f.ClockKnown || f.ClockAheadMs > 60_000 || f.ClockAheadMs < -60_000 {
		t.Errorf("%v", got)
	}
	resp, err := entryv1.NewEntryClient(d.conn).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{
		SpiffeId:  &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: "/web"},
		ParentId:  &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: strings.TrimPrefix(got.Id, "spiffe://example.org")},
		Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:" + strconv.Itoa(os.Getuid())}},
	}}})
	if err != nil || resp.Results[0].Status.Code != 0 {
		t.Fatal(resp, err)
	}
	got = until("the SVID is there", func(s *statusv1.AgentStatus) bool { return s.X509Svids == 1 })
	if got.Grants != 1 || len(got.Ending) != 1 || got.Ending[0].SpiffeId != "spiffe://example.org/web" || got.Ending[0].GrantId != resp.Results[0].Entry.Id {
		t.Errorf("%v", got)
	}
	d.stop()
	got = until("it is not in step", func(s *statusv1.AgentStatus) bool {
		return !s.Following.InStep && s.Following.Fault.GetReason() == "server_unavailable"
	})
	if got.X509Svids != 1 || got.Following.Position.GetRevision() == 0 {
		t.Errorf("without its server: %v", got)
	}
	if err := fetch(); err != nil {
		t.Errorf("without its server: %v", err)
	}
}
