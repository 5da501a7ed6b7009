package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/monitor/monitortest"
	"github.com/plastron/plastron/internal/server"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/test/parts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

const deadline = time.Minute

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "plastron")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func configFor(dir string) server.Config {
	c := server.Default()
	c.Server.BindAddress, c.Server.BindPort = "127.0.0.1", 0
	c.Server.SocketPath = filepath.Join(dir, "private", "api.sock")
	c.Server.DataDir = filepath.Join(dir, "data")
	c.Server.TrustDomain = config.TrustDomain{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")}
	return c
}

type running struct {
	*server.Server
	t     *testing.T
	admin *grpc.ClientConn
	stop  func()
}

func start(t *testing.T, c server.Config) *running { return startLogged(t, c, slog.DiscardHandler) }

func startLogged(t *testing.T, c server.Config, log slog.Handler) *running {
	t.Helper()
	s, err := server.New(c, slog.New(log))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	select {
	case <-s.Ready():
	case err := <-done:
		t.Fatalf("Run() = %v", err)
	case <-time.After(deadline):
		t.Fatal("the server does not get ready")
	}
	r := &running{Server: s, t: t, admin: dial(t, "unix:"+s.SocketPath(), insecure.NewCredentials())}
	stopped := false
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run() = %v", err)
			}
		case <-time.After(deadline):
			t.Fatal("the server does not stop")
		}
	}
	t.Cleanup(r.stop)
	return r
}

func dial(t *testing.T, target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// connect dials as an agent does; serial, if not nil, gets the server's serial number.
func (r *running) connect(cert *tls.Certificate, serial *string) *grpc.ClientConn {
	c := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			b, err := r.Bundle()
			if err != nil {
				return err
			}
			var chain [][]byte
			for _, cert := range state.PeerCertificates {
				chain = append(chain, cert.Raw)
			}
			id, err := svid.VerifyX509(chain, b.Roots(), b.TrustDomain, time.Now())
			if err == nil && id != identity.Server(b.TrustDomain) {
				return fault.New(fault.Denied, "not_the_server", "%s", id)
			}
			if serial != nil {
				*serial = state.PeerCertificates[0].SerialNumber.String()
			}
			return err
		},
	}
	if cert != nil {
		c.Certificates = []tls.Certificate{*cert}
	}
	return dial(r.t, "passthrough:///"+r.Addr().String(), credentials.NewTLS(c))
}

func (r *running) token() string {
	r.t.Helper()
	token, err := agentv1.NewAgentClient(r.admin).CreateJoinToken(r.t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		r.t.Fatal(err)
	}
	return token.Value
}

func (r *running) attest(token string) (tls.Certificate, *spiretypes.SPIFFEID, error) {
	r.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		r.t.Fatal(err)
	}
	csr, err := svid.NewCSR(key)
	if err != nil {
		r.t.Fatal(err)
	}
	stream, err := agentv1.NewAgentClient(r.connect(nil, nil)).AttestAgent(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &spiretypes.AttestationData{Type: "join_token", Payload: []byte(token)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	reply, err := stream.Recv()
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	s := reply.GetResult().GetSvid()
	return tls.Certificate{Certificate: s.CertChain, PrivateKey: key}, s.Id, nil
}

// follow opens a sync stream and returns the server's first word.
func (r *running) follow(cert *tls.Certificate, hello *syncv1.Hello) *syncv1.ServerMessage {
	r.t.Helper()
	stream, err := syncv1.NewSyncClient(r.connect(cert, nil)).Follow(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	if err := stream.Send(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Hello{Hello: hello}}); err != nil {
		r.t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

func TestRestart(t *testing.T) { // R21, R73, R76
	dir := shortDir(t)
	r := start(t, configFor(dir))
	used := r.token()
	cert, id, err := r.attest(used)
	if err != nil {
		t.Fatal(err)
	}
	unused := r.token()
	made, err := entryv1.NewEntryClient(r.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{
		SpiffeId: &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: "/web"}, ParentId: id, Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:1"}},
	}}})
	if err != nil || made.Results[0].Status.Code != 0 {
		t.Fatal(made, err)
	}
	before := r.follow(&cert, &syncv1.Hello{Version: 1}).GetInventory()
	r.stop()

	r = start(t, configFor(dir))
	m := r.follow(&cert, &syncv1.Hello{Version: 1, Position: before.Position, Hash: before.Hash})
	if current := m.GetCurrent(); current == nil || string(current.Position.Epoch) != string(before.Position.Epoch) {
		t.Errorf("after a restart: %v, want Current in the same epoch", m)
	}
	if _, _, err := r.attest(used); status.Code(err) != codes.PermissionDenied { // K3
		t.Errorf("a token used before the restart: %v", err)
	}
	if _, _, err := r.attest(unused); err != nil {
		t.Errorf("a token made before the restart: %v", err)
	}
	r.stop()
	if s, err := audit.Verify(filepath.Join(dir, "data", "audit.log")); err != nil || s.Lost != 0 { // R14
		t.Errorf("audit trail: %+v, %v", s, err)
	}
}

