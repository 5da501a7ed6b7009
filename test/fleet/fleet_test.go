//go:build linux

// Package fleet_test breaks what several servers of one trust domain stand on:
// real servers and agents, real PostgreSQL and etcd, killed, frozen, cut off and
// full. What must hold throughout is checked from outside: the history of the
// entry API, the rows in the store, and what workloads are given.
package fleet_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/test/parts"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// patience is how long a test waits for an event that takes some seconds at most.
const patience = 120 * time.Second

// fresh is how far behind another server's writes a read may be while faults come
// and go. Servers that follow the log take it up again within some seconds; after
// this time they must grant nothing new (R77).
const fresh = 60 * time.Second

// plastron is the binary under test, built once by TestMain.
var plastron string

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "relay" { // see network.expose
		l, err := net.Listen("tcp", os.Args[2])
		if err != nil {
			panic(err)
		}
		fmt.Println("listening")
		relay(l, "unix", os.Args[3])
		return
	}
	dir, err := os.MkdirTemp("", "pb")
	if err != nil {
		panic(err)
	}
	plastron = filepath.Join(dir, "plastron")
	build := exec.Command("go", "build", "-o", plastron, "github.com/plastron/plastron/cmd/plastron")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as it is released
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build plastron:", err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// soak tells whether there is time for long tests.
func soak() bool { return os.Getenv("PLASTRON_SOAK") != "" }

// fleet is several servers on one store, and their agents.
type fleet struct {
	t       testing.TB
	dir     string
	store   string // the DataStore block
	options string // more lines for each server block
	ttl     int32  // of the agents' identities, in seconds; 0: as the server decides
	servers []*server
	agents  []*agent

	postgres *parts.Postgres
	etcd     *parts.Etcd
}

// server is one server process with its directory.
type server struct {
	fleet  *fleet
	name   string
	host   string
	port   int
	store  string   // its own DataStore block, if it reaches the store in its own way
	prefix []string // command to run it under, such as nsenter
	proc   *parts.Program
	conn   *grpc.ClientConn // to its admin socket
}

// agent is one agent process with its directory, and one identity for processes
// like the test's.
type agent struct {
	fleet  *fleet
	name   string
	id     string
	prefix []string
	proc   *parts.Program
	conn   *grpc.ClientConn // to its Workload API
}

// onPostgres makes a fleet on a PostgreSQL of its own; nothing of it runs yet.
func onPostgres(t testing.TB) *fleet {
	f := newFleet(t)
	p, err := parts.StartPostgres(t.Context())
	if err != nil {
		missing(t, err)
	}
	t.Cleanup(func() { p.Close() })
	f.postgres = p
	if err := p.Exec(t.Context(), "postgres", "CREATE DATABASE plastron"); err != nil {
		t.Fatal(err)
	}
	f.store = fmt.Sprintf(`DataStore "sql" { plugin_data { database_type = "postgres" connection_string = %q } }`, p.URL("plastron"))
	return f
}

// onEtcd makes a fleet on an etcd of three members.
func onEtcd(t testing.TB) *fleet {
	f := newFleet(t)
	e, err := parts.StartEtcd(t.Context(), 3)
	if err != nil {
		missing(t, err)
	}
	t.Cleanup(func() { e.Close() })
	f.etcd = e
	f.store = fmt.Sprintf(`DataStore "etcd" { plugin_data { endpoints = ["%s"] } }`, strings.Join(e.Endpoints, `", "`))
	return f
}

// missing skips a test whose part is not installed, which CI does not allow.
func missing(t testing.TB, err error) {
	t.Helper()
	if _, absent := err.(*parts.MissingError); absent && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	t.Fatal(err)
}

func newFleet(t testing.TB) *fleet {
	t.Helper()
	dir, err := os.MkdirTemp("", "f") // short: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &fleet{t: t, dir: dir}
}

// start adds servers, starts them and waits until each serves.
func (f *fleet) start(n int) {
	f.t.Helper()
	for range n {
		s := &server{fleet: f, name: fmt.Sprintf("s%d", len(f.servers)), host: "127.0.0.1", port: freePort(f.t), store: f.store}
		f.servers = append(f.servers, s)
		s.start()
		s.conn = f.dial(s.path("admin/api.sock"))
	}
}

func freePort(t testing.TB) int {
	t.Helper()
	port, err := parts.ReservePort()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(port.Release)
	return port.Number
}

