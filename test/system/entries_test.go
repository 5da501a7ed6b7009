package system_test

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// soundEntry is one that every server takes; rows of the corpus change it.
func soundEntry(id string) *spiretypes.Entry {
	return &spiretypes.Entry{
		Id: id, SpiffeId: wireID("spiffe://example.org/" + strings.ToLower(id)), ParentId: wireID("spiffe://example.org/parent"),
		Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:4242"}},
	}
}

// entryRow is an entry of corpus E that is refused, or one beside it that is not.
type entryRow struct {
	name string
	edit func(*spiretypes.Entry)
	want codes.Code
}

func entryRows() []entryRow {
	selector := func(kind, value string) func(*spiretypes.Entry) {
		return func(e *spiretypes.Entry) { e.Selectors = []*spiretypes.Selector{{Type: kind, Value: value}} }
	}
	dns := func(names ...string) func(*spiretypes.Entry) {
		return func(e *spiretypes.Entry) { e.DnsNames = names }
	}
	parent := func(id *spiretypes.SPIFFEID) func(*spiretypes.Entry) {
		return func(e *spiretypes.Entry) { e.ParentId = id }
	}
	numbered := func(n int) (s []*spiretypes.Selector) {
		for i := range n {
			s = append(s, &spiretypes.Selector{Type: "unix", Value: fmt.Sprint("gid:", i)})
		}
		return s
	}
	hosts := func(n int) (names []string) {
		for i := range n {
			names = append(names, fmt.Sprintf("h%d.example.org", i))
		}
		return names
	}
	const bad, good = codes.InvalidArgument, codes.OK
	now := time.Now().Unix()
	rows := []entryRow{
		{"E1 no selectors", func(e *spiretypes.Entry) { e.Selectors = nil }, bad},
		{"E2 empty type", selector("", "uid:1"), bad},
		{"E2 empty value", selector("unix", ""), bad},
		{"E2 empty selector", func(e *spiretypes.Entry) { e.Selectors = []*spiretypes.Selector{{}} }, bad},
		{"E3 colon in the type", selector("unix:uid", "1"), bad},
		{"E3 upper case", selector("Unix", "uid:1"), bad},
		{"E3 type of 300 bytes", selector(strings.Repeat("u", 300), "x"), bad},
		{"E3 type of 255 bytes", selector(strings.Repeat("u", 255), "x"), good},
		{"E4 NUL", selector("unix", "path:/a\x00b"), bad},
		{"E5 value of 64 KiB and 1", selector("unix", "path:/"+strings.Repeat("a", 64<<10-5)), bad},
		{"E5 value of 64 KiB", selector("unix", "path:/"+strings.Repeat("a", 64<<10-6)), good},
		{"E6 1,001 selectors", func(e *spiretypes.Entry) { e.Selectors = numbered(1001) }, bad},
		{"E6 1,000 selectors", func(e *spiretypes.Entry) { e.Selectors = numbered(1000) }, good},
		{"E8 no parent", parent(nil), bad},
		{"E8 empty parent", parent(&spiretypes.SPIFFEID{}), bad},
		{"E8 foreign parent", parent(wireID("spiffe://other.org/parent")), bad},
		{"E8 parent without a path", parent(&spiretypes.SPIFFEID{TrustDomain: "example.org"}), bad},
		{"E8 malformed parent", parent(wireID("spiffe://example.org//parent")), bad},
		{"E8 reserved parent", parent(wireID("spiffe://example.org/spire/x")), bad},
		{"E8 agents' root as parent", parent(wireID("spiffe://example.org/spire/agent")), bad},
		{"E9 its own parent", func(e *spiretypes.Entry) { e.ParentId = e.SpiffeId }, bad},
		{"E13 X.509 TTL of -1", func(e *spiretypes.Entry) { e.X509SvidTtl = -1 }, bad},
		{"E13 JWT TTL of -1", func(e *spiretypes.Entry) { e.JwtSvidTtl = -1 }, bad},
		{"E13 least TTL", func(e *spiretypes.Entry) { e.X509SvidTtl = math.MinInt32 }, bad},
		{"E13 longest TTL", func(e *spiretypes.Entry) { e.X509SvidTtl, e.JwtSvidTtl = math.MaxInt32, math.MaxInt32 }, good},
		{"E15 ended", func(e *spiretypes.Entry) { e.ExpiresAt = now - 1 }, bad},
		{"E15 before 1970", func(e *spiretypes.Entry) { e.ExpiresAt = -1 }, bad},
		{"E15 long ago", func(e *spiretypes.Entry) { e.ExpiresAt = math.MinInt64 }, bad},
		{"E15 year 10,000", func(e *spiretypes.Entry) { e.ExpiresAt = 253402300800 }, bad},
		{"E15 end of time", func(e *spiretypes.Entry) { e.ExpiresAt = math.MaxInt64 }, bad},
		{"E15 year 9999", func(e *spiretypes.Entry) { e.ExpiresAt = 253402300799 }, good},
		{"E16 star", dns("*"), bad},
		{"E16 two stars", dns("*.*.example.org"), bad},
		{"E16 star inside", dns("a.*.example.org"), bad},
		{"E16 star in a label", dns("a*.example.org"), bad},
		{"E16 empty label", dns("a..b"), bad},
		{"E16 empty", dns(""), bad},
		{"E16 label of 64 bytes", dns(strings.Repeat("a", 64) + ".org"), bad},
		{"E16 254 bytes", dns(strings.Repeat(strings.Repeat("a", 49)+".", 5) + "abcd"), bad},
		{"E16 253 bytes", dns(strings.Repeat(strings.Repeat("a", 49)+".", 5) + "abc"), good},
		{"E16 trailing dot", dns("example.org."), bad},
		{"E16 IPv4 address", dns("127.0.0.1"), bad},
		{"E16 IPv6 address", dns("::1"), bad},
		{"E16 underscore", dns("a_b.example.org"), bad},
		{"E16 space", dns("a b.example.org"), bad},
		{"E16 NUL", dns("a.example.org\x00.evil.org"), bad},
		{"E16 not ASCII", dns("b\u00fccher.example.org"), bad},
		{"E16 wildcard", dns("*.example.org"), good},
		{"E17 wildcard over a sibling", dns("*.example.org", "a.example.org"), bad},
		{"E17 wildcard over a sibling, other case", dns("A.Example.org", "*.example.ORG"), bad},
		{"E18 101 DNS names", dns(hosts(101)...), bad},
		{"E18 100 DNS names", dns(hosts(100)...), good},
		{"E19 federates with itself", func(e *spiretypes.Entry) { e.FederatesWith = []string{"example.org"} }, bad},
		{"E19 federates with an ID", func(e *spiretypes.Entry) { e.FederatesWith = []string{"spiffe://other.org"} }, bad},
		{"E19 federates with nothing", func(e *spiretypes.Entry) { e.FederatesWith = []string{""} }, bad},
		{"E20 federates with an unknown domain", func(e *spiretypes.Entry) { e.FederatesWith = []string{"unknown.org"} }, good},
		{"E21 hint of 1,025 bytes", func(e *spiretypes.Entry) { e.Hint = strings.Repeat("h", 1025) }, bad},
		{"E21 hint of 1,024 bytes", func(e *spiretypes.Entry) { e.Hint = strings.Repeat("h", 1024) }, good},
		{"E21 hint with a newline", func(e *spiretypes.Entry) { e.Hint = "a\nb" }, bad},
		{"E21 hint with an escape", func(e *spiretypes.Entry) { e.Hint = "\x1b[31m" }, bad},
		{"E23 id of 256 bytes", func(e *spiretypes.Entry) { e.Id = strings.Repeat("i", 256) }, bad},
		{"E23 id of 255 bytes", func(e *spiretypes.Entry) { e.Id = strings.Repeat("i", 255) }, good},
		{"E23 id with a slash", func(e *spiretypes.Entry) { e.Id = "a/b" }, bad},
		{"E23 id with a space", func(e *spiretypes.Entry) { e.Id = "a b" }, bad},
		{"E23 id with a NUL", func(e *spiretypes.Entry) { e.Id = "a\x00b" }, bad},
		{"E23 reserved id", func(e *spiretypes.Entry) { e.Id = "plastron.x" }, bad},
		{"E27 store without one type", func(e *spiretypes.Entry) {
			e.StoreSvid = true
			e.Selectors = []*spiretypes.Selector{{Type: "aws_secretsmanager", Value: "secretname:x"}, {Type: "unix", Value: "uid:1"}}
		}, bad},
		{"E27 store without prefetch", func(e *spiretypes.Entry) {
			e.StoreSvid, e.AdditionalAttributes = true, &spiretypes.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true}
		}, bad},
		{"E27 store of one type", func(e *spiretypes.Entry) { e.StoreSvid = true }, good},
		{"E27 alias that is admin", func(e *spiretypes.Entry) { e.ParentId, e.Admin = wireID("spiffe://example.org/spire/server"), true }, bad},
		{"E42 path without a uid", selector("unix", "path:/bin/true"), good},
		{"E43 root", selector("unix", "uid:0"), good},
		{"E44 names with colons", selector("unix", "user:a:b"), good},
		{"E44 names with newlines", selector("unix", "group:a\nb"), good},
	}
	for _, id := range badIDs() {
		rows = append(rows, entryRow{"E12 " + id.row, func(e *spiretypes.Entry) {
			td, path, _ := strings.Cut(strings.TrimPrefix(id.text, "spiffe://"), "/")
			if e.SpiffeId = (&spiretypes.SPIFFEID{TrustDomain: td, Path: "/" + path}); !strings.HasPrefix(id.text, "spiffe://") {
				e.SpiffeId = &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: id.text}
			}
			if id.is("S42") {
				e.SpiffeId.Path = ""
			}
		}, bad})
	}
	return rows
}

