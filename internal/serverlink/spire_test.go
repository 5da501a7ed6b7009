package serverlink_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
)

const agentID = "spiffe://example.org/spire/agent/join_token/one"

// spire is a server with SPIRE's services only, and strict: it answers nothing
// that a SPIRE server would not be asked. Its fields are set before it is used,
// or through change.
type spire struct {
	agentv1.UnimplementedAgentServer
	bundlev1.UnimplementedBundleServer
	entryv1.UnimplementedEntryServer
	svidv1.UnimplementedSVIDServer
	t  *testing.T
	ca *authority

	mu        sync.Mutex // guards everything below
	entries   map[string]*spiretypes.Entry
	pageSize  int
	bundle    *spiretypes.Bundle
	federated map[string]*spiretypes.Bundle
	deny      error  // every call of an agent's
	denyOnly  string // this call alone
	before    bool   // a server from before SyncAuthorizedEntries
	// odd changes what an entry sync sends.
	odd    func(*entryv1.SyncAuthorizedEntriesResponse)
	calls  map[string]int
	asked  []string    // entries asked for by id
	polled []time.Time // when
	signed []string    // entries signed for
}

func newSpire(t *testing.T) *spire {
	ca := newAuthority(t, "example.org")
	return &spire{t: t, ca: ca, entries: map[string]*spiretypes.Entry{}, pageSize: 500, bundle: bundleOf(ca),
		federated: map[string]*spiretypes.Bundle{}, calls: map[string]int{}}
}

// change changes the server between two calls.
func (s *spire) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// put creates an entry, or writes it anew with that revision.
func (s *spire) put(id, path string, revision int64, edit ...func(*spiretypes.Entry)) {
	s.change(func() { s.putLocked(id, path, revision, edit...) })
}

func (s *spire) putLocked(id, path string, revision int64, edit ...func(*spiretypes.Entry)) {
	e := &spiretypes.Entry{Id: id, SpiffeId: &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: path}, RevisionNumber: revision, CreatedAt: 1000,
		ParentId:  &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/join_token/one"},
		Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:1"}}}
	for _, f := range edit {
		f(e)
	}
	s.entries[id] = e
}

// enter is what every call goes through.
func (s *spire) enter(call string) error {
	s.calls[call]++
	if s.denyOnly != "" && s.denyOnly != call {
		return nil
	}
	return s.deny
}

func (s *spire) PostStatus(_ context.Context, req *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if req.AgentVersion == "" {
		s.t.Error("a status without a version")
	}
	return &agentv1.PostStatusResponse{}, s.enter("PostStatus")
}

func (s *spire) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*spiretypes.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return proto.CloneOf(s.bundle), s.enter("GetBundle")
}

func (s *spire) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*spiretypes.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if req.TrustDomain == "example.org" {
		return nil, status.Error(codes.InvalidArgument, "own trust domain")
	}
	if err := s.enter("GetFederatedBundle"); err != nil {
		return nil, err
	}
	b, ok := s.federated[req.TrustDomain]
	switch {
	case !ok:
		return nil, status.Error(codes.NotFound, "no such bundle")
	case b == nil:
		return nil, status.Error(codes.Internal, "broken")
	}
	return proto.CloneOf(b), nil
}

func (s *spire) GetAuthorizedEntries(_ context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := &entryv1.GetAuthorizedEntriesResponse{}
	for _, id := range slices.Sorted(maps.Keys(s.entries)) {
		resp.Entries = append(resp.Entries, s.entries[id])
	}
	return resp, s.enter("GetAuthorizedEntries")
}

