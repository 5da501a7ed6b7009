package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/plastron/plastron/internal/agentapi"
	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/localsocket"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/sds"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/ticket"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const maxServers = 100

// Types of plugins in configuration.
const (
	typeKeyManager       = "KeyManager"
	typeNodeAttestor     = "NodeAttestor"
	typeWorkloadAttestor = "WorkloadAttestor"
)

// Config is an agent's whole configuration, as a file holds it. Start from
// Default: it has the values of keys that are absent.
type Config struct {
	Agent   Settings        `hcl:"agent"`
	Plugins []config.Plugin `hcl:"plugins"`

	HealthChecks monitor.HealthChecks `hcl:"health_checks"`
	Telemetry    monitor.Telemetry    `hcl:"telemetry"`
}

// Settings is the block agent { }.
type Settings struct {
	// Ticket is a text that 'plastron server token generate' prints. It stands for
	// TrustDomain, for ServerAddress and ServerPort, for the roots by which the server
	// is recognised and for JoinToken. What is set besides wins over it. Plugins of a
	// type of which there is none get their default: keys on disk in DataDir,
	// join_token, unix. It is good for joining once; an agent that has joined still
	// finds its server by it.
	Ticket string `hcl:"ticket"`
	// TrustDomain is the name of the trust domain, such as example.org. Required
	// without a ticket.
	TrustDomain config.TrustDomain `hcl:"trust_domain"`
	// ServerAddress and ServerPort say where the server is. Required without a ticket.
	ServerAddress string `hcl:"server_address"`
	ServerPort    int    `hcl:"server_port"`
	// ServerAddresses are the servers of the trust domain, each HOST:PORT, instead of
	// ServerAddress and ServerPort. The agent begins with any of them, keeps to it, and goes
	// to the next when it cannot be reached or is of no use. At most 100.
	ServerAddresses []string `hcl:"server_addresses"`
	// DataDir holds the agent's own SVID and bundle. One agent at a time; mode 0700.
	// Default: the working directory.
	DataDir string `hcl:"data_dir"`
	// CacheDirectory is where the agent keeps what it serves, sealed with a key of its
	// KeyManager "disk", so that after a restart it serves what has not expired even
	// while no server is there. It has to be in memory (tmpfs): a copy on disk could be
	// opened by whoever gets the disk with the agent's keys. "none" keeps nothing. Default:
	// $RUNTIME_DIRECTORY, for root /run/plastron/agent, else plastron in $XDG_RUNTIME_DIR; if
	// that is not in memory, none.
	CacheDirectory string `hcl:"cache_directory"`
	// SocketPath is where the Workload API is served; at most 107 bytes.
	// Default /tmp/spire-agent/public/api.sock.
	SocketPath string `hcl:"socket_path"`
	// AdminSocketPath is where the agent answers its operator: its own user and root,
	// mode 0600. Not in the directory of SocketPath nor below it. Default: private/admin.sock
	// beside the directory of SocketPath if that is named public, so
	// /tmp/spire-agent/private/admin.sock; otherwise admin.sock in DataDir. If the
	// default cannot be made the agent logs why and runs without.
	AdminSocketPath string `hcl:"admin_socket_path"`

	// The server is first recognised by exactly one of these, or by a ticket. Later the
	// agent trusts what it has learnt from the server.

	// TrustBundlePath is a file with the trust domain's roots.
	TrustBundlePath string `hcl:"trust_bundle_path"`
	// TrustBundleFormat is pem (default) or spiffe.
	TrustBundleFormat string `hcl:"trust_bundle_format"`
	// TrustBundleURL is where the roots are fetched: https, or http over
	// TrustBundleUnixSocket, at which a local program answers.
	TrustBundleURL        string `hcl:"trust_bundle_url"`
	TrustBundleUnixSocket string `hcl:"trust_bundle_unix_socket"`
	// TrustBundleWorkloadAPI is the address of another agent's Workload API, such as
	// unix:///run/parent.sock, that gives the trust domain's bundle.
	TrustBundleWorkloadAPI string `hcl:"trust_bundle_spiffe_workload_api"`
	// TrustBundleHash is the SHA-256, in hex, of the DER of one of the roots.
	TrustBundleHash string `hcl:"trust_bundle_hash"`
	// InsecureBootstrap trusts whoever answers first. For trying things out only.
	InsecureBootstrap bool `hcl:"insecure_bootstrap"`
	// RebootstrapMode says whether that source is asked again when no server can be
	// recognised by what the agent has learnt: auto (default), never, or always, which is
	// auto and refuses to start with an attestor whose proof is good only once. What the
	// trust domain is known to have dropped is not taken from there. A source that trusts
	// whoever answers is never asked again.
	RebootstrapMode string `hcl:"rebootstrap_mode"`
	// RebootstrapDelay is how long an agent whose own SVID is in its first half waits
	// before that; one that has to renew or attest does not wait. Default 10m.
	RebootstrapDelay config.Duration `hcl:"rebootstrap_delay"`

	// JoinToken is a secret that lets this node in once; JoinTokenFile a file that
	// holds it. At most one of them.
	JoinToken     string `hcl:"join_token"`
	JoinTokenFile string `hcl:"join_token_file"`

	// X509SVIDCacheMaxSize is how many X.509-SVIDs are held, each counted once however many
	// processes share it. What an open stream is given is held in any case, past it if need
	// be; the room that is left goes to what was used last, then to the oldest entries, so
	// that it is there when somebody asks. Default 1000.
	X509SVIDCacheMaxSize int `hcl:"x509_svid_cache_max_size"`
	// JWTSVIDCacheMaxSize is for how many pairs of an identity and a set of audiences the
	// JWT-SVID is remembered, and renewed while somebody asks for it. Past that, the
	// identity that has the most loses the one unused for longest. Default 1000.
	JWTSVIDCacheMaxSize int `hcl:"jwt_svid_cache_max_size"`
	// WorkloadKeyType is the type of workloads' keys: ec-p256 (default), ec-p384 or
	// rsa-2048. RSA keys take far longer to make.
	WorkloadKeyType string `hcl:"workload_x509_svid_key_type"`

	// AllowUnauthenticatedVerifiers gives the trust domain's bundles to processes
	// without an identity. Default false.
	AllowUnauthenticatedVerifiers bool `hcl:"allow_unauthenticated_verifiers"`
	// AllowedForeignJWTClaims are returned of foreign tokens besides sub, aud and exp.
	AllowedForeignJWTClaims []string `hcl:"allowed_foreign_jwt_claims"`

	// SDS is Envoy's secret discovery. It is served at SocketPath unless DisableSDSAPI
	// is set, and also on a socket of its own if SocketPath in this block names one.
	SDS SDS `hcl:"sds"`
	// DisableSDSAPI keeps Envoy's secret discovery away from SocketPath. Its calls carry
	// no security header, so whoever talks a process into calling the socket can make
	// them. Default false.
	DisableSDSAPI bool `hcl:"disable_sds_api"`

	// LogFile is opened anew on SIGUSR2. LogLevel is PANIC, FATAL, ERROR, WARN, INFO,
	// DEBUG or TRACE; LogFormat text or json; LogSourceLocation adds the place in the
	// code. Default: standard error, INFO, text, without.
	LogLevel          string `hcl:"log_level"`
	LogFormat         string `hcl:"log_format"`
	LogFile           string `hcl:"log_file"`
	LogSourceLocation bool   `hcl:"log_source_location"`

	// Keys of SPIRE that are not offered yet. Each is refused with a sentence.
	AuthorizedDelegates config.Node `hcl:"authorized_delegates"`
	AvailabilityTarget  config.Node `hcl:"availability_target"`
	DisableWorkloadAPI  config.Node `hcl:"disable_workload_api"`
	Experimental        config.Node `hcl:"experimental"`
	LogSelectors        config.Node `hcl:"log_selectors"`
	ProfilingEnabled    config.Node `hcl:"profiling_enabled"`
	ProfilingFreq       config.Node `hcl:"profiling_freq"`
	ProfilingNames      config.Node `hcl:"profiling_names"`
	ProfilingPort       config.Node `hcl:"profiling_port"`
}

