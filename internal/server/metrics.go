package server

import (
	"context"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/store"
)

// role is the server's name in metrics.
const role = "server"

// counters are what counts things as they happen; all are nil if nobody can read
// the metrics.
type counters struct {
	commit func(took time.Duration, results []store.Result)
	event  func(audit.Event)
	api    serverapi.Counters

	differs   func()
	published func(place, result string)
}

// counters adds those metrics.
func (s *Server) counters(m *monitor.Metrics) counters {
	if m == nil {
		return counters{}
	}
	commits := m.Histogram("store_commit_seconds", "Time to make a group of transactions durable, or to refuse it.")
	transactions := m.Counter("store_transactions_total", "Transactions given to the store, by result: ok, conflict, or why it failed.", "result")
	issued := m.Counter("svids_issued_total", "Documents signed, by kind: x509, jwt, agent for those of agents, and x509-ca for authorities of downstream servers.", "kind")
	refused := m.Counter("refusals_total", "Calls, and items of batches, that the audit trail has as refused, by reason.", "reason")
	alarms := m.Counter("alarms_total", "Things that an operator has to look at, such as a cloned agent, by reason.", "reason")
	calls := m.Histogram("rpc_seconds", "Calls that ended, with the time that they took, by method. A stream is one call.", "method")
	codes := m.Counter("rpc_total", "Calls that ended, by method and gRPC code.", "method", "code")
	errors := m.Counter("rpc_errors_total", "Calls that ended with an error of ours, by reason; rate_limited are those over a limit.", "reason")
	attestations := m.Counter("attestations_total", "Attempts of nodes to attest, by attestor and result: ok, or why not.", "attestor", "result")
	deltas := m.Counter("sync_deltas_total", "Changes sent to agents, one for each agent and change that affects it.")
	acks := m.Histogram("sync_ack_seconds", "Time from when a change is sent until the agent says that it has it.")
	differs := m.Counter("servers_differ_total", "Times that another server was found to hold something else than this one at the same position.")
	published := m.Counter("bundle_publications_total", "Attempts to bring a place of a Notifier up to date with the bundle, by place and result: ok, conflict, or why not.", "place", "result")
	return counters{
		differs:   func() { differs() },
		published: func(place, result string) { published(place, result) },
		commit: func(took time.Duration, results []store.Result) {
			commits(took)
			for _, r := range results {
				transactions(resultOf(r.Err))
			}
		},
		event: func(e audit.Event) {
			switch e := e.(type) {
			case audit.Issuance:
				issued(e.Kind)
			case audit.Admission:
				issued("agent")
			case audit.Refusal:
				refused(e.Reason)
			case audit.Alarm:
				alarms(e.Reason)
			}
		},
		api: serverapi.Counters{
			Call: func(method, code, reason string, took time.Duration) {
				calls(took, method)
				codes(method, code)
				if reason != "" {
					errors(reason)
				}
			},
			Attested: func(attestor string, err error) {
				if _, known := s.plan.attestors[attestor]; !known {
					attestor = "other" // the name is the caller's
				}
				attestations(attestor, resultOf(err))
			},
			Delta:        func() { deltas() },
			Acknowledged: func(took time.Duration) { acks(took) },
		},
	}
}

func resultOf(err error) string {
	switch {
	case err == nil:
		return "ok"
	case fault.KindOf(err) == fault.Conflict:
		return "conflict"
	}
	return fault.ReasonOf(err)
}

