package serverapi_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"testing"
	"time"

	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

func issueX509(t *testing.T, conn *grpc.ClientConn, grant string, csrs ...[]byte) []*issuev1.X509Result {
	t.Helper()
	req := &issuev1.X509Request{}
	for _, csr := range csrs {
		req.Items = append(req.Items, &issuev1.X509Item{GrantId: grant, Csr: csr})
	}
	resp, err := issuev1.NewIssueClient(conn).X509(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Results) != len(csrs) {
		t.Fatalf("%d results, want %d", len(resp.Results), len(csrs))
	}
	return resp.Results
}

func TestIssueX509(t *testing.T) { // R1, R2, R6, R8, C40
	r := newRig(t)
	agent := r.agent()
	conn := r.connect(&agent)
	soon := time.Now().Add(20 * time.Minute).Truncate(time.Second)
	e := entryUnder(agent.id, "/web")
	e.DnsNames, e.ExpiresAt = []string{"web.example.org"}, soon.Unix()
	made := r.create(e)[0]
	key := newKey(t)
	results := issueX509(t, conn, made.Id, newCSR(t, key), []byte("garbage"))
	if results[1].GetRefusal().GetReason() == "" {
		t.Error("a garbage request was signed")
	}
	good := results[0]
	if good.Refusal != nil {
		t.Fatalf("refused: %v", good.Refusal)
	}
	leaf, err := x509.ParseCertificate(good.CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	if id, err := svid.PeerID(leaf); err != nil || id.String() != "spiffe://example.org/web" || good.SpiffeId != id.String() {
		t.Errorf("ID = %v, %v", id, err)
	}
	if !leaf.NotAfter.Equal(soon) || good.ExpiresAt != soon.Unix() {
		t.Errorf("ends %v, want the entry's own end %v", leaf.NotAfter, soon)
	}
	if fmt.Sprint(leaf.DNSNames) != "[web.example.org]" || good.Revision != uint64(made.RevisionNumber) {
		t.Errorf("DNS names %v, revision %d, want those of the entry (%d)", leaf.DNSNames, good.Revision, made.RevisionNumber)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error("the key is not the request's")
	}
	if n := countInTrail(t, r, `"kind":"issuance"`, leaf.SerialNumber.String(), agent.id.String()); n != 1 { // R14
		t.Errorf("%d records of the issuance, want 1", n)
	}

	// Another agent, an unknown entry and a deleted one look the same (R12).
	other := r.agent()
	csr := newCSR(t, newKey(t))
	foreign := issueX509(t, r.connect(&other), made.Id, csr)[0].Refusal
	unknown := issueX509(t, r.connect(&other), "no-such-entry", csr)[0].Refusal
	if foreign.GetReason() != "grant_unknown" || foreign.String() != unknown.String() {
		t.Errorf("foreign: %v, unknown: %v, want the same refusal", foreign, unknown)
	}
	client := issuev1.NewIssueClient(conn)
	stated, err := client.X509(t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: made.Id, Facts: map[string]string{"a": "b"}, Csr: csr}}})
	if err != nil || stated.Results[0].Refusal.GetReason() != "facts_unexpected" {
		t.Errorf("facts for an exact entry: %v, %v", stated, err)
	}
	if _, err := entryv1.NewEntryClient(r.admin).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{made.Id}}); err != nil {
		t.Fatal(err)
	}
	if gone := issueX509(t, conn, made.Id, csr)[0].Refusal; gone.GetReason() != "grant_unknown" {
		t.Errorf("deleted: %v, want grant_unknown", gone)
	}
	_, err = client.X509(t.Context(), &issuev1.X509Request{Items: make([]*issuev1.X509Item, 501)})
	wantCode(t, "C39 501 items", err, codes.InvalidArgument, "batch_too_large")
}

