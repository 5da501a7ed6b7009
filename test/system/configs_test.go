package system_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf16"
)

// A sound configuration of each role; DIR stands for a fresh directory, PORT for
// a free port. Rows change one line of it.
const (
	soundServer = `server {
  bind_address = "127.0.0.1"
  bind_port    = PORT
  socket_path  = "DIR/admin/api.sock"
  trust_domain = "example.org"
  data_dir     = "DIR/data"
  ca_ttl       = "24h"
}
plugins {
  DataStore "sqlite" { plugin_data {} }
  KeyManager "disk" { plugin_data { keys_path = "DIR/data/keys.json" } }
  NodeAttestor "join_token" { plugin_data {} }
}
`
	soundAgent = `agent {
  data_dir          = "DIR/data"
  server_address    = "127.0.0.1"
  server_port       = PORT
  socket_path       = "DIR/public/api.sock"
  trust_domain      = "example.org"
  trust_bundle_path = "DIR/bundle.pem"
  join_token        = "JYNEXWDKWZDTPCCLGSX3OX7Q4E"
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "disk" { plugin_data { directory = "DIR/data" } }
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
}
`
)

// fillConfig puts directory and port into a configuration.
func fillConfig(d *deployment, text string) string {
	return strings.NewReplacer("DIR", d.dir, "PORT", fmt.Sprint(d.port)).Replace(text)
}

// refusedConfig starts a role with a configuration that must end it with errors
// which name the file and hold all of want, before anything is written.
func refusedConfig(t *testing.T, role, text string, flags []string, want ...string) {
	t.Helper()
	d := newDeployment(t)
	d.write("x.conf", fillConfig(d, text))
	began := time.Now()
	printed := refusedCommand(t, nil, append([]string{role, "run", "-config", d.path("x.conf")}, flags...)...)
	if took := time.Since(began); took > patience/2 {
		t.Errorf("it took %v", took)
	}
	if !strings.Contains(printed, d.path("x.conf")) || !strings.HasPrefix(printed, "Error: ") || strings.Contains(printed, "level=") {
		t.Errorf("printed %q, want an error that begins with the file, and no log", printed)
	}
	for _, w := range want {
		if !strings.Contains(printed, w) {
			t.Errorf("printed %q, want it to hold %q", printed, w)
		}
	}
	if len(printed) > 16<<10 {
		t.Errorf("the error has %d bytes", len(printed))
	}
	if strings.Contains(printed, "canary") { // F15
		t.Errorf("a secret is printed: %s", printed)
	}
	d.onlyFiles(t, "x.conf")
}

// onlyFiles checks that the directory holds these files and nothing else.
func (d *deployment) onlyFiles(t *testing.T, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, e := range entries {
		have = append(have, e.Name())
	}
	if fmt.Sprint(have) != fmt.Sprint(names) {
		t.Errorf("there are %v, want %v", have, names)
	}
}

// replaced changes the one place of a configuration that holds old.
func replaced(t *testing.T, text, old, new string) string {
	t.Helper()
	if strings.Count(text, old) != 1 {
		t.Fatalf("%q is there %d times", old, strings.Count(text, old))
	}
	return strings.Replace(text, old, new, 1)
}