// gauges adds what is looked up when somebody asks. Nothing is called before.
func (s *Server) gauges(m *monitor.Metrics, id string, api *serverapi.Server, auth *authority.Authority, own *ownSVID, trail *audit.Writer) {
	view := func(read func(*registry.Snapshot) float64) func() float64 {
		return func() (value float64) {
			s.registry.View(func(snap *registry.Snapshot) { value = read(snap) })
			return value
		}
	}
	m.Info(Version)
	m.Health(func() []monitor.Check { return s.checks })
	m.Gauge("entries", "Registration entries.", view(func(snap *registry.Snapshot) float64 { return float64(snap.EntryCount()) }))
	m.Gauge("nodes", "Nodes that have attested and were not evicted, banned ones included.", view(func(snap *registry.Snapshot) float64 { return float64(snap.NodeCount()) }))
	m.Gauge("store_revision", "Revision of the newest change that is applied here.", view(func(snap *registry.Snapshot) float64 { return float64(snap.Position().Revision) }))
	m.Total("store_reloads_total", "Times that everything was read from the store anew, because its log could not be followed from where this server was.", func() float64 { return float64(s.registry.Reloads()) })
	m.Gauge("bundle_sequence", "Sequence number of the own trust domain's bundle.", view(func(snap *registry.Snapshot) float64 {
		b, err := snap.Bundle(s.cfg.Server.TrustDomain.TrustDomain)
		if err != nil {
			return 0
		}
		return float64(b.Sequence)
	}))
	slots := func(each func(kind string, slot registry.Slot)) {
		s.registry.View(func(snap *registry.Snapshot) {
			for _, a := range snap.Authorities(id) {
				for _, slot := range a.Slots {
					each(a.Kind, slot)
				}
			}
		})
	}
	m.Gauges("authority_keys", "Signing keys of this server, by kind and state: intended, prepared, active, old.", []string{"kind", "state"}, func(give func(float64, ...string)) {
		count := map[[2]string]float64{}
		slots(func(kind string, slot registry.Slot) { count[[2]string{kind, stateName(slot.State)}]++ })
		for key, n := range count {
			give(n, key[0], key[1])
		}
	})
	m.Gauges("authority_expiry_timestamp_seconds", "When the active signing key ends, by kind.", []string{"kind"}, func(give func(float64, ...string)) {
		slots(func(kind string, slot registry.Slot) {
			if slot.State == registry.SlotActive {
				give(float64(slot.NotAfter.Unix()), kind)
			}
		})
	})
	lines := func(each func(authority.Status)) {
		for _, line := range auth.Status(time.Now()) {
			if line.Server == id {
				each(line)
			}
		}
	}
	m.Gauges("authority_next_step_timestamp_seconds", "When the next step of this server's signing keys is taken, at the latest, by kind and step: intend (prepare another), ready, activate, retire, drop, prune.", []string{"kind", "step"}, func(give func(float64, ...string)) {
		lines(func(line authority.Status) {
			if line.Next != "" {
				give(float64(line.At.Unix()), line.Kind, line.Next)
			}
		})
	})
	m.Gauges("authority_unacknowledged", "Agents and servers that have not acknowledged the key that this server has prepared, by kind.", []string{"kind"}, func(give func(float64, ...string)) {
		lines(func(line authority.Status) { give(float64(len(line.Missing)), line.Kind) })
	})
	m.Gauge("certificate_expiry_timestamp_seconds", "When the certificate that this server shows to agents ends.", func() float64 {
		own.mu.Lock()
		defer own.mu.Unlock()
		return float64(own.end.Unix())
	})
	m.Gauges("outage_first_expiry_timestamp_seconds", "When, if all servers were gone from now on, what agents hold would first end, by kind: x509, jwt, agent. Absent while nothing is known.", []string{"kind"}, func(give func(float64, ...string)) {
		o := api.Outage(time.Now())
		o.Each(func(kind lifetime.Kind, e registry.End) { give(float64(e.At.UnixMilli())/1000, string(kind)) })
	})
	m.Gauges("outage_unknown_agents", "Agents that have a certificate and did not say what they hold, by why: polling, away, silent.", []string{"why"}, func(give func(float64, ...string)) {
		o := api.Outage(time.Now())
		give(float64(o.Polling), "polling")
		give(float64(o.Away), "away")
		give(float64(o.Silent), "silent")
	})
	m.Gauges("sync_agents", "Agents that follow this server, by whether they have said that they have all that they were sent: current, behind.", []string{"state"}, func(give func(float64, ...string)) {
		agents, behind, _ := api.Attached(time.Now())
		give(float64(agents-behind), "current")
		give(float64(behind), "behind")
	})
	m.Gauge("sync_lag_seconds", "For how long the slowest agent has had a change without saying so.", func() float64 {
		_, _, longest := api.Attached(time.Now())
		return longest.Seconds()
	})
	m.Gauge("downstream_authorities", "Authorities of downstream servers, signed by any server, that have not ended.", func() float64 { return float64(api.Downstream(time.Now())) })
	m.Total("panics_total", "Calls that ended in a panic. Each is a bug.", func() float64 { return float64(api.Panics()) })
	m.Total("audit_lost_total", "Events that could not be written to the audit trail.", func() float64 { return float64(trail.Dropped()) })
}

func stateName(s registry.SlotState) string {
	switch s {
	case registry.SlotIntended:
		return "intended"
	case registry.SlotPrepared:
		return "prepared"
	case registry.SlotActive:
		return "active"
	case registry.SlotOld:
		return "old"
	}
	return "unspecified"
}

// showMetrics opens the metrics listener, if there is to be one.
func (s *Server) showMetrics(ctx context.Context, m *monitor.Metrics) (stop func(), err error) {
	if m == nil {
		return func() {}, nil
	}
	return monitor.Serve(ctx, "telemetry.Prometheus", s.cfg.Telemetry.Prometheus.Address(), m.Handler(), s.log)
}

// Metrics describes what a server measures.
func Metrics() []monitor.Metric {
	s := &Server{}
	m := monitor.NewMetrics(&monitor.Telemetry{Prometheus: &monitor.Prometheus{}}, role, "")
	s.counters(m)
	s.gauges(m, "", nil, nil, nil, nil)
	s.fleetGauges(m, nil)
	return m.Describe()
}
