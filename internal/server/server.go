// Package server is the server as a whole: its configuration, and the graph of
// everything that a running one consists of. It decides nothing but the order
// in which things start and stop.
package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys/memkeys"
	"github.com/plastron/plastron/internal/machine"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/servers"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/systemd"
	"github.com/plastron/plastron/internal/upkeep"
	"github.com/plastron/plastron/internal/upstream"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
)

// Version is what this server says it runs, in its audit trail.
const Version = "0.1.0"

// Server is one server of a trust domain.
type Server struct {
	cfg  Config
	plan plan
	log  *slog.Logger

	ready    chan struct{} // closed when it serves; the fields below are set by then
	addr     net.Addr
	registry *registry.Registry
	checks   []monitor.Check

	fleet atomic.Pointer[servers.Servers] // set before it serves
}

// New checks the configuration and returns a server that has not started.
// Nothing is opened or written yet.
func New(cfg Config, log *slog.Logger) (*Server, error) {
	p, err := cfg.plan()
	if err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, plan: p, log: log, ready: make(chan struct{})}, nil
}

// Ready is closed when the server accepts connections and can issue.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Addr is where agents connect, once Ready.
func (s *Server) Addr() net.Addr { return s.addr }

// SocketPath is the admin socket.
func (s *Server) SocketPath() string { return s.cfg.Server.SocketPath }

// Bundle is the trust domain's bundle, once Ready.
func (s *Server) Bundle() (b *bundle.Bundle, err error) {
	s.registry.View(func(snap *registry.Snapshot) { b, err = snap.Bundle(s.cfg.Server.TrustDomain.TrustDomain) })
	return b, err
}

