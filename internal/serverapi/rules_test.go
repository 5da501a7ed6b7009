package serverapi_test

import (
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

func ruleUnder(parent spiffeid.ID, template string) *rulev1.Rule {
	return &rulev1.Rule{ParentId: parent.String(), IdTemplate: template, Trust: "agent", Selectors: []*rulev1.Selector{{Type: "unix", Value: "uid:1000"}}}
}

// rule makes a rule and expects it to succeed.
func (r *rig) rule(in *rulev1.Rule) *rulev1.CreateResult {
	r.t.Helper()
	resp, err := rulev1.NewRulesClient(r.admin).Create(r.t.Context(), &rulev1.CreateRequest{Rules: []*rulev1.Rule{in}})
	if err != nil {
		r.t.Fatal(err)
	}
	if resp.Results[0].Refusal != nil {
		r.t.Fatalf("create: %v", resp.Results[0].Refusal)
	}
	return resp.Results[0]
}

func TestRules(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	client := rulev1.NewRulesClient(r.admin)
	const template = "spiffe://example.org/user/{unix.user}"
	in := ruleUnder(agent.id, template)
	in.Id, in.X509SvidTtl, in.JwtSvidTtl, in.FederatesWith, in.Hint = "r1", 60, 30, []string{"b.org", "a.org"}, "h"
	in.ExpiresAt, in.Revision, in.CreatedAt = time.Now().Add(time.Hour).Unix(), 99, 99
	made := r.rule(in)
	want := proto.CloneOf(in)
	want.IdPrefix, want.FederatesWith, want.Revision, want.CreatedAt = "spiffe://example.org/user/", []string{"a.org", "b.org"}, made.Rule.Revision, made.Rule.CreatedAt
	if !proto.Equal(made.Rule, want) || made.Rule.Revision == 99 || made.Rule.CreatedAt == 99 {
		t.Errorf("created %v, want %v", made.Rule, want)
	}
	if made.Reach.Agents != 1 || !slices.Equal(made.Reach.First, []string{agent.id.String()}) {
		t.Errorf("reach %v", made.Reach)
	}
	shown, err := client.Show(t.Context(), &rulev1.ShowRequest{Id: "r1"})
	if err != nil || !proto.Equal(shown.Rule, made.Rule) || !proto.Equal(shown.Reach, made.Reach) {
		t.Errorf("shown %v, %v", shown, err)
	}

	// A rule of the same content comes back with the refusal, whatever else differs (E23).
	twin, reserved, wide, untrusted, taken := ruleUnder(agent.id, template), ruleUnder(agent.id, "spiffe://example.org/spire/agent/{unix.user}"),
		ruleUnder(agent.id, "spiffe://example.org/{unix.user}"), ruleUnder(agent.id, "spiffe://example.org/u/{unix.user}"), ruleUnder(agent.id, "spiffe://example.org/v/{unix.user}")
	untrusted.Trust = ""
	taken.Id = "r1"
	server, foreign, bare, drawn := ruleUnder(spiffeid.RequireFromString("spiffe://example.org/spire/server"), template), ruleUnder(agent.id, "spiffe://other.org/u/{unix.user}"),
		ruleUnder(agent.id, template), ruleUnder(agent.id, "spiffe://example.org/w/{unix.user}")
	bare.Selectors = nil
	bare.IdTemplate += "/x"
	orphan := ruleUnder(agent.id, "spiffe://example.org/x/{unix.user}")
	orphan.ParentId = ""
	resp, err := client.Create(t.Context(), &rulev1.CreateRequest{Rules: []*rulev1.Rule{twin, reserved, wide, untrusted, taken, server, foreign, bare, orphan, drawn}})
	if err != nil {
		t.Fatal(err)
	}
	for i, reason := range []string{"rule_exists", "rule_prefix_reserved", "rule_prefix_too_wide", "rule_trust_missing", "rule_id_taken", "rule_parent_server",
		"rule_template_invalid", "selectors_missing", "parent_id_missing", ""} {
		got := resp.Results[i]
		if got.Refusal.GetReason() != reason || (got.Rule != nil) != (i == 0 || reason == "") {
			t.Errorf("item %d: %v, want %q", i, got, reason)
		}
	}
	if !proto.Equal(resp.Results[0].Rule, made.Rule) {
		t.Errorf("the one that exists: %v", resp.Results[0].Rule)
	}
	if id := resp.Results[9].Rule.GetId(); len(id) != 36 {
		t.Errorf("the id %q was drawn", id)
	}

	// SPIRE's API knows no rules.
	api := entryv1.NewEntryClient(r.admin)
	list, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	count, errCount := api.CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	if err != nil || errCount != nil || len(list.Entries) != int(count.Count) || slices.ContainsFunc(list.Entries, func(e *spiretypes.Entry) bool { return e.Id == "r1" }) {
		t.Errorf("entries %v, %v; count %v, %v", list, err, count, errCount)
	}
	_, err = api.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "r1"})
	wantCode(t, "a rule as an entry", err, codes.NotFound, "entry_not_found")
	deleted, err := api.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"r1"}})
	if err != nil || codes.Code(deleted.Results[0].Status.Code) != codes.NotFound {
		t.Errorf("deleting a rule as an entry: %v, %v", deleted, err)
	}
	e := entryUnder(agent.id, "/web")
	e.Id = "r1"
	created, err := api.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
	if err != nil || codes.Code(created.Results[0].Status.Code) != codes.AlreadyExists {
		t.Errorf("an entry with a rule's id: %v, %v", created, err)
	}

	gone, err := client.Delete(t.Context(), &rulev1.DeleteRequest{Ids: []string{"r1", "none", "plastron.x"}})
	if err != nil || gone.Results[0].Refusal != nil || gone.Results[1].Refusal.GetReason() != "rule_not_found" || gone.Results[2].Refusal.GetReason() != "entry_id_reserved" {
		t.Errorf("deleted %v, %v", gone, err)
	}
	_, err = client.Show(t.Context(), &rulev1.ShowRequest{Id: "r1"})
	wantCode(t, "a deleted rule", err, codes.NotFound, "rule_not_found")
	_, err = client.Create(t.Context(), &rulev1.CreateRequest{Rules: make([]*rulev1.Rule, 501)})
	wantCode(t, "E32 501 rules", err, codes.InvalidArgument, "batch_too_large")
}

