// Package workloadapi is the agent's public socket: the SPIFFE Workload API,
// with the standard's five stable calls, and one by which a process asks why it
// is refused. It finds out who calls (process), what the caller is (the
// attestors), and hands out what the mirror has for it. Envoy's secret discovery
// (sds) is a guest: its callers are found out, limited and refused here.
//
// What must always hold: nothing is done for a call of the Workload API without
// the security header (R51); the caller is judged before and after attestation and once more
// before each message leaves, and what has changed or exited gets nothing
// (R37, R38, R40); every message is the whole state, the first comes at once,
// none is empty; every refusal carries a stable reason, and nothing of what is
// granted to others (R131); one user's load does not crowd out another's (R49).
package workloadapi

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/plastron/plastron/api/plastron/why/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/localsocket"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
)

// Limits of the listener (R97). Sizes are in bytes.
const (
	handshakeLimit = 10 * time.Second
	idleLimit      = 10 * time.Minute // of a connection without a call
	maxStreams     = 100              // of one connection
	maxHeaderList  = 16 << 10
	window         = 64 << 10  // received and not yet read, of a stream
	maxMessage     = 256 << 10 // received; a stream may hold as much of one that never becomes complete
	maxAnswer      = 64 << 20
	minPing        = 10 * time.Second
)

// Waits in a call.
const (
	readyWait    = 5 * time.Second // for SVIDs that are being signed
	attestLife   = time.Second     // of what was found out about a connection's process
	jwtWait      = 20 * time.Second
	maxAudiences = 64
	maxAudience  = 2048
	maxToken     = 64 << 10
)

// waits are those that tests cannot sit out.
type waits struct {
	request  time.Duration // from the headers of a call to the end of its request
	send     time.Duration // for a caller that does not read
	reattest time.Duration // between two looks at a stream's caller (R42)
}

// Config is what the socket stands on.
type Config struct {
	SocketPath  string   // at most 107 bytes
	Passed      *os.File // a socket at SocketPath that a service manager made; nil: it is made
	TrustDomain spiffeid.TrustDomain
	Mirror      *mirror.Mirror
	Attestors   []Attestor // all are asked; at least one
	Via         process.Via

	// AllowUnauthenticatedVerifiers gives the own trust domain's bundles to callers
	// without an identity.
	AllowUnauthenticatedVerifiers bool
	// AllowedForeignJWTClaims are returned of a foreign token besides sub, aud and exp.
	AllowedForeignJWTClaims []string
	Limits                  Limits
	Health                  func() error // nil: can serve what there is
	Log                     *slog.Logger

	// Secrets, if not nil, registers Envoy's secret discovery: at SocketPath, unless
	// SecretsApart is set, and at SecretsPath, if that is not empty, alone.
	Secrets      func(grpc.ServiceRegistrar, *Server)
	SecretsPath  string
	SecretsApart bool

	// Call, if not nil, is told of each call that ends; see rpc.Meter.
	Call func(method, code, reason string, took time.Duration)

	waits waits // zero: 10 s, 30 s, 5 min
}

// Server serves the Workload API on one socket, and on another its guest.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	cfg      Config
	listener *localsocket.Listener
	apart    *localsocket.Listener // of SecretsPath; nil: there is none
	users    *users
	quiet    rpc.Quiet
	contain  rpc.Guard
	meter    rpc.Meter
	refusals *refusals

	slow, attested atomic.Uint64
}

// Open creates the socket. Callers wait until Run.
func Open(cfg Config) (*Server, error) {
	cfg.Limits = cfg.Limits.orDefault()
	if cfg.waits == (waits{}) {
		cfg.waits = waits{request: 10 * time.Second, send: 30 * time.Second, reattest: 5 * time.Minute}
	}
	l, err := cfg.listen()
	if err != nil {
		return nil, err
	}
	var apart *localsocket.Listener
	if cfg.Secrets != nil && cfg.SecretsPath != "" {
		if apart, err = cfg.bind(cfg.SecretsPath); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return &Server{cfg: cfg, listener: l, apart: apart, users: newUsers(cfg.Limits),
		refusals: newRefusals(), contain: rpc.Guard{Log: cfg.Log}, meter: rpc.Meter{Tell: cfg.Call}}, nil
}

func (c *Config) listen() (*localsocket.Listener, error) {
	if c.Passed == nil {
		return c.bind(c.SocketPath)
	}
	l, err := process.Adopt(c.Passed, c.Via)
	if err != nil {
		return nil, err
	}
	if at := l.Addr().String(); at != c.SocketPath {
		return nil, errors.Join(fault.New(fault.Precondition, "socket_refused",
			"the socket that was passed is at %q, the configuration says %q", at, c.SocketPath).
			Fix("let socket_path and ListenStream= in the socket unit name the same path"), l.Close())
	}
	return localsocket.Adopt(l), nil
}

func (c *Config) bind(path string) (*localsocket.Listener, error) {
	return localsocket.Listen(path, localsocket.Public(), func(path string) (localsocket.Bound, error) {
		return process.Listen(path, c.Via)
	})
}

// Close removes the sockets of a server that does not run.
func (s *Server) Close() error {
	err := s.listener.Close()
	if s.apart != nil {
		err = errors.Join(err, s.apart.Close())
	}
	return err
}

// SocketPath returns where the API is served.
func (s *Server) SocketPath() string { return s.listener.Path() }

// Panics returns how many calls ended in a panic. Any number but zero is a bug (R99).
func (s *Server) Panics() uint64 { return s.contain.Panics.Load() }

// Run serves until ctx is done, then ends all streams at once and removes the
// sockets: clients dial again.
func (s *Server) Run(ctx context.Context) error {
	g := s.newServer()
	workload.RegisterSpiffeWorkloadAPIServer(g, s)
	whyv1.RegisterSelfServer(g, self{server: s})
	if s.cfg.Secrets != nil && !s.cfg.SecretsApart {
		s.cfg.Secrets(g, s)
	}
	s.meter.Learn(g)
	if s.apart == nil {
		return rpc.Serve(ctx, g, s.listener)
	}
	secrets := s.newServer()
	s.cfg.Secrets(secrets, s)
	s.meter.Learn(secrets)
	both, ctx := errgroup.WithContext(ctx)
	both.Go(func() error { return rpc.Serve(ctx, g, s.listener) })
	both.Go(func() error { return rpc.Serve(ctx, secrets, s.apart) })
	return both.Wait()
}

// newServer returns what any socket of ours is served by.
func (s *Server) newServer() *grpc.Server {
	g := grpc.NewServer(
		grpc.Creds(rpc.Handshake(s.handshake)),
		grpc.InTapHandle(s.tap),
		grpc.UnaryInterceptor(s.meter.Unary(s.unary)),
		grpc.StreamInterceptor(s.meter.Stream(s.stream)),
		grpc.UnknownServiceHandler(unknown),
		grpc.ConnectionTimeout(handshakeLimit),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxAnswer),
		grpc.InitialWindowSize(window), grpc.InitialConnWindowSize(window), // it would grow otherwise
		grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(8<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleLimit}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
	)
	grpc_health_v1.RegisterHealthServer(g, health{server: s})
	return g
}