// Run serves until ctx is done, then drains and closes everything. It returns
// nil after an orderly stop.
func (s *Server) Run(ctx context.Context) (err error) {
	set := &s.cfg.Server
	td := set.TrustDomain.TrustDomain
	closing := func(what string, close func() error) {
		if closeErr := close(); closeErr != nil {
			err = errors.Join(err, fmt.Errorf("close %s: %w", what, closeErr))
		}
	}
	started := time.Now()
	s.warn(ctx)
	// It comes first and ends last, so that a start and a stop that take long can be watched.
	stopHealth, err := s.showHealth(ctx)
	if err != nil {
		return err
	}
	defer stopHealth()

	// 1. Files: the directory, who this server is, the audit trail, the store.
	if err := os.MkdirAll(set.DataDir, 0o700); err != nil {
		return fmt.Errorf("make data_dir: %w", err)
	}
	lock, err := lockDataDir(set.DataDir)
	if err != nil {
		return err
	}
	defer closing("lock of data_dir", lock.Close)
	at, err := place(set.DataDir)
	if err != nil {
		return err
	}
	opened, err := s.openStore(ctx, false)
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	defer closing("store", opened.Close)
	metrics := monitor.NewMetrics(&s.cfg.Telemetry, role, td.Name())
	count := s.counters(metrics)
	st := &watched{Store: opened, count: count.commit}
	id, err := serverID(set.DataDir)
	if err != nil {
		return err
	}
	trail, err := audit.Open(audit.Config{
		Path: filepath.Join(set.DataDir, "audit.log"), Server: id, Version: Version, Strict: set.AuditStrict, Log: s.log, Seen: count.event,
	})
	if err != nil {
		return err
	}
	defer closing("audit trail", trail.Close)

	// 2. The trust domain in memory. What it commits goes on record.
	reg, err := registry.Open(ctx, st, td, s.log)
	if err != nil {
		return err
	}
	reg.Batches(recordBatches(trail))

	// 3. Engines.
	followers := serverapi.NewFollowers(id, reg)
	var addresses atomic.Pointer[[]string] // known once it listens
	fleet := servers.New(servers.Config{
		TrustDomain: td, ID: id, Registry: reg, Shared: opened.Shared, Lease: cmp.Or(s.plan.life.Outage, s.plan.life.X509),
		Place: at, Version: Version, Started: started, Boot: machine.Uptime, Log: s.log,
		Differs: count.differs,
		Intruder: func(id string) {
			trail.Note(audit.Alarm{Subject: id, Reason: "server_expelled", Detail: "an expelled server still writes into the store"})
		},
		Report: func() servers.Report {
			r := followers.Report(time.Now())
			if known := addresses.Load(); known != nil {
				r.Addresses = *known
			}
			return r
		},
	})
	s.fleet.Store(fleet)
	keeper, err := s.plan.keeper.Open(ctx)
	if err != nil {
		return fmt.Errorf("open key manager: %w", err)
	}
	var above upstream.Authority // nil: none
	if s.plan.upstream != nil {
		if above, err = s.plan.upstream.Open(ctx, upstream.Env{TrustDomain: td, Log: s.log}); err != nil {
			return fmt.Errorf("open upstream authority: %w", err)
		}
		if c, ok := above.(io.Closer); ok {
			defer closing("upstream authority", c.Close)
		}
	}
	remembered := revokedFile(filepath.Join(set.DataDir, "revoked.json"))
	revoked, err := remembered.read()
	if err != nil {
		return err
	}
	auth, err := authority.New(authority.Config{
		TrustDomain: td, ServerID: id, Keeper: gate{keeper, fleet.MaySign}, Registry: reg, Log: s.log,
		May: fleet.MaySign, MayPrune: fleet.MayPrune, Peers: authority.Known,
		TTL: s.plan.life.CA, KeyType: s.plan.caKey, JWTKeyType: s.plan.jwtKey, MaxWait: time.Duration(set.AuthorityMaxWait),
		Revoked: revoked, Remember: remembered.write,
		Upstream: above, Alarm: func(id, reason, detail string) { trail.Note(audit.Alarm{Subject: id, Reason: reason, Detail: detail}) },
	})
	if err != nil {
		return err
	}
	x509Issuer, jwtIssuer := ask(fleet.MaySign, auth.X509), ask(fleet.MaySign, auth.JWT)
	verifiers, checkers := map[string]nodeattest.Verifier{}, map[string]nodeattest.FactChecker{}
	for name, config := range s.plan.attestors {
		if verifiers[name], err = config.Open(ctx, nodeattest.Env{TrustDomain: td, Roots: roots(reg, td), Log: s.log}); err != nil {
			return fmt.Errorf("open node attestor %q: %w", name, err)
		}
		if c, ok := verifiers[name].(nodeattest.FactChecker); ok {
			checkers[name] = c
		}
	}
	engine := nodes.New(nodes.Config{
		TrustDomain: td, Registry: reg, Audit: trail, Verifiers: verifiers, Issuer: x509Issuer, Stale: fleet.Stale, MayPrune: fleet.MayPrune,
		Lifetimes: s.plan.life, ReattestPeriod: time.Duration(set.AgentReattestPeriod), Log: s.log,
	})

	keep := upkeep.New(upkeep.Config{
		Store: opened, TrustDomain: td, Registry: reg, Intact: opened.Check, Trail: filepath.Join(set.DataDir, "audit.log"), Log: s.log,
	})

	// 4. Loops. They outlive the API, which drains through them.
	loops, stopLoops := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLoops()
	background, loops := errgroup.WithContext(loops)
	background.Go(func() error { return trail.Run(loops) })
	background.Go(func() error { return reg.Run(loops) })
	defer func() {
		stopLoops()
		err = errors.Join(err, background.Wait())
	}()
	if err := fleet.Start(ctx); err != nil {
		return err
	}
	reg.Batches(func(b store.Batch) { // a key of another server may wait to hear that this one has it
		if opened.Shared && changesBundle(b, td) {
			fleet.Poke()
		}
	})
	defer s.stopSigning(ctx, fleet)
	background.Go(func() error { return fleet.Run(loops) })
	if err := auth.Start(ctx); err != nil {
		return fmt.Errorf("prepare signing keys: %w", err)
	}
	own := &ownSVID{
		trustDomain: td, life: s.plan.life, issuer: x509Issuer, audit: trail, log: s.log, wake: make(chan struct{}, 1),
		look: make(chan struct{}, 1), bundle: func() (b *bundle.Bundle, err error) {
			reg.View(func(snap *registry.Snapshot) { b, err = snap.Bundle(td) })
			return b, err
		},
	}
	reg.Batches(func(b store.Batch) {
		if changesBundle(b, td) {
			own.changed()
		}
	})
	if err := own.rotate(time.Now()); err != nil {
		return fmt.Errorf("issue the server's own certificate: %w", err)
	}
	publishers, err := s.publishers(ctx, reg, count.published)
	if err != nil {
		return err
	}
	for _, p := range publishers {
		background.Go(func() error { return p.run(loops) })
	}
	background.Go(func() error { return auth.Run(loops) })
	background.Go(func() error { return own.run(loops) })
	background.Go(func() error { return engine.Run(loops) })
	if !opened.KeepFormat {
		background.Go(func() error { return reg.RaiseFormat(loops) })
	}
	background.Go(func() error { return keep.Run(loops) })

	// 5. The API.
	listener, err := net.Listen("tcp", set.address())
	if err != nil {
		return fault.New(fault.Precondition, "listen_failed", "cannot listen on %s: %v", set.address(), err).
			Fix("stop what listens there, or choose another bind_port")
	}
	serving, stopServing := context.WithCancel(ctx)
	defer stopServing()
	context.AfterFunc(loops, stopServing) // a loop that fails takes the server down
	s.addr, s.registry = listener.Addr(), reg
	reached := reachable(listener.Addr(), os.Hostname)
	addresses.Store(&reached)
	fleet.Poke()
	s.checks = append(s.needs(serving, st, auth, own, trail), s.fleetChecks(fleet)...)
	s.checks = append(s.checks, publisherCheck(publishers)...)
	api := serverapi.New(serverapi.Config{
		TrustDomain: td, Registry: reg, Followers: followers, Nodes: engine, Audit: trail, Authority: auth,
		X509: x509Issuer, JWT: jwtIssuer, Certificate: own.certificate, Stale: fleet.Stale, Remember: s.plan.life.X509,
		Shared: opened.Shared, Poke: fleet.Poke, Servers: fleet,
		Health: func() error { return monitor.Ready(s.checks) }, Lacking: func() []error { return monitor.Lacking(s.checks) }, Admins: s.plan.admins, Addresses: reached,
		Lifetimes: s.plan.life, JWTIssuer: set.JWTIssuer,
		Unconstrained: set.UnconstrainedDownstream, PublishJWT: auth.Publisher(),
		About: serverapi.About{
			ServerID: id, Version: Version, Started: started, DataDir: set.DataDir, SocketPath: set.SocketPath,
			StoreKind: opened.Kind, StoreDir: opened.Dir, StoreAddress: opened.Address,
			StoreSize: opened.Size, StoreHealth: st.healthy, CheckStore: opened.Check, Commits: st.written.Load,
		},
		Upkeep:          keep,
		Checkers:        checkers,
		RulePairs:       set.RulePairsPerAgent,
		UnlimitedAttest: off(set.RateLimit.Attestation), UnlimitedSigning: off(set.RateLimit.Signing), Log: s.log, Count: count.api,
	})
	s.gauges(metrics, id, api, auth, own, trail)
	s.fleetGauges(metrics, fleet)
	stopMetrics, err := s.showMetrics(ctx, metrics)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	defer stopMetrics()
	background.Go(func() error {
		systemd.Watchdog(loops, func() { reg.View(func(*registry.Snapshot) {}) })
		return nil
	})
	stopping := sync.OnceFunc(func() { _ = systemd.Notify(systemd.Stopping) })
	context.AfterFunc(serving, stopping)
	defer stopping() // a stop may be over before the other has begun
	return api.Run(serving, listener, set.SocketPath, func() {
		s.log.InfoContext(ctx, "server ready", "trust_domain", td.Name(), "peer", s.addr.String(), "dir", set.DataDir)
		close(s.ready)
		if err := systemd.Notify(systemd.Ready); err != nil {
			s.log.WarnContext(ctx, "the service manager was not told", "err", err)
		}
		debug.FreeOSMemory() // what loading left behind is several times what it made
	})
}

