package agent

import (
	"context"
	"encoding/hex"
	"time"

	"github.com/plastron/plastron/api/plastron/status/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/plastron/plastron/internal/sds"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/workloadapi"
	"google.golang.org/grpc"
)

// maxEnding is how many SVIDs a status names.
const maxEnding = 5

// statuses is plastron.status.v1.Agent.
type statuses struct {
	statusv1.UnsafeAgentServer
	agent   *Agent
	mirror  *mirror.Mirror
	link    *serverlink.Client
	api     *workloadapi.Server
	secrets *sds.Service
	started time.Time
}

func (s statuses) register(to grpc.ServiceRegistrar) { statusv1.RegisterAgentServer(to, s) }

// Status says how this agent is doing.
func (s statuses) Status(context.Context, *statusv1.AgentStatusRequest) (*statusv1.AgentStatus, error) {
	set, report, load := s.agent.cfg.Agent, s.mirror.Report(maxEnding), s.api.Stats()
	out := &statusv1.AgentStatus{
		Version: Version, TrustDomain: set.TrustDomain.Name(), StartedAt: s.started.Unix(), Attestor: s.agent.attestor,
		Following: s.following(report),
		Grants:    uint64(report.Grants), X509Svids: uint64(report.X509SVIDs), JwtSvids: uint64(report.JWTSVIDs),
		X509SvidsTainted: uint64(report.Tainted),
		Subscribers:      uint64(report.Subscribers), Connections: uint64(load.Connections), Calls: uint64(load.Calls),
		BundleSequence: report.BundleSequence, X509Authorities: uint32(report.Roots), BundleExpiresAt: rpc.Unix(report.RootsEnd),
		Refusals: load.Refusals, SocketPath: set.SocketPath, AdminSocketPath: set.adminSocketPath(), DataDir: set.DataDir,
	}
	if own := s.agent.own.Load(); own != nil {
		out.Id, out.CanReattest = own.id.String(), own.reattest
		out.IssuedAt, out.ExpiresAt = own.notBefore.Unix(), own.expiresAt.Unix()
	}
	for _, held := range report.First {
		out.Ending = append(out.Ending, &statusv1.Ending{SpiffeId: held.ID.String(), GrantId: held.GrantID, ExpiresAt: held.ExpiresAt.Unix()})
	}
	out.SdsStreams = uint64(s.secrets.Stats().Streams)
	for _, c := range s.secrets.Troubled() {
		client := &statusv1.SecretClient{Pid: int64(c.PID), Uid: c.UID, Node: c.Node, Names: c.Names,
			Rejected: c.Rejected, Version: c.Version, At: c.At.Unix(), Open: c.Open}
		for _, m := range c.Missing {
			client.Missing = append(client.Missing, &statusv1.SecretClient_Missing{Name: m.Name, Reason: m.Reason})
		}
		out.SdsClients = append(out.SdsClients, client)
	}
	return out, nil
}

func (s statuses) following(r mirror.Report) *statusv1.Following {
	out := &statusv1.Following{
		Address: s.agent.route.Current(), Mode: "push",
		InStep: r.Following, Since: rpc.Unix(r.Since), HeardAt: rpc.Unix(r.Heard), AcknowledgedAt: rpc.Unix(r.Acknowledged),
		ClockKnown: r.SkewKnown, ClockAheadMs: r.Skew.Milliseconds(),
	}
	if s.link.Polls() {
		out.Mode = "poll"
	}
	if p := r.Position; p != nil {
		out.Position = &statusv1.Position{Epoch: hex.EncodeToString(p.GetEpoch()), Revision: p.GetRevision()}
	}
	if r.Err != nil {
		out.Fault = &statusv1.Fault{Reason: fault.ReasonOf(r.Err), Message: rpc.Text(r.Err)}
	}
	return out
}
