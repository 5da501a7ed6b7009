package system_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// spireFront makes a SPIRE server of ours: it passes on every call but those to
// services that SPIRE has not. To do so it stands in for the server towards the
// agent and for the agent towards the server, with keys that only a test can have.
type spireFront struct {
	d      *deployment
	port   int // of the server behind it
	own    tls.Certificate
	server *grpc.Server
	done   chan struct{}

	mu    sync.Mutex // guards everything below
	up    map[string]*grpc.ClientConn
	calls map[string]int
}

// startFront puts a front before the server that is running, at the port.
func (d *deployment) startFront(port, behind int) *spireFront {
	d.t.Helper()
	f := &spireFront{d: d, port: behind, up: map[string]*grpc.ClientConn{}, calls: map[string]int{}, done: make(chan struct{})}
	key := newKey(d.t)
	roots := f.roots().X509Authorities()
	for _, ca := range d.authorityKeys() {
		for _, root := range roots {
			if !ca.PublicKey.Equal(root.PublicKey) {
				continue
			}
			der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
				SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
				KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
				BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: d.trustDomain, Path: "/spire/server"}},
			}, root, &key.PublicKey, ca)
			if err != nil {
				d.t.Fatal(err)
			}
			f.own = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
		}
	}
	l, err := net.Listen("tcp", net.JoinHostPort(d.host, strconv.Itoa(port)))
	if err != nil {
		d.t.Fatal(err)
	}
	f.server = grpc.NewServer(grpc.UnknownServiceHandler(f.pass), grpc.ForceServerCodec(rawCodec{}),
		grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{f.own}, ClientAuth: tls.RequestClientCert})))
	go func() { defer close(f.done); f.server.Serve(l) }()
	d.t.Cleanup(f.stop)
	return f
}

func (f *spireFront) stop() {
	f.server.Stop()
	<-f.done
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, conn := range f.up {
		conn.Close()
		delete(f.up, name)
	}
}

func (f *spireFront) roots() *x509bundle.Bundle {
	f.d.t.Helper()
	roots, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString(f.d.trustDomain), []byte(f.d.run("server", "bundle", "show", "-socketPath", f.d.adminSocket())))
	if err != nil {
		f.d.t.Fatal(err)
	}
	return roots
}

// count returns how often a method was called.
func (f *spireFront) count(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

// pass passes on one call.
func (f *spireFront) pass(_ any, down grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(down)
	f.mu.Lock()
	f.calls[method[strings.LastIndex(method, "/")+1:]]++
	f.mu.Unlock()
	if strings.HasPrefix(method, "/plastron.") {
		service, _, _ := strings.Cut(method[1:], "/")
		return status.Errorf(codes.Unimplemented, "unknown service %s", service)
	}
	ctx, cancel := context.WithCancel(down.Context())
	defer cancel()
	conn, err := f.upstream(ctx)
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	up, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method, grpc.ForceCodec(rawCodec{}))
	if err != nil {
		return err
	}
	go func() {
		for {
			var m []byte
			if err := down.RecvMsg(&m); err != nil {
				up.CloseSend()
				return
			}
			if up.SendMsg(&m) != nil {
				return // the other direction says why
			}
		}
	}()
	for {
		var m []byte
		switch err := up.RecvMsg(&m); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if err := down.SendMsg(&m); err != nil {
			return err
		}
	}
}

