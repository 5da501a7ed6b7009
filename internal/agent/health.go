package agent

import (
	"context"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/monitor"
)

// showHealth opens the health listener, if there is to be one: before the agent
// has attested, which may take long.
func (a *Agent) showHealth(ctx context.Context, stats func() mirror.Stats, checks []monitor.Check) (stop func(), err error) {
	c := a.cfg.HealthChecks
	if !c.ListenerEnabled {
		return func() {}, nil
	}
	living := []monitor.Check{{Name: "memory", Run: func() error {
		stats() // hangs if the lock is never given back
		return nil
	}}}
	// Whoever asks for health on the socket itself has no need to be told of it.
	checks = append(slices.Clip(checks), monitor.Socket("workload_api", a.cfg.Agent.SocketPath))
	return monitor.Serve(ctx, "health_checks", c.Address(), monitor.HealthHandler(c,
		func() []monitor.Check { return living }, func() []monitor.Check { return checks }), a.log)
}

// needs lists what an agent needs to hand out what is granted (R105). While the
// server is away it hands out what it has (R56).
func (a *Agent) needs(stats func() mirror.Stats) []monitor.Check {
	return []monitor.Check{
		{Name: "attested", Run: func() error {
			switch own := a.own.Load(); {
			case own == nil:
				return fault.New(fault.Unavailable, "agent_not_attested", "the agent has not been admitted by the server yet").
					Fix("see the agent's log")
			case !time.Now().Before(own.expiresAt):
				return fault.New(fault.Unavailable, "agent_expired", "the agent's own SVID has expired").Fix("see the agent's log and clock")
			}
			return nil
		}},
		{Name: "in_step", Run: func() error {
			if !stats().Synced {
				return fault.New(fault.Unavailable, "not_synced", "the agent has not been told yet what there is")
			}
			return nil
		}},
		{Name: "server", Degrades: true, Run: func() error {
			if !stats().Following {
				return fault.New(fault.Unavailable, "server_away", "the agent does not follow the server at the moment; it hands out what it has").
					Fix("see the agent's log")
			}
			return nil
		}},
	}
}
