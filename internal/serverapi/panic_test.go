package serverapi_test

import (
	"slices"
	"testing"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

func (r *rig) panic(what string, dry bool) *cutoffv1.PanicResponse {
	r.t.Helper()
	resp, err := cutoffv1.NewCutoffClient(r.admin).Panic(r.t.Context(), &cutoffv1.PanicRequest{What: what, DryRun: dry})
	if err != nil {
		r.t.Fatalf("panic %s: %v", what, err)
	}
	return resp
}

// An agent in wrong hands is banned at once, and what it could reach is named, the
// worst first: by its own entries, through an alias, through entries under entries, by
// rules. R29, R30, R130
func TestPanicAgent(t *testing.T) {
	r := newRig(t)
	agent, bystander := r.agent(), r.agent()
	conn := r.connect(&agent)
	alias := entryUnder(agent.id, "/cluster") // as CreateJoinToken makes it
	admin, downstream := entryUnder(agent.id, "/ops"), entryUnder(agent.id, "/nested")
	admin.Admin, downstream.Downstream = true, true
	made := r.create(alias, entryUnder(spiffeid.RequireFromPath(td, "/cluster"), "/zebra"), entryUnder(spiffeid.RequireFromPath(td, "/zebra"), "/deep"), admin, downstream, entryUnder(bystander.id, "/theirs"))
	rule := r.rule(ruleUnder(spiffeid.RequireFromPath(td, "/zebra"), "spiffe://example.org/user/{unix.user}")).Rule.Id
	nested := r.identity(spiffeid.RequireFromPath(td, "/nested"), time.Now().Add(time.Hour))
	b := &below{rig: r, id: nested.id, entry: made[4], conn: r.connect(&nested)}
	authority := b.chain(newKey(t), 0)
	x509End, _ := r.fetch(conn, made[2].Id, nil)

	want := []string{made[4].Id, made[3].Id, rule, made[0].Id, made[2].Id, made[1].Id}
	check := func(what string, got *cutoffv1.PanicResponse, before bool) {
		t.Helper()
		var reach []string
		for _, g := range got.Reach {
			reach = append(reach, g.Id)
		}
		if got.Agent != agent.id.String() || got.BannedBefore != before || !slices.Equal(reach, want) || int(got.Reached) != len(want) {
			t.Errorf("%s: %v, want the reach %v", what, got, want)
		}
		kinds := map[string]int64{}
		for _, c := range got.Alive.Credentials {
			kinds[c.Kind] = c.ExpiresAt
		}
		if got.Alive.Recorded != 4 || kinds["x509-ca"] != authority.NotAfter.Unix() || kinds["x509"] != x509End || got.Alive.Until != x509End {
			t.Errorf("%s: alive %v", what, got.Alive)
		}
	}
	check("dry", r.panic(agent.id.String(), true), false)
	if err := ping(t, conn); err != nil {
		t.Errorf("after a dry run: %v", err)
	}
	check("panic", r.panic(agent.id.String(), false), false)
	wantCode(t, "the agent", ping(t, conn), codes.PermissionDenied, nodes.ReasonBanned)
	if n := countInTrail(t, r, `"kind":"cutoff"`, `"act":"panic"`, agent.id.String()); n != 1 {
		t.Errorf("%d records, want 1", n)
	}
	check("again", r.panic(agent.id.String(), false), true)
	if err := ping(t, r.connect(&bystander)); err != nil {
		t.Errorf("another agent: %v", err)
	}
}

// Of a downstream server the entries go, all that give its ID, and until when it signs
// on is said; and its JWT keys are among those that nobody here has.
func TestPanicDownstream(t *testing.T) { // R13, R130
	b := newBelow(t, nil)
	twin := entryUnder(b.agent().id, "/nested")
	b.create(twin, entryUnder(b.agent().id, "/web"))
	chain := b.chain(newKey(t), 0)
	key := jwtKey(t, "nested-key", time.Now().Add(time.Hour))
	if _, err := bundlev1.NewBundleClient(b.conn).PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: key}); err != nil {
		t.Fatal(err)
	}
	got := b.panic(b.id.String(), false)
	if len(got.Grants) != 2 || got.Agent != "" || b.has(b.entry.Id) {
		t.Errorf("it is %v", got)
	}
	if len(got.Alive.Credentials) != 1 || got.Alive.Credentials[0].Kind != "x509-ca" || got.Alive.Until != chain.NotAfter.Unix() {
		t.Errorf("alive: %v", got.Alive)
	}
	if len(got.Published) != 1 || got.Published[0].KeyId != key.KeyId || got.Published[0].ExpiresAt != key.ExpiresAt {
		t.Errorf("published: %v", got.Published)
	}
	_, err := b.ask(newKey(t), 0)
	wantCode(t, "another authority", err, codes.PermissionDenied, "not_allowed")
	// The key stays until it ends (docs/operations.md), and no more can come.
	held, err := bundlev1.NewBundleClient(b.admin).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil || len(held.JwtAuthorities) != 2 {
		t.Errorf("the bundle has %v, %v", held.GetJwtAuthorities(), err)
	}
	_, err = bundlev1.NewBundleClient(b.conn).PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: jwtKey(t, "second-key", time.Now().Add(time.Hour))})
	wantCode(t, "another JWT key", err, codes.PermissionDenied, "not_allowed")
	client := cutoffv1.NewCutoffClient(b.admin)
	for what, reason := range map[string]string{
		"spiffe://example.org/web": "not_downstream", "spiffe://example.org/none": "grant_not_found",
		"spiffe://example.org/spire/agent/none": "node_not_found", "web": "",
	} {
		if _, err := client.Panic(t.Context(), &cutoffv1.PanicRequest{What: what}); err == nil || reason != "" && reasonOf(err) != reason {
			t.Errorf("panic %s: %v", what, err)
		}
	}
}