// upstream is a connection to the server that shows what the caller has shown.
func (f *spireFront) upstream(ctx context.Context) (*grpc.ClientConn, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("no peer")
	}
	var shown tls.Certificate
	name := "stranger"
	if chain := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates; len(chain) > 0 {
		name = chain[0].SerialNumber.String()
		for _, c := range chain {
			shown.Certificate = append(shown.Certificate, c.Raw)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if conn := f.up[name]; conn != nil {
		return conn, nil
	}
	config := tlsconfig.TLSClientConfig(bundleFile{f.d}, tlsconfig.AuthorizeMemberOf(spiffeid.RequireTrustDomainFromString(f.d.trustDomain)))
	if len(shown.Certificate) > 0 {
		leaf, err := x509.ParseCertificate(shown.Certificate[0])
		if err != nil {
			return nil, err
		}
		keys, err := keyFile(f.d.path("agent/keys.json"))
		if err != nil {
			return nil, err
		}
		for _, key := range keys {
			if key.PublicKey.Equal(leaf.PublicKey) {
				shown.PrivateKey = key
			}
		}
		if shown.PrivateKey == nil {
			return nil, errors.New("the agent's key is not in its file")
		}
		config.Certificates = []tls.Certificate{shown}
	}
	conn, err := grpc.NewClient(net.JoinHostPort(f.d.host, strconv.Itoa(f.port)), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err == nil {
		f.up[name] = conn
	}
	return conn, err
}

// bundleFile is the trust domain's bundle as bundle.pem has it.
type bundleFile struct{ d *deployment }

func (b bundleFile) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return x509bundle.Load(td, b.d.path("bundle.pem"))
}

// forward passes on connections as they are, from one port to another, until stop.
func forward(t *testing.T, host string, from, to int) (stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(from)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	pump := func(a, b net.Conn) { defer a.Close(); defer b.Close(); io.Copy(a, b) }
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", net.JoinHostPort(host, strconv.Itoa(to)))
			if err != nil {
				in.Close()
				continue
			}
			wg.Go(func() { pump(in, out) })
			wg.Go(func() { pump(out, in) })
			wg.Go(func() { <-ctx.Done(); in.Close(); out.Close() })
		}
	})
	stop = sync.OnceFunc(func() { cancel(); l.Close(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// served is whether processes like this one have an identity.
func (d *deployment) served() bool {
	return exec.Command(plastron, "agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket(), "-silent").Run() == nil
}

// TestAgentOnSPIREServer is the life of our agent on a server with SPIRE's services
// only, which becomes one of ours and back, and ends with a ban.
func TestAgentOnSPIREServer(t *testing.T) {
	d := newDeployment(t)
	d.serverOptions = `agent_ttl = "40s"` // renewed in about 20 s, and good for as long while the server restarts
	d.startServer()
	behind, before := d.port, freePort(t)
	token, id := d.token()
	d.writeBundle()
	front := d.startFront(before, behind)
	d.port = before
	d.startAgent(token)

	// A change is in force at the next poll: created, changed, deleted.
	first := d.createEntry(id, "/web", nil, mine())
	d.waitServed()
	d.run("agent", "api", "fetch", "jwt", "-audience", "db", "-socketPath", d.workloadSocket())
	all := d.agents()
	if len(all) != 1 || all[0].AgentVersion == "" {
		t.Errorf("agents %v, want one with its version", all)
	}
	if _, err := d.entries().BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{first.Id}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a deleted entry is not served", func() bool { return !d.served() })
	d.createEntry(id, "/web2", nil, mine())
	d.waitServed()

	// The agent renews by RenewAgent, and the workload is served all the while.
	serial := d.agents()[0].X509SvidSerialNumber
	eventually(t, "the agent renews", func() bool { return d.agents()[0].X509SvidSerialNumber != serial })
	d.waitServed()
	if out := d.agent.Output(); !strings.Contains(out, "sync_unsupported") || strings.Contains(out, "attesting again") {
		t.Errorf("the agent does not say that it polls, or attested again:\n%s", out)
	}
	for _, method := range []string{"SyncAuthorizedEntries", "GetBundle", "BatchNewX509SVID", "NewJWTSVID", "RenewAgent", "PostStatus"} {
		if front.count(method) == 0 {
			t.Errorf("%s was never called", method)
		}
	}

	// The server goes and comes back.
	d.server.stop(syscall.SIGTERM)
	if !d.served() {
		t.Error("nothing is served while the server is away") // R56
	}
	d.port = behind
	d.startServer()
	d.createEntry(id, "/after", nil, mine())
	d.hasPath("/after")

	// One of ours in its place is followed: a change is acknowledged at once.
	if d.acknowledges(id) {
		t.Error("an agent that polls acknowledges changes")
	}
	front.stop()
	stop := forward(t, d.host, before, behind)
	eventually(t, "the server is followed", func() bool { return d.acknowledges(id) })
	stop()
	d.startFront(before, behind)
	d.createEntry(id, "/polled", nil, mine())
	d.hasPath("/polled")

	if _, err := agentv1.NewAgentClient(dialUnix(t, d.adminSocket())).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(id)}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.agent.done:
	case <-time.After(patience):
		t.Fatal("the agent goes on although it is banned")
	}
	if out := d.agent.Output(); !strings.Contains(out, "is banned") {
		t.Errorf("the agent does not say why it ends:\n%s", out)
	}
}

// acknowledges reports whether the agent says of a change that it is in force.
func (d *deployment) acknowledges(agent string) bool {
	d.t.Helper()
	err := exec.Command(plastron, "server", "entry", "create", "-entryID", "probe", "-parentID", agent, "-spiffeID", "spiffe://"+d.trustDomain+"/probe",
		"-selector", mine(), "-socketPath", d.adminSocket(), "-wait", "2s").Run()
	d.run("server", "entry", "delete", "-entryID", "probe", "-socketPath", d.adminSocket())
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.ExitCode() != 3) {
		d.t.Fatal(err)
	}
	return err == nil
}

// hasPath waits until processes like this one are given an ID with that path.
func (d *deployment) hasPath(path string) {
	d.t.Helper()
	eventually(d.t, path+" is served", func() bool {
		out, err := exec.Command(plastron, "agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket()).CombinedOutput()
		return err == nil && strings.Contains(string(out), "spiffe://"+d.trustDomain+path)
	})
}

// TestReattestingAgentOnSPIREServer is an agent that attests again instead of
// renewing, and when a SPIRE server has forgotten it.
func TestReattestingAgentOnSPIREServer(t *testing.T) {
	d := newDeployment(t)
	pki := newNodePKI(d)
	pki.node("node-1")
	d.serverOptions = `agent_ttl = "12s"`
	d.attestBy(`NodeAttestor "x509pop" { plugin_data { ca_bundle_path = "` + d.path("nodes-ca.pem") + `"
    agent_path_template = "/x509pop/cn/{{ .Subject.CommonName }}" } }`)
	d.startServer()
	d.writeBundle()
	behind, before := d.port, freePort(t)
	front := d.startFront(before, behind)
	d.port = before
	d.startAgent("")
	id := "spiffe://" + d.trustDomain + "/spire/agent/x509pop/cn/node-1"
	d.createEntry(id, "/web", func(e *spiretypes.Entry) { e.X509SvidTtl = 3600 }, mine())
	d.waitServed()
	serial := d.agents()[0].X509SvidSerialNumber
	eventually(t, "the agent attests again", func() bool { return d.agents()[0].X509SvidSerialNumber != serial })
	if front.count("RenewAgent") > 0 {
		t.Error("an agent that can attest again asked to renew")
	}
	if _, err := agentv1.NewAgentClient(dialUnix(t, d.adminSocket())).DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: wireID(id)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the node is back", func() bool { return len(d.agents()) == 1 })
	d.createEntry(id, "/back", nil, mine())
	d.hasPath("/back")
}