func TestListRules(t *testing.T) { // R86
	r := newRig(t)
	agent := r.agent()
	for i := range 7 {
		in := ruleUnder(agent.id, fmt.Sprintf("spiffe://example.org/u%d/{unix.user}", i))
		in.Id = fmt.Sprint("r", i)
		r.rule(in)
	}
	client := rulev1.NewRulesClient(r.admin)
	var seen []string
	req := &rulev1.ListRequest{PageSize: 3}
	for {
		page, err := client.List(t.Context(), req)
		if err != nil || len(page.Rules) > 3 {
			t.Fatalf("%v, %v", page, err)
		}
		for _, one := range page.Rules {
			if one.Reach.GetAgents() != 1 {
				t.Errorf("reach %v", one.Reach)
			}
			seen = append(seen, one.Rule.Id)
		}
		if req.PageToken = page.NextPageToken; req.PageToken == "" {
			break
		}
	}
	if got := strings.Join(seen, " "); got != "r0 r1 r2 r3 r4 r5 r6" {
		t.Errorf("listed %s", got)
	}
	_, err := client.List(t.Context(), &rulev1.ListRequest{PageToken: "x"})
	wantCode(t, "E36", err, codes.InvalidArgument, "page_token_invalid")
}

// An agent has signed what a rule makes of its facts, and nothing else (R1, R2).
func TestIssueByRule(t *testing.T) {
	lister := spiffeid.RequireFromString("spiffe://example.org/user/root/web")
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) { c.Admins = []spiffeid.ID{lister}; c.RulePairs = 3 })
	agent, other := r.agent(), r.agent()
	soon := time.Now().Add(20 * time.Minute).Truncate(time.Second)
	in := ruleUnder(agent.id, "spiffe://example.org/user/{unix.user}/{unix.program}")
	in.ExpiresAt = soon.Unix()
	rule := r.rule(in).Rule
	conn := r.connect(&agent)
	client := issuev1.NewIssueClient(conn)
	facts := func(user, program string) map[string]string {
		return map[string]string{"unix.user": user, "unix.program": program}
	}
	sign := func(conn *grpc.ClientConn, facts map[string]string) (*issuev1.X509Result, []byte) {
		t.Helper()
		csr := newCSR(t, newKey(t))
		resp, err := issuev1.NewIssueClient(conn).X509(t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: rule.Id, Facts: facts, Csr: csr}}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results[0], csr
	}
	good, _ := sign(conn, facts("ann", "web"))
	if good.Refusal != nil {
		t.Fatalf("refused: %v", good.Refusal)
	}
	leaf, err := x509.ParseCertificate(good.CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	if id, err := svid.PeerID(leaf); err != nil || id.String() != "spiffe://example.org/user/ann/web" || good.SpiffeId != id.String() ||
		!leaf.NotAfter.Equal(soon) || good.Revision != rule.Revision { // R8
		t.Errorf("%v, %v, %v", id, err, good)
	}
	if n := countInTrail(t, r, `"kind":"issuance"`, rule.Id, `"facts":{"unix.program":"web","unix.user":"ann"}`, `"trust":"agent"`, agent.id.String()); n != 1 { // R14
		t.Errorf("%d records of the issuance, want 1", n)
	}
	token, err := client.JWT(t.Context(), &issuev1.JWTRequest{GrantId: rule.Id, Facts: facts("bob", "web"), Audience: []string{"a"}})
	if err != nil || checkJWT(t, r, token.GetToken(), "a").ID.String() != "spiffe://example.org/user/bob/web" {
		t.Errorf("JWT: %v, %v", token, err)
	}

	more := facts("ann", "web")
	more["unix.uid"] = "0"
	for name, c := range map[string]struct {
		facts  map[string]string
		reason string
	}{
		"none": {nil, "rule_fact_missing"}, "one missing": {map[string]string{"unix.user": "ann"}, "rule_fact_missing"},
		"one too many": {more, "facts_unexpected"}, "a slash": {facts("ann/x", "web"), "rule_fact_invalid"}, "dots": {facts("..", "spire"), "rule_fact_invalid"},
		"too long": {facts(strings.Repeat("a", 3000), "web"), "rule_fact_invalid"}, "an administrator": {facts("root", "web"), "rule_id_privileged"},
	} {
		got, _ := sign(conn, c.facts)
		_, err := client.JWT(t.Context(), &issuev1.JWTRequest{GrantId: rule.Id, Facts: c.facts, Audience: []string{"a"}})
		if got.Refusal.GetReason() != c.reason || got.Refusal.GetRemedy() == "" && c.reason != "facts_unexpected" || reasonOf(err) != c.reason || len(got.CertChain) > 0 {
			t.Errorf("%s: %v, %v, want %s", name, got.Refusal, err, c.reason)
		}
	}

	// It is nothing to another agent (R12), nor over SPIRE's calls.
	stranger, csr := sign(r.connect(&other), facts("ann", "web"))
	if stranger.Refusal.GetReason() != "grant_unknown" {
		t.Errorf("another agent: %v", stranger)
	}
	spires := svidv1.NewSVIDClient(conn)
	batch, err := spires.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: rule.Id, Csr: csr}}})
	if err != nil || codes.Code(batch.Results[0].Status.Code) != codes.NotFound {
		t.Errorf("by SPIRE's call: %v, %v", batch, err)
	}
	_, err = spires.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: rule.Id, Audience: []string{"a"}})
	wantCode(t, "by SPIRE's call", err, codes.NotFound, "grant_unknown")
	mine, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil || len(mine.Entries) != 0 {
		t.Errorf("authorized entries %v, %v", mine, err)
	}

	// Two pairs are alive, room is for three; the ones there are go on.
	if got, _ := sign(conn, facts("cid", "web")); got.Refusal != nil {
		t.Errorf("the third pair: %v", got.Refusal)
	}
	if got, _ := sign(conn, facts("dee", "web")); got.Refusal.GetReason() != "rule_pairs_exhausted" {
		t.Errorf("the fourth pair: %v", got)
	}
	_, err = client.JWT(t.Context(), &issuev1.JWTRequest{GrantId: rule.Id, Facts: facts("dee", "web"), Audience: []string{"a"}})
	wantCode(t, "a token for the fourth pair", err, codes.ResourceExhausted, "rule_pairs_exhausted")
	if got, _ := sign(conn, facts("ann", "web")); got.Refusal != nil {
		t.Errorf("a renewal: %v", got.Refusal)
	}
	if _, err := rulev1.NewRulesClient(r.admin).Delete(t.Context(), &rulev1.DeleteRequest{Ids: []string{rule.Id}}); err != nil {
		t.Fatal(err)
	}
	if got, _ := sign(conn, facts("ann", "web")); got.Refusal.GetReason() != "grant_unknown" {
		t.Errorf("after the rule was deleted: %v", got)
	}
}

