package serverapi_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

func TestEveryRPCHasARow(t *testing.T) { // R15
	methods, rows := serverapi.New(serverapi.Config{}).Methods(), serverapi.AccessRows()
	slices.Sort(methods)
	slices.Sort(rows)
	for _, m := range methods {
		if _, ok := slices.BinarySearch(rows, m); !ok {
			t.Errorf("%s has no row in the table", m)
		}
	}
	for _, row := range rows {
		if _, ok := slices.BinarySearch(methods, row); !ok {
			t.Errorf("the row %s is of no RPC", row)
		}
	}
}

// whoMay says again, independently of the table, who may call what: by letters
// n(one) l(ocal) a(gent) b(anned) e(xpired) A(dmin) d(ownstream) w(orkload).
const whoMay = `
lA       spire.api.server.agent.v1.Agent CountAgents ListAgents GetAgent DeleteAgent BanAgent CreateJoinToken
nlabeAdw spire.api.server.agent.v1.Agent AttestAgent
a        spire.api.server.agent.v1.Agent RenewAgent PostStatus
lA       spire.api.server.bundle.v1.Bundle CountBundles AppendBundle ListFederatedBundles
lA       spire.api.server.bundle.v1.Bundle BatchCreateFederatedBundle BatchUpdateFederatedBundle BatchSetFederatedBundle BatchDeleteFederatedBundle
nlabeAdw spire.api.server.bundle.v1.Bundle GetBundle
d        spire.api.server.bundle.v1.Bundle PublishJWTAuthority PublishWITAuthority
laA      spire.api.server.bundle.v1.Bundle GetFederatedBundle
lA       spire.api.server.entry.v1.Entry CountEntries ListEntries GetEntry BatchCreateEntry BatchUpdateEntry BatchDeleteEntry
a        spire.api.server.entry.v1.Entry GetAuthorizedEntries SyncAuthorizedEntries
lA       spire.api.server.svid.v1.SVID MintX509SVID MintJWTSVID MintWITSVID
a        spire.api.server.svid.v1.SVID BatchNewX509SVID NewJWTSVID BatchNewWITSVID
d        spire.api.server.svid.v1.SVID NewDownstreamX509CA
a        plastron.sync.v1.Sync Follow
a        plastron.issue.v1.Issue X509 JWT
lA       plastron.join.v1.Join Address
lA       plastron.apply.v1.Apply List Apply
lA       plastron.authority.v1.Authority Status Rotate
lA       plastron.cutoff.v1.Cutoff Revoke Panic Expel
lA       spire.api.server.localauthority.v1.LocalAuthority GetX509AuthorityState PrepareX509Authority ActivateX509Authority TaintX509Authority RevokeX509Authority
lA       spire.api.server.localauthority.v1.LocalAuthority GetJWTAuthorityState PrepareJWTAuthority ActivateJWTAuthority TaintJWTAuthority RevokeJWTAuthority
lA       spire.api.server.localauthority.v1.LocalAuthority GetWITAuthorityState PrepareWITAuthority ActivateWITAuthority TaintWITAuthority RevokeWITAuthority
lA       spire.api.server.localauthority.v1.LocalAuthority TaintX509UpstreamAuthority RevokeX509UpstreamAuthority
lA       plastron.lifetime.v1.Lifetime Explain Outage
lA       plastron.node.v1.Node Attached Unban
lA       plastron.receipt.v1.Receipt Wait
lA       plastron.why.v1.Entries Ask
a        plastron.why.v1.Entries Hint
l        spire.api.server.logger.v1.Logger GetLogger SetLogLevel ResetLogLevel
lA       plastron.status.v1.Server Status List
lA       plastron.rule.v1.Rules Create Show List Delete
l        plastron.store.v1.Store Check Stats Compact
l        grpc.health.v1.Health Check List Watch
`

