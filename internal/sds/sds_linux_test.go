package sds_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fakes/envoy"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/plastron/plastron/internal/sds"
	"github.com/plastron/plastron/internal/workload"
	"github.com/plastron/plastron/internal/workloadapi"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const deadline = time.Minute

// attestor says of every process what the test wants.
type attestor struct {
	mu        sync.Mutex
	selectors []entry.Selector
	calls     int
}

func (a *attestor) Attest(context.Context, int) (workload.Attested, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls++
	return workload.Attested{Selectors: a.selectors}, nil
}

func (a *attestor) uid(value string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.selectors = []entry.Selector{{Type: "unix", Value: "uid:" + value}}
}

func (a *attestor) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.calls
}

// rig is the service on the Workload API's socket, over a mirror of a test server.
type rig struct {
	t        *testing.T
	server   *mirrortest.Server
	mirror   *mirror.Mirror
	service  *sds.Service
	attestor *attestor
	path     string
}

func newRig(t *testing.T, change ...func(*sds.Config, *workloadapi.Config)) *rig {
	t.Helper()
	s := mirrortest.New(t)
	log := slog.New(slog.DiscardHandler)
	m := mirror.New(mirror.Config{TrustDomain: s.TD, Link: s, Log: log})
	dir, err := os.MkdirTemp("", "pls") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := &attestor{}
	a.uid("1")
	cfg := sds.Config{Names: sds.Names{SVID: "default", Bundle: "ROOTCA", AllBundles: "ALL"}, Log: log}
	socket := workloadapi.Config{SocketPath: filepath.Join(dir, "s"), TrustDomain: s.TD, Mirror: m, Health: func() error { return nil },
		Attestors: []workloadapi.Attestor{{Name: "test", Attestor: a}}, Log: log}
	for _, c := range change {
		c(&cfg, &socket)
	}
	service := sds.New(cfg)
	socket.Secrets = func(to grpc.ServiceRegistrar, at *workloadapi.Server) {
		service.Register(to, func(ctx context.Context) (sds.Caller, error) { return at.Session(ctx) })
	}
	api, err := workloadapi.Open(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { m.Run(ctx) })
	wg.Go(func() {
		if err := api.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Run() = %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		if service.Panics()+api.Panics() > 0 {
			t.Error("something panicked")
		}
	})
	select {
	case <-m.Synced():
	case <-time.After(deadline):
		t.Fatal("the mirror is not in step")
	}
	return &rig{t: t, server: s, mirror: m, service: service, attestor: a, path: socket.SocketPath}
}

// grant gives uid 1 an identity and waits until it is signed.
func (r *rig) grant(id, path string, change ...func(*syncv1.Grant)) {
	r.t.Helper()
	g := r.server.Grant(id, path, "unix:uid:1")
	for _, c := range change {
		c(g)
	}
	r.server.Put(g)
	r.until(func(v mirror.View) bool {
		return v.Pending == 0 && slices.ContainsFunc(v.Identities, func(i mirror.Identity) bool { return i.GrantID == id && i.ID.Path() == path })
	})
}

func (r *rig) until(cond func(mirror.View) bool) mirror.View {
	r.t.Helper()
	sub := r.mirror.Subscribe(entry.Facts{Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}})
	defer sub.Close()
	return mirrortest.Until(r.t, sub, cond)
}

// federate makes the bundle of a trust domain known, with the authorities of some rig.
func (r *rig) federate(td string, of *rig) {
	r.t.Helper()
	b := &syncv1.Bundle{TrustDomain: td}
	for _, a := range of.until(func(mirror.View) bool { return true }).Bundle.Keys.X509 {
		b.X509Authorities = append(b.X509Authorities, &syncv1.X509Authority{Asn1: a.ASN1})
	}
	r.server.PutBundle(td, b)
}

func (r *rig) proxy() *envoy.Proxy { return envoy.New(r.t, r.path, envoy.Node("e", 1, 36)) }