// No rule leads to rights over the server, whichever came first.
func TestRulesGiveNoRights(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	admin := entryUnder(agent.id, "/user/ann/admin")
	admin.Admin = true
	made := r.create(admin)[0]
	ended := entry.Entry{ID: "ended", SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/user/eve/admin"), ParentID: agent.id, Admin: true,
		Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}, CreatedAt: time.Unix(1000, 0).UTC(), ExpiresAt: time.Unix(2000, 0).UTC()}
	if _, err := r.registry.Update(t.Context(), "test", func(tx *registry.Tx) error { return tx.PutEntry(ended) }); err != nil {
		t.Fatal(err)
	}
	rule := r.rule(ruleUnder(agent.id, "spiffe://example.org/user/{unix.user}/{unix.program}")).Rule
	for _, user := range []string{"ann", "eve"} { // the end of eve's entry can still be moved
		resp, err := issuev1.NewIssueClient(r.connect(&agent)).X509(t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{
			{GrantId: rule.Id, Facts: map[string]string{"unix.user": user, "unix.program": "admin"}, Csr: newCSR(t, newKey(t))}}})
		if err != nil || resp.Results[0].Refusal.GetReason() != "rule_id_privileged" {
			t.Errorf("the admin %s's ID: %v, %v", user, resp, err)
		}
	}
	api := entryv1.NewEntryClient(r.admin)
	for _, flag := range []func(*spiretypes.Entry){func(e *spiretypes.Entry) { e.Admin = true }, func(e *spiretypes.Entry) { e.Downstream = true }} {
		late := entryUnder(agent.id, "/user/bob/admin")
		flag(late)
		created, err := api.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{late}})
		if err != nil || codes.Code(created.Results[0].Status.Code) != codes.InvalidArgument || !strings.Contains(created.Results[0].Status.Message, rule.Id) {
			t.Errorf("an admin under a rule: %v, %v", created, err)
		}
	}
	// What was an administrator before the rule can still be changed.
	admin.Id, admin.Hint = made.Id, "h"
	changed, err := api.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{admin}, InputMask: &spiretypes.EntryMask{Hint: true}})
	if err != nil || codes.Code(changed.Results[0].Status.Code) != codes.OK {
		t.Errorf("an administrator's hint: %v, %v", changed, err)
	}
	plain := r.create(entryUnder(agent.id, "/user/bob/admin"))[0]
	plain.Admin = true
	updated, err := api.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{plain}, InputMask: &spiretypes.EntryMask{Admin: true}})
	if err != nil || codes.Code(updated.Results[0].Status.Code) != codes.InvalidArgument {
		t.Errorf("made admin under a rule: %v, %v", updated, err)
	}
}