func TestWhoMayCallWhat(t *testing.T) { // R15, E46, Q5, Q6
	lister := spiffeid.RequireFromString("spiffe://example.org/listed-admin")
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) { c.Admins = []spiffeid.ID{lister} })
	agent, outcast := r.agent(), r.agent()
	if _, err := agentv1.NewAgentClient(r.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(outcast.id.Path())}); err != nil {
		t.Fatal(err)
	}
	hour := time.Now().Add(time.Hour)
	granted := func(path string, admin, downstream bool, end time.Time) *grpc.ClientConn {
		e := entryUnder(agent.id, path)
		e.Admin, e.Downstream = admin, downstream
		r.create(e)
		h := r.identity(spiffeid.RequireFromPath(td, path), end)
		return r.connect(&h)
	}
	late := r.identity(agent.id, time.Now().Add(-time.Second))
	listed, workload := r.identity(lister, hour), r.identity(spiffeid.RequireFromPath(td, "/nothing-special"), hour)
	callers := []struct {
		name   string
		letter string
		conn   *grpc.ClientConn
	}{
		{"without a certificate", "n", r.connect(nil)},
		{"on the admin socket", "l", r.admin},
		{"agent", "a", r.connect(&agent)},
		{"banned agent", "b", r.connect(&outcast)},
		{"expired agent", "e", r.connect(&late)},
		{"admin by entry", "A", granted("/admin", true, false, hour)},
		{"admin by configuration", "A", r.connect(&listed)},
		{"expired admin", "e", granted("/expired-admin", true, false, time.Now().Add(-time.Second))},
		{"downstream", "d", granted("/downstream", false, true, hour)},
		{"workload", "w", r.connect(&workload)},
		{"workload with an entry", "w", granted("/plain", false, false, hour)},
	}
	seen := 0
	for line := range strings.Lines(strings.TrimSpace(whoMay)) {
		fields := strings.Fields(line)
		for _, method := range fields[2:] {
			seen++
			for _, c := range callers {
				t.Run(method+" "+c.name, func(t *testing.T) {
					err := call(t, c.conn, "/"+fields[1]+"/"+method)
					for late := time.Now().Add(deadline); status.Code(err) == codes.ResourceExhausted && time.Now().Before(late); {
						err = call(t, c.conn, "/"+fields[1]+"/"+method) // refusals of strangers stand in line too
					}
					may := strings.Contains(fields[0], c.letter)
					if refused := refusedByTable(err); refused == may {
						t.Errorf("%v; may call: %v", err, may)
					}
				})
			}
		}
	}
	if n := len(serverapi.AccessRows()); n != seen {
		t.Errorf("the test knows %d RPCs, the table %d", seen, n)
	}
}

// call makes a call with an empty message and returns how it ended.
func call(t *testing.T, conn *grpc.ClientConn, method string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(&emptypb.Empty{}); err != nil && !errors.Is(err, io.EOF) { // EOF: why is said below
		return err
	}
	stream.CloseSend()
	return stream.RecvMsg(&emptypb.Empty{})
}

func refusedByTable(err error) bool {
	switch reasonOf(err) {
	case "identity_required", "not_allowed", "svid_expired", nodes.ReasonBanned, nodes.ReasonExpired:
		return status.Code(err) == codes.PermissionDenied
	}
	// A service that is on the admin socket only is not there for others at all.
	return status.Code(err) == codes.Unimplemented && reasonOf(err) == ""
}

func TestStrangersDoNotGetIn(t *testing.T) {
	r := newRig(t)
	other := newRig(t) // another server of a trust domain with the same name, with other keys
	forged := other.identity(spiffeid.RequireFromPath(td, "/admin"), time.Now().Add(time.Hour))
	err := call(t, r.connect(&forged), "/spire.api.server.bundle.v1.Bundle/GetBundle")
	if status.Code(err) != codes.Unavailable { // the handshake fails
		t.Errorf("a certificate of foreign keys: %v, want a failed handshake", err)
	}
}

func TestRefusalsAreOnRecord(t *testing.T) { // R14
	r := newRig(t)
	if err := call(t, r.connect(nil), "/spire.api.server.entry.v1.Entry/ListEntries"); status.Code(err) != codes.PermissionDenied {
		t.Fatal(err)
	}
	if n := countInTrail(t, r, `"kind":"refusal"`, "ListEntries", "identity_required", "127.0.0.1"); n != 1 {
		t.Errorf("%d records, want 1", n)
	}
}