func (s *spire) SyncAuthorizedEntries(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	s.mu.Lock()
	err = s.enter("SyncAuthorizedEntries")
	s.polled = append(s.polled, time.Now())
	before, pageSize, odd := s.before, s.pageSize, s.odd
	entries := maps.Clone(s.entries)
	s.mu.Unlock()
	switch {
	case before:
		return status.Error(codes.Unimplemented, "unknown method SyncAuthorizedEntries")
	case err != nil:
		return err
	case len(first.Ids) > 0, !first.OutputMask.GetRevisionNumber():
		s.t.Errorf("the sync begins with %v", first)
	}
	send := func(r *entryv1.SyncAuthorizedEntriesResponse) error {
		if odd != nil {
			r = proto.CloneOf(r)
			odd(r)
		}
		return stream.Send(r)
	}
	ids := slices.Sorted(maps.Keys(entries))
	if len(ids) <= pageSize {
		resp := &entryv1.SyncAuthorizedEntriesResponse{}
		for _, id := range ids {
			resp.Entries = append(resp.Entries, entries[id])
		}
		if err := send(resp); err != nil {
			return err
		}
	} else {
		for i := 0; i < len(ids); i += pageSize {
			page := &entryv1.SyncAuthorizedEntriesResponse{More: i+pageSize < len(ids)}
			for _, id := range ids[i:min(i+pageSize, len(ids))] {
				page.EntryRevisions = append(page.EntryRevisions, &entryv1.EntryRevision{Id: id, RevisionNumber: entries[id].RevisionNumber, CreatedAt: entries[id].CreatedAt})
			}
			if err := send(page); err != nil {
				return err
			}
		}
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil // the agent is done, or gave up
		}
		if len(req.Ids) == 0 || len(req.Ids) > pageSize || !slices.IsSorted(req.Ids) {
			s.t.Errorf("asked for %d ids, with pages of %d", len(req.Ids), pageSize)
		}
		s.change(func() { s.asked = append(s.asked, req.Ids...) })
		// In pages again, of which the last may be empty.
		page := &entryv1.SyncAuthorizedEntriesResponse{}
		for _, id := range req.Ids {
			if e, ok := entries[id]; ok {
				page.Entries = append(page.Entries, e)
			}
			if len(page.Entries) == 2 {
				page.More = true
				if err := send(page); err != nil {
					return err
				}
				page = &entryv1.SyncAuthorizedEntriesResponse{}
			}
		}
		if err := send(page); err != nil {
			return err
		}
	}
}

func (s *spire) BatchNewX509SVID(_ context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter("BatchNewX509SVID"); err != nil {
		return nil, err
	}
	resp := &svidv1.BatchNewX509SVIDResponse{}
	for _, p := range req.Params {
		r := &svidv1.BatchNewX509SVIDResponse_Result{Status: &spiretypes.Status{}}
		if e := s.entries[p.EntryId]; e == nil {
			r.Status = &spiretypes.Status{Code: int32(codes.NotFound), Message: "entry not found or not authorized"}
		} else {
			key, err := svid.ParseCSR(p.Csr)
			if err != nil {
				s.t.Error(err)
			}
			id := spiffeid.RequireFromString("spiffe://example.org" + e.SpiffeId.Path)
			prepared, err := s.ca.issuer.Prepare(svid.Leaf{ID: id, Key: key, NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(50 * time.Minute)})
			if err != nil {
				s.t.Error(err)
			}
			x, err := prepared.Issue()
			if err != nil {
				s.t.Error(err)
			}
			r.Svid = &spiretypes.X509SVID{CertChain: x.Chain, Id: e.SpiffeId, ExpiresAt: x.NotAfter.Unix()}
			s.signed = append(s.signed, p.EntryId)
		}
		resp.Results = append(resp.Results, r)
	}
	return resp, nil
}

func (s *spire) NewJWTSVID(_ context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter("NewJWTSVID"); err != nil {
		return nil, err
	}
	now := time.Now()
	return &svidv1.NewJWTSVIDResponse{Svid: &spiretypes.JWTSVID{Token: "token for " + req.EntryId + " and " + req.Audience[0],
		Id: s.entries[req.EntryId].GetSpiffeId(), IssuedAt: now.Unix(), ExpiresAt: now.Add(time.Minute).Unix()}}, nil
}

// pushing is a sync service that only counts who comes.
type pushing struct {
	syncv1.UnimplementedSyncServer
	hellos chan *syncv1.Hello
}

func (p *pushing) Follow(stream grpc.BidiStreamingServer[syncv1.AgentMessage, syncv1.ServerMessage]) error {
	m, err := stream.Recv()
	if err != nil {
		return err
	}
	p.hellos <- m.GetHello()
	<-stream.Context().Done()
	return stream.Context().Err()
}

