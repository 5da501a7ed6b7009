package config

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var update = flag.Bool("update", false, "write the golden files anew")

// role has one field of every kind that a role's struct may have.
type role struct {
	Server  section  `hcl:"server"`
	Plugins []Plugin `hcl:"plugins"`
}

type section struct {
	logging
	BindAddress string            `hcl:"bind_address"`
	BindPort    int               `hcl:"bind_port"`
	TrustDomain TrustDomain       `hcl:"trust_domain"`
	CATTL       Duration          `hcl:"ca_ttl"`
	Prune       *Duration         `hcl:"prune"`
	Audit       *bool             `hcl:"audit_log_enabled"`
	Admins      []string          `hcl:"admin_ids"`
	Limits      *limits           `hcl:"ratelimit"`
	Ratio       float64           `hcl:"ratio"`
	Peers       map[string]peer   `hcl:"federates_with"`
	Names       map[string]string `hcl:"names"`
	Listeners   []limits          `hcl:"listener"`
	Token       *string           `hcl:"join_token"`
	Raw         Node              `hcl:"raw"`
	Domains     []TrustDomain     `hcl:"domains"`
	Untagged    string            // fields without a tag are not keys
}

type logging struct {
	Level string `hcl:"log_level"`
}

type limits struct {
	Attest uint32 `hcl:"attestation"`
	Sign   uint16 `hcl:"signing"`
}

type peer struct {
	URL string `hcl:"bundle_endpoint_url,required"`
}

func TestDecode(t *testing.T) {
	var got role
	got.Server.Level = "INFO" // a default, absent in the file
	if err := Load("testdata/whole.hcl", &got); err != nil {
		t.Fatal(err)
	}
	yes := true
	prune := Duration(90 * time.Minute)
	token := ""
	want := role{
		Server: section{
			logging:     logging{Level: "INFO"},
			BindAddress: "127.0.0.1", BindPort: 8081,
			TrustDomain: TrustDomain{spiffeid.RequireTrustDomainFromString("example.org")},
			CATTL:       Duration(24 * time.Hour), Prune: &prune, Audit: &yes,
			Admins: []string{"spiffe://example.org/a", "spiffe://example.org/b"},
			Limits: &limits{Attest: 7}, Ratio: 0.5,
			Peers:     map[string]peer{"one.test": {URL: "https://one.test"}, "two.test": {URL: "https://two.test"}},
			Names:     map[string]string{"a": "x", "b": "y"},
			Listeners: []limits{{Attest: 1}, {Sign: 2}},
			Token:     &token,
			Domains:   []TrustDomain{{spiffeid.RequireTrustDomainFromString("a.test")}},
		},
		Plugins: []Plugin{
			{Type: "KeyManager", Name: "disk"},
			{Type: "NodeAttestor", Name: "join_token"},
			{Type: "NodeAttestor", Name: "other", Command: "/bin/other", Args: []string{"-v"}, Enabled: &yes},
		},
	}
	options := cmp.Options{cmpopts.IgnoreTypes(Node{}), cmp.AllowUnexported(section{}),
		cmp.Comparer(func(a, b TrustDomain) bool { return a == b })}
	if diff := cmp.Diff(want, got, options); diff != "" {
		t.Errorf("Load() (-want +got):\n%s", diff)
	}
	var disk struct {
		Path string `hcl:"keys_path"`
	}
	if err := got.Plugins[0].Decode(&disk); err != nil || disk.Path != "/var/lib/keys.json" {
		t.Errorf("plugin data = %+v, %v", disk, err)
	}
	if err := got.Plugins[1].Decode(&disk); err != nil {
		t.Errorf("absent plugin data: %v", err)
	}
	if got.Server.Raw.Line() == 0 || !got.Server.Raw.Present() {
		t.Error("the raw node is not present")
	}
}

// The same content as JSON, in both of the shapes found in the wild, gives the
// same struct.
func TestDecodeJSON(t *testing.T) {
	var hcl, nested, lists role
	for file, dst := range map[string]*role{"whole.hcl": &hcl, "whole.json": &nested, "whole-lists.json": &lists} {
		if err := Load(filepath.Join("testdata", file), dst); err != nil {
			t.Fatal(err)
		}
	}
	options := cmp.Options{cmpopts.IgnoreTypes(Node{}), cmp.AllowUnexported(section{}),
		cmp.Comparer(func(a, b TrustDomain) bool { return a == b })}
	hcl.Server.Level = ""
	if diff := cmp.Diff(hcl, nested, options); diff != "" {
		t.Errorf("whole.json differs (-hcl +json):\n%s", diff)
	}
	if diff := cmp.Diff(hcl, lists, options); diff != "" {
		t.Errorf("whole-lists.json differs (-hcl +json):\n%s", diff)
	}
}

