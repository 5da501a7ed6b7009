package agent_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	whyv1 "github.com/plastron/plastron/api/plastron/why/v1"
	"github.com/plastron/plastron/internal/agent"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/reason"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// asking is one agent and the ways to ask it.
type asking struct {
	t      *testing.T
	public *grpc.ClientConn
	admin  *grpc.ClientConn
}

func ask(t *testing.T, cfg agent.Config) asking {
	dial := func(path string) *grpc.ClientConn {
		t.Helper()
		conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	return asking{t, dial(cfg.Agent.SocketPath), dial(filepath.Join(cfg.Agent.DataDir, "admin.sock"))}
}

func (a asking) ctx() context.Context {
	ctx, cancel := context.WithTimeout(a.t.Context(), wait)
	a.t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// fetch returns the status that a workload gets, and the reason in its detail.
func (a asking) fetch() (*status.Status, string) {
	stream, err := workload.NewSpiffeWorkloadAPIClient(a.public).FetchX509SVID(a.ctx(), &workload.X509SVIDRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return status.Convert(err), info.Reason
		}
	}
	return status.Convert(err), ""
}

func (a asking) process(pid int) *whyv1.AskProcessResponse {
	a.t.Helper()
	resp, err := whyv1.NewProcessClient(a.admin).Ask(a.ctx(), &whyv1.AskProcessRequest{Pid: int64(pid)})
	if err != nil {
		a.t.Fatal(err)
	}
	return resp
}

func (a asking) self() *whyv1.AskSelfResponse {
	a.t.Helper()
	resp, err := whyv1.NewSelfClient(a.public).Ask(a.ctx(), &whyv1.AskSelfRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	return resp
}

// rule makes a rule of the agent's for processes with one selector of type unix.
func (d *domain) rule(template, selector string) {
	d.t.Helper()
	agent := d.agentIDs()[0]
	resp, err := rulev1.NewRulesClient(d.conn).Create(d.t.Context(), &rulev1.CreateRequest{Rules: []*rulev1.Rule{{
		ParentId: "spiffe://" + agent.TrustDomain + agent.Path, IdTemplate: template, Trust: "agent",
		Selectors: []*rulev1.Selector{{Type: "unix", Value: selector}},
	}}})
	if err != nil || resp.GetResults()[0].GetRefusal() != nil {
		d.t.Fatal(err, resp)
	}
}

// poll waits until something holds.
func poll(t *testing.T, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * wait) // a caller waits some seconds for what is being signed
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatal("it never came to pass")
		}
		<-time.After(50 * time.Millisecond)
	}
}

