package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/test/parts"
)

// measured runs a benchmark and returns what it printed.
func measured(t *testing.T, args ...string) (r result) {
	t.Helper()
	var out bytes.Buffer
	if err := run(t.Context(), append(args, "-output", "json"), &out, &out); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", out.String())
	return r
}

// A server is started again on entries that were made once.
func TestRestart(t *testing.T) {
	dir, err := os.MkdirTemp("", "be") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	flags := []string{"-server", os.Args[0] + " serve " + dir, "-socketPath", filepath.Join(dir, "s.sock"), "-entries", "120", "-for", "1ms"}
	if r := measured(t, append([]string{"memory"}, flags...)...); r.Operations != 120 || r.Before <= 0 || r.Memory <= 0 {
		t.Errorf("memory: %+v", r)
	}
	if r := measured(t, append([]string{"restart", "-n", "2"}, flags...)...); r.Operations != 2 || r.WallNS <= 0 || r.CPUNS <= 0 {
		t.Errorf("restart: %+v", r)
	}
}

// The store's own interface and a bare loop take turns on each engine, and leave
// nothing behind.
func TestStore(t *testing.T) {
	check := func(t *testing.T, kind, at string) {
		t.Helper()
		r := measured(t, "store", "-store", kind, "-at", at, "-batch", "3", "-for", "50ms")
		if r.Operations < 6 || r.WallNS <= 0 || r.ReferenceWallNS <= 0 || r.Ratio <= 0 || r.Bytes < storeValue {
			t.Errorf("%s: %+v", kind, r)
		}
	}
	missing := func(t *testing.T, err error) {
		t.Helper()
		if _, ok := errors.AsType[*parts.MissingError](err); ok && os.Getenv("CI") != "true" {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Run("sqlite", func(t *testing.T) {
		dir := t.TempDir()
		check(t, "sqlite", dir)
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	})
	t.Run("postgres", func(t *testing.T) {
		p, err := parts.StartPostgres(t.Context())
		missing(t, err)
		defer p.Close()
		check(t, "postgres", p.URL("postgres"))
		if err := p.Until(t.Context(), "SELECT (count(*) = 0)::int FROM pg_namespace WHERE nspname LIKE 'bench%'"); err != nil {
			t.Error(err)
		}
	})
	t.Run("etcd", func(t *testing.T) {
		e, err := parts.StartEtcd(t.Context(), 1)
		missing(t, err)
		defer e.Close()
		check(t, "etcd", e.Endpoints[0])
	})
	for _, args := range [][]string{{"store", "-store", "mysql"}, {"store", "-at", "/none"}, {"restart"}, {"memory", "-server", "/none"}, {"memory", "-server", "/bin/false"}} {
		if err := run(t.Context(), args, io.Discard, io.Discard); err == nil {
			t.Errorf("%v did not fail", args)
		}
	}
}