// Each file in testdata/faults is wrong in the way its name says; the file of the
// same name with .err holds what the person sees.
func TestFaults(t *testing.T) {
	files, err := filepath.Glob("testdata/faults/*.conf")
	if err != nil || len(files) < 20 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".conf"), func(t *testing.T) {
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			err = Decode(filepath.Base(file), src, new(role))
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("error = %v, want an invalid fault", err)
			}
			golden(t, strings.TrimSuffix(file, ".conf")+".err", err.Error()+"\n")
		})
	}
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

// F18: line ends, byte order marks and encodings have a defined meaning.
func TestEncodings(t *testing.T) {
	plain := "server {\n  log_level = \"DEBUG\"\n  bind_adress = 1\n}\n"
	for name, tt := range map[string]struct {
		src  string
		want string
	}{
		"F18 LF":      {plain, `c:3: server: unknown key "bind_adress"; did you mean "bind_address"?`},
		"F18 CRLF":    {strings.ReplaceAll(plain, "\n", "\r\n"), `c:3: server: unknown key "bind_adress"; did you mean "bind_address"?`},
		"F18 BOM":     {"\xef\xbb\xbf" + plain, `c:3: server: unknown key "bind_adress"; did you mean "bind_address"?`},
		"F18 UTF-16":  {"\xff\xfes\x00e\x00", "c:1: the file is UTF-16; save it as UTF-8"},
		"F18 UTF-16B": {"\xfe\xff\x00s\x00e", "c:1: the file is UTF-16; save it as UTF-8"},
		"F18 no mark": {"\ns\x00e\x00", "c:2: the file holds a zero byte, so it is not text; save it as UTF-8"},
		"F18 latin 1": {"\n\na = \"\xe9\"", "c:3: the file is not UTF-8; save it as UTF-8"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Decode("c", []byte(tt.src), new(role))
			if err == nil || err.Error() != tt.want {
				t.Errorf("error = %v, want %s", err, tt.want)
			}
		})
	}
}

func TestExpand(t *testing.T) {
	lookup := func(name string) (string, bool) {
		value, ok := map[string]string{"HOST": "h.test", "PORT": "80", "EMPTY": "", "BLOCK": "a = 1\nb = 2"}[name]
		return value, ok
	}
	for _, tt := range []struct{ in, want, fault string }{
		{`a = "${HOST}:$PORT"`, `a = "h.test:80"`, ""},
		{`port = $PORT`, `port = 80`, ""},
		{`a = "$EMPTY"`, `a = ""`, ""},
		{`cost = "$$5, 5$, $ 5, \"$HOST"`, `cost = "$5, 5$, $ 5, \"h.test"`, ""},
		{"# $NONE\na = 1 // ${NONE\n/* $NONE\n */ b = \"$HOST\"", "# $NONE\na = 1 // ${NONE\n/* $NONE\n */ b = \"h.test\"", ""},
		{`url = "http://$HOST/#$PORT"`, `url = "http://h.test/#80"`, ""},
		{"a = <<EOF\n# $HOST\n\"\nEOF\n# $NONE", "a = <<EOF\n# h.test\n\"\nEOF\n# $NONE", ""},
		{"a = <<-EOF\n  $HOST\n  EOF\nb = $PORT", "a = <<-EOF\n  h.test\n  EOF\nb = 80", ""},
		{"a = 1 << 2 $PORT", "a = 1 << 2 80", ""},
		{"$BLOCK", "a = 1\nb = 2", ""},
		{"\na = \"$NONE\"", "", `f:2: the environment variable "NONE" is not set; set it, or write $$ for a plain $`},
		{"a = \"$5\"", "", `f:1: the environment variable "5" is not set; set it, or write $$ for a plain $`},
		{"a = \"${HOST\"", "", "f:1: after ${ a variable's name and } are expected; write $$ for a plain $"},
		{"a = \"${HOST:-x}\"", "", "f:1: after ${ a variable's name and } are expected; write $$ for a plain $"},
		{"a = $X\nb = ${Y}", "", "f has 2 faults:\n" +
			"  f:1: the environment variable \"X\" is not set; set it, or write $$ for a plain $\n" +
			"  f:2: the environment variable \"Y\" is not set; set it, or write $$ for a plain $"},
	} {
		t.Run("F16 "+tt.in, func(t *testing.T) {
			got, err := Expand("f", []byte(tt.in), lookup)
			if tt.fault != "" {
				if err == nil || err.Error() != tt.fault {
					t.Errorf("error = %v, want %s", err, tt.fault)
				}
			} else if err != nil || string(got) != tt.want {
				t.Errorf("Expand() = %q, %v, want %q", got, err, tt.want)
			}
		})
	}
	big := func(string) (string, bool) { return strings.Repeat("x", MaxSize), true }
	if _, err := Expand("f", bytes.Repeat([]byte("$A"), 1000), big); fault.ReasonOf(err) != "config_too_large" {
		t.Errorf("a million times a megabyte: %v", err)
	}
}

