package system_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/test/parts"
)

// sharedKind is a store for several servers, with what a test asks of it.
type sharedKind struct {
	block    func(where string) string // the DataStore block for a database or prefix
	contents func(where string) string // all that is in it, in a form to compare
	foreign  func(where string)        // puts something else there
	newer    func(from, to string)     // copies a store as a newer version would have written it
	stall    func(time.Duration)       // has it stand still for a while
}

func postgresKind(t *testing.T) sharedKind {
	p := startPostgres(t)
	do := func(database, sql string) {
		t.Helper()
		if err := p.Exec(context.Background(), database, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	return sharedKind{
		block: func(where string) string {
			p.Exec(context.Background(), "postgres", "CREATE DATABASE "+where) // unless it is there
			return postgresBlock(p, where)
		},
		contents: func(where string) string {
			out, err := exec.Command(p.Programs+"/pg_dump", "-h", p.Dir, "-p", p.Port, "-U", "plastron", where).Output()
			if err != nil {
				t.Fatal(err)
			}
			return regexp.MustCompile(`(?m)^\\(un)?restrict .*`).ReplaceAllString(string(out), "") // drawn by pg_dump
		},
		foreign: func(where string) { do(where, "CREATE TABLE registered_entries (id int)") },
		newer: func(from, to string) {
			// What is copied may have no sessions, and those of servers that ended end a little later.
			if err := p.Until(context.Background(), "SELECT (count(*) = 0)::int FROM pg_stat_activity WHERE datname = '"+from+"'"); err != nil {
				t.Fatal(err)
			}
			do("postgres", "CREATE DATABASE "+to+" TEMPLATE "+from)
			do(to, "UPDATE plastron_head SET format = 99")
		},
		stall: func(d time.Duration) {
			need(t, p.Freeze())
			time.Sleep(d)
			need(t, p.Thaw())
		},
	}
}

func etcdKind(t *testing.T) sharedKind {
	e := startEtcd(t)
	return sharedKind{
		block:    func(where string) string { return etcdBlock(e, "/"+where+"/") },
		contents: func(where string) string { return rangeEtcd(t, e, "/"+where+"/") },
		foreign:  func(where string) { putEtcd(t, e, "/"+where+"/x", "1") },
		newer: func(_, to string) {
			putEtcd(t, e, "/"+to+"/meta", `{"plastron_store":99,"epoch":"00","cluster":"00"}`)
		},
		stall: func(d time.Duration) {
			need(t, e.Freeze(0))
			time.Sleep(d)
			need(t, e.Thaw(0))
		},
	}
}

// rangeEtcd returns everything below a prefix, but for the keys of open stores.
func rangeEtcd(t *testing.T, e *parts.Etcd, prefix string) string {
	t.Helper()
	end := prefix[:len(prefix)-1] + "0" // the byte after the slash
	body, err := json.Marshal(map[string]any{"key": []byte(prefix), "range_end": []byte(end)})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post(e.Endpoints[0]+"/v3/kv/range", "application/json", strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var got struct {
		Kvs []struct {
			Key, Value []byte
			Mod        string `json:"mod_revision"`
		}
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil || json.Unmarshal(text, &got) != nil {
		t.Fatalf("etcd: %v %s", err, text)
	}
	var all strings.Builder
	for _, kv := range got.Kvs {
		fmt.Fprintf(&all, "%q %s %q\n", kv.Key, kv.Mod, kv.Value)
	}
	return all.String()
}

// Ten servers that start at the same moment on an empty database or prefix are one
// trust domain, and nothing is made twice or by halves, though some are killed and
// the store stands still for a while. What is not for this server is refused with
// one sentence, and left as it is.
func TestManyServersAtOnce(t *testing.T) {
	for name, kind := range map[string]func(*testing.T) sharedKind{"postgres": postgresKind, "etcd": etcdKind} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := kind(t)
			const many = 10
			block := k.block("many")
			servers := make([]*deployment, many)
			for i := range servers {
				servers[i] = newDeployment(t)
				servers[i].dataStore = block
			}
			began := time.Now()
			for _, d := range servers {
				d.launchServer()
			}
			for _, d := range servers[:3] { // wherever they are by now (R82)
				d.server.stop(syscall.SIGKILL)
				d.launchServer()
			}
			k.stall(3 * time.Second)
			for _, d := range servers {
				d.waitHealthy("server")
			}
			t.Logf("%d servers after %v", many, time.Since(began))
			show := func(d *deployment) string { return d.run("server", "bundle", "show", "-socketPath", d.adminSocket()) }
			eventually(t, "one bundle with an authority of each", func() bool {
				first := show(servers[0])
				if strings.Count(first, "BEGIN CERTIFICATE") != many {
					return false
				}
				for _, d := range servers[1:] {
					if show(d) != first {
						return false
					}
				}
				return true
			})
			servers[0].createEntry("spiffe://example.org/spire/server", "/one", nil, mine())
			for _, d := range servers {
				eventually(t, "the entry at every server", func() bool {
					return strings.Contains(d.run("server", "entry", "count", "-socketPath", d.adminSocket()), "1 registration entry")
				})
			}
			for _, d := range servers {
				d.server.stop(syscall.SIGTERM)
			}
			refusals(t, k)
		})
	}
}

// refusals starts a server on each store that is not for it; "many" is a store of
// example.org that no server has open.
func refusals(t *testing.T, k sharedKind) {
	k.newer("many", "newer")
	other := k.block("taken")
	k.foreign("taken")
	for _, c := range []struct{ what, where, block, trustDomain, says string }{
		{"another trust domain", "many", k.block("many"), "other.example", "trust domain"},
		{"a newer schema", "newer", k.block("newer"), "example.org", "format 99"},
		{"something else", "taken", other, "example.org", ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			before := k.contents(c.where)
			refused(t, c.block, c.trustDomain, c.says)
			if after := k.contents(c.where); after != before {
				t.Errorf("the store has changed\nfrom %s\nto %s", before, after)
			}
		})
	}
}

