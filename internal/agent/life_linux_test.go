package agent_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/server"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

type stream = grpc.ServerStreamingClient[workload.X509SVIDResponse]

// watch opens a raw stream of X.509-SVIDs and receives until a message shows
// these paths, trying again as clients do while there is no identity yet.
func watch(t *testing.T, a *agent.Agent, paths ...string) stream {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+a.SocketPath(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), 5*wait) // for all that the test does
	t.Cleanup(cancel)
	for ; ; <-time.After(5 * time.Millisecond) {
		s, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		m, err := s.Recv()
		switch {
		case status.Code(err) == codes.PermissionDenied:
			continue
		case err != nil:
			t.Fatal(err)
		case slices.Equal(pathsOf(m), paths):
			return s
		}
		until(t, s, paths...)
		return s
	}
}

func pathsOf(m *workload.X509SVIDResponse) []string {
	var got []string
	for _, x := range m.GetSvids() {
		got = append(got, strings.TrimPrefix(x.GetSpiffeId(), "spiffe://example.org"))
	}
	slices.Sort(got)
	return got
}

// until receives until a message shows these paths.
func until(t *testing.T, s stream, paths ...string) *workload.X509SVIDResponse {
	t.Helper()
	for {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if slices.Equal(pathsOf(m), paths) {
			return m
		}
	}
}

// With a stream open: create an entry, message; change it, message; delete it, withdrawn.
func TestChangesReachOpenStreams(t *testing.T) {
	d := newDomain(t)
	a, _ := d.agent(d.agentConfig())
	keep := d.entry("/keep")
	s := watch(t, a, "/keep")
	start := time.Now()
	id := d.entry("/web")
	first := until(t, s, "/keep", "/web")
	t.Logf("from create to message: %v", time.Since(start))

	update := &entryv1.BatchUpdateEntryRequest{InputMask: &spiretypes.EntryMask{DnsNames: true, X509SvidTtl: true},
		Entries: []*spiretypes.Entry{{Id: id, DnsNames: []string{"web.example.org"}, X509SvidTtl: 600}}}
	resp, err := entryv1.NewEntryClient(d.conn).BatchUpdateEntry(t.Context(), update)
	if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
		t.Fatal(err, resp)
	}
	for {
		m := until(t, s, "/keep", "/web")
		leaf := leafOf(t, m, "/web")
		if slices.Equal(leaf.DNSNames, []string{"web.example.org"}) {
			if left := time.Until(leaf.NotAfter); left > 10*time.Minute {
				t.Errorf("the TTL is still %v", left)
			}
			break
		}
	}
	if !slices.Equal(leafOf(t, first, "/web").DNSNames, nil) {
		t.Error("the first SVID had DNS names")
	}
	d.delete(id)
	until(t, s, "/keep")
	d.delete(keep)
	_, err = s.Recv()
	if status.Code(err) != codes.PermissionDenied { // W29
		t.Errorf("after the last entry went: %v", err)
	}
}

func leafOf(t *testing.T, m *workload.X509SVIDResponse, path string) *x509.Certificate {
	t.Helper()
	for _, x := range m.GetSvids() {
		if strings.HasSuffix(x.GetSpiffeId(), path) {
			certs, err := x509.ParseCertificates(x.GetX509Svid())
			if err != nil {
				t.Fatal(err)
			}
			return certs[0]
		}
	}
	t.Fatalf("no SVID for %s", path)
	return nil
}

// TTL 15 s for workloads and for the agent itself: new mTLS connections all the
// time and not one fails. test/system does the same over rotations of the authority.
// A shorter life would ask of the machine that it never stands still for a moment.
func TestShortLives(t *testing.T) {
	t.Parallel()
	d := newDomain(t, func(c *server.Config) {
		const life = config.Duration(15 * time.Second)
		c.Server.CATTL, c.Server.DefaultX509SVIDTTL, c.Server.DefaultJWTSVIDTTL, c.Server.AgentTTL = 6*life, life, life, life
	})
	a, _ := d.agent(d.agentConfig())
	d.entry("/web")
	ctx, cancel := context.WithTimeout(t.Context(), 5*wait)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix:"+a.SocketPath())))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if c.(*tls.Conn).HandshakeContext(ctx) == nil {
					c.Write([]byte("x"))
				}
			}()
		}
	}()
	serials, handshakes := map[string]bool{}, 0
	config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeAny())
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for ; len(serials) < 4 && ctx.Err() == nil; <-tick.C { // some 23 s
		c, err := tls.Dial("tcp", l.Addr().String(), config)
		if err == nil {
			_, err = c.Read(make([]byte, 1))
		}
		if err != nil {
			t.Fatalf("handshake %d: %v", handshakes, err)
		}
		leaf := c.ConnectionState().PeerCertificates[0]
		serials[leaf.SerialNumber.String()] = true
		handshakes++
		c.Close()
	}
	t.Logf("%d handshakes, %d certificates", handshakes, len(serials))
	if len(serials) < 4 {
		t.Error("the certificate is not renewed")
	}
}

