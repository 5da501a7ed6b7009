package serverapi_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/registry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A page of large rows ends before it is larger than clients accept; only who
// asks for everything at once gets, or is refused, a larger message (D6, E45).
func TestLargeRows(t *testing.T) {
	r := newRig(t)
	client := entryv1.NewEntryClient(r.admin)
	const rows, size = 150, 60 << 10 // 9 MiB
	var all []*spiretypes.Entry
	for i := range rows {
		e := entryUnder(someAgent, fmt.Sprintf("/w/%d", i))
		e.Selectors = []*spiretypes.Selector{{Type: "unix", Value: fmt.Sprintf("path:/%d/%s", i, strings.Repeat("x", size))}}
		all = append(all, e)
	}
	for batch := range slices.Chunk(all, 50) {
		r.create(batch...)
	}
	seen := map[string]bool{}
	pages := 0
	for token := ""; ; pages++ {
		page, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: rows, PageToken: token}) // with the client's own limit of 4 MiB
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page.Entries {
			if seen[e.Id] {
				t.Errorf("%s is listed twice", e.Id)
			}
			seen[e.Id] = true
		}
		if token = page.NextPageToken; token == "" {
			break
		}
	}
	if len(seen) != rows || pages != 2 {
		t.Errorf("%d entries in %d pages, want %d in 2 and a rest", len(seen), pages, rows)
	}
	whole, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{}, grpc.MaxCallRecvMsgSize(64<<20))
	if err != nil || len(whole.Entries) != rows || whole.NextPageToken != "" {
		t.Errorf("everything at once: %d entries, %v", len(whole.GetEntries()), err)
	}
}

// E36: a page token is good for the list, the filter and the server that gave it.
func TestPageTokens(t *testing.T) {
	r, other := newRig(t), newRig(t)
	for _, r := range []*rig{r, other} {
		for i := range 3 {
			e := entryUnder(someAgent, fmt.Sprintf("/w/%d", i))
			e.Id = fmt.Sprint("e", i)
			r.create(e)
		}
		r.agent()
		r.agent()
	}
	set := &bundlev1.BatchSetFederatedBundleRequest{}
	for i := range 3 {
		set.Bundle = append(set.Bundle, &spiretypes.Bundle{TrustDomain: fmt.Sprintf("td%d.org", i)})
	}
	if _, err := bundlev1.NewBundleClient(r.admin).BatchSetFederatedBundle(t.Context(), set); err != nil {
		t.Fatal(err)
	}
	// Each list by pages of one, with any token: it returns the next one.
	hinted := &entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("")}
	lists := map[string]func(r *rig, token string) (string, error){
		"entries": func(r *rig, token string) (string, error) {
			page, err := entryv1.NewEntryClient(r.admin).ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 1, PageToken: token})
			return page.GetNextPageToken(), err
		},
		"entries without a hint": func(r *rig, token string) (string, error) {
			page, err := entryv1.NewEntryClient(r.admin).ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: hinted, PageSize: 1, PageToken: token})
			return page.GetNextPageToken(), err
		},
		"agents": func(r *rig, token string) (string, error) {
			page, err := agentv1.NewAgentClient(r.admin).ListAgents(t.Context(), &agentv1.ListAgentsRequest{PageSize: 1, PageToken: token})
			return page.GetNextPageToken(), err
		},
		"bundles": func(r *rig, token string) (string, error) {
			page, err := bundlev1.NewBundleClient(r.admin).ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageSize: 1, PageToken: token})
			return page.GetNextPageToken(), err
		},
	}
	tokens := map[string]string{}
	for name, list := range lists {
		token, err := list(r, "")
		if err != nil || token == "" {
			t.Fatalf("%s: first page %q, %v", name, token, err)
		}
		tokens[name] = token
		if again, err := list(r, token); err != nil || again == token {
			t.Errorf("%s: second page %q, %v", name, again, err)
		}
		if again, err := list(r, token); err != nil || again == token { // an old one goes on being good
			t.Errorf("%s: the second page again %q, %v", name, again, err)
		}
	}
	for name, list := range lists {
		refused := map[string]string{
			"garbage": "garbage", "SQL": "' OR 1=1 --", "a number": "17", "1 MiB": strings.Repeat("A", 1<<20), "a tail": tokens[name] + "AAAA",
			"cut": tokens[name][:len(tokens[name])-4], "the key alone": "ZTE", "a change": "A" + tokens[name][1:], "padded": tokens[name] + "=",
		}
		if refused["a change"] == tokens[name] {
			refused["a change"] = "B" + tokens[name][1:]
		}
		for from, token := range tokens {
			if from != name {
				refused["of "+from] = token
			}
		}
		for what, token := range refused {
			_, err := list(r, token)
			wantCode(t, name+" by a token that is "+what, err, codes.InvalidArgument, "page_token_invalid")
		}
		_, err := list(other, tokens[name])
		wantCode(t, name+" by a token of another server", err, codes.InvalidArgument, "page_token_invalid")
	}
	// A token stays good when the row that it names is gone.
	if _, err := entryv1.NewEntryClient(r.admin).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"e0", "e1"}}); err != nil {
		t.Fatal(err)
	}
	if next, err := lists["entries"](r, tokens["entries"]); err != nil || next != "" {
		t.Errorf("after its row is gone: %q, %v", next, err)
	}
}

