package serverapi_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

var someAgent = spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/x")

func TestEntryRoundTrip(t *testing.T) {
	r := newRig(t)
	client := entryv1.NewEntryClient(r.admin)
	want := &spiretypes.Entry{
		Id: "web.1", SpiffeId: wireID("/web"), ParentId: wireID(someAgent.Path()),
		Selectors:   []*spiretypes.Selector{{Type: "unix", Value: "gid:1"}, {Type: "unix", Value: "uid:1"}},
		X509SvidTtl: 60, JwtSvidTtl: 30, FederatesWith: []string{"a.org", "b.org"}, Admin: true, Downstream: true,
		ExpiresAt: time.Now().Add(time.Hour).Unix(), DnsNames: []string{"b.example.org", "a.example.org"}, Hint: "internal",
		AdditionalAttributes: &spiretypes.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true, JwtSvidIncludeJti: true},
	}
	made := r.create(want)[0]
	if made.RevisionNumber == 0 || made.CreatedAt == 0 {
		t.Errorf("created %v, want a revision and a time", made)
	}
	want.RevisionNumber, want.CreatedAt = made.RevisionNumber, made.CreatedAt
	got, err := client.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "web.1"})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("GetEntry differs (-want +got):\n%s", d)
	}
	masked, err := client.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "web.1", OutputMask: &spiretypes.EntryMask{Hint: true}}) // E39
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&spiretypes.Entry{Id: "web.1", Hint: "internal"}, masked, protocmp.Transform()); d != "" {
		t.Errorf("masked differs (-want +got):\n%s", d)
	}
}

// R74: without the store nobody is told what is there and what is not, since
// another server may have changed it; what is wrong in itself is told.
func TestRefusalsWithoutStore(t *testing.T) {
	r := newRig(t)
	client := entryv1.NewEntryClient(r.admin)
	made := r.create(entryUnder(someAgent, "/x"))[0]
	for _, away := range []bool{false, true} {
		r.store.away.Store(away)
		created, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{made, {Id: "no id"}}})
		if err != nil {
			t.Fatal(err)
		}
		deleted, err := client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"none"}})
		if err != nil {
			t.Fatal(err)
		}
		want := []codes.Code{codes.AlreadyExists, codes.InvalidArgument, codes.NotFound}
		if away {
			want[0], want[2] = codes.Unavailable, codes.Unavailable
		}
		for i, status := range []*spiretypes.Status{created.Results[0].Status, created.Results[1].Status, deleted.Results[0].Status} {
			if codes.Code(status.Code) != want[i] {
				t.Errorf("store away %v, item %d: %v, want %v", away, i, status, want[i])
			}
		}
		if shown := created.Results[0].Entry != nil; shown == away {
			t.Errorf("store away %v, and the entry is shown: %v", away, shown)
		}
	}
	r.store.away.Store(false)
}