func TestBatchNewX509SVID(t *testing.T) { // C40: results in order
	r := newRig(t)
	agent := r.agent()
	req := &svidv1.BatchNewX509SVIDRequest{}
	for i := range 20 {
		made := r.create(entryUnder(agent.id, fmt.Sprintf("/w%d", i)))[0]
		id := made.Id
		if i == 7 {
			id = "unknown"
		}
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: newCSR(t, newKey(t))})
	}
	resp, err := svidv1.NewSVIDClient(r.connect(&agent)).BatchNewX509SVID(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for i, result := range resp.Results {
		if i == 7 {
			if codes.Code(result.Status.Code) != codes.NotFound {
				t.Errorf("unknown entry: %v, want NotFound", result.Status)
			}
			continue
		}
		if result.Status.Code != 0 || result.Svid.Id.Path != fmt.Sprintf("/w%d", i) {
			t.Errorf("item %d: %v", i, result)
		}
	}
}

// checkJWT validates a token as a workload elsewhere would.
func checkJWT(t *testing.T, r *rig, token, audience string) svid.Claims {
	t.Helper()
	claims, err := svid.ValidateJWT(token, []string{audience}, func(_ spiffeid.TrustDomain, keyID string) (key crypto.PublicKey, ok bool) {
		r.registry.View(func(s *registry.Snapshot) {
			if b, err := s.Bundle(td); err == nil {
				key, ok = b.JWTKey(keyID)
			}
		})
		return key, ok
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return claims
}

func TestIssueJWT(t *testing.T) { // R10, R12
	r := newRig(t)
	agent := r.agent()
	client := issuev1.NewIssueClient(r.connect(&agent))
	made := r.create(entryUnder(agent.id, "/web"))[0]
	resp, err := client.JWT(t.Context(), &issuev1.JWTRequest{GrantId: made.Id, Audience: []string{"db", "cache"}})
	if err != nil {
		t.Fatal(err)
	}
	claims := checkJWT(t, r, resp.Token, "cache")
	if claims.ID.String() != "spiffe://example.org/web" || claims.Expiry.Unix() != resp.ExpiresAt || resp.ExpiresAt-resp.IssuedAt != 300 {
		t.Errorf("claims %+v, answer %v", claims, resp)
	}
	for name, audience := range map[string][]string{"none": nil, "an empty member": {"a", ""}, "101": make([]string, 101)} {
		_, err := client.JWT(t.Context(), &issuev1.JWTRequest{GrantId: made.Id, Audience: audience})
		wantCode(t, name, err, codes.InvalidArgument, "audience_invalid")
	}
	other := r.agent()
	stranger := issuev1.NewIssueClient(r.connect(&other))
	_, foreign := stranger.JWT(t.Context(), &issuev1.JWTRequest{GrantId: made.Id, Audience: []string{"a"}})
	_, unknown := stranger.JWT(t.Context(), &issuev1.JWTRequest{GrantId: "unknown", Audience: []string{"a"}})
	wantCode(t, "another agent's grant", foreign, codes.NotFound, "grant_unknown")
	if foreign.Error() != unknown.Error() {
		t.Errorf("%v differs from %v", foreign, unknown)
	}
	if n := countInTrail(t, r, resp.Token); n != 0 {
		t.Error("the audit trail holds a token")
	}
}

func TestMint(t *testing.T) { // C26-C28
	r := newRig(t)
	client := svidv1.NewSVIDClient(r.admin)
	minted, err := client.MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: wireID("/tool"), Audience: []string{"a"}, Ttl: 60})
	if err != nil {
		t.Fatal(err)
	}
	if claims := checkJWT(t, r, minted.Svid.Token, "a"); claims.ID.Path() != "/tool" {
		t.Errorf("claims %+v", claims)
	}
	for name, id := range map[string]*spiretypes.SPIFFEID{
		"reserved": wireID("/spire/server"), "an agent": wireID("/spire/agent/x"), "no path": wireID(""), "missing": nil,
		"foreign": {TrustDomain: "other.org", Path: "/a"}, "a slash in the domain": {TrustDomain: "example.org/spire", Path: "/a"},
	} {
		_, err := client.MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: id, Audience: []string{"a"}})
		wantCode(t, "JWT for "+name, err, codes.InvalidArgument, "")
	}
	csr := func(template x509.CertificateRequest) []byte {
		der, err := x509.CreateCertificateRequest(nil, &template, newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	good, err := client.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Ttl: 60, Csr: csr(x509.CertificateRequest{
		URIs: uris(t, "spiffe://example.org/tool"), DNSNames: []string{"tool.example.org"},
	})})
	if err != nil {
		t.Fatal(err)
	}
	if good.Svid.Id.Path != "/tool" {
		t.Errorf("minted %v", good.Svid.Id)
	}
	for name, template := range map[string]x509.CertificateRequest{
		"C26 two URIs":       {URIs: uris(t, "spiffe://example.org/a", "spiffe://example.org/b")},
		"C26 none":           {},
		"C27 reserved":       {URIs: uris(t, "spiffe://example.org/spire/agent/x")},
		"C27 foreign":        {URIs: uris(t, "spiffe://other.org/a")},
		"C28 wildcard cover": {URIs: uris(t, "spiffe://example.org/a"), DNSNames: []string{"*.example.org", "a.example.org"}},
	} {
		_, err := client.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csr(template)})
		wantCode(t, name, err, codes.InvalidArgument, "")
	}
}