// The four ways to compare sets, for each list that has them.
func TestMatchBehaviours(t *testing.T) {
	r := newRig(t)
	sets := []string{"a", "ab", "abc", "b", "bc", "d", ""}
	want := map[spiretypes.SelectorMatch_MatchBehavior]string{ // for "ab"
		spiretypes.SelectorMatch_MATCH_EXACT:    "ab",
		spiretypes.SelectorMatch_MATCH_SUBSET:   "a ab b",
		spiretypes.SelectorMatch_MATCH_SUPERSET: "ab abc",
		spiretypes.SelectorMatch_MATCH_ANY:      "a ab abc b bc",
	}
	selectors := func(set string) (out []*spiretypes.Selector) {
		for _, c := range set {
			out = append(out, &spiretypes.Selector{Type: "x", Value: string(c)})
		}
		return out
	}
	domains := func(set string) (out []string) {
		for _, c := range set {
			out = append(out, string(c)+".org")
		}
		return out
	}
	soon := time.Now().Add(time.Minute).UTC().Truncate(time.Second)
	for i, set := range sets {
		if set != "" {
			e := entryUnder(someAgent, "/by-selectors")
			e.Id, e.Selectors = "s-"+set, selectors(set)
			r.create(e)
		}
		e := entryUnder(someAgent, "/by-domains/"+fmt.Sprint(i))
		e.Id, e.FederatesWith = "f-"+set, domains(set)
		r.create(e)
		node := registry.Node{
			ID: spiffeid.RequireFromPath(td, "/spire/agent/t/"+fmt.Sprint(i)+set), AttestationType: "t", CanReattest: i%2 == 0, Banned: i == 2,
			Current: registry.Credential{Serial: fmt.Sprint(i + 1), ExpiresAt: soon.Add(time.Duration(i) * time.Hour), KeyHash: make([]byte, 32)},
		}
		for _, s := range selectors(set) {
			node.Selectors = append(node.Selectors, entry.Selector{Type: s.Type, Value: s.Value})
		}
		if _, err := r.registry.Update(t.Context(), "test", func(tx *registry.Tx) error { return tx.PutNode(node) }); err != nil {
			t.Fatal(err)
		}
	}
	listEntries := func(prefix string, f *entryv1.ListEntriesRequest_Filter) string {
		t.Helper()
		var found []string
		client := entryv1.NewEntryClient(r.admin)
		req := &entryv1.ListEntriesRequest{Filter: f, PageSize: 2}
		for {
			page, err := client.ListEntries(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range page.Entries {
				found = append(found, strings.TrimPrefix(e.Id, prefix))
			}
			if req.PageToken = page.NextPageToken; req.PageToken == "" {
				break
			}
		}
		count, err := client.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
			BySelectors: f.BySelectors, ByFederatesWith: f.ByFederatesWith, BySpiffeId: f.BySpiffeId, ByHint: f.ByHint, ByDownstream: f.ByDownstream, ByParentId: f.ByParentId,
		}})
		if err != nil || int(count.Count) != len(found) {
			t.Errorf("counted %v, %v, but listed %v", count, err, found)
		}
		return strings.Join(found, " ")
	}
	listAgents := func(f *agentv1.ListAgentsRequest_Filter) string {
		t.Helper()
		var found []string
		client := agentv1.NewAgentClient(r.admin)
		req := &agentv1.ListAgentsRequest{Filter: f, PageSize: 2}
		for {
			page, err := client.ListAgents(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range page.Agents {
				found = append(found, strings.TrimPrefix(a.Id.Path, "/spire/agent/t/")[1:])
			}
			if req.PageToken = page.NextPageToken; req.PageToken == "" {
				break
			}
		}
		count, err := client.CountAgents(t.Context(), &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{
			ByAttestationType: f.ByAttestationType, BySelectorMatch: f.BySelectorMatch, ByBanned: f.ByBanned, ByCanReattest: f.ByCanReattest, ByExpiresBefore: f.ByExpiresBefore,
		}})
		if err != nil || int(count.Count) != len(found) {
			t.Errorf("counted %v, %v, but listed %v", count, err, found)
		}
		return strings.Join(found, " ")
	}
	check := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	for match, want := range want {
		asked := append(selectors("ba"), selectors("b")...) // any order, named twice
		check("entries by selectors, "+match.String(),
			listEntries("s-", &entryv1.ListEntriesRequest_Filter{BySelectors: &spiretypes.SelectorMatch{Match: match, Selectors: asked}, BySpiffeId: wireID("/by-selectors")}), want)
		check("entries by trust domains, "+match.String(),
			listEntries("f-", &entryv1.ListEntriesRequest_Filter{ByFederatesWith: &spiretypes.FederatesWithMatch{
				Match: spiretypes.FederatesWithMatch_MatchBehavior(match), TrustDomains: append(domains("ba"), domains("b")...)}}), want)
		check("agents by selectors, "+match.String(),
			listAgents(&agentv1.ListAgentsRequest_Filter{BySelectorMatch: &spiretypes.SelectorMatch{Match: match, Selectors: asked}}), want)
	}
	const layout = "2006-01-02 15:04:05 -0700 -07"
	for what, c := range map[string]struct {
		filter *agentv1.ListAgentsRequest_Filter
		want   string
	}{
		"all":             {&agentv1.ListAgentsRequest_Filter{}, "a ab abc b bc d "},
		"the type":        {&agentv1.ListAgentsRequest_Filter{ByAttestationType: "t"}, "a ab abc b bc d "},
		"another type":    {&agentv1.ListAgentsRequest_Filter{ByAttestationType: "T"}, ""},
		"banned":          {&agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(true)}, "abc"},
		"not banned":      {&agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false)}, "a ab b bc d "},
		"reattesting":     {&agentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(true)}, "a abc bc "},
		"not reattesting": {&agentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(false)}, "ab b d"},
		"ending by now":   {&agentv1.ListAgentsRequest_Filter{ByExpiresBefore: soon.Format(layout)}, ""},
		"ending soon":     {&agentv1.ListAgentsRequest_Filter{ByExpiresBefore: soon.Add(time.Second).Format(layout)}, "a"},
		"ending elsewhere": {&agentv1.ListAgentsRequest_Filter{
			ByExpiresBefore: soon.Add(61 * time.Minute).In(time.FixedZone("", -7*3600)).Format(layout)}, "a ab"},
		"three at once": {&agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false), ByCanReattest: wrapperspb.Bool(true),
			BySelectorMatch: &spiretypes.SelectorMatch{Match: spiretypes.SelectorMatch_MATCH_ANY, Selectors: selectors("b")}}, "bc"},
	} {
		check("agents, "+what, listAgents(c.filter), c.want)
	}
	for what, f := range map[string]*agentv1.ListAgentsRequest_Filter{
		"E30 unknown enum":       {BySelectorMatch: &spiretypes.SelectorMatch{Match: 4, Selectors: selectors("a")}},
		"E37 10,000 selectors":   {BySelectorMatch: &spiretypes.SelectorMatch{Selectors: slices.Repeat(selectors("a"), 10_000)}},
		"a filter of nothing":    {BySelectorMatch: &spiretypes.SelectorMatch{}},
		"a bad selector":         {BySelectorMatch: &spiretypes.SelectorMatch{Selectors: []*spiretypes.Selector{{Type: "X", Value: "a"}}}},
		"E38 a word":             {ByExpiresBefore: "yesterday"},
		"E38 RFC 3339":           {ByExpiresBefore: "2026-01-02T15:04:05Z"},
		"E38 a number":           {ByExpiresBefore: "1700000000"},
		"E38 no such day":        {ByExpiresBefore: "2026-02-31 15:04:05 +0000 +00"},
		"E38 1 MiB":              {ByExpiresBefore: strings.Repeat("2", 1<<20)},
		"E38 a space at the end": {ByExpiresBefore: "2026-01-02 15:04:05 +0000 +00 "},
	} {
		_, err := agentv1.NewAgentClient(r.admin).ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: f})
		wantCode(t, what, err, codes.InvalidArgument, "")
		if len(fmt.Sprint(err)) > 1000 {
			t.Errorf("%s answers with %d bytes", what, len(fmt.Sprint(err)))
		}
	}
	for what, m := range map[string]*spiretypes.FederatesWithMatch{
		"E30 unknown enum": {Match: 4, TrustDomains: []string{"a.org"}},
		"E37 10,000 names": {TrustDomains: slices.Repeat([]string{"a.org"}, 10_000)},
		"a filter of none": {},
		"not a domain":     {TrustDomains: []string{"A.org"}},
	} {
		_, err := entryv1.NewEntryClient(r.admin).ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByFederatesWith: m}})
		wantCode(t, what, err, codes.InvalidArgument, "")
	}
}

