package system_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/api/plastron/rule/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// spireAgent does with a server what a SPIRE 1.15 agent does, in that order, with
// those masks, sizes and deadlines, and believes what such an agent believes. It
// uses nothing of our own but the messages.
type spireAgent struct {
	d    *deployment
	t    *testing.T
	id   string
	svid tls.Certificate
	conn *grpc.ClientConn // with its certificate

	reattestable bool
	cache        map[string]*spiretypes.Entry
	asked        []string // entries that the last sync fetched by id
	pages        []int    // sizes of the pages of revisions in it
}

// limit is what one exchange with the server may take.
func (a *spireAgent) limit() context.Context {
	ctx, cancel := context.WithTimeout(a.t.Context(), patience)
	a.t.Cleanup(cancel)
	return ctx
}

// csr is a request as the agent makes them: nothing in it but a subject.
func (a *spireAgent) csr(key *ecdsa.PrivateKey) []byte {
	a.t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}, SignatureAlgorithm: x509.ECDSAWithSHA256,
	}, key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// attest attests over a connection that shows no certificate, fetches the bundle
// over the same, and connects anew with what it was given.
func (a *spireAgent) attest(kind string, payload []byte, answer func(challenge []byte) []byte) error {
	a.t.Helper()
	conn, key := a.d.dialServer(nil), newKey(a.t)
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(a.limit())
	if err != nil {
		return err
	}
	send := func(m *agentv1.AttestAgentRequest) {
		a.t.Helper()
		if err := stream.Send(m); err != nil && !errors.Is(err, io.EOF) {
			a.t.Fatal(err)
		}
	}
	send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &spiretypes.AttestationData{Type: kind, Payload: payload}, Params: &agentv1.AgentX509SVIDParams{Csr: a.csr(key)}}}})
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		if result := m.GetResult(); result != nil {
			if err := stream.CloseSend(); err != nil {
				a.t.Fatal(err)
			}
			a.reattestable = result.Reattestable
			a.use(result.Svid, key)
			break
		}
		send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer(m.GetChallenge())}})
	}
	a.bundle(conn)
	return nil
}

// use takes over an SVID of its own.
func (a *spireAgent) use(svid *spiretypes.X509SVID, key *ecdsa.PrivateKey) {
	a.t.Helper()
	leaf, err := x509.ParseCertificate(svid.GetCertChain()[0])
	if err != nil {
		a.t.Fatal(err)
	}
	id := "spiffe://" + svid.Id.TrustDomain + svid.Id.Path
	if leaf.NotAfter.Unix() != svid.ExpiresAt || len(leaf.URIs) != 1 || leaf.URIs[0].String() != id || !key.PublicKey.Equal(leaf.PublicKey) {
		a.t.Fatalf("the agent's SVID does not say what is said of it: %s until %d, in it %v until %v", id, svid.ExpiresAt, leaf.URIs, leaf.NotAfter)
	}
	a.id, a.svid = id, tls.Certificate{Certificate: svid.CertChain, PrivateKey: key}
	a.conn = a.d.dialServer(&a.svid)
}

// bundle is one GetBundle with what the agent cannot do without.
func (a *spireAgent) bundle(conn *grpc.ClientConn) *spiretypes.Bundle {
	a.t.Helper()
	b, err := bundlev1.NewBundleClient(conn).GetBundle(a.limit(), &bundlev1.GetBundleRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	if b.TrustDomain != a.d.trustDomain || len(b.X509Authorities) == 0 {
		a.t.Fatalf("bundle %v", b)
	}
	for _, k := range b.JwtAuthorities {
		if _, err := x509.ParsePKIXPublicKey(k.PublicKey); err != nil || k.KeyId == "" {
			a.t.Errorf("JWT authority %q: %v", k.KeyId, err)
		}
	}
	return b
}

// sync is one conversation of SyncAuthorizedEntries.
func (a *spireAgent) sync() error {
	a.t.Helper()
	stream, err := entryv1.NewEntryClient(a.conn).SyncAuthorizedEntries(a.limit())
	if err != nil {
		return err
	}
	send := func(m *entryv1.SyncAuthorizedEntriesRequest) {
		a.t.Helper()
		if err := stream.Send(m); err != nil && !errors.Is(err, io.EOF) {
			a.t.Fatal(err)
		}
	}
	send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: &spiretypes.EntryMask{
		SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, RevisionNumber: true,
		StoreSvid: true, Hint: true, CreatedAt: true, AdditionalAttributes: true}})
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	a.asked, a.pages = nil, nil
	if len(first.EntryRevisions) == 0 { // the whole list
		if first.More {
			a.t.Error("a whole list that goes on")
		}
		a.cache = map[string]*spiretypes.Entry{}
		a.take(first.Entries)
	} else {
		size, page, kept := len(first.EntryRevisions), first, map[string]*spiretypes.Entry{}
		var need []string
		for {
			a.pages = append(a.pages, len(page.EntryRevisions))
			if len(page.Entries) > 0 {
				a.t.Error("entries among the revisions")
			}
			for _, r := range page.EntryRevisions {
				if e := a.cache[r.Id]; e != nil && e.RevisionNumber == r.RevisionNumber && e.CreatedAt == r.CreatedAt {
					kept[r.Id] = e
				} else {
					need = append(need, r.Id)
				}
			}
			if !page.More {
				break
			}
			if page, err = stream.Recv(); err != nil {
				return err
			}
		}
		a.cache = kept
		slices.Sort(need)
		a.asked = need
		for ids := range slices.Chunk(need, size) {
			send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids})
			for more := true; more; {
				page, err := stream.Recv()
				if err != nil {
					return err
				}
				a.take(page.Entries)
				more = page.More
			}
		}
	}
	if err := stream.CloseSend(); err != nil {
		a.t.Fatal(err)
	}
	if m, err := stream.Recv(); err == nil {
		a.t.Errorf("after the end the server says %v", m)
	}
	return nil
}