// wire is the network between one client and whoever serves at the moment.
type wire struct {
	mu       sync.Mutex // guards everything below
	listener *bufconn.Listener
	server   *grpc.Server
	done     chan struct{}
}

// serve puts a server on the wire, in place of the one that is there.
func (w *wire) serve(t *testing.T, s *spire, push *pushing) {
	w.stop()
	cert := s.ca.certificate(t, server, 50*time.Minute)
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert})))
	agentv1.RegisterAgentServer(g, s)
	bundlev1.RegisterBundleServer(g, s)
	entryv1.RegisterEntryServer(g, s)
	svidv1.RegisterSVIDServer(g, s)
	if push != nil {
		syncv1.RegisterSyncServer(g, push)
	}
	l, done := bufconn.Listen(1<<20), make(chan struct{})
	go func() { defer close(done); g.Serve(l) }()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listener, w.server, w.done = l, g, done
}

func (w *wire) stop() {
	w.mu.Lock()
	g, done := w.server, w.done
	w.listener, w.server = nil, nil
	w.mu.Unlock()
	if g != nil {
		g.Stop()
		<-done
	}
}

func (w *wire) dial(ctx context.Context, _ string) (net.Conn, error) {
	w.mu.Lock()
	l := w.listener
	w.mu.Unlock()
	if l == nil {
		return nil, errors.New("nothing listens")
	}
	return l.DialContext(ctx)
}

// desk is an agent's mirror above a client of the server on the wire.
type desk struct {
	*mirror.Mirror
	t     *testing.T
	wire  *wire
	link  *serverlink.Client
	sub   *mirror.Subscription
	ended chan error
	told  chan *syncv1.Directive
}

type link struct{ *serverlink.Client }

func (l link) Follow(ctx context.Context) (mirror.Stream, error) {
	s, err := l.Client.Follow(ctx)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// newDesk starts a mirror for uid 1. stop ends it.
func newDesk(t *testing.T, s *spire) (d *desk, stop func()) {
	d = &desk{t: t, wire: &wire{}, ended: make(chan error, 1000), told: make(chan *syncv1.Directive, 100)}
	d.wire.serve(t, s, nil)
	own := s.ca.certificate(t, agentID, 50*time.Minute)
	var err error
	d.link, err = serverlink.New(serverlink.Config{Route: serverlink.NewRoute("spire:8081"), TrustDomain: s.ca.td, Dial: d.wire.dial,
		Roots:       func() []*x509.Certificate { return []*x509.Certificate{s.ca.root(t)} },
		Certificate: func() *tls.Certificate { return &own }})
	if err != nil {
		t.Fatal(err)
	}
	d.Mirror = mirror.New(mirror.Config{TrustDomain: s.ca.td, Link: link{d.link}, Version: "9.9", Log: slog.New(slog.DiscardHandler),
		StreamEnded: func(err error) { d.ended <- err }, Directive: func(m *syncv1.Directive) { d.told <- m }})
	d.sub = d.Subscribe(entry.Facts{Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- d.Run(ctx) }()
	return d, func() {
		d.sub.Close()
		cancel()
		<-done
		d.link.Close()
		d.wire.stop()
	}
}

// paths is what the process of uid 1 is given now.
func (d *desk) paths() []string {
	out := []string{}
	for _, id := range d.sub.View().Identities {
		out = append(out, id.ID.Path())
	}
	slices.Sort(out)
	return out
}

// within fails the test unless f holds after that time at most, in the bubble's time.
func (d *desk) within(limit time.Duration, what string, f func() bool) {
	d.t.Helper()
	for end := time.Now().Add(limit); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			d.t.Fatalf("it does not come within %v that %s; the process has %v", limit, what, d.paths())
		}
	}
}

func (d *desk) has(limit time.Duration, want ...string) {
	d.t.Helper()
	d.within(limit, "the process has what it should", func() bool { return slices.Equal(d.paths(), want) })
}

// denied is a refusal as SPIRE's server makes it.
func denied(t *testing.T, reason spiretypes.PermissionDeniedDetails_Reason) error {
	st, err := status.New(codes.PermissionDenied, "no").WithDetails(protoadapt.MessageV1Of(&spiretypes.PermissionDeniedDetails{Reason: reason}))
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}
