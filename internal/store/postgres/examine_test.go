//go:build linux

package postgres_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/storetest"
)

func TestExamine(t *testing.T) {
	name := database(t)
	c := postgres.Config{ConnectionString: cluster.URL(name)}
	refuse := func(c postgres.Config, kind fault.Kind, reason string) store.Look {
		t.Helper()
		found, err := c.Examine(t.Context(), []string{"/a"}, nil)
		if fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
			t.Errorf("Examine() = %+v, %v (%s, %s), want %s, %s", found, err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
		}
		return found
	}
	if found := refuse(c, fault.NotFound, "store_not_found"); !strings.HasPrefix(found.Engine, "PostgreSQL ") || len(found.Remarks) != 3 {
		t.Errorf("without a store: %+v", found)
	}
	s := opened(t, c.ConnectionString)
	if !s.Opened.NewEpoch {
		t.Error("it was made by looking at it")
	}
	commit(t, s, create("/a", "1"))
	at := commit(t, s, create("/b", "2"))
	keys := map[string]string{}
	found, err := c.Examine(t.Context(), []string{"/a", "/none", "/b"}, func(key string, value []byte) error { keys[key] = string(value); return nil })
	if err != nil || found.Position != at || found.Bytes == 0 {
		t.Errorf("%+v, %v, want %v", found, err, at)
	}
	if d := cmp.Diff(map[string]string{"/a": "1", "/b": "2"}, keys); d != "" {
		t.Error(d)
	}
	for _, r := range found.Remarks {
		if r.Fix != "" {
			t.Errorf("%+v", r)
		}
	}
	if _, now := storetest.State(t, s); now != at { // nothing was written
		t.Errorf("at %v, was at %v", now, at)
	}

	exec(t, "postgres", "ALTER DATABASE "+name+" CONNECTION LIMIT 4") // the store has one at least
	found, err = c.Examine(t.Context(), nil, nil)
	if err != nil || found.Remarks[1].Fix == "" || found.Remarks[1].Fails {
		t.Errorf("with few connections: %+v, %v", found.Remarks, err)
	}
	exec(t, "postgres", "ALTER DATABASE "+name+" CONNECTION LIMIT -1")
	exec(t, name, "UPDATE plastron_head SET format = 99")
	refuse(c, fault.Precondition, "schema_newer")
	exec(t, "postgres", "ALTER DATABASE "+name+" SET default_transaction_read_only = on") // as a standby is
	refuse(c, fault.Unavailable, "database_read_only")

	// Neither the wrong password nor a right one is told.
	wrong := postgres.Config{ConnectionString: cluster.NetworkURL(name, "open sesame")}
	refuse(wrong, fault.Precondition, "database_login")
	if _, err := wrong.Examine(t.Context(), nil, nil); strings.Contains(err.Error(), "sesame") {
		t.Errorf("the password is in %q", err)
	}
	refuse(postgres.Config{ConnectionString: cluster.URL("nowhere")}, fault.Precondition, "database_unknown")
	refuse(postgres.Config{ConnectionString: "host=" + t.TempDir() + " user=plastron dbname=x"}, fault.Unavailable, "database_unreachable")
}

func TestJudgeSurroundings(t *testing.T) {
	const verified, unverified = " sslmode=verify-full", " sslmode=require"
	for _, c := range []struct {
		name  string
		got   store.Remark
		wrong bool
	}{
		{"verified", postgres.Network("host=db.example"+verified, "db.example:5432", true), false},
		{"not verified", postgres.Network("host=db.example"+unverified, "db.example:5432", true), true},
		{"plain", postgres.Network("host=db.example sslmode=disable", "db.example:5432", false), true},
		{"plain, here", postgres.Network("host=127.0.0.1 sslmode=disable", "127.0.0.1:5432", false), false},
		{"the second of two", postgres.Network("host=127.0.0.1,db.example sslmode=disable", "db.example:5432", false), true},
		{"connections", postgres.Connections(5, false), false},
		{"few connections", postgres.Connections(4, false), true},
		{"those of a pooler", postgres.Connections(0, true), false},
		{"clock", postgres.Clock(-4 * time.Second), false},
		{"a clock behind", postgres.Clock(-6 * time.Second), true},
		{"a clock ahead", postgres.Clock(6 * time.Second), true},
	} {
		if c.got.Found == "" || (c.got.Fix != "") != c.wrong {
			t.Errorf("%s: %+v", c.name, c.got)
		}
	}
}