// gets receives an answer and compares the names in it, and those that are missing
// with their reasons. It returns what Envoy would make of the secrets.
func gets(t *testing.T, s *envoy.Stream, names string, missing ...string) map[string]*envoy.Material {
	t.Helper()
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return holds(t, resp, names, missing...)
}

func holds(t *testing.T, resp *discoveryv3.DiscoveryResponse, names string, missing ...string) map[string]*envoy.Material {
	t.Helper()
	all, got := map[string]*envoy.Material{}, []string{}
	for _, r := range resp.GetResources() {
		secret := new(tlsv3.Secret)
		if err := r.UnmarshalTo(secret); err != nil {
			t.Fatal(err)
		}
		m, err := envoy.Read(secret)
		if err != nil {
			t.Fatalf("%s: %v", secret.GetName(), err)
		}
		got = append(got, secret.GetName())
		all[secret.GetName()] = m
	}
	if text := strings.Join(got, " "); text != names {
		t.Fatalf("got %q, want %q", text, names)
	}
	var lost []string
	for _, e := range resp.GetResourceErrors() {
		lost = append(lost, e.GetResourceName().GetName()+" "+reasonOf(status.FromProto(e.GetErrorDetail())))
	}
	if !slices.Equal(lost, missing) {
		t.Fatalf("missing are %q, want %q", lost, missing)
	}
	return all
}

func reasonOf(st *status.Status) string {
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

func refused(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	if st := status.Convert(err); st.Code() != code || reasonOf(st) != reason {
		t.Errorf("got %v with reason %q, want %v with %q", err, reasonOf(st), code, reason)
	}
}

// eventually waits for what no event tells of.
func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(deadline); !cond(); <-tick.C {
		if time.Now().After(end) {
			t.Fatal("it did not happen in time")
		}
	}
}

const td = "spiffe://example.org"

// What each name stands for, together in one request and one by one; no name is everything.
func TestNames(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a", func(g *syncv1.Grant) {
		g.CreatedAt -= 3600
		g.Hint = "internal"
		g.FederatesWith = []string{"foreign.test", "silent.test"}
	})
	r.grant("b", "/b")
	r.federate("foreign.test", r)
	r.until(func(v mirror.View) bool { return len(v.Federated) == 1 })
	api := r.proxy().API()
	fetch := func(names ...string) (*discoveryv3.DiscoveryResponse, error) {
		return api.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{Node: envoy.Node("e", 1, 36), TypeUrl: envoy.TypeURL, ResourceNames: names})
	}
	is := func(m *envoy.Material, path string) {
		t.Helper()
		if m.Certificate == nil || m.Certificate.Leaf.URIs[0].String() != td+path || m.Trust != nil {
			t.Errorf("not the SVID of %s", path)
		}
	}
	trusts := func(m *envoy.Material, domains ...string) {
		t.Helper()
		if len(m.Trust) != len(domains) || m.Certificate != nil {
			t.Errorf("trusts %d trust domains, want %v", len(m.Trust), domains)
		}
		for _, d := range domains {
			if m.Trust[d] == nil {
				t.Errorf("%q is not trusted", d)
			}
		}
	}
	resp, err := fetch("default", "ROOTCA", "ALL", td, td+"/b", "spiffe://foreign.test", "internal", "ALL", "")
	if err != nil {
		t.Fatal(err)
	}
	all := holds(t, resp, "ALL ROOTCA default internal "+td+" "+td+"/b spiffe://foreign.test")
	is(all["default"], "/a") // the oldest grant's
	is(all["internal"], "/a")
	is(all[td+"/b"], "/b")
	trusts(all["ALL"], "example.org", "foreign.test")
	trusts(all["ROOTCA"], "example.org")
	trusts(all[td], "example.org")
	trusts(all["spiffe://foreign.test"], "foreign.test")
	if resp.GetTypeUrl() != envoy.TypeURL || resp.GetNonce() != "" {
		t.Errorf("type %q, nonce %q", resp.GetTypeUrl(), resp.GetNonce())
	}
	for _, names := range [][]string{nil, {""}} {
		if resp, err = fetch(names...); err != nil {
			t.Fatal(err)
		}
		holds(t, resp, td+" spiffe://foreign.test "+td+"/a "+td+"/b")
	}

	// ID-2.3-a
	long := strings.Repeat("/"+strings.Repeat("x", 12), 156)
	r.grant("long", long)
	if resp, err = fetch(td + long); err != nil {
		t.Fatal(err)
	}
	is(holds(t, resp, td+long)[td+long], long)

	// W34, R12: what is another's, what is nobody's and what is not federated are answered alike.
	r.server.Put(r.server.Grant("x", "/other", "unix:uid:2"))
	for _, name := range []string{td + "/other", td + "/nobody", "spiffe://stranger.test", td + "/", "nonsense"} {
		_, err := fetch(name)
		refused(t, err, codes.InvalidArgument, "secret_unknown")
	}
	_, err = fetch("spiffe://silent.test")
	refused(t, err, codes.InvalidArgument, "federated_bundle_missing")
	if resp, err = fetch("default", "nonsense"); err != nil {
		t.Fatal(err)
	}
	holds(t, resp, "default", "nonsense secret_unknown")

	s := r.proxy()
	delta, err := s.API().DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = delta.Recv()
	refused(t, err, codes.Unimplemented, "method_unknown")
}

