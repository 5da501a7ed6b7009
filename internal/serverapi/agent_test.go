package serverapi_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	nodev1 "github.com/plastron/plastron/api/plastron/node/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func renew(t *testing.T, conn *grpc.ClientConn) (holder, error) {
	t.Helper()
	key := newKey(t)
	resp, err := agentv1.NewAgentClient(conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, key)}})
	if err != nil {
		return holder{}, err
	}
	return holderOf(resp.Svid, key), nil
}

func ping(t *testing.T, conn *grpc.ClientConn) error {
	t.Helper()
	_, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	return err
}

func TestAttestAndRenew(t *testing.T) { // R33
	r := newRig(t)
	first := r.agent()
	old := r.connect(&first)
	if err := ping(t, old); err != nil {
		t.Fatal(err)
	}
	if _, err := renew(t, old); err != nil { // this answer is lost
		t.Fatal(err)
	}
	second, err := renew(t, old)
	if err != nil {
		t.Fatalf("renewing again after a lost answer: %v", err)
	}
	if err := ping(t, old); err != nil {
		t.Errorf("the old certificate before the new one is used: %v", err)
	}
	fresh := r.connect(&second)
	if err := ping(t, fresh); err != nil {
		t.Fatal(err)
	}
	err = ping(t, old)
	wantCode(t, "the old certificate after that", err, codes.PermissionDenied, nodes.ReasonNotActive)
	if got := spireReason(err); got != spiretypes.PermissionDeniedDetails_AGENT_NOT_ACTIVE {
		t.Errorf("detail = %v, want AGENT_NOT_ACTIVE", got)
	}
	if n := countInTrail(t, r, `"kind":"alarm"`, first.id.String()); n != 1 { // R31
		t.Errorf("%d alarms, want 1", n)
	}
	if _, err := agentv1.NewAgentClient(fresh).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{
		Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, second.key)},
	}); reasonOf(err) != "key_reused" { // C38
		t.Errorf("renewing with the same key: %v, want key_reused", err)
	}
}

func countInTrail(t *testing.T, r *rig, parts ...string) int {
	t.Helper()
	b, err := os.ReadFile(r.trail)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
lines:
	for line := range bytes.Lines(b) {
		for _, part := range parts {
			if !bytes.Contains(line, []byte(part)) {
				continue lines
			}
		}
		n++
	}
	return n
}

func TestTokenWorksOnceUnderConcurrency(t *testing.T) { // K4, R20
	r := newRig(t)
	token := r.token()
	conns := make([]*grpc.ClientConn, 4)
	for i := range conns {
		conns[i] = r.connect(nil)
	}
	var admitted atomic.Int32
	var wg sync.WaitGroup
	for i := range 200 {
		key := newKey(t)
		csr := newCSR(t, key)
		wg.Go(func() {
			_, err := r.attest(conns[i%len(conns)], token, key, csr)
			if err == nil {
				admitted.Add(1)
			} else if reasonOf(err) != "join_token_refused" {
				t.Errorf("attest: %v, want join_token_refused", err)
			}
		})
	}
	wg.Wait()
	if n := admitted.Load(); n != 1 {
		t.Errorf("%d attestations succeeded, want exactly 1", n)
	}
}

