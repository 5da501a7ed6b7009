package builtin_test

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
)

const canary = "c4nary"

// read decodes a DataStore block as a server does.
func read(t *testing.T, text string) (builtin.StoreConfig, error) {
	t.Helper()
	var file struct {
		Plugins []config.Plugin `hcl:"plugins"`
	}
	if err := config.Decode("f", []byte("plugins { DataStore "+text+" }"), &file); err != nil {
		return nil, err
	}
	for _, s := range builtin.Stores() {
		if s.Name != file.Plugins[0].Name {
			continue
		}
		c := s.New()
		if err := file.Plugins[0].Decode(c); err != nil {
			return c, err
		}
		if v, ok := c.(interface{ Validate() error }); ok {
			return c, v.Validate()
		}
		return c, nil
	}
	t.Fatalf("no store named %q", file.Plugins[0].Name)
	return nil, nil
}

// SPIRE's blocks mean what they say, the others' engines are refused with what
// replaces them, and no password is in what is said.
func TestStores(t *testing.T) {
	sql := func(data string) string { return `"sql" { plugin_data { ` + data + ` } }` }
	postgres := func(more string) string {
		return sql(`database_type = "postgres" connection_string = "dbname=spire user=u password=` + canary + ` host=localhost sslmode=disable" ` + more)
	}
	at := builtin.Where{Kind: "postgres", Address: "localhost:5432/spire", Shared: true}
	for name, c := range map[string]struct {
		text  string
		where builtin.Where
		says  []string
	}{
		"ours":             {`"sqlite" { plugin_data {} }`, builtin.Where{Kind: "sqlite", Dir: "/data"}, nil},
		"ours, elsewhere":  {`"sqlite" { plugin_data { dir = "/srv" } }`, builtin.Where{Kind: "sqlite", Dir: "/srv"}, nil},
		"sqlite3":          {sql(`database_type = "sqlite3" connection_string = "/var/lib/spire/datastore.sqlite3"`), builtin.Where{Kind: "sqlite", Dir: "/var/lib/spire"}, nil},
		"sqlite3 relative": {sql(`database_type = "sqlite3" connection_string = "./datastore.sqlite3"`), builtin.Where{Kind: "sqlite", Dir: "."}, nil},
		"sqlite3 URL":      {sql(`database_type = "sqlite3" connection_string = "file:///srv/a.db?cache=shared"`), builtin.Where{Kind: "sqlite", Dir: "/srv"}, nil},
		"sqlite3 default":  {sql(`database_type = "sqlite3"`), builtin.Where{Kind: "sqlite", Dir: "/data"}, nil},
		"postgres":         {postgres(""), at, nil},
		"all of SPIRE's":   {postgres(`ro_connection_string = "x" max_open_conns = 100 max_idle_conns = 0 conn_max_lifetime = "30m" disable_migration = true log_sql = false`), at, nil},
		"no limit":         {postgres(`max_open_conns = 0`), at, nil},
		"postgres URL": {sql(`database_type = "postgres" connection_string = "postgres://u:` + canary + `@a:1,b:2/d?sslmode=verify-full"`),
			builtin.Where{Kind: "postgres", Address: "a:1,b:2/d", Shared: true}, nil},
		"etcd": {`"etcd" { plugin_data { endpoints = ["https://a:2379", "https://b:2379"] prefix = "/p/" ca_file = "ca" cert_file = "c" key_file = "k" username = "u" password_file = "f" } }`,
			builtin.Where{Kind: "etcd", Address: "https://a:2379,https://b:2379/p/", Shared: true}, nil},
		"etcd default prefix": {`"etcd" { plugin_data { endpoints = ["http://a:2379"] } }`, builtin.Where{Kind: "etcd", Address: "http://a:2379/plastron/", Shared: true}, nil},

		"mysql":             {sql(`database_type = "mysql" connection_string = "u:` + canary + `@tcp(h)/d"`), builtin.Where{}, []string{"mysql", "etcd"}},
		"aws_mysql":         {sql(`database_type "aws_mysql" { region = "r" }`), builtin.Where{}, []string{"aws_mysql", "etcd"}},
		"aws_postgres":      {sql(`database_type "aws_postgres" { region = "r" secret_access_key = "` + canary + `" }`), builtin.Where{}, []string{"aws_postgres", "password"}},
		"oracle":            {sql(`database_type = "oracle"`), builtin.Where{}, []string{"oracle", "sqlite3 or postgres"}},
		"no type":           {sql(``), builtin.Where{}, []string{"database_type: must be set"}},
		"no string":         {sql(`database_type = "postgres"`), builtin.Where{}, []string{"connection_string"}},
		"MySQL's TLS":       {postgres(`root_ca_path = "ca"`), builtin.Where{}, []string{"sslrootcert"}},
		"too few sessions":  {postgres(`max_open_conns = 4`), builtin.Where{}, []string{"max_open_conns", "5"}},
		"in memory":         {sql(`database_type = "sqlite3" connection_string = "file:x?mode=memory"`), builtin.Where{}, []string{"memory"}},
		"may be plain":      {sql(`database_type = "postgres" connection_string = "postgres://u:` + canary + `@db.example/d"`), builtin.Where{}, []string{"plain text"}},
		"cut at a slash":    {sql(`database_type = "postgres" connection_string = "postgres://u:1/` + canary + `@db.example/d?sslmode=disable"`), builtin.Where{}, []string{"percent-encode"}},
		"cut at a question": {sql(`database_type = "postgres" connection_string = "postgres://u:1?` + canary + `@db.example/d"`), builtin.Where{}, []string{"percent-encode"}},
		"cut at a hash":     {sql(`database_type = "postgres" connection_string = "postgres://u:1#` + canary + `@db.example/d"`), builtin.Where{}, []string{"percent-encode"}},
		"cut at a space":    {sql(`database_type = "postgres" connection_string = "host=/s password=a ` + canary + ` user=u"`), builtin.Where{}, []string{"percent-encode"}},
		"password in etcd":  {`"etcd" { plugin_data { endpoints = ["https://u:` + canary + `@a:2379"] } }`, builtin.Where{}, []string{"of their own"}},
		"no endpoint":       {`"etcd" { plugin_data {} }`, builtin.Where{}, []string{"no etcd endpoint"}},
		"bad prefix":        {`"etcd" { plugin_data { endpoints = ["http://a:1"] prefix = "/p" } }`, builtin.Where{}, []string{"slash"}},
		"password, no user": {`"etcd" { plugin_data { endpoints = ["http://a:1"] password_file = "f" } }`, builtin.Where{}, []string{"user"}},
		"user, no password": {`"etcd" { plugin_data { endpoints = ["http://a:1"] username = "u" } }`, builtin.Where{}, []string{"password_file"}},
		"wrong type":        {sql(`database_type = "postgres" connection_string = ["` + canary + `"]`), builtin.Where{}, []string{"must be a string"}},
	} {
		t.Run(name, func(t *testing.T) {
			config, err := read(t, c.text)
			if text := fmt.Sprintf("%v %v %+v %#v", err, config, config, config); strings.Contains(text, canary) {
				t.Errorf("the password is in %s", text)
			}
			if c.says == nil {
				if err != nil {
					t.Fatal(err)
				}
				if got := config.Where("/data"); got != c.where {
					t.Errorf("Where() = %+v, want %+v", got, c.where)
				}
				return
			}
			if kind := fault.KindOf(err); kind != fault.Invalid && kind != fault.Unsupported {
				t.Fatalf("err = %v, want it refused", err)
			}
			for _, want := range c.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not say %q", err, want)
				}
			}
		})
	}
	c, err := read(t, postgres(`ro_connection_string = "`+canary+`" log_sql = true conn_max_lifetime = "1m"`))
	if err != nil {
		t.Fatal(err)
	}
	if warnings := fmt.Sprint(c.(interface{ Warnings() []string }).Warnings()); strings.Count(warnings, ":") != 3 || strings.Contains(warnings, canary) {
		t.Errorf("warnings = %s", warnings)
	}
	for endpoint, want := range map[string]bool{
		"http://a:1": true, "http://10.0.0.1:1": true, "https://a:1": false, "http://127.0.0.1:1": false, "http://[::1]:1": false, "http://localhost:1": false,
	} {
		c, err := read(t, fmt.Sprintf(`"etcd" { plugin_data { endpoints = [%q] } }`, endpoint))
		if err != nil {
			t.Fatal(err)
		}
		if warnings := c.(interface{ Warnings() []string }).Warnings(); (len(warnings) > 0) != want {
			t.Errorf("%s: warnings = %s", endpoint, warnings)
		}
	}
}

// disable_migration keeps the format of rows as it is, whatever the engine.
func TestKeepFormat(t *testing.T) {
	for _, keep := range []bool{true, false} {
		c, err := read(t, fmt.Sprintf(`"sql" { plugin_data { database_type = "sqlite3" connection_string = %q disable_migration = %t } }`, filepath.Join(t.TempDir(), "spire.db"), keep))
		if err != nil {
			t.Fatal(err)
		}
		opened, err := c.Open(t.Context(), builtin.StoreEnv{Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		if opened.KeepFormat != keep || opened.Shared || opened.Size == nil || opened.Check == nil {
			t.Errorf("disable_migration = %t: %+v", keep, opened)
		}
		if err := opened.Close(); err != nil {
			t.Error(err)
		}
	}
}