// dial connects to a Unix socket, and soon again when it was away.
func (f *fleet) dial(path string, options ...grpc.DialOption) *grpc.ClientConn {
	f.t.Helper()
	conn, err := grpc.NewClient("unix://"+path, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()),
		// Without a least time to connect it is that of the backoff: 50 ms.
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 20 * time.Second, Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}))...)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { conn.Close() })
	return conn
}

func (f *fleet) write(path, text string) {
	f.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// launch starts a plastron command that runs until the test ends.
func (f *fleet) launch(name string, prefix []string, args ...string) *parts.Program {
	f.t.Helper()
	return f.begin(name, append(append([]string{}, prefix...), append([]string{plastron}, args...)...))
}

func (f *fleet) begin(name string, args []string) *parts.Program {
	f.t.Helper()
	p, err := parts.StartProgram(exec.Command(args[0], args[1:]...))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		p.Signal(syscall.SIGCONT)
		if err := p.Stop(syscall.SIGTERM); err != nil {
			f.t.Errorf("%s: %v", name, err)
		}
		if f.t.Failed() {
			out := p.Output()
			f.t.Logf("%s printed at last:\n%s", name, out[max(0, len(out)-4000):])
		}
	})
	return p
}

// healthy waits until a process of ours says so.
func (f *fleet) healthy(role, socket string, p *parts.Program) {
	f.t.Helper()
	eventually(f.t, role+" is healthy", func() bool {
		select {
		case <-p.Done():
			f.t.Fatalf("the %s ended:\n%s", role, p.Output())
		default:
		}
		return exec.Command(plastron, role, "healthcheck", "-socketPath", socket).Run() == nil
	})
}

// eventually polls an outside fact until it holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-deadline:
			t.Fatalf("never came: %s", what)
		case <-tick.C:
		}
	}
}

func (s *server) path(name string) string { return filepath.Join(s.fleet.dir, s.name, name) }

// launch starts the process and returns at once.
func (s *server) launch() {
	s.fleet.t.Helper()
	s.fleet.write(s.path("server.conf"), fmt.Sprintf(`server {
  bind_address = %q
  bind_port    = %d
  socket_path  = %q
  trust_domain = "example.org"
  data_dir     = %q
  %s
}
plugins {
  %s
  KeyManager "disk" { plugin_data { keys_path = %q } }
  NodeAttestor "join_token" { plugin_data {} }
}
`, s.host, s.port, s.path("admin/api.sock"), s.path("data"), s.fleet.options, s.store, s.path("data/keys.json")))
	s.proc = s.fleet.launch(s.name, s.prefix, "server", "run", "-config", s.path("server.conf"))
}

// start starts the process, after a kill again, and waits until it serves.
func (s *server) start() {
	s.fleet.t.Helper()
	s.launch()
	s.fleet.healthy("server", s.path("admin/api.sock"), s.proc)
}

// kill ends the process with SIGKILL.
func (s *server) kill() {
	s.fleet.t.Helper()
	if err := s.proc.Stop(syscall.SIGKILL); err != nil {
		s.fleet.t.Fatal(err)
	}
}

func (s *server) entries() entryv1.EntryClient { return entryv1.NewEntryClient(s.conn) }

// run runs a plastron command on the server's admin socket to its end.
func (s *server) run(args ...string) string {
	s.fleet.t.Helper()
	out, err := s.try(args...)
	if err != nil {
		s.fleet.t.Fatal(err)
	}
	return out
}