func TestTokens(t *testing.T) {
	r := newRig(t)
	conn := r.connect(nil)
	try := func(token string) error {
		key := newKey(t)
		_, err := r.attest(conn, token, key, newCSR(t, key))
		return err
	}
	good := r.token()
	for id, c := range map[string]struct {
		token string
		code  codes.Code
	}{
		"K1 unknown":             {jointoken.Generate().Reveal(), codes.PermissionDenied},
		"K7 case changed":        {strings.ToLower(good), codes.PermissionDenied},
		"K7 white space":         {" " + good, codes.InvalidArgument},
		"K7 prefix":              {good[:20], codes.PermissionDenied},
		"K7 one more":            {good + "A", codes.PermissionDenied},
		"K8 empty":               {"", codes.InvalidArgument},
		"K8 1 MiB + 1":           {strings.Repeat("a", 1<<20+1), codes.InvalidArgument},
		"K9 path":                {"../../x", codes.PermissionDenied},
		"K9 encoded":             {"%2e%2e", codes.PermissionDenied},
		"K10 NUL":                {good + "\x00", codes.InvalidArgument},
		"K10 newline":            {good + "\n", codes.InvalidArgument},
		"K10 invalid UTF-8":      {good + "\xff", codes.InvalidArgument},
		"K11 SQL":                {"'OR'1'='1", codes.PermissionDenied},
		"K11 wildcard":           {"%", codes.PermissionDenied},
		"K11 one character each": {strings.Repeat("_", len(good)), codes.PermissionDenied},
	} {
		t.Run(id, func(t *testing.T) { wantCode(t, "attest", try(c.token), c.code, "") })
	}

	t.Run("K18 bad CSR", func(t *testing.T) {
		key := newKey(t)
		csr := newCSR(t, key)
		csr[len(csr)-1] ^= 1
		_, err := r.attest(conn, good, key, csr)
		wantCode(t, "attest", err, codes.InvalidArgument, "")
	})
	key := newKey(t)
	csr := newCSR(t, key)
	first, err := r.attest(conn, good, key, csr)
	if err != nil {
		t.Fatalf("the token after all that: %v", err)
	}
	t.Run("K5 same key retries", func(t *testing.T) {
		again, err := r.attest(conn, good, key, csr)
		if err != nil || again.id != first.id {
			t.Fatalf("retry = %v, %v, want %v", again.id, err, first.id)
		}
		if err := ping(t, r.connect(&again)); err != nil {
			t.Error(err)
		}
		wantCode(t, "the first answer's certificate", ping(t, r.connect(&first)), codes.PermissionDenied, nodes.ReasonNotActive)
	})
	t.Run("K3 K6 other key", func(t *testing.T) { wantCode(t, "attest", try(good), codes.PermissionDenied, "join_token_refused") })
	t.Run("R22 the ID does not hold the token", func(t *testing.T) {
		if strings.Contains(first.id.String(), good) || len(first.id.Path()) != len("/spire/agent/join_token/")+32 {
			t.Errorf("ID = %v", first.id)
		}
	})

	admin := agentv1.NewAgentClient(r.admin)
	for id, c := range map[string]struct {
		req    *agentv1.CreateJoinTokenRequest
		reason string
	}{
		"K12 guessable":        {&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: "1234"}, "join_token_weak"},
		"K13 TTL 0":            {&agentv1.CreateJoinTokenRequest{}, "ttl_invalid"},
		"K13 TTL -1":           {&agentv1.CreateJoinTokenRequest{Ttl: -1}, "ttl_invalid"},
		"K13 TTL 68 years":     {&agentv1.CreateJoinTokenRequest{Ttl: 1<<31 - 1}, "ttl_invalid"},
		"K15 reserved alias":   {&agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: wireID("/spire/server")}, "spiffe_id_reserved"},
		"K15 foreign alias":    {&agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: &spiretypes.SPIFFEID{TrustDomain: "other.org", Path: "/a"}}, "spiffe_id_foreign"},
		"K15 taken by itself":  {&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: "f3b9c2d8e5a14076b2c9d8e7f6a5b4c3"}, ""},
		"K15 taken, once more": {&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: "f3b9c2d8e5a14076b2c9d8e7f6a5b4c3"}, "join_token_exists"},
	} {
		if strings.HasPrefix(id, "K15 taken") {
			continue // in order, below
		}
		t.Run(id, func(t *testing.T) {
			_, err := admin.CreateJoinToken(t.Context(), c.req)
			wantCode(t, "CreateJoinToken", err, codes.InvalidArgument, c.reason)
		})
	}
	t.Run("K15 taken", func(t *testing.T) {
		chosen := "f3b9c2d8e5a14076b2c9d8e7f6a5b4c3"
		req := &agentv1.CreateJoinTokenRequest{Ttl: 60, Token: chosen}
		if _, err := admin.CreateJoinToken(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		_, err := admin.CreateJoinToken(t.Context(), req)
		wantCode(t, "again", err, codes.AlreadyExists, "join_token_exists")
	})
	t.Run("K14 R22 nothing stored or shown holds it", func(t *testing.T) {
		list, err := admin.ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if len(list.Agents) != 1 || strings.Contains(list.String(), good) {
			t.Errorf("ListAgents() = %v", list)
		}
		if n := countInTrail(t, r, good); n != 0 {
			t.Errorf("the audit trail holds the token %d times", n)
		}
	})
}

