package server

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/diskkeys"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/localsocket"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/publish"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/upstream"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Config is a server's whole configuration, as a file holds it. Start from
// Default: it has the values of keys that are absent.
type Config struct {
	Server  Settings        `hcl:"server"`
	Plugins []config.Plugin `hcl:"plugins"`

	HealthChecks monitor.HealthChecks `hcl:"health_checks"`
	Telemetry    monitor.Telemetry    `hcl:"telemetry"`
}

// Settings is the block "server".
type Settings struct {
	// BindAddress and BindPort are where agents connect; port 0 is any free one.
	// Default: 0.0.0.0 and 8081.
	BindAddress string `hcl:"bind_address"`
	BindPort    int    `hcl:"bind_port"`
	// SocketPath is the admin socket. Whoever can open it has all rights, so its
	// directory is made for this user only. Default: /tmp/spire-server/private/api.sock.
	SocketPath string `hcl:"socket_path"`
	// TrustDomain is the name below which all IDs lie. It cannot be changed later:
	// a store of another trust domain is refused.
	TrustDomain config.TrustDomain `hcl:"trust_domain"`
	// DataDir holds the keys, the audit trail, who this server is, and the store unless
	// that is elsewhere. Losing it means a new trust domain, or with a store elsewhere
	// a new server; a copy that others can read is the trust domain.
	DataDir string `hcl:"data_dir"`

	// LogFile is opened anew on SIGUSR2. LogLevel is PANIC, FATAL, ERROR, WARN, INFO,
	// DEBUG or TRACE; LogFormat text or json; LogSourceLocation adds the place in the
	// code. Default: standard error, INFO, text, without.
	LogFile           string `hcl:"log_file"`
	LogLevel          string `hcl:"log_level"`
	LogFormat         string `hcl:"log_format"`
	LogSourceLocation bool   `hcl:"log_source_location"`

	// SurviveOutage is how long every identity goes on at least when this server and
	// its store are gone, whenever that happens. All lifetimes that are not named
	// follow from it; those that are named, here and in entries, are refused if they
	// break the promise. At least 1m, at most 33.6h. Default: no promise.
	SurviveOutage config.Duration `hcl:"survive_outage"`
	// CATTL is the lifetime of signing keys. A sixth of it is the longest
	// lifetime of an SVID that a rotation cuts short only if agents are silent.
	// Default: 24h, or what survive_outage needs.
	CATTL config.Duration `hcl:"ca_ttl"`
	// CAKeyType and JWTKeyType are ec-p256, ec-p384, rsa-2048 or rsa-4096.
	// Default: ec-p256, and for JWT the CA's.
	CAKeyType  string `hcl:"ca_key_type"`
	JWTKeyType string `hcl:"jwt_key_type"`
	// JWTIssuer is the iss claim of JWT-SVIDs. Default: none.
	JWTIssuer string `hcl:"jwt_issuer"`
	// DefaultX509SVIDTTL and DefaultJWTSVIDTTL are for entries that name none; the
	// former is also the server's own. Default: 1h and 5m, or what survive_outage needs.
	DefaultX509SVIDTTL config.Duration `hcl:"default_x509_svid_ttl"`
	DefaultJWTSVIDTTL  config.Duration `hcl:"default_jwt_svid_ttl"`
	// AgentTTL is the lifetime of agents' certificates. An agent that is away
	// longer has to attest again. Default: default_x509_svid_ttl, or what
	// survive_outage needs.
	AgentTTL config.Duration `hcl:"agent_ttl"`
	// AgentReattestPeriod bounds how long an agent goes on when its node can no longer
	// prove itself, for attestors whose proof is good more than once: such agents attest
	// again at half of it. Default: agent_ttl.
	AgentReattestPeriod config.Duration `hcl:"agent_reattest_period"`

	// AdminIDs have an operator's rights over TCP. One of another trust domain
	// needs the bundle of that domain to be known.
	AdminIDs []string `hcl:"admin_ids"`
	// AuthorityMaxWait is how long a signing key that is prepared waits for agents
	// that are silent and hold a certificate. Until they have the bundle they refuse
	// what it signs. Default: 24h.
	AuthorityMaxWait config.Duration `hcl:"authority_max_wait"`
	// RulePairsPerAgent is how many different SPIFFE IDs an agent may have signed by
	// rules at a time, each counted until its last SVID ends. It bounds what a
	// compromised agent can collect; too small a value refuses processes their SVID.
	// Default: 1000.
	RulePairsPerAgent int `hcl:"rule_pairs_per_agent"`
	// RateLimit switches limits on callers off for a fleet behind one address.
	RateLimit RateLimit `hcl:"ratelimit"`
	// UnconstrainedDownstream leaves the name constraint on the trust domain out of
	// authorities that are signed for downstream servers. It is for peers whose TLS
	// library refuses name constraints on URIs. Default: false.
	UnconstrainedDownstream bool `hcl:"unconstrained_downstream"`
	// AuditLogEnabled is accepted in files from SPIRE. The audit trail, audit.log in
	// data_dir, is always written.
	AuditLogEnabled bool `hcl:"audit_log_enabled"`
	// AuditStrict refuses to sign while the audit trail cannot be made durable.
	// Default: false, which counts and reports lost events.
	AuditStrict bool `hcl:"audit_strict"`

	// What SPIRE has and this server does not offer yet: present means refused.
	CASubject            config.Node `hcl:"ca_subject"`
	DisableJWTSVIDs      config.Node `hcl:"disable_jwt_svids"`
	Federation           config.Node `hcl:"federation"`
	Experimental         config.Node `hcl:"experimental"`
	NodeInfoStaleness    config.Node `hcl:"max_attested_node_info_staleness"`
	ProxyProtocolCIDRs   config.Node `hcl:"proxy_protocol_trusted_cidrs"`
	PruneNodesExpiredFor config.Node `hcl:"prune_attested_nodes_expired_for"`
	PruneNodesBatchSize  config.Node `hcl:"prune_attested_nodes_batch_size"`
	PruneTOFUNodes       config.Node `hcl:"prune_tofu_nodes"`
	ProfilingEnabled     config.Node `hcl:"profiling_enabled"`
	ProfilingPort        config.Node `hcl:"profiling_port"`
	ProfilingFrequency   config.Node `hcl:"profiling_freq"`
	ProfilingNames       config.Node `hcl:"profiling_names"`
}