func TestCreateRefuses(t *testing.T) { // the E list at the wire; each rule has its own test in package entry
	r := newRig(t)
	client := entryv1.NewEntryClient(r.admin)
	change := func(f func(*spiretypes.Entry)) *spiretypes.Entry {
		e := entryUnder(someAgent, "/x")
		f(e)
		return e
	}
	cases := map[string]*spiretypes.Entry{
		"nil":                      nil,
		"E1 no selectors":          change(func(e *spiretypes.Entry) { e.Selectors = nil }),
		"E2 empty type":            change(func(e *spiretypes.Entry) { e.Selectors[0].Type = "" }),
		"E2 nil selector":          change(func(e *spiretypes.Entry) { e.Selectors[0] = nil }),
		"E3 colon in type":         change(func(e *spiretypes.Entry) { e.Selectors[0].Type = "a:b" }),
		"E5 64 KiB + 1":            change(func(e *spiretypes.Entry) { e.Selectors[0].Value = strings.Repeat("a", 64<<10+1) }),
		"E6 1001 selectors":        change(func(e *spiretypes.Entry) { e.Selectors = make([]*spiretypes.Selector, 1001) }),
		"E8 no parent":             change(func(e *spiretypes.Entry) { e.ParentId = nil }),
		"E8 foreign parent":        change(func(e *spiretypes.Entry) { e.ParentId.TrustDomain = "other.org" }),
		"E9 its own parent":        change(func(e *spiretypes.Entry) { e.ParentId = wireID("/x") }),
		"E12 S43 the server":       change(func(e *spiretypes.Entry) { e.SpiffeId = wireID("/spire/server") }),
		"E12 S44 an agent":         change(func(e *spiretypes.Entry) { e.SpiffeId = wireID("/spire/agent/x") }),
		"E12 S47 foreign":          change(func(e *spiretypes.Entry) { e.SpiffeId.TrustDomain = "other.org" }),
		"E12 S42 no path":          change(func(e *spiretypes.Entry) { e.SpiffeId = wireID("") }),
		"E12 no ID":                change(func(e *spiretypes.Entry) { e.SpiffeId = nil }),
		"E12 S15 slash at the end": change(func(e *spiretypes.Entry) { e.SpiffeId = wireID("/a/") }),
		"E12 S19 dots":             change(func(e *spiretypes.Entry) { e.SpiffeId = wireID("/a/../b") }),
		"E12 no slash":             change(func(e *spiretypes.Entry) { e.SpiffeId = wireID("a") }),
		"E12 path in the domain":   change(func(e *spiretypes.Entry) { e.SpiffeId = &spiretypes.SPIFFEID{TrustDomain: "example.org/a", Path: "/b"} }),
		"E12 S41 1 MiB":            change(func(e *spiretypes.Entry) { e.SpiffeId.Path = strings.Repeat("/a", 1<<19) }),
		"E13 negative TTL":         change(func(e *spiretypes.Entry) { e.X509SvidTtl = -1 }),
		"E15 past":                 change(func(e *spiretypes.Entry) { e.ExpiresAt = 1 }),
		"E15 negative":             change(func(e *spiretypes.Entry) { e.ExpiresAt = -1 }),
		"E15 year 10000":           change(func(e *spiretypes.Entry) { e.ExpiresAt = 253402300800 }),
		"E15 2^63 - 1":             change(func(e *spiretypes.Entry) { e.ExpiresAt = 1<<63 - 1 }),
		"E16 DNS":                  change(func(e *spiretypes.Entry) { e.DnsNames = []string{"a..b"} }),
		"E18 101 DNS names":        change(func(e *spiretypes.Entry) { e.DnsNames = strings.Split(strings.Repeat("a.org ", 101), " ")[:101] }),
		"E19 itself":               change(func(e *spiretypes.Entry) { e.FederatesWith = []string{"example.org"} }),
		"E19 not a domain":         change(func(e *spiretypes.Entry) { e.FederatesWith = []string{"UPPER"} }),
		"E21 hint":                 change(func(e *spiretypes.Entry) { e.Hint = strings.Repeat("a", 1025) }),
		"E23 slash in id":          change(func(e *spiretypes.Entry) { e.Id = "a/b" }),
		"E23 256 bytes":            change(func(e *spiretypes.Entry) { e.Id = strings.Repeat("a", 256) }),
	}
	before := r.store.writes.Load()
	for id, e := range cases {
		t.Run(id, func(t *testing.T) {
			resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
			if err != nil {
				t.Fatal(err)
			}
			if s := resp.Results[0].Status; codes.Code(s.Code) != codes.InvalidArgument || s.Message == "" || len(s.Message) > 1000 {
				t.Errorf("status %v, want InvalidArgument and a short sentence", s)
			}
		})
	}
	if n := r.store.writes.Load() - before; n != 0 {
		t.Errorf("refused entries caused %d writes", n)
	}
}

