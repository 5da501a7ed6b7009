package monitor

import (
	"cmp"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Limits of the endpoint (R97).
const (
	scrapeLimit    = 10 * time.Second
	maxScrapes     = 4   // at once
	maxSeries      = 500 // of one metric
	maxLabel       = 100 // bytes
	metricsPath    = "/metrics"
	namePrefix     = "plastron_"
	smallestBucket = 0.0005 // seconds
)

// Metrics is what one process measures. A nil *Metrics measures nothing and
// costs nothing. Labels have few values, known beforehand: methods, codes, kinds,
// reasons; never an ID, a name or an address.
type Metrics struct {
	telemetry *Telemetry
	registry  *prometheus.Registry
	into      prometheus.Registerer
	prefix    string
	rows      []Metric
}

// Metric describes one metric, for the documentation.
type Metric struct {
	Name, Kind, Help string
	Labels           []string
}

// NewMetrics returns the metrics of a role ("server" or "agent"), or nil if
// nobody can read them.
func NewMetrics(t *Telemetry, role, trustDomain string) *Metrics {
	if t.Prometheus == nil {
		return nil
	}
	m := &Metrics{telemetry: t, registry: prometheus.NewRegistry(), prefix: cmp.Or(t.MetricPrefix, namePrefix+role) + "_"}
	labels := prometheus.Labels{}
	if host, err := os.Hostname(); t.EnableHostnameLabel && err == nil {
		labels["host"] = host
	}
	if t.EnableTrustDomainLabel {
		labels["trust_domain"] = trustDomain
	}
	own := prometheus.WrapRegistererWith(labels, m.registry)
	if t.shows("go_") {
		own.MustRegister(collectors.NewGoCollector())
	}
	if t.shows("process_") {
		own.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	}
	m.into = prometheus.WrapRegistererWithPrefix(m.prefix, own)
	return m
}

func (m *Metrics) add(kind, name, help string, labels []string, c prometheus.Collector) {
	if m.telemetry.shows(m.prefix + name) {
		m.into.MustRegister(c)
	}
	m.rows = append(m.rows, Metric{Name: m.prefix + name, Kind: kind, Help: help, Labels: labels})
}

// Describe returns what was added, by name.
func (m *Metrics) Describe() []Metric {
	return slices.SortedFunc(slices.Values(m.rows), func(a, b Metric) int { return strings.Compare(a.Name, b.Name) })
}

// Counter adds a counter and returns what counts one event, given the values of
// its labels.
func (m *Metrics) Counter(name, help string, labels ...string) func(values ...string) {
	if m == nil {
		return func(...string) {}
	}
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	m.add("counter", name, help, labels, c)
	if len(labels) == 0 {
		c.WithLabelValues() // so that 0 is shown
	}
	limit := &series{}
	return func(values ...string) { c.WithLabelValues(limit.plain(values)...).Inc() }
}

// Histogram adds a histogram of times and returns what adds one time to it.
func (m *Metrics) Histogram(name, help string, labels ...string) func(took time.Duration, values ...string) {
	if m == nil {
		return func(time.Duration, ...string) {}
	}
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(smallestBucket, 4, 9)}, labels)
	m.add("histogram", name, help, labels, h)
	if len(labels) == 0 {
		h.WithLabelValues()
	}
	limit := &series{}
	return func(took time.Duration, values ...string) {
		h.WithLabelValues(limit.plain(values)...).Observe(took.Seconds())
	}
}

// series are the sets of values that the labels of one metric have had. A peer
// may have chosen one, such as the reason with which a server refuses: then it
// is held to words, and to so many of them (R97, R104).
type series struct {
	known sync.Map
	count atomic.Int32
}

func (s *series) plain(values []string) []string {
	const other = "other"
	for i, v := range values {
		if len(v) > maxLabel || strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r > '~' }) {
			values[i] = other
		}
	}
	key := strings.Join(values, " ")
	if _, ok := s.known.Load(key); ok || len(values) == 0 {
		return values
	}
	if s.count.Load() >= maxSeries {
		return slices.Repeat([]string{other}, len(values))
	}
	if _, ok := s.known.LoadOrStore(key, nil); !ok {
		s.count.Add(1)
	}
	return values
}

// Total adds a counter that is kept elsewhere; read is called when somebody asks.
func (m *Metrics) Total(name, help string, read func() float64) {
	if m != nil {
		m.add("counter", name, help, nil, prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, read))
	}
}

// Gauge adds a value that goes up and down; read is called when somebody asks.
func (m *Metrics) Gauge(name, help string, read func() float64) {
	if m != nil {
		m.add("gauge", name, help, nil, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read))
	}
}

// Gauges adds values that go up and down, one for each set of values of its
// labels that read gives when somebody asks.
func (m *Metrics) Gauges(name, help string, labels []string, read func(give func(value float64, values ...string))) {
	if m != nil {
		m.add("gauge", name, help, labels, &values{prometheus.NewDesc(name, help, labels, nil), prometheus.GaugeValue, read})
	}
}

// Totals is Gauges for counters that are kept elsewhere.
func (m *Metrics) Totals(name, help string, labels []string, read func(give func(value float64, values ...string))) {
	if m != nil {
		m.add("counter", name, help, labels, &values{prometheus.NewDesc(name, help, labels, nil), prometheus.CounterValue, read})
	}
}

// Info adds a constant that tells the version.
func (m *Metrics) Info(version string) {
	m.Gauges("info", "Always 1; the label says which version runs.", []string{"version"}, func(give func(float64, ...string)) { give(1, version) })
}

// Health adds the outcomes of the checks that are made when somebody asks.
func (m *Metrics) Health(checks func() []Check) {
	const help = "What /ready says of each check: 0 ok, 1 degraded, 2 failing."
	m.Gauges("health_check", help, []string{"check"}, func(give func(float64, ...string)) {
		for name, result := range Examine(checks()).Checks {
			give(map[State]float64{OK: 0, Degraded: 1, Failing: 2}[result.Status], name)
		}
	})
}

// values are read when somebody asks.
type values struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	read func(func(float64, ...string))
}

// Describe implements prometheus.Collector.
func (v *values) Describe(to chan<- *prometheus.Desc) { to <- v.desc }

// Collect implements prometheus.Collector.
func (v *values) Collect(to chan<- prometheus.Metric) {
	v.read(func(value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(v.desc, v.kind, value, labels...)
	})
}

// Handler answers scrapes.
func (m *Metrics) Handler() http.Handler {
	scrape := promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes, Timeout: scrapeLimit})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != metricsPath:
			http.NotFound(w, r)
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
		default:
			scrape.ServeHTTP(w, r)
		}
	})
}