// take keeps entries that an agent can use, and fails on others: ours are all of
// that kind.
func (a *spireAgent) take(entries []*spiretypes.Entry) {
	a.t.Helper()
	for _, e := range entries {
		bad := e.Id == "" || e.SpiffeId.GetTrustDomain() != a.d.trustDomain || !strings.HasPrefix(e.SpiffeId.GetPath(), "/") || len(e.Selectors) == 0
		for _, s := range e.Selectors {
			bad = bad || s.Type == "" || s.Value == "" || strings.Contains(s.Type, ":")
		}
		for _, td := range e.FederatesWith {
			bad = bad || strings.Contains(td, "/")
		}
		// Not asked for.
		bad = bad || e.ParentId != nil || e.X509SvidTtl != 0 || e.JwtSvidTtl != 0 || e.DnsNames != nil || e.ExpiresAt != 0
		if bad {
			a.t.Errorf("an agent cannot use %v", e)
		}
		a.cache[e.Id] = e
	}
}

// paths is which identities the agent holds entries for.
func (a *spireAgent) paths() string {
	var paths []string
	for _, e := range a.cache {
		paths = append(paths, e.SpiffeId.Path)
	}
	slices.Sort(paths)
	return strings.Join(paths, " ")
}

// reason is why a call was denied, as the agent reads it: UNKNOWN without a detail.
func reason(err error) spiretypes.PermissionDeniedDetails_Reason {
	if status.Code(err) == codes.PermissionDenied {
		for _, detail := range status.Convert(err).Details() {
			if d, ok := detail.(*spiretypes.PermissionDeniedDetails); ok {
				return d.Reason
			}
		}
	}
	return spiretypes.PermissionDeniedDetails_UNKNOWN
}

func (a *spireAgent) wantReason(what string, err error, want spiretypes.PermissionDeniedDetails_Reason) {
	a.t.Helper()
	if err == nil || reason(err) != want {
		a.t.Errorf("%s: %v (%v), want %v", what, err, reason(err), want)
	}
}

// renew is RenewAgent; the caller decides when to use what it returns.
func (a *spireAgent) renew() (*spiretypes.X509SVID, *ecdsa.PrivateKey, error) {
	a.t.Helper()
	key := newKey(a.t)
	resp, err := agentv1.NewAgentClient(a.conn).RenewAgent(a.limit(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: a.csr(key)}})
	return resp.GetSvid(), key, err
}