// Corpus E over the admin socket of a real server, each row both as a creation
// and as a change of an entry that is there, and nothing but what is sound is
// written.
func TestCorpusE(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.startServer()
	conn := dialUnix(t, d.adminSocket())
	client := entryv1.NewEntryClient(conn)
	create := func(t *testing.T, entries ...*spiretypes.Entry) []*entryv1.BatchCreateEntryResponse_Result {
		t.Helper()
		resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: entries})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results
	}
	update := func(t *testing.T, e *spiretypes.Entry, mask *spiretypes.EntryMask) *entryv1.BatchUpdateEntryResponse_Result {
		t.Helper()
		resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{e}, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results[0]
	}
	remove := func(t *testing.T, ids ...string) []*entryv1.BatchDeleteEntryResponse_Result {
		t.Helper()
		resp, err := client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: ids})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results
	}
	wantStatus := func(t *testing.T, what string, st *spiretypes.Status, want codes.Code) {
		t.Helper()
		if codes.Code(st.GetCode()) != want || st.GetMessage() == "" || len(st.GetMessage()) > 1000 || strings.Contains(st.GetMessage(), "\x1b") {
			t.Errorf("%s: %v %.300q, want %v and a short sentence", what, codes.Code(st.GetCode()), st.GetMessage(), want)
		}
	}

	there := create(t, soundEntry("there"))[0].Entry
	for _, row := range entryRows() {
		t.Run(row.name, func(t *testing.T) {
			e := soundEntry("row")
			row.edit(e)
			if len(e.SpiffeId.GetPath()) > 1<<19 { // S41 fits into a message as it is
				e.Selectors[0].Value = "uid:1"
			}
			made := create(t, e)[0]
			wantStatus(t, "create", made.Status, row.want)
			if row.want == codes.OK {
				wantStatus(t, "delete", remove(t, made.Entry.Id)[0].Status, codes.OK)
			} else if made.Entry != nil {
				t.Errorf("a refused entry is returned: %.300v", made.Entry)
			}
			if strings.HasPrefix(row.name, "E23") {
				wantStatus(t, "update", update(t, e, &spiretypes.EntryMask{Hint: true}).Status, map[codes.Code]codes.Code{codes.OK: codes.NotFound, codes.InvalidArgument: codes.InvalidArgument}[row.want])
				return
			}
			e.Id = there.Id
			wantStatus(t, "update", update(t, e, nil).Status, row.want)
			if row.want == codes.OK {
				there.RevisionNumber = 0 // whatever it is at
				wantStatus(t, "update back", update(t, there, nil).Status, codes.OK)
			}
		})
	}
	now, err := client.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: there.Id})
	if err != nil {
		t.Fatal(err)
	}
	if there.RevisionNumber = now.RevisionNumber; !proto.Equal(now, there) || d.countEntries() != 1 {
		t.Errorf("after all rows there are %d entries, the first %v, was %v", d.countEntries(), now, there)
	}

	t.Run("E4 invalid UTF-8", func(t *testing.T) { // the library refuses it, before any of our code
		message, err := proto.Marshal(&entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{soundEntry("utf8")}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = invokeRaw(t.Context(), conn, entryv1.Entry_BatchCreateEntry_FullMethodName, bytes.ReplaceAll(message, []byte("uid:4242"), []byte("uid:\xff242")))
		if code := status.Code(err); code != codes.Internal && code != codes.InvalidArgument {
			t.Error(err)
		}
	})
	t.Run("E7 duplicate selectors", func(t *testing.T) {
		e := soundEntry("e7")
		e.Selectors = append(e.Selectors, e.Selectors[0], &spiretypes.Selector{Type: "unix", Value: "gid:1"}, e.Selectors[0])
		made := create(t, e)[0].Entry
		if len(made.GetSelectors()) != 2 {
			t.Errorf("stored %v", made.GetSelectors())
		}
		e.Id, e.Selectors = "", made.GetSelectors()
		slices.Reverse(e.Selectors)
		if again := create(t, e)[0]; codes.Code(again.Status.Code) != codes.AlreadyExists || again.Entry.GetId() != "e7" {
			t.Errorf("the same selectors in another order: %v", again)
		}
	})
	t.Run("E13 what no int32 holds", func(t *testing.T) { // 2^31 and 2^63-1 as varints: the low 32 bits count, as protobuf has it
		for _, ttl := range []uint64{1 << 31, math.MaxInt64} {
			e, err := proto.Marshal(soundEntry("e13"))
			if err != nil {
				t.Fatal(err)
			}
			field := (*spiretypes.Entry)(nil).ProtoReflect().Descriptor().Fields().ByName("x509_svid_ttl").Number()
			e = protowire.AppendVarint(protowire.AppendTag(e, field, protowire.VarintType), ttl)
			answer, err := invokeRaw(t.Context(), conn, entryv1.Entry_BatchCreateEntry_FullMethodName, protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), e))
			if err != nil {
				t.Fatal(err)
			}
			resp := &entryv1.BatchCreateEntryResponse{}
			if err := proto.Unmarshal(answer, resp); err != nil {
				t.Fatal(err)
			}
			wantStatus(t, fmt.Sprint(ttl), resp.Results[0].Status, codes.InvalidArgument)
		}
	})
	t.Run("E24 id in use", func(t *testing.T) {
		other := soundEntry(there.Id)
		other.SpiffeId = wireID("spiffe://example.org/e24")
		r := create(t, other)[0]
		wantStatus(t, "create", r.Status, codes.AlreadyExists)
		if r.Entry != nil {
			t.Errorf("it shows another's body: %v", r.Entry)
		}
		if is, err := client.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: there.Id}); err != nil || !proto.Equal(is, there) {
			t.Errorf("it was %v, is %v, %v", there, is, err)
		}
	})
	t.Run("E24 content in use", func(t *testing.T) {
		twin := soundEntry("twin")
		twin.SpiffeId, twin.X509SvidTtl = there.SpiffeId, 77
		r := create(t, twin)[0]
		wantStatus(t, "create", r.Status, codes.AlreadyExists)
		if !proto.Equal(r.Entry, there) {
			t.Errorf("AlreadyExists with %v, want %v", r.Entry, there)
		}
		r2 := create(t, soundEntry("e24-two"))[0].Entry
		r2.SpiffeId = there.SpiffeId
		wantStatus(t, "update", update(t, r2, &spiretypes.EntryMask{SpiffeId: true}).Status, codes.AlreadyExists)
	})
	t.Run("E25 re-created id", func(t *testing.T) { // R74
		last := int64(0)
		for range 3 {
			made := create(t, soundEntry("e25"))[0].Entry
			changed := update(t, &spiretypes.Entry{Id: "e25", Hint: "x"}, &spiretypes.EntryMask{Hint: true}).Entry
			if made.GetRevisionNumber() <= last || changed.GetRevisionNumber() <= made.GetRevisionNumber() {
				t.Errorf("revisions %d, %d, %d", last, made.GetRevisionNumber(), changed.GetRevisionNumber())
			}
			last = changed.GetRevisionNumber()
			remove(t, "e25")
		}
	})
	t.Run("E28 stale revision", func(t *testing.T) {
		made := create(t, soundEntry("e28"))[0].Entry
		mask := &spiretypes.EntryMask{Hint: true, RevisionNumber: true}
		change := &spiretypes.Entry{Id: "e28", Hint: "first", RevisionNumber: made.RevisionNumber}
		wantStatus(t, "first", update(t, change, mask).Status, codes.OK)
		change.Hint = "second"
		wantStatus(t, "second", update(t, change, mask).Status, codes.Aborted)
		if e, err := client.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "e28"}); err != nil || e.Hint != "first" {
			t.Errorf("it is %v, %v", e, err)
		}
	})
	t.Run("E29 update empties selectors", func(t *testing.T) {
		wantStatus(t, "update", update(t, &spiretypes.Entry{Id: there.Id}, &spiretypes.EntryMask{Selectors: true}).Status, codes.InvalidArgument)
	})
	t.Run("E31 the same create at once", func(t *testing.T) {
		var made, told atomic.Int32
		var all sync.WaitGroup
		for range 20 {
			one := entryv1.NewEntryClient(dialUnix(t, d.adminSocket()))
			all.Go(func() {
				e := soundEntry("")
				e.SpiffeId = wireID("spiffe://example.org/e31")
				resp, err := one.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
				switch {
				case err != nil:
					t.Error(err)
				case resp.Results[0].Status.Code == 0:
					made.Add(1)
				case codes.Code(resp.Results[0].Status.Code) == codes.AlreadyExists && resp.Results[0].Entry != nil:
					told.Add(1)
				}
			})
		}
		all.Wait()
		if made.Load() != 1 || told.Load() != 19 {
			t.Errorf("%d made it and %d were told, want 1 and 19", made.Load(), told.Load())
		}
	})
	t.Run("E32 batch of 10,001", func(t *testing.T) {
		_, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: slices.Repeat([]*spiretypes.Entry{soundEntry("")}, 10_001)})
		denied(t, "create", err)
		_, err = client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: slices.Repeat([]*spiretypes.Entry{soundEntry("")}, 10_001)})
		denied(t, "update", err)
		_, err = client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: slices.Repeat([]string{"x"}, 10_001)})
		denied(t, "delete", err)
	})
	t.Run("E33 batch with one bad", func(t *testing.T) {
		bad := soundEntry("e33-bad")
		bad.Selectors = nil
		results := create(t, soundEntry("e33-a"), bad, soundEntry("e33-b"))
		for i, want := range []codes.Code{codes.OK, codes.InvalidArgument, codes.OK} {
			wantStatus(t, fmt.Sprint("item ", i), results[i].Status, want)
		}
		for i, r := range remove(t, "e33-a", "e33-bad", "e33-b") {
			wantStatus(t, fmt.Sprint("item ", i), r.Status, []codes.Code{codes.OK, codes.NotFound, codes.OK}[i])
		}
	})
	t.Run("E34 unknown", func(t *testing.T) {
		wantStatus(t, "delete", remove(t, "none")[0].Status, codes.NotFound)
		wantStatus(t, "update", update(t, &spiretypes.Entry{Id: "none"}, &spiretypes.EntryMask{Hint: true}).Status, codes.NotFound)
		if _, err := client.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "none"}); status.Code(err) != codes.NotFound {
			t.Error(err)
		}
		agents := agentv1.NewAgentClient(conn)
		id := wireID("spiffe://example.org/spire/agent/none")
		for name, err := range map[string]error{
			"GetAgent": func() error { _, err := agents.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: id}); return err }(),
			"BanAgent": func() error { _, err := agents.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: id}); return err }(),
			"DeleteAgent": func() error {
				_, err := agents.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: id})
				return err
			}(),
		} {
			if status.Code(err) != codes.NotFound {
				t.Errorf("%s: %v, want NotFound", name, err)
			}
		}
	})
	t.Run("E39 masks that hide id and revision", func(t *testing.T) {
		page, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{OutputMask: &spiretypes.EntryMask{}})
		if err != nil || len(page.Entries) == 0 {
			t.Fatal(page, err)
		}
		for _, e := range page.Entries {
			if !proto.Equal(e, &spiretypes.Entry{Id: e.Id}) || e.Id == "" {
				t.Errorf("%v, want the id alone", e)
			}
		}
	})
	for name, message := range map[string][]byte{
		"unknown fields":    protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 7),
		"wrong wire type":   protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 7),
		"truncated message": protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.BytesType), 1000),
		"field number 0":    {0x02, 0x01, 0x01},
		"garbage":           {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	} {
		t.Run("E40 "+name, func(t *testing.T) {
			before := d.countEntries()
			for _, method := range []string{
				entryv1.Entry_BatchCreateEntry_FullMethodName, entryv1.Entry_BatchUpdateEntry_FullMethodName,
				entryv1.Entry_BatchDeleteEntry_FullMethodName, entryv1.Entry_ListEntries_FullMethodName,
				entryv1.Entry_CountEntries_FullMethodName, agentv1.Agent_ListAgents_FullMethodName,
			} {
				_, err := invokeRaw(t.Context(), conn, method, message)
				switch code := status.Code(err); {
				case code == codes.OK && (name == "unknown fields" || name == "wrong wire type"): // ignored, as protobuf has it
				case code == codes.Internal, code == codes.InvalidArgument:
				default:
					t.Errorf("%s: %v", method, err)
				}
			}
			if after := d.countEntries(); after != before {
				t.Errorf("%d entries were %d before", after, before)
			}
		})
	}
	t.Run("E41 message of 4 MiB and 1", func(t *testing.T) {
		_, err := client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{strings.Repeat("i", 4<<20-8)}})
		if status.Code(err) != codes.ResourceExhausted {
			t.Error(err)
		}
	})
	if out := d.server.Output(); strings.Contains(out, "level=ERROR") || strings.Contains(out, "panic") {
		t.Errorf("the server complains:\n%s", out)
	}
}