// SDS is the block sds { }.
type SDS struct {
	// SocketPath is a socket for Envoy's secret discovery alone, such as
	// /run/secrets/workload-spiffe-uds/socket, where Istio looks; at most 107 bytes.
	// Default: none.
	SocketPath string `hcl:"socket_path"`
	// DefaultSVIDName, DefaultBundleName and DefaultAllBundlesName are the resource names
	// of the process's first identity, of the trust domain's bundle, and of that together
	// with those of all trust domains that the process's grants federate with. For
	// ROOTCA to be all bundles, name the other one "null". Default default, ROOTCA, ALL.
	DefaultSVIDName       string `hcl:"default_svid_name"`
	DefaultBundleName     string `hcl:"default_bundle_name"`
	DefaultAllBundlesName string `hcl:"default_all_bundles_name"`
	// DisableSPIFFECertValidation gives bundles as plain roots, not for Envoy's validator
	// for SPIFFE, to all but those whose node metadata say otherwise by a key of this name.
	// An Envoy before 1.18 gets them so in any case. Default false.
	DisableSPIFFECertValidation bool `hcl:"disable_spiffe_cert_validation"`
}

// names are the resource names that stand for something without saying what.
func (s SDS) names() sds.Names {
	return sds.Names{SVID: s.DefaultSVIDName, Bundle: s.DefaultBundleName, AllBundles: s.DefaultAllBundlesName}
}