func TestTokenAlias(t *testing.T) { // R32
	r := newRig(t)
	admin := agentv1.NewAgentClient(r.admin)
	token, err := admin.CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: wireID("/db-host")})
	if err != nil {
		t.Fatal(err)
	}
	under := entryUnder(spiffeid.RequireFromString("spiffe://example.org/db-host"), "/db")
	r.create(under)
	key := newKey(t)
	agent, err := r.attest(r.connect(nil), token.Value, key, newCSR(t, key))
	if err != nil {
		t.Fatal(err)
	}
	got, err := entryv1.NewEntryClient(r.connect(&agent)).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	paths := map[string]bool{}
	for _, e := range got.Entries {
		paths[e.SpiffeId.Path] = true
	}
	if len(paths) != 2 || !paths["/db-host"] || !paths["/db"] {
		t.Errorf("authorized for %v, want /db-host and /db", paths)
	}
	if _, err := admin.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: wireID(agent.id.Path())}); err != nil {
		t.Fatal(err)
	}
	count, err := entryv1.NewEntryClient(r.admin).CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	if err != nil || count.Count != 1 {
		t.Errorf("CountEntries() = %v, %v, want 1: the alias goes with its agent", count, err)
	}
}

func TestBanAndEvict(t *testing.T) { // R29, Q5
	r := newRig(t)
	agent := r.agent()
	conn := r.connect(&agent)
	admin := agentv1.NewAgentClient(r.admin)
	id := wireID(agent.id.Path())
	if _, err := admin.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	err := ping(t, conn)
	wantCode(t, "a banned agent", err, codes.PermissionDenied, nodes.ReasonBanned)
	if got := spireReason(err); got != spiretypes.PermissionDeniedDetails_AGENT_BANNED {
		t.Errorf("detail = %v, want AGENT_BANNED", got)
	}
	if _, err := renew(t, conn); reasonOf(err) != nodes.ReasonBanned {
		t.Errorf("renewing: %v, want %s", err, nodes.ReasonBanned)
	}
	got, err := admin.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: id})
	if err != nil || !got.Banned {
		t.Errorf("GetAgent() = %v, %v, want banned", got, err)
	}
	if _, err := admin.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "an evicted agent", ping(t, conn), codes.PermissionDenied, nodes.ReasonNotAttested)
	_, err = admin.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: id})
	wantCode(t, "banning it again", err, codes.NotFound, "")
}

func TestUnban(t *testing.T) { // R29, R129
	r := newRig(t)
	key, token := newKey(t), r.token()
	agent, err := r.attest(r.connect(nil), token, key, newCSR(t, key))
	if err != nil {
		t.Fatal(err)
	}
	conn := r.connect(&agent)
	unban := func(id string) error {
		_, err := nodev1.NewNodeClient(r.admin).Unban(t.Context(), &nodev1.UnbanRequest{Id: id})
		return err
	}
	wantCode(t, "one that is not banned", unban(agent.id.String()), codes.FailedPrecondition, "agent_not_banned")
	wantCode(t, "one that is not there", unban("spiffe://example.org/spire/agent/none"), codes.NotFound, "")
	wantCode(t, "no ID", unban(""), codes.InvalidArgument, "")
	if n := countInTrail(t, r, `"kind":"widening"`); n != 0 {
		t.Errorf("%d records of what was refused", n)
	}
	if _, err := agentv1.NewAgentClient(r.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(agent.id.Path())}); err != nil {
		t.Fatal(err)
	}
	if err := unban(agent.id.String()); err != nil {
		t.Fatal(err)
	}
	if n := countInTrail(t, r, `"kind":"widening"`, `"act":"unban"`, agent.id.String(), `"caller":"local`); n != 1 {
		t.Errorf("%d records, want 1", n)
	}
	// It is as if it had never been: neither its certificate nor its token is good.
	wantCode(t, "the old certificate", ping(t, conn), codes.PermissionDenied, nodes.ReasonNotAttested)
	_, err = r.attest(r.connect(nil), token, key, newCSR(t, key))
	wantCode(t, "the old token", err, codes.PermissionDenied, "join_token_refused")
	wantCode(t, "again", unban(agent.id.String()), codes.NotFound, "")
}

func TestExpiredAgentIsToldSo(t *testing.T) { // Q5
	r := newRig(t)
	agent := r.agent()
	late := r.identity(agent.id, time.Now().Add(-time.Second))
	conn := r.connect(&late)
	err := ping(t, conn)
	wantCode(t, "an expired agent", err, codes.PermissionDenied, nodes.ReasonExpired)
	if got := spireReason(err); got != spiretypes.PermissionDeniedDetails_AGENT_EXPIRED {
		t.Errorf("detail = %v, want AGENT_EXPIRED", got)
	}
	if _, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
		t.Errorf("what anybody may have: %v", err)
	}
}

