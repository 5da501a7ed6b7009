package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"testing"

	authorityv1 "github.com/plastron/plastron/api/plastron/authority/v1"
	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	joinv1 "github.com/plastron/plastron/api/plastron/join/v1"
	nodev1 "github.com/plastron/plastron/api/plastron/node/v1"
	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	localauthorityv1 "github.com/plastron/plastron/internal/api/spire/api/server/localauthority/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/server"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// A server that may not sign any more signs nothing, whichever call asks for it (R68).
func TestNothingIsSignedWithoutTheLease(t *testing.T) {
	r := start(t, configFor(shortDir(t)))
	cert, id, err := r.attest(r.token())
	if err != nil {
		t.Fatal(err)
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	request := func(csr []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return csr
	}
	csr, renewal := request(svid.NewCSR(newKey())), request(svid.NewCSR(newKey()))
	minted := request(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/minted"}}}, newKey()))
	create := func(path string, downstream bool) string {
		made, err := entryv1.NewEntryClient(r.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{
			SpiffeId: &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: path}, ParentId: id, Downstream: downstream,
			Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:1"}},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		return made.Results[0].Entry.Id
	}
	entry, nested := create("/web", false), create("/nested", true)
	nestedKey := newKey()
	issued, err := svidv1.NewSVIDClient(r.connect(&cert, nil)).BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{
		Params: []*svidv1.NewX509SVIDParams{{EntryId: nested, Csr: request(svid.NewCSR(nestedKey))}}})
	if err != nil {
		t.Fatal(err)
	}
	server := r.connect(&tls.Certificate{Certificate: issued.Results[0].Svid.CertChain, PrivateKey: nestedKey}, nil)
	spare := r.token()
	agent, admin := r.connect(&cert, nil), r.admin

	// signers asks for everything that is signed, and returns the error with which it was refused.
	signers := map[string]func(context.Context) error{
		"SVID/MintX509SVID": func(ctx context.Context) error {
			_, err := svidv1.NewSVIDClient(admin).MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: minted})
			return err
		},
		"SVID/MintJWTSVID": func(ctx context.Context) error {
			_, err := svidv1.NewSVIDClient(admin).MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{
				Id: &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: "/minted"}, Audience: []string{"a"}})
			return err
		},
		"SVID/BatchNewX509SVID": func(ctx context.Context) error {
			_, err := svidv1.NewSVIDClient(agent).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: entry, Csr: csr}}})
			return err
		},
		"SVID/NewJWTSVID": func(ctx context.Context) error {
			_, err := svidv1.NewSVIDClient(agent).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: entry, Audience: []string{"a"}})
			return err
		},
		"SVID/NewDownstreamX509CA": func(ctx context.Context) error {
			below := request(svid.NewAuthorityCSR(spiffeid.RequireTrustDomainFromString("example.org"), newKey()))
			_, err := svidv1.NewSVIDClient(server).NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: below})
			return err
		},
		"Issue/X509": func(ctx context.Context) error {
			_, err := issuev1.NewIssueClient(agent).X509(ctx, &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: entry, Csr: csr}}})
			return err
		},
		"Issue/JWT": func(ctx context.Context) error {
			_, err := issuev1.NewIssueClient(agent).JWT(ctx, &issuev1.JWTRequest{GrantId: entry, Audience: []string{"a"}})
			return err
		},
		"Agent/RenewAgent": func(ctx context.Context) error {
			_, err := agentv1.NewAgentClient(agent).RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: renewal}})
			return err
		},
		"Agent/AttestAgent": func(context.Context) error {
			_, _, err := r.attest(spare)
			spare = r.token()
			return err
		},
		"LocalAuthority/PrepareX509Authority": func(ctx context.Context) error {
			_, err := localauthorityv1.NewLocalAuthorityClient(admin).PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
			return err
		},
	}
	// others are the calls whose name looks like it and that sign nothing.
	others := []string{
		"SVID/MintWITSVID", "SVID/BatchNewWITSVID", // not offered
		"Bundle/PublishJWTAuthority",
		"Authority/Rotate",                                                         // what it signs, if no key is prepared, PrepareX509Authority does too
		"LocalAuthority/PrepareJWTAuthority", "LocalAuthority/PrepareWITAuthority", // a key, and no document
		"LocalAuthority/GetX509AuthorityState", "LocalAuthority/GetJWTAuthorityState",
		"LocalAuthority/ActivateX509Authority", "LocalAuthority/TaintX509Authority", "LocalAuthority/RevokeX509Authority",
		"LocalAuthority/ActivateJWTAuthority", "LocalAuthority/TaintJWTAuthority", "LocalAuthority/RevokeJWTAuthority",
		"LocalAuthority/TaintX509UpstreamAuthority", "LocalAuthority/RevokeX509UpstreamAuthority",
	}
	for _, service := range []grpc.ServiceDesc{
		agentv1.Agent_ServiceDesc, bundlev1.Bundle_ServiceDesc, entryv1.Entry_ServiceDesc, localauthorityv1.LocalAuthority_ServiceDesc, svidv1.SVID_ServiceDesc,
		authorityv1.Authority_ServiceDesc, issuev1.Issue_ServiceDesc, joinv1.Join_ServiceDesc, nodev1.Node_ServiceDesc, syncv1.Sync_ServiceDesc,
	} {
		var methods []string
		for _, m := range service.Methods {
			methods = append(methods, m.MethodName)
		}
		for _, s := range service.Streams {
			methods = append(methods, s.StreamName)
		}
		for _, m := range methods {
			name := service.ServiceName[strings.LastIndex(service.ServiceName, ".")+1:] + "/" + m
			looks := slices.ContainsFunc([]string{"SVID", "X509", "JWT", "Attest", "Renew", "Rotate", "Prepare", "Issue/"}, func(word string) bool { return strings.Contains(m, word) })
			if _, signs := signers[name]; looks && !signs && !slices.Contains(others, name) {
				t.Errorf("%s is not known to sign or not to", name)
			}
		}
	}

	for name, call := range signers {
		if err := call(t.Context()); err != nil {
			t.Fatalf("%s = %v before", name, err)
		}
	}
	r.StopSigning(t.Context())
	for name, call := range signers {
		err := call(t.Context())
		reason := ""
		for _, d := range status.Convert(err).Details() {
			if info, ok := d.(*errdetails.ErrorInfo); ok {
				reason = info.Reason
			}
		}
		if reason != "server_stopping" {
			t.Errorf("%s = %v (%s), want server_stopping", name, err, reason)
		}
	}
}

// One process at a time has a data directory, whatever the store (R68).
func TestDataDirIsLocked(t *testing.T) {
	c := configFor(shortDir(t))
	r := start(t, c)
	second := configFor(shortDir(t))
	second.Server.DataDir = c.Server.DataDir
	s, err := server.New(second, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); fault.ReasonOf(err) != "data_dir_in_use" || !strings.Contains(err.Error(), "process ") {
		t.Errorf("Run() = %v", err)
	}
	r.stop()
	start(t, c)
}