// Corpus F through `server run` and `agent run`: what is wrong with a
// configuration is one answer with file, line, key and, for a name, the nearest
// valid one; nothing is started and nothing written.
func TestCorpusF(t *testing.T) {
	t.Parallel()
	const server, agent = soundServer, soundAgent
	deep := strings.Repeat("a {", 10_000)
	var keys strings.Builder
	for i := range 60_000 { // as many as a file may hold; 1e6 are over its size
		fmt.Fprintf(&keys, "k%d = 1\n", i)
	}
	for _, row := range []struct {
		name, role, text, old, new string
		want                       []string
	}{
		{"F1 empty", "server", "", "", "", []string{"trust_domain: must be set", "data_dir: must be set"}},
		{"F1 empty", "agent", "", "", "", []string{"trust_domain: must be set", "server_address: must be set", "server_port", "trust_bundle_path", "KeyManager", "NodeAttestor", "WorkloadAttestor"}},
		{"F2 unknown key", "server", server, "bind_address", "bind_adress", []string{":2: ", "bind_adress", `did you mean "bind_address"?`}},
		{"F2 unknown key", "agent", agent, "server_port", "serverport", []string{":4: ", "serverport", `did you mean "server_port"?`}},
		{"F2 unknown block", "server", server, "server {", "sever {", []string{":1: ", "sever", `did you mean "server"?`}},
		{"F2 unknown block", "agent", agent, "plugins {", "plugin {", []string{":10: ", `did you mean "plugins"?`}},
		{"F2 in a plugin", "server", server, "keys_path", "key_path", []string{":11: ", "KeyManager", "key_path", `did you mean "keys_path"?`}},
		{"F2 in a plugin", "agent", agent, "discover_workload_path", "discover_workload", []string{":13: ", "WorkloadAttestor", `did you mean "discover_workload_path"?`}},
		{"F2 beside plugin_data", "server", server, `"disk" { plugin_data`, `"disk" { plugin_dat`, []string{":11: ", "plugin_dat", `did you mean "plugin_data"?`}},
		{"F2 unknown plugin", "server", server, `"disk"`, `"disc"`, []string{":11: ", "KeyManager", "disc", "disk, memory"}},
		{"F2 unknown plugin", "agent", agent, `WorkloadAttestor "unix"`, `WorkloadAttestor "linux"`, []string{":13: ", "linux", "unix"}},
		{"F2 unknown second plugin", "server", server, `NodeAttestor "join_token" { plugin_data {} }`, "NodeAttestor \"join_token\" { plugin_data {} }\n  NodeAttestor \"join_tokens\" { plugin_data {} }", []string{":13: ", "join_tokens", "join_token"}},
		{"F2 unknown type", "server", server, "KeyManager", "KeyManger", []string{":11: ", "KeyManger", "KeyManager"}},
		{"F3 duplicate key", "server", server, `ca_ttl       = "24h"`, "ca_ttl = \"24h\"\n  ca_ttl = \"12h\"", []string{":8: ", "ca_ttl", "line 7"}},
		{"F3 duplicate key", "agent", agent, "server_port       = PORT", "server_port = PORT\n  server_port = 1", []string{":5: ", "server_port", "line 4"}},
		{"F3 duplicate block", "server", server, "plugins {", "server {}\nplugins {", []string{":9: ", "server", "line 1"}},
		{"F3 duplicate plugin", "server", server, "plugins {", "plugins {\n  KeyManager \"disk\" { plugin_data {} }", []string{":12: ", "KeyManager"}},
		{"F3 two stores", "server", server, "plugins {", "plugins {\n  DataStore \"sql\" { plugin_data { database_type = \"sqlite3\" } }", []string{"DataStore"}},
		{"F4 text for a number", "server", server, "PORT", `"http"`, []string{":3: ", "bind_port"}},
		{"F4 number for text", "agent", agent, `"127.0.0.1"`, `127`, []string{":3: ", "server_address"}},
		{"F4 number for a duration", "server", server, `"24h"`, "24", []string{":7: ", "ca_ttl"}},
		{"F4 no unit", "server", server, `"24h"`, `"5"`, []string{":7: ", "ca_ttl"}},
		{"F4 negative", "server", server, `"24h"`, `"-24h"`, []string{":7: ", "ca_ttl"}},
		{"F4 negative port", "agent", agent, "PORT", "-1", []string{":4: ", "server_port"}},
		{"F4 port of five digits", "server", server, "PORT", "65536", []string{":3: ", "bind_port"}},
		{"F4 block for a value", "server", server, `bind_address = "127.0.0.1"`, "bind_address {}", []string{":2: ", "bind_address"}},
		{"F4 value for a block", "server", server, "plugin_data { keys_path", "plugin_data = 1 plugin_dat2 { keys_path", []string{":11: "}},
		{"F8 socket path of 109 bytes", "server", server, `"DIR/admin/api.sock"`, `"/tmp/` + strings.Repeat("s", 104) + `"`, []string{":4: ", "socket_path", "109 bytes"}},
		{"F8 socket path of 109 bytes", "agent", agent, `"DIR/public/api.sock"`, `"/tmp/` + strings.Repeat("s", 104) + `"`, []string{":5: ", "socket_path", "109 bytes"}},
		{"F12 plugin of one's own", "server", server, `NodeAttestor "join_token" {`, `NodeAttestor "mine" { plugin_cmd = "bin/mine"`, []string{":12: ", "mine"}},
		{"F12 plugin of one's own", "agent", agent, `NodeAttestor "join_token" {`, `NodeAttestor "mine" { plugin_cmd = "bin/mine"`, []string{":11: ", "mine"}},
		{"F15 other database", "server", server, `"sqlite" { plugin_data {} }`, `"sql" { plugin_data { database_type = "postgres" connection_string = "host=db password=canary" } }`, []string{":10: ", "sslmode=verify-full"}},
		{"F15 password in a key that is not known", "server", server, `"sqlite" { plugin_data {} }`, `"sql" { plugin_data { database_type = "sqlite3" passwrd = "canary" } }`, []string{":10: ", "passwrd"}},
		{"F15 password of the wrong type", "server", server, `"sqlite" { plugin_data {} }`, `"sql" { plugin_data { database_type = "sqlite3" connection_string = ["canary"] } }`, []string{":10: ", "connection_string"}},
		{"F15 secret beside a syntax error", "agent", agent, `"JYNEXWDKWZDTPCCLGSX3OX7Q4E"`, `"canary`, []string{":8: "}},
		{"F19 template that reads the environment", "server", server, `"join_token" { plugin_data {} }`, "\"x509pop\" {\n    plugin_data {\n      ca_bundle_path = \"DIR/ca.pem\"\n      agent_path_template = " + strconv.Quote(`/x509pop/{{ env "HOME" }}`) + "\n    }\n  }", []string{":15: ", "agent_path_template", "env"}},
		{"F19 template that includes another", "server", server, `"join_token" { plugin_data {} }`, "\"x509pop\" {\n    plugin_data {\n      ca_bundle_path = \"DIR/ca.pem\"\n      agent_path_template = " + strconv.Quote(`/x509pop/{{ include "x" }}`) + "\n    }\n  }", []string{":15: ", "agent_path_template", "include"}},
		{"F19 template that does not parse", "server", server, `"join_token" { plugin_data {} }`, "\"x509pop\" {\n    plugin_data {\n      ca_bundle_path = \"DIR/ca.pem\"\n      agent_path_template = " + strconv.Quote(`/x509pop/{{ .Subject`) + "\n    }\n  }", []string{":15: ", "agent_path_template"}},
		{"F20 template of 1 GB", "server", server, `"join_token" { plugin_data {} }`, "\"x509pop\" {\n    plugin_data {\n      ca_bundle_path = \"DIR/ca.pem\"\n      agent_path_template = " + strconv.Quote(`/x509pop/{{ repeat 1000000000 "a" }}`) + "\n    }\n  }", []string{":15: ", "agent_path_template"}},
		{"F21 template of dots", "server", server, `"join_token" { plugin_data {} }`, "\"x509pop\" {\n    plugin_data {\n      ca_bundle_path = \"DIR/ca.pem\"\n      agent_path_template = " + strconv.Quote(`/x509pop/..`) + "\n    }\n  }", []string{":15: ", "agent_path_template"}},
		{"F21 template outside the attestor", "server", server, `"join_token" { plugin_data {} }`, "\"x509pop\" {\n    plugin_data {\n      ca_bundle_path = \"DIR/ca.pem\"\n      agent_path_template = " + strconv.Quote(`/join_token/x`) + "\n    }\n  }", []string{":15: ", "agent_path_template"}},
		{"F17 10 MiB", "server", strings.Repeat("# comment\n", 1<<20), "", "", []string{"1048576 bytes"}},
		{"F17 10 MiB", "agent", strings.Repeat("# comment\n", 1<<20), "", "", []string{"1048576 bytes"}},
		{"F17 nesting of 10,000", "server", deep, "", "", []string{":1: ", "nested"}},
		{"F17 nesting of 10,000", "agent", deep, "", "", []string{":1: ", "nested"}},
		{"F17 60,000 keys", "server", keys.String(), "", "", []string{"60000 faults", ":1: ", "and 59980 more"}},
		{"F18 UTF-16", "server", utf16Text(server), "", "", []string{":1: ", "UTF-16"}},
		// What is read is shown by the one fault in the last line that is found.
		{"F18 byte order mark and CRLF", "server", "\ufeff" + strings.ReplaceAll(replaced(t, server, "join_token", "x"), "\n", "\r\n"), "", "", []string{":12: ", `"x"`}},
		{"F18 CRLF", "agent", strings.ReplaceAll(replaced(t, agent, `"unix"`, `"x"`), "\n", "\r\n"), "", "", []string{":13: ", `"x"`}},
		{"F18 NUL", "agent", agent + "\x00", "", "", []string{":15: ", "zero byte"}},
		{"F24 option of SPIRE that is not offered", "server", server, "plugins {", "telemetry { InMem {} }\nplugins {", []string{":9: ", "telemetry"}},
		{"F25 log file is a directory", "server", server, "ca_ttl ", "log_file = \"/\"\n  ca_ttl ", []string{":7: ", "log_file"}},
		{"F25 log file is a directory", "agent", agent, "join_token  ", "log_file = \"/\"\n  join_token  ", []string{":8: ", "log_file"}},
		{"F28 insecure beside a bundle", "agent", agent, "join_token  ", "insecure_bootstrap = true\n  join_token  ", []string{"insecure_bootstrap", "exclude"}},
		{"F28 hash beside a bundle", "agent", agent, "join_token  ", "trust_bundle_hash = \"" + strings.Repeat("ab", 32) + "\"\n  join_token  ", []string{"trust_bundle_hash", "exclude"}},
		{"F29 token twice", "agent", agent, "join_token  ", "join_token_file = \"DIR/token\"\n  join_token  ", []string{"join_token_file", "exclude"}},
		{"K7 space in a token", "agent", agent, `"JYNEXWDKWZDTPCCLGSX3OX7Q4E"`, `" JYNEXWDKWZDTPCCLGSX3OX7Q4E"`, []string{":8: ", "join_token"}},
		{"K8 token of 256 bytes", "agent", agent, "JYNEXWDKWZDTPCCLGSX3OX7Q4E", strings.Repeat("a", 256), []string{":8: ", "join_token"}},
		{"K10 newline in a token", "agent", agent, "JYNEXWDKWZDTPCCLGSX3OX7Q4E", `JYNEX\nWDKWZ`, []string{":8: ", "join_token"}},
		{"K10 emoji in a token", "agent", agent, "JYNEXWDKWZDTPCCLGSX3OX7Q4E", "JYNEX\U0001f511", []string{":8: ", "join_token"}},
	} {
		t.Run(row.role+" "+row.name, func(t *testing.T) {
			t.Parallel()
			text := row.text
			if row.old != "" {
				text = replaced(t, text, row.old, row.new)
			}
			refusedConfig(t, row.role, text, nil, row.want...)
		})
	}
	for role, text := range map[string]string{"server": server, "agent": agent} {
		t.Run(role+" F16 variable that is not set", func(t *testing.T) {
			t.Parallel()
			refusedConfig(t, role, replaced(t, text, `"example.org"`, `"${NOT_SET_ANYWHERE}"`), []string{"-expandEnv"}, "NOT_SET_ANYWHERE")
		})
		t.Run(role+" flags", func(t *testing.T) {
			t.Parallel()
			d := newDeployment(t)
			d.write("x.conf", fillConfig(d, text))
			for _, flags := range [][]string{{"-confg", "x"}, {"-trustDomain", "Example.org"}, {"-logLevel", "LOUD"}, {"-config", d.path("none.conf")}, {"-config"}, {"surplus"}} {
				printed := refusedCommand(t, nil, append([]string{role, "run", "-config", d.path("x.conf")}, flags...)...)
				if name := strings.TrimPrefix(flags[0], "-"); name == "confg" && !strings.Contains(printed, "did you mean -config?") {
					t.Errorf("%v: %q names no nearest flag", flags, printed)
				}
			}
			d.onlyFiles(t, "x.conf")
		})
	}
}

