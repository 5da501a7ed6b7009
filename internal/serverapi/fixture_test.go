package serverapi_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/memkeys"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/servers"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/internal/upkeep"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// deadline is how long a test waits for what must come.
const deadline = time.Minute

var td = spiffeid.RequireTrustDomainFromString("example.org")

// rig is a whole server without its role: real store, real sockets.
type rig struct {
	t         *testing.T
	api       *serverapi.Server
	registry  *registry.Registry
	nodes     *nodes.Engine
	authority *authority.Authority
	audit     *audit.Writer
	trail     string
	sqlite    *sqlite.Store
	servers   *servers.Servers // nil: the rig is alone
	store     *countingStore
	addr      string
	socket    string
	admin     *grpc.ClientConn
	stop      func()
	panics    uint64 // that the test causes
}

// countingStore counts what is asked of a store.
type countingStore struct {
	store.Store
	reads, writes atomic.Int64
	away          atomic.Bool // commits are refused
}

func (c *countingStore) Load(ctx context.Context, f func(string, uint64, []byte) error) (store.Position, error) {
	c.reads.Add(1)
	return c.Store.Load(ctx, f)
}

func (c *countingStore) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	c.writes.Add(1)
	if c.away.Load() {
		results := make([]store.Result, len(txns))
		for i := range results {
			results[i].Err = fault.New(fault.Unavailable, "store_unavailable", "the store is away")
		}
		return results
	}
	return c.Store.Commit(ctx, txns)
}

type option func(*serverapi.Config, *nodes.Config)

// strict makes the audit trail one that refuses what it cannot record.
func strict(t *testing.T) option {
	return func(c *serverapi.Config, n *nodes.Config) {
		w, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "strict.log"), Server: "s1", Strict: true, Log: c.Log})
		if err != nil {
			t.Fatal(err)
		}
		c.Audit, n.Audit = w, w
		t.Cleanup(func() { w.Close() })
	}
}

func newRig(t *testing.T, options ...option) *rig {
	t.Helper()
	st, err := sqlite.Config{Dir: t.TempDir()}.Open(t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return newRigOver(t, st, "s1", options...)
}

// newRigOver returns one more server over a store.
func newRigOver(t *testing.T, st *sqlite.Store, id string, options ...option) *rig {
	t.Helper()
	log := slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	dir, err := os.MkdirTemp("", "plastron") // short: socket paths are
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ctx, cancel := context.WithCancel(context.Background())
	must := func(err error) {
		t.Helper()
		if err != nil {
			cancel()
			t.Fatal(err)
		}
	}
	r := &rig{t: t, sqlite: st, socket: filepath.Join(dir, "private", "api.sock"), trail: filepath.Join(dir, "audit.log")}
	r.store = &countingStore{Store: st}
	r.registry, err = registry.Open(ctx, r.store, td, log)
	must(err)
	registryDone := make(chan struct{})
	registryCtx, stopRegistry := context.WithCancel(context.Background())
	go func() { defer close(registryDone); r.registry.Run(registryCtx) }()
	r.audit, err = audit.Open(audit.Config{Path: r.trail, Server: id, Version: "test", Log: log})
	must(err)
	keeper, err := new(memkeys.Config).Open(ctx)
	must(err)
	r.authority, err = authority.New(authority.Config{
		TrustDomain: td, ServerID: id, Keeper: keeper, Registry: r.registry, TTL: time.Hour, KeyType: keys.ECP256, Log: log,
	})
	must(err)
	must(r.authority.Start(ctx))
	authorityDone := make(chan struct{})
	go func() { defer close(authorityDone); r.authority.Run(registryCtx) }()
	verifier, err := new(jointoken.Config).Open(ctx, nodeattest.Env{})
	must(err)
	nodesConfig := nodes.Config{
		TrustDomain: td, Registry: r.registry, Audit: r.audit, Issuer: r.authority.X509, Lifetimes: lifetime.Set{Agent: 10 * time.Minute}, Log: log,
		Verifiers: map[string]nodeattest.Verifier{jointoken.Name: verifier},
	}
	own := r.identity(identity.Server(td), time.Now().Add(time.Hour))
	cfg := serverapi.Config{
		TrustDomain: td, Registry: r.registry, Audit: r.audit, Authority: r.authority, X509: r.authority.X509, JWT: r.authority.JWT,
		Certificate: func() (*tls.Certificate, error) { return &own.cert, nil },
		Health:      func() error { return nil }, Lifetimes: lifetime.Set{X509: time.Hour, JWT: 5 * time.Minute, CA: 30 * time.Minute}, Log: log,
		UnlimitedAttest: true, UnlimitedSigning: true,
		Upkeep: upkeep.New(upkeep.Config{Store: st, TrustDomain: td, Registry: r.registry, Intact: st.Check, Trail: r.trail, Log: log}),
		About: serverapi.About{ServerID: id, Version: "test", StoreKind: "sqlite", StoreSize: st.Size,
			StoreHealth: func() error { return nil }, CheckStore: st.Check, Commits: func() uint64 { return 7 }, Started: time.Now()},
	}
	for _, o := range options {
		o(&cfg, &nodesConfig)
	}
	r.nodes = nodes.New(nodesConfig)
	cfg.Nodes, r.servers = r.nodes, cfg.Servers
	r.api = serverapi.New(cfg)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	r.addr = listener.Addr().String()
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- r.api.Run(ctx, listener, r.socket, func() { close(ready) }) }()
	r.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run() = %v", err)
		}
		stopRegistry()
		<-registryDone
		<-authorityDone
		r.audit.Close()
		if n := r.api.Panics(); n != r.panics {
			t.Errorf("%d handlers panicked", n) // R99
		}
		if _, err := audit.Verify(r.trail); err != nil {
			t.Errorf("audit trail: %v", err)
		}
		done <- nil
	}
	t.Cleanup(func() { r.stop() })
	select {
	case <-ready:
	case err := <-done:
		t.Fatalf("Run() = %v", err)
	}
	r.admin = r.dial("unix:"+r.socket, insecure.NewCredentials())
	return r
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(string(b))
	return len(b), nil
}