// Only agents that say so hear of rules.
func TestFollowRules(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	r.create(entryUnder(agent.id, "/web"))
	first := ruleUnder(agent.id, "spiffe://example.org/a/{unix.user}")
	first.Id = "first"
	r.rule(first)
	conn := r.connect(&agent)
	knows := follow(t, conn, &syncv1.Hello{Version: 1, Capabilities: []string{"x", "rules"}})
	knows.sync()
	old := follow(t, conn, &syncv1.Hello{Version: 1})
	old.sync()
	if knows.held["first"] == nil || len(knows.held) != len(old.held)+1 || old.held["first"] != nil {
		t.Errorf("held: %d with rules, %d without", len(knows.held), len(old.held))
	}
	second := ruleUnder(agent.id, "spiffe://example.org/b/{unix.user}")
	second.Id = "second"
	r.rule(second)
	knows.delta()
	body := new(syncv1.Body)
	if err := proto.Unmarshal(knows.held["second"], body); err != nil || body.GetGrant().GetIdTemplate() != second.IdTemplate ||
		body.GetGrant().GetIdPrefix() != "spiffe://example.org/b/" || body.GetGrant().GetTrust() != "agent" || body.GetGrant().GetSpiffeId() != "" {
		t.Errorf("sent %v, %v", body, err)
	}
	if _, err := rulev1.NewRulesClient(r.admin).Delete(t.Context(), &rulev1.DeleteRequest{Ids: []string{"first", "second"}}); err != nil {
		t.Fatal(err)
	}
	knows.delta()
	if knows.held["first"] != nil || knows.held["second"] != nil {
		t.Error("deleted rules are held")
	}
	// The other hears that the log went on, and next of an entry.
	late := entryUnder(agent.id, "/late")
	late.Id = "late"
	r.create(late)
	heard := old.next()
	for heard.GetCurrent() != nil {
		heard = old.next()
	}
	d := heard.GetDelta()
	if d == nil || len(d.Bodies) != 1 {
		t.Fatalf("heard %v", heard)
	}
	if err := proto.Unmarshal(d.Bodies[0], body); err != nil || body.GetGrant().GetId() != "late" {
		t.Errorf("heard %v, %v", body, err)
	}
}