func TestBatches(t *testing.T) {
	r := newRig(t)
	client := entryv1.NewEntryClient(r.admin)
	create := func(entries ...*spiretypes.Entry) []*entryv1.BatchCreateEntryResponse_Result {
		t.Helper()
		resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: entries})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results
	}
	first := r.create(entryUnder(someAgent, "/first"))[0]

	// E33, E24, AlreadyExists with its body, a twin within the batch.
	bad, twin, taken := entryUnder(someAgent, "/spire/x"), entryUnder(someAgent, "/second"), entryUnder(someAgent, "/third")
	taken.Id = first.Id
	results := create(entryUnder(someAgent, "/first"), bad, entryUnder(someAgent, "/second"), twin, taken, entryUnder(someAgent, "/last"))
	var got []codes.Code
	for _, result := range results {
		got = append(got, codes.Code(result.Status.Code))
	}
	want := []codes.Code{codes.AlreadyExists, codes.InvalidArgument, codes.OK, codes.AlreadyExists, codes.AlreadyExists, codes.OK}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("statuses %v, want %v", got, want)
	}
	if !proto.Equal(results[0].Entry, first) {
		t.Errorf("AlreadyExists with %v, want the entry that is there", results[0].Entry)
	}
	if results[3].Entry.GetId() != results[2].Entry.GetId() {
		t.Error("the twin is not told of the first")
	}
	if results[4].Entry != nil {
		t.Error("a taken id shows another entry's body")
	}

	// E28, E29, masks, uniqueness on update.
	update := func(e *spiretypes.Entry, mask *spiretypes.EntryMask) *entryv1.BatchUpdateEntryResponse_Result {
		t.Helper()
		resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{e}, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results[0]
	}
	second := results[2].Entry
	hinted := update(&spiretypes.Entry{Id: second.Id, Hint: "new", SpiffeId: wireID("/ignored")}, &spiretypes.EntryMask{Hint: true})
	if hinted.Status.Code != 0 || hinted.Entry.Hint != "new" || hinted.Entry.SpiffeId.Path != "/second" || hinted.Entry.RevisionNumber <= second.RevisionNumber {
		t.Errorf("masked update: %v", hinted)
	}
	for name, c := range map[string]struct {
		entry *spiretypes.Entry
		mask  *spiretypes.EntryMask
		code  codes.Code
	}{
		"E28 stale revision":     {&spiretypes.Entry{Id: second.Id, RevisionNumber: second.RevisionNumber}, &spiretypes.EntryMask{RevisionNumber: true, Hint: true}, codes.Aborted},
		"E29 no selectors":       {&spiretypes.Entry{Id: second.Id}, &spiretypes.EntryMask{Selectors: true}, codes.InvalidArgument},
		"E24 another's content":  {&spiretypes.Entry{Id: second.Id, SpiffeId: wireID("/first")}, &spiretypes.EntryMask{SpiffeId: true}, codes.AlreadyExists},
		"E34 unknown":            {&spiretypes.Entry{Id: "unknown"}, &spiretypes.EntryMask{Hint: true}, codes.NotFound},
		"no id":                  {&spiretypes.Entry{}, nil, codes.InvalidArgument},
		"everything, but empty":  {&spiretypes.Entry{Id: second.Id}, nil, codes.InvalidArgument},
		"E15 an end in the past": {&spiretypes.Entry{Id: second.Id, ExpiresAt: 5}, &spiretypes.EntryMask{ExpiresAt: true}, codes.InvalidArgument},
	} {
		if result := update(c.entry, c.mask); codes.Code(result.Status.Code) != c.code {
			t.Errorf("%s: %v, want %v", name, result.Status, c.code)
		}
	}

	// E34 and E25: the revision grows over deletion and re-creation with the same id.
	gone, err := client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{second.Id, "unknown", "a/b", second.Id}})
	if err != nil {
		t.Fatal(err)
	}
	got = got[:0]
	for _, result := range gone.Results {
		got = append(got, codes.Code(result.Status.Code))
	}
	if want := []codes.Code{codes.OK, codes.NotFound, codes.InvalidArgument, codes.NotFound}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("deleting: %v, want %v", got, want)
	}
	back := entryUnder(someAgent, "/second")
	back.Id = second.Id
	if again := r.create(back)[0]; again.RevisionNumber <= hinted.Entry.RevisionNumber { // R74
		t.Errorf("revision %d after re-creation, want more than %d", again.RevisionNumber, hinted.Entry.RevisionNumber)
	}
	_, err = client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: make([]*spiretypes.Entry, 10_001)})
	wantCode(t, "E32", err, codes.InvalidArgument, "batch_too_large")
	_, err = client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{strings.Repeat("a", 4<<20)}})
	wantCode(t, "E41", err, codes.ResourceExhausted, "")
}

// What is created within one second is in the order of its creation all the same:
// the id breaks the tie (G10).
func TestIDsGrow(t *testing.T) {
	r := newRig(t)
	var all []*spiretypes.Entry
	for i := range 40 {
		all = append(all, entryUnder(someAgent, fmt.Sprintf("/%d", i)))
	}
	created := append(r.create(all[:20]...), r.create(all[20:]...)...)
	for i, e := range created {
		if e.SpiffeId.Path != all[i].SpiffeId.Path {
			t.Fatalf("item %d of the batch is answered with %s", i, e.SpiffeId.Path)
		}
		if i > 0 && e.Id <= created[i-1].Id {
			t.Errorf("%s was created after %s", e.Id, created[i-1].Id)
		}
	}
}