// refused starts a server that must end with one error that says something.
func refused(t *testing.T, block, trustDomain, says string) string {
	t.Helper()
	d := newDeployment(t)
	d.dataStore, d.trustDomain = block, trustDomain
	began := time.Now()
	d.launchServer()
	select {
	case <-d.server.done:
	case <-time.After(patience):
		t.Fatalf("the server does not end:\n%s", d.server.Output())
	}
	out := d.server.Output()
	t.Logf("after %v: %s", time.Since(began), out)
	if d.server.err == nil || strings.Count(out, "Error:") != 1 || !strings.Contains(out, says) {
		t.Errorf("ended with %v, want one error that says %q", d.server.err, says)
	}
	return out
}

// What is wrong with a database or cluster is one error each, without the password.
func TestStoreRefusals(t *testing.T) {
	p, e := startPostgres(t), startEtcd(t)
	do := func(database, sql string) {
		t.Helper()
		if err := p.Exec(context.Background(), database, sql); err != nil {
			t.Fatal(err)
		}
	}
	do("postgres", "CREATE DATABASE ours")
	do("postgres", "CREATE DATABASE readonly")
	do("postgres", "ALTER DATABASE readonly SET default_transaction_read_only = on")
	do("postgres", "CREATE ROLE nobody LOGIN PASSWORD 'c4nary'")
	do("ours", "REVOKE CREATE ON SCHEMA public FROM public")
	sql := func(url string) string {
		return fmt.Sprintf(`DataStore "sql" { plugin_data { database_type = "postgres" connection_string = %q } }`, url)
	}
	const canary = "c4nary"
	ours := p.NetworkURL("ours", canary)
	etcd := func(more string) string {
		return fmt.Sprintf(`DataStore "etcd" { plugin_data { endpoints = [%q] %s } }`, e.Endpoints[0], more)
	}
	for _, c := range []struct{ what, block, says string }{
		{"wrong password", sql(ours), "refuses the login"},
		{"no such database", sql(p.NetworkURL("absent", p.Password)), "no such database"},
		{"read-only database", sql(p.NetworkURL("readonly", p.Password)), "can only be read"},
		{"no right to create", sql(strings.Replace(ours, "plastron:", "nobody:", 1)), "lacks a privilege"},
		{"nobody there", sql(strings.Replace(ours, p.Port, fmt.Sprint(freePort(t)), 1)), "does not answer"},
		{"no TLS there", sql(ours + "?sslmode=require"), "does not answer"},
		{"plain text on a network", sql(strings.Replace(ours, "127.0.0.1", "192.0.2.1", 1)), "plain text"},
		{"a password cut in two", sql("postgres://u:a/" + canary + "@127.0.0.1/d"), "percent-encode"},
		{"mysql", `DataStore "sql" { plugin_data { database_type = "mysql" connection_string = "u:` + canary + `@tcp(h)/d" } }`, "not offered"},
		{"no etcd there", etcdBlock(&parts.Etcd{Endpoints: []string{fmt.Sprintf("http://127.0.0.1:%d", freePort(t))}}, "/p/"), "cannot be reached"},
		{"etcd without TLS", strings.Replace(etcd(""), "http:", "https:", 1), "TLS with etcd fails"},
		{"no password file", etcd(`username = "u" password_file = "/absent"`), "cannot be read"},
		{"password in an endpoint", strings.Replace(etcd(""), "http://", "http://u:"+canary+"@", 1), "settings of their own"},
	} {
		t.Run(c.what, func(t *testing.T) {
			out := refused(t, c.block, "example.org", c.says)
			for _, secret := range []string{canary, p.Password, "a%20pass"} {
				if strings.Contains(out, secret) {
					t.Errorf("the password is in %s", out)
				}
			}
		})
	}
}
