package main

import (
	"context"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// expiredAgents is a server of which two agents can be purged and one of them is
// gone by then: no attestor that is built in yet makes such agents in a test's time.
type expiredAgents struct {
	agentv1.UnimplementedAgentServer
	filter  *agentv1.ListAgentsRequest_Filter
	deleted []string
}

func agentAt(path string) *spiretypes.Agent {
	return &spiretypes.Agent{Id: &spiretypes.SPIFFEID{TrustDomain: "a.test", Path: path}}
}

func (s *expiredAgents) ListAgents(_ context.Context, r *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	s.filter = r.GetFilter()
	if r.GetPageToken() == "" {
		return &agentv1.ListAgentsResponse{Agents: []*spiretypes.Agent{agentAt("/spire/agent/one")}, NextPageToken: "next"}, nil
	}
	return &agentv1.ListAgentsResponse{Agents: []*spiretypes.Agent{agentAt("/spire/agent/two")}}, nil
}

func (s *expiredAgents) DeleteAgent(_ context.Context, r *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	if r.GetId().GetPath() == "/spire/agent/two" {
		return nil, status.Error(codes.NotFound, "there is no such agent")
	}
	s.deleted = append(s.deleted, r.GetId().GetPath())
	return &emptypb.Empty{}, nil
}

// TestPurge: only agents that can come back by themselves go, never banned ones,
// and one that cannot be evicted does not keep the others.
func TestPurge(t *testing.T) {
	fake := &expiredAgents{}
	path := serve(t, func(s *grpc.Server) { agentv1.RegisterAgentServer(s, fake) })
	before := time.Now().Add(-time.Hour - 2*time.Second)
	code, stdout, stderr := call(t, "server", "agent", "purge", "-socketPath", path, "-expiredFor", "1h", "-dryRun")
	want := "Found 2 expired agents\n\nAgents that can be purged:\nSPIFFE ID         : spiffe://a.test/spire/agent/one\nSPIFFE ID         : spiffe://a.test/spire/agent/two\n"
	if code != exitOK || stdout != want || stderr != "" || len(fake.deleted) != 0 {
		t.Errorf("dry run: exit %d, deleted %v, %s%s", code, fake.deleted, stdout, stderr)
	}
	f := fake.filter
	if end, err := time.Parse(expiresBefore, f.GetByExpiresBefore()); err != nil || end.Before(before) || end.After(time.Now().Add(-time.Hour)) {
		t.Errorf("the filter asks for agents that expired before %q: %v", f.GetByExpiresBefore(), err)
	}
	if f.GetByBanned() == nil || f.GetByBanned().GetValue() || !f.GetByCanReattest().GetValue() {
		t.Errorf("the filter is %v", f)
	}

	code, stdout, stderr = call(t, "server", "agent", "purge", "-socketPath", path)
	want = "Found 2 expired agents\n\nAgents purged:\nSPIFFE ID         : spiffe://a.test/spire/agent/one\n\n" +
		"Agents not purged:\nSPIFFE ID         : spiffe://a.test/spire/agent/two\nError             : there is no such agent\n"
	if code != exitFailed || stdout != want || stderr != "Error: 1 of 2 agents were not evicted\n" {
		t.Errorf("exit %d, %s%s", code, stdout, stderr)
	}
	if strings.Join(fake.deleted, " ") != "/spire/agent/one" {
		t.Errorf("deleted %v", fake.deleted)
	}
	_, stdout, _ = call(t, "server", "agent", "purge", "-socketPath", path, "-output", "json")
	if want := `{"expired_agents":[{"agent_id":"spiffe://a.test/spire/agent/one","deleted":true},` +
		`{"agent_id":"spiffe://a.test/spire/agent/two","deleted":false,"error":"there is no such agent"}]}` + "\n"; stdout != want {
		t.Errorf("got  %swant %s", stdout, want)
	}
}