func utf16Text(text string) string {
	b := []byte{0xff, 0xfe}
	for _, u := range utf16.Encode([]rune(text)) {
		b = append(b, byte(u), byte(u>>8))
	}
	return string(b)
}

// F5: a trust domain of corpus S is refused where a role is configured, and so is
// an ID where a file takes one.
func TestCorpusSInConfiguration(t *testing.T) {
	t.Parallel()
	const good = "example.org"
	rows := map[string]string{
		"S1": "", "S4": "SPIFFE://example.org", "S5": "https://example.org", "S7": "EXAMPLE.org", "S8": "example.org:8081", "S9": "user@example.org",
		"S10": "u:p@example.org", "S11": "example.org?q=1", "S12": "example.org?", "S13": "example.org#f", "S14": "example.org#", "S15": "example.org/a/",
		"S16": "example.org/", "S17": "example.org//a", "S18": "./example.org", "S24": "ex%61mple.org", "S25": "%", "S26": "ex\u00e9mple.org", "S27": "exe\u0301mple.org",
		"S28": "ex\u0430mple.org", "S30": "[::1]", "S34 before": " example.org", "S34 after": "example.org ", "S35": "*", "S40": strings.Repeat("a", 256),
		"S41": strings.Repeat("a/", 1<<18), "S42 an ID": "spiffe://example.org", "S44": "example.org/spire/agent/x",
	}
	for _, c := range " \t\r\n\x00" {
		rows[fmt.Sprintf("S33 %q", c)] = "example" + string(c) + ".org"
	}
	for _, c := range "*:@~!+,;=\\\"'<" {
		rows[fmt.Sprintf("S35 %c", c)] = "example" + string(c) + ".org"
	}
	for row, name := range rows {
		value, err := json.Marshal(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(row, func(t *testing.T) {
			t.Parallel()
			// JSON can say every one of these; HCL says those that it can.
			refusedConfig(t, "server", `{"server": {`+"\n"+`"data_dir": "DIR/data",`+"\n"+`"trust_domain": `+string(value)+"}}", nil, "trust_domain")
			if strings.ContainsAny(name, "\x00\r\n\\\"") {
				return
			}
			refusedConfig(t, "agent", replaced(t, soundAgent, `"example.org"`, string(value)), nil, ":6: ", "trust_domain")
			if len(name) > 0 && len(name) < 1000 {
				if printed := refusedCommand(t, nil, "server", "run", "-config", "/dev/null", "-trustDomain", name); !strings.Contains(printed, "-trustDomain: ") {
					t.Errorf("-trustDomain %q: %s", name, printed)
				}
			}
		})
	}
	for _, bad := range badIDs() {
		if bad.lawful && !bad.is("S42") || bad.is("S41") {
			continue // an operator may have any ID that is one
		}
		t.Run("admin_ids "+bad.row, func(t *testing.T) {
			t.Parallel()
			value, err := json.Marshal(bad.text)
			if err != nil {
				t.Fatal(err)
			}
			refusedConfig(t, "server", `{"server": {`+"\n"+`"data_dir": "DIR/data", "trust_domain": "`+good+`",`+"\n"+`"admin_ids": [`+string(value)+"]}}", nil, "admin_ids")
		})
	}
}

// refusedStart starts a role that must end by itself with status 1 and an error
// that holds all of want.
func (d *deployment) refusedStart(t *testing.T, role, conf string, want ...string) {
	t.Helper()
	p := start(t, exec.Command(plastron, role, "run", "-config", d.path(conf)))
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Fatalf("the %s runs on", role)
	}
	if p.cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("it ended with %v, want status 1", p.cmd.ProcessState)
	}
	_, said, ok := strings.Cut("\n"+p.Output(), "\nError: ")
	if !ok {
		t.Errorf("printed %q, want an error", p.Output())
	}
	for _, w := range want {
		if !strings.Contains(said, w) {
			t.Errorf("the error is %q, want it to hold %q", said, w)
		}
	}
}