// The life of a stream: an answer to each list of names, one for each change of what
// they stand for, none for anything else; versions differ as the contents do.
func TestStream(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a", func(g *syncv1.Grant) { g.CreatedAt -= 3600 })
	s, roots := r.proxy().Open(), r.proxy().Open()
	s.Ask("default", td+"/later")
	gets(t, s, "default", td+"/later secret_unknown")
	first := s.Last
	s.Ask("default", td+"/later") // ACK
	roots.Ask("ROOTCA")
	gets(t, roots, "ROOTCA")
	roots.Ask("ROOTCA")
	if c := r.service.Troubled(); len(c) != 1 || c[0].PID != os.Getpid() || c[0].Node != "e" || !c[0].Open ||
		!slices.Equal(c[0].Missing, []sds.Missing{{Name: td + "/later", Reason: "secret_unknown"}}) {
		t.Errorf("shown is %+v", c)
	}

	// What was missing comes as soon as it is there.
	r.server.Put(r.server.Grant("b", "/later", "unix:uid:1"))
	for all := gets2(t, s); len(all) < 2; all = gets2(t, s) { // first it is known and not signed
	}
	if s.Last.GetVersionInfo() == first.GetVersionInfo() || s.Last.GetNonce() == first.GetNonce() {
		t.Error("other contents with one version or nonce")
	}
	eventually(t, func() bool { return len(r.service.Troubled()) == 0 })
	before := s.Last.GetVersionInfo()

	// Names change within the stream.
	s.Ask("ROOTCA")
	gets(t, s, "ROOTCA")
	if s.Last.GetVersionInfo() != roots.Last.GetVersionInfo() {
		t.Error("one content with two versions")
	}
	s.Ask(td+"/later", "default")
	gets(t, s, "default "+td+"/later")
	if s.Last.GetVersionInfo() != before {
		t.Error("one content with two versions, later")
	}
	s.Ask("default", td+"/later") // ACK, and in another order

	// A new SVID is nothing to a stream of roots; new roots are nothing to one of SVIDs.
	r.grant("a", "/a", func(g *syncv1.Grant) { g.CreatedAt -= 3600; g.DnsNames = []string{"a.test"} })
	if all := gets(t, s, "default "+td+"/later"); all["default"].Certificate.Leaf.DNSNames[0] != "a.test" {
		t.Error("not the new SVID")
	}
	s.Ask("default", td+"/later")
	r.server.RotateUnpublished()
	r.server.Publish()
	gets(t, roots, "ROOTCA")
	r.server.Remove("b")
	gets(t, s, "default", td+"/later secret_unknown")

	// W29, W33: a stale nonce is ignored, whatever it asks for, and so is another node.
	s.Send(&discoveryv3.DiscoveryRequest{TypeUrl: envoy.TypeURL, ResourceNames: []string{"ALL"}, ResponseNonce: first.GetNonce()})
	s.Send(&discoveryv3.DiscoveryRequest{TypeUrl: envoy.TypeURL, ResourceNames: []string{"ALL"}})
	s.Send(&discoveryv3.DiscoveryRequest{TypeUrl: envoy.TypeURL, ResourceNames: []string{"ROOTCA"}, ResponseNonce: s.Last.GetNonce(),
		VersionInfo: s.Last.GetVersionInfo(), Node: envoy.Node("other", 1, 10)})
	if gets(t, s, "ROOTCA")["ROOTCA"].Trust["example.org"] == nil {
		t.Error("another node changed the form")
	}
	r.server.Remove("a")
	_, err := s.Recv()
	refused(t, err, codes.PermissionDenied, "no_grant")
	_, err = roots.Recv()
	refused(t, err, codes.PermissionDenied, "no_grant")
	eventually(t, func() bool { return r.service.Stats().Streams == 0 })
}

