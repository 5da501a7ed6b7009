package workloadapi_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/plastron/plastron/internal/process"
	attest "github.com/plastron/plastron/internal/workload"
	"github.com/plastron/plastron/internal/workloadapi"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

const deadline = time.Minute

// TestMain lets the test binary play a caller that is another process.
func TestMain(m *testing.M) {
	if path := os.Getenv("WORKLOADAPI_TEST_SOCKET"); path != "" {
		os.Exit(otherProcess(path))
	}
	if os.Getenv("WORKLOADAPI_TEST_ROLE") != "" {
		os.Exit(actor())
	}
	os.Exit(m.Run())
}

// otherProcess opens a stream, says what it gets, and lives until its input ends.
func otherProcess(path string) int {
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return 1
	}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return 1
	}
	resp, err := stream.Recv()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(resp.GetSvids()[0].GetSpiffeId())
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// facts is an attestor whose answers a test chooses.
type facts struct {
	mu        sync.Mutex
	selectors []entry.Selector
	values    map[string]string
	err       error
	calls     int
	panics    bool
}

func (f *facts) set(err error, texts ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err, f.selectors = err, nil
	for _, text := range texts {
		s, err := entry.ParseSelector(text)
		if err != nil {
			panic(err)
		}
		f.selectors = append(f.selectors, s)
	}
}

func (f *facts) Attest(context.Context, int) (attest.Attested, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.panics {
		panic("a bug in an attestor")
	}
	return attest.Attested{Selectors: f.selectors, Facts: f.values}, f.err
}

func (f *facts) state(values map[string]string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.values = values
}

func (f *facts) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// rig is a Workload API on a real socket over a mirror of a test server.
type rig struct {
	t      *testing.T
	server *mirrortest.Server
	mirror *mirror.Mirror
	api    *workloadapi.Server
	facts  *facts
	path   string
}

func inStep(m *mirror.Mirror) func() error {
	return func() error {
		if !m.Stats().Synced {
			return errors.New("not in step")
		}
		return nil
	}
}

func newRig(t *testing.T, change ...func(*workloadapi.Config)) *rig {
	t.Helper()
	s := mirrortest.New(t)
	log := slog.New(slog.DiscardHandler)
	m := mirror.New(mirror.Config{TrustDomain: s.TD, Link: s, Hint: s.Hint, Log: log})
	f := &facts{}
	f.set(nil, "unix:uid:1")
	cfg := workloadapi.Config{SocketPath: filepath.Join(shortDir(t), "s"), TrustDomain: s.TD, Mirror: m,
		Health:    inStep(m),
		Attestors: []workloadapi.Attestor{{Name: "facts", Attestor: f}}, Log: log}
	for _, c := range change {
		c(&cfg)
	}
	api, err := workloadapi.Open(cfg)
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
	t.Cleanup(func() { cancel(); wg.Wait() })
	r := &rig{t: t, server: s, mirror: m, api: api, facts: f, path: cfg.SocketPath}
	within(t, m.Synced())
	return r
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "plw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func within(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(deadline):
		t.Fatal("it did not happen in time")
	}
}

func (r *rig) dial() *grpc.ClientConn {
	r.t.Helper()
	conn, err := grpc.NewClient("unix:"+r.path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(16<<20)))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return conn
}

func (r *rig) client() workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(r.dial())
}

func header(ctx context.Context, values ...string) context.Context {
	for _, v := range values {
		ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", v)
	}
	return ctx
}

func (r *rig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(r.t.Context(), deadline)
	r.t.Cleanup(cancel)
	return header(ctx, "true")
}

func (r *rig) grant(id, path string, change ...func(*syncv1.Grant)) {
	r.t.Helper()
	g := r.server.Grant(id, path, "unix:uid:1")
	for _, c := range change {
		c(g)
	}
	r.server.Put(g)
	sub := r.mirror.Subscribe(entry.Facts{Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}})
	defer sub.Close()
	mirrortest.Until(r.t, sub, func(v mirror.View) bool {
		for _, i := range v.Identities {
			if i.GrantID == id && i.ID.Path() == path {
				return v.Pending == 0
			}
		}
		return false
	})
}

// wants checks code and reason of a refusal (R131).
func wants(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	got := ""
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			got = info.GetReason()
		}
	}
	if status.Code(err) != code || got != reason {
		t.Errorf("got %v with reason %q, want %v with %q", err, got, code, reason)
	}
}