// A server in wrong hands is put out by another: its keys are tainted and revoked in
// their time, or at once, whom it serves is said, and it does not count any more. R69, R130
func TestExpelServer(t *testing.T) {
	a := newRig(t, clustered(t))
	b := newRigOver(t, a.sqlite, "s2", clustered(t))
	there := a.agent()
	g := follow(t, b.connect(&there), nil)
	g.sync()
	g.ack()
	client := cutoffv1.NewCutoffClient(a.admin)
	expel := func(req *cutoffv1.ExpelRequest, opts ...grpc.CallOption) *cutoffv1.ExpelResponse {
		t.Helper()
		resp, err := client.Expel(t.Context(), req, opts...)
		if err != nil {
			t.Fatalf("expel %v: %v", req, err)
		}
		return resp
	}
	until(t, "the agent is known to be there", func() bool {
		return expel(&cutoffv1.ExpelRequest{Server: "s2", DryRun: true}).Attached == 1
	})
	dry := expel(&cutoffv1.ExpelRequest{Server: "s2", DryRun: true})
	now, hour := time.Now().Unix(), time.Now().Add(time.Hour).Unix()
	if dry.Server != "s2" || dry.State != "live" || dry.ExpelledBefore || len(dry.Authorities) != 2 || dry.Until < hour-60 || dry.Until > hour ||
		dry.RevokeAt < now+50 || dry.RevokeAt > now+60 || !slices.Equal(dry.Agents, []string{there.id.String()}) {
		t.Errorf("dry: %v", dry)
	}
	tainted := func() (n int) {
		for _, k := range a.bundle().X509 {
			if k.Tainted {
				n++
			}
		}
		for _, k := range a.bundle().JWT {
			if k.Tainted {
				n++
			}
		}
		return n
	}
	if n := tainted(); n != 0 || len(a.bundle().X509) != 2 {
		t.Errorf("a dry run did something")
	}
	for name, c := range map[string]struct {
		code   codes.Code
		reason string
	}{"": {codes.NotFound, "server_not_found"}, "s": {codes.NotFound, "server_not_found"}, "s1": {codes.FailedPrecondition, "server_is_self"}} {
		_, err := client.Expel(t.Context(), &cutoffv1.ExpelRequest{Server: name})
		wantCode(t, "expel "+name, err, c.code, c.reason)
	}
	var got *cutoffv1.ExpelResponse
	receipts := receiptsOf(t, func(opts ...grpc.CallOption) error {
		got = expel(&cutoffv1.ExpelRequest{Server: dry.Authorities[0].AuthorityId}, opts...) // by what it signed with
		return nil
	})
	if got.Server != "s2" || got.RevokeAt < now+50 || len(got.Authorities) != 2 || len(receipts) != 1 || tainted() != 2 {
		t.Errorf("expelled: %v, receipts %v, %d tainted", got, receipts, tainted())
	}
	until(t, "it knows", func() bool { return b.servers.MaySign(time.Now()) != nil })
	until(t, "there is no server besides this one", func() bool { return len(a.servers.Others()) == 0 })
	if n := countInTrail(t, a, `"kind":"cutoff"`, `"act":"expel"`, `"subject":"s2"`); n != 1 {
		t.Errorf("%d records, want 1", n)
	}
	again := expel(&cutoffv1.ExpelRequest{Server: "s2", Now: true})
	if !again.ExpelledBefore || again.State != "gone" || again.RevokeAt > time.Now().Unix() {
		t.Errorf("at once: %v", again)
	}
	if own := a.bundle(); len(own.X509) != 1 || len(own.JWT) != 1 || len(own.Revoked) != 2 || tainted() != 0 {
		t.Errorf("the bundle: %+v", own)
	}
	if last := expel(&cutoffv1.ExpelRequest{Server: "s2"}); !last.ExpelledBefore || len(last.Authorities) != 0 || last.Until != 0 {
		t.Errorf("when all is over: %v", last)
	}
	alone := newRig(t)
	_, err := cutoffv1.NewCutoffClient(alone.admin).Expel(t.Context(), &cutoffv1.ExpelRequest{Server: "s2"})
	wantCode(t, "without others", err, codes.Unimplemented, "servers_unknown")
}
