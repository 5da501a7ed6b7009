package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/agent"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/server"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestMain makes this test binary stand for the program's reference server.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		if err := serve(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) > 1 && (os.Args[1] == echoVerb || os.Args[1] == holdVerb) {
		if err := run(context.Background(), os.Args[1:], os.Stdout, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// TestBenchmarks runs each benchmark shortly against a real server and agent, and
// sees that it leaves nothing behind.
func TestBenchmarks(t *testing.T) {
	flags := deploy(t)
	o := options{admin: flags[1]}
	for _, b := range benchmarks() {
		if slices.Contains([]string{"store", "restart", "memory"}, b.name) {
			continue // they have tests of their own
		}
		t.Run(b.name, func(t *testing.T) {
			held := b.name == "watch" || b.name == "agent"
			if held && os.Getuid() != 0 {
				if os.Getenv("CI") == "true" {
					t.Fatal("this needs root")
				}
				t.Skip("this needs root")
			}
			var out bytes.Buffer
			args := append([]string{b.name, "-n", "20", "-batch", "10", "-parallel", "2", "-entries", "20", "-agents", "20", "-streams", "20", "-connections", "7", "-for", "200ms", "-pid", strconv.Itoa(os.Getpid()), "-output", "json"}, flags...)
			if err := run(t.Context(), args, &out, &out); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			var r result
			if err := json.Unmarshal(out.Bytes(), &r); err != nil {
				t.Fatal(err)
			}
			if r.Name != b.name || r.Operations != 20 || r.WallNS <= 0 || r.P99NS < r.P50NS ||
				// What takes less than the kernel's tick may count as nothing.
				(r.CPUNS <= 0 && slices.Contains([]string{"reissue", "attest", "propagation", "watch"}, b.name)) ||
				(r.ReferenceNS > 0) != slices.Contains([]string{"x509", "jwt", "attest", "fetch", "reissue"}, b.name) ||
				(r.Streams == 20) != held || (r.Memory > 0 && r.Before > 0) != (b.name == "agent") ||
				(r.Messages != nil) != slices.Contains([]string{"sync", "propagation"}, b.name) {
				t.Errorf("result = %+v", r)
			}
			t.Logf("%s", out.String())
		})
	}
	s, err := dialServer(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	entries, err := entryv1.NewEntryClient(s.admin).CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	if err != nil || entries.GetCount() != 1 {
		t.Errorf("%d entries are left, %v", entries.GetCount(), err)
	}
	agents, err := agentv1.NewAgentClient(s.admin).CountAgents(t.Context(), &agentv1.CountAgentsRequest{})
	if err != nil || agents.GetCount() != 1 {
		t.Errorf("%d agents are left, %v", agents.GetCount(), err)
	}
}

func TestMistakes(t *testing.T) {
	for args, want := range map[string]string{
		"crate":                        `there is no benchmark "crate"`,
		"create -n 0":                  "must be positive",
		"create -output xml":           "not table or json",
		"create extra":                 `unexpected argument "extra"`,
		"create -socketPath /none":     "ask the admin socket for the bundle",
		"fetch -workloadSocket /none":  "fetch: ",
		"fetch -pid 999999999 -n 1":    "fetch: ",
		"create -pid 0 -socketPath /x": "create: ",
	} {
		if err := run(t.Context(), strings.Fields(args), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
	if err := run(t.Context(), nil, io.Discard, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("without arguments: %v", err)
	}
	if _, err := cpuTime(999999999); err == nil {
		t.Error("a process that does not exist has used no time")
	}
}

// deploy runs a server and an agent, with one entry for this process, and
// returns the flags that lead to them.
func deploy(t *testing.T) []string {
	t.Helper()
	dir, err := os.MkdirTemp("", "be") // short, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // other users go to the agent's socket
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	td := spiffeid.RequireTrustDomainFromString("bench.test")

	srv, err := newServer(dir)
	if err != nil {
		t.Fatal(err)
	}
	start(t, srv.Ready(), srv.Run)
	s, err := dialServer(t.Context(), options{admin: srv.SocketPath()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	token, err := agentv1.NewAgentClient(s.admin).CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		t.Fatal(err)
	}
	trust, err := srv.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	roots := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(roots, trust.MarshalPEM(), 0o600); err != nil {
		t.Fatal(err)
	}

	cfg := agent.Default()
	cfg.Agent.TrustDomain.TrustDomain = td
	cfg.Agent.ServerAddress, cfg.Agent.ServerPort = "127.0.0.1", srv.Addr().(*net.TCPAddr).Port
	cfg.Agent.DataDir, cfg.Agent.SocketPath = filepath.Join(dir, "agent"), filepath.Join(dir, "public", "a.sock")
	cfg.Agent.TrustBundlePath, cfg.Agent.JoinToken = roots, token.GetValue()
	cfg.Plugins = []config.Plugin{{Type: "KeyManager", Name: "memory"}, {Type: "NodeAttestor", Name: "join_token"}, {Type: "WorkloadAttestor", Name: "unix"}}
	a, err := agent.New(cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	start(t, a.Ready(), a.Run)
	agents, err := agentv1.NewAgentClient(s.admin).ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
	if err != nil || len(agents.GetAgents()) != 1 {
		t.Fatalf("agents: %v, %v", agents, err)
	}
	reply, err := entryv1.NewEntryClient(s.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{
		SpiffeId: &spiretypes.SPIFFEID{TrustDomain: td.Name(), Path: "/me"}, ParentId: agents.GetAgents()[0].GetId(),
		Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:" + strconv.Itoa(os.Getuid())}},
	}}})
	if err != nil || reply.GetResults()[0].GetStatus().GetCode() != 0 {
		t.Fatalf("%v, %v", reply, err)
	}
	return []string{"-socketPath", srv.SocketPath(), "-address", srv.Addr().String(), "-workloadSocket", a.SocketPath(), "-agentSocketPath", filepath.Join(dir, "private", "admin.sock")}
}

// newServer is a server with all that it has in dir.
func newServer(dir string) (*server.Server, error) {
	set := server.Default()
	unlimited := false
	set.Server.TrustDomain.TrustDomain = spiffeid.RequireTrustDomainFromString("bench.test")
	set.Server.BindAddress, set.Server.BindPort = "127.0.0.1", 0
	set.Server.SocketPath, set.Server.DataDir = filepath.Join(dir, "s.sock"), filepath.Join(dir, "server")
	set.Server.RateLimit.Attestation, set.Server.RateLimit.Signing = &unlimited, &unlimited
	return server.New(set, slog.New(slog.DiscardHandler))
}

// serve runs such a server until SIGTERM.
func serve(dir string) error {
	srv, err := newServer(dir)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := srv.Run(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// start runs a role until the test ends.
func start(t *testing.T, ready <-chan struct{}, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-ended:
		ended <- err
		t.Fatal(err)
	case <-time.After(2 * time.Minute):
		t.Fatal("the role did not get ready")
	}
}