// The rows of corpus F that are about what a role finds when it starts: refused,
// and left as it was.
func TestCorpusFOnDisk(t *testing.T) {
	t.Parallel()
	roles := map[string]struct{ text, socket, key string }{
		"server": {soundServer, "admin/api.sock", "data/keys.json"},
		"agent":  {soundAgent, "public/api.sock", ""},
	}
	for role, r := range roles {
		fresh := func(t *testing.T) *deployment {
			d := newDeployment(t)
			d.write("x.conf", fillConfig(d, r.text))
			return d
		}
		t.Run(role+" F9 socket path taken", func(t *testing.T) {
			t.Parallel()
			for what, put := range map[string]func(path string) error{
				"a file":           func(path string) error { return os.WriteFile(path, []byte("mine"), 0o600) },
				"a directory":      func(path string) error { return os.Mkdir(path, 0o700) },
				"a dangling link":  func(path string) error { return os.Symlink("nowhere", path) },
				"a link to a file": func(path string) error { return os.Symlink("/etc/passwd", path) },
			} {
				d := fresh(t)
				path := d.path(r.socket)
				if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := put(path); err != nil {
					t.Fatal(err)
				}
				before, err := os.Lstat(path)
				if err != nil {
					t.Fatal(err)
				}
				d.refusedStart(t, role, "x.conf", path)
				if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) || after.Mode() != before.Mode() || after.Size() != before.Size() {
					t.Errorf("%s: was %v, is %v %v", what, before, after, err)
				}
			}
		})
		t.Run(role+" F9 socket in use", func(t *testing.T) {
			t.Parallel()
			d := fresh(t)
			path := d.path(r.socket)
			if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			d.refusedStart(t, role, "x.conf", path)
			if c, err := net.Dial("unix", path); err != nil {
				t.Errorf("the socket is gone: %v", err)
			} else {
				c.Close()
			}
		})
		t.Run(role+" F10 data directory", func(t *testing.T) {
			t.Parallel()
			for _, mode := range []os.FileMode{0o770, 0o707, 0o777, 0o777 | os.ModeSticky} {
				d := fresh(t)
				if err := os.Mkdir(d.path("data"), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(d.path("data"), mode); err != nil {
					t.Fatal(err)
				}
				d.refusedStart(t, role, "x.conf", d.path("data"))
				if entries, err := os.ReadDir(d.path("data")); err != nil || len(entries) > 0 {
					t.Errorf("mode %v: there are %v %v in it", mode, entries, err)
				}
			}
		})
		t.Run(role+" F10 data directory is a file", func(t *testing.T) {
			t.Parallel()
			d := fresh(t)
			d.write("data", "mine")
			d.refusedStart(t, role, "x.conf", d.path("data"))
			d.onlyFiles(t, "data", "x.conf")
		})
	}
	for name, text := range map[string]string{"empty": "", "a line end": "\n", "two line ends": "JYNEXWDKWZDTPCCLGSX3OX7Q4E\n\n", "a space": "JYNEXWDKWZDTPCCLGSX3OX7Q4E \n", "two lines": "JYNEX\nWDKWZ\n", "1 MiB": strings.Repeat("a", 1<<20)} {
		t.Run("agent F29 token file with "+name, func(t *testing.T) {
			t.Parallel()
			d := newDeployment(t)
			d.write("x.conf", fillConfig(d, replaced(t, soundAgent, `join_token        = "JYNEXWDKWZDTPCCLGSX3OX7Q4E"`, `join_token_file = "DIR/token"`)))
			d.write("token", text)
			newNodePKI(d) // any authority: nothing is asked of a server
			d.write("bundle.pem", d.read("nodes-ca.pem"))
			d.refusedStart(t, "agent", "x.conf", "token")
		})
	}
}

