package serverapi_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	applyv1 "github.com/plastron/plastron/api/plastron/apply/v1"
	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"google.golang.org/grpc/codes"
)

// declared is an entry as a file has it.
func declared(id, path string, edit ...func(*applyv1.Entry)) *applyv1.Entry {
	e := &applyv1.Entry{
		Id: id, SpiffeId: "spiffe://example.org" + path, ParentId: "spiffe://example.org/spire/agent/a",
		Selectors: []*applyv1.Selector{{Type: "unix", Value: "uid:1"}},
	}
	for _, f := range edit {
		f(e)
	}
	return e
}

func want(e *applyv1.Entry, revision uint64) *applyv1.Item {
	return &applyv1.Item{Want: &applyv1.Item_Entry{Entry: e}, Revision: revision}
}

func gone(id string, revision uint64) *applyv1.Item {
	return &applyv1.Item{Want: &applyv1.Item_DeleteEntry{DeleteEntry: id}, Revision: revision}
}

func (r *rig) apply(owner string, dryRun bool, items ...*applyv1.Item) (*applyv1.ApplyResponse, error) {
	return applyv1.NewApplyClient(r.admin).Apply(r.t.Context(), &applyv1.ApplyRequest{Owner: owner, DryRun: dryRun, Items: items})
}

// plan is what a dry run says, in short, and the items with the revisions it told.
func (r *rig) plan(owner string, items ...*applyv1.Item) (string, []*applyv1.Item) {
	r.t.Helper()
	before := r.registry.Position()
	resp, err := r.apply(owner, true, items...)
	if err != nil {
		r.t.Fatal(err)
	}
	if r.registry.Position() != before {
		r.t.Error("a dry run committed something")
	}
	var texts []string
	for i, o := range resp.Outcomes {
		text := strings.ToLower(strings.TrimPrefix(o.Action.String(), "ACTION_"))
		for _, c := range o.Changes {
			text += fmt.Sprintf(" %s:%s>%s", c.Field, c.Before, c.After)
		}
		if o.Refusal != nil {
			text += " " + o.Refusal.Reason
		}
		texts = append(texts, text)
		items[i].Revision = o.Revision
	}
	return strings.Join(texts, "; "), items
}

// make applies what a plan says, which has to be as wanted.
func (r *rig) make(owner, wantPlan string, items ...*applyv1.Item) {
	r.t.Helper()
	got, items := r.plan(owner, items...)
	if got != wantPlan {
		r.t.Errorf("the plan is %q, want %q", got, wantPlan)
	}
	if _, err := r.apply(owner, false, items...); err != nil {
		r.t.Fatal(err)
	}
}

