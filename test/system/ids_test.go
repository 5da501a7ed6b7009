package system_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// badID is a row of corpus S that is refused. lawful rows are SPIFFE IDs, but
// not of a workload of example.org.
type badID struct {
	row, text string
	lawful    bool
}

func badIDs() []badID {
	const good = "spiffe://example.org"
	all := []badID{
		{row: "S1 empty"},
		{row: "S2 no trust domain", text: "spiffe://"},
		{row: "S3 no trust domain but a path", text: "spiffe:///a"},
		{row: "S4 upper-case scheme", text: "SPIFFE://example.org/a"},
		{row: "S5 other scheme", text: "https://example.org/a"},
		{row: "S6 no slashes", text: "spiffe:example.org/a"},
		{row: "S7 upper-case trust domain", text: "spiffe://EXAMPLE.org/a"},
		{row: "S8 port", text: "spiffe://example.org:8081/a"},
		{row: "S9 user", text: "spiffe://user@example.org/a"},
		{row: "S10 user and password", text: "spiffe://u:p@example.org/a"},
		{row: "S11 query", text: good + "/a?q=1"},
		{row: "S12 empty query", text: good + "/a?"},
		{row: "S13 fragment", text: good + "/a#f"},
		{row: "S14 empty fragment", text: good + "/a#"},
		{row: "S15 trailing slash", text: good + "/a/"},
		{row: "S16 slash alone", text: good + "/"},
		{row: "S17 empty segment", text: good + "//a"},
		{row: "S18 dot segment", text: good + "/./a"},
		{row: "S19 dots inside", text: good + "/a/../b"},
		{row: "S20 dots at the end", text: good + "/a/.."},
		{row: "S22 escaped dots", text: good + "/%2e%2e/b"},
		{row: "S23 escaped slash", text: good + "/a%2Fb"},
		{row: "S24 escaped trust domain", text: "spiffe://ex%61mple.org/a"},
		{row: "S25 percent alone", text: good + "/%"},
		{row: "S26 composed accent", text: good + "/\u00e9"},
		{row: "S27 decomposed accent", text: good + "/e\u0301"},
		{row: "S28 Cyrillic trust domain", text: "spiffe://ex\u0430mple.org/a"},
		{row: "S30 IPv6 address", text: "spiffe://[::1]/a"},
		{row: "S33 NUL", text: good + "/a\x00b"},
		{row: "S34 leading space", text: " " + good + "/a"},
		{row: "S34 trailing space", text: good + "/a "},
		{row: "S34 trailing newline", text: good + "/a\n"},
		{row: "S38 2,049 bytes", text: good + "/" + strings.Repeat("a", 2049-len(good)-1)},
		{row: "S40 trust domain of 256 bytes", text: "spiffe://" + strings.Repeat("a", 256) + "/a"},
		{row: "S41 1 MiB", text: good + "/" + strings.Repeat("a/", 1<<19) + "a"},
		{row: "S42 no path", text: good, lawful: true},
		{row: "S43 the server's", text: good + "/spire/server", lawful: true},
		{row: "S44 an agent's", text: good + "/spire/agent/x", lawful: true},
		{row: "S46 reserved root", text: good + "/spire", lawful: true},
		{row: "S46 reserved space", text: good + "/spire/x", lawful: true},
		{row: "S46 reserved root with a slash", text: good + "/spire/"},
		{row: "S47 foreign", text: "spiffe://other.org/a", lawful: true},
		{row: "S47 foreign, longer name", text: "spiffe://example.org.evil/a", lawful: true},
	}
	for _, c := range " \t\r\n" {
		all = append(all, badID{row: fmt.Sprintf("S33 %q inside", c), text: good + "/a" + string(c) + "b"})
	}
	for _, c := range "*:@~!+,;=\\\"'<" {
		all = append(all, badID{row: fmt.Sprintf("S35 %c", c), text: good + "/a" + string(c) + "b"})
	}
	return all
}

// is reports whether the row has one of these ids.
func (b badID) is(rows ...string) bool {
	id, _, _ := strings.Cut(b.row, " ")
	return slices.Contains(rows, id)
}

