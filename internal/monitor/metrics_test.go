package monitor_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/monitor"
)

// telemetry reads a block as a role does.
func telemetry(t *testing.T, text string) *monitor.Telemetry {
	t.Helper()
	var file struct {
		Telemetry monitor.Telemetry `hcl:"telemetry"`
	}
	if err := config.Decode("test", []byte("telemetry {\n"+text+"\n}"), &file); err != nil {
		t.Fatal(err)
	}
	return &file.Telemetry
}

// scrape returns the lines that are samples.
func scrape(t *testing.T, m *monitor.Metrics) []string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	var samples []string
	for line := range strings.Lines(w.Body.String()) {
		if !strings.HasPrefix(line, "#") {
			samples = append(samples, strings.TrimSpace(line))
		}
	}
	return samples
}

func has(samples []string, want string) bool {
	for _, s := range samples {
		if s == want {
			return true
		}
	}
	return false
}

func count(samples []string, prefix string) (n int) {
	for _, s := range samples {
		if strings.HasPrefix(s, prefix) {
			n++
		}
	}
	return n
}

// measure adds one metric of each kind and uses it.
func measure(m *monitor.Metrics) {
	things := m.Counter("things_total", "Things.", "kind")
	things("a")
	things("a")
	m.Counter("plain_total", "Plain.")
	took := m.Histogram("thing_seconds", "Time.")
	took(3 * time.Second)
	m.Total("lost_total", "Lost.", func() float64 { return 7 })
	m.Gauge("size", "Size.", func() float64 { return 1.5 })
	m.Gauges("state", "State.", []string{"which"}, func(give func(float64, ...string)) { give(2, "x"); give(3, "y") })
	m.Totals("gone_total", "Gone.", []string{"why"}, func(give func(float64, ...string)) { give(4, "z") })
	m.Info("v1")
	m.Health(func() []monitor.Check {
		return []monitor.Check{{Name: "good", Run: works}, {Name: "so", Run: fails("x"), Degrades: true}, {Name: "bad", Run: fails("y")}}
	})
}

func TestMetrics(t *testing.T) {
	m := monitor.NewMetrics(telemetry(t, `Prometheus {}`), "server", "example.org")
	measure(m)
	samples := scrape(t, m)
	for _, want := range []string{
		`plastron_server_things_total{kind="a"} 2`, `plastron_server_plain_total 0`, `plastron_server_thing_seconds_sum 3`,
		`plastron_server_thing_seconds_count 1`, `plastron_server_lost_total 7`, `plastron_server_gone_total{why="z"} 4`, `plastron_server_size 1.5`,
		`plastron_server_state{which="x"} 2`, `plastron_server_state{which="y"} 3`, `plastron_server_info{version="v1"} 1`,
		`plastron_server_health_check{check="good"} 0`, `plastron_server_health_check{check="so"} 1`, `plastron_server_health_check{check="bad"} 2`,
	} {
		if !has(samples, want) {
			t.Errorf("no sample %s", want)
		}
	}
	if count(samples, "go_") == 0 || count(samples, "process_") == 0 {
		t.Error("nothing of Go or of the process")
	}
	for _, tt := range []struct {
		method, path string
		want         int
	}{{"HEAD", "/metrics", 200}, {"POST", "/metrics", 405}, {"GET", "/", 404}, {"GET", "/debug/pprof/", 404}} {
		w := httptest.NewRecorder()
		m.Handler().ServeHTTP(w, httptest.NewRequest(tt.method, tt.path, nil))
		if w.Code != tt.want {
			t.Errorf("%s %s: %d, want %d", tt.method, tt.path, w.Code, tt.want)
		}
	}
}

func TestNoMetrics(t *testing.T) { // what nobody can read is not counted
	m := monitor.NewMetrics(telemetry(t, ``), "server", "example.org")
	if m != nil {
		t.Fatalf("NewMetrics() = %v without an endpoint", m)
	}
	measure(m)
}