func TestKeysOfOthersAreRefused(t *testing.T) { // C36, C37, R4
	r := newRig(t)
	agent := r.agent()
	_, err := r.attest(r.connect(nil), r.token(), agent.key, newCSR(t, agent.key))
	wantCode(t, "attesting with another agent's key", err, codes.InvalidArgument, "key_taken")

	other := r.agent()
	made := r.create(entryUnder(other.id, "/w"))
	csr := newCSR(t, agent.key)
	results := issueX509(t, r.connect(&other), made[0].Id, csr)
	if got := results[0].GetRefusal().GetReason(); got != "key_taken" {
		t.Errorf("a workload with an agent's key: %q, want key_taken", got)
	}
}

func TestAttestationIsBounded(t *testing.T) {
	r := newRig(t)
	key := newKey(t)
	csr := newCSR(t, key)
	params := func(kind string, payload, csr []byte) *agentv1.AttestAgentRequest {
		return &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
			Data: &spiretypes.AttestationData{Type: kind, Payload: payload}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
		}}}
	}
	for id, req := range map[string]*agentv1.AttestAgentRequest{
		"A1 unknown type":     params("aws_iid", []byte("x"), csr),
		"A1 empty type":       params("", []byte("x"), csr),
		"A1 1 MiB name":       params(strings.Repeat("a", 1<<20), []byte("x"), csr),
		"A2 nothing":          {},
		"A2 no params":        {Step: &agentv1.AttestAgentRequest_Params_{}},
		"A2 no CSR":           params("join_token", []byte("x"), nil),
		"A2 no payload":       params("join_token", nil, csr),
		"A3 1 MiB + 1":        params("join_token", bytes.Repeat([]byte("x"), 1<<20+1), csr),
		"A7 an answer first":  {Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte("x")}},
		"C1 empty CSR":        params("join_token", []byte("x"), []byte{}),
		"C4 a byte more":      params("join_token", []byte("x"), append(bytes.Clone(csr), 0)),
		"C30 64 KiB + 1 long": params("join_token", []byte("x"), make([]byte, 64<<10+1)),
	} {
		t.Run(id, func(t *testing.T) {
			stream, err := agentv1.NewAgentClient(r.connect(nil)).AttestAgent(t.Context()) // a stranger's bytes are counted
			if err != nil {
				t.Fatal(err)
			}
			stream.Send(req)
			_, err = stream.Recv()
			wantCode(t, "AttestAgent", err, codes.InvalidArgument, "")
		})
	}
}

func TestRenewalsAreNotDelayedByAttestations(t *testing.T) { // R34, A6, R101
	r := newRig(t, func(cfg *serverapi.Config, _ *nodes.Config) { cfg.UnlimitedAttest = false })
	agent := r.agent()
	conn := r.connect(&agent)
	crowd := agentv1.NewAgentClient(r.connect(nil))
	// Half-open, until the address has used up its share; many at a time, for one after
	// the other a slow machine may not be faster than the share fills up.
	var mu sync.Mutex
	var refused error
	over := func() bool { mu.Lock(); defer mu.Unlock(); return refused != nil }
	var members sync.WaitGroup
	for range 20 {
		members.Go(func() {
			for end := time.Now().Add(deadline); !over() && time.Now().Before(end); {
				stream, err := crowd.AttestAgent(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{}}); err != nil && !errors.Is(err, io.EOF) {
					t.Error(err)
					return
				}
				if _, err = stream.Recv(); reasonOf(err) == "rate_limited" {
					mu.Lock()
					refused = err
					mu.Unlock()
				}
			}
		})
	}
	members.Wait()
	wantCode(t, "the crowd", refused, codes.ResourceExhausted, "rate_limited")
	if !slices.ContainsFunc(status.Convert(refused).Details(), func(d any) bool {
		retry, ok := d.(*errdetails.RetryInfo)
		return ok && retry.RetryDelay.AsDuration() > 0
	}) {
		t.Errorf("%v does not say when to come again", refused)
	}
	if _, err := renew(t, conn); err != nil {
		t.Errorf("renewing meanwhile: %v", err)
	}
}

