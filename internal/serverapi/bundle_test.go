package serverapi_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func authorities(t *testing.T, r *rig) (*spiretypes.X509Certificate, *spiretypes.JWTKey) {
	t.Helper()
	own, err := bundlev1.NewBundleClient(r.admin).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	return own.X509Authorities[0], &spiretypes.JWTKey{KeyId: fmt.Sprintf("%x", spki[len(spki)-8:]), PublicKey: spki}
}

func TestOwnBundle(t *testing.T) {
	r, other := newRig(t), newRig(t)
	client := bundlev1.NewBundleClient(r.admin)
	public, err := bundlev1.NewBundleClient(r.connect(nil)).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if public.TrustDomain != "example.org" || len(public.X509Authorities) == 0 || len(public.JwtAuthorities) == 0 || public.SequenceNumber == 0 || public.RefreshHint == 0 {
		t.Errorf("GetBundle() = %v", public)
	}
	masked, err := client.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: &spiretypes.BundleMask{SequenceNumber: true}})
	if err != nil || masked.TrustDomain == "" || masked.X509Authorities != nil || masked.SequenceNumber == 0 {
		t.Errorf("masked: %v, %v", masked, err)
	}
	root, key := authorities(t, other)
	appended, err := client.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*spiretypes.X509Certificate{root}, JwtAuthorities: []*spiretypes.JWTKey{key}})
	if err != nil || appended.SequenceNumber != public.SequenceNumber+1 || len(appended.X509Authorities) != len(public.X509Authorities)+1 { // R75
		t.Errorf("AppendBundle() = %v, %v, want sequence %d", appended, err, public.SequenceNumber+1)
	}
	again, err := client.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*spiretypes.X509Certificate{root}})
	if err != nil || again.SequenceNumber != appended.SequenceNumber {
		t.Errorf("appending it again: %v, %v, want the sequence unchanged", again.GetSequenceNumber(), err)
	}
	for name, req := range map[string]*bundlev1.AppendBundleRequest{
		"nothing":       {},
		"garbage":       {X509Authorities: []*spiretypes.X509Certificate{{Asn1: []byte("x")}}},
		"two in one":    {X509Authorities: []*spiretypes.X509Certificate{{Asn1: append(root.Asn1, root.Asn1...)}}},
		"nil":           {X509Authorities: []*spiretypes.X509Certificate{nil}},
		"JWT no key id": {JwtAuthorities: []*spiretypes.JWTKey{{PublicKey: key.PublicKey}}},
		"JWT garbage":   {JwtAuthorities: []*spiretypes.JWTKey{{KeyId: "a", PublicKey: []byte("x")}}},
	} {
		_, err := client.AppendBundle(t.Context(), req)
		wantCode(t, name, err, codes.InvalidArgument, "")
	}
}