// The server goes and comes back: running and newly started workloads are served
// meanwhile, and changes arrive again within seconds.
func TestServerRestart(t *testing.T) {
	t.Parallel()
	d := newDomain(t, disk)
	a, _ := d.agent(d.agentConfig())
	d.entry("/web")
	s := watch(t, a, "/web")
	for range 2 {
		d.stop()
		watch(t, a, "/web")
		d.start()
		start := time.Now()
		id := d.entry("/more")
		until(t, s, "/more", "/web")
		t.Logf("in step again after %v", time.Since(start))
		d.delete(id)
		until(t, s, "/web")
	}
}

// disk keeps the server's keys over a restart.
func disk(c *server.Config) {
	for i, p := range c.Plugins {
		if p.Type == "KeyManager" {
			node, err := config.Parse("test", []byte(fmt.Sprintf("keys_path = %q", filepath.Join(c.Server.DataDir, "keys.json"))))
			if err != nil {
				panic(err)
			}
			c.Plugins[i] = config.Plugin{Type: "KeyManager", Name: "disk", Data: node}
		}
	}
}

// An agent that restarts goes on with what it has stored, without a new token;
// so does one whose state file was torn, if it says what it needs (R54).
func TestAgentRestart(t *testing.T) {
	d := newDomain(t)
	cfg := d.agentConfig()
	keysDir := filepath.Join(cfg.Agent.DataDir)
	os.MkdirAll(keysDir, 0o700)
	node, err := config.Parse("test", []byte(fmt.Sprintf("directory = %q", keysDir)))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Plugins[0] = config.Plugin{Type: "KeyManager", Name: "disk", Data: node}
	a, stop := d.agent(cfg)
	d.entry("/web")
	watch(t, a, "/web")

	// R61, F13: no second agent on this directory, nor on this socket.
	second, err := agent.New(cfg, logger(t, "second"))
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); fault.ReasonOf(err) != "data_dir_in_use" {
		t.Errorf("a second agent: %v", err)
	}
	stop()
	if _, err := os.Lstat(cfg.Agent.SocketPath); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket was left behind: %v", err)
	}
	// Restarted without any token.
	cfg.Agent.JoinToken = ""
	a, stop = d.agent(cfg)
	watch(t, a, "/web")
	stop()

	// The file holds no secret and nobody else may write it.
	state := filepath.Join(cfg.Agent.DataDir, "agent.json")
	if info, err := os.Stat(state); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("state file %v, %v", info.Mode(), err)
	}
	// Torn: set aside; a token is needed and the agent says so.
	if err := os.Truncate(state, 100); err != nil {
		t.Fatal(err)
	}
	torn, err := agent.New(cfg, logger(t, "torn"))
	if err != nil {
		t.Fatal(err)
	}
	if err := torn.Run(t.Context()); fault.ReasonOf(err) != "join_token_missing" {
		t.Errorf("with a torn file and no token: %v", err)
	}
	if aside, _ := filepath.Glob(state + ".*.bad"); len(aside) != 1 {
		t.Errorf("set aside: %v", aside)
	}
	before := d.agentIDs()[0].GetPath()
	cfg.Agent.JoinToken = d.token()
	a, _ = d.agent(cfg)
	for _, id := range d.agentIDs() {
		if id.GetPath() != before {
			d.entry("/again", func(e *spiretypes.Entry) { e.ParentId = id })
		}
	}
	watch(t, a, "/again")
}

