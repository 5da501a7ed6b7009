// Package system_test drives the built binary as its users do: real processes,
// real sockets, real databases, outside clients.
package system_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/test/parts"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// patience is how long a test waits for an event that takes a second or two on an
// idle machine.
const patience = 120 * time.Second

// plastron is the binary under test, built once by TestMain.
var plastron string

func TestMain(m *testing.M) {
	if role := os.Getenv("SYSTEM_TEST_ROLE"); role != "" {
		os.Exit(workloadMain(role))
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

// process is a child that the test started and stops by its own process id.
type process struct {
	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait, after done

	mu  sync.Mutex
	out bytes.Buffer
}

// Write collects what the child prints.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

// Output is what the child has printed so far.
func (p *process) Output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// start runs a command until the test ends or stop is called.
func start(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p, p
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %v: %v", cmd.Args, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.stop(syscall.SIGTERM)
		if t.Failed() {
			// The end alone: a log of tests is cut, and why it failed stands above.
			if out := p.Output(); len(out) > 4000 {
				t.Logf("%v printed at last:\n…%s", cmd.Args, out[len(out)-4000:])
			} else if out != "" {
				t.Logf("%v printed:\n%s", cmd.Args, out)
			}
		}
	})
	return p
}

// stop signals the process and waits for its end.
func (p *process) stop(sig syscall.Signal) {
	p.t.Helper()
	select {
	case <-p.done:
		return
	default:
	}
	p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(patience):
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
		p.t.Errorf("%v did not stop on %v", p.cmd.Args, sig)
	}
}

// deployment is one server and one agent with their own directories.
type deployment struct {
	t             testing.TB
	dir           string
	host          string // address the server listens on
	port          int
	trustDomain   string
	server, agent *process
	program       string // of the server
	dataStore     string // the DataStore block
	serverOptions string // extra lines for the server block
	agentOptions  string
	agentCache    string // cache_directory; empty: none
	agentPlugins  string // more blocks of plugins
	// The NodeAttestor blocks; newDeployment sets join_token.
	serverAttestor, agentAttestor string
	serverPrefix                  []string // command to run the server under, such as nsenter
	agentPrefix                   []string
	agentAttr                     *syscall.SysProcAttr // the agent's own, such as a namespace
}

// newDeployment prepares directories; nothing runs yet.
func newDeployment(t testing.TB) *deployment {
	t.Helper()
	dir, err := os.MkdirTemp("", "p") // short: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // other uids reach the socket
		t.Fatal(err)
	}
	return &deployment{t: t, dir: dir, host: "127.0.0.1", port: freePort(t), trustDomain: "example.org", program: plastron, dataStore: `DataStore "sqlite" { plugin_data {} }`,
		serverAttestor: `NodeAttestor "join_token" { plugin_data {} }`, agentAttestor: `NodeAttestor "join_token" { plugin_data {} }`}
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

func (d *deployment) path(name string) string { return filepath.Join(d.dir, name) }
func (d *deployment) adminSocket() string     { return d.path("admin/api.sock") }
func (d *deployment) workloadSocket() string  { return d.path("public/api.sock") }

// startServer writes the configuration, starts the server and waits until it is healthy.
func (d *deployment) startServer() {
	d.t.Helper()
	d.launchServer()
	d.waitHealthy("server")
}

// launchServer does not wait.
func (d *deployment) launchServer() { d.launchWith(d.program) }

// launchWith launches the server with another program.
func (d *deployment) launchWith(program string) {
	d.t.Helper()
	d.write("server.conf", d.serverConfig())
	args := append(append([]string{}, d.serverPrefix...), program, "server", "run", "-config", d.path("server.conf"))
	d.server = start(d.t, exec.Command(args[0], args[1:]...))
}

// serverConfig is the server's configuration.
func (d *deployment) serverConfig() string {
	return fmt.Sprintf(`server {
  bind_address = %q
  bind_port    = %d
  socket_path  = %q
  trust_domain = %q
  data_dir     = %q
  %s
}
plugins {
  %s
  KeyManager "disk" { plugin_data { keys_path = %q } }
  %s
}
`, d.host, d.port, d.adminSocket(), d.trustDomain, d.path("server"), d.serverOptions, d.dataStore, d.path("server/keys.json"), d.serverAttestor)
}

// startAgent starts the agent with a fresh token (or none) and waits until it is healthy.
func (d *deployment) startAgent(token string) {
	d.t.Helper()
	d.writeBundle()
	d.write("agent.conf", d.agentConfig(token))
	args := append(append([]string{}, d.agentPrefix...), plastron, "agent", "run", "-config", d.path("agent.conf"))
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = d.agentAttr
	d.agent = start(d.t, cmd)
	d.waitHealthy("agent")
}