func TestFederatedBundles(t *testing.T) { // R90, R75
	r, other := newRig(t), newRig(t)
	client := bundlev1.NewBundleClient(r.admin)
	root, key := authorities(t, other)
	b := func(td string, sequence uint64, roots ...*spiretypes.X509Certificate) *spiretypes.Bundle {
		return &spiretypes.Bundle{TrustDomain: td, SequenceNumber: sequence, RefreshHint: 60, X509Authorities: roots}
	}
	created, err := client.BatchCreateFederatedBundle(t.Context(), &bundlev1.BatchCreateFederatedBundleRequest{Bundle: []*spiretypes.Bundle{
		b("a.org", 5, root), b("example.org", 1, root), b("a.org", 6, root), b("UPPER", 1, root), nil, b("b.org", 1, root), b("c.org", 1),
	}})
	if err != nil {
		t.Fatal(err)
	}
	var got []codes.Code
	for _, result := range created.Results {
		got = append(got, codes.Code(result.Status.Code))
	}
	want := []codes.Code{codes.OK, codes.InvalidArgument, codes.AlreadyExists, codes.InvalidArgument, codes.InvalidArgument, codes.OK, codes.OK}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("created: %v, want %v", got, want)
	}
	set := func(in *spiretypes.Bundle) *bundlev1.BatchSetFederatedBundleResponse_Result {
		t.Helper()
		resp, err := client.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*spiretypes.Bundle{in}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results[0]
	}
	if result := set(b("a.org", 4, root)); codes.Code(result.Status.Code) != codes.FailedPrecondition {
		t.Errorf("a lower sequence: %v, want FailedPrecondition", result.Status)
	}
	if result := set(b("a.org", 5)); result.Status.Code != 0 || result.Bundle.SequenceNumber != 6 {
		t.Errorf("the same sequence with other content: %v, want it to grow", result)
	}
	for i, in := range []*spiretypes.Bundle{b("a.org", 0, root), b("a.org", 0), b("a.org", 0, root)} {
		if result := set(in); result.Status.Code != 0 || result.Bundle.SequenceNumber != uint64(7+i) {
			t.Errorf("other content without a sequence: %v, want %d", result, 7+i)
		}
	}
	updated, err := client.BatchUpdateFederatedBundle(t.Context(), &bundlev1.BatchUpdateFederatedBundleRequest{
		Bundle:    []*spiretypes.Bundle{{TrustDomain: "b.org", JwtAuthorities: []*spiretypes.JWTKey{key}}, {TrustDomain: "unknown.org"}},
		InputMask: &spiretypes.BundleMask{JwtAuthorities: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	if first := updated.Results[0]; first.Status.Code != 0 || len(first.Bundle.X509Authorities) != 1 || len(first.Bundle.JwtAuthorities) != 1 || first.Bundle.RefreshHint != 60 {
		t.Errorf("updated: %v", first)
	}
	if second := updated.Results[1]; codes.Code(second.Status.Code) != codes.NotFound {
		t.Errorf("updating what is not there: %v", second.Status)
	}
	seen := ""
	for token := ""; ; {
		page, err := client.ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageSize: 2, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range page.Bundles {
			seen += b.TrustDomain + " "
		}
		if token = page.NextPageToken; token == "" {
			break
		}
	}
	if seen != "a.org b.org c.org " {
		t.Errorf("listed %q", seen)
	}
	if count, err := client.CountBundles(t.Context(), &bundlev1.CountBundlesRequest{}); err != nil || count.Count != 4 {
		t.Errorf("CountBundles() = %v, %v, want 4", count, err)
	}

	agent := r.agent()
	asAgent := bundlev1.NewBundleClient(r.connect(&agent))
	if _, err := asAgent.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "b.org"}); err != nil {
		t.Error(err)
	}
	_, err = asAgent.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "unknown.org"})
	wantCode(t, "unknown", err, codes.NotFound, "")
	_, err = asAgent.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "example.org"})
	wantCode(t, "the own one", err, codes.InvalidArgument, "trust_domain_own")

	// The three ways to delete.
	for i, name := range []string{"a.org", "b.org", "c.org"} {
		e := entryUnder(agent.id, fmt.Sprintf("/federates/%d", i))
		e.FederatesWith = []string{name, "z.org"}
		r.create(e)
	}
	remove := func(name string, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) codes.Code {
		t.Helper()
		resp, err := client.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{name}, Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		return codes.Code(resp.Results[0].Status.Code)
	}
	if code := remove("a.org", bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT); code != codes.FailedPrecondition {
		t.Errorf("restrict: %v", code)
	}
	if code := remove("b.org", bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE); code != codes.OK {
		t.Errorf("dissociate: %v", code)
	}
	if code := remove("c.org", bundlev1.BatchDeleteFederatedBundleRequest_DELETE); code != codes.OK {
		t.Errorf("delete: %v", code)
	}
	if code := remove("b.org", bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT); code != codes.NotFound {
		t.Errorf("again: %v", code)
	}
	if code := remove("a.org", 9); code != codes.InvalidArgument {
		t.Errorf("an unknown mode: %v", code)
	}
	list, err := entryv1.NewEntryClient(r.admin).ListEntries(t.Context(), &entryv1.ListEntriesRequest{OutputMask: &spiretypes.EntryMask{SpiffeId: true, FederatesWith: true}})
	if err != nil {
		t.Fatal(err)
	}
	left := map[string]string{}
	for _, e := range list.Entries {
		left[e.SpiffeId.Path] = fmt.Sprint(e.FederatesWith)
	}
	if want := map[string]string{"/federates/0": "[a.org z.org]", "/federates/1": "[z.org]"}; fmt.Sprint(left) != fmt.Sprint(want) {
		t.Errorf("entries left: %v, want %v", left, want)
	}
}

func TestHealth(t *testing.T) { // R105
	var sick atomic.Bool
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) {
		c.Health = func() error {
			if sick.Load() {
				return errors.New("cannot sign")
			}
			return nil
		}
	})
	client := grpc_health_v1.NewHealthClient(r.admin)
	check := func(want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		if got, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil || got.Status != want {
			t.Errorf("Check() = %v, %v, want %v", got, err, want)
		}
	}
	check(grpc_health_v1.HealthCheckResponse_SERVING)
	sick.Store(true)
	check(grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	sick.Store(false)
	check(grpc_health_v1.HealthCheckResponse_SERVING)
	_, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "x"})
	wantCode(t, "one service", err, codes.NotFound, "service_unknown")
	_, err = grpc_health_v1.NewHealthClient(r.connect(nil)).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	wantCode(t, "over TCP", err, codes.Unimplemented, "")
}

func TestPanicIsContained(t *testing.T) { // R99
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) { c.Health = func() error { panic("oops") } })
	r.panics = 1
	client := grpc_health_v1.NewHealthClient(r.admin)
	_, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	wantCode(t, "a handler that panics", err, codes.Internal, "panic")
	if _, err := bundlev1.NewBundleClient(r.admin).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
		t.Errorf("the next call: %v", err)
	}
}