// A store restored from a backup is a new epoch: the agent compares and goes on.
func TestStoreRestored(t *testing.T) {
	t.Parallel()
	d := newDomain(t, disk)
	a, _ := d.agent(d.agentConfig())
	d.entry("/web")
	s := watch(t, a, "/web")
	d.stop()
	backup := filepath.Join(shortDir(t), "backup")
	copyDir(t, d.cfg.Server.DataDir, backup)
	d.start()
	d.entry("/later")
	until(t, s, "/later", "/web")
	d.stop()
	// The position file stays, as it does when only the database is restored.
	position, perr := os.ReadFile(filepath.Join(d.cfg.Server.DataDir, "position"))
	if err := os.RemoveAll(d.cfg.Server.DataDir); err != nil {
		t.Fatal(err)
	}
	copyDir(t, backup, d.cfg.Server.DataDir)
	if perr == nil {
		if err := os.WriteFile(filepath.Join(d.cfg.Server.DataDir, "position"), position, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.start()
	until(t, s, "/web") // what the backup does not have goes
	d.entry("/new")
	until(t, s, "/new", "/web")
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(from, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(from, path)
		return os.Chmod(filepath.Join(to, rel), info.Mode().Perm())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// An agent that is banned stops, and a restart does not bring it back.
func TestBanned(t *testing.T) {
	d := newDomain(t)
	cfg := d.agentConfig()
	a, err := agent.New(cfg, logger(t, "agent"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { done <- a.Run(ctx) }()
	within(t, a.Ready())
	d.ban()
	select {
	case err := <-done:
		if fault.ReasonOf(err) != "agent_banned" {
			t.Errorf("Run() = %v", err)
		}
	case <-time.After(wait):
		t.Fatal("a banned agent goes on")
	}
}

// The three ways to recognise the server, and who is not it (L, FM39).
func TestBootstrap(t *testing.T) {
	d, other := newDomain(t), newDomain(t)
	b, err := d.srv.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	pemFile, docFile := filepath.Join(dir, "b.pem"), filepath.Join(dir, "b.json")
	os.WriteFile(pemFile, b.MarshalPEM(), 0o600)
	os.WriteFile(docFile, b.Marshal(), 0o600)
	for name, change := range map[string]func(*agent.Settings){
		"pem file":      func(s *agent.Settings) { s.TrustBundlePath = pemFile },
		"document file": func(s *agent.Settings) { s.TrustBundlePath, s.TrustBundleFormat = docFile, "spiffe" },
		"insecure":      func(s *agent.Settings) { s.InsecureBootstrap = true },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := d.agentConfig()
			cfg.Agent.TrustBundleHash = ""
			change(&cfg.Agent)
			_, stop := d.agent(cfg)
			stop()
		})
	}
	for name, change := range map[string]func(*agent.Settings){
		"pem file":    func(s *agent.Settings) { s.TrustBundleHash, s.TrustBundlePath = "", pemFile },
		"pinned hash": func(*agent.Settings) {},
	} {
		t.Run("not the server: "+name, func(t *testing.T) {
			cfg := d.agentConfig()
			cfg.Agent.ServerPort = other.cfg.Server.BindPort // same name, other keys
			cfg.Agent.JoinToken = other.token()
			change(&cfg.Agent)
			a, err := agent.New(cfg, logger(t, "agent"))
			if err != nil {
				t.Fatal(err)
			}
			if err := a.Run(t.Context()); fault.ReasonOf(err) != "server_untrusted" {
				t.Errorf("Run() = %v", err)
			}
			if n := len(other.agentIDs()); n != 0 {
				t.Errorf("%d agents were let in by a server that is not trusted", n)
			}
		})
	}
	t.Run("token used twice", func(t *testing.T) {
		cfg := d.agentConfig()
		_, stop := d.agent(cfg)
		stop()
		cfg.Agent.DataDir += "2"
		a, err := agent.New(cfg, logger(t, "agent"))
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Run(t.Context()); fault.KindOf(err) != fault.Denied {
			t.Errorf("Run() = %v", err)
		}
	})
}

// gate is a way to the server that can be closed: new connections are refused and
// those that are open end.
type gate struct {
	t        *testing.T
	to, addr string
	mu       sync.Mutex // guards everything below
	listener net.Listener
	conns    map[net.Conn]bool
	passed   int
}

func newGate(t *testing.T, to string) *gate {
	g := &gate{t: t, to: to, conns: map[net.Conn]bool{}, addr: fmt.Sprintf("127.0.0.1:%d", reserve(t))}
	g.open()
	t.Cleanup(g.close)
	return g
}

func (g *gate) open() {
	g.t.Helper()
	l, err := net.Listen("tcp", g.addr)
	if err != nil {
		g.t.Fatal(err)
	}
	g.mu.Lock()
	g.listener = l
	g.mu.Unlock()
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", g.to)
			if err != nil {
				in.Close()
				continue
			}
			g.mu.Lock()
			if g.listener != l { // it was closed meanwhile
				g.mu.Unlock()
				in.Close()
				out.Close()
				return
			}
			g.conns[in], g.conns[out] = true, true
			g.passed++
			g.mu.Unlock()
			go func() { io.Copy(in, out); in.Close() }()
			go func() { io.Copy(out, in); out.Close() }()
		}
	}()
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.listener != nil {
		g.listener.Close()
	}
	g.listener = nil
	for c := range g.conns {
		c.Close()
	}
	clear(g.conns)
}

func (g *gate) used() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.conns) > 0
}

func (g *gate) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.passed
}

// An agent of two servers keeps to one, goes to the other when that one is gone,
// and does not come back of itself. What is served goes on.
func TestSeveralServers(t *testing.T) {
	d := newDomain(t)
	gates := []*gate{newGate(t, d.addr), newGate(t, d.addr)}
	cfg := d.agentConfig()
	cfg.Agent.ServerAddress, cfg.Agent.ServerPort = "", 0
	cfg.Agent.ServerAddresses = []string{gates[0].addr, gates[1].addr}
	a, stop := d.agent(cfg)
	defer stop()
	d.entry("/web")
	w, served := watch(t, a, "/web"), []string{"/web"}
	entry := func(path string) {
		t.Helper()
		d.entry(path)
		served = append(served, path)
		slices.Sort(served)
		until(t, w, served...)
	}
	for round := range 3 {
		kept := slices.IndexFunc(gates, (*gate).used)
		if kept < 0 {
			t.Fatal("the agent has no connection")
		}
		other := gates[1-kept]
		before := other.count()
		gates[kept].close()
		entry(fmt.Sprintf("/away%d", round))
		gates[kept].open()
		back := gates[kept].count()
		entry(fmt.Sprintf("/back%d", round))
		if other.count() == before || gates[kept].count() != back {
			t.Errorf("round %d: %d connections to the other server, %d back to the first", round, other.count()-before, gates[kept].count()-back)
		}
	}
}