// reachable says where others reach what listens at an address: there, or if that
// is every address of this machine, at its name. Nothing, if it has no name.
func reachable(at net.Addr, hostname func() (string, error)) []string {
	tcp, ok := at.(*net.TCPAddr)
	if !ok {
		return nil
	}
	host := tcp.AddrPort().Addr().Unmap().WithZone("").String()
	if tcp.IP.IsUnspecified() {
		name, err := hostname()
		if host = strings.ToLower(name); err != nil || host == "" {
			return nil
		}
	}
	return []string{net.JoinHostPort(host, strconv.Itoa(tcp.Port))}
}

// roots are the X.509 authorities of the own bundle, as they are when it is called.
func roots(reg *registry.Registry, td spiffeid.TrustDomain) func() []*x509.Certificate {
	return func() (out []*x509.Certificate) {
		reg.View(func(s *registry.Snapshot) {
			if b, err := s.Bundle(td); err == nil {
				out = b.Roots()
			}
		})
		return out
	}
}

// warn names settings that work but may surprise.
func (s *Server) warn(ctx context.Context) {
	for _, text := range s.cfg.warnings(&s.plan) {
		s.log.WarnContext(ctx, "setting works but may surprise", "reason", text)
	}
}

func (c *Config) warnings(p *plan) (out []string) {
	if _, memory := p.keeper.(*memkeys.Config); memory {
		out = append(out, "KeyManager memory: after a restart agents no longer recognise this server, because its signing keys are gone")
	}
	if w, ok := p.store.(interface{ Warnings() []string }); ok {
		for _, text := range w.Warnings() {
			out = append(out, "DataStore: "+text)
		}
	}
	longest := min(p.life.CA/6, 7*24*time.Hour)
	for _, key := range []struct {
		name string
		ttl  time.Duration
	}{
		{"agent_ttl", time.Duration(c.Server.AgentTTL)},
		{"default_jwt_svid_ttl", p.life.JWT},
		{"default_x509_svid_ttl", p.life.X509},
	} {
		if key.ttl > longest { // F7
			out = append(out, fmt.Sprintf("server.%s: rotation of the authority may cut SVIDs short, because it is more than %s, a sixth of ca_ttl or a week", key.name, longest))
		}
	}
	return out
}