// RateLimit says which limits are kept. Default: both.
type RateLimit struct {
	Attestation *bool `hcl:"attestation"`
	Signing     *bool `hcl:"signing"`
}

// Default returns the values of keys that are absent.
func Default() Config {
	return Config{HealthChecks: monitor.DefaultHealthChecks(), Server: Settings{
		BindAddress: "0.0.0.0", BindPort: 8081, SocketPath: "/tmp/spire-server/private/api.sock",
		LogLevel: "INFO", LogFormat: "text",
		CAKeyType:         string(keys.ECP256),
		RulePairsPerAgent: serverapi.DefaultRulePairs, AuthorityMaxWait: config.Duration(authority.DefaultMaxWait),
	}}
}

// plan is what a valid configuration comes to.
type plan struct {
	caKey, jwtKey keys.Type
	life          lifetime.Set
	admins        []spiffeid.ID
	store         builtin.StoreConfig
	keeper        keys.Config
	upstream      upstream.Config // nil: none
	attestors     map[string]builtin.VerifierConfig
	notifiers     map[string]publish.Config
}

// Validate reports every fault of the configuration at once. It reads nothing
// but the configuration and writes nothing.
func (c *Config) Validate() error {
	_, err := c.plan()
	return err
}

func (c *Config) plan() (plan, error) {
	s := &c.Server
	var p plan
	var faults []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", format, args...))
		}
	}
	note := func(err error) bool {
		if err != nil {
			faults = append(faults, err)
		}
		return err == nil
	}

	check(!s.TrustDomain.IsZero(), "server.trust_domain: must be set")
	check(s.TrustDomain.IsZero() || !slices.Contains(strings.Split(s.TrustDomain.Name(), "."), ""),
		"server.trust_domain: %q has an empty label, and crypto/x509 reads no certificate with such a name", s.TrustDomain.Name())
	check(s.DataDir != "", "server.data_dir: must be set")
	check(net.ParseIP(s.BindAddress) != nil, "server.bind_address: %q is not an IP address", s.BindAddress)
	check(s.BindPort >= 0 && s.BindPort <= 65535, "server.bind_port: %d is not a port", s.BindPort)
	if err := localsocket.CheckPath(s.SocketPath); err != nil {
		note(fmt.Errorf("server.socket_path: %w", err))
	}
	check(s.DefaultX509SVIDTTL.Or(time.Second) >= time.Second, "server.default_x509_svid_ttl: %s is shorter than a second", s.DefaultX509SVIDTTL)
	check(s.DefaultJWTSVIDTTL.Or(time.Second) >= time.Second, "server.default_jwt_svid_ttl: %s is shorter than a second", s.DefaultJWTSVIDTTL)
	check(s.AuthorityMaxWait > 0, "server.authority_max_wait: %s is not a positive time", s.AuthorityMaxWait)
	check(s.RulePairsPerAgent > 0, "server.rule_pairs_per_agent: %d is less than 1", s.RulePairsPerAgent)
	check(s.AgentReattestPeriod.Or(time.Second) >= time.Second, "server.agent_reattest_period: %s is shorter than a second", s.AgentReattestPeriod)
	check(s.AgentTTL.Or(time.Second) >= time.Second, "server.agent_ttl: %s is shorter than a second", s.AgentTTL)
	check(s.CATTL.Or(authority.MinTTL) >= authority.MinTTL && time.Duration(s.CATTL)%time.Second == 0,
		"server.ca_ttl: %s is shorter than %s or not whole seconds", s.CATTL, authority.MinTTL)
	var promise []error
	p.life, promise = lifetime.Wish{
		Outage: time.Duration(s.SurviveOutage), CA: time.Duration(s.CATTL),
		X509: time.Duration(s.DefaultX509SVIDTTL), JWT: time.Duration(s.DefaultJWTSVIDTTL), Agent: time.Duration(s.AgentTTL),
	}.Resolve()
	faults = append(faults, promise...)
	if s.SurviveOutage != 0 {
		check(s.AgentReattestPeriod == 0 || time.Duration(s.AgentReattestPeriod) >= lifetime.For(time.Duration(s.SurviveOutage)),
			"server.agent_reattest_period: %s is too short for survive_outage = %q", s.AgentReattestPeriod, s.SurviveOutage)
	}
	var err error
	if p.caKey, err = keys.ParseType(s.CAKeyType); err != nil {
		note(fmt.Errorf("server.ca_key_type: %w", err))
	}
	if p.jwtKey = p.caKey; s.JWTKeyType != "" {
		if p.jwtKey, err = keys.ParseType(s.JWTKeyType); err != nil {
			note(fmt.Errorf("server.jwt_key_type: %w", err))
		}
	}
	for _, text := range s.AdminIDs {
		id, err := identity.Parse(text)
		if err == nil && id.Path() == "" {
			err = fault.New(fault.Invalid, "spiffe_id_no_path", "%q has no path", text)
		}
		if err != nil {
			note(fmt.Errorf("server.admin_ids: %w", err))
			continue
		}
		p.admins = append(p.admins, id)
	}
	note(c.HealthChecks.Validate())
	note(c.Telemetry.Validate())
	for _, u := range c.unsupported() {
		if u.node.Present() {
			note(fault.New(fault.Unsupported, "config_unsupported", "%s: %s", u.key, u.why).Fix("remove it").Because(u.node.Fault("not offered")))
		}
	}
	faults = append(faults, c.planPlugins(&p)...)
	if len(faults) > 0 {
		return plan{}, errors.Join(faults...)
	}
	return p, nil
}