func TestApply(t *testing.T) {
	r := newRig(t)
	client := entryv1.NewEntryClient(r.admin)
	web := func(edit ...func(*applyv1.Entry)) *applyv1.Item { return want(declared("web", "/web", edit...), 0) }
	plain := func(edit ...func(*applyv1.Entry)) *applyv1.Item { return want(declared("", "/plain", edit...), 0) }
	hint := func(text string) func(*applyv1.Entry) { return func(e *applyv1.Entry) { e.Hint = text } }

	r.make("shop", "create; create", web(), plain())
	at := r.registry.Position()
	r.make("shop", "none; none", web(), plain())
	if r.registry.Position() != at {
		t.Error("applying the same again committed something")
	}
	r.make("shop", "update hint:>front; update hint:>back", web(hint("front")), plain(hint("back")))

	// An id stays the same entry when its content changes; one without is another entry then.
	other := func(e *applyv1.Entry) { e.Selectors[0].Value = "uid:2" }
	r.make("shop", `update selectors:["unix:uid:1"]>["unix:uid:2"] hint:front>; create`, web(other), plain(other))

	// Selectors that only look the same are not.
	two := func(e *applyv1.Entry) {
		e.Selectors = []*applyv1.Selector{{Type: "unix", Value: "uid:1"}, {Type: "unix", Value: "uid:2"}}
	}
	one := func(e *applyv1.Entry) {
		e.Selectors = []*applyv1.Selector{{Type: "unix", Value: "uid:1, unix:uid:2"}}
	}
	r.make("shop", `update selectors:["unix:uid:2"]>["unix:uid:1" "unix:uid:2"]`, web(two))
	if got, _ := r.plan("shop", web(one)); !strings.HasPrefix(got, "update") {
		t.Errorf("the plan is %q", got)
	}

	// Others' objects: refused, whoever made them.
	foreign := r.create(&spiretypes.Entry{Id: "foreign", SpiffeId: wireID("/foreign"), ParentId: wireID("/spire/agent/a"), Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:1"}}})[0]
	r.make("bank", "create", want(declared("safe", "/safe"), 0))
	got, _ := r.plan("shop",
		want(declared("", "/foreign"), 0), want(declared("foreign", "/x"), 0), want(declared("x", "/foreign"), 0),
		want(declared("safe", "/safe"), 0), want(declared("", "/safe"), 0),
		want(declared("x", "/plain"), 0), gone("foreign", 0), gone("safe", 0), gone("none", 0),
		want(declared("a b", "/x"), 0), want(declared("", "x"), 0), want(nil, 0), &applyv1.Item{},
		want(declared("late", "/late", func(e *applyv1.Entry) { e.ExpiresAt = 1 }), 0),
	)
	if want := "refuse foreign; refuse foreign; refuse foreign; refuse foreign; refuse foreign; refuse entry_exists; " +
		"refuse foreign; refuse foreign; none; refuse entry_id_invalid; refuse spiffe_id_foreign; refuse spiffe_id_invalid; refuse item_missing; refuse expires_at_past"; got != want {
		t.Errorf("the plan is\n%s, want\n%s", got, want)
	}

	// What no other call may make, this one may not either.
	if _, err := rulev1.NewRulesClient(r.admin).Create(t.Context(), &rulev1.CreateRequest{Rules: []*rulev1.Rule{{
		IdTemplate: "spiffe://example.org/user/{unix.user}", Trust: "agent", ParentId: "spiffe://example.org/spire/agent/a",
		Selectors: []*rulev1.Selector{{Type: "unix", Value: "uid:1"}},
	}}}); err != nil {
		t.Fatal(err)
	}
	if got, _ := r.plan("shop", want(declared("", "/user/root", func(e *applyv1.Entry) { e.Admin = true }), 0)); got != "refuse entry_under_rule" {
		t.Errorf("the plan is %q", got)
	}

	// SPIRE's own calls keep the owner.
	if _, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries: []*spiretypes.Entry{{Id: "web", Hint: "by hand"}}, InputMask: &spiretypes.EntryMask{Hint: true},
	}); err != nil {
		t.Fatal(err)
	}
	r.make("shop", "update hint:by hand>", web(two))
	if kept, err := client.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "foreign"}); err != nil || kept.RevisionNumber != foreign.RevisionNumber {
		t.Errorf("the foreign entry is at %v, %v", kept.GetRevisionNumber(), err)
	}
}