// RG50: bundles come and go on a stream as grants and trust domains do. Istio's
// names for them.
func TestFederation(t *testing.T) {
	r := newRig(t, func(c *sds.Config, _ *workloadapi.Config) {
		c.Names = sds.Names{SVID: "default", Bundle: "null", AllBundles: "ROOTCA"}
	})
	r.grant("a", "/a")
	r.federate("foreign.test", r)
	s := r.proxy().Open()
	s.Ask("ROOTCA", "spiffe://foreign.test")
	trusted := func(m map[string]*envoy.Material) (domains []string) {
		return slices.Sorted(maps.Keys(m["ROOTCA"].Trust))
	}
	if got := trusted(gets(t, s, "ROOTCA", "spiffe://foreign.test secret_unknown")); !slices.Equal(got, []string{"example.org"}) {
		t.Errorf("trusted is %v before anybody federates", got)
	}
	r.grant("a", "/a", func(g *syncv1.Grant) { g.FederatesWith = []string{"foreign.test"} })
	if got := trusted(gets(t, s, "ROOTCA spiffe://foreign.test")); !slices.Equal(got, []string{"example.org", "foreign.test"}) {
		t.Errorf("trusted is %v", got)
	}
	r.server.PutBundle("foreign.test", nil)
	if got := trusted(gets(t, s, "ROOTCA", "spiffe://foreign.test federated_bundle_missing")); !slices.Equal(got, []string{"example.org"}) {
		t.Errorf("trusted is %v after the bundle is gone", got)
	}
}

func gets2(t *testing.T, s *envoy.Stream) []string {
	t.Helper()
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range resp.GetResources() {
		secret := new(tlsv3.Secret)
		if err := r.UnmarshalTo(secret); err != nil {
			t.Fatal(err)
		}
		names = append(names, secret.GetName())
	}
	return names
}

// W33: a NACK is recorded, shown and answered by nothing; the next content is sent,
// and taking it ends the trouble. Who goes away with it is remembered.
func TestNACK(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	s := r.proxy().Open()
	s.Ask("default")
	gets(t, s, "default")
	none := &discoveryv3.DiscoveryResponse{}
	long := strings.Repeat("ü", 1000)
	for _, why := range []string{"bad key", "", "bad \x1b[31mkey" + long} {
		s.Nack(none, why, "default")
	}
	eventually(t, func() bool { return r.service.Stats().Rejected == 3 })
	c := r.service.Troubled()
	if len(c) != 1 || !strings.HasPrefix(c[0].Rejected, "bad \x1b[31mkey") || len(c[0].Rejected) > 512 || c[0].Version != s.Last.GetVersionInfo() ||
		!slices.Equal(c[0].Names, []string{"default"}) || c[0].PID != os.Getpid() || int(c[0].UID) != os.Getuid() {
		t.Errorf("shown is %+v", c)
	}
	r.grant("a", "/a", func(g *syncv1.Grant) { g.DnsNames = []string{"a.test"} })
	if all := gets(t, s, "default"); all["default"].Certificate.Leaf.DNSNames == nil {
		t.Error("what was refused was sent again")
	}
	s.Ask("default")
	eventually(t, func() bool { return len(r.service.Troubled()) == 0 })

	s.Nack(none, "again", "default")
	eventually(t, func() bool { return len(r.service.Troubled()) == 1 })
	s.Cancel()
	eventually(t, func() bool { c := r.service.Troubled(); return len(c) == 1 && !c[0].Open })
	if r.service.Stats().Streams != 0 {
		t.Error("a stream that has ended counts")
	}
	s = r.proxy().Open() // the same client comes back and is content
	s.Ask("default")
	gets(t, s, "default")
	s.Ask("default")
	eventually(t, func() bool { return len(r.service.Troubled()) == 0 })
}

