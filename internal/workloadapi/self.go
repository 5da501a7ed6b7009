package workloadapi

import (
	"context"

	"github.com/plastron/plastron/api/plastron/why/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/rpc"
)

// self is plastron.why.v1.Self: what a process may know about itself.
type self struct {
	whyv1.UnsafeSelfServer
	server *Server
}

// Ask says what the caller is, and why it is refused if it is. Of grants it says
// how many identities there are and nothing else: they may be others', too.
func (a self) Ask(ctx context.Context, _ *whyv1.AskSelfRequest) (*whyv1.AskSelfResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	p, err := c.Peer()
	if err != nil {
		return nil, err
	}
	resp := &whyv1.AskSelfResponse{Pid: int64(p.PID)}
	seen, err := a.server.attest(ctx, c, true)
	if err != nil {
		if fault.ReasonOf(err) != reason.AttestorFailed.Reason {
			return nil, err // what it is now, it was not when it connected
		}
		resp.Reason = rpc.Reason(reason.AttestorFailed)
		return resp, nil
	}
	resp.Selectors = rpc.Selectors(seen.facts.Selectors)
	r, ready := a.server.reasonFor(ctx, seen)
	resp.Identities, resp.Reason = uint32(ready), rpc.Reason(r)
	return resp, c.Check()
}
