package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/storetest"
	"github.com/plastron/plastron/test/parts"
)

// one is the single member that most tests share, each under a prefix of its own.
var one struct {
	sync.Once
	etcd *parts.Etcd
	err  error
	used atomic.Int64
}

func TestMain(m *testing.M) {
	code := m.Run()
	if one.etcd != nil {
		one.etcd.Close()
	}
	os.Exit(code)
}

// need skips a test whose part is not installed; not in CI.
func need(t testing.TB, err error) {
	t.Helper()
	if _, missing := errors.AsType[*parts.MissingError](err); missing && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// shared returns a configuration with a prefix that nobody uses.
func shared(t testing.TB) Config {
	t.Helper()
	one.Do(func() {
		one.etcd, one.err = parts.StartEtcd(context.Background(), 1, "--quota-backend-bytes", "4294967296")
	})
	need(t, one.err)
	return Config{Endpoints: one.etcd.Endpoints, Prefix: fmt.Sprintf("/test-%d/", one.used.Add(1))}
}

// cluster starts a cluster for one test.
func cluster(t testing.TB, members int, flags ...string) (*parts.Etcd, Config) {
	t.Helper()
	e, err := parts.StartEtcd(t.Context(), members, flags...)
	need(t, err)
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e, Config{Endpoints: e.Endpoints}
}

func slogTo(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

func openStore(t testing.TB, c Config, limit limits) *Store {
	t.Helper()
	s, err := c.open(t.Context(), slogTo(t), limit)
	if err != nil {
		t.Fatalf("Open() = %v", err)
	}
	return s
}

// opened closes the store at the end of the test.
func opened(t testing.TB, c Config) *Store {
	t.Helper()
	s := openStore(t, c, patient())
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// patient are the default limits for a machine that is busy with other tests.
func patient() limits {
	l := defaultLimits()
	l.attempt, l.commit, l.stale = 20*time.Second, 60*time.Second, 60*time.Second
	return l
}

func limited(t testing.TB) context.Context {
	ctx, stop := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(stop)
	return ctx
}

func put(key, value string) store.Txn {
	return store.Txn{Caller: "test", Puts: []store.Put{{Key: key, Value: []byte(value)}}}
}

func create(key, value string) store.Txn {
	t := put(key, value)
	t.Conditions = []store.Condition{{Key: key}}
	return t
}

func commit(t testing.TB, s *Store, txn store.Txn) store.Position {
	t.Helper()
	r := s.Commit(context.Background(), []store.Txn{txn})[0]
	if r.Err != nil {
		t.Fatalf("Commit() = %v", r.Err)
	}
	return r.Position
}

// must checks the kind and reason of an error, and that it says what to do.
func must(t testing.TB, err error, kind fault.Kind, reason string) {
	t.Helper()
	f, ok := errors.AsType[*fault.Error](err)
	if !ok || f.Kind != kind || f.Reason != reason {
		t.Fatalf("%v (%s, %s), want %s, %s", err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
	if f.Remedy == "" && reason != "epoch_changed" && reason != "compacted" && reason != "position_unknown" {
		t.Errorf("%v names no remedy", err)
	}
}

func TestContract(t *testing.T) {
	run := func(limit limits) func(t *testing.T) storetest.Open {
		return func(t *testing.T) storetest.Open {
			c := shared(t)
			return func(t *testing.T) store.Store { return openStore(t, c, limit) }
		}
	}
	t.Run("Default", func(t *testing.T) { storetest.Run(t, run(patient())) })
	// With requests so small that values go into parts all the time.
	small := patient()
	small.request = 16 << 10
	t.Run("Small", func(t *testing.T) { storetest.Run(t, run(small)) })
}