// A caller without an identity is refused as over the Workload API, with its
// reasons; if bundles are for everybody it gets that one.
func TestNoIdentity(t *testing.T) {
	for _, everybody := range []bool{false, true} {
		r := newRig(t, func(c *sds.Config, _ *workloadapi.Config) { c.AllowUnauthenticatedVerifiers = everybody })
		for _, names := range [][]string{{"default"}, {"ROOTCA"}, {"ALL"}, nil} {
			s := r.proxy().Open()
			s.Ask(names...)
			resp, err := s.Recv()
			one, fetched := r.proxy().API().FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: names})
			if !everybody || slices.Contains(names, "default") {
				refused(t, err, codes.PermissionDenied, "no_grant")
				refused(t, fetched, codes.PermissionDenied, "no_grant")
				if text := status.Convert(err).Message(); !strings.HasPrefix(text, "no identity issued") {
					t.Errorf("the text is %q", text)
				}
				continue
			}
			if err != nil || fetched != nil || len(resp.GetResources()) != 1 || len(one.GetResources()) != 1 {
				t.Errorf("%v: %v, %v, %v", names, resp, err, fetched)
			}
		}
	}
}

// Plain roots for an old Envoy, for one whose node says so, or by configuration;
// several trust domains are never mixed into one list.
func TestPlain(t *testing.T) {
	old, text, yes := envoy.Node("old", 1, 17), envoy.Node("text", 1, 36), envoy.Node("bool", 1, 36)
	no, odd := envoy.Node("no", 1, 36), envoy.Node("odd", 1, 36)
	text.Metadata = metadata(t, "true")
	yes.Metadata = metadata(t, true)
	no.Metadata = metadata(t, "false")
	odd.Metadata = metadata(t, 1.5)
	for _, configured := range []bool{false, true} {
		r := newRig(t, func(c *sds.Config, _ *workloadapi.Config) { c.Plain = configured })
		r.grant("a", "/a", func(g *syncv1.Grant) { g.FederatesWith = []string{"foreign.test"} })
		r.federate("foreign.test", r)
		r.until(func(v mirror.View) bool { return len(v.Federated) == 1 })
		for node, plain := range map[*corev3.Node]bool{old: true, text: true, yes: true, no: false, odd: configured, envoy.Node("new", 1, 18): configured,
			{Id: "nameless"}: configured, nil: configured} {
			s := envoy.New(t, r.path, node).Open()
			s.Ask("ROOTCA", "ALL", "spiffe://foreign.test")
			if !plain {
				gets(t, s, "ALL ROOTCA spiffe://foreign.test")
				continue
			}
			all := gets(t, s, "ROOTCA spiffe://foreign.test", "ALL validator_needed")
			if all["ROOTCA"].Trust[""] == nil || all["spiffe://foreign.test"].Trust[""] == nil {
				t.Errorf("%v: not plain", node)
			}
		}
	}
}

