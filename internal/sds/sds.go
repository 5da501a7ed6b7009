// Package sds is Envoy's secret discovery service, version 3: Envoy, Istio's
// proxies and whoever else speaks xDS take certificates, keys and what verifies
// their peers from it. What a resource name stands for and when something is sent
// is decided here; who calls, what it may have and how much it may ask for is the
// business of the socket that this is served on.
//
// What must always hold: a caller is given what the Workload API would give it,
// and learns nothing else (R12); a name that stands for nothing keeps none of the
// others waiting, and is answered once it does; two answers on a stream have the
// same version exactly if they have the same content; what a client refuses is not
// sent to it again.
package sds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"

	"github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/rpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// Config is what the service stands on.
type Config struct {
	Names Names
	// Plain sends validation contexts as a list of roots, for an Envoy that has no
	// validator for SPIFFE, unless the Envoy's node says otherwise.
	Plain bool
	// AllowUnauthenticatedVerifiers gives the own trust domain's bundle to callers
	// without an identity.
	AllowUnauthenticatedVerifiers bool
	Log                           *slog.Logger
}

// Caller is who makes a call, as the socket sees it. One goroutine uses it, but
// for Process.
type Caller interface {
	// Look attests the caller and returns what it may have now. If it is to wait, it
	// waits a moment for SVIDs that are being signed.
	Look(ctx context.Context, wait bool) (mirror.View, error)
	// Nothing says why there is nothing to hand out.
	Nothing(ctx context.Context) error
	// Send sends n bytes to a caller who is still what it was.
	Send(n int, send func() error) error
	// Next returns when it is time to look again, or when there is something in again.
	Next(ctx context.Context, again <-chan struct{}) error
	// Process returns who it is, or nil if that is not known.
	Process() *process.Process
	Close()
}

// Service is the secret discovery service.
type Service struct {
	cfg     Config
	clients clients
	guard   rpc.Guard
	quiet   rpc.Quiet
}

// New returns a service that nobody calls yet.
func New(cfg Config) *Service {
	return &Service{cfg: cfg, clients: clients{troubled: map[*stream]*Client{}}, guard: rpc.Guard{Log: cfg.Log}}
}

// Register adds the service to a gRPC server. open says who makes a call.
func (s *Service) Register(to grpc.ServiceRegistrar, open func(context.Context) (Caller, error)) {
	secretv3.RegisterSecretDiscoveryServiceServer(to, endpoint{service: s, open: open})
}

// Panics returns how many streams ended in a panic that the socket did not see.
// Any number but zero is a bug (R99).
func (s *Service) Panics() uint64 { return s.guard.Panics.Load() }

const streamSecrets = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"

// endpoint is the service at one socket.
type endpoint struct {
	service *Service
	open    func(context.Context) (Caller, error)
}

// DeltaSecrets is not offered.
func (endpoint) DeltaSecrets(secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	return fault.New(fault.Unsupported, "method_unknown", "delta discovery of secrets is not offered").
		Fix("use api_type: GRPC, not DELTA_GRPC, in the config source")
}

// FetchSecrets answers once. A name that stands for nothing is an error only if
// nothing else can be given.
func (e endpoint) FetchSecrets(ctx context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	c, err := e.open(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	st := newStream(&e.service.cfg)
	if _, err := st.hear(req); err != nil {
		return nil, err
	}
	view, err := c.Look(ctx, st.wantsSVID())
	if err != nil {
		return nil, err
	}
	resp, missing, err := st.answer(view)
	switch {
	case errors.Is(err, errNothing), err == nil && len(resp.GetResources())+len(missing) == 0:
		return nil, c.Nothing(ctx)
	case err != nil:
		return nil, err
	case len(resp.GetResources()) == 0:
		return nil, missing[0].why
	}
	resp.Nonce = "" // there is nobody to return it
	return resp, c.Send(proto.Size(resp), func() error { return nil })
}

// StreamSecrets answers each list of names, and again when what they stand for changes.
func (e endpoint) StreamSecrets(wire secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	s := e.service
	ctx, end := context.WithCancelCause(wire.Context())
	defer end(nil)
	c, err := e.open(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	req, err := wire.Recv()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
	st := newStream(&s.cfg)
	if _, err := st.hear(req); err != nil {
		return err
	}
	s.clients.begin()
	defer s.clients.end(st)
	again := make(chan struct{}, 1)
	listen := sync.OnceFunc(func() {
		go func() {
			_, err := s.guard.Contain(streamSecrets, func() (any, error) { return nil, s.listen(wire, st, c.Process(), again) })
			if err != nil {
				end(err)
			}
		}()
	})
	for {
		view, err := c.Look(ctx, st.wantsSVID())
		if err != nil {
			return ended(ctx, wire, err)
		}
		resp, missing, err := st.answer(view)
		if errors.Is(err, errNothing) {
			return c.Nothing(ctx)
		}
		if err != nil {
			return err
		}
		if resp != nil {
			s.missing(st, c.Process(), missing)
			if err := c.Send(proto.Size(resp), func() error { return wire.Send(resp) }); err != nil {
				return ended(ctx, wire, err)
			}
		}
		listen() // what comes before the first answer is no answer to it
		if err := c.Next(ctx, again); err != nil {
			return ended(ctx, wire, err)
		}
	}
}

// ended is the error of a stream that did not go on: if the client has done
// something wrong, that.
func ended(ctx context.Context, wire grpc.ServerStream, err error) error {
	if wire.Context().Err() == nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// listen takes note of what the client says until it ends. A client that has
// nothing more to say is still told of changes.
func (s *Service) listen(wire secretv3.SecretDiscoveryService_StreamSecretsServer, st *stream, who *process.Process, again chan<- struct{}) error {
	for {
		req, err := wire.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		heard, err := st.hear(req)
		if err != nil {
			return err
		}
		if heard.rejected != "" {
			s.rejected(st, who, heard.rejected)
		}
		if heard.accepted {
			s.clients.accepted(st, who)
		}
		if heard.renamed {
			select {
			case again <- struct{}{}:
			default:
			}
		}
	}
}
