//go:build linux

package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/storetest"
	"github.com/plastron/plastron/test/parts"
)

// cluster is nil, and absent says why, when there is no PostgreSQL to be had.
var (
	cluster   *parts.Postgres
	absent    error
	databases atomic.Int64
)

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	for _, name := range []string{"PGHOST", "PGUSER", "PGPASSWORD", "PGSSLMODE", "PGDATABASE", "PGPASSFILE", "PGSSLKEY"} {
		os.Unsetenv(name)
	}
	if url := os.Getenv("PLASTRON_TEST_WRITE"); url != "" {
		fmt.Fprintln(os.Stderr, writeForever(url))
		return 1
	}
	cluster, absent = parts.StartPostgres(context.Background())
	if absent != nil {
		var missing *parts.MissingError
		if !errors.As(absent, &missing) || os.Getenv("CI") == "true" {
			fmt.Fprintln(os.Stderr, absent)
			return 1
		}
		return m.Run()
	}
	defer cluster.Close()
	return m.Run()
}

// database makes an empty database and returns its name.
func database(t testing.TB) string {
	t.Helper()
	if absent != nil {
		t.Skip(absent)
	}
	name := fmt.Sprintf("d%d", databases.Add(1))
	exec(t, "postgres", "CREATE DATABASE "+name)
	return name
}

func exec(t testing.TB, database, sql string) {
	t.Helper()
	if err := cluster.Exec(context.Background(), database, sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func logger(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// open opens a store; the test closes it.
func open(t testing.TB, url string) *postgres.Store {
	t.Helper()
	s, err := postgres.OpenPatient(postgres.Config{ConnectionString: url}, context.Background(), logger(t))
	if err != nil {
		t.Fatalf("Open() = %v", err)
	}
	return s
}

// opened opens a store that is closed at the end of the test.
func opened(t testing.TB, url string) *postgres.Store {
	t.Helper()
	s := open(t, url)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return s
}

// refuses opens a store, which must fail.
func refuses(t *testing.T, url string, kind fault.Kind, reason string) error {
	t.Helper()
	s, err := postgres.Config{ConnectionString: url}.Open(t.Context(), logger(t))
	if err == nil {
		s.Close()
	}
	if fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Fatalf("Open() = %v (%s, %s), want %s, %s", err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
	return err
}

func TestContract(t *testing.T) {
	create := func(open postgres.OpenFunc) func(t *testing.T) storetest.Open {
		return func(t *testing.T) storetest.Open {
			url := cluster.URL(database(t))
			return func(t *testing.T) store.Store {
				s, err := open(postgres.Config{ConnectionString: url}, t.Context(), logger(t))
				if err != nil {
					t.Fatalf("Open() = %v", err)
				}
				return s
			}
		}
	}
	if absent != nil {
		t.Skip(absent)
	}
	t.Run("Default", func(t *testing.T) { storetest.Run(t, create(postgres.OpenPatient)) })
	// With so little memory that watchers read from the database, and with no
	// group small enough to be sent after the lock.
	t.Run("Small", func(t *testing.T) { storetest.Run(t, create(postgres.OpenSmall)) })
}