// forms are the ways to put a bad ID into the API's message, which holds trust
// domain and path apart: split as it should be, and smuggled through either field.
func (b badID) forms() []*spiretypes.SPIFFEID {
	bare, ok := strings.CutPrefix(b.text, "spiffe://")
	forms := []*spiretypes.SPIFFEID{{TrustDomain: b.text}, {TrustDomain: bare}, {TrustDomain: "example.org", Path: b.text}}
	if ok { // otherwise the scheme is what is wrong, and it would be lost
		if i := strings.IndexByte(bare, '/'); i >= 0 {
			forms = append(forms, &spiretypes.SPIFFEID{TrustDomain: bare[:i], Path: bare[i:]})
		}
	}
	return forms
}

// denied checks that a call was refused, with the code of a request that is
// wrong for good.
func denied(t *testing.T, call string, err error) {
	t.Helper()
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("%s: %v, want InvalidArgument", call, err)
	}
	if len(fmt.Sprint(err)) > 4096+200 {
		t.Errorf("%s answers with %d bytes", call, len(fmt.Sprint(err)))
	}
}

// itemError is the error of the only item of a batch.
func itemError(st *spiretypes.Status, err error) error {
	if err != nil {
		return err
	}
	return status.Error(codes.Code(st.Code), st.Message)
}

// idCalls are the calls of the server's API that take an ID in a message.
// Filters and parents may name what no workload can have.
func (d *deployment) idCalls() map[string]func(*spiretypes.SPIFFEID) error {
	admin := dialUnix(d.t, d.adminSocket())
	entries, agents, svids := entryv1.NewEntryClient(admin), agentv1.NewAgentClient(admin), svidv1.NewSVIDClient(admin)
	ctx := d.t.Context()
	create := func(e *spiretypes.Entry) error {
		e.Selectors = []*spiretypes.Selector{{Type: "unix", Value: "uid:4242"}}
		resp, err := entries.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
		if err != nil {
			return err
		}
		return itemError(resp.Results[0].Status, nil)
	}
	return map[string]func(*spiretypes.SPIFFEID) error{
		"BatchCreateEntry spiffe_id": func(id *spiretypes.SPIFFEID) error {
			return create(&spiretypes.Entry{SpiffeId: id, ParentId: wireID("spiffe://example.org/parent")})
		},
		"BatchCreateEntry parent_id": func(id *spiretypes.SPIFFEID) error {
			return create(&spiretypes.Entry{SpiffeId: wireID("spiffe://example.org/child"), ParentId: id})
		},
		"CreateJoinToken agent_id": func(id *spiretypes.SPIFFEID) error {
			_, err := agents.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: id})
			return err
		},
		"MintJWTSVID id": func(id *spiretypes.SPIFFEID) error {
			_, err := svids.MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: id, Audience: []string{"a"}})
			return err
		},
		"GetAgent id": func(id *spiretypes.SPIFFEID) error {
			_, err := agents.GetAgent(ctx, &agentv1.GetAgentRequest{Id: id})
			return err
		},
		"ListEntries by_spiffe_id": func(id *spiretypes.SPIFFEID) error {
			_, err := entries.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: id}})
			return err
		},
		"ListEntries by_parent_id": func(id *spiretypes.SPIFFEID) error {
			_, err := entries.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByParentId: id}})
			return err
		},
	}
}

func (d *deployment) countEntries() int32 {
	d.t.Helper()
	resp, err := d.entries().CountEntries(d.t.Context(), &entryv1.CountEntriesRequest{})
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.Count
}

