package serverapi

import (
	"context"
	"time"

	lifetimev1 "github.com/plastron/plastron/api/plastron/lifetime/v1"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/registry"
)

// Outage is what would end first if all servers were gone from now on.
type Outage struct {
	X509, JWT, Agent registry.End // as far as it is known
	// Agents have a certificate and are not banned. Of what the others hold, nothing is known.
	Agents, Polling, Away, Silent int
	FirstAway                     registry.End // of the certificates of those that are away
}

// Each gives what ends first of each kind of which something is known.
func (o *Outage) Each(give func(lifetime.Kind, registry.End)) {
	for _, k := range []struct {
		kind lifetime.Kind
		end  registry.End
	}{{lifetime.X509, o.X509}, {lifetime.JWT, o.JWT}, {lifetime.Agent, o.Agent}} {
		if !k.end.At.IsZero() {
			give(k.kind, k.end)
		}
	}
}

// Outage adds up what agents said, here and to other servers, and what their rows say.
// It looks at every agent once, and is for whoever asks.
func (f *Followers) Outage(now time.Time) (o Outage) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ends := f.endsLocked()
	here := make(map[uint64]bool, len(f.byAgent))
	for _, rows := range f.byAgent {
		here[rows[0].hash] = true
	}
	f.registry.View(func(s *registry.Snapshot) {
		elsewhere := f.seen(s, now).elsewhere
		for _, row := range s.Servers() {
			if row.ID != f.server && row.Live(now) {
				ends.Telling += row.Ends.Telling
				ends.X509.First(row.Ends.X509)
				ends.JWT.First(row.Ends.JWT)
			}
		}
		attached := 0
		for n := range s.Certified(now) {
			o.Agents++
			first := &o.Agent
			switch {
			case here[n.Hash] || elsewhere.Has(n.Hash):
				attached++
			case n.Polls:
				o.Polling++
			default:
				o.Away++
				first = &o.FirstAway
			}
			if first.At.IsZero() || n.Until.Before(first.At) {
				*first = registry.End{ID: n.ID().String(), Agent: n.ID().String(), At: n.Until}
			}
		}
		o.Silent = max(0, attached-ends.Telling)
	})
	o.X509, o.JWT = ends.X509, ends.JWT
	return o
}

// Outage says what would end first. The other servers are asked for what they know now:
// what their rows say may be ten seconds old.
func (a lifetimes) Outage(ctx context.Context, _ *lifetimev1.OutageRequest) (*lifetimev1.OutageResponse, error) {
	if a.server.cfg.Servers != nil {
		a.server.cfg.Servers.Gather(ctx)
	}
	now := time.Now()
	o := a.server.followers.Outage(now)
	resp := &lifetimev1.OutageResponse{
		NowMs: now.UnixMilli(), SurviveOutageMs: a.server.cfg.Lifetimes.Outage.Milliseconds(),
		Agents: uint32(o.Agents), Polling: uint32(o.Polling), Away: uint32(o.Away), Silent: uint32(o.Silent),
	}
	o.Each(func(kind lifetime.Kind, e registry.End) { resp.First = append(resp.First, writeEnd(kind, e)) })
	if o.Away > 0 {
		resp.FirstAway = writeEnd(lifetime.Agent, o.FirstAway)
	}
	return resp, nil
}

func writeEnd(kind lifetime.Kind, e registry.End) *lifetimev1.End {
	return &lifetimev1.End{Kind: string(kind), SpiffeId: e.ID, AgentId: e.Agent, AtMs: e.At.UnixMilli()}
}
