// Package serverapi is the server's wire: gRPC on a TCP port with mTLS and on
// the admin's Unix socket. It decides who may call what (access.go, one table),
// within which limits (limits.go), and how our words look on the wire. What a
// call means is decided by the registry and the engines.
//
// What must always hold: a call without a row in the table is refused (R15); an
// answer is given for who the caller is now, not for who it was when it
// connected (R124); nothing is signed for a grant that the registry does not
// say is the caller's, and only after it is on record (R1, R14).
package serverapi

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	applyv1 "github.com/plastron/plastron/api/plastron/apply/v1"
	authorityv1 "github.com/plastron/plastron/api/plastron/authority/v1"
	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	joinv1 "github.com/plastron/plastron/api/plastron/join/v1"
	lifetimev1 "github.com/plastron/plastron/api/plastron/lifetime/v1"
	nodev1 "github.com/plastron/plastron/api/plastron/node/v1"
	receiptv1 "github.com/plastron/plastron/api/plastron/receipt/v1"
	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	storev1 "github.com/plastron/plastron/api/plastron/store/v1"
	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	whyv1 "github.com/plastron/plastron/api/plastron/why/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	localauthorityv1 "github.com/plastron/plastron/internal/api/spire/api/server/localauthority/v1"
	loggerv1 "github.com/plastron/plastron/internal/api/spire/api/server/logger/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/localsocket"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/plastron/plastron/internal/servers"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/internal/upkeep"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
)

// drainLimit is how long calls under way may take after shutdown began (R102).
const drainLimit = 8 * time.Second

// Config is what the wire stands on.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Registry    *registry.Registry
	Followers   *Followers // nil: not shared with anybody
	Nodes       *nodes.Engine
	Audit       *audit.Writer
	Authority   *authority.Authority // whose keys operators see and change
	X509        func(now time.Time) (*svid.X509Issuer, error)
	JWT         func(now time.Time) (*svid.JWTIssuer, error)
	Certificate func() (*tls.Certificate, error) // the server's own, rotating
	Health      func() error                     // nil: can serve and issue
	Lacking     func() []error                   // without what it goes on for a while; may be nil
	About       About
	Upkeep      *upkeep.Upkeep // of the store

	// Shared says that other servers may work on the same store.
	Shared bool
	// Poke has the server's row written soon, which says how far the agents are that
	// follow here. Nil: nobody reads it.
	Poke func()
	// Servers knows the others; nil: there are none.
	Servers *servers.Servers

	// Stale says why nothing is to be granted that was not granted before, if so (R77);
	// nil: never. What was granted is remembered for the time of Remember at least.
	Stale    func() error
	Remember time.Duration

	Addresses []string      // where agents reach this server, host:port
	Admins    []spiffeid.ID // have an operator's rights over TCP
	Lifetimes lifetime.Set  // of entries that name none, and what they must keep; of authorities below ours
	JWTIssuer string        // iss claim; empty: none
	// Unconstrained leaves the name constraint out of authorities below ours.
	Unconstrained bool
	// PublishJWT makes the key of a downstream server known above us and returns all
	// keys that are; nil: nobody is above us, or takes none.
	PublishJWT func(context.Context, bundle.JWTAuthority) ([]bundle.JWTAuthority, error)
	// Checkers are the node attestors that can find out what runs on a node, by name.
	Checkers  map[string]nodeattest.FactChecker
	RulePairs int // of a rule and facts that one agent may have alive; 0: DefaultRulePairs

	// UnlimitedAttest and UnlimitedSigning switch the rate limits off.
	UnlimitedAttest, UnlimitedSigning bool

	Log   *slog.Logger
	Count Counters

	room room // zero: the defaults; smaller ones are for tests
}

// Counters are told what happens, for those who measure. Nil ones are not called.
type Counters struct {
	// Call is told of each call that ends; see rpc.Meter.
	Call func(method, code, reason string, took time.Duration)
	// Attested is told how each attestation ended. attestor is what the node says.
	Attested func(attestor string, err error)
	// Delta is told of each delta that an agent is sent, Acknowledged how long it
	// took from then until the agent said that it has it.
	Delta        func()
	Acknowledged func(took time.Duration)
}

// Server serves the API. All methods may be called concurrently.
type Server struct {
	cfg       Config
	table     map[string]rule
	admins    map[spiffeid.ID]bool
	gates     map[queue]*gate
	rootCache rootCache
	followers *Followers
	guard     rpc.Guard
	meter     rpc.Meter
	pairs     *pairs
	looks     *looks
	renewals  *renewals
	signing   sync.RWMutex  // read-locked from the question what an agent is granted until what follows is signed
	closing   chan struct{} // closed when shutdown begins
}