// try is run for a command that may fail.
func (s *server) try(args ...string) (string, error) {
	out, err := exec.Command(plastron, append(args, "-socketPath", s.path("admin/api.sock"))...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("plastron %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// says is what the server says of itself, or nil.
func (s *server) says() *statusv1.ServerStatus {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	got, err := statusv1.NewServerClient(s.conn).Status(ctx, &statusv1.ServerStatusRequest{})
	if err != nil {
		return nil
	}
	return got
}

// attach adds an agent that joins through a server, gives it an entry and waits
// until that is served. The agent's server_address is that server's alone.
func (f *fleet) attach(s *server, prefix ...string) *agent {
	f.t.Helper()
	a := &agent{fleet: f, name: fmt.Sprintf("a%d", len(f.agents)), prefix: prefix}
	f.agents = append(f.agents, a)
	var token string
	for line := range strings.Lines(s.run("server", "token", "generate")) {
		if v, ok := strings.CutPrefix(line, "Token:"); ok {
			token = strings.TrimSpace(v)
		}
		if _, v, ok := strings.Cut(line, "spiffe://"); ok {
			a.id = "spiffe://" + strings.TrimSpace(v)
		}
	}
	f.write(a.path("bundle.pem"), s.run("server", "bundle", "show"))
	f.write(a.path("agent.conf"), fmt.Sprintf(`agent {
  data_dir          = %q
  server_address    = %q
  server_port       = %d
  socket_path       = %q
  trust_domain      = "example.org"
  trust_bundle_path = %q
  cache_directory   = "none"
  join_token        = %q
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "disk" { plugin_data { directory = %q } }
  WorkloadAttestor "unix" { plugin_data {} }
}
`, a.path("data"), s.host, s.port, a.path("public/api.sock"), a.path("bundle.pem"), token, a.path("data")))
	a.proc = f.launch(a.name, prefix, "agent", "run", "-config", a.path("agent.conf"))
	f.healthy("agent", a.path("public/api.sock"), a.proc)
	a.conn = f.dial(a.path("public/api.sock"))
	a.grant(s, "/served/"+a.name)
	eventually(f.t, "an SVID", func() bool { return len(a.fetch()) == 1 })
	return a
}

func (a *agent) path(name string) string { return filepath.Join(a.fleet.dir, a.name, name) }

// grant makes an entry for the test's own user on the agent's node.
func (a *agent) grant(s *server, path string) {
	a.fleet.t.Helper()
	if err := s.create(a.fleet.t.Context(), path, a.id, fmt.Sprintf("uid:%d", os.Getuid())); err != nil {
		a.fleet.t.Fatal(err)
	}
}

// create makes an entry for processes with a unix selector on an agent's node.
func (s *server) create(ctx context.Context, path, agent, selector string) error {
	e := &spiretypes.Entry{ParentId: wireID(agent), SpiffeId: wireID("spiffe://example.org" + path),
		Selectors: []*spiretypes.Selector{{Type: "unix", Value: selector}}, X509SvidTtl: s.fleet.ttl}
	resp, err := s.entries().BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
	if err != nil {
		return err
	}
	if st := resp.Results[0].Status; st.Code != 0 {
		return status.Error(codes.Code(st.Code), st.Message)
	}
	return nil
}

func wireID(s string) *spiretypes.SPIFFEID {
	td, path, _ := strings.Cut(strings.TrimPrefix(s, "spiffe://"), "/")
	return &spiretypes.SPIFFEID{TrustDomain: td, Path: "/" + path}
}

// fetch returns the IDs that the agent gives to the test, nil if none.
func (a *agent) fetch() (ids []string) {
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true"), 30*time.Second)
	defer cancel()
	stream, err := workload.NewSpiffeWorkloadAPIClient(a.conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return nil
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil
	}
	for _, s := range resp.Svids {
		ids = append(ids, s.SpiffeId)
	}
	return ids
}

// fetching has every agent asked for SVIDs again and again until the returned
// function is called; no call may fail.
func (f *fleet) fetching() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	fetches, failures := make([]int, len(f.agents)), make([]int, len(f.agents))
	for i, a := range f.agents {
		all.Go(func() {
			tick := time.NewTicker(50 * time.Millisecond)
			defer tick.Stop()
			for ctx.Err() == nil {
				fetches[i]++
				if len(a.fetch()) == 0 {
					failures[i]++
				}
				select {
				case <-tick.C:
				case <-ctx.Done():
				}
			}
		})
	}
	return sync.OnceFunc(func() {
		f.t.Helper()
		cancel()
		all.Wait()
		for i := range f.agents {
			if failures[i] > 0 {
				f.t.Errorf("agent %d: %d of %d calls of FetchX509SVID failed", i, failures[i], fetches[i])
			}
		}
		f.t.Logf("calls of FetchX509SVID per agent: %v", fetches)
	})
}

// agree waits until all servers are at one position with one digest (R78), and
// returns how long that took.
func (f *fleet) agree() time.Duration {
	f.t.Helper()
	began := time.Now()
	eventually(f.t, "all servers hold the same", func() bool {
		same := true
		var first *statusv1.ServerStatus
		for _, s := range f.servers {
			st := s.says()
			if st == nil {
				return false
			}
			if first == nil {
				first = st
			}
			if st.Position.Epoch != first.Position.Epoch || st.Position.Revision != first.Position.Revision {
				same = false // on its way
			} else if st.Digest != first.Digest {
				f.t.Fatalf("at position %v the digests differ: %s, %s", st.Position, first.Digest, st.Digest)
			}
			if st.Unreadable != 0 {
				f.t.Fatalf("%s cannot read %d rows", s.name, st.Unreadable)
			}
		}
		return same
	})
	return time.Since(began)
}
