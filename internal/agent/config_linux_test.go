package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
)

const goodConfig = `
agent {
	trust_domain = "example.org"
	server_address = "localhost"
	server_port = 8081
	trust_bundle_path = "/etc/bundle.pem"
	join_token = "3f0c8b39-5a55-4e5b-a0b6-6f7f1a1d9f3c"
	%s
}
plugins {
	KeyManager "memory" {}
	NodeAttestor "join_token" {}
	WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
	%s
}
%s`

func load(t *testing.T, inAgent, inPlugins, outside string) (*agent.Agent, error) {
	t.Helper()
	cfg := agent.Default()
	if err := config.Decode("agent.conf", fmt.Appendf(nil, goodConfig, inAgent, inPlugins, outside), &cfg); err != nil {
		return nil, err
	}
	return agent.New(cfg, logger(t, "agent"))
}

func TestConfig(t *testing.T) {
	if a, err := load(t, "", "", ""); err != nil || a.SocketPath() != "/tmp/spire-agent/public/api.sock" {
		t.Fatal(a, err)
	}
	for name, c := range map[string]struct{ inAgent, inPlugins, outside, want string }{
		"F28 insecure and a bundle": {inAgent: "insecure_bootstrap = true", want: "exclude each other"},
		"hash and a bundle":         {inAgent: `trust_bundle_hash = "` + strings.Repeat("ab", 32) + `"`, want: "exclude each other"},
		"two sources":               {inAgent: `trust_bundle_url = "https://a.test/"`, want: "exclude each other"},
		"plain http":                {inAgent: `trust_bundle_url = "http://a.test/"`, want: "trust_bundle_url: it must begin with https://"},
		"https over a socket":       {inAgent: "trust_bundle_url = \"https://a.test/\"\ntrust_bundle_unix_socket = \"/s\"", want: "must begin with http://"},
		"a socket alone":            {inAgent: `trust_bundle_unix_socket = "/s"`, want: "trust_bundle_unix_socket: needs trust_bundle_url"},
		"the agent's parameter":     {inAgent: `trust_bundle_url = "https://a.test/?spire-attest-mode=x"`, want: `"spire-attest-mode" is one that the agent sets`},
		"no Workload API":           {inAgent: `trust_bundle_spiffe_workload_api = "/s"`, want: "trust_bundle_spiffe_workload_api: "},
		"mode":                      {inAgent: `rebootstrap_mode = "now"`, want: "rebootstrap_mode: must be never, auto or always"},
		"always with a token":       {inAgent: `rebootstrap_mode = "always"`, want: "not join_token"},
		"two ways to servers":       {inAgent: `server_addresses = ["a:1"]`, want: "server_addresses excludes server_address"},
		"bad hash":                  {inAgent: `trust_bundle_hash = "xy"`, want: "64 hex digits"},
		"two tokens":                {inAgent: `join_token_file = "/t"`, want: "exclude each other"},
		"F8 long socket":            {inAgent: `socket_path = "/` + strings.Repeat("x", 108) + `"`, want: "109 bytes"},
		"relative socket":           {inAgent: `socket_path = "s"`, want: "must be an absolute path"},
		"format":                    {inAgent: `trust_bundle_format = "der"`, want: "pem or spiffe"},
		"cache":                     {inAgent: `x509_svid_cache_max_size = 0`, want: "must be positive"},
		"key type":                  {inAgent: `workload_x509_svid_key_type = "rsa-4096"`, want: "must be ec-p256, ec-p384 or rsa-2048"},
		"key of SPIRE's":            {inAgent: `profiling_port = 1`, want: "profiling_port is not offered yet"},
		"admin among the public":    {inAgent: `admin_socket_path = "/tmp/spire-agent/public/x/a.sock"`, want: "lies in the directory of a socket that workloads reach"},
		"relative admin socket":     {inAgent: `admin_socket_path = "a.sock"`, want: "not an absolute path"},
		"block of SPIRE's":          {inAgent: `experimental { x = "y" }`, want: "agent.conf:8: agent.experimental"},
		"SDS: two names alike":      {inAgent: `sds { default_all_bundles_name = "ROOTCA" }`, want: "sds: two of the default names are equal"},
		"SDS: no name":              {inAgent: `sds { default_svid_name = "" }`, want: "sds: a default name is empty"},
		"SDS: a name like an ID":    {inAgent: `sds { default_svid_name = "spiffe://x" }`, want: "sds: a default name looks like a SPIFFE ID"},
		"SDS: relative socket":      {inAgent: `sds { socket_path = "s" }`, want: "sds.socket_path: must be an absolute path"},
		"SDS: the same socket":      {inAgent: "socket_path = \"/x/s\"\nsds { socket_path = \"/x/../x/s\" }", want: "sds.socket_path: must not be socket_path"},
		"SDS: beside the default":   {inAgent: `sds { socket_path = "/tmp/spire-agent/private/s" }`, want: "sds.socket_path: "},
		"SDS: admin beside it":      {inAgent: "sds { socket_path = \"/x/s\" }\nadmin_socket_path = \"/x/a\"", want: `sds.socket_path: "/x/a" lies in`},
		"telemetry":                 {outside: `telemetry { InMem {} }`, want: "telemetry.InMem: this is not offered"},
		"unknown key":               {inAgent: `socket_pth = "/x"`, want: "socket_path"},
		"second key manager":        {inPlugins: `KeyManager "disk" { plugin_data { directory = "/x" } }`, want: "exactly one KeyManager"},
		"unknown attestor":          {inPlugins: `WorkloadAttestor "windows" {}`, want: "there are unix, k8s"},
		"unknown type":              {inPlugins: `SVIDStore "aws" {}`, want: "SVIDStore \"aws\": an agent has no plugins of this type"},
		"a plugin's own faults":     {inPlugins: `WorkloadAttestor "docker" { plugin_data { docker_version = "x" podman_socket_path = "p" } }`, want: "plugins.WorkloadAttestor \"docker\": podman_socket_path: "},
		"external plugin":           {inPlugins: `WorkloadAttestor "mine" { plugin_cmd = "/x" }`, want: "not offered yet"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, c.inAgent, c.inPlugins, c.outside)
			if err == nil || !strings.Contains(err.Error(), c.want) || fault.KindOf(err) != fault.Invalid {
				t.Errorf("got %v, want %q in it", err, c.want)
			}
		})
	}
	// Everything at once.
	cfg := agent.Default()
	err := cfg.Validate()
	for _, want := range []string{"trust_domain", "server_address", "server_port", "trust_bundle_path", "KeyManager", "NodeAttestor", "WorkloadAttestor"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}

