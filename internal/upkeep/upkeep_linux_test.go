package upkeep_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/etcd"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/upkeep"
	"github.com/plastron/plastron/test/parts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("td")

// shared are the engines that all tests share, each with a place of its own in them.
var shared struct {
	once          sync.Once
	postgres      *parts.Postgres
	etcd          *parts.Etcd
	noPG, noEtcd  error
	databases     atomic.Int64
	databaseGuard sync.Mutex
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.postgres != nil {
		shared.postgres.Close()
	}
	if shared.etcd != nil {
		shared.etcd.Close()
	}
	os.Exit(code)
}

// place is a store that can be opened, also more than once at a time if others
// can share it.
type place struct {
	open   func(t testing.TB) store.Store
	shared bool
}

func sqlitePlace(t testing.TB) place {
	dir := t.TempDir()
	return place{open: func(t testing.TB) store.Store {
		st, err := sqlite.Config{Dir: dir}.Open(t.Context(), quiet())
		return opened(t, st, err)
	}}
}

func postgresPlace(t testing.TB) place {
	start()
	need(t, shared.noPG)
	name := fmt.Sprintf("d%d", shared.databases.Add(1))
	shared.databaseGuard.Lock() // one template is copied at a time
	err := shared.postgres.Exec(context.Background(), "postgres", "CREATE DATABASE "+name)
	shared.databaseGuard.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	return place{shared: true, open: func(t testing.TB) store.Store {
		st, err := postgres.Config{ConnectionString: shared.postgres.URL(name)}.Open(t.Context(), quiet())
		return opened(t, st, err)
	}}
}

func etcdPlace(t testing.TB) place {
	start()
	need(t, shared.noEtcd)
	prefix := fmt.Sprintf("/test-%d/", shared.databases.Add(1))
	return place{shared: true, open: func(t testing.TB) store.Store {
		st, err := etcd.Config{Endpoints: shared.etcd.Endpoints, Prefix: prefix}.Open(t.Context(), quiet())
		return opened(t, st, err)
	}}
}

func opened(t testing.TB, st store.Store, err error) store.Store {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return st
}

func start() {
	shared.once.Do(func() {
		var both sync.WaitGroup
		both.Go(func() { shared.postgres, shared.noPG = parts.StartPostgres(context.Background()) })
		both.Go(func() { shared.etcd, shared.noEtcd = parts.StartEtcd(context.Background(), 1) })
		both.Wait()
	})
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

func onEach(t *testing.T, test func(t *testing.T, p place)) {
	for name, make := range map[string]func(testing.TB) place{"sqlite": sqlitePlace, "postgres": postgresPlace, "etcd": etcdPlace} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, make(t))
		})
	}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func grant(name string) entry.Entry {
	return entry.Entry{
		ID: name, ParentID: spiffeid.RequireFromPath(td, "/spire/agent/a"), SPIFFEID: spiffeid.RequireFromPath(td, "/"+name),
		Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}, CreatedAt: time.Unix(1e9, 0),
	}
}

// run runs a registry until the test ends.
func run(t testing.TB, r *registry.Registry) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
}