func TestPluginData(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "data.conf")
	if err := os.WriteFile(file, []byte(`keys_path = "$HOME/keys"`), 0o600); err != nil {
		t.Fatal(err)
	}
	src := fmt.Sprintf("plugins {\n KeyManager \"disk\" { plugin_data_file = %q }\n KeyManager \"both\" {\n plugin_data_file = %q\n plugin_data {}\n }\n"+
		" KeyManager \"bad\" {\n plugin_data { key_path = 1 }\n }\n}", file, file)
	var got role
	if err := Decode("f", []byte(src), &got); err != nil {
		t.Fatal(err)
	}
	var data struct {
		Path string `hcl:"keys_path"`
	}
	if err := got.Plugins[0].Decode(&data); err != nil || data.Path != "$HOME/keys" {
		t.Errorf("data = %+v, %v; the file's variables must not be expanded", data, err)
	}
	for i, want := range []string{
		"f:5: plugins.KeyManager.both.plugin_data: plugin_data and plugin_data_file exclude each other",
		`f:8: plugins.KeyManager.bad.plugin_data: unknown key "key_path"; did you mean "keys_path"?`,
	} {
		if err := got.Plugins[i+1].Decode(&data); err == nil || err.Error() != want {
			t.Errorf("error = %v, want %s", err, want)
		}
	}
}

func TestUnreadable(t *testing.T) {
	err := Load(filepath.Join(t.TempDir(), "none.conf"), new(role))
	if !errors.Is(err, &fault.Error{Kind: fault.Invalid, Reason: "config_unreadable"}) {
		t.Errorf("error = %v", err)
	}
}

func TestNearest(t *testing.T) {
	known := []string{"bind_address", "bind_port", "trust_domain", "data_dir"}
	for name, want := range map[string]string{
		"bind_adress": "bind_address", "BIND_PORT": "bind_port", "bindport": "bind_port", "trsut_domain": "trust_domain",
		"datadir": "data_dir", "xyz": "", strings.Repeat("a", 1000): "", "": "",
	} {
		if got := Nearest(name, known); got != want {
			t.Errorf("Nearest(%.20q) = %q, want %q", name, got, want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, pattern := range []string{"testdata/*.hcl", "testdata/*.json", "testdata/faults/*.conf"} {
		files, _ := filepath.Glob(pattern)
		for _, file := range files {
			src, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(src)
		}
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		var got role
		err := Decode("f", src, &got)
		if err != nil && fault.KindOf(err) != fault.Invalid {
			t.Errorf("error = %v, want an invalid fault", err)
		}
		if err != nil && len(err.Error()) > 16<<10 {
			t.Errorf("the error is %d bytes long", len(err.Error()))
		}
		expanded, err := Expand("f", src, func(string) (string, bool) { return "v", true })
		if err == nil && !bytes.Contains(src, []byte("$")) && !bytes.Equal(src, expanded) {
			t.Error("expansion changed a text without variables")
		}
	})
}

func TestHeredoc(t *testing.T) {
	for src, want := range map[string]string{
		"raw { t = <<EOF\na\n  b\nEOF\n}":              "a\n  b\n",
		"raw { t = <<EOF\nEOF\n}":                      "",
		"raw { t = <<-EOF\n    a\n      b\n    EOF\n}": "a\n  b\n",
		"raw { t = <<-EOF\n a\n    b\n    EOF\n}":      " a\n    b\n",
		"raw { t = <<EOF\r\na\r\nEOF\r\n}":             "a\n",
	} {
		var got struct {
			Raw struct {
				T string `hcl:"t"`
			} `hcl:"raw"`
		}
		if err := Decode("f", []byte(src), &got); err != nil || got.Raw.T != want {
			t.Errorf("%q = %q, %v, want %q", src, got.Raw.T, err, want)
		}
	}
}

func TestLineOf(t *testing.T) {
	for _, file := range []struct {
		name string
		want map[string]int
	}{
		{"whole.hcl", map[string]int{"server.bind_port": 4, "server.ratelimit.attestation": 13, "server.ratelimit.none": 13,
			"server.none": 2, "plugins.KeyManager.disk.plugin_data": 28, "none": 1}},
		{"repeated.hcl", map[string]int{"plugins.NodeAttestor.one": 2, "plugins.NodeAttestor.two": 3, "plugins.NodeAttestor.two.plugin_data": 4, "plugins.NodeAttestor.none": 2}},
		{"whole-lists.json", map[string]int{"server.bind_port": 4, "server.none": 2, "plugins.KeyManager.disk": 23}},
	} {
		src, err := ReadFile(filepath.Join("testdata", file.name))
		if err != nil {
			t.Fatal(err)
		}
		node, err := Parse(file.name, src)
		if err != nil {
			t.Fatal(err)
		}
		for path, want := range file.want {
			if got := node.LineOf(path); got != want {
				t.Errorf("%s: LineOf(%s) = %d, want %d", file.name, path, got, want)
			}
		}
	}
}