// calls are all methods of the API, the two that are not offered included.
func calls(c *grpc.ClientConn) map[string]func(context.Context) error {
	api := workload.NewSpiffeWorkloadAPIClient(c)
	first := func(s interface{ RecvMsg(any) error }, err error, m any) error {
		if err != nil {
			return err
		}
		return s.RecvMsg(m)
	}
	raw := func(method string) func(context.Context) error {
		return func(ctx context.Context) error {
			s, err := c.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/SpiffeWorkloadAPI/"+method)
			if err != nil {
				return err
			}
			if err := s.SendMsg(&emptypb.Empty{}); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			return s.RecvMsg(&emptypb.Empty{})
		}
	}
	return map[string]func(context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error {
			s, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			return first(s, err, &workload.X509SVIDResponse{})
		},
		"FetchX509Bundles": func(ctx context.Context) error {
			s, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			return first(s, err, &workload.X509BundlesResponse{})
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
			return err
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			s, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
			return first(s, err, &workload.JWTBundlesResponse{})
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"})
			return err
		},
		"FetchWITSVID": raw("FetchWITSVID"), "FetchWITBundles": raw("FetchWITBundles"),
	}
}

// W1, R51, WEP-3-e: no work for a call without the header, in any spelling.
func TestSecurityHeader(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	conn := r.dial()
	for name, call := range calls(conn) {
		before := r.facts.count()
		for _, values := range [][]string{nil, {"True"}, {"TRUE"}, {"1"}, {" true x"}, {""}, {"true", "true"}} {
			err := call(header(t.Context(), values...))
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(status.Convert(err).Message(), "workload.spiffe.io") {
				t.Errorf("%s with %q: %v", name, values, err)
			}
			wants(t, err, codes.InvalidArgument, "security_header_missing")
		}
		if r.facts.count() != before {
			t.Errorf("%s: the caller was attested", name)
		}
		err := call(r.ctx())
		switch {
		case strings.Contains(name, "WIT"):
			wants(t, err, codes.Unimplemented, "profile_unsupported") // WAPI-7-a
		case name == "ValidateJWTSVID":
			wants(t, err, codes.InvalidArgument, "jwt_malformed")
		case err != nil:
			t.Errorf("%s: %v", name, err)
		}
	}
	// W10: other services and methods, and reflection, are not there.
	for _, method := range []string{"/SpiffeWorkloadAPI/Nope", "/spiffe.workload.SpiffeWorkloadAPI/FetchX509SVID", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"} {
		if err := conn.Invoke(r.ctx(), method, &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", method, err)
		}
	}
	// The health service needs no header.
	h, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil || h.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Error(h, err)
	}
}