// W31, W32: what no Envoy asks.
func TestLimits(t *testing.T) {
	r := newRig(t, func(_ *sds.Config, c *workloadapi.Config) { c.Limits.RatePerUser = 100 })
	r.grant("a", "/a")
	many := make([]string, 10000)
	for i := range many {
		many[i] = "x"
	}
	for reason, req := range map[string]*discoveryv3.DiscoveryRequest{
		"too_many_names":        {ResourceNames: many},
		"resource_type_unknown": {TypeUrl: "type.googleapis.com/envoy.api.v2.auth.Secret"},
	} {
		s := r.proxy().Open()
		s.Send(req)
		_, err := s.Recv()
		refused(t, err, codes.InvalidArgument, reason)
		_, err = r.proxy().API().FetchSecrets(t.Context(), req)
		refused(t, err, codes.InvalidArgument, reason)
		later := r.proxy().Open()
		later.Ask("default")
		gets(t, later, "default")
		later.Send(req)
		_, err = later.Recv()
		refused(t, err, codes.InvalidArgument, reason)
	}
	s := r.proxy().Open()
	s.Ask("default", strings.Repeat("x", 32<<10))
	_, err := s.Recv()
	refused(t, err, codes.InvalidArgument, "too_many_names")
	s = r.proxy().Open()
	s.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: strings.Repeat("x", 1<<20)}})
	if _, err := s.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Error(err)
	}

	// R49: each request counts as a call does.
	s = r.proxy().Open()
	for s.Ask("default") {
	}
	for err = nil; err == nil; {
		_, err = s.Recv()
	}
	refused(t, err, codes.Unavailable, "rate_limited")
}

// A client that has nothing more to say is still told of changes; one that says
// nothing at all gets nothing.
func TestHalfClosed(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	s := r.proxy().Open()
	s.Ask("default")
	s.Close()
	gets(t, s, "default")
	r.grant("a", "/a", func(g *syncv1.Grant) { g.DnsNames = []string{"a.test"} })
	gets(t, s, "default")
	silent := r.proxy().Open()
	silent.Close()
	if _, err := silent.Recv(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// What changes for others costs a stream nothing, not even a look at its caller;
// nor does an answer to what was sent.
func TestIdle(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	s := r.proxy().Open()
	s.Ask("default")
	gets(t, s, "default")
	looks, answers := r.attestor.count(), r.service.Stats().Answers
	for range 50 {
		r.server.Put(r.server.Grant("x", "/other", "unix:uid:2"))
		s.Ask("default")
	}
	r.until(func(v mirror.View) bool { return v.Synced })
	eventually(t, func() bool { return r.mirror.Report(0).Position.GetRevision() == r.server.Position().GetRevision() })
	s.Ask("ROOTCA") // which is answered, and so all before it was heard
	gets(t, s, "ROOTCA")
	if n := r.attestor.count(); n > looks+1 {
		t.Errorf("the caller was looked at %d times", n-looks)
	}
	if n := r.service.Stats().Answers; n != answers+1 {
		t.Errorf("%d answers were sent, want one", n-answers)
	}
}

// R42: with a push the caller is looked at again, and what it is not any more it
// does not get.
func TestReattested(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	s := r.proxy().Open()
	s.Ask("default")
	gets(t, s, "default")
	r.attestor.uid("2")
	r.grant("a", "/a", func(g *syncv1.Grant) { g.DnsNames = []string{"a.test"} })
	_, err := s.Recv()
	refused(t, err, codes.PermissionDenied, "selector_mismatch")
}

// The service may have a socket of its own, and be there alone.
func TestOwnSocket(t *testing.T) {
	for _, apart := range []bool{false, true} {
		var own string
		r := newRig(t, func(_ *sds.Config, c *workloadapi.Config) {
			own = filepath.Join(filepath.Dir(c.SocketPath), "own", "socket")
			c.SecretsPath, c.SecretsApart = own, apart
		})
		r.grant("a", "/a")
		s := envoy.New(t, own, nil).Open()
		s.Ask("default")
		gets(t, s, "default")
		if code := workloadCall(t, own); code != codes.Unimplemented {
			t.Errorf("the Workload API is at the other socket: %v", code)
		}
		if code := workloadCall(t, r.path); code != codes.OK {
			t.Errorf("the Workload API is not at its socket: %v", code)
		}
		s = r.proxy().Open()
		s.Ask("default")
		if _, err := s.Recv(); apart != (status.Code(err) == codes.Unimplemented) {
			t.Errorf("apart: %v; at the Workload API's socket: %v", apart, err)
		}
	}
}