func (r *rig) dial(target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	r.t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return conn
}

// holder is somebody with a certificate.
type holder struct {
	id   spiffeid.ID
	cert tls.Certificate
	key  *ecdsa.PrivateKey
}

// identity signs a certificate without asking anybody.
func (r *rig) identity(id spiffeid.ID, end time.Time) holder {
	r.t.Helper()
	key := newKey(r.t)
	issuer, err := r.authority.X509(time.Now())
	if err != nil {
		r.t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		r.t.Fatal(err)
	}
	public, err := svid.ParsePublicKey(spki)
	if err != nil {
		r.t.Fatal(err)
	}
	prepared, err := issuer.Prepare(svid.Leaf{ID: id, Key: public, NotBefore: end.Add(-time.Hour), NotAfter: end})
	if err != nil {
		r.t.Fatal(err)
	}
	issued, err := prepared.Issue()
	if err != nil {
		r.t.Fatal(err)
	}
	return holder{id, tls.Certificate{Certificate: issued.Chain, PrivateKey: key}, key}
}

// connect opens a connection with a certificate, or with none.
func (r *rig) connect(h *holder) *grpc.ClientConn {
	r.t.Helper()
	// The server's certificate is checked as agents do: chain to the bundle, exact ID.
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			var roots []*x509.Certificate
			r.registry.View(func(s *registry.Snapshot) {
				if b, err := s.Bundle(td); err == nil {
					roots = b.Roots()
				}
			})
			var chain [][]byte
			for _, c := range state.PeerCertificates {
				chain = append(chain, c.Raw)
			}
			id, err := svid.VerifyX509(chain, roots, td, time.Now())
			if err == nil && id != identity.Server(td) {
				err = errors.New("not the server")
			}
			return err
		},
	}
	if h != nil {
		config.Certificates = []tls.Certificate{h.cert}
	}
	return r.dial("passthrough:///"+r.addr, credentials.NewTLS(config))
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	csr, err := svid.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func (r *rig) token() string {
	r.t.Helper()
	token, err := agentv1.NewAgentClient(r.admin).CreateJoinToken(r.t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		r.t.Fatal(err)
	}
	return token.Value
}

// attest tries to join with a token and a key.
func (r *rig) attest(conn *grpc.ClientConn, token string, key *ecdsa.PrivateKey, csr []byte) (holder, error) {
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(r.t.Context())
	if err != nil {
		return holder{}, err
	}
	defer stream.CloseSend()
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &spiretypes.AttestationData{Type: jointoken.Name, Payload: []byte(token)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil && !errors.Is(err, io.EOF) {
		return holder{}, err
	}
	reply, err := stream.Recv()
	if err != nil {
		return holder{}, err
	}
	return holderOf(reply.GetResult().GetSvid(), key), nil
}

func holderOf(s *spiretypes.X509SVID, key *ecdsa.PrivateKey) holder {
	id := spiffeid.RequireFromString("spiffe://" + s.GetId().GetTrustDomain() + s.GetId().GetPath())
	return holder{id, tls.Certificate{Certificate: s.CertChain, PrivateKey: key}, key}
}

// agent joins a new agent.
func (r *rig) agent() holder {
	r.t.Helper()
	key := newKey(r.t)
	h, err := r.attest(r.connect(nil), r.token(), key, newCSR(r.t, key))
	if err != nil {
		r.t.Fatal(err)
	}
	return h
}

func wireID(path string) *spiretypes.SPIFFEID {
	return &spiretypes.SPIFFEID{TrustDomain: td.Name(), Path: path}
}

func entryUnder(parent spiffeid.ID, path string) *spiretypes.Entry {
	return &spiretypes.Entry{
		SpiffeId: wireID(path), ParentId: wireID(parent.Path()), Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:1000"}},
	}
}

// create makes entries and expects each to succeed.
func (r *rig) create(entries ...*spiretypes.Entry) []*spiretypes.Entry {
	r.t.Helper()
	resp, err := entryv1.NewEntryClient(r.admin).BatchCreateEntry(r.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: entries})
	if err != nil {
		r.t.Fatal(err)
	}
	var made []*spiretypes.Entry
	for _, result := range resp.Results {
		if result.Status.Code != 0 {
			r.t.Fatalf("create: %v", result.Status)
		}
		made = append(made, result.Entry)
	}
	return made
}

// reasonOf returns the stable reason of a refused call.
func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.Reason
		}
	}
	return ""
}

// spireReason returns the reason that SPIRE's agents look for.
func spireReason(err error) spiretypes.PermissionDeniedDetails_Reason {
	for _, d := range status.Convert(err).Details() {
		if denied, ok := d.(*spiretypes.PermissionDeniedDetails); ok {
			return denied.Reason
		}
	}
	return 0
}

func wantCode(t *testing.T, what string, err error, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code || reason != "" && reasonOf(err) != reason {
		t.Errorf("%s = %v (%s), want %v (%s)", what, err, reasonOf(err), code, reason)
	}
}

// until waits for a condition that no event announces.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	look, late := time.NewTicker(2*time.Millisecond), time.After(deadline)
	defer look.Stop()
	for !holds() {
		select {
		case <-look.C:
		case <-late:
			t.Fatalf("it does not come that %s", what)
		}
	}
}