func load(t testing.TB, st store.Store) *registry.Registry {
	t.Helper()
	r, err := registry.Open(t.Context(), st, td, quiet())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func update(t testing.TB, r *registry.Registry, f func(*registry.Tx) error) store.Position {
	t.Helper()
	at, err := r.Update(t.Context(), "test", f)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// fill writes some entries, one by one, and a few other rows.
func fill(t testing.TB, r *registry.Registry, n int) store.Position {
	t.Helper()
	var at store.Position
	update(t, r, func(tx *registry.Tx) error {
		return errors.Join(tx.PutBundle(&bundle.Bundle{TrustDomain: td, Sequence: 1}),
			tx.PutNode(registry.Node{ID: spiffeid.RequireFromPath(td, "/spire/agent/a"), AttestationType: "test"}))
	})
	for i := range n {
		at = update(t, r, func(tx *registry.Tx) error { return tx.PutEntry(grant(fmt.Sprintf("e%d", i))) })
	}
	return at
}

// R126: on each engine a store that was used has no defect, before and after it
// was compacted, and one whose rows do not hold together has the one that was made.
func TestCheckEngines(t *testing.T) {
	onEach(t, func(t *testing.T, p place) {
		st := p.open(t)
		r := load(t, st)
		run(t, r)
		fill(t, r, 20)
		at := update(t, r, func(tx *registry.Tx) error { return tx.DeleteEntry("e3") })
		u := upkeep.New(upkeep.Config{Store: st, TrustDomain: td, Registry: r, Log: quiet()})
		check := func() *upkeep.Report {
			t.Helper()
			report, err := u.Check(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			return report
		}
		got := check()
		if got.At != at || got.Rows != 2*19+3 || got.Batches != 23 || len(got.Defects) != 0 {
			t.Fatalf("%+v", got)
		}
		if begin, err := u.Compact(t.Context(), 5, 0); err != nil || begin.Epoch != at.Epoch || begin.Revision >= at.Revision {
			t.Fatalf("Compact() = %v, %v", begin, err)
		}
		if got := check(); got.Batches != 5 || len(got.Defects) != 0 {
			t.Fatalf("%+v", got)
		}
		stats, err := u.Stats(t.Context())
		if want := (upkeep.Kind{Rows: 19, Bytes: stats.Kinds["entry"].Bytes}); err != nil || stats.Kinds["entry"] != want || want.Bytes < 1000 ||
			stats.Kinds["entry-content"].Rows != 19 || stats.Kinds["node"].Rows != 1 || stats.End != at || stats.Bytes == 0 {
			t.Fatalf("Stats() = %+v, %v", stats, err)
		}

		// What somebody writes past Plastron is found, and mended where it can be.
		e := grant("sneaked")
		var content string
		var value []byte
		if _, err := st.Load(t.Context(), func(key string, _ uint64, v []byte) error {
			if strings.HasPrefix(key, "/entry-content/") && content == "" {
				content = key
			}
			if key == "/entry/e1" {
				value = slices.Clone(v)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, txn := range []store.Txn{{Deletes: []string{content}}, {Puts: []store.Put{{Key: "/entry/" + e.ID, Value: value}}}} {
			if res := st.Commit(t.Context(), []store.Txn{txn})[0]; res.Err != nil {
				t.Fatal(res.Err)
			}
		}
		codes := func(r *upkeep.Report) (out []string) {
			for _, d := range r.Defects {
				out = append(out, d.Code)
			}
			return out
		}
		if got := check(); !slices.Equal(codes(got), []string{"content_missing", "row_unreadable"}) || got.Faults() != 2 {
			t.Fatalf("%+v", got)
		}
		waitFor(t, r, check().At)
		mended, err := u.Check(t.Context(), "operator")
		if err != nil || len(mended.Repaired) != 1 || !slices.Equal(codes(mended), []string{"row_unreadable"}) {
			t.Fatalf("%+v, %v", mended, err)
		}
	})
}

// waitFor waits until a registry has reached a position.
func waitFor(t testing.TB, r *registry.Registry, at store.Position) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); r.Position() != at; {
		if time.Now().After(deadline) {
			t.Fatalf("the registry is at %v, the store at %v", r.Position(), at)
		}
		<-time.After(time.Millisecond)
	}
}

// late is a store whose connections are others when its user wakes up.
type late struct{ store.Store }

// R76, R78: a server that has slept through a compaction loads afresh and holds
// what the others hold.
func TestBehindCompaction(t *testing.T) {
	onEach(t, func(t *testing.T, p place) {
		st := p.open(t)
		r := load(t, st)
		run(t, r)
		asleep := &late{Store: st}
		behind := load(t, asleep) // it does not follow yet
		at := fill(t, r, 30)
		u := upkeep.New(upkeep.Config{Store: st, TrustDomain: td, Log: quiet()})
		if begin, err := u.Compact(t.Context(), 0, 0); err != nil || begin != at {
			t.Fatalf("Compact() = %v, %v, want all up to %v", begin, err, at)
		}
		afresh := make(chan store.Batch, 10)
		behind.Batches(func(b store.Batch) { afresh <- b })
		if p.shared {
			asleep.Store = p.open(t) // one that has not seen the batches go by
		}
		run(t, behind)
		if b := <-afresh; len(b.Writes) != 0 || b.Position != at {
			t.Fatalf("got %+v, want all afresh", b)
		}
		same := func() {
			t.Helper()
			var digests [2][32]byte
			for i, r := range []*registry.Registry{r, behind} {
				r.View(func(s *registry.Snapshot) { digests[i] = s.Digest() })
			}
			if digests[0] != digests[1] {
				t.Error("the two hold different things")
			}
		}
		same()
		next := update(t, r, func(tx *registry.Tx) error { return tx.PutEntry(grant("after")) }) // and it follows again
		waitFor(t, behind, next)
		same()
	})
}

// The bounds of what is kept, and several who compact at once.
func TestCompact(t *testing.T) {
	onEach(t, func(t *testing.T, p place) {
		st := p.open(t)
		r := load(t, st)
		run(t, r)
		u := upkeep.New(upkeep.Config{Store: st, TrustDomain: td, Registry: r, Log: quiet()})
		empty, err := u.Compact(t.Context(), 0, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		at := fill(t, r, 30)
		for _, keep := range []struct {
			batches uint64
			age     time.Duration
		}{{0, time.Hour}, {1000, 0}} {
			if begin, err := u.Compact(t.Context(), keep.batches, keep.age); err != nil || begin != empty {
				t.Fatalf("Compact(%v) = %v, %v, want nothing after %v", keep, begin, err, empty)
			}
		}
		var all sync.WaitGroup
		for i := range 4 {
			st := st
			if p.shared {
				st = p.open(t)
			}
			all.Go(func() {
				u := upkeep.New(upkeep.Config{Store: st, TrustDomain: td, Log: quiet()})
				if _, err := u.Compact(t.Context(), uint64(3*i), 0); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if st, err := st.Stats(t.Context()); err != nil || st.Begin != at || st.Batches != 0 {
			t.Errorf("%+v, %v", st, err)
		}
	})
}

// lying gives a registry other revisions than the store has.
type lying struct{ store.Store }

func (l lying) Load(ctx context.Context, f func(string, uint64, []byte) error) (store.Position, error) {
	return l.Store.Load(ctx, func(key string, rev uint64, value []byte) error { return f(key, rev+1, value) })
}

// R126: what is beside the rows: the engine, the memory, the audit trail.
func TestCheckBesideTheRows(t *testing.T) {
	trailOf := func(t *testing.T) string {
		path := filepath.Join(t.TempDir(), "audit.log")
		w, err := audit.Open(audit.Config{Path: path, Server: "s", Log: quiet()})
		if err != nil {
			t.Fatal(err)
		}
		w.Note(audit.Change{Caller: "x", Key: "/y"}, audit.Change{Caller: "x", Key: "/z"})
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return path
	}
	edit := func(t *testing.T, path string, f func(lines []string) []string) {
		b, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, []byte(strings.Join(f(strings.SplitAfter(string(b), "\n")), "")), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		code   string
		remark bool
		seed   func(t *testing.T, c *upkeep.Config)
	}{
		{code: "", seed: func(*testing.T, *upkeep.Config) {}},
		{code: "store_corrupt", seed: func(_ *testing.T, c *upkeep.Config) {
			c.Intact = func() error { return fault.New(fault.Precondition, "store_corrupt", "page 7").Fix("restore") }
		}},
		{code: "memory_differs", seed: func(t *testing.T, c *upkeep.Config) { c.Registry = load(t, lying{c.Store}) }},
		{code: "audit_missing", remark: true, seed: func(_ *testing.T, c *upkeep.Config) { c.Trail += "x" }},
		{code: "audit_broken", seed: func(t *testing.T, c *upkeep.Config) {
			edit(t, c.Trail, func(lines []string) []string { return slices.Delete(lines, 1, 2) })
		}},
		{code: "audit_broken", seed: func(t *testing.T, c *upkeep.Config) {
			edit(t, c.Trail, func(lines []string) []string {
				lines[1] = strings.Replace(lines[1], "/y", "/x", 1)
				return lines
			})
		}},
		{code: "audit_unreadable", seed: func(t *testing.T, c *upkeep.Config) { c.Trail = t.TempDir() }},
	} {
		t.Run(test.code, func(t *testing.T) {
			st := sqlitePlace(t).open(t)
			r := load(t, st)
			c := upkeep.Config{Store: st, TrustDomain: td, Registry: load(t, st), Trail: trailOf(t), Intact: st.(*sqlite.Store).Check, Log: quiet()}
			run(t, r)
			waitFor(t, c.Registry, r.Position())
			test.seed(t, &c)
			got, err := upkeep.New(c).Check(t.Context(), "")
			switch {
			case err != nil:
				t.Fatal(err)
			case test.code == "":
				if len(got.Defects) != 0 || got.Records != 3 || got.Rows != 1 {
					t.Errorf("%+v", got)
				}
			case len(got.Defects) != 1 || got.Defects[0].Code != test.code || got.Defects[0].Remark != test.remark || got.Defects[0].Fix == "":
				t.Errorf("%+v", got.Defects)
			}
		})
	}
}