// Warnings says what the server will log of settings that work but may surprise,
// and which files it could not read on this machine. It only reads.
func (c *Config) Warnings(ctx context.Context) []string {
	p, err := c.plan()
	if err != nil {
		return nil // the faults come first
	}
	out := c.warnings(&p)
	env := nodeattest.Env{TrustDomain: c.Server.TrustDomain.TrustDomain, Log: slog.New(slog.DiscardHandler),
		Roots: func() []*x509.Certificate { return nil }}
	if p.upstream != nil {
		if _, err := p.upstream.Open(ctx, upstream.Env{TrustDomain: c.Server.TrustDomain.TrustDomain, Log: env.Log}); err != nil {
			out = append(out, fmt.Sprintf("plugins.UpstreamAuthority: on this machine: %s", fault.Sentence(err)))
		}
	}
	for name, n := range p.notifiers {
		if _, err := n.Open(ctx); err != nil {
			out = append(out, fmt.Sprintf("plugins.Notifier %q: on this machine: %s", name, fault.Sentence(err)))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.attestors)) {
		if _, err := p.attestors[name].Open(ctx, env); err != nil {
			out = append(out, fmt.Sprintf("plugins.NodeAttestor %q: on this machine: %s", name, fault.Sentence(err)))
		}
	}
	return out
}

// serverID is a random name that this server keeps in its data directory.
func serverID(dir string) (string, error) {
	path := filepath.Join(dir, "server-id")
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		id := make([]byte, 16)
		rand.Read(id)
		text := hex.EncodeToString(id)
		return text, writeNew(path, text+"\n")
	}
	if err != nil {
		return "", err
	}
	text := strings.TrimSuffix(string(b), "\n")
	if id, err := hex.DecodeString(text); err != nil || len(id) != 16 {
		return "", fault.New(fault.Precondition, "server_id_invalid", "%q does not hold a server id", path).
			Fix("restore it from a backup of data_dir")
	}
	return text, nil
}

// writeNew writes a small file whole or not at all.
func writeNew(path, text string) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func off(limit *bool) bool { return limit != nil && !*limit }
