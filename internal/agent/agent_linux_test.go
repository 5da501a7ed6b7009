package agent_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/server"
	"github.com/plastron/plastron/test/parts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const wait = 60 * time.Second // far beyond what anything here takes

// domain is a server in this process and what is needed to run agents against it.
type domain struct {
	t    *testing.T
	cfg  server.Config
	srv  *server.Server
	stop func()
	conn *grpc.ClientConn
	addr string
	log  slog.Handler // of the next start; nil: logger's
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func logger(t *testing.T, who string) *slog.Logger {
	var w io.Writer = io.Discard
	if testing.Verbose() {
		w = os.Stderr
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug})).With("dir", who)
}

func newDomain(t *testing.T, change ...func(*server.Config)) *domain {
	t.Helper()
	dir := shortDir(t)
	cfg := server.Default()
	cfg.Server.TrustDomain = config.TrustDomain{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")}
	cfg.Server.BindAddress, cfg.Server.BindPort = "127.0.0.1", reserve(t)
	cfg.Server.DataDir, cfg.Server.SocketPath = filepath.Join(dir, "data"), filepath.Join(dir, "admin", "s")
	cfg.Plugins = []config.Plugin{
		{Type: "DataStore", Name: "sqlite"}, {Type: "KeyManager", Name: "memory"}, {Type: "NodeAttestor", Name: "join_token"},
	}
	for _, c := range change {
		c(&cfg)
	}
	d := &domain{t: t, cfg: cfg}
	d.start()
	t.Cleanup(func() { d.stop(); d.conn.Close() })
	conn, err := grpc.NewClient("unix:"+cfg.Server.SocketPath, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	d.conn = conn
	return d
}

func (d *domain) start() {
	d.t.Helper()
	log := logger(d.t, "server")
	if d.log != nil {
		log = slog.New(d.log)
	}
	srv, err := server.New(d.cfg, log)
	if err != nil {
		d.t.Fatal(err)
	}
	d.srv = srv
	d.stop = run(d.t, srv.Run)
	within(d.t, srv.Ready())
	d.addr = srv.Addr().String()
}

// reserve returns a port at which nobody else listens while the test has nobody there.
func reserve(t *testing.T) int {
	t.Helper()
	port, err := parts.ReservePort()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(port.Release)
	return port.Number
}

// run runs a role until the returned function is called, once or more often.
func run(t *testing.T, f func(context.Context) error) func() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("role ended: %v", err)
		}
	})
}

func within(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(wait):
		t.Fatal("it did not happen in time")
	}
}

func (d *domain) token() string {
	d.t.Helper()
	resp, err := agentv1.NewAgentClient(d.conn).CreateJoinToken(d.t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.GetValue()
}

// agentIDs are those of all agents.
func (d *domain) agentIDs() []*spiretypes.SPIFFEID {
	d.t.Helper()
	resp, err := agentv1.NewAgentClient(d.conn).ListAgents(d.t.Context(), &agentv1.ListAgentsRequest{})
	if err != nil {
		d.t.Fatal(err)
	}
	var ids []*spiretypes.SPIFFEID
	for _, a := range resp.GetAgents() {
		ids = append(ids, a.GetId())
	}
	return ids
}

func (d *domain) ban() {
	d.t.Helper()
	if _, err := agentv1.NewAgentClient(d.conn).BanAgent(d.t.Context(), &agentv1.BanAgentRequest{Id: d.agentIDs()[0]}); err != nil {
		d.t.Fatal(err)
	}
}

func (d *domain) entry(path string, change ...func(*spiretypes.Entry)) string {
	d.t.Helper()
	e := &spiretypes.Entry{
		SpiffeId: &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: path}, ParentId: d.agentIDs()[0],
		Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:" + strconv.Itoa(os.Getuid())}},
	}
	for _, c := range change {
		c(e)
	}
	resp, err := entryv1.NewEntryClient(d.conn).BatchCreateEntry(d.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
	if err != nil {
		d.t.Fatal(err)
	}
	if st := resp.GetResults()[0].GetStatus(); st.GetCode() != 0 {
		d.t.Fatal(st.GetMessage())
	}
	return resp.GetResults()[0].GetEntry().GetId()
}

func (d *domain) delete(id string) {
	d.t.Helper()
	resp, err := entryv1.NewEntryClient(d.conn).BatchDeleteEntry(d.t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
	if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
		d.t.Fatal(err, resp)
	}
}

// agentConfig is that of an agent with a fresh join token.
func (d *domain) agentConfig() agent.Config {
	d.t.Helper()
	dir := shortDir(d.t)
	os.Chmod(dir, 0o755)
	cfg := agent.Default()
	cfg.Agent.TrustDomain = d.cfg.Server.TrustDomain
	host, port, _ := net.SplitHostPort(d.addr)
	cfg.Agent.ServerAddress = host
	cfg.Agent.ServerPort, _ = strconv.Atoi(port)
	cfg.Agent.DataDir, cfg.Agent.SocketPath = filepath.Join(dir, "data"), filepath.Join(dir, "s")
	b, err := d.srv.Bundle()
	if err != nil {
		d.t.Fatal(err)
	}
	sum := sha256.Sum256(b.X509[0].ASN1)
	cfg.Agent.TrustBundleHash = hex.EncodeToString(sum[:])
	cfg.Agent.JoinToken = d.token()
	cfg.Agent.CacheDirectory = "none" // not outside of the test's directories
	cfg.Plugins = []config.Plugin{
		{Type: "KeyManager", Name: "memory"}, {Type: "NodeAttestor", Name: "join_token"}, {Type: "WorkloadAttestor", Name: "unix"},
	}
	return cfg
}

func (d *domain) agent(cfg agent.Config) (*agent.Agent, func()) {
	d.t.Helper()
	a, err := agent.New(cfg, logger(d.t, "agent"))
	if err != nil {
		d.t.Fatal(err)
	}
	stop := run(d.t, a.Run)
	d.t.Cleanup(stop)
	within(d.t, a.Ready())
	return a, stop
}

func client(t *testing.T, a *agent.Agent) *workloadapi.Client {
	t.Helper()
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix:"+a.SocketPath()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// An unmodified go-spiffe client gets, watches and validates.
func TestFirstLight(t *testing.T) {
	d := newDomain(t)
	a, _ := d.agent(d.agentConfig())
	c := client(t, a)
	if _, err := c.FetchX509SVID(t.Context()); err == nil {
		t.Fatal("an SVID without an entry")
	}
	d.entry("/web")
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClient(c))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.GetX509SVID()
	if err != nil || svid.ID.String() != "spiffe://example.org/web" {
		t.Fatalf("SVID %v, %v", svid, err)
	}
	token, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "them"})
	if err != nil || token.ID != svid.ID {
		t.Fatal(token, err)
	}
	valid, err := c.ValidateJWTSVID(ctx, token.Marshal(), "them")
	if err != nil || valid.ID != svid.ID {
		t.Fatal(valid, err)
	}
	if _, err := c.ValidateJWTSVID(ctx, token.Marshal(), "others"); err == nil {
		t.Error("a token for another audience was accepted")
	}
	bundles, err := c.FetchJWTBundles(ctx)
	if err != nil || !bundles.Has(svid.ID.TrustDomain()) {
		t.Error(bundles, err)
	}
	if _, err := c.FetchX509Bundles(ctx); err != nil {
		t.Error(err)
	}
}
