// Package agent is the agent role: it builds the graph of an agent and runs it.
// An agent proves its node to a server, keeps its own SVID fresh, mirrors what
// it is granted and serves the Workload API.
//
// What must always hold: a credential is removed only after its replacement is
// durable; two agents never share a data directory (R61); while the server is
// away, what has not expired is served (R56); every state that cannot mend
// itself ends the agent with a sentence that says what it needs.
package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/agentapi"
	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/machine"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/plastron/plastron/internal/sds"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/systemd"
	"github.com/plastron/plastron/internal/workloadapi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
)

// Version is what an agent reports to the server.
const Version = "0.1.0"

// socketName is what the Workload API's socket is called in a socket unit.
const socketName = "workload"

// Agent is made by New and runs once.
type Agent struct {
	cfg       Config
	joining   joining
	log       *slog.Logger
	keeper    keys.Config
	prover    builtin.ProverConfig
	attestor  string // the node attestor's name
	attestors []workloadPlugin
	via       process.Via
	ready     chan struct{}
	metrics   *monitor.Metrics // nil: nobody can read them
	count     counters
	route     *serverlink.Route
	asked     asked
	webRoots  *x509.CertPool // by which a bundle's URL is trusted; nil: those of the machine

	own    atomic.Pointer[credential]    // the SVID in use; nil before the first attestation
	bundle atomic.Pointer[bundle.Bundle] // the own trust domain's, as last known
}

type workloadPlugin struct {
	name   string
	config builtin.WorkloadConfig
}