type unsupported struct {
	node config.Node
	key  string
	why  string
}

func (c *Config) unsupported() []unsupported {
	s := &c.Server
	return []unsupported{
		{s.CASubject, "server.ca_subject", "the subject of authorities cannot be chosen yet"},
		{s.DisableJWTSVIDs, "server.disable_jwt_svids", "JWT-SVIDs cannot be switched off yet"},
		{s.Federation, "server.federation", "fetching and serving bundles is not offered yet"},
		{s.Experimental, "server.experimental", "none of these is offered yet"},
		{s.NodeInfoStaleness, "server.max_attested_node_info_staleness", "nodes are always read from memory, so it has no meaning"},
		{s.ProxyProtocolCIDRs, "server.proxy_protocol_trusted_cidrs", "the PROXY protocol is not offered yet"},
		{s.PruneNodesExpiredFor, "server.prune_attested_nodes_expired_for", "pruning of nodes is not offered yet"},
		{s.PruneNodesBatchSize, "server.prune_attested_nodes_batch_size", "pruning of nodes is not offered yet"},
		{s.PruneTOFUNodes, "server.prune_tofu_nodes", "pruning of nodes is not offered yet"},
		{s.ProfilingEnabled, "server.profiling_enabled", "profiling is not offered"},
		{s.ProfilingPort, "server.profiling_port", "profiling is not offered"},
		{s.ProfilingFrequency, "server.profiling_freq", "profiling is not offered"},
		{s.ProfilingNames, "server.profiling_names", "profiling is not offered"},
	}
}