func TestTelemetryKeys(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	labels := fmt.Sprintf(`{host=%q,trust_domain="example.org"} 1.5`, host)
	for text, want := range map[string]struct{ shown, hidden string }{
		`MetricPrefix = "spire_server"`:                                                                   {"spire_server_size 1.5", "plastron_server_size"},
		"EnableHostnameLabel = true\nEnableTrustDomainLabel = true":                                       {"plastron_server_size" + labels, "plastron_server_size 1.5"},
		"EnableHostnameLabel = false":                                                                     {"plastron_server_size 1.5", "plastron_server_size{"},
		`BlockedPrefixes = ["plastron_server_thing", "go_"]`:                                              {"plastron_server_size 1.5", "plastron_server_thing"},
		`BlockedPrefixes = ["process_"]`:                                                                  {"plastron_server_size 1.5", "process_"},
		`AllowedPrefixes = ["plastron_server_s"]`:                                                         {"plastron_server_size 1.5", "plastron_server_lost"},
		"AllowedPrefixes = [\"plastron_\"]\nBlockedPrefixes = [\"plastron_server_thing\"]":                {"plastron_server_size 1.5", "plastron_server_thing"},
		"BlockedPrefixes = [\"plastron_server_\", \"go_\"]\nAllowedPrefixes = [\"plastron_server_size\"]": {"plastron_server_size 1.5", "go_"},
	} {
		m := monitor.NewMetrics(telemetry(t, "Prometheus {}\n"+text), "server", "example.org")
		measure(m)
		samples := scrape(t, m)
		if !has(samples, want.shown) || count(samples, want.hidden) > 0 {
			t.Errorf("%s: %s is to be shown, %s is not: %q", text, want.shown, want.hidden, samples)
		}
	}
}

func TestTelemetryValidate(t *testing.T) {
	for text, want := range map[string]struct{ place, reason string }{
		``:                                       {},
		`Prometheus { port = 9988 }`:             {},
		`Prometheus { port = "9988" }`:           {},
		`Prometheus { port = 65536 }`:            {"telemetry.Prometheus.port: ", "config_invalid"},
		`Prometheus { tls { cert_file = "x" } }`: {"telemetry.Prometheus.tls: ", "config_unsupported"},
		`DogStatsd = [{ address = "localhost:8125" }]`: {"telemetry.DogStatsd: ", "config_unsupported"},
		`Statsd = [{ address = "localhost:8125" }]`:    {"telemetry.Statsd: ", "config_unsupported"},
		`M3 = [{ address = "x", env = "y" }]`:          {"telemetry.M3: ", "config_unsupported"},
		`InMem {}`:                                     {"telemetry.InMem: ", "config_unsupported"},
		`AllowedLabels = ["a"]`:                        {"telemetry.AllowedLabels: ", "config_unsupported"},
		`BlockedLabels = []`:                           {"telemetry.BlockedLabels: ", "config_unsupported"},
		`MetricPrefix = "9"`:                           {"telemetry.MetricPrefix: ", "config_invalid"},
		`MetricPrefix = "a-b"`:                         {"telemetry.MetricPrefix: ", "config_invalid"},
	} {
		err := telemetry(t, text).Validate()
		if want.place == "" {
			if err != nil {
				t.Errorf("%s: %v", text, err)
			}
			continue
		}
		if err == nil || !strings.HasPrefix(err.Error(), want.place) || fault.ReasonOf(err) != want.reason {
			t.Errorf("%s: %v, want %s… and %s", text, err, want.place, want.reason)
		}
		if f, ok := err.(interface{ Unwrap() []error }); !ok || len(f.Unwrap()) != 1 || want.reason == "config_unsupported" && !strings.Contains(err.Error(), "; remove it") {
			t.Errorf("%s: %v does not say what to do", text, err)
		}
	}
	for text, want := range map[string]string{
		`Prometheus {}`: "localhost:9988", `Prometheus { port = 0 }`: "localhost:0", `Prometheus { host = "::1" port = 1 }`: "[::1]:1",
	} {
		if got := telemetry(t, strings.ReplaceAll(text, `" port`, "\"\nport")).Prometheus.Address(); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

// A peer that chooses the value of a label cannot make ever more series, or ones
// that are no words (R97, R104).
func TestSeriesAreBounded(t *testing.T) {
	m := monitor.NewMetrics(telemetry(t, "Prometheus {}"), "server", "example.org")
	refused := m.Counter("refusals_total", "Refusals.", "reason")
	for _, hostile := range []string{strings.Repeat("a", 101), "a b", "a\nb", "\xff", "ä"} {
		refused(hostile)
	}
	if samples := scrape(t, m); !has(samples, `plastron_server_refusals_total{reason="other"} 5`) {
		t.Errorf("%q", samples)
	}
	for i := range 10_000 {
		refused(fmt.Sprint("reason_", i))
	}
	refused("reason_0")
	samples := scrape(t, m)
	if n := count(samples, "plastron_server_refusals_total"); n > 501 || !has(samples, `plastron_server_refusals_total{reason="reason_0"} 2`) {
		t.Errorf("%d series", n)
	}
}