// TestRestoredStore puts an older copy of the store back: agents go on by hash,
// tokens of the time before are void (K16, R21).
func TestRestoredStore(t *testing.T) {
	dir := shortDir(t)
	r := start(t, configFor(dir))
	cert, _, err := r.attest(r.token())
	if err != nil {
		t.Fatal(err)
	}
	old := r.token()
	hash := r.follow(&cert, &syncv1.Hello{Version: 1}).GetInventory()
	r.stop()
	backup := filepath.Join(dir, "backup")
	if err := os.CopyFS(backup, os.DirFS(filepath.Join(dir, "data"))); err != nil {
		t.Fatal(err)
	}
	r = start(t, configFor(dir))
	r.token() // something that the backup does not have
	r.stop()
	// The database goes back to the copy; position stays, and tells.
	for _, name := range []string{"plastron.db", "plastron.db-wal", "plastron.db-shm"} {
		if err := os.Remove(filepath.Join(dir, "data", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(backup, name), filepath.Join(dir, "data", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}

	r = start(t, configFor(dir))
	m := r.follow(&cert, &syncv1.Hello{Version: 1, Position: hash.Position, Hash: hash.Hash})
	current := m.GetCurrent()
	if current == nil {
		t.Fatalf("an agent from before: %v, want Current", m)
	}
	if string(current.Position.Epoch) == string(hash.Position.Epoch) {
		t.Error("the restored store has the old epoch")
	}
	if _, _, err := r.attest(old); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a token from before: %v, want it void", err)
	}
	if _, _, err := r.attest(r.token()); err != nil {
		t.Errorf("a new token: %v", err)
	}
}

// TTL 12 s: the server's own certificate keeps up, and each of three is good when it is
// shown. A shorter life would ask of the machine that it never stands still for a moment.
func TestShortLives(t *testing.T) {
	c := configFor(shortDir(t))
	c.Server.CATTL, c.Server.DefaultX509SVIDTTL = config.Duration(72*time.Second), config.Duration(12*time.Second)
	c.Plugins = []config.Plugin{{Type: "KeyManager", Name: "memory"}, {Type: "DataStore", Name: "sqlite"}, {Type: "NodeAttestor", Name: "join_token"}}
	r := start(t, c)
	serials := map[string]bool{}
	late := time.After(4 * deadline)
	look := time.NewTicker(250 * time.Millisecond)
	defer look.Stop()
	for len(serials) < 3 {
		serial := ""
		conn := r.connect(nil, &serial)
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		_, err := entryv1.NewEntryClient(conn).CountEntries(ctx, &entryv1.CountEntriesRequest{})
		cancel()
		conn.Close()
		if status.Code(err) != codes.PermissionDenied { // it got as far as being refused
			t.Fatalf("connecting: %v", err)
		}
		serials[serial] = true
		select {
		case <-look.C:
		case <-late:
			t.Fatalf("%d certificates in %v, want 3", len(serials), 4*deadline)
		}
	}
}

func TestHealthAndStop(t *testing.T) { // R102, R105
	dir := shortDir(t)
	r := start(t, configFor(dir))
	got, err := grpc_health_v1.NewHealthClient(r.admin).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil || got.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("Check() = %v, %v", got, err)
	}
	cert, _, err := r.attest(r.token())
	if err != nil {
		t.Fatal(err)
	}
	r.follow(&cert, &syncv1.Hello{Version: 1}) // an open stream does not hold it up
	began := time.Now()
	r.stop()
	t.Logf("stopped in %v", time.Since(began))
	if _, err := os.Lstat(r.SocketPath()); err == nil {
		t.Error("the socket is left behind")
	}
	info, err := os.Stat(filepath.Join(dir, "data"))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("data_dir: %v, %v, want 0700", info.Mode(), err)
	}
}