// New returns an agent that has not started. It reads no file but those that
// the plugins' configuration names.
func New(cfg Config, log *slog.Logger) (*Agent, error) {
	cfg, joining, err := cfg.withTicket()
	if err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, joining: joining, log: log, ready: make(chan struct{})}
	faults := []error{cfg.validate()}
	for _, p := range cfg.Plugins {
		if p.On() {
			faults = append(faults, a.plug(p))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	if disk, ok := a.keeper.(*builtin.AgentDiskKeys); ok && disk.Directory == "" {
		disk.Directory = cfg.Agent.DataDir
	}
	a.metrics = monitor.NewMetrics(&a.cfg.Telemetry, role, cfg.Agent.TrustDomain.Name())
	a.count = newCounters(a.metrics)
	a.joining.token = a.joining.token && a.attestor == jointoken.Name
	addresses := append(slices.Clone(cfg.Agent.addresses()), joining.others...)
	a.route = serverlink.NewRoute(addresses[0], addresses[1:]...)
	if n := len(cfg.Agent.ServerAddresses); n > 1 {
		a.route.Begin(rand.IntN(n)) // so that not all agents begin with the same server
	}
	return a, nil
}

// plug makes the configuration of one plugin. Validate has found its name known.
func (a *Agent) plug(p config.Plugin) error {
	var dst any
	switch p.Type {
	case typeKeyManager:
		for _, row := range builtin.AgentKeepers() {
			if row.Name == p.Name {
				a.keeper = row.New()
				dst = a.keeper
			}
		}
	case typeNodeAttestor:
		for _, row := range builtin.NodeProvers() {
			if row.Name == p.Name {
				a.attestor, a.prover = row.Name, row.New()
				dst = a.prover
			}
		}
	case typeWorkloadAttestor:
		for _, row := range builtin.WorkloadAttestors() {
			if row.Name == p.Name {
				c := row.New()
				a.attestors = append(a.attestors, workloadPlugin{row.Name, c})
				dst = c
			}
		}
	}
	if dst == nil {
		return nil // Validate says what is wrong with it
	}
	return p.Configure(dst)
}

// Ready is closed once the agent serves and knows what it is granted.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// rights returns what the configured plugins need, once the agent is at work.
func (a *Agent) rights() (need process.Right) {
	for _, p := range a.attestors {
		if r, ok := p.config.(interface{ ReadsPrograms() bool }); ok && r.ReadsPrograms() {
			need |= process.SeePrograms | process.ReadPrograms
		}
		if r, ok := p.config.(interface{ ReadsFiles() bool }); ok && r.ReadsFiles() {
			need |= process.ReadPrograms
		}
	}
	if a.attestor != jointoken.Name {
		need |= process.ReadPrograms // of what the node proves itself with, next time
	}
	return need
}

// GiveUpRights gives up, for the whole process, every capability that the agent
// does not need once it is Ready, and says what it cannot do by those it never had.
func (a *Agent) GiveUpRights() {
	need := a.rights()
	if err := process.KeepOnly(need); err != nil {
		a.log.Info("capabilities that are not needed are kept", "err", err)
	}
	if need&process.SeePrograms == 0 {
		return
	}
	if !process.Has(process.SeePrograms) {
		a.log.Warn("without CAP_SYS_PTRACE the selectors unix:path and unix:sha256 cannot be read of other users' processes")
	} else if !process.Has(process.ReadPrograms) {
		a.log.Warn("without CAP_DAC_READ_SEARCH the selectors unix:path and unix:sha256 cannot be read of programs that this user may not read or reach")
	}
}

// SocketPath returns where the Workload API is served.
func (a *Agent) SocketPath() string { return a.cfg.Agent.SocketPath }

// Run runs the agent until ctx is done or it cannot go on.
func (a *Agent) Run(ctx context.Context) error {
	started := time.Now()
	dir, err := openDataDir(a.cfg.Agent.DataDir, a.log)
	if err != nil {
		return err
	}
	defer dir.Close()
	keeper, err := a.keeper.Open(ctx)
	if err != nil {
		return err
	}
	var attestors []workloadapi.Attestor
	for _, p := range a.attestors {
		opened, err := p.config.Open(ctx)
		if err != nil {
			return err
		}
		attestors = append(attestors, workloadapi.Attestor{Name: p.name, Attestor: opened})
	}
	link, err := serverlink.New(a.linkConfig())
	if err != nil {
		return err
	}
	defer link.Close()

	kept, err := a.openCache(keeper)
	if err != nil {
		return err
	}
	l := newLife(ctx, a, dir, keeper, link)
	l.cache = kept
	var changed func(bool)
	if kept != nil {
		changed = kept.changed
	}
	m := mirror.New(mirror.Config{
		TrustDomain: a.cfg.Agent.TrustDomain.TrustDomain, Link: mirrorLink{link, l}, Version: Version,
		CacheSize: a.cfg.Agent.X509SVIDCacheMaxSize, JWTCacheSize: a.cfg.Agent.JWTSVIDCacheMaxSize, KeyType: keys.Type(a.cfg.Agent.WorkloadKeyType),
		Directive: l.direct, OwnBundle: l.setBundle, StreamEnded: l.streamEnded, Changed: changed, Hint: link.Hint, Boot: machine.Uptime, Log: a.log,
	})
	kept.restore(ctx, m, a.own.Load(), a.bundle.Load())
	checks := a.needs(m.Stats)
	stopHealth, err := a.showHealth(ctx, m.Stats, checks)
	if err != nil {
		return err
	}
	defer stopHealth()
	passed, err := systemd.Socket(socketName)
	if err != nil {
		return err
	}
	secrets := a.secrets()
	api, err := workloadapi.Open(workloadapi.Config{
		SocketPath: a.cfg.Agent.SocketPath, Passed: passed, TrustDomain: a.cfg.Agent.TrustDomain.TrustDomain, Mirror: m, Attestors: attestors, Via: a.via,
		AllowUnauthenticatedVerifiers: a.cfg.Agent.AllowUnauthenticatedVerifiers,
		AllowedForeignJWTClaims:       a.cfg.Agent.AllowedForeignJWTClaims,
		Health:                        func() error { return monitor.Ready(checks) },
		Secrets:                       secretsAt(secrets), SecretsPath: a.cfg.Agent.SDS.SocketPath, SecretsApart: a.cfg.Agent.DisableSDSAPI,
		Log: a.log, Call: a.count.call,
	})
	if err != nil {
		return err
	}
	a.gauges(m, checks, api, secrets)
	stopMetrics, err := a.showMetrics(ctx)
	if err != nil {
		return errors.Join(err, api.Close())
	}
	defer stopMetrics()

	admin, err := a.openAdmin(
		statuses{agent: a, mirror: m, link: link, api: api, secrets: secrets, started: started}.register,
		whys{agent: a, mirror: m, attestors: attestors}.register,
		loggers{Logger: rpc.Logger{Log: a.log}}.register,
	)
	if err != nil {
		return errors.Join(err, api.Close())
	}

	// The socket is there from the start: callers are told to try again until the
	// agent knows what there is (WEP-6-c).
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return api.Run(ctx) })
	// Ready for the service manager is not in step with the server: a node must start
	// without one.
	if err := systemd.Notify(systemd.Ready); err != nil {
		a.log.Warn("the service manager was not told", "err", err)
	}
	stopping := sync.OnceFunc(func() { _ = systemd.Notify(systemd.Stopping) })
	context.AfterFunc(ctx, stopping)
	defer stopping() // a stop may be over before the other has begun
	g.Go(func() error { systemd.Watchdog(ctx, func() { m.Stats() }); return nil })
	g.Go(func() error { return l.identity.Run(ctx) })
	if kept != nil {
		g.Go(func() error { kept.run(ctx, m, a.own.Load); return nil })
	}
	if admin != nil {
		g.Go(func() error { return admin.Run(ctx) })
	}
	g.Go(func() error {
		select {
		case <-l.admitted:
		case <-ctx.Done():
			return nil
		}
		g.Go(func() error { return m.Run(ctx) })
		select {
		case <-m.Synced():
			close(a.ready)
		case <-ctx.Done():
		}
		return nil
	})
	if err := g.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// secrets makes Envoy's secret discovery.
