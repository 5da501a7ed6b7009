// Package agentapi is the agent's admin socket: a Unix socket for the agent's
// own user and root, on which services tell an operator about this agent. Which
// ones is the agent's business; this package decides who gets in and within
// which limits.
//
// What must always hold: nobody else gets an answer, whatever the modes of the
// socket and its directory say; the socket does not lie where workloads are let
// in to reach the public one (R113).
package agentapi

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/localsocket"
	"github.com/plastron/plastron/internal/rpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
)

// Limits of the listener (R97). Sizes are in bytes.
const (
	maxConnections = 100
	handshakeLimit = 10 * time.Second
	idleLimit      = 5 * time.Minute // of a connection without a call
	callLimit      = 30 * time.Second
	maxStreams     = 100 // of one connection
	maxHeaderList  = 16 << 10
	maxMessage     = 1 << 20 // received
	maxAnswer      = 64 << 20
	minPing        = 10 * time.Second
)

// Config is what the socket stands on.
type Config struct {
	SocketPath string
	// Services register what is offered. Every method of theirs is for the agent's
	// user and root only.
	Services []func(grpc.ServiceRegistrar)
	Log      *slog.Logger
}

// Server serves the admin socket.
type Server struct {
	cfg      Config
	listener *localsocket.Listener
	guard    rpc.Guard
	open     atomic.Int64
}

// CheckPath says whether the admin socket can be at path when the public one is
// at public: not in the public one's directory, nor below it, since that is what
// is shared with workloads.
func CheckPath(path, public string) error {
	if !filepath.IsAbs(path) {
		return fault.New(fault.Invalid, "socket_path_invalid", "%q is not an absolute path", path)
	}
	if strings.HasPrefix(filepath.Clean(path), filepath.Dir(filepath.Clean(public))+string(filepath.Separator)) {
		return fault.New(fault.Invalid, "socket_path_invalid", "%q lies in the directory of a socket that workloads reach", path).
			Fix("choose another directory")
	}
	return localsocket.CheckPath(path)
}

// Open makes the socket. Callers wait until Run.
func Open(cfg Config) (*Server, error) {
	l, err := localsocket.Listen(cfg.SocketPath, localsocket.Private(), localsocket.Bind)
	if err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, listener: l, guard: rpc.Guard{Log: cfg.Log}}, nil
}

// Close removes the socket of a server that does not run.
func (s *Server) Close() error { return s.listener.Close() }

// Panics returns how many calls ended in a panic. Any number but zero is a bug (R99).
func (s *Server) Panics() uint64 { return s.guard.Panics.Load() }

// Run serves until ctx is done, then ends all calls and removes the socket.
func (s *Server) Run(ctx context.Context) error {
	g := grpc.NewServer(
		grpc.Creds(rpc.Handshake(s.handshake)),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.UnknownServiceHandler(unknown),
		grpc.ConnectionTimeout(handshakeLimit),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxAnswer),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleLimit}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
	)
	for _, register := range s.cfg.Services {
		register(g)
	}
	return rpc.Serve(ctx, g, s.listener)
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	resp, err := s.call(ctx, info.FullMethod, func() (any, error) { return handler(ctx, req) })
	return resp, err
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	_, err := s.call(ss.Context(), info.FullMethod, func() (any, error) { return nil, handler(srv, ss) })
	return err
}

// call is what every call passes.
func (s *Server) call(ctx context.Context, method string, f func() (any, error)) (any, error) {
	var l *link
	if p, ok := peer.FromContext(ctx); ok {
		l, _ = p.AuthInfo.(*link)
	}
	if l == nil || !admitted(l.peer) {
		err := fault.New(fault.Denied, "not_allowed", "the admin socket is for the agent's own user and root").
			Fix("run the command as the user that runs the agent, or as root")
		s.cfg.Log.Warn("call refused", "rpc", method, "reason", err.Reason)
		return nil, rpc.Status(err, rpc.Code(err))
	}
	resp, err := s.guard.Contain(method, f)
	if err != nil && fault.KindOf(err) == fault.Internal && rpc.Ours(err) && ctx.Err() == nil {
		s.cfg.Log.Error("call failed", "rpc", method, "caller", l.peer.String(), "err", err)
	}
	return resp, rpc.Status(err, rpc.Code(err))
}

// admitted says whether the peer may call: root or our own user, in the kernel's
// words. Where the kernel is not asked, the modes of the files decide alone.
func admitted(p localsocket.Peer) bool {
	return !p.Known && !localsocket.Tells || p.Known && (p.UID == 0 || int64(p.UID) == int64(os.Geteuid()))
}

func unknown(any, grpc.ServerStream) error {
	return fault.New(fault.Unsupported, "method_unknown", "this method is not offered here")
}

// link is one connection and who opened it. It rides along as the connection's AuthInfo.
type link struct {
	net.Conn
	credentials.CommonAuthInfo
	peer localsocket.Peer
	gone func()
}

// AuthType names the kind of connection, as the library asks.
func (*link) AuthType() string { return "plastron-admin" }

// Close ends the connection and stops counting it.
func (l *link) Close() error {
	l.gone()
	return l.Conn.Close()
}

// handshake makes a link of a connection.
func (s *Server) handshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if s.open.Add(1) > maxConnections {
		s.open.Add(-1)
		return nil, nil, errors.New("too many connections")
	}
	l := &link{Conn: raw, peer: localsocket.PeerOf(raw), gone: sync.OnceFunc(func() { s.open.Add(-1) })}
	l.SecurityLevel = credentials.PrivacyAndIntegrity // it does not leave the kernel
	return l, l, nil
}
