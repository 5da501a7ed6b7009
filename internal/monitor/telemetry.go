package monitor

import (
	"cmp"
	"errors"
	"net"
	"regexp"
	"strconv"
	"strings"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
)

// Telemetry is the block telemetry { }.
type Telemetry struct {
	// Prometheus is where metrics can be read. Default: nowhere, and then nothing is
	// counted.
	Prometheus *Prometheus `hcl:"Prometheus"`
	// MetricPrefix is the first part of all names. Default: plastron_server or
	// plastron_agent.
	MetricPrefix string `hcl:"MetricPrefix"`
	// AllowedPrefixes and BlockedPrefixes are beginnings of names to show or not to
	// show, whole names included; the longest that fits decides. With
	// AllowedPrefixes what fits none is not shown. go_ and process_, the metrics of Go
	// and of the process, are taken as a whole. Default: all.
	AllowedPrefixes []string `hcl:"AllowedPrefixes"`
	BlockedPrefixes []string `hcl:"BlockedPrefixes"`
	// EnableHostnameLabel gives each metric the label host, EnableTrustDomainLabel
	// the label trust_domain. Default: false.
	EnableHostnameLabel    bool `hcl:"EnableHostnameLabel"`
	EnableTrustDomainLabel bool `hcl:"EnableTrustDomainLabel"`

	// What SPIRE has and we do not offer: present means refused.
	AllowedLabels config.Node `hcl:"AllowedLabels"`
	BlockedLabels config.Node `hcl:"BlockedLabels"`
	DogStatsd     config.Node `hcl:"DogStatsd"`
	InMem         config.Node `hcl:"InMem"`
	M3            config.Node `hcl:"M3"`
	Statsd        config.Node `hcl:"Statsd"`
}

// Prometheus is the block telemetry { Prometheus { } }.
type Prometheus struct {
	// Host and Port are where the metrics are, at /metrics. Whoever can connect can
	// read them. Default: localhost and 9988.
	Host string `hcl:"host"`
	Port *int   `hcl:"port"`

	TLS config.Node `hcl:"tls"` // not offered
}

const defaultPort = 9988

var namePattern = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_]{0,63}$`)

// Address is where to listen.
func (p *Prometheus) Address() string {
	port := defaultPort
	if p.Port != nil {
		port = *p.Port
	}
	return net.JoinHostPort(cmp.Or(p.Host, "localhost"), strconv.Itoa(port))
}

// Validate reports every fault at once.
func (t *Telemetry) Validate() error {
	var faults []error
	refuse := func(key string, node config.Node, instead string) {
		if node.Present() {
			faults = append(faults, fault.New(fault.Invalid, "config_unsupported", "telemetry.%s: this is not offered", key).Fix("%s", instead))
		}
	}
	const collector = "remove it and use the block Prometheus: a collector such as Telegraf or OpenTelemetry's reads it and passes it on in this form"
	refuse("DogStatsd", t.DogStatsd, collector)
	refuse("M3", t.M3, collector)
	refuse("Statsd", t.Statsd, collector)
	refuse("InMem", t.InMem, "remove it and use the block Prometheus: it says what counts at any moment")
	const relabel = "remove it; no label holds many values, and Prometheus drops those that you name with metric_relabel_configs"
	refuse("AllowedLabels", t.AllowedLabels, relabel)
	refuse("BlockedLabels", t.BlockedLabels, relabel)
	if p := t.Prometheus; p != nil {
		if p.Port != nil && *p.Port > 65535 {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", "telemetry.Prometheus.port: %d is not a port", *p.Port))
		}
		refuse("Prometheus.tls", p.TLS, "remove it, leave host at localhost, and put what ends TLS in front of it")
	}
	if t.MetricPrefix != "" && !namePattern.MatchString(t.MetricPrefix) {
		faults = append(faults, fault.New(fault.Invalid, "config_invalid", "telemetry.MetricPrefix: no metric's name can begin with %q", t.MetricPrefix).
			Fix("use letters, digits and underscores, a letter first"))
	}
	return errors.Join(faults...)
}

// shows says whether a metric of a name is shown.
func (t *Telemetry) shows(name string) bool {
	longest := func(prefixes []string) int {
		n := -1
		for _, p := range prefixes {
			if strings.HasPrefix(name, p) {
				n = max(n, len(p))
			}
		}
		return n
	}
	allowed, blocked := longest(t.AllowedPrefixes), longest(t.BlockedPrefixes)
	if len(t.AllowedPrefixes) == 0 {
		return blocked < 0
	}
	return allowed > blocked
}