func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// WAPI-5.2.1-i, WEP-6-e: no identity is PermissionDenied, never an empty answer.
func TestNoIdentity(t *testing.T) {
	r := newRig(t)
	for name, call := range calls(r.dial()) {
		if strings.Contains(name, "WIT") || name == "ValidateJWTSVID" {
			continue
		}
		err := call(r.ctx())
		wants(t, err, codes.PermissionDenied, "no_grant")
		if text := status.Convert(err).Message(); !strings.HasPrefix(text, "no identity issued") || !strings.Contains(text, "(no_grant)") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// WAPI-5.2.2-c with the option on: the own bundle and nothing else.
func TestUnauthenticatedVerifiers(t *testing.T) {
	r := newRig(t, func(c *workloadapi.Config) { c.AllowUnauthenticatedVerifiers = true })
	conn := r.dial()
	for name, call := range calls(conn) {
		switch err := call(r.ctx()); name {
		case "FetchX509Bundles", "FetchJWTBundles":
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case "FetchX509SVID", "FetchJWTSVID":
			wants(t, err, codes.PermissionDenied, "no_grant")
		}
	}
	s, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509Bundles(r.ctx(), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s.Recv(); err != nil || len(m.GetBundles()) != 1 {
		t.Error(m, err)
	}
}

// R60, WEP-6-c: before the first sync it is Unavailable, never "no identity".
func TestNotSynced(t *testing.T) {
	s := mirrortest.New(t)
	s.Down(true)
	log := slog.New(slog.DiscardHandler)
	m := mirror.New(mirror.Config{TrustDomain: s.TD, Link: s, Log: log})
	f := &facts{}
	f.set(nil, "unix:uid:1")
	api, err := workloadapi.Open(workloadapi.Config{SocketPath: filepath.Join(shortDir(t), "s"), TrustDomain: s.TD, Mirror: m, Health: inStep(m),
		Attestors: []workloadapi.Attestor{{Name: "facts", Attestor: f}}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { api.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	r := &rig{t: t, path: api.SocketPath()}
	conn := r.dial()
	for name, call := range calls(conn) {
		if !strings.Contains(name, "WIT") {
			wants(t, call(r.ctx()), codes.Unavailable, "not_synced")
		}
	}
	h, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil || h.GetStatus() != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
		t.Error(h, err)
	}
}

// The life of one stream: first message at once and whole, one message for each
// change, none for what does not concern it, PermissionDenied when all is gone (W29).
func TestX509Stream(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a", func(g *syncv1.Grant) { g.Hint = "first"; g.CreatedAt-- })
	s, err := r.client().FetchX509SVID(r.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	recv := func(want ...string) *workload.X509SVIDResponse {
		t.Helper()
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, x := range m.GetSvids() {
			got = append(got, strings.TrimPrefix(x.GetSpiffeId(), "spiffe://example.org"))
			if len(x.GetX509Svid()) == 0 || x.GetX509Svid()[0] != 0x30 || x.GetX509SvidKey()[0] != 0x30 || x.GetBundle()[0] != 0x30 {
				t.Error("a mandatory field is empty or not DER")
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("got %v, want %v", got, want)
		}
		return m
	}
	recv("/a")
	// WAPI-4.3-a: a second identity; both are in the message, the older first (G10).
	r.server.Put(r.server.Grant("b", "/b", "unix:uid:1"))
	recv("/a", "/b")
	// Not this caller's: the next message is that of the change after it.
	r.server.Put(r.server.Grant("x", "/x", "unix:uid:2"))
	// WAPI-5.2.1-g: a hint that is taken; the older grant keeps it.
	same := r.server.Grant("c", "/c", "unix:uid:1")
	same.Hint = "first"
	r.server.Put(same)
	foreign := r.server.Grant("b", "/b", "unix:uid:1")
	foreign.FederatesWith = []string{"foreign.test"}
	r.server.Put(foreign)
	recv("/a", "/b")
	r.server.PutBundle("foreign.test", ownBundleAs(t, r, "foreign.test"))
	for {
		m := recv("/a", "/b")
		if b := m.GetFederatedBundles()["spiffe://foreign.test"]; len(b) > 0 && b[0] == 0x30 {
			break
		}
	}
	// WAPI-4.4-a: gone means gone.
	r.server.PutBundle("foreign.test", nil)
	for len(recv("/a", "/b").GetFederatedBundles()) > 0 {
	}
	r.server.Remove("a")
	for {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if m.GetSvids()[0].GetSpiffeId() != "spiffe://example.org/a" {
			break
		}
	}
	r.server.Remove("b", "c")
	for err == nil {
		_, err = s.Recv()
	}
	wants(t, err, codes.PermissionDenied, "selector_mismatch")
}

func ownBundleAs(t *testing.T, r *rig, td string) *syncv1.Bundle {
	t.Helper()
	sub := r.mirror.Subscribe(entry.Facts{})
	defer sub.Close()
	b := &syncv1.Bundle{TrustDomain: td}
	for _, a := range sub.View().Bundle.Keys.X509 {
		b.X509Authorities = append(b.X509Authorities, &syncv1.X509Authority{Asn1: a.ASN1})
	}
	return b
}

// R42: the caller is looked at again with every push; lost selectors end the stream.
func TestReattestedOnPush(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	s, err := r.client().FetchX509SVID(r.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	r.facts.set(nil, "unix:uid:2")
	r.server.Put(r.server.Grant("b", "/b", "unix:uid:1"))
	_, err = s.Recv()
	wants(t, err, codes.PermissionDenied, "selector_mismatch")
}

// R62: what was found out about a connection's process is good for the calls of
// the next moment, and for no other connection.
func TestAttestedOnceForManyCalls(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	conn := r.dial()
	const many = 100
	for range many {
		if err := calls(conn)["FetchX509SVID"](r.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	n := r.facts.count()
	if n >= many/2 {
		t.Errorf("%d calls, attested %d times", many, n)
	}
	if err := calls(r.dial())["FetchX509SVID"](r.ctx()); err != nil {
		t.Fatal(err)
	}
	if r.facts.count() == n {
		t.Error("another connection was not attested")
	}
}

// RG43: that nothing could be found out is not the same as nothing found.
func TestAttestationFails(t *testing.T) {
	second := &facts{}
	second.set(nil, "unix:uid:1")
	r := newRig(t, func(c *workloadapi.Config) {
		c.Attestors = append(c.Attestors, workloadapi.Attestor{Name: "second", Attestor: second})
	})
	r.grant("a", "/a")
	call := calls(r.dial())["FetchX509SVID"]
	r.facts.set(errors.New("broken"))
	if err := call(r.ctx()); err != nil {
		t.Errorf("one of two attestors failed: %v", err)
	}
	second.set(errors.New("broken"))
	wants(t, call(r.ctx()), codes.Unavailable, "attestor_failed")
}

func TestJWT(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	r.grant("b", "/b")
	c := r.client()
	// W11
	many := make([]string, 1000)
	for i := range many {
		many[i] = strconv.Itoa(i)
	}
	for _, audience := range [][]string{nil, {""}, {"a", ""}, many, {strings.Repeat("x", 256<<10-100)}} {
		_, err := c.FetchJWTSVID(r.ctx(), &workload.JWTSVIDRequest{Audience: audience})
		wants(t, err, codes.InvalidArgument, "audience_invalid")
	}
	// W12, R12: not mine and not there are refused alike.
	for id, want := range map[string]codes.Code{"nonsense": codes.InvalidArgument, "spiffe://Example.org/a": codes.InvalidArgument,
		"spiffe://example.org/x": codes.PermissionDenied, "spiffe://other.test/a": codes.PermissionDenied} {
		_, err := c.FetchJWTSVID(r.ctx(), &workload.JWTSVIDRequest{Audience: []string{"x"}, SpiffeId: id})
		if status.Code(err) != want {
			t.Errorf("%s: %v", id, err)
		}
	}
	all, err := c.FetchJWTSVID(r.ctx(), &workload.JWTSVIDRequest{Audience: []string{"x", "y"}})
	if err != nil || len(all.GetSvids()) != 2 {
		t.Fatal(all, err)
	}
	one, err := c.FetchJWTSVID(r.ctx(), &workload.JWTSVIDRequest{Audience: []string{"y", "x"}, SpiffeId: "spiffe://example.org/b"})
	if err != nil || len(one.GetSvids()) != 1 || one.GetSvids()[0].GetSvid() != all.GetSvids()[1].GetSvid() {
		t.Fatal(one, err)
	}
	token := one.GetSvids()[0].GetSvid()
	valid, err := c.ValidateJWTSVID(r.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: token})
	if err != nil || valid.GetSpiffeId() != "spiffe://example.org/b" || valid.GetClaims().GetFields()["sub"].GetStringValue() != valid.GetSpiffeId() ||
		valid.GetClaims().GetFields()["exp"].GetNumberValue() == 0 || valid.GetClaims().GetFields()["aud"] == nil {
		t.Error(valid, err)
	}
	for _, req := range []*workload.ValidateJWTSVIDRequest{{}, {Audience: "x"}, {Svid: token}, {Audience: "z", Svid: token},
		{Audience: "x", Svid: token + "x"}, {Audience: "x", Svid: strings.Repeat("a", 100<<10)}} {
		if _, err := c.ValidateJWTSVID(r.ctx(), req); status.Code(err) != codes.InvalidArgument || reasonOf(err) == "" {
			t.Errorf("%.40v: %v", req, err)
		}
	}
	// The caller needs no identity to validate.
	r.facts.set(nil)
	if _, err := c.ValidateJWTSVID(r.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: token}); err != nil {
		t.Error(err)
	}
	// WAPI-6.2.2: plain JWK sets.
	r.facts.set(nil, "unix:uid:1")
	s, err := c.FetchJWTBundles(r.ctx(), &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if set := string(m.GetBundles()["spiffe://example.org"]); err != nil || !strings.Contains(set, `"kid"`) || strings.Contains(set, `"use"`) {
		t.Error(set, err)
	}
}

// R38, W13: the caller exits; its stream ends within a second and leaves nothing (R50).
func TestCallerExits(t *testing.T) {
	for name, via := range map[string]process.Via{"so_peerpidfd": process.Auto, "pidfd_open": process.PIDFDOpen} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(c *workloadapi.Config) { c.Via = via })
			r.grant("a", "/a")
			base := r.mirror.Stats().Subscribers
			for range 3 {
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), "WORKLOADAPI_TEST_SOCKET="+r.path)
				in, _ := cmd.StdinPipe()
				out, _ := cmd.StdoutPipe()
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				line, err := bufio.NewReader(out).ReadString('\n')
				if err != nil || line != "spiffe://example.org/a\n" {
					t.Fatalf("the other process said %q, %v", line, err)
				}
				if n := r.mirror.Stats().Subscribers; n != base+1 {
					t.Fatalf("%d subscribers", n)
				}
				cmd.Process.Kill()
				in.Close()
				until(t, func() bool { return r.mirror.Stats().Subscribers == base })
				cmd.Wait()
			}
		})
	}
}

func until(t *testing.T, f func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	end := time.After(deadline)
	for !f() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("it never came to pass")
		}
	}
}

func countFDs(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// R49, W4, W5: limits hold, name themselves, and what is freed can be had again.
func TestLimits(t *testing.T) {
	var told sync.Map // whoever counts hears of calls that go no further than the limit, too
	r := newRig(t, func(c *workloadapi.Config) {
		c.Limits = workloadapi.Limits{ConnectionsPerUser: 5, CallsPerUser: 10, RatePerUser: 10}
		c.Call = func(method, code, reason string, _ time.Duration) { told.Store(method+" "+code+" "+reason, true) }
	})
	r.grant("a", "/a")
	conn := r.dial()
	api := workload.NewSpiffeWorkloadAPIClient(conn)
	ctx, cancel := context.WithCancel(r.ctx())
	for range 10 {
		s, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	wants(t, calls(conn)["FetchJWTSVID"](r.ctx()), codes.Unavailable, "rate_limited") // WEP-6-c
	if _, ok := told.Load("/SpiffeWorkloadAPI/FetchJWTSVID Unavailable rate_limited"); !ok {
		t.Error("nobody was told of the refused call")
	}
	cancel()
	until(t, func() bool { return r.mirror.Stats().Subscribers == 0 })
	// Several at a time, for one after the other a slow machine may not be fast enough.
	var callers sync.WaitGroup
	end := time.Now().Add(deadline)
	over := func() bool { return r.api.Stats().OverLimit["rate"] > 0 }
	for range 8 {
		callers.Go(func() {
			for !over() && time.Now().Before(end) {
				if err := calls(conn)["FetchJWTSVID"](r.ctx()); err != nil {
					wants(t, err, codes.Unavailable, "rate_limited")
				}
			}
		})
	}
	if callers.Wait(); !over() {
		t.Error("nobody is refused for the rate of calls")
	}
	var open []net.Conn
	for range 4 {
		c, err := net.Dial("unix", r.path)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	sixth, err := net.Dial("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	defer sixth.Close()
	sixth.SetDeadline(time.Now().Add(deadline))
	if _, err := io.Copy(io.Discard, sixth); err != nil {
		t.Errorf("a connection over the limit was not closed: %v", err)
	}
	for _, c := range open {
		c.Close()
	}
}

// R99: an attestor that panics has failed, which is counted, and ends nothing else.
func TestPanic(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	conn := r.dial()
	r.facts.mu.Lock()
	r.facts.panics = true
	r.facts.mu.Unlock()
	wants(t, calls(conn)["FetchX509SVID"](r.ctx()), codes.Unavailable, "attestor_failed")
	wants(t, calls(conn)["FetchJWTSVID"](r.ctx()), codes.Unavailable, "attestor_failed")
	r.facts.mu.Lock()
	r.facts.panics = false
	r.facts.mu.Unlock()
	if err := calls(conn)["FetchX509SVID"](r.ctx()); err != nil || r.api.Panics() != 2 {
		t.Errorf("%v, %d panics", err, r.api.Panics())
	}
}

// W6, W9: headers and messages are bounded.
func TestSizes(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	c := r.client()
	big := metadata.AppendToOutgoingContext(r.ctx(), "x", strings.Repeat("y", 1<<20))
	if _, err := c.FetchJWTSVID(big, &workload.JWTSVIDRequest{Audience: []string{"a"}}); err == nil {
		t.Error("a header list of 1 MiB was accepted")
	}
	if _, err := c.FetchJWTSVID(r.ctx(), &workload.JWTSVIDRequest{Audience: []string{strings.Repeat("a", 4<<20+1)}}); err == nil {
		t.Error("a message of 4 MiB was accepted")
	}
	if err := calls(r.dial())["FetchX509SVID"](r.ctx()); err != nil {
		t.Error(err)
	}
}