// Each member of an output mask shows its field and no other, and the id is
// always shown (E39).
func TestOutputMasks(t *testing.T) {
	r := newRig(t)
	e := entryUnder(someAgent, "/w")
	e.X509SvidTtl, e.JwtSvidTtl, e.FederatesWith, e.Admin, e.Downstream, e.Hint = 60, 30, []string{"a.org"}, true, true, "h"
	e.ExpiresAt, e.DnsNames = time.Now().Add(time.Hour).Unix(), []string{"a.example.org"}
	e.AdditionalAttributes = &spiretypes.Entry_AdditionalAttributes{JwtSvidIncludeJti: true}
	e = r.create(e)[0]
	stored := entryUnder(someAgent, "/stored")
	stored.StoreSvid = true
	stored = r.create(stored)[0]
	agent := r.agent()
	foreign := &spiretypes.Bundle{TrustDomain: "a.org", RefreshHint: 60, SequenceNumber: 7, X509Authorities: []*spiretypes.X509Certificate{{Asn1: agent.cert.Certificate[0]}}}
	if _, err := bundlev1.NewBundleClient(r.admin).BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*spiretypes.Bundle{foreign}}); err != nil {
		t.Fatal(err)
	}
	entries, agents, bundles := entryv1.NewEntryClient(r.admin), agentv1.NewAgentClient(r.admin), bundlev1.NewBundleClient(r.admin)
	eachField(new(spiretypes.EntryMask), func(mask proto.Message, name string) {
		id := e.Id
		if name == "store_svid" {
			id = stored.Id
		}
		got, err := entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: id, OutputMask: mask.(*spiretypes.EntryMask)})
		wantFields(t, got, err, "id", name)
	})
	eachField(new(spiretypes.AgentMask), func(mask proto.Message, name string) {
		if name == "selectors" || name == "banned" || name == "can_reattest" || name == "agent_version" {
			return // empty here; the matrix of the filters shows them
		}
		got, err := agents.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: wireID(agent.id.Path()), OutputMask: mask.(*spiretypes.AgentMask)})
		wantFields(t, got, err, "id", name)
	})
	eachField(new(spiretypes.BundleMask), func(mask proto.Message, name string) {
		if name == "jwt_authorities" || name == "wit_authorities" {
			return
		}
		got, err := bundles.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "a.org", OutputMask: mask.(*spiretypes.BundleMask)})
		wantFields(t, got, err, "trust_domain", name)
	})
}