func TestUnsupportedSayWhy(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	_, err := svidv1.NewSVIDClient(r.connect(&agent)).BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{})
	wantCode(t, "WIT", err, codes.Unimplemented, "wit_unsupported")
}

func TestBannedAgentGetsNothingSigned(t *testing.T) { // R30, in the same instant
	r := newRig(t)
	agent := r.agent()
	conn := r.connect(&agent)
	made := r.create(entryUnder(agent.id, "/web"))[0]
	csr := newCSR(t, newKey(t))
	if _, err := agentv1.NewAgentClient(r.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(agent.id.Path())}); err != nil {
		t.Fatal(err)
	}
	_, err := issuev1.NewIssueClient(conn).X509(context.Background(), &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: made.Id, Csr: csr}}})
	wantCode(t, "signing for a banned agent", err, codes.PermissionDenied, "agent_banned")
}

func TestNothingIsSignedOffTheRecord(t *testing.T) { // R14
	for _, isStrict := range []bool{true, false} {
		t.Run(fmt.Sprintf("strict=%v", isStrict), func(t *testing.T) {
			var options []option
			if isStrict {
				options = append(options, strict(t))
			}
			var trail *audit.Writer
			options = append(options, func(c *serverapi.Config, _ *nodes.Config) { trail = c.Audit })
			r := newRig(t, options...)
			agent := r.agent()
			conn := r.connect(&agent)
			made := r.create(entryUnder(agent.id, "/web"))[0]
			trail.Close() // from here on it cannot be written
			_, err := issuev1.NewIssueClient(conn).X509(t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: made.Id, Csr: newCSR(t, newKey(t))}}})
			_, jwtErr := issuev1.NewIssueClient(conn).JWT(t.Context(), &issuev1.JWTRequest{GrantId: made.Id, Audience: []string{"a"}})
			if !isStrict {
				if err != nil || jwtErr != nil || trail.Dropped() != 2 {
					t.Errorf("signing: %v, %v, %d events lost, want it to go on and to be counted", err, jwtErr, trail.Dropped())
				}
				return
			}
			wantCode(t, "X.509", err, codes.Unavailable, "audit_unavailable")
			wantCode(t, "JWT", jwtErr, codes.Unavailable, "audit_unavailable")
			token := r.token()
			key := newKey(t)
			_, err = r.attest(r.connect(nil), token, key, newCSR(t, key))
			wantCode(t, "attesting", err, codes.Unavailable, "audit_unavailable")
			if _, err := renew(t, conn); reasonOf(err) != "audit_unavailable" {
				t.Errorf("renewing: %v", err)
			}
		})
	}
}