func TestPostStatus(t *testing.T) { // Q9
	r := newRig(t)
	agent := r.agent()
	client := agentv1.NewAgentClient(r.connect(&agent))
	for name, version := range map[string]string{"256 bytes": strings.Repeat("a", 256), "newline": "1\n2", "NUL": "1\x00"} {
		_, err := client.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: version})
		wantCode(t, name, err, codes.InvalidArgument, "agent_version_invalid")
	}
	if _, err := client.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "1.2.3"}); err != nil {
		t.Fatal(err)
	}
	before := r.store.writes.Load()
	if _, err := client.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "1.2.3"}); err != nil {
		t.Fatal(err)
	}
	if n := r.store.writes.Load() - before; n != 0 {
		t.Errorf("the same version again wrote %d times", n)
	}
	got, err := agentv1.NewAgentClient(r.admin).GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: wireID(agent.id.Path())})
	if err != nil || got.AgentVersion != "1.2.3" {
		t.Errorf("GetAgent() = %v, %v", got, err)
	}

	// Who reports itself here asks what is granted to it; who follows is told.
	polls := func() (polls bool) {
		t.Helper()
		r.registry.View(func(s *registry.Snapshot) {
			if all := s.Unacknowledged(s.Position(), time.Now()); len(all) != 1 || all[0].ID != agent.id {
				t.Errorf("Unacknowledged() = %+v", all)
			} else {
				polls = all[0].Polls
			}
		})
		return polls
	}
	if !polls() {
		t.Error("an agent that never followed does not count as one that polls")
	}
	follow(t, r.connect(&agent), nil).sync()
	if polls() {
		t.Error("an agent that follows counts as one that polls")
	}
	if _, err := client.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "test"}); err != nil {
		t.Fatal(err)
	}
	if !polls() {
		t.Error("an agent that polls again counts as one that follows")
	}
}

func TestListAgents(t *testing.T) {
	r := newRig(t)
	want := map[string]bool{}
	for range 5 {
		want[r.agent().id.Path()] = true
	}
	admin := agentv1.NewAgentClient(r.admin)
	got := map[string]bool{}
	for token := ""; ; {
		page, err := admin.ListAgents(t.Context(), &agentv1.ListAgentsRequest{PageSize: 2, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range page.Agents {
			if got[a.Id.Path] {
				t.Errorf("%s is listed twice", a.Id.Path)
			}
			got[a.Id.Path] = true
		}
		if token = page.NextPageToken; token == "" {
			break
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("listed %v, want %v", got, want)
	}
	_, err := admin.CountAgents(t.Context(), &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{ByExpiresBefore: "yesterday"}})
	wantCode(t, "E38", err, codes.InvalidArgument, "filter_invalid")
	count, err := admin.CountAgents(t.Context(), &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{
		ByExpiresBefore: time.Now().Add(time.Hour).Format("2006-01-02 15:04:05 -0700 -07"), ByAttestationType: jointoken.Name,
	}})
	if err != nil || count.Count != 5 {
		t.Errorf("CountAgents() = %v, %v, want 5", count, err)
	}
}

func TestAdmissionIsOnRecord(t *testing.T) { // R14
	r := newRig(t)
	agent := r.agent()
	leaf, err := x509.ParseCertificate(agent.cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if n := countInTrail(t, r, `"kind":"admission"`, agent.id.String(), leaf.SerialNumber.String()); n != 1 {
		t.Errorf("%d records of the admission, want 1", n)
	}
	if s, err := audit.Verify(r.trail); err != nil || s.Records == 0 {
		t.Errorf("Verify() = %+v, %v", s, err)
	}
}

func TestPruning(t *testing.T) { // expired tokens with their aliases, and entries
	r := newRig(t)
	admin := agentv1.NewAgentClient(r.admin)
	if _, err := admin.CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 1, AgentId: wireID("/alias")}); err != nil {
		t.Fatal(err)
	}
	lasting := r.token()
	r.create(entryUnder(someAgent, "/long"))
	if _, err := r.registry.Update(t.Context(), "test", func(tx *registry.Tx) error { // nobody may make one that has ended
		return tx.PutEntry(entry.Entry{ID: "short", ParentID: someAgent, SPIFFEID: spiffeid.RequireFromPath(td, "/short"),
			Selectors: []entry.Selector{{Type: "unix", Value: "uid:1000"}}, ExpiresAt: time.Now().Add(-time.Second).UTC().Truncate(time.Second)})
	}); err != nil {
		t.Fatal(err)
	}
	until(t, "what has expired is gone", func() bool {
		if err := r.nodes.Prune(t.Context()); err != nil {
			t.Fatal(err)
		}
		tokens, entries := 0, 0
		r.registry.View(func(s *registry.Snapshot) {
			entries = s.EntryCount()
			for range s.Tokens() {
				tokens++
			}
		})
		return tokens == 1 && entries == 1
	})
	writes := r.store.writes.Load()
	if err := r.nodes.Prune(t.Context()); err != nil || r.store.writes.Load() != writes {
		t.Errorf("pruning nothing: %v, %d writes", err, r.store.writes.Load()-writes)
	}
	key := newKey(t)
	if _, err := r.attest(r.connect(nil), lasting, key, newCSR(t, key)); err != nil {
		t.Errorf("a token that has not expired: %v", err)
	}
}