// eachField calls f with a mask for each field that a mask has, that field set.
func eachField(mask proto.Message, f func(mask proto.Message, name string)) {
	fields := mask.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		m := mask.ProtoReflect().New()
		m.Set(fields.Get(i), protoreflect.ValueOfBool(true))
		f(m.Interface(), string(fields.Get(i).Name()))
	}
}

// wantFields checks that a message holds exactly the fields with these names.
func wantFields(t *testing.T, m proto.Message, err error, names ...string) {
	t.Helper()
	if err != nil {
		t.Errorf("%v: %v", names, err)
		return
	}
	var have []string
	m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		have = append(have, string(f.Name()))
		return true
	})
	slices.Sort(have)
	slices.Sort(names)
	if !slices.Equal(have, names) {
		t.Errorf("the message holds %v, want %v", have, names)
	}
}

// Each member of an input mask changes its field and no other.
func TestUpdateMasks(t *testing.T) {
	r := newRig(t)
	soon := time.Now().Add(time.Hour).Unix()
	old := &spiretypes.Entry{
		SpiffeId: wireID("/old"), ParentId: wireID("/parent/old"), Selectors: []*spiretypes.Selector{{Type: "x", Value: "old"}},
		X509SvidTtl: 60, JwtSvidTtl: 30, FederatesWith: []string{"old.org"}, Admin: true, Hint: "old", ExpiresAt: soon, DnsNames: []string{"old.example.org"},
		AdditionalAttributes: &spiretypes.Entry_AdditionalAttributes{DisableX509SvidPrefetch: false, JwtSvidIncludeJti: true},
	}
	changed := &spiretypes.Entry{
		SpiffeId: wireID("/new"), ParentId: wireID("/parent/new"), Selectors: []*spiretypes.Selector{{Type: "x", Value: "new"}},
		FederatesWith: []string{"new.org"}, Downstream: true, StoreSvid: true, Hint: "new", ExpiresAt: soon + 60,
		AdditionalAttributes: &spiretypes.Entry_AdditionalAttributes{},
	}
	client := entryv1.NewEntryClient(r.admin)
	eachField(new(spiretypes.EntryMask), func(mask proto.Message, name string) {
		was := r.create(proto.Clone(old).(*spiretypes.Entry))[0]
		change := proto.Clone(changed).(*spiretypes.Entry)
		change.Id = was.Id
		resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{change}, InputMask: mask.(*spiretypes.EntryMask)})
		if err != nil || resp.Results[0].Status.Code != 0 {
			t.Fatalf("%s: %v, %v", name, resp, err)
		}
		want := proto.Clone(was).(*spiretypes.Entry)
		if field := want.ProtoReflect().Descriptor().Fields().ByName(protoreflect.Name(name)); name != "created_at" && name != "revision_number" {
			want.ProtoReflect().Clear(field)
			if from := change.ProtoReflect(); from.Has(field) {
				want.ProtoReflect().Set(field, from.Get(field))
			}
		}
		if name == "additional_attributes" {
			want.AdditionalAttributes = nil // all false: none
		}
		want.RevisionNumber = resp.Results[0].Entry.RevisionNumber
		got, err := client.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: was.Id})
		if d := cmp.Diff(want, got, protocmp.Transform()); d != "" || err != nil {
			t.Errorf("%s: %v\n%s", name, err, d)
		}
		if got.GetRevisionNumber() <= was.RevisionNumber {
			t.Errorf("%s: revision %d after %d", name, got.GetRevisionNumber(), was.RevisionNumber)
		}
		if _, err := client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{was.Id}}); err != nil {
			t.Fatal(err)
		}
	})
	bundles := bundlev1.NewBundleClient(r.admin)
	root, other := r.agent().cert.Certificate[0], r.agent().cert.Certificate[0]
	eachField(new(spiretypes.BundleMask), func(mask proto.Message, name string) {
		was := &spiretypes.Bundle{TrustDomain: strings.ReplaceAll(name, "_", "-") + ".org", RefreshHint: 60, SequenceNumber: 7, X509Authorities: []*spiretypes.X509Certificate{{Asn1: root}}}
		if _, err := bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*spiretypes.Bundle{was}}); err != nil {
			t.Fatal(err)
		}
		change := &spiretypes.Bundle{TrustDomain: was.TrustDomain, RefreshHint: 90, SequenceNumber: 9, X509Authorities: []*spiretypes.X509Certificate{{Asn1: other}}}
		resp, err := bundles.BatchUpdateFederatedBundle(t.Context(), &bundlev1.BatchUpdateFederatedBundleRequest{Bundle: []*spiretypes.Bundle{change}, InputMask: mask.(*spiretypes.BundleMask)})
		if err != nil || resp.Results[0].Status.Code != 0 {
			t.Fatalf("%s: %v, %v", name, resp, err)
		}
		want := proto.Clone(was).(*spiretypes.Bundle)
		switch name {
		case "x509_authorities":
			want.X509Authorities, want.SequenceNumber = change.X509Authorities, 8 // R75: other content, other number
		case "refresh_hint":
			want.RefreshHint, want.SequenceNumber = 90, 8
		case "sequence_number":
			want.SequenceNumber = 9
		}
		if d := cmp.Diff(want, resp.Results[0].Bundle, protocmp.Transform()); d != "" {
			t.Errorf("%s:\n%s", name, d)
		}
	})
}
