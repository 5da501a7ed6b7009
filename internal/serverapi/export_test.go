package serverapi

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"time"

	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	lifetimev1 "github.com/plastron/plastron/api/plastron/lifetime/v1"
	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
)

// Methods returns the full names of every RPC that is registered anywhere.
func (s *Server) Methods() (methods []string) {
	g := s.grpcServer(s.localHandshake)
	s.register(g)
	grpc_health_v1.RegisterHealthServer(g, health{server: s})
	for service, info := range g.GetServiceInfo() {
		for _, m := range info.Methods {
			methods = append(methods, "/"+service+"/"+m.Name)
		}
	}
	return methods
}

// AccessRows returns the methods that the table has a row for.
func AccessRows() (rows []string) {
	for method := range access() {
		rows = append(rows, method)
	}
	return rows
}

// SetRoom makes the room for connections small.
func (c *Config) SetRoom(all, strangers, perAddress int) { c.room = room{all, strangers, perAddress} }

// NewDoor is newDoor.
func NewDoor(l net.Listener, all, strangers, perAddress int, log *slog.Logger) net.Listener {
	return newDoor(l, room{all, strangers, perAddress}, log)
}

// Know is known.
func Know(c net.Conn) { known(c) }

// Counts returns what a door has counted.
func Counts(l net.Listener) (open, strangers, addresses int, refused uint64) {
	d := l.(*door)
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.open, d.strangers.Len(), len(d.byAddress), d.refused
}

const (
	StrangerIdle  = strangerIdle
	StrangerBytes = strangerBytes
)

// Gate is a gate for tests.
type Gate struct{ g *gate }

func NewGate(rate, burst float64, width int) Gate { return Gate{newGate(pace{rate, burst}, width)} }

func (g Gate) Enter(caller string, now time.Time) (func(), error) { return g.g.enter(caller, now) }
func (g Gate) Buckets() int                                       { return len(g.g.buckets) }

const MaxBuckets = maxBuckets

// AddressKey is addressKey.
func AddressKey(address string) string { return addressKey(address) }

// Waiting returns how many agents somebody waits for.
func (s *Server) Waiting() int {
	s.followers.mu.Lock()
	defer s.followers.mu.Unlock()
	return len(s.followers.waits)
}

// FollowAs serves a stream of the agent that has a certificate, as the wire would.
func (s *Server) FollowAs(chain [][]byte, stream grpc.BidiStreamingServer[syncv1.AgentMessage, syncv1.ServerMessage]) error {
	ctx, err := s.as(stream.Context(), chain)
	if err != nil {
		return err
	}
	return syncs{server: s}.Follow(calledBy{stream, ctx})
}

// IssueAs is what signs for that agent.
func (s *Server) IssueAs(ctx context.Context, chain [][]byte) (context.Context, issuev1.IssueServer, error) {
	ctx, err := s.as(ctx, chain)
	return ctx, issues{server: s}, err
}

// Lifetimes is the service of that name.
func (s *Server) Lifetimes() lifetimev1.LifetimeServer { return lifetimes{server: s} }

func (s *Server) as(ctx context.Context, chain [][]byte) (context.Context, error) {
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	l := &link{address: "pipe", chain: chain, leaf: leaf, close: func() error { return nil }}
	if l.id, err = svid.PeerID(leaf); err != nil {
		return nil, err
	}
	ctx = peer.NewContext(ctx, &peer.Peer{AuthInfo: l})
	c, err := s.identify(ctx, time.Now())
	if err != nil {
		return nil, err
	}
	return context.WithValue(ctx, callerKey{}, c), nil
}

// calledBy is a stream whose caller is known.
type calledBy struct {
	grpc.BidiStreamingServer[syncv1.AgentMessage, syncv1.ServerMessage]
	ctx context.Context
}

func (c calledBy) Context() context.Context { return c.ctx }

// Looked returns how many things are remembered of what agents stated.
func (s *Server) Looked() int {
	s.looks.mu.Lock()
	defer s.looks.mu.Unlock()
	return s.looks.held
}