// addresses returns where the servers are.
func (s Settings) addresses() []string {
	if len(s.ServerAddresses) > 0 {
		return s.ServerAddresses
	}
	return []string{net.JoinHostPort(s.ServerAddress, strconv.Itoa(s.ServerPort))}
}

// String keeps the join token and the ticket out of logs.
func (s Settings) String() string { return "agent.Settings" }

// GoString keeps the join token and the ticket out of logs.
func (s Settings) GoString() string { return s.String() }

// Default returns the values of keys that are absent.
func Default() Config {
	return Config{HealthChecks: monitor.DefaultHealthChecks(), Agent: Settings{
		DataDir: ".", SocketPath: "/tmp/spire-agent/public/api.sock", TrustBundleFormat: "pem", WorkloadKeyType: "ec-p256",
		X509SVIDCacheMaxSize: mirror.DefaultCacheSize, JWTSVIDCacheMaxSize: mirror.DefaultCacheSize,
		SDS:             SDS{DefaultSVIDName: sds.DefaultSVIDName, DefaultBundleName: sds.DefaultBundleName, DefaultAllBundlesName: sds.DefaultAllBundlesName},
		RebootstrapMode: string(agentid.Auto), RebootstrapDelay: config.Duration(agentid.DefaultRebootstrapDelay),
		LogLevel: "INFO", LogFormat: "text",
	}}
}

// Validate reports everything that is wrong at once. It reads no file and changes nothing.
func (c *Config) Validate() error {
	complete, _, err := c.withTicket()
	if err != nil {
		return err
	}
	return complete.validate()
}