// TestSPIREAgent is the life of a SPIRE agent on our server.
func TestSPIREAgent(t *testing.T) {
	d := newDeployment(t)
	d.startServer()
	token, _ := d.token()
	a := &spireAgent{d: d, t: t}
	if err := a.attest("join_token", []byte(token), nil); err != nil {
		t.Fatal(err)
	}
	if a.reattestable {
		t.Error("a join token is good once, and the server says that the agent can attest again")
	}
	if _, err := agentv1.NewAgentClient(a.conn).PostStatus(a.limit(), &agentv1.PostStatusRequest{AgentVersion: "1.15.3"}); err != nil {
		t.Error(err)
	}
	if all := d.agents(); len(all) != 1 || all[0].AgentVersion != "1.15.3" {
		t.Errorf("agents %v", all)
	}

	// Entries: none is an answer; what concerns the node alone is not sent; what
	// hangs below a workload is.
	if err := a.sync(); err != nil || len(a.cache) != 0 {
		t.Errorf("nothing granted: %v, %s", err, a.paths())
	}
	web := d.createEntry(a.id, "/web", func(e *spiretypes.Entry) {
		e.DnsNames, e.Hint, e.X509SvidTtl = []string{"web.test"}, "w", 600
		e.AdditionalAttributes = &spiretypes.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true}
		e.FederatesWith = []string{"other.test"}
	}, "unix:uid:1")
	d.createEntry("spiffe://"+d.trustDomain+"/web", "/below", nil, "unix:uid:2")
	d.createEntry("spiffe://"+d.trustDomain+"/spire/server", "/alias", nil, "x509pop:subject:cn:nobody")
	d.createEntry("spiffe://"+d.trustDomain+"/spire/agent/join_token/other", "/foreign", nil, "unix:uid:1")
	// Rules are not for such an agent: it sees none, and none is signed for.
	rule := d.createRule(a.id, "spiffe://"+d.trustDomain+"/user/{unix.user}", "unix:uid:1")
	if err := a.sync(); err != nil || a.paths() != "/below /web" {
		t.Errorf("sync: %v, %s", err, a.paths())
	}
	if e := a.cache[web.Id]; e.GetHint() != "w" || !e.GetAdditionalAttributes().GetDisableX509SvidPrefetch() || e.GetRevisionNumber() != web.RevisionNumber ||
		!slices.Equal(e.GetFederatesWith(), []string{"other.test"}) || e.GetCreatedAt() != web.CreatedAt {
		t.Errorf("entry %v, want what the mask asks of %v", e, web)
	}
	resp, err := entryv1.NewEntryClient(a.conn).GetAuthorizedEntries(a.limit(), &entryv1.GetAuthorizedEntriesRequest{OutputMask: &spiretypes.EntryMask{SpiffeId: true}})
	if err != nil || len(resp.Entries) != 2 || resp.Entries[0].Selectors != nil {
		t.Errorf("GetAuthorizedEntries: %v, %v", resp, err)
	}

	// Bundles: by name; one that is not there is NotFound and nothing else.
	a.bundle(a.conn)
	bundles := bundlev1.NewBundleClient(a.conn)
	_, err = bundles.GetFederatedBundle(a.limit(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.test"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("a foreign bundle that is not there: %v", err)
	}
	d.write("other.pem", d.run("server", "bundle", "show", "-socketPath", d.adminSocket()))
	d.run("server", "bundle", "set", "-id", "spiffe://other.test", "-path", d.path("other.pem"), "-socketPath", d.adminSocket())
	b, err := bundles.GetFederatedBundle(a.limit(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.test"})
	if err != nil || b.TrustDomain != "other.test" || len(b.X509Authorities) != 1 {
		t.Errorf("a foreign bundle: %v, %v", b, err)
	}

	// SVIDs: matched by position, each with its own outcome.
	key := newKey(t)
	req := &svidv1.BatchNewX509SVIDRequest{}
	for _, id := range []string{web.Id, "unknown", web.Id, rule} {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: a.csr(key)})
	}
	signed, err := svidv1.NewSVIDClient(a.conn).BatchNewX509SVID(a.limit(), req)
	if err != nil || len(signed.Results) != 4 {
		t.Fatalf("BatchNewX509SVID: %v, %v", signed, err)
	}
	for i, want := range []codes.Code{codes.OK, codes.NotFound, codes.OK, codes.NotFound} {
		if got := codes.Code(signed.Results[i].GetStatus().GetCode()); got != want || want == codes.OK && signed.Results[i].Svid.Id.Path != "/web" {
			t.Errorf("result %d: %v, want %v", i, signed.Results[i], want)
		}
	}
	leaf, err := x509.ParseCertificate(signed.Results[0].Svid.CertChain[0])
	if err != nil || !slices.Equal(leaf.DNSNames, []string{"web.test"}) || leaf.NotAfter.Unix() != signed.Results[0].Svid.ExpiresAt || time.Until(leaf.NotAfter) > 601*time.Second {
		t.Errorf("SVID %v, %v", leaf, err)
	}
	tok, err := svidv1.NewSVIDClient(a.conn).NewJWTSVID(a.limit(), &svidv1.NewJWTSVIDRequest{EntryId: web.Id, Audience: []string{"db"}})
	if s := tok.GetSvid(); err != nil || s.Token == "" || s.Id.GetPath() != "/web" || s.IssuedAt == 0 || s.ExpiresAt < s.IssuedAt {
		t.Errorf("NewJWTSVID: %v, %v", tok, err)
	}

	if _, err := svidv1.NewSVIDClient(a.conn).NewJWTSVID(a.limit(), &svidv1.NewJWTSVIDRequest{EntryId: rule, Audience: []string{"db"}}); status.Code(err) != codes.NotFound {
		t.Errorf("a JWT-SVID by a rule: %v", err)
	}

	// Renewal: the old certificate is good until the new one is used, and not after.
	renewed, newKey, err := a.renew()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.sync(); err != nil {
		t.Errorf("the old certificate before the new one is used: %v", err)
	}
	old := a.conn
	a.use(renewed, newKey)
	if err := a.sync(); err != nil {
		t.Errorf("the new certificate: %v", err)
	}
	_, err = entryv1.NewEntryClient(old).GetAuthorizedEntries(a.limit(), &entryv1.GetAuthorizedEntriesRequest{})
	a.wantReason("the old certificate after the new one was used", err, spiretypes.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	// Ban and eviction.
	admin := agentv1.NewAgentClient(dialUnix(t, d.adminSocket()))
	if _, err := admin.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(a.id)}); err != nil {
		t.Fatal(err)
	}
	a.wantReason("banned, sync", a.sync(), spiretypes.PermissionDeniedDetails_AGENT_BANNED)
	_, _, err = a.renew()
	a.wantReason("banned, renewal", err, spiretypes.PermissionDeniedDetails_AGENT_BANNED)
	if _, err := admin.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: wireID(a.id)}); err != nil {
		t.Fatal(err)
	}
	a.wantReason("evicted, sync", a.sync(), spiretypes.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	if err := a.attest("join_token", []byte(token), nil); status.Code(err) != codes.PermissionDenied || reason(err) != 0 {
		t.Errorf("a used token: %v, want a plain PermissionDenied", err)
	}
}

