package agent

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/plastron/plastron/api/plastron/why/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/plastron/plastron/internal/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
)

// whys is plastron.why.v1.Process: what a process is, what it is given, and what
// keeps the rest away.
type whys struct {
	whyv1.UnsafeProcessServer
	agent     *Agent
	mirror    *mirror.Mirror
	attestors []workload.Named
}

func (a whys) register(to grpc.ServiceRegistrar) { whyv1.RegisterProcessServer(to, a) }

// Ask holds the process while it is looked at, as the public socket does, so that
// what is said is of one process.
func (a whys) Ask(ctx context.Context, req *whyv1.AskProcessRequest) (*whyv1.AskProcessResponse, error) {
	resp := &whyv1.AskProcessResponse{Pid: req.GetPid()}
	if own := a.agent.own.Load(); own != nil {
		resp.AgentId = own.id.String()
	}
	if req.GetPid() <= 0 || req.GetPid() > math.MaxInt32 {
		return nil, fault.New(fault.Invalid, "pid_invalid", "%d is not the number of a process", req.GetPid())
	}
	p, err := process.Open(int(req.GetPid()))
	if errors.Is(err, reason.PeerGone) {
		resp.Reason = rpc.Reason(reason.Say(reason.PeerGone, "there is no process %d in the agent's pid namespace", req.GetPid()))
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	defer p.Close()
	resp.Uid, resp.Gid = p.UID, p.GID

	answers := workload.Ask(ctx, a.attestors, p.PID)
	if err := p.Check(); err != nil {
		if errors.Is(err, reason.PeerGone) {
			resp.Reason = rpc.Reason(reason.Say(reason.PeerGone, "process %d exited while it was looked at", p.PID))
			return resp, nil
		}
		return nil, err
	}
	var failed *workload.Answer
	for i := range answers {
		if answers[i].Err != nil && failed == nil {
			failed = &answers[i]
		}
		resp.Attestors = append(resp.Attestors, writeAnswer(&answers[i]))
	}
	facts := workload.Facts(answers)
	resp.Selectors = rpc.Selectors(facts.Selectors)

	found := a.mirror.Why(ctx, facts, true)
	for _, g := range found.Grants {
		resp.Grants = append(resp.Grants, writeFitting(&g))
	}
	for _, n := range found.Near {
		resp.Near = append(resp.Near, &whyv1.NearMiss{Id: n.GrantID, SpiffeId: idOr(n.ID, n.Template),
			Missing: rpc.Selector(n.Missing), Have: rpc.Selectors(n.Have)})
	}
	resp.Sync = writeSync(&found.Sync)
	verdict := found.Reason
	if failed != nil && (verdict != nil && verdict.Kind == fault.Denied) {
		verdict = reason.Say(reason.AttestorFailed, "the attestor %s failed: %v", failed.Name, failed.Err)
	}
	resp.Reason = rpc.Reason(verdict)
	return resp, nil
}

func writeAnswer(a *workload.Answer) *whyv1.Attestor {
	out := &whyv1.Attestor{Name: a.Name, TookUs: a.Took.Microseconds(), Selectors: rpc.Selectors(a.Selectors), Facts: a.Facts, Omitted: a.Omitted}
	if a.Err != nil {
		out.Error = a.Err.Error()
	}
	return out
}

func writeFitting(g *mirror.Fitting) *whyv1.Grant {
	states := map[mirror.State]whyv1.Grant_State{
		mirror.Ready: whyv1.Grant_STATE_READY, mirror.Signing: whyv1.Grant_STATE_SIGNING, mirror.Refused: whyv1.Grant_STATE_REFUSED,
		mirror.Ended: whyv1.Grant_STATE_ENDED, mirror.Shadowed: whyv1.Grant_STATE_SHADOWED, mirror.Unfilled: whyv1.Grant_STATE_RULE,
	}
	out := &whyv1.Grant{Id: g.GrantID, SpiffeId: idOr(g.ID, g.Template), State: states[g.State], Reason: rpc.Reason(g.Reason), ShadowedBy: g.By, FactsBy: g.FactsBy}
	if !g.ExpiresAt.IsZero() {
		out.ExpiresAt = g.ExpiresAt.Unix()
	}
	if !g.Next.IsZero() {
		out.NextAttempt = g.Next.UnixMilli()
	}
	for _, td := range g.Unknown {
		out.UnknownDomains = append(out.UnknownDomains, td.Name())
	}
	return out
}

func writeSync(s *mirror.Sync) *whyv1.Sync {
	out := &whyv1.Sync{Synced: s.Synced, Connected: s.Connected, Epoch: s.Position.GetEpoch(), Revision: s.Position.GetRevision(),
		HeardMs: -1, SkewMs: s.Skew.Milliseconds(), SkewKnown: s.SkewKnown}
	if !s.Heard.IsZero() {
		out.HeardMs = max(time.Now().Round(0).Sub(s.Heard), 0).Milliseconds()
	}
	if s.Err != nil {
		out.Error = s.Err.Error()
	}
	return out
}

// idOr is what a grant gives: a SPIFFE ID, or a rule's template.
func idOr(id spiffeid.ID, template string) string {
	if template != "" {
		return template
	}
	return id.String()
}