// Rules are objects as entries are.
func TestApplyRules(t *testing.T) {
	r := newRig(t)
	rule := func(id string, edit ...func(*rulev1.Rule)) *applyv1.Item {
		one := &rulev1.Rule{
			Id: id, IdTemplate: "spiffe://example.org/user/{unix.user}", Trust: "agent", ParentId: "spiffe://example.org/spire/agent/a",
			Selectors: []*rulev1.Selector{{Type: "unix", Value: "uid:1"}},
		}
		for _, f := range edit {
			f(one)
		}
		return &applyv1.Item{Want: &applyv1.Item_Rule{Rule: one}}
	}
	drop := func(id string) *applyv1.Item {
		return &applyv1.Item{Want: &applyv1.Item_DeleteRule{DeleteRule: id}}
	}
	r.make("shop", "create; create", rule("users"), want(declared("web", "/web"), 0))
	r.make("shop", "none; none", rule("users"), rule(""))
	r.make("shop", "update id_template:spiffe://example.org/user/{unix.user}>spiffe://example.org/user/{unix.uid}/x hint:>h",
		rule("users", func(u *rulev1.Rule) { u.IdTemplate, u.Hint = "spiffe://example.org/user/{unix.uid}/x", "h" }))
	end := time.Now().Add(time.Hour).Unix()
	if got, _ := r.plan("shop", rule("users", func(u *rulev1.Rule) {
		u.IdTemplate, u.Hint, u.ExpiresAt = "spiffe://example.org/user/{unix.uid}/x", "h", end
	}),
		want(declared("web", "/web", func(e *applyv1.Entry) { e.ExpiresAt = end }), 0)); got != fmt.Sprintf("update ruleExpiry:0>%d; update entryExpiry:0>%d", end, end) {
		t.Errorf("the plan is %q", got)
	}
	if got, _ := r.plan("bank", rule("users"), drop("users"), gone("users", 0), drop("none"), rule("r", func(u *rulev1.Rule) { u.Trust = "" }),
		&applyv1.Item{Want: &applyv1.Item_Rule{}}); got != "refuse foreign; refuse foreign; none; none; refuse rule_trust_missing; refuse rule_template_invalid" {
		t.Errorf("the plan is %q", got)
	}
	// One id cannot be that of an entry and of a rule.
	if got, _ := r.plan("shop", rule("web"), want(declared("users", "/x"), 0)); got != "refuse rule_id_taken; refuse entry_id_taken" {
		t.Errorf("the plan is %q", got)
	}
	// A list has the entries first, and goes on among the rules.
	r.make("shop", "create", rule("a", func(u *rulev1.Rule) { u.Selectors[0].Value = "uid:2" }))
	r.make("bank", "create", rule("b", func(u *rulev1.Rule) { u.Selectors[0].Value = "uid:3" }))
	req, got := &applyv1.ListRequest{Owner: "shop", PageSize: 1}, []string{}
	for {
		page, err := applyv1.NewApplyClient(r.admin).List(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range page.Objects {
			got = append(got, o.GetEntry().GetId()+o.GetRule().GetId())
		}
		if req.PageToken = page.NextPageToken; req.PageToken == "" {
			break
		}
	}
	if fmt.Sprint(got) != "[web a users]" {
		t.Errorf("listed %v", got)
	}
	r.make("shop", "delete; delete", drop("users"), gone("web", 0))
}

// A plan holds only as long as nobody changes what it was made from, and a group
// is applied whole or not at all.
func TestApplyRaces(t *testing.T) {
	r := newRig(t)
	r.make("shop", "create; create", want(declared("a", "/a"), 0), want(declared("b", "/b"), 0))
	change := func(id string) *applyv1.Entry {
		return declared(id, "/"+id, func(e *applyv1.Entry) { e.Hint = "new" })
	}
	steps := []struct {
		name  string
		items []*applyv1.Item
		after func()
	}{
		{"changed", []*applyv1.Item{want(change("a"), 0), want(change("b"), 0)}, func() {
			r.make("shop", "update x509_svid_ttl:0>60", want(declared("b", "/b", func(e *applyv1.Entry) { e.X509SvidTtl = 60 }), 0))
		}},
		{"came", []*applyv1.Item{want(change("a"), 0), want(change("c"), 0)}, func() {
			r.create(&spiretypes.Entry{Id: "c", SpiffeId: wireID("/c"), ParentId: wireID("/spire/agent/a"), Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:1"}}})
		}},
		{"changed before its deletion", []*applyv1.Item{want(change("a"), 0), gone("b", 0)}, func() {
			r.make("shop", "update x509_svid_ttl:60>0", want(declared("b", "/b"), 0))
		}},
		{"gone", []*applyv1.Item{want(change("a"), 0), want(change("b"), 0)}, func() {
			r.make("shop", "delete", gone("b", 0))
		}},
	}
	for _, step := range steps {
		_, items := r.plan("shop", step.items...)
		step.after()
		_, err := r.apply("shop", false, items...)
		wantCode(t, step.name, err, codes.Aborted, "plan_stale")
		if got, _ := r.plan("shop", want(declared("a", "/a"), 0)); got != "none" {
			t.Errorf("%s: half of the group was applied: %s", step.name, got)
		}
	}
	// Without a plan nothing is changed either.
	_, err := r.apply("shop", false, want(change("a"), 0))
	wantCode(t, "no plan", err, codes.Aborted, "plan_stale")
	_, err = r.apply("shop", false, want(declared("c", "/c"), 0))
	wantCode(t, "a foreign one", err, codes.Aborted, "plan_stale")
}

func TestApplyBounds(t *testing.T) {
	r := newRig(t)
	for owner, ok := range map[string]bool{"": false, "a b": false, "team/shop_1.x-y": true, strings.Repeat("o", 64): true, strings.Repeat("o", 65): false, "ü": false} {
		_, err := r.apply(owner, true)
		_, listErr := applyv1.NewApplyClient(r.admin).List(t.Context(), &applyv1.ListRequest{Owner: owner})
		if ok {
			wantCode(t, owner, err, codes.OK, "")
			wantCode(t, owner, listErr, codes.OK, "")
		} else {
			wantCode(t, owner, err, codes.InvalidArgument, "owner_invalid")
			wantCode(t, owner, listErr, codes.InvalidArgument, "owner_invalid")
		}
	}
	_, err := r.apply("shop", true, make([]*applyv1.Item, 501)...)
	wantCode(t, "too many", err, codes.InvalidArgument, "batch_too_large")
}

// An owner's objects are listed page by page, and no others.
func TestApplyList(t *testing.T) {
	r := newRig(t)
	var items, others []*applyv1.Item
	for i := range 25 {
		items = append(items, want(declared(fmt.Sprintf("shop%02d", i), fmt.Sprintf("/s%d", i), func(e *applyv1.Entry) {
			e.FederatesWith, e.DnsNames, e.ExpiresAt = []string{"b.test"}, []string{"x.test"}, time.Now().Add(time.Hour).Unix()
			e.JwtSvidIncludeJti = true
		}), 0))
		others = append(others, want(declared(fmt.Sprintf("bank%02d", i), fmt.Sprintf("/b%d", i)), 0))
	}
	for owner, all := range map[string][]*applyv1.Item{"shop": items, "bank": others} {
		if _, err := r.apply(owner, false, all...); err != nil {
			t.Fatal(err)
		}
	}
	r.create(&spiretypes.Entry{Id: "shop13x", SpiffeId: wireID("/nobodys"), ParentId: wireID("/spire/agent/a"), Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:1"}}})
	req, got := &applyv1.ListRequest{Owner: "shop", PageSize: 4}, []*applyv1.Item{}
	for {
		page, err := applyv1.NewApplyClient(r.admin).List(t.Context(), req)
		if err != nil || len(page.Objects) > 4 {
			t.Fatalf("a page of %d, %v", len(page.GetObjects()), err)
		}
		for _, o := range page.Objects {
			got = append(got, want(o.GetEntry(), o.Revision))
		}
		if req.PageToken = page.NextPageToken; req.PageToken == "" {
			break
		}
	}
	// What is listed is what was declared: wanting it again changes nothing.
	if plan, _ := r.plan("shop", got...); plan != strings.TrimSuffix(strings.Repeat("none; ", 25), "; ") {
		t.Errorf("the plan is %q", plan)
	}
	page, err := applyv1.NewApplyClient(r.admin).List(t.Context(), &applyv1.ListRequest{Owner: "shop", PageSize: 4})
	if err != nil {
		t.Fatal(err)
	}
	_, err = applyv1.NewApplyClient(r.admin).List(t.Context(), &applyv1.ListRequest{Owner: "bank", PageToken: page.NextPageToken})
	wantCode(t, "another owner's token", err, codes.InvalidArgument, "page_token_invalid")
}
