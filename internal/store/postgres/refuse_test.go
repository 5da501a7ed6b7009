//go:build linux

package postgres_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/storetest"
)

func TestValidate(t *testing.T) {
	const secret = "s3cr3t"
	for name, tc := range map[string]struct{ conn, reason string }{
		"empty":                {"", "connection_string_invalid"},
		"long":                 {strings.Repeat("x", 20000), "connection_string_invalid"},
		"not a string":         {"password=" + secret + " host", "connection_string_invalid"},
		"not a URL":            {"postgres://u:" + secret + "@[h/d", "connection_string_invalid"},
		"password in the port": {"postgres://u:" + secret + "@h:" + secret + "/d", "connection_string_invalid"},
		"password with a hash": {"postgres://u:" + secret + "#x@db.example/d", "connection_string_invalid"},
		"missing file":         {"host=db.example password=" + secret + " sslmode=verify-full sslrootcert=/nonexistent/ca.pem", "connection_string_invalid"},
		"falls back":           {"postgres://u:" + secret + "@db.example/d", "connection_may_be_plain"},
		"second host":          {"postgres://u:" + secret + "@localhost,db.example/d?sslmode=allow", "connection_may_be_plain"},
		"verified":             {"postgres://u:" + secret + "@db.example,db2.example/d?sslmode=verify-full", ""},
		"plain, and says so":   {"postgres://u:" + secret + "@db.example/d?sslmode=disable", ""},
		"loopback":             {"postgres://u:" + secret + "@127.0.0.1/d", ""},
		"socket":               {"host=/run/postgresql user=u password=" + secret, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := postgres.Config{ConnectionString: tc.conn}
			err := c.Validate()
			if (err == nil) != (tc.reason == "") || err != nil && (fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != tc.reason) {
				t.Errorf("Validate() = %v (%s), want %q", err, fault.ReasonOf(err), tc.reason)
			}
			if text := fmt.Sprintf("%v %v %+v %#v %s", err, c, c, c, c); strings.Contains(text, secret) || strings.Contains(text, "%%") {
				t.Errorf("the password, or a format, is in %s", text)
			}
		})
	}
}