// validate is Validate for a configuration that the ticket has completed.
func (c *Config) validate() error {
	var faults []error
	check := func(ok bool, message string) {
		if !ok {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", "agent: %s", message))
		}
	}
	also := func(key string, err error) {
		if err != nil {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", "agent: %s: %v", key, err))
		}
	}
	s := c.Agent
	check(!s.TrustDomain.IsZero(), "trust_domain: must be set")
	if len(s.ServerAddresses) == 0 {
		check(s.ServerAddress != "", "server_address: must be set")
		check(s.ServerPort > 0 && s.ServerPort < 1<<16, "server_port: must be from 1 to 65535")
	} else {
		check(s.ServerAddress == "" && s.ServerPort == 0, "server_addresses excludes server_address and server_port")
		check(len(s.ServerAddresses) <= maxServers, "server_addresses: there are more than 100")
		for _, address := range s.ServerAddresses {
			also("server_addresses", ticket.CheckAddress(address))
		}
	}
	check(filepath.IsAbs(s.SocketPath), "socket_path: must be an absolute path")
	also("socket_path", localsocket.CheckPath(s.SocketPath))
	if s.AdminSocketPath != "" {
		also("admin_socket_path", agentapi.CheckPath(s.AdminSocketPath, s.SocketPath))
	}
	if s.SDS.SocketPath != "" {
		check(filepath.IsAbs(s.SDS.SocketPath), "sds.socket_path: must be an absolute path")
		also("sds.socket_path", localsocket.CheckPath(s.SDS.SocketPath))
		check(filepath.Clean(s.SDS.SocketPath) != filepath.Clean(s.SocketPath), "sds.socket_path: must not be socket_path, where it is served in any case")
		also("sds.socket_path", agentapi.CheckPath(s.adminSocketPath(), s.SDS.SocketPath))
	}
	also("sds", s.SDS.names().Check())
	check(s.TrustBundleFormat == "pem" || s.TrustBundleFormat == "spiffe", "trust_bundle_format: must be pem or spiffe")
	if s.TrustBundleHash != "" {
		_, err := serverlink.ParseRootHash(s.TrustBundleHash)
		also("trust_bundle_hash", err)
	}
	sources := 0
	for _, given := range []bool{s.TrustBundlePath != "", s.TrustBundleHash != "", s.TrustBundleURL != "", s.TrustBundleWorkloadAPI != "", s.InsecureBootstrap} {
		if given {
			sources++
		}
	}
	check(sources > 0 || s.Ticket != "", "trust_bundle_path, trust_bundle_url, trust_bundle_spiffe_workload_api, trust_bundle_hash or insecure_bootstrap: one must be set, so that the server can be recognised")
	check(sources < 2, "trust_bundle_path, trust_bundle_url, trust_bundle_spiffe_workload_api, trust_bundle_hash and insecure_bootstrap exclude each other") // F28
	if s.TrustBundleURL != "" {
		also("trust_bundle_url", checkBundleURL(s))
	}
	check(s.TrustBundleUnixSocket == "" || s.TrustBundleURL != "", "trust_bundle_unix_socket: needs trust_bundle_url")
	if s.TrustBundleWorkloadAPI != "" {
		also("trust_bundle_spiffe_workload_api", workloadapi.ValidateAddress(s.TrustBundleWorkloadAPI))
	}
	switch s.RebootstrapMode {
	case string(agentid.Never), string(agentid.Auto):
	case "always":
		check(!s.InsecureBootstrap, "rebootstrap_mode: always and insecure_bootstrap exclude each other")
		check(!slices.ContainsFunc(c.Plugins, func(p config.Plugin) bool { return p.On() && p.Type == typeNodeAttestor && p.Name == jointoken.Name }),
			"rebootstrap_mode: always needs a node attestor whose proof is good more than once, not join_token")
	default:
		check(false, "rebootstrap_mode: must be never, auto or always")
	}
	check(!s.InsecureBootstrap || s.Ticket == "", "insecure_bootstrap and ticket exclude each other")
	check(s.JoinToken == "" || s.JoinTokenFile == "", "join_token and join_token_file exclude each other")
	if s.JoinToken != "" {
		_, err := jointoken.Parse(s.JoinToken)
		also("join_token", err)
	}
	check(s.DataDir != "", "data_dir: must be set")
	check(s.CacheDirectory == "" || s.CacheDirectory == noCache || filepath.IsAbs(s.CacheDirectory), "cache_directory: must be an absolute path, or none")
	check(s.X509SVIDCacheMaxSize > 0, "x509_svid_cache_max_size: must be positive")
	check(s.JWTSVIDCacheMaxSize > 0, "jwt_svid_cache_max_size: must be positive")
	check(slices.Contains([]keys.Type{keys.ECP256, keys.ECP384, keys.RSA2048}, keys.Type(s.WorkloadKeyType)),
		"workload_x509_svid_key_type: must be ec-p256, ec-p384 or rsa-2048")
	for _, key := range c.notOffered() {
		if key.node.Present() {
			faults = append(faults, key.node.Fault("%s", key.sentence))
		}
	}
	faults = append(faults, c.HealthChecks.Validate(), c.Telemetry.Validate())
	faults = append(faults, c.checkPlugins()...)
	return errors.Join(faults...)
}