// planPlugins reads the plugin blocks. Without one of a kind the server has a
// store in data_dir, keys on disk, and attests by join token.
func (c *Config) planPlugins(p *plan) (faults []error) {
	p.attestors, p.notifiers = map[string]builtin.VerifierConfig{}, map[string]publish.Config{}
	count := map[string]int{}
	fail := func(pl config.Plugin, kind fault.Kind, format string, args ...any) {
		faults = append(faults, fault.New(kind, "plugin_invalid", "plugins.%s %q: %s", pl.Type, pl.Name, fmt.Sprintf(format, args...)))
	}
	for _, pl := range c.Plugins {
		if !pl.On() {
			continue
		}
		count[pl.Type]++
		if pl.Command != "" {
			fail(pl, fault.Unsupported, "external plugins are not offered yet")
			continue
		}
		var target any
		var names []string
		switch pl.Type {
		case "DataStore":
			for _, s := range builtin.Stores() {
				names = append(names, s.Name)
				if s.Name == pl.Name {
					p.store = s.New()
					target = p.store
				}
			}
		case "KeyManager":
			for _, k := range builtin.KeyManagers() {
				names = append(names, k.Name)
				if k.Name == pl.Name {
					p.keeper = k.New()
					target = p.keeper
				}
			}
		case "UpstreamAuthority":
			for _, u := range builtin.Upstreams() {
				names = append(names, u.Name)
				if u.Name == pl.Name {
					p.upstream = u.New()
					target = p.upstream
				}
			}
		case "NodeAttestor":
			for _, a := range builtin.NodeAttestors() {
				names = append(names, a.Name)
				if a.Name != pl.Name {
					continue
				}
				if p.attestors[a.Name] != nil {
					fail(pl, fault.Invalid, "it is there twice")
				}
				p.attestors[a.Name] = a.New()
				target = p.attestors[a.Name]
			}
		case "Notifier":
			for _, n := range builtin.Notifiers() {
				names = append(names, n.Name)
				if n.Name != pl.Name {
					continue
				}
				if p.notifiers[n.Name] != nil {
					fail(pl, fault.Invalid, "it is there twice")
				}
				p.notifiers[n.Name] = n.New()
				target = p.notifiers[n.Name]
			}
		default:
			fail(pl, fault.Unsupported, "plugins of this type are not offered yet; there are DataStore, KeyManager, UpstreamAuthority, NodeAttestor, Notifier")
			continue
		}
		if target == nil {
			fail(pl, fault.Unsupported, "there is no such plugin yet; there are %s", strings.Join(names, ", "))
			continue
		}
		if err := pl.Configure(target); err != nil {
			faults = append(faults, err)
		}
	}
	for _, kind := range []string{"DataStore", "KeyManager", "UpstreamAuthority"} {
		if count[kind] > 1 {
			faults = append(faults, fault.New(fault.Invalid, "plugin_invalid", "plugins.%s: there are %d, and there can be one", kind, count[kind]))
		}
	}
	if p.store == nil {
		p.store = builtin.Stores()[0].New()
	}
	if p.keeper == nil && count["KeyManager"] == 0 {
		p.keeper = &diskkeys.Config{}
	}
	if disk, ok := p.keeper.(*diskkeys.Config); ok && disk.Path == "" {
		disk.Path = filepath.Join(c.Server.DataDir, "keys.json")
	}
	if count["NodeAttestor"] == 0 {
		p.attestors[jointoken.Name] = &jointoken.Config{}
	}
	return faults
}

func (s *Settings) address() string { return net.JoinHostPort(s.BindAddress, strconv.Itoa(s.BindPort)) }