// R112: the join token is in no print of the configuration.
func TestTokenIsNotPrinted(t *testing.T) {
	cfg := agent.Default()
	cfg.Agent.JoinToken = "very-secret"
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(verb, cfg); strings.Contains(s, "very-secret") {
			t.Errorf("%s prints the token", verb)
		}
	}
}

// F29: one line end is taken off a token file and nothing else is.
func TestJoinTokenFile(t *testing.T) {
	d := newDomain(t)
	for name, c := range map[string]struct{ before, after, reason string }{
		"newline": {after: "\n"}, "plain": {}, "CRLF": {after: "\r\n"},
		"space":         {before: " ", reason: "join_token_malformed"},
		"two newlines":  {after: "\n\n", reason: "join_token_malformed"},
		"far too large": {after: strings.Repeat("x", 1<<20), reason: "join_token_malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := d.agentConfig()
			file := filepath.Join(shortDir(t), "token")
			os.WriteFile(file, []byte(c.before+cfg.Agent.JoinToken+c.after), 0o600)
			cfg.Agent.JoinToken, cfg.Agent.JoinTokenFile = "", file
			if c.reason == "" {
				_, stop := d.agent(cfg)
				stop()
				return
			}
			a, err := agent.New(cfg, logger(t, "agent"))
			if err != nil {
				t.Fatal(err)
			}
			if err := a.Run(t.Context()); fault.ReasonOf(err) != c.reason {
				t.Errorf("Run() = %v", err)
			}
		})
	}
	for name, content := range map[string]string{"empty": "", "only a newline": "\n"} {
		cfg := d.agentConfig()
		file := filepath.Join(shortDir(t), "token")
		os.WriteFile(file, []byte(content), 0o600)
		cfg.Agent.JoinToken, cfg.Agent.JoinTokenFile = "", file
		a, err := agent.New(cfg, logger(t, "agent"))
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Run(t.Context()); fault.ReasonOf(err) != "join_token_malformed" {
			t.Errorf("%s: Run() = %v", name, err)
		}
	}
}