// The health listener answers from before the store is opened until after the
// last call has ended, and tells the truth of each moment (R105).
func TestHealthListener(t *testing.T) {
	c := configFor(shortDir(t))
	port, err := parts.ReservePort() // so that nobody else listens there after the end
	if err != nil {
		t.Fatal(err)
	}
	defer port.Release()
	c.HealthChecks.ListenerEnabled, c.HealthChecks.BindPort = true, port.Number
	listeners := monitortest.New()
	r := startLogged(t, c, listeners)
	const kind = "health_checks"
	if status, body := listeners.Get(t, kind, "/live"); status != 200 || body != `{"status":"ok","checks":{"memory":{"status":"ok"}}}`+"\n" {
		t.Errorf("/live: %d %s", status, body)
	}
	status, body := listeners.Get(t, kind, "/ready")
	var got monitor.Report
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	checks := slices.Sorted(maps.Keys(got.Checks))
	want := []string{"admin_socket", "audit", "bundle", "certificate", "freshness", "jwt_authority", "replicas", "serving", "signing", "store", "x509_authority"}
	if status != 200 || got.Status != monitor.OK || !slices.Equal(checks, want) {
		t.Errorf("/ready: %d %s", status, body)
	}

	// A cleaner of /tmp takes the admin socket: agents are served all the same.
	if err := os.Remove(c.Server.SocketPath); err != nil {
		t.Fatal(err)
	}
	if status, body := listeners.Get(t, kind, "/ready"); status != 200 || !strings.Contains(body, `"admin_socket":{"status":"degraded","reason":"socket_unreachable"`) {
		t.Errorf("/ready without the admin socket: %d %s", status, body)
	}
	r.stop()
	if conn, err := net.Dial("tcp", listeners.Address(t, kind)); err == nil {
		conn.Close()
		t.Error("it listens after the server has ended")
	}

	t.Run("F14 address in use", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		c := configFor(shortDir(t))
		c.HealthChecks.ListenerEnabled, c.HealthChecks.BindPort = true, l.Addr().(*net.TCPAddr).Port
		c.HealthChecks.BindAddress = "127.0.0.1"
		s, err := server.New(c, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Run(t.Context()); fault.ReasonOf(err) != "listen_failed" {
			t.Errorf("Run() = %v, want listen_failed", err)
		}
		if _, err := os.Stat(c.Server.DataDir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("data_dir was made: %v", err)
		}
	})
}

func TestRunRefuses(t *testing.T) {
	run := func(t *testing.T, c server.Config) error {
		t.Helper()
		s, err := server.New(c, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		go func() {
			select {
			case <-s.Ready():
				cancel()
			case <-ctx.Done():
			}
		}()
		return s.Run(ctx)
	}
	t.Run("F6 R122 another trust domain", func(t *testing.T) {
		c := configFor(shortDir(t))
		start(t, c).stop()
		c.Server.TrustDomain = config.TrustDomain{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")}
		if err := run(t, c); fault.ReasonOf(err) != "trust_domain_changed" {
			t.Errorf("Run() = %v, want trust_domain_changed", err)
		}
	})
	t.Run("F13 two servers, one data_dir", func(t *testing.T) {
		c := configFor(shortDir(t))
		start(t, c)
		c.Server.SocketPath += "2"
		if err := run(t, c); fault.KindOf(err) != fault.Precondition {
			t.Errorf("Run() = %v, want fault.Precondition", err)
		}
	})
	t.Run("F14 address in use", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		c := configFor(shortDir(t))
		c.Server.BindPort = l.Addr().(*net.TCPAddr).Port
		if err := run(t, c); fault.ReasonOf(err) != "listen_failed" {
			t.Errorf("Run() = %v, want listen_failed", err)
		}
	})
	t.Run("F9 a file where the socket goes", func(t *testing.T) {
		c := configFor(shortDir(t))
		if err := os.MkdirAll(filepath.Dir(c.Server.SocketPath), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(c.Server.SocketPath, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := run(t, c); fault.ReasonOf(err) != "socket_path_taken" {
			t.Errorf("Run() = %v, want socket_path_taken", err)
		}
	})
}

func TestOwnCertificateIsAnSVID(t *testing.T) {
	r := start(t, configFor(shortDir(t)))
	conn, err := tls.Dial("tcp", r.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	leaf := conn.ConnectionState().PeerCertificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/spire/server" || leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("URIs %v, CA %v, key usage %v", leaf.URIs, leaf.IsCA, leaf.KeyUsage)
	}
	if _, err := tls.Dial("tcp", r.Addr().String(), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		t.Error("TLS 1.2 is accepted") // R123, Q2
	}
}
