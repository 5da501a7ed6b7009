package serverapi_test

import (
	"crypto/x509"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// revoke makes the call and expects it to succeed.
func (r *rig) revoke(what string, dry bool, opts ...grpc.CallOption) *cutoffv1.RevokeResponse {
	r.t.Helper()
	resp, err := cutoffv1.NewCutoffClient(r.admin).Revoke(r.t.Context(), &cutoffv1.RevokeRequest{What: what, DryRun: dry}, opts...)
	if err != nil {
		r.t.Fatalf("revoke %s: %v", what, err)
	}
	return resp
}

// fetch gets an X.509-SVID and a JWT-SVID for a grant.
func (r *rig) fetch(conn *grpc.ClientConn, grant string, facts map[string]string) (x509, jwt int64) {
	r.t.Helper()
	client := issuev1.NewIssueClient(conn)
	cert, err := client.X509(r.t.Context(), &issuev1.X509Request{Items: []*issuev1.X509Item{{GrantId: grant, Facts: facts, Csr: newCSR(r.t, newKey(r.t))}}})
	if err != nil || cert.Results[0].Refusal != nil {
		r.t.Fatalf("X509: %v, %v", cert, err)
	}
	token, err := client.JWT(r.t.Context(), &issuev1.JWTRequest{GrantId: grant, Facts: facts, Audience: []string{"a"}})
	if err != nil {
		r.t.Fatal(err)
	}
	return cert.Results[0].ExpiresAt, token.ExpiresAt
}

func grantIDs(grants []*cutoffv1.Grant) (ids []string) {
	for _, g := range grants {
		ids = append(ids, g.Id)
	}
	slices.Sort(ids)
	return ids
}

func (r *rig) has(entryID string) (there bool) {
	r.registry.View(func(s *registry.Snapshot) {
		_, err := s.Entry(entryID)
		_, ruleErr := s.Rule(entryID)
		there = err == nil || ruleErr == nil
	})
	return there
}

// What is revoked is gone, and what of it lives on is said to the second: by the
// records of the server that answers, and for the others by what they can have given.
func TestRevokeEntry(t *testing.T) {
	r := newRig(t)
	newRigOver(t, r.sqlite, "s2")
	one, two := r.agent(), r.agent()
	conn := r.connect(&one)
	short := entryUnder(one.id, "/user/web")
	short.X509SvidTtl, short.JwtSvidTtl = 600, 60
	made := r.create(short, entryUnder(two.id, "/user/web"), entryUnder(one.id, "/other"))
	web, twin, other := made[0].Id, made[1].Id, made[2].Id
	maker := r.rule(ruleUnder(two.id, "spiffe://example.org/user/{unix.user}")).Rule.Id
	r.rule(ruleUnder(two.id, "spiffe://example.org/team/{unix.user}"))
	x509End, jwtEnd := r.fetch(conn, web, nil)
	r.fetch(conn, other, nil)

	check := func(what string, got *cutoffv1.RevokeResponse) {
		t.Helper()
		if want := []string{web}; !slices.Equal(grantIDs(got.Grants), want) || got.Agent != "" {
			t.Errorf("%s: it is %v", what, got)
		}
		if want := slices.Sorted(slices.Values([]string{twin, maker})); !slices.Equal(grantIDs(got.Remaining), want) {
			t.Errorf("%s: what can give it still is %v, want %v", what, grantIDs(got.Remaining), want)
		}
		a := got.Alive
		if a.Recorded != 2 || a.X509Until != x509End || a.JwtUntil != jwtEnd || len(a.Credentials) != 2 {
			t.Fatalf("%s: alive %v, want what ends at %d and %d", what, a, x509End, jwtEnd)
		}
		c := a.Credentials[0]
		if c.Kind != "x509" || c.SpiffeId != "spiffe://example.org/user/web" || c.Grant != web || c.Agent != one.id.String() || c.Issuer == "" ||
			countInTrail(t, r, `"kind":"issuance"`, `"serial":"`+c.Serial+`"`) != 1 {
			t.Errorf("%s: the last is %v", what, c)
		}
		if len(a.Elsewhere) != 1 || a.Elsewhere[0].Server != "s2" || a.Elsewhere[0].Why != "" {
			t.Fatalf("%s: elsewhere %v", what, a.Elsewhere)
		}
		// The other server can have given 10 minutes a moment ago; its keys live for an hour.
		e, now := a.Elsewhere[0], time.Now().Unix()
		if e.Until < x509End || e.Until > now+600 || e.NeverAfter < now+3000 || e.NeverAfter > now+3600 || a.Until != e.Until {
			t.Errorf("%s: it is %d, elsewhere until %v, all until %d", what, now, e, a.Until)
		}
	}
	check("dry", r.revoke(web, true))
	if !r.has(web) || countInTrail(t, r, `"kind":"cutoff"`) != 0 {
		t.Error("a dry run did something")
	}
	var resp *cutoffv1.RevokeResponse
	receipts := receiptsOf(t, func(opts ...grpc.CallOption) error {
		resp = r.revoke(web, false, opts...)
		return nil
	})
	check("revoked", resp)
	if r.has(web) || !r.has(twin) || !r.has(other) || len(receipts) != 1 {
		t.Errorf("entries left: %v %v %v, receipts %v", r.has(web), r.has(twin), r.has(other), receipts)
	}
	if gone := issueX509(t, conn, web, newCSR(t, newKey(t)))[0].Refusal; gone.GetReason() != "grant_unknown" {
		t.Errorf("signed after that: %v", gone)
	}
	if n := countInTrail(t, r, `"kind":"cutoff"`, `"act":"revoke"`, `"caller":"local`, web); n != 1 {
		t.Errorf("%d records, want 1", n)
	}
	client := cutoffv1.NewCutoffClient(r.admin)
	for what, c := range map[string]struct {
		code   codes.Code
		reason string
	}{
		web:                                     {codes.NotFound, "grant_not_found"},
		"spiffe://example.org/nothing":          {codes.NotFound, "grant_not_found"},
		"":                                      {codes.InvalidArgument, "entry_id_invalid"},
		"a b":                                   {codes.InvalidArgument, "entry_id_invalid"},
		"spiffe://other.org/web":                {codes.InvalidArgument, ""},
		"spiffe://example.org/spire/agent/none": {codes.NotFound, "node_not_found"},
	} {
		_, err := client.Revoke(t.Context(), &cutoffv1.RevokeRequest{What: what})
		wantCode(t, "revoke "+what, err, c.code, c.reason)
	}
}

// All entries of exactly one ID go, and the rules that could make it again are named.
func TestRevokeID(t *testing.T) {
	r := newRig(t)
	one, two := r.agent(), r.agent()
	declared := entryUnder(two.id, "/user/web")
	made := r.create(entryUnder(one.id, "/user/web"), declared, entryUnder(one.id, "/user/web/sub"))
	maker := r.rule(ruleUnder(one.id, "spiffe://example.org/user/{unix.user}")).Rule.Id
	_, ruled := r.fetch(r.connect(&one), maker, map[string]string{"unix.user": "web"})
	x509End, _ := r.fetch(r.connect(&two), made[1].Id, nil)
	got := r.revoke("spiffe://example.org/user/web", false)
	if want := slices.Sorted(slices.Values([]string{made[0].Id, made[1].Id})); !slices.Equal(grantIDs(got.Grants), want) {
		t.Errorf("revoked %v, want %v", grantIDs(got.Grants), want)
	}
	if len(got.Remaining) != 1 || got.Remaining[0].Id != maker || !got.Remaining[0].Rule || got.Remaining[0].Prefix != "spiffe://example.org/user/" || got.Remaining[0].Gives == "" {
		t.Errorf("what can give it still: %v", got.Remaining)
	}
	// What the rule gave counts too: it is the ID that is asked for.
	if got.Alive.Recorded != 4 || got.Alive.X509Until < x509End || got.Alive.JwtUntil < ruled || len(got.Alive.Elsewhere) != 0 {
		t.Errorf("alive: %v", got.Alive)
	}
	if !r.has(made[2].Id) || r.has(made[0].Id) {
		t.Error("not exactly the ID's entries are gone")
	}
	_, err := cutoffv1.NewCutoffClient(r.admin).Revoke(t.Context(), &cutoffv1.RevokeRequest{What: "spiffe://example.org/user/web"})
	wantCode(t, "without an entry", err, codes.NotFound, "grant_not_found")
	if !strings.Contains(err.Error(), maker) {
		t.Errorf("%v does not name the rule", err)
	}
	if got := r.revoke(maker, false); len(got.Grants) != 1 || !got.Grants[0].Rule || got.Alive.Recorded != 2 || r.has(maker) {
		t.Errorf("the rule: %v", got)
	}
}

// Of an agent that is granted nothing any more it is still said until when what another
// server gave it can live.
func TestRevokeAgentOfDeletedEntries(t *testing.T) {
	r := newRig(t)
	newRigOver(t, r.sqlite, "s2")
	agent := r.agent()
	r.revoke(r.create(entryUnder(agent.id, "/user/web"))[0].Id, false)
	got, hour := r.revoke(agent.id.String(), false), time.Now().Add(time.Hour).Unix()
	if e := got.Alive.Elsewhere; len(e) != 1 || e[0].Server != "s2" || e[0].Until < hour-600 || e[0].NeverAfter > hour {
		t.Errorf("elsewhere: %v, want s2 until about %d", e, hour)
	}
}

// A thousand entries are as many as one transaction takes; more are no failure.
func TestRevokeManyEntries(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	var entries []*spiretypes.Entry
	for i := range 1001 {
		e := entryUnder(agent.id, "/web")
		e.Selectors[0].Value = "uid:" + time.Unix(int64(i), 0).Format("150405")
		entries = append(entries, e)
	}
	for part := range slices.Chunk(entries, 500) {
		r.create(part...)
	}
	if got := r.revoke("spiffe://example.org/web", false); len(got.Grants) != 1001 {
		t.Errorf("%d are revoked", len(got.Grants))
	}
	count, err := entryv1.NewEntryClient(r.admin).CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	if err != nil || count.Count != 0 {
		t.Errorf("%v are left, %v", count, err)
	}
}

// A banned agent gets nothing more, and all that went through it is named.
func TestRevokeAgent(t *testing.T) { // R29, R30
	r := newRig(t)
	key, token := newKey(t), r.token()
	agent, err := r.attest(r.connect(nil), token, key, newCSR(t, key))
	if err != nil {
		t.Fatal(err)
	}
	bystander := r.agent()
	conn := r.connect(&agent)
	web := r.create(entryUnder(agent.id, "/web"), entryUnder(bystander.id, "/web"))
	x509End, _ := r.fetch(conn, web[0].Id, nil)
	r.fetch(r.connect(&bystander), web[1].Id, nil)
	if got := r.revoke(agent.id.String(), true); got.Agent != agent.id.String() || got.BannedBefore || got.Alive.Recorded != 3 {
		t.Errorf("dry: %v", got)
	}
	if err := ping(t, conn); err != nil {
		t.Errorf("after a dry run: %v", err)
	}
	got := r.revoke(agent.id.String(), false)
	if got.Agent != agent.id.String() || got.BannedBefore || len(got.Grants) != 0 || got.Alive.Recorded != 3 || got.Alive.X509Until != x509End {
		t.Errorf("revoked: %v", got)
	}
	kinds := map[string]string{}
	for _, c := range got.Alive.Credentials {
		kinds[c.Kind] = c.Serial
	}
	if len(kinds) != 3 || kinds["agent"] != serialOf(t, agent) {
		t.Errorf("alive: %v", got.Alive)
	}
	wantCode(t, "the agent", ping(t, conn), codes.PermissionDenied, nodes.ReasonBanned)
	_, err = r.attest(r.connect(nil), token, key, newCSR(t, key))
	if err == nil {
		t.Error("it attested again with its old token")
	}
	if got := r.revoke(agent.id.String(), false); !got.BannedBefore || got.Alive.Recorded != 3 {
		t.Errorf("again: %v", got)
	}
	if err := ping(t, r.connect(&bystander)); err != nil {
		t.Errorf("another agent: %v", err)
	}
}

// Records that are missing are said to be, and what this server can have given counts
// like what others can.
func TestRevokeWithoutRecords(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	made := r.create(entryUnder(agent.id, "/web"))[0]
	r.fetch(r.connect(&agent), made.Id, nil)
	now := time.Now().UTC().Truncate(time.Second)
	_, err := r.registry.Update(t.Context(), "test", func(tx *registry.Tx) error { // a key older than the trail
		a, err := tx.Authority("s1", "x509")
		if err != nil {
			return err
		}
		a.Slots = append(a.Slots, registry.Slot{Name: "B", State: registry.SlotOld, AuthorityID: "older", KeyID: "x509-CA-B",
			NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(time.Hour), LastExpiry: now.Add(time.Hour)})
		return tx.PutAuthority(a)
	})
	if err != nil {
		t.Fatal(err)
	}
	got := r.revoke(made.Id, true)
	if len(got.Alive.Elsewhere) != 1 {
		t.Fatalf("alive: %v", got.Alive)
	}
	if got.Alive.Recorded != 2 {
		t.Errorf("%d on record", got.Alive.Recorded)
	}
	e, hour := got.Alive.Elsewhere[0], time.Now().Add(time.Hour).Unix()
	if e.Server != "s1" || !strings.Contains(e.Why, "audit trail") || e.Until < hour-60 || e.Until > hour || got.Alive.Until != e.Until {
		t.Errorf("elsewhere: %v", e)
	}
}

// A server that is not heard from may go on, with what it signed before, until its
// lease ends; and never beyond its keys. R77
func TestRevokeWithASilentServer(t *testing.T) {
	var ahead atomic.Int64
	r := newRig(t, clusteredLater(t, &ahead))
	agent := r.agent()
	e := entryUnder(agent.id, "/web")
	e.X509SvidTtl, e.JwtSvidTtl = 600, 600
	entries := r.create(e, entryUnder(agent.id, "/web2"))
	now := time.Now().UTC().Truncate(time.Second)
	_, err := r.registry.Update(t.Context(), "test", func(tx *registry.Tx) error {
		for name, end := range map[string]time.Time{"away": now.Add(24 * time.Hour), "late": now.Add(30 * time.Minute)} {
			slot := registry.Slot{Name: "A", State: registry.SlotActive, AuthorityID: "key of " + name, NotBefore: now, NotAfter: end, LastExpiry: end}
			if err := tx.PutAuthority(registry.Authority{Server: name, Kind: "x509", Slots: []registry.Slot{slot}}); err != nil {
				return err
			}
			if err := tx.PutServer(registry.Server{ID: name, Instance: []byte("i"), Beat: 1, BeatAt: now, Lease: 2 * time.Hour}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	until(t, "both are heard", func() bool { return len(r.servers.Others()) == 2 })
	expect := func(what, entry string, away, late time.Duration) {
		t.Helper()
		got := map[string]*cutoffv1.Elsewhere{}
		for _, e := range r.revoke(entry, true).Alive.Elsewhere {
			got[e.Server] = e
		}
		for name, want := range map[string]time.Duration{"away": away, "late": late} {
			if off := time.Until(time.Unix(got[name].GetUntil(), 0)) - want; off.Abs() > time.Minute {
				t.Errorf("%s: what %s signed may live %v, want about %v", what, name, want+off, want)
			}
		}
	}
	expect("heard", entries[0].Id, 10*time.Minute, 10*time.Minute)
	expect("heard, by default", entries[1].Id, time.Hour, 30*time.Minute)
	ahead.Store(int64(30 * time.Minute))
	expect("silent", entries[0].Id, 90*time.Minute+10*time.Minute, 30*time.Minute)
}

// A downstream server's entry is one as others are, but what lives on under it can
// sign anything.
func TestRevokeDownstream(t *testing.T) { // R13
	b := newBelow(t, nil)
	chain := b.chain(newKey(t), 0)
	got := b.revoke(b.id.String(), false)
	if len(got.Grants) != 1 || !got.Grants[0].Downstream || len(got.Alive.Credentials) != 1 {
		t.Fatalf("revoked: %v", got)
	}
	if c := got.Alive.Credentials[0]; c.Kind != "x509-ca" || c.SpiffeId != b.id.String() || c.ExpiresAt != chain.NotAfter.Unix() || got.Alive.Until != c.ExpiresAt {
		t.Errorf("alive: %v", got.Alive)
	}
	_, err := b.ask(newKey(t), 0)
	wantCode(t, "another authority", err, codes.PermissionDenied, "not_allowed")
}

func serialOf(t *testing.T, h holder) string {
	t.Helper()
	leaf, err := x509.ParseCertificate(h.cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf.SerialNumber.String()
}