// adminSocketPath is where the admin socket goes.
func (s Settings) adminSocketPath() string {
	if s.AdminSocketPath != "" {
		return s.AdminSocketPath
	}
	if public := filepath.Dir(s.SocketPath); filepath.Base(public) == "public" {
		return filepath.Join(filepath.Dir(public), "private", "admin.sock")
	}
	if dir, err := filepath.Abs(s.DataDir); err == nil {
		return filepath.Join(dir, "admin.sock")
	}
	return ""
}

type notOffered struct {
	node     config.Node
	sentence string
}

// notOffered are SPIRE's keys that have no meaning here yet, with what to do instead.
func (c *Config) notOffered() []notOffered {
	s := c.Agent
	const remove = "remove it"
	row := func(n config.Node, key, instead string) notOffered {
		return notOffered{n, key + " is not offered yet: " + instead}
	}
	return []notOffered{
		row(s.AuthorizedDelegates, "authorized_delegates", remove),
		row(s.AvailabilityTarget, "availability_target", "the agent renews at half of its SVID's life"),
		row(s.DisableWorkloadAPI, "disable_workload_api", remove),
		row(s.Experimental, "experimental", "remove the block"),
		row(s.LogSelectors, "log_selectors", "selectors are never logged; remove it"),
		row(s.ProfilingEnabled, "profiling_enabled", remove),
		row(s.ProfilingFreq, "profiling_freq", remove),
		row(s.ProfilingNames, "profiling_names", remove),
		row(s.ProfilingPort, "profiling_port", remove),
	}
}

func (c *Config) checkPlugins() (faults []error) {
	fail := func(place, format string, args ...any) {
		faults = append(faults, fault.New(fault.Invalid, "config_invalid", "%s: %s", place, fmt.Sprintf(format, args...)))
	}
	known := map[string][]string{}
	for _, row := range builtin.AgentKeepers() {
		known[typeKeyManager] = append(known[typeKeyManager], row.Name)
	}
	for _, row := range builtin.NodeProvers() {
		known[typeNodeAttestor] = append(known[typeNodeAttestor], row.Name)
	}
	for _, row := range builtin.WorkloadAttestors() {
		known[typeWorkloadAttestor] = append(known[typeWorkloadAttestor], row.Name)
	}
	count := map[string]int{}
	for _, p := range c.Plugins {
		names, ok := known[p.Type]
		place := fmt.Sprintf("plugins.%s %q", p.Type, p.Name)
		switch {
		case !ok:
			fail(place, "an agent has no plugins of this type; it has KeyManager, NodeAttestor and WorkloadAttestor")
		case p.Command != "" || len(p.Args) > 0 || p.Checksum != "":
			fail(place, "plugins of your own are not offered yet")
		case !slices.Contains(names, p.Name):
			fail(place, "there is no such plugin; there are %s", strings.Join(names, ", "))
		case p.On():
			count[p.Type]++
		}
	}
	if n := count[typeKeyManager]; n != 1 {
		fail("plugins", "exactly one KeyManager is needed, there are %d", n)
	}
	if n := count[typeNodeAttestor]; n != 1 {
		fail("plugins", "exactly one NodeAttestor is needed, there are %d", n)
	}
	if count[typeWorkloadAttestor] == 0 {
		fail("plugins", "at least one WorkloadAttestor is needed")
	}
	return faults
}

// maxTokenFile is more than any join token, in bytes.
const maxTokenFile = 1 << 10

// joinToken returns the join token, from the file if it is in one. Of a file one
// line end is taken off and nothing else (F29).
func (s Settings) joinToken() (string, error) {
	if s.JoinTokenFile == "" {
		return s.JoinToken, nil
	}
	f, err := os.Open(s.JoinTokenFile)
	if err != nil {
		return "", fault.New(fault.Precondition, "join_token_unreadable", "the join token file cannot be read").Because(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return "", fault.New(fault.Precondition, "join_token_unreadable", "the join token file cannot be read").Because(err)
	}
	text := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if len(b) > maxTokenFile || text == "" {
		return "", fault.New(fault.Invalid, "join_token_malformed", "the join token file is empty, or larger than a join token can be").
			Fix("it holds the token and nothing else")
	}
	return text, nil
}