func TestListAndCount(t *testing.T) { // R86
	r := newRig(t)
	client := entryv1.NewEntryClient(r.admin)
	var all []*spiretypes.Entry
	for i := range 2500 {
		e := entryUnder(someAgent, fmt.Sprintf("/w/%d", i))
		if i%10 == 0 {
			e.Selectors = append(e.Selectors, &spiretypes.Selector{Type: "unix", Value: "gid:7"})
			e.FederatesWith, e.Hint, e.Downstream = []string{"a.org"}, "ten", true
		}
		all = append(all, e)
	}
	r.create(all...)
	r.create(entryUnder(spiffeid.RequireFromPath(td, "/w/1"), "/child"))

	whole, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{OutputMask: &spiretypes.EntryMask{SpiffeId: true}})
	if err != nil || len(whole.Entries) != 2501 || whole.NextPageToken != "" { // D6, E35: 0 is everything
		t.Fatalf("ListEntries() = %d entries, next %q, %v", len(whole.GetEntries()), whole.GetNextPageToken(), err)
	}
	seen := map[string]bool{}
	pages := 0
	for token := ""; ; pages++ {
		page, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 700, PageToken: token})
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
	if len(seen) != 2501 || pages != 3 {
		t.Errorf("%d entries in %d pages, want 2501 in 3 and a rest", len(seen), pages)
	}

	unix := func(values ...string) (out []*spiretypes.Selector) {
		for _, v := range values {
			out = append(out, &spiretypes.Selector{Type: "unix", Value: v})
		}
		return out
	}
	for name, c := range map[string]struct {
		filter *entryv1.CountEntriesRequest_Filter
		want   int32
	}{
		"none":             {nil, 2501},
		"empty":            {&entryv1.CountEntriesRequest_Filter{}, 2501},
		"SPIFFE ID":        {&entryv1.CountEntriesRequest_Filter{BySpiffeId: wireID("/w/1")}, 1}, // S49: not /w/10
		"parent":           {&entryv1.CountEntriesRequest_Filter{ByParentId: wireID("/w/1")}, 1},
		"parent of many":   {&entryv1.CountEntriesRequest_Filter{ByParentId: wireID(someAgent.Path())}, 2500},
		"hint":             {&entryv1.CountEntriesRequest_Filter{ByHint: wrapperspb.String("ten")}, 250},
		"downstream":       {&entryv1.CountEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(false)}, 2251},
		"federates":        {&entryv1.CountEntriesRequest_Filter{ByFederatesWith: &spiretypes.FederatesWithMatch{TrustDomains: []string{"a.org"}}}, 250},
		"exact selectors":  {&entryv1.CountEntriesRequest_Filter{BySelectors: &spiretypes.SelectorMatch{Selectors: unix("gid:7", "uid:1000")}}, 250},
		"subset":           {&entryv1.CountEntriesRequest_Filter{BySelectors: &spiretypes.SelectorMatch{Selectors: unix("uid:1000", "x"), Match: spiretypes.SelectorMatch_MATCH_SUBSET}}, 2251},
		"superset":         {&entryv1.CountEntriesRequest_Filter{BySelectors: &spiretypes.SelectorMatch{Selectors: unix("gid:7"), Match: spiretypes.SelectorMatch_MATCH_SUPERSET}}, 250},
		"any":              {&entryv1.CountEntriesRequest_Filter{BySelectors: &spiretypes.SelectorMatch{Selectors: unix("gid:7", "x"), Match: spiretypes.SelectorMatch_MATCH_ANY}}, 250},
		"two at once":      {&entryv1.CountEntriesRequest_Filter{BySpiffeId: wireID("/w/10"), ByHint: wrapperspb.String("ten")}, 1},
		"two that exclude": {&entryv1.CountEntriesRequest_Filter{BySpiffeId: wireID("/w/11"), ByHint: wrapperspb.String("ten")}, 0},
	} {
		count, err := client.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: c.filter})
		if err != nil || count.Count != c.want {
			t.Errorf("%s: %v, %v, want %d", name, count, err, c.want)
		}
	}

	page, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 10})
	if err != nil {
		t.Fatal(err)
	}
	many := &entryv1.ListEntriesRequest_Filter{BySelectors: &spiretypes.SelectorMatch{Selectors: make([]*spiretypes.Selector, 10_000)}}
	for name, req := range map[string]*entryv1.ListEntriesRequest{
		"E36 garbage":           {PageSize: 10, PageToken: "garbage"},
		"E36 SQL":               {PageSize: 10, PageToken: "' OR 1=1 --"},
		"E36 a number":          {PageSize: 10, PageToken: "17"},
		"E36 from another list": {PageSize: 10, PageToken: page.NextPageToken, Filter: &entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("x")}},
		"E36 tampered":          {PageSize: 10, PageToken: page.NextPageToken[:len(page.NextPageToken)-1] + "_"},
		"E36 1 MiB":             {PageSize: 10, PageToken: strings.Repeat("A", 1<<20)},
		"E30 unknown enum":      {Filter: &entryv1.ListEntriesRequest_Filter{BySelectors: &spiretypes.SelectorMatch{Selectors: unix("a"), Match: 99}}},
		"E37 10,000 selectors":  {Filter: many},
		"a filter of nothing":   {Filter: &entryv1.ListEntriesRequest_Filter{BySelectors: &spiretypes.SelectorMatch{}}},
		"a foreign ID":          {Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: &spiretypes.SPIFFEID{TrustDomain: "other.org", Path: "/a"}}},
	} {
		_, err := client.ListEntries(t.Context(), req)
		wantCode(t, name, err, codes.InvalidArgument, "")
	}
	for _, size := range []int32{-1, 1<<31 - 1} { // E35
		if _, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: size}); err != nil {
			t.Errorf("page size %d: %v", size, err)
		}
	}
}