// Corpus S through every call of the server's API, the Workload API and the
// command line; nothing is written. R16.
func TestCorpusS(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	d.createEntry(agent, "/mine", nil, mine())
	d.waitServed()
	before := d.countEntries()
	calls := d.idCalls()
	svids, workloads := svidv1.NewSVIDClient(dialUnix(t, d.adminSocket())), d.workloadAPI()
	forge := d.forger()
	key := newKey(t)
	if err := forge.validates(workloads, "spiffe://example.org/control"); err != nil {
		t.Fatalf("a forged token that must pass does not: %v", err)
	}
	if _, err := svids.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csrForURI(t, key, "spiffe://example.org/control")}); err != nil {
		t.Fatalf("a request that must pass does not: %v", err)
	}
	for _, bad := range badIDs() {
		t.Run(bad.row, func(t *testing.T) {
			for call, do := range calls {
				switch {
				case bad.lawful && strings.HasPrefix(call, "List"):
					continue // finds nothing
				case bad.is("S43", "S44", "S46") && call == "BatchCreateEntry parent_id", bad.is("S44") && call == "GetAgent id":
					continue // parents are agents and the server
				case bad.is("S1") && call != "BatchCreateEntry spiffe_id" && call != "MintJWTSVID id":
					continue // below, as an absent message
				}
				for i, id := range bad.forms() {
					denied(t, fmt.Sprintf("%s, form %d", call, i), do(id))
				}
			}
			_, err := svids.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csrForURI(t, key, bad.text)})
			denied(t, "MintX509SVID", err)
			if bad.is("S41") { // more than any message of the Workload API may hold
				if err := forge.validates(workloads, bad.text); status.Code(err) != codes.ResourceExhausted {
					t.Errorf("ValidateJWTSVID: %v, want ResourceExhausted", err)
				}
				bad.text = bad.text[:100_000]
			}
			if !bad.is("S43", "S44", "S46") { // an agent's own token would be one of our trust domain
				denied(t, "ValidateJWTSVID sub", forge.validates(workloads, bad.text))
			}
			_, err = workloads.FetchJWTSVID(withHeader(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: bad.text})
			switch {
			case bad.is("S1"): // absent: all identities
			case bad.lawful: // W12: nothing tells it from one that is not mine
				if status.Code(err) != codes.PermissionDenied {
					t.Errorf("FetchJWTSVID: %v, want PermissionDenied", err)
				}
			default:
				denied(t, "FetchJWTSVID", err)
			}
		})
	}
	t.Run("fields that only make an ID when put together", func(t *testing.T) {
		for call, do := range calls {
			for _, id := range []*spiretypes.SPIFFEID{
				{TrustDomain: "example.org/a"}, {TrustDomain: "example.org/a", Path: "/b"}, {TrustDomain: "exam", Path: "ple.org/a"},
				{TrustDomain: "example.org/spire/agent/x"}, {TrustDomain: "exam", Path: "ple.org/spire/agent/x"}, {Path: "example.org/a"},
			} {
				denied(t, fmt.Sprintf("%s, %v", call, id), do(id))
			}
		}
	})
	t.Run("S1 absent message", func(t *testing.T) {
		for _, call := range []string{"BatchCreateEntry spiffe_id", "BatchCreateEntry parent_id", "MintJWTSVID id", "GetAgent id"} {
			denied(t, call, calls[call](nil))
		}
	})
	t.Run("CLI", func(t *testing.T) {
		for _, bad := range badIDs() {
			t.Run(bad.row, func(t *testing.T) {
				t.Parallel()
				d.refusesOnCommandLine(t, bad)
			})
		}
	})
	if after := d.countEntries(); after != before {
		t.Errorf("%d entries were %d before", after, before)
	}
}

