package serverapi_test

import (
	"sync/atomic"
	"testing"

	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
	"google.golang.org/grpc/codes"
)

// A server whose state is stale renews what it signed before, for the same agent,
// and grants nothing else: no other entry, no other agent, nothing minted, no
// node. It says so, and goes on as before when the state is fresh (R77).
func TestStale(t *testing.T) {
	var stale atomic.Bool
	is := func() error {
		if stale.Load() {
			return fault.New(fault.Unavailable, "state_stale", "it is old")
		}
		return nil
	}
	r := newRig(t, func(c *serverapi.Config, n *nodes.Config) {
		c.Stale, n.Stale = is, is
		c.Lacking = func() []error {
			if err := is(); err != nil {
				return []error{err}
			}
			return nil
		}
	})
	one, two := r.agent(), r.agent()
	before, after := r.create(entryUnder(one.id, "/before"))[0], r.create(entryUnder(one.id, "/after"))[0]
	spare, key := r.token(), newKey(t)
	csr := newCSR(t, newKey(t))
	issue := issuev1.NewIssueClient(r.connect(&one))
	x509 := func(entry string) string {
		t.Helper()
		resp, err := issue.X509(t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: entry, Csr: csr}}})
		if err != nil {
			t.Fatal(err)
		}
		if refusal := resp.Results[0].Refusal; refusal != nil && refusal.Remedy == "" {
			t.Error("a refusal does not say what to do")
		}
		return resp.Results[0].Refusal.GetReason()
	}
	jwt := func(entry string) string {
		_, err := issue.JWT(t.Context(), &issuev1.JWTRequest{GrantId: entry, Audience: []string{"a"}})
		return reasonOf(err)
	}
	expect := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	expect("before", x509(before.Id), "")
	stale.Store(true)
	expect("a renewal", x509(before.Id), "")
	expect("a token for the same", jwt(before.Id), "")
	expect("another entry", x509(after.Id), "state_stale")
	expect("a token for another entry", jwt(after.Id), "state_stale")
	resp, err := svidv1.NewSVIDClient(r.connect(&one)).BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{
		{EntryId: before.Id, Csr: csr}, {EntryId: after.Id, Csr: csr}}})
	if err != nil || resp.Results[0].Status.Code != int32(codes.OK) || resp.Results[1].Status.Code != int32(codes.Unavailable) {
		t.Errorf("a batch of both: %v, %v", resp, err)
	}
	// Entitlement comes first: what is another agent's stays unknown.
	other, err := issuev1.NewIssueClient(r.connect(&two)).X509(t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: before.Id, Csr: csr}}})
	if err != nil || other.Results[0].Refusal.GetReason() != "grant_unknown" {
		t.Errorf("another agent: %v, %v", other, err)
	}
	_, err = svidv1.NewSVIDClient(r.admin).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: wireID("/x"), Audience: []string{"a"}})
	wantCode(t, "mint", err, codes.Unavailable, "state_stale")
	_, err = svidv1.NewSVIDClient(r.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csr})
	wantCode(t, "mint", err, codes.Unavailable, "state_stale")
	_, err = r.attest(r.connect(nil), spare, key, newCSR(t, key))
	wantCode(t, "attest", err, codes.Unavailable, "state_stale")
	// The rows of agents are the store's to judge.
	if _, err := agentv1.NewAgentClient(r.connect(&one)).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, newKey(t))}}); err != nil {
		t.Errorf("an agent renews its own: %v", err)
	}
	status, err := statusv1.NewServerClient(r.admin).Status(t.Context(), &statusv1.ServerStatusRequest{})
	if err != nil || len(status.Degraded) != 1 || status.Degraded[0].Reason != "state_stale" || status.Unhealthy != nil {
		t.Errorf("status: %v, %v", status, err)
	}

	stale.Store(false)
	expect("another entry", x509(after.Id), "")
	if _, err := r.attest(r.connect(nil), spare, key, newCSR(t, key)); err != nil {
		t.Errorf("the token was spent on a refusal: %v", err) // K18
	}
}