func TestSyncAuthorizedEntries(t *testing.T) { // the polling of SPIRE's agents
	r := newRig(t)
	agent := r.agent()
	client := entryv1.NewEntryClient(r.connect(&agent))
	open := func() entryv1.Entry_SyncAuthorizedEntriesClient {
		t.Helper()
		stream, err := client.SyncAuthorizedEntries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		mask := &spiretypes.EntryMask{SpiffeId: true, RevisionNumber: true}
		if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: mask}); err != nil {
			t.Fatal(err)
		}
		return stream
	}
	resp, err := open().Recv()
	if err != nil || len(resp.Entries)+len(resp.EntryRevisions) != 0 || resp.More {
		t.Errorf("nothing granted: %v, %v, want one empty answer", resp, err)
	}
	one := r.create(entryUnder(agent.id, "/one"))[0]
	resp, err = open().Recv()
	if err != nil || len(resp.Entries) != 1 || resp.Entries[0].SpiffeId.Path != "/one" || resp.Entries[0].Hint != "" {
		t.Errorf("one granted: %v, %v", resp, err)
	}
	var all []*spiretypes.Entry
	for i := range 1200 {
		all = append(all, entryUnder(agent.id, fmt.Sprintf("/w/%d", i)))
	}
	r.create(all...)
	stream := open()
	revisions := map[string]int64{}
	for {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, rev := range resp.EntryRevisions {
			revisions[rev.Id] = rev.RevisionNumber
		}
		if !resp.More {
			break
		}
	}
	if len(revisions) != 1201 || revisions[one.Id] != one.RevisionNumber {
		t.Errorf("%d revisions, want 1201", len(revisions))
	}
	foreign := r.create(entryUnder(someAgent, "/foreign"))[0]
	ask := []string{one.Id, one.Id, "unknown", foreign.Id} // Q8
	for id := range revisions {
		ask = append(ask, id)
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ask}); err != nil {
		t.Fatal(err)
	}
	got := 0
	for {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range resp.Entries {
			if e.Id == foreign.Id {
				t.Error("another agent's entry")
			}
		}
		if got += len(resp.Entries); !resp.More {
			break
		}
	}
	if got != 1203 {
		t.Errorf("%d entries, want the 1201 and two repeated", got)
	}
	early, err := client.SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	early.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: []string{"a"}})
	_, err = early.Recv()
	wantCode(t, "Q8 ids first", err, codes.InvalidArgument, "ids_too_early")
}

// A server that promises that identities survive an outage takes no entry or rule
// that would break the promise.
func TestEntriesKeepThePromise(t *testing.T) {
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) {
		set, faults := lifetime.Wish{Outage: time.Hour}.Resolve()
		if len(faults) > 0 {
			t.Fatal(faults)
		}
		c.Lifetimes = set
	})
	client := entryv1.NewEntryClient(r.admin)
	for name, c := range map[string]struct {
		x509, jwt int32
		code      codes.Code
	}{
		"the default's": {0, 0, codes.OK}, "just enough": {9000, 9000, codes.OK},
		"X.509 too short": {8999, 0, codes.InvalidArgument}, "JWT too short": {0, 8999, codes.InvalidArgument},
		"longer than an authority spares": {9001, 0, codes.InvalidArgument},
	} {
		resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{
			SpiffeId: &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: "/a"}, ParentId: &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: "/p"},
			Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:1" + name}}, X509SvidTtl: c.x509, JwtSvidTtl: c.jwt,
		}}})
		if err != nil {
			t.Fatal(err)
		}
		if st := resp.Results[0].Status; codes.Code(st.Code) != c.code || c.code != codes.OK && !strings.Contains(st.Message, "an outage of 1h") && !strings.Contains(st.Message, "cut it short") {
			t.Errorf("%s: %v %s", name, codes.Code(st.Code), st.Message)
		}
	}
}