// agentConfig is the agent's configuration, with a token or with none.
func (d *deployment) agentConfig(token string) string {
	if token != "" {
		token = fmt.Sprintf("join_token = %q", token)
	}
	cache := d.agentCache
	if cache == "" {
		cache = "none" // not outside of the test's directories
	}
	return fmt.Sprintf(`agent {
  data_dir          = %q
  server_address    = %q
  server_port       = %d
  socket_path       = %q
  trust_domain      = %q
  trust_bundle_path = %q
  cache_directory   = %q
  %s
  %s
}
plugins {
  %s
  KeyManager "disk" { plugin_data { directory = %q } }
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
  %s
}
`, d.path("agent"), d.host, d.port, d.workloadSocket(), d.trustDomain, d.path("bundle.pem"), cache, token, d.agentOptions, d.agentAttestor, d.path("agent"), d.agentPlugins)
}

// start brings up both, the agent with its own new token; it returns the agent's ID.
func (d *deployment) start() string {
	d.t.Helper()
	d.startServer()
	token, id := d.token()
	d.startAgent(token)
	return id
}

// token has the server make a join token; it returns it and the agent ID it leads to.
func (d *deployment) token() (token, id string) {
	d.t.Helper()
	out := d.run("server", "token", "generate", "-socketPath", d.adminSocket())
	for line := range strings.Lines(out) {
		if v, ok := strings.CutPrefix(line, "Token:"); ok {
			token = strings.TrimSpace(v)
		}
		if _, v, ok := strings.Cut(line, "spiffe://"); ok {
			id = "spiffe://" + strings.TrimSpace(v)
		}
	}
	if token == "" || id == "" {
		d.t.Fatalf("token generate printed:\n%s", out)
	}
	return token, id
}

func (d *deployment) writeBundle() {
	d.t.Helper()
	d.write("bundle.pem", d.run("server", "bundle", "show", "-socketPath", d.adminSocket()))
}

func (d *deployment) write(name, text string) {
	d.t.Helper()
	if err := os.WriteFile(d.path(name), []byte(text), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

// run runs a plastron command to its end and returns what it printed.
func (d *deployment) run(args ...string) string {
	d.t.Helper()
	out, err := exec.Command(plastron, args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("plastron %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// waitHealthy waits until `plastron ROLE healthcheck` succeeds.
func (d *deployment) waitHealthy(role string) {
	d.t.Helper()
	socket, p := d.adminSocket(), d.server
	if role == "agent" {
		socket, p = d.workloadSocket(), d.agent
	}
	eventually(d.t, role+" is healthy", func() bool {
		select {
		case <-p.done:
			d.t.Fatalf("the %s ended: %v\n%s", role, p.err, p.Output())
		default:
		}
		return exec.Command(plastron, role, "healthcheck", "-socketPath", socket).Run() == nil
	})
}

// eventually polls an outside fact until it holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-deadline:
			t.Fatalf("never came: %s", what)
		case <-tick.C:
		}
	}
}

// dialUnix opens a gRPC connection to a Unix socket.
func dialUnix(t testing.TB, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// entries is the entry API over the admin socket.
func (d *deployment) entries() entryv1.EntryClient {
	d.t.Helper()
	return entryv1.NewEntryClient(dialUnix(d.t, d.adminSocket()))
}

// createEntry registers path for parent and selectors ("unix:uid:0") and returns the entry.
func (d *deployment) createEntry(parent, path string, edit func(*spiretypes.Entry), selectors ...string) *spiretypes.Entry {
	d.t.Helper()
	e := &spiretypes.Entry{
		ParentId: wireID(parent),
		SpiffeId: wireID("spiffe://" + d.trustDomain + path),
	}
	for _, s := range selectors {
		typ, value, _ := strings.Cut(s, ":")
		e.Selectors = append(e.Selectors, &spiretypes.Selector{Type: typ, Value: value})
	}
	if edit != nil {
		edit(e)
	}
	resp, err := d.entries().BatchCreateEntry(context.Background(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
	if err != nil {
		d.t.Fatal(err)
	}
	if st := resp.Results[0].Status; st.Code != 0 {
		d.t.Fatalf("create %s: %s", path, st.Message)
	}
	return resp.Results[0].Entry
}

func wireID(s string) *spiretypes.SPIFFEID {
	td, path, _ := strings.Cut(strings.TrimPrefix(s, "spiffe://"), "/")
	return &spiretypes.SPIFFEID{TrustDomain: td, Path: "/" + path}
}

// workloadAPI is a raw Workload API client, without any SPIFFE library around it.
func (d *deployment) workloadAPI() workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(dialUnix(d.t, d.workloadSocket()))
}

// withHeader adds the security header that every call must carry.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func mine() string { return "unix:uid:" + strconv.Itoa(os.Getuid()) }

// waitServed waits until the agent has an SVID for processes like this one: a
// new entry takes a moment to reach it, and a caller without one is turned away.
func (d *deployment) waitServed() {
	d.t.Helper()
	eventually(d.t, "an SVID", func() bool {
		return exec.Command(plastron, "agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket(), "-silent").Run() == nil
	})
}