// New returns a server that is not listening yet.
func New(cfg Config) *Server {
	s := &Server{
		cfg: cfg, table: access(), admins: map[spiffeid.ID]bool{}, gates: map[queue]*gate{}, closing: make(chan struct{}),
		pairs:     newPairs(cfg.RulePairs),
		renewals:  newRenewals(cfg.Remember),
		rootCache: rootCache{roots: map[spiffeid.TrustDomain]*cachedRoots{}},
		followers: cfg.Followers,
		meter:     rpc.Meter{Tell: cfg.Count.Call},
	}
	if s.followers == nil {
		s.followers = NewFollowers(cfg.About.ServerID, cfg.Registry)
	}
	s.guard.Log = cfg.Log
	s.looks = newLooks(&s.guard)
	if s.cfg.room == (room{}) {
		s.cfg.room = room{all: maxConnections, strangers: maxStrangers, perAddress: maxPerAddress}
	}
	for _, id := range cfg.Admins {
		s.admins[id] = true
	}
	speeds := paces()
	if cfg.UnlimitedAttest {
		speeds[queueAttest] = pace{}
	}
	if cfg.UnlimitedSigning {
		speeds[queueSign], speeds[queueRenew] = pace{}, pace{}
	}
	for q, width := range widths() {
		s.gates[q] = newGate(speeds[q], width)
	}
	return s
}

// Panics returns how many handlers panicked. It is for health and for tests:
// any number but zero is a bug (R99).
func (s *Server) Panics() uint64 { return s.guard.Panics.Load() }

// Run serves TCP on one listener and the admin socket at a path until ctx is
// done, then drains. It closes both. ready, if not nil, is called when both accept.
func (s *Server) Run(ctx context.Context, tcp net.Listener, socketPath string, ready func()) error {
	local, err := localsocket.Listen(socketPath, localsocket.Private(), localsocket.Bind)
	if err != nil {
		return errors.Join(err, tcp.Close())
	}
	remoteServer, localServer := s.grpcServer(s.tlsHandshake), s.grpcServer(s.localHandshake)
	s.register(remoteServer)
	s.register(localServer)
	grpc_health_v1.RegisterHealthServer(localServer, health{server: s})
	s.meter.Learn(remoteServer)
	s.meter.Learn(localServer)
	s.cfg.Registry.Batches(func(b store.Batch) {
		if s.followers.batch(b) {
			s.poke()
		}
	})

	// Each returns nil when it is stopped, an error when its listener breaks,
	// which takes the other down too.
	ended := make(chan error, 2)
	serve := func(g *grpc.Server, l net.Listener) {
		err := g.Serve(l)
		if errors.Is(err, grpc.ErrServerStopped) { // before it began
			err = nil
		}
		ended <- err
	}
	go serve(remoteServer, newDoor(tcp, s.cfg.room, s.cfg.Log))
	go serve(localServer, newDoor(local, s.cfg.room, s.cfg.Log))
	if ready != nil {
		ready()
	}
	running := 2
	select {
	case <-ctx.Done():
	case err = <-ended:
		running--
	}
	close(s.closing)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		remoteServer.GracefulStop()
		localServer.GracefulStop()
	}()
	select {
	case <-drained:
	case <-time.After(drainLimit):
		remoteServer.Stop()
		localServer.Stop()
	}
	for range running {
		err = errors.Join(err, <-ended)
	}
	s.looks.close()
	return err
}

func (s *Server) grpcServer(handshake rpc.Handshake) *grpc.Server {
	return grpc.NewServer(
		grpc.Creds(handshake),
		grpc.UnaryInterceptor(s.meter.Unary(s.unary)),
		grpc.StreamInterceptor(s.meter.Stream(s.stream)),
		grpc.ConnectionTimeout(handshakeLimit),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxAnswer),
		grpc.InitialWindowSize(streamWindow),
		grpc.InitialConnWindowSize(connectionWindow),
		grpc.ReadBufferSize(8<<10),
		grpc.WriteBufferSize(16<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: idleLimit, MaxConnectionAge: connectionAge, MaxConnectionAgeGrace: connectionGrace,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing}),
	)
}

func (s *Server) register(to grpc.ServiceRegistrar) {
	agentv1.RegisterAgentServer(to, agents{server: s})
	bundlev1.RegisterBundleServer(to, bundles{server: s})
	entryv1.RegisterEntryServer(to, entries{server: s})
	localauthorityv1.RegisterLocalAuthorityServer(to, localAuthorities{server: s})
	loggerv1.RegisterLoggerServer(to, loggers{Logger: rpc.Logger{Log: s.cfg.Log}})
	svidv1.RegisterSVIDServer(to, svids{server: s})
	syncv1.RegisterSyncServer(to, syncs{server: s})
	lifetimev1.RegisterLifetimeServer(to, lifetimes{server: s})
	issuev1.RegisterIssueServer(to, issues{server: s})
	joinv1.RegisterJoinServer(to, joins{server: s})
	authorityv1.RegisterAuthorityServer(to, authorities{server: s})
	cutoffv1.RegisterCutoffServer(to, cutoffs{server: s})
	applyv1.RegisterApplyServer(to, applies{server: s})
	nodev1.RegisterNodeServer(to, nodeCalls{server: s})
	receiptv1.RegisterReceiptServer(to, receipts{server: s})
	whyv1.RegisterEntriesServer(to, whys{server: s})
	statusv1.RegisterServerServer(to, statuses{server: s})
	storev1.RegisterStoreServer(to, storeCalls{server: s})
	rulev1.RegisterRulesServer(to, rules{server: s})
}
