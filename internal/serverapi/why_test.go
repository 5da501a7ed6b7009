package serverapi_test

import (
	"fmt"
	"strings"
	"testing"

	whyv1 "github.com/plastron/plastron/api/plastron/why/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/registry"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// agentOn is an agent whose node shows more than its attestor says.
func (r *rig) agentOn(selectors ...string) holder {
	r.t.Helper()
	h := r.agent()
	_, err := r.registry.Update(r.t.Context(), "test", func(tx *registry.Tx) error {
		n, err := tx.Node(h.id)
		if err != nil {
			return err
		}
		for _, text := range selectors {
			s, err := entry.ParseSelector(text)
			if err != nil {
				return err
			}
			n.Selectors = append(n.Selectors, s)
		}
		if n.Selectors, err = entry.NormalizeSelectors(n.Selectors); err != nil {
			return err
		}
		return tx.PutNode(n)
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return h
}

// seeded makes an entry with an id that a test can name.
func (r *rig) seeded(id, parent, path string, change func(*spiretypes.Entry), selectors ...string) {
	r.t.Helper()
	e := &spiretypes.Entry{Id: id, ParentId: wireID(parent), SpiffeId: wireID(path)}
	for _, text := range selectors {
		typ, value, _ := strings.Cut(text, ":")
		e.Selectors = append(e.Selectors, &spiretypes.Selector{Type: typ, Value: value})
	}
	if change != nil {
		change(e)
	}
	r.create(e)
}

func whySelectors(texts ...string) (out []*whyv1.Selector) {
	for _, text := range texts {
		typ, value, _ := strings.Cut(text, ":")
		out = append(out, &whyv1.Selector{Type: typ, Value: value})
	}
	return out
}

// The server's half of why, and what an agent may hear of it.
func TestWhy(t *testing.T) {
	const server = "/spire/server"
	process := []string{"unix:uid:1", "unix:gid:1"}
	for name, row := range map[string]struct {
		seed func(r *rig, agent, other holder)
		want *reasonWanted // of the whole; nil: something reaches
		hint string        // what the agent hears
	}{
		"nothing":  {func(*rig, holder, holder) {}, &reasonWanted{code: "no_grant"}, ""},
		"far away": {func(r *rig, a, _ holder) { r.seeded("e", a.id.Path(), "/e", nil, "k8s:ns:web") }, &reasonWanted{code: "no_grant"}, ""},
		"reaches":  {func(r *rig, a, _ holder) { r.seeded("e", a.id.Path(), "/e", nil, "unix:uid:1") }, nil, ""},
		"reaches by an alias": {func(r *rig, a, _ holder) {
			r.seeded("alias", server, "/rack", nil, "x:rack:7")
			r.seeded("e", "/rack", "/e", nil, "unix:uid:1")
		}, nil, ""},
		"selector": {func(r *rig, a, _ holder) { r.seeded("e", a.id.Path(), "/e", nil, "unix:uid:1", "unix:gid:2") },
			&reasonWanted{code: "selector_mismatch", says: "it asks for unix:gid:2, and the process shows unix:gid:1", missing: "unix:gid:2", have: "unix:gid:1"}, ""},
		"only selector": {func(r *rig, a, _ holder) { r.seeded("e", a.id.Path(), "/e", nil, "unix:uid:2") },
			&reasonWanted{code: "selector_mismatch", says: "unix:uid:1", missing: "unix:uid:2", have: "unix:uid:1"}, ""},
		"parent": {func(r *rig, _, o holder) { r.seeded("e", o.id.Path(), "/e", nil, "unix:uid:1") },
			&reasonWanted{code: "parent_mismatch", says: "which reaches 1 agent, another", agents: 1}, "parent_mismatch"},
		"parent that is nobody": {func(r *rig, _, _ holder) { r.seeded("e", "/nobody", "/e", nil, "unix:uid:1") },
			&reasonWanted{code: "parent_mismatch", says: "reaches no agent"}, "parent_mismatch"},
		"parent below another's": {func(r *rig, _, o holder) {
			r.seeded("up", o.id.Path(), "/up", nil, "unix:uid:9")
			r.seeded("e", "/up", "/e", nil, "unix:uid:1")
		}, &reasonWanted{code: "parent_mismatch", agents: 1}, "parent_mismatch"},
		"alias": {func(r *rig, _, _ holder) {
			r.seeded("alias", server, "/row", nil, "x:rack:8", "x:row:1")
			r.seeded("e", "/row", "/e", nil, "unix:uid:1", "unix:gid:1")
		}, &reasonWanted{code: "alias_mismatch", says: "the alias alias wants the node selector x:rack:8, and the node has x:rack:7", alias: "alias", missing: "x:rack:8", have: "x:rack:7"}, "alias_mismatch"},
		"alias that is far away": {func(r *rig, _, _ holder) {
			r.seeded("alias", server, "/row", nil, "x:rack:8", "x:row:2")
			r.seeded("e", "/row", "/e", nil, "unix:uid:1")
		}, &reasonWanted{code: "parent_mismatch"}, "parent_mismatch"},
		"a near entry of its own goes first": {func(r *rig, a, o holder) {
			r.seeded("near", a.id.Path(), "/near", nil, "unix:uid:1", "unix:gid:2")
			r.seeded("e", o.id.Path(), "/e", nil, "unix:uid:1")
		}, &reasonWanted{code: "selector_mismatch"}, "parent_mismatch"},
		"another's that asks for more": {func(r *rig, _, o holder) { r.seeded("e", o.id.Path(), "/e", nil, "unix:uid:1", "unix:secret:x") },
			&reasonWanted{code: "no_grant"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			agent, other := r.agentOn("x:rack:7", "x:row:1"), r.agentOn("x:rack:9")
			row.seed(r, agent, other)
			resp, err := whyv1.NewEntriesClient(r.admin).Ask(t.Context(), &whyv1.AskEntriesRequest{AgentId: agent.id.String(), Selectors: whySelectors(process...)})
			if err != nil {
				t.Fatal(err)
			}
			row.want.check(t, resp)
			hint, err := whyv1.NewEntriesClient(r.connect(&agent)).Hint(t.Context(), &whyv1.HintRequest{Selectors: whySelectors(process...)})
			if err != nil || hint.Code != row.hint {
				t.Errorf("Hint() = %v, %v, want %q", hint, err, row.hint)
			}
		})
	}
}

type reasonWanted struct {
	code, says, missing, have, alias string
	agents                           int
}

func (w *reasonWanted) check(t *testing.T, resp *whyv1.AskEntriesResponse) {
	t.Helper()
	if w == nil {
		if resp.Reason != nil || len(resp.Entries) == 0 || !resp.Entries[0].Reaches {
			t.Errorf("Ask() = %v, want an entry that reaches", resp)
		}
		return
	}
	row := reason.Find(w.code)
	if resp.Reason.GetCode() != w.code || resp.Reason.GetFix() != row.Remedy || !strings.Contains(resp.Reason.GetMessage(), w.says) {
		t.Errorf("Ask() = %v, want %s with %q", resp, w.code, w.says)
	}
	if w.code == "no_grant" {
		return
	}
	e := resp.Entries[0]
	first := func(s *whyv1.Selector) string {
		if s == nil {
			return ""
		}
		return s.Type + ":" + s.Value
	}
	have := ""
	if len(e.Have) > 0 {
		have = first(e.Have[0])
	}
	if w.missing != "" && (first(e.Missing) != w.missing || have != w.have) || w.alias != "" && e.AliasId != w.alias || w.agents != int(e.AgentCount) || len(e.Agents) != w.agents {
		t.Errorf("entry = %v, want %+v", e, w)
	}
}

// An entry that is named is judged however far away it is.
func TestWhyOneEntry(t *testing.T) {
	r := newRig(t)
	agent := r.agentOn("x:rack:7")
	r.seeded("far", agent.id.Path(), "/far", nil, "k8s:ns:web", "k8s:sa:api")
	r.seeded("good", agent.id.Path(), "/good", nil, "unix:uid:1")
	api := whyv1.NewEntriesClient(r.admin)
	ask := func(id string) *whyv1.AskEntriesResponse {
		t.Helper()
		resp, err := api.Ask(t.Context(), &whyv1.AskEntriesRequest{AgentId: agent.id.String(), SpiffeId: id, Selectors: whySelectors("unix:uid:1")})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	if resp := ask("spiffe://example.org/far"); len(resp.Entries) != 1 || resp.Entries[0].Id != "far" || resp.Reason.GetCode() != "selector_mismatch" ||
		!strings.Contains(resp.Reason.GetMessage(), "k8s:ns:web and 1 selectors more") {
		t.Errorf("a far entry: %v", resp)
	}
	if resp := ask("spiffe://example.org/none"); len(resp.Entries) != 0 || resp.Reason.GetCode() != "no_grant" {
		t.Errorf("no entry: %v", resp)
	}
	if resp := ask("spiffe://example.org/good"); resp.Reason != nil {
		t.Errorf("a good entry: %v", resp)
	}
}

func TestWhyRefuses(t *testing.T) {
	r := newRig(t)
	agent, outcast := r.agent(), r.agent()
	if _, err := agentv1.NewAgentClient(r.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(outcast.id.Path())}); err != nil {
		t.Fatal(err)
	}
	some := whySelectors("unix:uid:1")
	for name, row := range map[string]struct {
		req    *whyv1.AskEntriesRequest
		code   codes.Code
		reason string
	}{
		"banned agent":      {&whyv1.AskEntriesRequest{AgentId: outcast.id.String(), Selectors: some}, codes.FailedPrecondition, "agent_banned"},
		"unknown agent":     {&whyv1.AskEntriesRequest{AgentId: "spiffe://example.org/spire/agent/x", Selectors: some}, codes.NotFound, "node_not_found"},
		"no agent's ID":     {&whyv1.AskEntriesRequest{AgentId: "spiffe://example.org/x", Selectors: some}, codes.InvalidArgument, "agent_id_invalid"},
		"foreign agent":     {&whyv1.AskEntriesRequest{AgentId: "spiffe://other.test/spire/agent/x", Selectors: some}, codes.InvalidArgument, "spiffe_id_foreign"},
		"no selector":       {&whyv1.AskEntriesRequest{AgentId: agent.id.String()}, codes.InvalidArgument, "selectors_missing"},
		"bad selector":      {&whyv1.AskEntriesRequest{AgentId: agent.id.String(), Selectors: whySelectors("A:")}, codes.InvalidArgument, "selector_invalid"},
		"foreign SPIFFE ID": {&whyv1.AskEntriesRequest{AgentId: agent.id.String(), SpiffeId: "spiffe://other.test/x", Selectors: some}, codes.InvalidArgument, "spiffe_id_foreign"},
	} {
		_, err := whyv1.NewEntriesClient(r.admin).Ask(t.Context(), row.req)
		if status.Code(err) != row.code || reasonOf(err) != row.reason {
			t.Errorf("%s: %v, %q", name, err, reasonOf(err))
		}
	}
}

// R12, R13: an agent hears a code and no more, about itself, and not often.
func TestHintIsBounded(t *testing.T) {
	r := newRig(t)
	agent := r.agent()
	api := whyv1.NewEntriesClient(r.connect(&agent))
	var many []string
	for i := range 257 {
		many = append(many, fmt.Sprintf("unix:uid:%d", i))
	}
	if _, err := api.Hint(t.Context(), &whyv1.HintRequest{Selectors: whySelectors(many...)}); reasonOf(err) != "selectors_too_many" {
		t.Errorf("257 selectors: %v", err)
	}
	var err error
	for range 100 {
		if _, err = api.Hint(t.Context(), &whyv1.HintRequest{Selectors: whySelectors("unix:uid:1")}); err != nil {
			break
		}
	}
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("100 hints in a row: %v", err)
	}
	fields := (&whyv1.HintResponse{}).ProtoReflect().Descriptor().Fields()
	if fields.Len() != 1 {
		t.Errorf("an agent hears %d things, want the code alone", fields.Len())
	}
}