// refusesOnCommandLine gives a bad ID to each flag and file that takes one.
func (d *deployment) refusesOnCommandLine(t *testing.T, bad badID) {
	admin := []string{"-socketPath", d.adminSocket()}
	const selector, parent = "unix:uid:4242", "spiffe://example.org/parent"
	commands := [][]string{append([]string{"server", "entry", "create", "-parentID", parent, "-selector", selector, "-spiffeID", bad.text}, admin...)}
	if !bad.is("S43", "S44", "S46") || !bad.lawful {
		commands = append(commands, append([]string{"server", "entry", "create", "-spiffeID", "spiffe://example.org/child", "-selector", selector, "-parentID", bad.text}, admin...))
	}
	if !bad.is("S1") { // an empty flag is one that is not given
		commands = append(commands, append([]string{"server", "token", "generate", "-spiffeID", bad.text}, admin...),
			[]string{"agent", "api", "fetch", "jwt", "-audience", "a", "-socketPath", d.workloadSocket(), "-spiffeID", bad.text})
	}
	if !bad.is("S1") && !bad.lawful {
		commands = append(commands, append([]string{"server", "entry", "show", "-spiffeID", bad.text}, admin...),
			append([]string{"server", "entry", "count", "-parentID", bad.text}, admin...))
	}
	for _, args := range commands {
		switch {
		case strings.Contains(bad.text, "\x00"):
			continue // the kernel cannot pass it on
		case bad.is("S41"):
			for i, a := range args {
				if a == bad.text {
					args[i] = a[:100_000] // one argument holds 128 KiB
				}
			}
		}
		refusedCommand(t, nil, args...)
	}
	file, err := json.Marshal(map[string]any{"entries": []any{map[string]any{
		"spiffe_id": bad.text, "parent_id": parent, "selectors": []any{map[string]any{"type": "unix", "value": "uid:4242"}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	refusedCommand(t, file, append([]string{"server", "entry", "create", "-data", "-"}, admin...)...)
}

// refusedCommand runs a command that must end with status 1, with an error for
// a person and without output; it returns the error.
func refusedCommand(t *testing.T, stdin []byte, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, plastron, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &errs
	cmd.Run()
	shown := fmt.Sprintf("plastron %.200q", args)
	if ctx.Err() != nil {
		t.Fatalf("%s went on:\n%s%s", shown, out.String(), errs.String())
	}
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 1 || out.Len() > 0 || errs.Len() == 0 {
		t.Errorf("%s: %v, printed %q and %q; want status 1 and an error", shown, cmd.ProcessState, out.String(), errs.String())
	}
	for _, never := range []string{"rpc error", "goroutine ", "panic"} {
		if strings.Contains(errs.String(), never) {
			t.Errorf("%s shows insides: %s", shown, errs.String())
		}
	}
	return errs.String()
}

// S36: in a path and in a trust domain exactly the allowed bytes pass. Trust
// domains other than the own one are names of federated ones. Bytes from 0x80
// alone are not UTF-8, which the gRPC library refuses before any of our code, as
// Internal.
func TestEveryByte(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.startServer()
	const letters = "abcdefghijklmnopqrstuvwxyz"
	common := letters + "0123456789.-_"
	entry := func(b byte, inPath bool) *spiretypes.Entry {
		e := &spiretypes.Entry{
			SpiffeId: wireID(fmt.Sprintf("spiffe://example.org/td/%d", b)), ParentId: wireID("spiffe://example.org/parent"),
			Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:4242"}},
		}
		if inPath {
			e.SpiffeId.Path = "/path/x" + string([]byte{b}) + "y"
		} else {
			e.FederatesWith = []string{"ex" + string([]byte{b}) + "ample"}
		}
		return e
	}
	for name, inPath := range map[string]bool{"S36 path": true, "S36 trust domain": false} {
		t.Run(name, func(t *testing.T) {
			allowed := common
			if inPath {
				allowed += strings.ToUpper(letters) + "/"
			}
			req := &entryv1.BatchCreateEntryRequest{}
			for b := range 0x80 {
				req.Entries = append(req.Entries, entry(byte(b), inPath))
			}
			resp, err := d.entries().BatchCreateEntry(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for b, r := range resp.Results {
				want := codes.InvalidArgument
				if strings.IndexByte(allowed, byte(b)) >= 0 {
					want = codes.OK
				}
				if codes.Code(r.Status.Code) != want {
					t.Errorf("byte %#x: %v, want %v", b, r.Status, want)
				}
			}
			conn, before := dialUnix(t, d.adminSocket()), d.countEntries()
			for b := 0x80; b < 0x100; b++ {
				message, err := proto.Marshal(&entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{entry('\x01', inPath)}})
				if err != nil {
					t.Fatal(err)
				}
				message = bytes.ReplaceAll(message, []byte("x\x01"), []byte{'x', byte(b)})
				if !bytes.Contains(message, []byte{'x', byte(b)}) {
					t.Fatal("the byte is not in the message")
				}
				_, err = invokeRaw(t.Context(), conn, entryv1.Entry_BatchCreateEntry_FullMethodName, message)
				if code := status.Code(err); code != codes.Internal && code != codes.InvalidArgument {
					t.Errorf("byte %#x: %v", b, err)
				}
			}
			if after := d.countEntries(); after != before {
				t.Errorf("%d entries were %d before", after, before)
			}
		})
	}
}

// rawCodec sends bytes as they are, whatever the message type would allow.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = bytes.Clone(data); return nil }
func (rawCodec) Name() string                       { return "proto" }

func invokeRaw(ctx context.Context, conn *grpc.ClientConn, method string, message []byte) ([]byte, error) {
	var answer []byte
	err := conn.Invoke(ctx, method, &message, &answer, grpc.ForceCodec(rawCodec{}))
	return answer, err
}

// S48, S49: IDs that differ only in case, or of which one begins like another,
// are never taken for each other; what looks special and is not is accepted.
func TestSimilarIDs(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	paths := []string{"/a", "/ab", "/a/b", "/A", "/SPIRE/agent/x", "/spires", "/...", "/.a", "/a.", "/Case", "/case", "/A-z_0.9"}
	for _, path := range paths {
		d.createEntry(agent, path, nil, mine())
	}
	for _, parent := range []string{"/a", "/ab", "/a/b", "/A"} {
		d.createEntry("spiffe://example.org"+parent, "/below"+parent, nil, "unix:uid:4242")
	}
	api := d.entries()
	for _, path := range paths {
		t.Run("S21 S45 S48 S49 "+path, func(t *testing.T) {
			id := "spiffe://example.org" + path
			list, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: wireID(id)}})
			if err != nil || len(list.Entries) != 1 || list.Entries[0].SpiffeId.Path != path {
				t.Errorf("by ID: %v %v", list, err)
			}
			shown := d.run("server", "entry", "show", "-socketPath", d.adminSocket(), "-spiffeID", id)
			if !strings.Contains(shown, "Found 1 entry") || !strings.Contains(shown, id+"\n") {
				t.Errorf("entry show -spiffeID %s printed:\n%s", id, shown)
			}
			children, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByParentId: wireID(id)}})
			want := 0
			if slices.Contains([]string{"/a", "/ab", "/a/b", "/A"}, path) {
				want = 1
			}
			if err != nil || len(children.Entries) != want || want == 1 && children.Entries[0].SpiffeId.Path != "/below"+path {
				t.Errorf("by parent: %v %v, want %d", children, err, want)
			}
			var resp *workload.JWTSVIDResponse
			eventually(t, "a JWT-SVID for "+id, func() bool {
				resp, err = d.workloadAPI().FetchJWTSVID(withHeader(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: id})
				return status.Code(err) != codes.PermissionDenied
			})
			if err != nil || len(resp.Svids) != 1 || resp.Svids[0].SpiffeId != id {
				t.Errorf("FetchJWTSVID: %v %v", resp, err)
			}
		})
	}
}