// createRule creates a rule and returns its id.
func (d *deployment) createRule(parent, template, selector string) string {
	d.t.Helper()
	kind, value, _ := strings.Cut(selector, ":")
	resp, err := rulev1.NewRulesClient(dialUnix(d.t, d.adminSocket())).Create(d.t.Context(), &rulev1.CreateRequest{Rules: []*rulev1.Rule{{
		ParentId: parent, IdTemplate: template, Selectors: []*rulev1.Selector{{Type: kind, Value: value}}, Trust: "agent"}}})
	if err != nil {
		d.t.Fatal(err)
	}
	if r := resp.Results[0]; r.Refusal != nil {
		d.t.Fatal(r.Refusal)
	}
	return resp.Results[0].Rule.Id
}

// TestSPIREAgentPages is a SPIRE agent with more entries than fit in one page.
func TestSPIREAgentPages(t *testing.T) {
	d := newDeployment(t)
	d.startServer()
	token, _ := d.token()
	a := &spireAgent{d: d, t: t}
	if err := a.attest("join_token", []byte(token), nil); err != nil {
		t.Fatal(err)
	}
	const count = 1100
	entries, create := d.entries(), &entryv1.BatchCreateEntryRequest{}
	for i := range count {
		create.Entries = append(create.Entries, &spiretypes.Entry{Id: fmt.Sprintf("e%04d", i), ParentId: wireID(a.id),
			SpiffeId: wireID(fmt.Sprintf("spiffe://%s/w/%04d", d.trustDomain, i)), Selectors: []*spiretypes.Selector{{Type: "unix", Value: fmt.Sprint("uid:", i)}}})
	}
	made, err := entries.BatchCreateEntry(a.limit(), create)
	if err != nil || made.Results[count-1].Status.Code != 0 {
		t.Fatal(made.GetResults(), err)
	}
	if err := a.sync(); err != nil || len(a.cache) != count || len(a.asked) != count || !slices.Equal(a.pages, []int{500, 500, 100}) {
		t.Errorf("first: %d entries, %d asked for, pages of %v, %v", len(a.cache), len(a.asked), a.pages, err)
	}
	if err := a.sync(); err != nil || len(a.cache) != count || len(a.asked) != 0 {
		t.Errorf("again: %d entries, %d asked for, %v", len(a.cache), len(a.asked), err)
	}
	// One is changed, one deleted, one deleted and created again with its id.
	changed := create.Entries[7]
	changed.Hint = "new"
	if _, err := entries.BatchUpdateEntry(a.limit(), &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{changed}}); err != nil {
		t.Fatal(err)
	}
	if _, err := entries.BatchDeleteEntry(a.limit(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"e0008", "e0009"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := entries.BatchCreateEntry(a.limit(), &entryv1.BatchCreateEntryRequest{Entries: create.Entries[9:10]}); err != nil {
		t.Fatal(err)
	}
	if err := a.sync(); err != nil || len(a.cache) != count-1 || !slices.Equal(a.asked, []string{"e0007", "e0009"}) || a.cache["e0007"].Hint != "new" {
		t.Errorf("after changes: %d entries, asked for %v, %v", len(a.cache), a.asked, err)
	}
	batch := &svidv1.BatchNewX509SVIDRequest{}
	csr := a.csr(newKey(t))
	for i := range 500 { // the size of an agent's batch
		batch.Params = append(batch.Params, &svidv1.NewX509SVIDParams{EntryId: fmt.Sprintf("e%04d", 100+i), Csr: csr})
	}
	signed, err := svidv1.NewSVIDClient(a.conn).BatchNewX509SVID(a.limit(), batch)
	if err != nil || len(signed.Results) != 500 {
		t.Fatalf("a batch of 500: %d, %v", len(signed.GetResults()), err)
	}
	for i, r := range signed.Results {
		if want := fmt.Sprintf("/w/%04d", 100+i); r.Status.GetCode() != 0 || r.Svid.GetId().GetPath() != want {
			t.Fatalf("result %d is for %v (%v), want %s", i, r.Svid.GetId(), r.Status, want)
		}
	}
}

// TestSPIREAgentReattests is a SPIRE agent whose attestor lets it attest again,
// which it then does instead of renewing, and one whose time is over.
func TestSPIREAgentReattests(t *testing.T) {
	d := newDeployment(t)
	pki := newNodePKI(d)
	cert := pki.node("node-1")
	d.serverOptions = `agent_ttl = "20s"`
	d.serverAttestor += ` NodeAttestor "x509pop" { plugin_data { ca_bundle_path = "` + d.path("nodes-ca.pem") + `" } }`
	d.startServer()

	payload, err := json.Marshal(map[string][][]byte{"certificates": {cert.Raw}})
	if err != nil {
		t.Fatal(err)
	}
	answer := func(challenge []byte) []byte { return answerPoP(t, d, challenge) }
	a := &spireAgent{d: d, t: t}
	if err := a.attest("x509pop", payload, answer); err != nil {
		t.Fatal(err)
	}
	if !a.reattestable {
		t.Error("x509pop can attest again, and the server does not say so")
	}
	if err := a.sync(); err != nil {
		t.Error(err)
	}
	_, _, err = a.renew()
	a.wantReason("renewal", err, spiretypes.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	old := a.conn
	if err := a.attest("x509pop", payload, answer); err != nil {
		t.Fatal(err)
	}
	_, err = entryv1.NewEntryClient(old).GetAuthorizedEntries(a.limit(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil {
		t.Errorf("the old certificate before the new one is used: %v", err)
	}
	if err := a.sync(); err != nil {
		t.Error(err)
	}
	eventually(t, "the agent's time is over", func() bool { return reason(a.sync()) == spiretypes.PermissionDeniedDetails_AGENT_EXPIRED })
	a.conn = d.dialServer(&a.svid) // and over a new connection
	a.wantReason("expired", a.sync(), spiretypes.PermissionDeniedDetails_AGENT_EXPIRED)
	if err := a.attest("x509pop", payload, answer); err != nil {
		t.Fatal(err)
	}
	if err := a.sync(); err != nil {
		t.Error(err)
	}
}

// answerPoP signs both nonces with the key of node-key.pem.
func answerPoP(t *testing.T, d *deployment, challenge []byte) []byte {
	t.Helper()
	block, _ := pem.Decode([]byte(d.read("node-key.pem")))
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	var ask struct {
		ECDSA struct {
			Nonce []byte `json:"nonce"`
		} `json:"ecdsa_signature"`
	}
	if err := json.Unmarshal(challenge, &ask); err != nil || len(ask.ECDSA.Nonce) != 32 {
		t.Fatalf("challenge %s: %v", challenge, err)
	}
	own := make([]byte, 32)
	rand.Read(own)
	digest := sha256.Sum256(append(slices.Clone(ask.ECDSA.Nonce), own...))
	r, s, err := ecdsa.Sign(rand.Reader, key.(*ecdsa.PrivateKey), digest[:])
	if err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(map[string]any{"ecdsa_signature": map[string][]byte{"nonce": own, "r": r.Bytes(), "s": s.Bytes()}})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