// Each thing that can be wrong with a database gets one error with a reason and a
// remedy, without the password, and leaves the database as it was.
func TestOpenRefuses(t *testing.T) {
	empty := func(t *testing.T, name string) {
		t.Helper()
		await(t, name, "SELECT count(*) = 0 FROM pg_class WHERE relname LIKE 'plastron%'")
	}
	t.Run("SPIRE's tables", func(t *testing.T) {
		name := database(t)
		exec(t, name, "CREATE TABLE registered_entries (id int); INSERT INTO registered_entries VALUES (1)")
		refuses(t, cluster.URL(name), fault.Precondition, "spire_database")
		empty(t, name)
		// In a schema of its own it may stand beside them.
		exec(t, name, "CREATE SCHEMA \"a \"\"b\"; ALTER DATABASE "+name+" SET search_path = \"a \"\"b\"")
		commit(t, opened(t, cluster.URL(name)), create("a", ""))
		await(t, name, "SELECT count(*) = 1 FROM public.registered_entries")
	})
	t.Run("not there", func(t *testing.T) {
		name := database(t)
		s, err := postgres.Config{ConnectionString: cluster.URL(name), Existing: true}.Open(t.Context(), logger(t))
		if err == nil {
			s.Close()
		}
		if fault.KindOf(err) != fault.NotFound || fault.ReasonOf(err) != "store_not_found" {
			t.Errorf("Open() = %v", err)
		}
		empty(t, name)
	})
	t.Run("newer format", func(t *testing.T) {
		name := database(t)
		s := open(t, cluster.URL(name))
		commit(t, s, create("a", ""))
		want, at := storetest.State(t, s)
		s.Close()
		exec(t, name, "UPDATE plastron_head SET format = 2")
		refuses(t, cluster.URL(name), fault.Precondition, "schema_newer")
		exec(t, name, "UPDATE plastron_head SET format = 1")
		got, now := storetest.State(t, opened(t, cluster.URL(name)))
		if now != at || len(got) != len(want) {
			t.Errorf("at %v, was at %v", now, at)
		}
	})
	t.Run("foreign tables", func(t *testing.T) {
		name := database(t)
		exec(t, name, "CREATE TABLE plastron_head (x int)")
		refuses(t, cluster.URL(name), fault.Precondition, "schema_foreign")
		await(t, name, "SELECT to_regclass('plastron_kv') IS NULL")
		name = database(t)
		exec(t, name, "CREATE TABLE plastron_kv (x int)")
		refuses(t, cluster.URL(name), fault.Precondition, "schema_foreign")
		await(t, name, "SELECT to_regclass('plastron_head') IS NULL")
		name = database(t)
		open(t, cluster.URL(name)).Close()
		exec(t, name, "DROP TABLE plastron_kv")
		refuses(t, cluster.URL(name), fault.Precondition, "schema_foreign")
	})
	t.Run("wrong password", func(t *testing.T) {
		name := database(t)
		const wrong = "wr0ng"
		err := refuses(t, cluster.NetworkURL(name, wrong), fault.Precondition, "database_login")
		if strings.Contains(err.Error(), wrong) || strings.Contains(fmt.Sprintf("%+v", err), wrong) {
			t.Errorf("the password is in %v", err)
		}
		var log bytes.Buffer
		s, err := postgres.Config{ConnectionString: cluster.NetworkURL(name, cluster.Password)}.
			Open(t.Context(), slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
		if err != nil {
			t.Fatal(err)
		}
		commit(t, s, create("a", ""))
		s.Close()
		if strings.Contains(log.String(), cluster.Password) || strings.Contains(log.String(), "a%20pass") {
			t.Errorf("the password is in the log: %s", log.String())
		}
	})
	t.Run("no such database", func(t *testing.T) {
		database(t)
		refuses(t, cluster.URL("nonexistent"), fault.Precondition, "database_unknown")
	})
	t.Run("nobody there", func(t *testing.T) {
		refuses(t, "postgres:///d?user=u&host="+t.TempDir(), fault.Unavailable, "database_unreachable")
	})
	t.Run("no privilege", func(t *testing.T) {
		name := database(t)
		exec(t, name, "CREATE ROLE stranger_"+name+" LOGIN; REVOKE CREATE ON SCHEMA public FROM public")
		url := strings.ReplaceAll(cluster.URL(name), "user=plastron", "user=stranger_"+name)
		refuses(t, url, fault.Precondition, "database_privilege")
		empty(t, name)
		exec(t, name, "CREATE SCHEMA own AUTHORIZATION stranger_"+name+"; ALTER ROLE stranger_"+name+" SET search_path = own")
		commit(t, opened(t, url), create("a", "")) // no more than that is needed
	})
	t.Run("read-only", func(t *testing.T) {
		name := database(t)
		exec(t, name, "ALTER DATABASE "+name+" SET default_transaction_read_only = on")
		refuses(t, cluster.URL(name), fault.Unavailable, "database_read_only")
		exec(t, "postgres", "ALTER DATABASE "+name+" RESET default_transaction_read_only")
		empty(t, name)
	})
	t.Run("second of two hosts", func(t *testing.T) {
		name := database(t)
		url := fmt.Sprintf("host=%s,%s port=%s,%s user=plastron dbname=%s", t.TempDir(), cluster.Dir, cluster.Port, cluster.Port, name)
		commit(t, opened(t, url), create("a", ""))
	})
}

// R16: under another locale and isolation level keys are bytes still, and a
// default that trades commits for speed is not followed.
func TestDatabaseDefaults(t *testing.T) {
	database(t)
	name := fmt.Sprintf("d%d", databases.Add(1))
	exec(t, "postgres", "CREATE DATABASE "+name+" TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
	exec(t, "postgres", "ALTER DATABASE "+name+" SET default_transaction_isolation = 'serializable'; ALTER DATABASE "+name+
		" SET synchronous_commit = off; ALTER DATABASE "+name+" SET standard_conforming_strings = on; ALTER DATABASE "+name+" SET bytea_output = 'escape'")
	a, b := opened(t, cluster.URL(name)), opened(t, cluster.URL(name))
	_, begin := storetest.State(t, a)
	for i := range 20 {
		for _, s := range []*postgres.Store{a, b} {
			r := s.Commit(context.Background(), []store.Txn{{Caller: "é", Puts: []store.Put{{Key: fmt.Sprintf("\xff\x00%d", i), Value: []byte{0, 255}}}}})[0]
			if r.Err != nil {
				t.Fatal(r.Err)
			}
		}
	}
	if rows := agree(t, begin, a, b); len(rows) != 20 {
		t.Errorf("%d rows", len(rows))
	}
	await(t, name, "SELECT count(*) = 0 FROM pg_stat_activity WHERE state LIKE 'idle in%' AND datname = current_database() AND pid <> pg_backend_pid()")
}

// R21, R82: a dump that is restored elsewhere is another life.
func TestRestoredDumpHasNewEpoch(t *testing.T) {
	from, to := database(t), database(t)
	a := opened(t, cluster.URL(from))
	at := commit(t, a, create("a", "1"))
	bin := cluster.Programs
	args := []string{"-h", cluster.Dir, "-p", cluster.Port, "-U", "plastron", "-d"}
	dump, err := osexec.Command(filepath.Join(bin, "pg_dump"), append(args, from)...).Output()
	if err != nil {
		t.Fatal(err)
	}
	restore := osexec.Command(filepath.Join(bin, "psql"), append(args, to, "-q", "-v", "ON_ERROR_STOP=1")...)
	restore.Stdin = bytes.NewReader(dump)
	if out, err := restore.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b := opened(t, cluster.URL(to))
	rows, now := storetest.State(t, b)
	if !b.Opened.NewEpoch || b.Opened.Reason != "restored" || now.Epoch == at.Epoch || now.Revision != at.Revision || rows["a"].Value != "1" {
		t.Errorf("restored: %+v at %v, dumped at %v, %v", b.Opened, now, at, rows)
	}
	for _, err := range b.Watch(limited(t), at) {
		must(t, "Watch", err, fault.Precondition, "epoch_changed")
	}
	if c := opened(t, cluster.URL(to)); c.Opened.NewEpoch {
		t.Errorf("opened again: %+v", c.Opened)
	}
	if c := opened(t, cluster.URL(from)); c.Opened.NewEpoch {
		t.Errorf("the first database: %+v", c.Opened)
	}
}

// The database goes back in time under open stores, as after a failover to a
// replica that was behind: whoever has seen more draws a new epoch, watchers and
// writers learn it, and after a Load all goes on. Also when others have written
// on in the meantime.
func TestHistoryLost(t *testing.T) {
	for _, onward := range []int{0, 10} {
		t.Run(fmt.Sprint(onward, " new revisions"), func(t *testing.T) {
			name := database(t)
			a := opened(t, cluster.URL(name))
			_, begin := storetest.State(t, a)
			var at store.Position
			for i := range 8 {
				at = commit(t, a, create(fmt.Sprint(i), ""))
			}
			storetest.Replay(t, a, begin, at) // a has seen them all
			watched := make(chan error, 1)
			go func() {
				for _, err := range a.Watch(limited(t), at) {
					watched <- err
					return
				}
			}()
			back := "DELETE FROM plastron_log WHERE rev > 5; DELETE FROM plastron_kv WHERE rev > 5; UPDATE plastron_head SET rev = 5;"
			for i := range onward {
				back += fmt.Sprintf("UPDATE plastron_head SET rev = %d; INSERT INTO plastron_log SELECT %[1]d, %[1]d - 1, time, '\\x%02[1]x', batch FROM plastron_log WHERE rev = 5;", 6+i)
			}
			exec(t, name, "BEGIN;"+back+"NOTIFY plastron_log; COMMIT")
			must(t, "Watch", <-watched, fault.Precondition, "epoch_changed")
			r := a.Commit(context.Background(), []store.Txn{create("blind", "")})[0]
			must(t, "Commit before Load", r.Err, fault.Unavailable, "epoch_changed")
			rows, now := storetest.State(t, a)
			if now.Epoch == at.Epoch || now.Revision != uint64(5+onward) || len(rows) != 5 {
				t.Errorf("at %v with %d rows, was at %v", now, len(rows), at)
			}
			next := commit(t, a, create("after", ""))
			storetest.Replay(t, a, now, next)
		})
	}
}

// What was seen is there no more, and nothing has told this store: a commit that
// was planned on it is refused all the same.
func TestHistoryLostUnnoticed(t *testing.T) {
	name := database(t)
	a := opened(t, cluster.URL(name))
	_, begin := storetest.State(t, a)
	at := commit(t, a, create("a", ""))
	storetest.Replay(t, a, begin, at)
	exec(t, name, `UPDATE plastron_log SET id = '\x01'`)
	r := a.Commit(context.Background(), []store.Txn{create("blind", "")})[0]
	must(t, "Commit", r.Err, fault.Unavailable, "epoch_changed")
}
