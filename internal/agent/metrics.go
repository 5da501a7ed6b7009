package agent

import (
	"context"
	"time"

	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/sds"
	"github.com/plastron/plastron/internal/workloadapi"
)

// role is the agent's name in metrics.
const role = "agent"

// counters are what counts things as they happen; all are nil if nobody can read
// the metrics.
type counters struct {
	call func(method, code, reason string, took time.Duration)
	job  func(kind agentid.Kind, err error)
}

// newCounters adds those metrics.
func newCounters(m *monitor.Metrics) counters {
	if m == nil {
		return counters{}
	}
	calls := m.Histogram("workload_rpc_seconds", "Calls of the Workload API that ended, with the time that they took, by method. A stream is one call.", "method")
	codes := m.Counter("workload_rpc_total", "Calls of the Workload API that ended, by method and gRPC code.", "method", "code")
	refused := m.Counter("workload_refusals_total", "Calls of the Workload API that were refused, by reason.", "reason")
	jobs := m.Counter("identity_jobs_total", "What the agent did about its own identity (bootstrap, attest, renew, save), by job and result: ok, or why not.", "job", "result")
	return counters{
		call: func(method, code, reason string, took time.Duration) {
			calls(took, method)
			codes(method, code)
			if reason != "" {
				refused(reason)
			}
		},
		job: func(kind agentid.Kind, err error) {
			result := "ok"
			if err != nil {
				result = fault.ReasonOf(err)
			}
			jobs(kind.String(), result)
		},
	}
}

// gauges adds what is looked up when somebody asks. Nothing is called before.
func (a *Agent) gauges(held *mirror.Mirror, checks []monitor.Check, api *workloadapi.Server, secrets *sds.Service) {
	m := a.metrics
	gauge := func(name, help string, read func(mirror.Report) float64) {
		m.Gauge(name, help, func() float64 { return read(held.Report(1)) })
	}
	m.Info(Version)
	m.Health(func() []monitor.Check { return checks })
	gauge("grants", "Entries that this agent is entitled to.", func(r mirror.Report) float64 { return float64(r.Grants) })
	m.Gauges("svids", "SVIDs that are held ready, by kind: x509, jwt.", []string{"kind"}, func(give func(float64, ...string)) {
		r := held.Report(0)
		give(float64(r.X509SVIDs), "x509")
		give(float64(r.JWTSVIDs), "jwt")
	})
	gauge("svid_expiry_timestamp_seconds", "When the first of the X.509-SVIDs that are held ends; 0 if there is none.", func(r mirror.Report) float64 {
		if len(r.First) == 0 {
			return 0
		}
		return timestamp(r.First[0].ExpiresAt)
	})
	gauge("subscribers", "Streams of the Workload API that are told of changes.", func(r mirror.Report) float64 { return float64(r.Subscribers) })
	gauge("bundle_sequence", "Sequence number of the own trust domain's bundle that is held.", func(r mirror.Report) float64 { return float64(r.BundleSequence) })
	gauge("sync_following", "1 if the agent is in step with the server on a stream that is open, else 0.", func(r mirror.Report) float64 {
		if r.Following {
			return 1
		}
		return 0
	})
	gauge("sync_revision", "Revision of the server's newest change that is known here.", func(r mirror.Report) float64 { return float64(r.Position.GetRevision()) })
	gauge("sync_heard_timestamp_seconds", "When the server last said something; 0 if never.", func(r mirror.Report) float64 { return timestamp(r.Heard) })
	gauge("clock_skew_seconds", "The server's clock less this one, delays included; 0 until it is known.", func(r mirror.Report) float64 { return r.Skew.Seconds() })
	m.Gauge("own_svid_expiry_timestamp_seconds", "When the agent's own SVID ends; 0 if it has none.", func() float64 {
		if own := a.own.Load(); own != nil {
			return timestamp(own.expiresAt)
		}
		return 0
	})
	m.Total("panics_total", "Calls that ended in a panic. Each is a bug.", func() float64 { return float64(api.Panics() + secrets.Panics()) })
	m.Gauge("workload_connections", "Connections to the Workload API that are open.", func() float64 { return float64(api.Stats().Connections) })
	m.Gauge("workload_calls", "Calls of the Workload API under way, open streams included.", func() float64 { return float64(api.Stats().Calls) })
	m.Totals("workload_over_limit_total", "How often a user came to a limit of the Workload API, by limit: connections, calls, rate, bytes.", []string{"limit"},
		func(give func(float64, ...string)) {
			for limit, n := range api.Stats().OverLimit {
				give(float64(n), limit)
			}
		})
	m.Total("workload_slow_readers_total", "Connections to the Workload API closed because nobody read.", func() float64 { return float64(api.Stats().SlowReaders) })
	m.Total("workload_attestations_total", "How often the attestors were asked what a process is.", func() float64 { return float64(api.Stats().Attested) })
	m.Gauge("sds_streams", "Streams of Envoy's secret discovery that are open.", func() float64 { return float64(secrets.Stats().Streams) })
	m.Gauge("sds_streams_missing", "Streams of Envoy's secret discovery that ask for names which stand for nothing.", func() float64 { return float64(secrets.Stats().Missing) })
	m.Total("sds_answers_total", "Answers that streams of Envoy's secret discovery were sent.", func() float64 { return float64(secrets.Stats().Answers) })
	m.Total("sds_rejected_total", "Answers that a client of Envoy's secret discovery did not take.", func() float64 { return float64(secrets.Stats().Rejected) })
}

func timestamp(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.Unix())
}

// showMetrics opens the metrics listener, if there is to be one.
func (a *Agent) showMetrics(ctx context.Context) (stop func(), err error) {
	if a.metrics == nil {
		return func() {}, nil
	}
	return monitor.Serve(ctx, "telemetry.Prometheus", a.cfg.Telemetry.Prometheus.Address(), a.metrics.Handler(), a.log)
}

// Metrics describes what an agent measures.
func Metrics() []monitor.Metric {
	a := &Agent{metrics: monitor.NewMetrics(&monitor.Telemetry{Prometheus: &monitor.Prometheus{}}, role, "")}
	newCounters(a.metrics)
	a.gauges(nil, nil, nil, nil)
	return a.metrics.Describe()
}