// S37, S39: an ID of 2,048 bytes in a trust domain of 255 passes registration,
// storage, X.509 and JWT, and both APIs, whole. ID-2.3-a, ID-2.3-c.
func TestLongestID(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.trustDomain = strings.Repeat("td-", 84) + "end"
	d.startServer()
	token, agent := d.token()
	d.startAgent(token)
	own := "spiffe://" + d.trustDomain
	id := own + "/" + strings.Repeat("x/", 500) + strings.Repeat("y", 2048-len(own)-1-1000)
	if len(d.trustDomain) != 255 || len(id) != 2048 {
		t.Fatalf("lengths are %d and %d", len(d.trustDomain), len(id))
	}
	d.run("server", "entry", "create", "-socketPath", d.adminSocket(), "-spiffeID", id, "-parentID", agent, "-selector", mine())
	d.server.stop(syscall.SIGTERM)
	d.startServer()
	if shown := d.run("server", "entry", "show", "-socketPath", d.adminSocket(), "-spiffeID", id); !strings.Contains(shown, id+"\n") {
		t.Errorf("entry show printed:\n%s", shown)
	}
	d.waitServed()
	got := next(t, d.watchX509(t.Context()), "the SVID", func(r received) bool { return len(r.ids) == 1 })
	if leaf := got.leaves[id]; leaf == nil || len(leaf.URIs) != 1 || leaf.URIs[0].String() != id {
		t.Errorf("the SVID is for %v and %v", got.ids, leaf)
	}
	source, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString(d.trustDomain), []byte(d.run("server", "bundle", "show", "-socketPath", d.adminSocket())))
	if err != nil {
		t.Fatal(err)
	}
	if verified, _, err := x509svid.Verify([]*x509.Certificate{got.leaves[id]}, source); err != nil || verified.String() != id {
		t.Errorf("go-spiffe verifies %v: %v", verified, err)
	}
	api, ctx := d.workloadAPI(), withHeader(t.Context())
	jwt, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: id})
	if err != nil {
		t.Fatal(err)
	}
	valid, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: jwt.Svids[0].Svid})
	if err != nil || valid.SpiffeId != id || valid.Claims.Fields["sub"].GetStringValue() != id {
		t.Errorf("ValidateJWTSVID: %v %v", valid, err)
	}
	stream, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if bundles, err := stream.Recv(); err != nil || len(bundles.Bundles[own]) == 0 {
		t.Errorf("bundles: %v %v", bundles, err)
	}
	out := d.path("out")
	if err := os.Mkdir(out, 0o700); err != nil {
		t.Fatal(err)
	}
	if printed := d.run("agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket(), "-write", out); !strings.Contains(printed, id) {
		t.Errorf("fetch x509 printed:\n%s", printed)
	}
}

