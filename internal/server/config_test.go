package server_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/server"
)

const goodFile = `
server {
    bind_address = "127.0.0.1"
    bind_port = "8081"
    trust_domain = "example.org"
    data_dir = "/var/lib/plastron"
    log_level = "DEBUG"
    ca_ttl = "72h"
    ca_key_type = "ec-p384"
    default_x509_svid_ttl = "2h"
    admin_ids = ["spiffe://example.org/admin"]
    audit_log_enabled = true
    ratelimit { attestation = false }
}
plugins {
    DataStore "sql" {
        plugin_data { database_type = "sqlite3" connection_string = "/var/lib/plastron/datastore.sqlite3" }
    }
    KeyManager "disk" { plugin_data { keys_path = "/var/lib/plastron/keys.json" } }
    NodeAttestor "join_token" { plugin_data {} }
}
`

func decode(t *testing.T, text string) (server.Config, error) {
	t.Helper()
	c := server.Default()
	return c, config.Decode("server.conf", []byte(text), &c)
}

func TestConfigFile(t *testing.T) {
	c := server.Default()
	if err := config.Decode("server.conf", []byte(goodFile), &c); err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	if time.Duration(c.Server.CATTL) != 72*time.Hour || c.Server.BindPort != 8081 || c.Server.SocketPath != "/tmp/spire-server/private/api.sock" ||
		c.Server.RateLimit.Attestation == nil || *c.Server.RateLimit.Attestation || c.Server.RateLimit.Signing != nil {
		t.Errorf("decoded %+v", c.Server)
	}
}

func TestConfigFaults(t *testing.T) { // F1, F5, F8, R121
	for name, c := range map[string]struct {
		old, new string
		want     []string
	}{
		"F1 no keys":             {goodFile, "server {}", []string{"trust_domain: must be set", "data_dir: must be set"}},
		"T-ID-2":                 {`"example.org"`, `"example..org"`, []string{"trust_domain", "empty label"}},
		"an address":             {`"127.0.0.1"`, `"localhost"`, []string{"bind_address", "localhost"}},
		"a port":                 {`"8081"`, `"70000"`, []string{"bind_port", "70000"}},
		"a key type":             {"ec-p384", "ec-p521", []string{"ca_key_type", "ec-p521"}},
		"a promise of SVIDs":     {"log_level = \"DEBUG\"", "survive_outage = \"8h\"", []string{"default_x509_svid_ttl", "must be 20h or longer", "ca_ttl", "240h"}},
		"a promise of agents":    {"log_level = \"DEBUG\"", "survive_outage = \"1m\"\n agent_reattest_period = \"2m\"", []string{"agent_reattest_period", "1m0s"}},
		"too short a promise":    {"log_level = \"DEBUG\"", "survive_outage = \"59s\"", []string{"survive_outage", "between 1m and"}},
		"too long a promise":     {"log_level = \"DEBUG\"", "survive_outage = \"48h\"", []string{"survive_outage", "48h"}},
		"an admin":               {"spiffe://example.org/admin", "spiffe://example.org", []string{"admin_ids", "no path"}},
		"a short ca_ttl":         {"72h", "1s", []string{"ca_ttl", "1s"}},
		"F8 socket path":         {"log_level = \"DEBUG\"", "socket_path = \"/" + strings.Repeat("x", 108) + "\"", []string{"socket_path", "109"}},
		"what SPIRE has":         {"log_level = \"DEBUG\"", "experimental { cache_reload_interval = \"1s\" }", []string{"server.experimental", "not offered"}},
		"no pair of a rule":      {"log_level = \"DEBUG\"", "rule_pairs_per_agent = 0", []string{"rule_pairs_per_agent", "0"}},
		"several":                {"log_level = \"DEBUG\"", "profiling_enabled = true\n prune_tofu_nodes = true", []string{"profiling_enabled", "prune_tofu_nodes"}},
		"telemetry":              {"plugins {", "telemetry { InMem {} }\nplugins {", []string{"telemetry.InMem"}},
		"a store":                {`DataStore "sql"`, `DataStore "bolt"`, []string{"DataStore", "bolt", "sqlite, sql, etcd"}},
		"a key manager":          {`KeyManager "disk"`, `KeyManager "aws_kms"`, []string{"KeyManager", "aws_kms"}},
		"a node attestor":        {`NodeAttestor "join_token"`, `NodeAttestor "aws_iid"`, []string{"NodeAttestor", "aws_iid"}},
		"an upstream":            {`NodeAttestor "join_token"`, `UpstreamAuthority "disk"`, []string{"UpstreamAuthority", "cert_file_path"}},
		"a foreign upstream":     {`NodeAttestor "join_token"`, `UpstreamAuthority "vault"`, []string{"UpstreamAuthority", "vault", "there are disk"}},
		"two key managers":       {`NodeAttestor "join_token"`, `KeyManager "memory"`, []string{"KeyManager", "there are 2"}},
		"an external plugin":     {`plugin_data {}`, `plugin_cmd = "/bin/x"`, []string{"join_token", "external"}},
		"a plugin's unknown key": {"keys_path", "keys_pth", []string{"keys_pth", "keys_path"}},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(goodFile, c.old, c.new, 1)
			if text == goodFile {
				t.Fatal("the case changes nothing")
			}
			parsed := server.Default()
			err := config.Decode("server.conf", []byte(text), &parsed)
			if err == nil {
				err = parsed.Validate()
			}
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not name %q", err, want)
				}
			}
			if _, newErr := server.New(parsed, nil); newErr == nil {
				t.Error("New accepts it")
			}
		})
	}
	if _, err := decode(t, "server { trust_domian = \"a\" }"); err == nil || !strings.Contains(err.Error(), "trust_domain") {
		t.Errorf("F2: %v, want the nearest key", errors.Unwrap(err))
	}
}
