package serverapi_test

import (
	"slices"
	"testing"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
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