// S29, S31, S32: a name that looks like something else is a name like any other.
// ID-2.1-f.
func TestPlainTrustDomains(t *testing.T) {
	t.Parallel()
	for row, name := range map[string]string{"S29": "xn--bcher-kva", "S31": "1.2.3.4", "S32": "td_a-b.c"} {
		t.Run(row+" "+name, func(t *testing.T) {
			t.Parallel()
			d := newDeployment(t)
			d.trustDomain = name
			agent := d.start()
			d.createEntry(agent, "/x", nil, mine())
			d.waitServed()
			got := next(t, d.watchX509(t.Context()), "the SVID", func(r received) bool { return len(r.ids) == 1 })
			if want := "spiffe://" + name + "/x"; got.ids[0] != want || got.leaves[got.ids[0]].URIs[0].String() != want {
				t.Errorf("the SVID is for %v and %v, want %s", got.ids, got.leaves[got.ids[0]].URIs, want)
			}
		})
	}
}

// forger signs tokens with the server's own JWT key, which only a test can have:
// so that a bad subject is refused for itself and not for a bad signature.
type forger struct {
	keyID string
	key   *ecdsa.PrivateKey
}

func (d *deployment) forger() *forger {
	d.t.Helper()
	b, err := bundlev1.NewBundleClient(dialUnix(d.t, d.adminSocket())).GetBundle(d.t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		d.t.Fatal(err)
	}
	for _, key := range d.authorityKeys() {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			d.t.Fatal(err)
		}
		for _, authority := range b.JwtAuthorities {
			if bytes.Equal(authority.PublicKey, spki) {
				return &forger{authority.KeyId, key}
			}
		}
	}
	d.t.Fatal("the JWT key is not in the key file")
	return nil
}

// authorityKeys reads the server's key file.
func (d *deployment) authorityKeys() map[string]*ecdsa.PrivateKey {
	d.t.Helper()
	keys, err := keyFile(d.path("server/keys.json"))
	if err != nil {
		d.t.Fatal(err)
	}
	return keys
}

// keyFile reads the file of a disk key manager.
func keyFile(path string) (map[string]*ecdsa.PrivateKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var file struct{ Keys map[string][]byte }
	if err := json.Unmarshal(b, &file); err != nil {
		return nil, err
	}
	all := map[string]*ecdsa.PrivateKey{}
	for id, der := range file.Keys {
		key, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			return nil, err
		}
		all[id] = key.(*ecdsa.PrivateKey)
	}
	return all, nil
}

// validates asks the Workload API to validate a token whose subject is sub.
func (f *forger) validates(api workload.SpiffeWorkloadAPIClient, sub string) error {
	encode := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	now := time.Now().Unix()
	signed := encode(map[string]any{"alg": "ES256", "kid": f.keyID, "typ": "JWT"}) + "." +
		encode(map[string]any{"sub": sub, "aud": []string{"a"}, "iat": now, "exp": now + 60})
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, f.key, digest[:])
	if err != nil {
		return err
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	_, err = api.ValidateJWTSVID(withHeader(context.Background()), &workload.ValidateJWTSVIDRequest{
		Audience: "a", Svid: signed + "." + base64.RawURLEncoding.EncodeToString(signature),
	})
	return err
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