func (a *Agent) secrets() *sds.Service {
	set := a.cfg.Agent
	return sds.New(sds.Config{Names: set.SDS.names(), Plain: set.SDS.DisableSPIFFECertValidation,
		AllowUnauthenticatedVerifiers: set.AllowUnauthenticatedVerifiers, Log: a.log})
}

// secretsAt adds it to a socket of the Workload API's, which knows its callers.
func secretsAt(secrets *sds.Service) func(grpc.ServiceRegistrar, *workloadapi.Server) {
	return func(to grpc.ServiceRegistrar, socket *workloadapi.Server) {
		secrets.Register(to, func(ctx context.Context) (sds.Caller, error) {
			x, err := socket.Session(ctx)
			if err != nil {
				return nil, err
			}
			return x, nil
		})
	}
}

// openAdmin makes the admin socket. Nobody asked for the default one, so an agent
// that cannot make it works without: nil.
func (a *Agent) openAdmin(services ...func(grpc.ServiceRegistrar)) (*agentapi.Server, error) {
	s, err := agentapi.Open(agentapi.Config{SocketPath: a.cfg.Agent.adminSocketPath(), Services: services, Log: a.log})
	switch {
	case err == nil:
		return s, nil
	case a.cfg.Agent.AdminSocketPath != "":
		return nil, wrap("admin_socket_path", err)
	}
	a.log.Warn("no admin socket; set admin_socket_path to have one", "err", err)
	return nil, nil
}

// linkConfig says how to reach the server, and how both sides are recognised:
// always by what the agent holds at that moment.
func (a *Agent) linkConfig() serverlink.Config {
	return serverlink.Config{
		Route:       a.route,
		TrustDomain: a.cfg.Agent.TrustDomain.TrustDomain,
		Roots: func() []*x509.Certificate {
			if b := a.bundle.Load(); b != nil {
				return b.Roots()
			}
			return nil
		},
		Certificate: func() *tls.Certificate {
			if own := a.own.Load(); own != nil {
				return &tls.Certificate{Certificate: own.chain, PrivateKey: own.key}
			}
			return nil
		},
	}
}

// mirrorLink is the link as the mirror wants it.
type mirrorLink struct {
	*serverlink.Client
	life *life
}

// Follow implements mirror.Link.
func (l mirrorLink) Follow(ctx context.Context) (mirror.Stream, error) {
	l.life.shown = l.life.agent.own.Load()
	s, err := l.Client.Follow(ctx)
	if err != nil {
		return nil, err
	}
	return &heard{Stream: s, life: l.life}, nil
}

// heard tells the identity of the first message of a conversation: the server is
// ours, and accepts the SVID.
type heard struct {
	mirror.Stream
	life *life
	once sync.Once
}

// Recv implements mirror.Stream.
func (h *heard) Recv() (*syncv1.ServerMessage, error) {
	m, err := h.Stream.Recv()
	if err == nil {
		h.once.Do(func() {
			h.life.identity.Post(agentid.Accepted{})
			h.life.cache.accepted()
		})
	}
	return m, err
}

func wrap(doing string, err error) error { return fmt.Errorf("%s: %w", doing, err) }