// The rows of corpus F that need a server that ran before, or runs.
func TestCorpusFAfterAStart(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agentID := d.start()
	d.createEntry(agentID, "/kept", nil, mine())

	t.Run("F13 data directory in use", func(t *testing.T) {
		d.write("second.conf", strings.NewReplacer(d.adminSocket(), d.path("admin2/api.sock"), fmt.Sprintf("= %d", d.port), fmt.Sprintf("= %d", freePort(t))).Replace(d.read("server.conf")))
		d.refusedStart(t, "server", "second.conf", d.path("server"))
		d.write("second.conf", strings.ReplaceAll(d.read("agent.conf"), d.workloadSocket(), d.path("public2/api.sock")))
		d.refusedStart(t, "agent", "second.conf", d.path("agent"))
		d.waitHealthy("server")
		d.waitHealthy("agent")
	})
	t.Run("F14 address in use", func(t *testing.T) {
		other := newDeployment(t)
		other.port = d.port
		other.write("x.conf", fillConfig(other, soundServer))
		other.refusedStart(t, "server", "x.conf", fmt.Sprintf("127.0.0.1:%d", d.port))
		if _, err := os.Stat(other.path("admin/api.sock")); err == nil {
			t.Error("the admin socket is there")
		}
	})
	d.agent.stop(syscall.SIGTERM)
	d.server.stop(syscall.SIGTERM)
	t.Run("F6 other trust domain", func(t *testing.T) {
		d.write("second.conf", replaced(t, d.read("server.conf"), `"example.org"`, `"example.net"`))
		d.refusedStart(t, "server", "second.conf", "example.org", "example.net")
	})
	t.Run("F25 log file", func(t *testing.T) {
		if err := syscall.Mkfifo(d.path("fifo"), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, role := range []string{"server", "agent"} {
			conf := replaced(t, d.read(role+".conf"), role+" {\n", role+" {\n  log_file = \""+d.path("fifo")+"\"\n")
			d.write("second.conf", conf)
			d.refusedStart(t, role, "second.conf", d.path("fifo"), "log_file") // nobody reads it
			d.write("second.conf", strings.ReplaceAll(conf, d.path("fifo"), "/dev/full"))
			if role == "agent" {
				d.startServer()
			}
			p := start(t, exec.Command(plastron, role, "run", "-config", d.path("second.conf")))
			eventually(t, "the "+role+" says that its log file is full", func() bool {
				return strings.Contains(p.Output(), "log file not written") && strings.Contains(p.Output(), "no space left")
			})
			socket := map[string]string{"server": d.adminSocket(), "agent": d.workloadSocket()}[role]
			eventually(t, "the "+role+" is healthy", func() bool {
				return exec.Command(plastron, role, "healthcheck", "-socketPath", socket).Run() == nil
			})
			p.stop(syscall.SIGTERM)
			d.server.stop(syscall.SIGTERM)
		}
	})
	t.Run("F27 signals", func(t *testing.T) { // whatever the file says by now
		d.startServer()
		d.write("agent.conf", d.agentConfig(""))
		d.agent = start(t, exec.Command(plastron, "agent", "run", "-config", d.path("agent.conf")))
		d.waitHealthy("agent")
		for role, p := range map[string]*process{"server": d.server, "agent": d.agent} {
			sound := d.read(role + ".conf")
			for _, text := range []string{"", "x {", replaced(t, sound, `"example.org"`, `"other.org"`), strings.ReplaceAll(sound, "data_dir", "data_dri")} {
				d.write(role+".conf", text)
				said := strings.Count(p.Output(), "configuration not read again")
				p.cmd.Process.Signal(syscall.SIGUSR1)
				eventually(t, "the "+role+" says that it goes on as it is", func() bool {
					return strings.Count(p.Output(), "configuration not read again") > said
				})
				p.cmd.Process.Signal(syscall.SIGUSR2)
				d.waitHealthy(role)
			}
			d.write(role+".conf", sound)
		}
		d.agent.stop(syscall.SIGTERM)
		d.server.stop(syscall.SIGTERM)
	})
	for role, keys := range map[string]string{"server": d.path("server/keys.json"), "agent": d.path("agent/keys.json")} {
		t.Run("F11 key file of the "+role, func(t *testing.T) { d.refusesKeyFile(t, role, keys) })
	}
	t.Run("F7 short authorities", func(t *testing.T) {
		d.serverOptions = "ca_ttl = \"1h\"\n  default_x509_svid_ttl = \"30m\"" // more than a sixth
		d.startServer()
		if out := d.server.Output(); !strings.Contains(out, "level=WARN") || !strings.Contains(out, "default_x509_svid_ttl") || !strings.Contains(out, "ca_ttl") {
			t.Errorf("no warning:\n%s", out)
		}
		if n := d.countEntries(); n != 1 { // all the refused starts changed nothing
			t.Errorf("%d entries, want 1", n)
		}
	})
}

// refusesKeyFile shows a role that ran before its key file as others could have
// read or written it; afterwards the file is as it was.
func (d *deployment) refusesKeyFile(t *testing.T, role, keys string) {
	text, err := os.ReadFile(keys)
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := func() {
		t.Helper()
		d.refusedStart(t, role, role+".conf", keys)
		if now, err := os.ReadFile(keys); err != nil || !bytes.Equal(now, text) {
			t.Errorf("the key file changed: %v", err)
		}
	}
	for _, mode := range []os.FileMode{0o644, 0o640, 0o620, 0o602} {
		must(os.Chmod(keys, mode))
		refused()
	}
	must(os.Chmod(keys, 0o600))
	if os.Getuid() == 0 { // only root can give a file away
		must(os.Chown(keys, 65534, 65534))
		refused()
		must(os.Chown(keys, 0, 0))
	}
	must(os.Rename(keys, d.path("elsewhere")))
	must(os.Symlink(d.path("elsewhere"), keys))
	refused()
	must(os.Rename(d.path("elsewhere"), keys))
}

func (d *deployment) read(name string) string {
	d.t.Helper()
	b, err := os.ReadFile(d.path(name))
	if err != nil {
		d.t.Fatal(err)
	}
	return string(b)
}