// R131: mistakes that a person makes, with a real server and agent. Each has its
// own code and fix, the same in the status that the workload gets, in what it
// hears about itself, and in what the operator is told.
func TestSeededMistakes(t *testing.T) {
	mine := "uid:" + strconv.Itoa(os.Getuid())
	unix := func(values ...string) (out []*spiretypes.Selector) {
		for _, v := range values {
			out = append(out, &spiretypes.Selector{Type: "unix", Value: v})
		}
		return out
	}
	path := func(p string) *spiretypes.SPIFFEID {
		return &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: p}
	}
	for name, row := range map[string]struct {
		seed func(d *domain, a asking)
		want string
		code codes.Code
		says string // to the operator only
	}{
		"nothing registered": {func(*domain, asking) {}, "no_grant", codes.PermissionDenied, ""},
		"another group": {func(d *domain, _ asking) {
			d.entry("/web", func(e *spiretypes.Entry) { e.Selectors = unix(mine, "gid:4711") })
		}, "selector_mismatch", codes.PermissionDenied, "asks for unix:gid:4711, and the process shows unix:gid:" + strconv.Itoa(os.Getgid())},
		"another agent's": {func(d *domain, _ asking) {
			d.entry("/web", func(e *spiretypes.Entry) { e.ParentId = path("/spire/agent/join_token/other") })
		}, "parent_mismatch", codes.PermissionDenied, ""},
		"another rack's": {func(d *domain, _ asking) {
			d.entry("/rack", func(e *spiretypes.Entry) {
				e.ParentId = path("/spire/server")
				e.Selectors = []*spiretypes.Selector{{Type: "x", Value: "rack:7"}}
			})
			d.entry("/web", func(e *spiretypes.Entry) { e.ParentId = path("/rack") })
		}, "alias_mismatch", codes.PermissionDenied, ""},
		"ended": {func(d *domain, _ asking) {
			d.entry("/web", func(e *spiretypes.Entry) { e.ExpiresAt = time.Now().Unix() + 12 }) // until then it has to be at the agent
		}, "grant_expired", codes.PermissionDenied, "the grant ended at "},
		"server away before it signed": {func(d *domain, a asking) {
			id := d.entry("/web", func(e *spiretypes.Entry) {
				e.AdditionalAttributes = &spiretypes.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true}
			})
			poll(d.t, func() bool { g := a.process(os.Getpid()).Grants; return len(g) == 1 && g[0].Id == id })
			d.stop()
		}, "not_signed_yet", codes.Unavailable, "the server did not sign"},
		"unknown trust domain": {func(d *domain, _ asking) {
			d.entry("/web", func(e *spiretypes.Entry) { e.FederatesWith = []string{"foreign.test"} })
		}, "federated_bundle_missing", codes.OK, "foreign.test"},
		"a rule for pods, on a machine without any": {func(d *domain, _ asking) {
			d.rule("spiffe://example.org/ns/{k8s.ns}", mine)
		}, "rule_fact_missing", codes.PermissionDenied, "k8s.ns"},
		"a rule with a path": {func(d *domain, _ asking) {
			d.rule("spiffe://example.org/program/{unix.path}", mine)
		}, "rule_fact_invalid", codes.PermissionDenied, "unix.path"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDomain(t)
			cfg := d.agentConfig()
			if row.want == "rule_fact_invalid" {
				looks, err := config.Parse("test", []byte("discover_workload_path = true"))
				if err != nil {
					t.Fatal(err)
				}
				cfg.Plugins[2].Data = looks
			}
			d.agent(cfg)
			a := ask(t, cfg)
			row.seed(d, a)
			var told *whyv1.AskProcessResponse
			poll(t, func() bool {
				if row.code != codes.OK {
					if _, got := a.fetch(); got != row.want {
						return false
					}
				}
				told = a.process(os.Getpid())
				return told.Reason.GetCode() == row.want && a.self().Reason.GetCode() == row.want
			})
			table := reason.Find(row.want)
			if !strings.Contains(told.Reason.GetMessage(), row.says) || told.Reason.GetFix() == "" {
				t.Errorf("the operator is told: %v", told.Reason)
			}
			if !strings.HasPrefix(told.AgentId, "spiffe://example.org/spire/agent/") || len(told.Attestors) != 1 || told.Attestors[0].TookUs <= 0 ||
				told.Attestors[0].Facts["unix.uid"] != strconv.Itoa(os.Getuid()) || told.Sync.GetHeardMs() < 0 || !told.Sync.GetSynced() || !told.Sync.GetSkewKnown() {
				t.Errorf("the facts are %v", told)
			}
			if row.code == codes.OK {
				return
			}
			st, _ := a.fetch()
			if st.Code() != row.code || !strings.Contains(st.Message(), "("+row.want+"); "+table.Remedy) {
				t.Errorf("the workload gets %v", st)
			}
			if row.says != "" && strings.Contains(st.Message()+a.self().String(), row.says) {
				t.Errorf("the workload is told what is the operator's: %v", st)
			}
		})
	}
}

// An agent whose server is away at its start has not been told anything.
func TestWhyNotSynced(t *testing.T) {
	d := newDomain(t)
	cfg := d.agentConfig()
	cfg.Plugins[0].Name = "disk"
	_, stop := d.agent(cfg)
	stop()
	d.stop()
	again, err := agent.New(cfg, logger(t, "agent"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(run(t, again.Run))
	a := ask(t, cfg)
	poll(t, func() bool {
		st, got := a.fetch()
		return got == "not_synced" && st.Code() == codes.Unavailable
	})
	poll(t, func() bool { return a.process(os.Getpid()).Sync.GetError() != "" })
	if told := a.process(os.Getpid()); told.Reason.GetCode() != "not_synced" || told.Sync.GetSynced() {
		t.Errorf("the operator is told: %v", told)
	}
}

// Processes that are not there, or not any more.
func TestWhyOfNobody(t *testing.T) {
	d := newDomain(t)
	cfg := d.agentConfig()
	d.agent(cfg)
	a := ask(t, cfg)
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	if told := a.process(gone.Process.Pid); told.Reason.GetCode() != "peer_gone" || len(told.Attestors) != 0 {
		t.Errorf("a process that has exited: %v", told)
	}
	for _, pid := range []int64{0, -1, 1 << 40} {
		_, err := whyv1.NewProcessClient(a.admin).Ask(a.ctx(), &whyv1.AskProcessRequest{Pid: pid})
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("pid %d: %v", pid, err)
		}
	}
	// The public socket does not have it.
	_, err := whyv1.NewProcessClient(a.public).Ask(a.ctx(), &whyv1.AskProcessRequest{Pid: int64(os.Getpid())})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("on the public socket: %v", err)
	}
}
