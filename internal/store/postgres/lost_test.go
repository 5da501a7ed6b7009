//go:build linux

package postgres_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/storetest"
	"github.com/plastron/plastron/test/parts"
	"golang.org/x/sync/errgroup"
)

// outcomes are the results of writers that each write pairs of new keys.
type outcomes struct {
	mu sync.Mutex
	of map[string]store.Result // by the pair's name
}

// writeOn commits until stop is closed, and at least once.
func (o *outcomes) writeOn(s *postgres.Store, name string, stop <-chan struct{}) {
	for i := 0; ; i++ {
		pair := fmt.Sprintf("%s.%d", name, i)
		txn := create(pair+"/1", pair)
		txn.Puts = append(txn.Puts, store.Put{Key: pair + "/2", Value: []byte(pair)})
		r := s.Commit(context.Background(), []store.Txn{txn})[0]
		o.mu.Lock()
		o.of[pair] = r
		o.mu.Unlock()
		select {
		case <-stop:
			return
		default:
		}
	}
}

// count returns how many were acknowledged.
func (o *outcomes) count() (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, r := range o.of {
		if r.Err == nil {
			n++
		}
	}
	return n
}

// check compares what was answered with what is there (R73): what was
// acknowledged, whole and at its revision; nothing of what was refused.
func (o *outcomes) check(t *testing.T, rows map[string]storetest.Row) (unknown int) {
	t.Helper()
	for pair, r := range o.of {
		one, there := rows[pair+"/1"]
		two, both := rows[pair+"/2"]
		switch {
		case there != both || one.Rev != two.Rev:
			t.Errorf("%s is there in part: %v, %v", pair, one, two)
		case r.Err == nil && one.Rev != r.Position.Revision:
			t.Errorf("%s was acknowledged at %v and is at %d", pair, r.Position, one.Rev)
		case fault.ReasonOf(r.Err) == "outcome_unknown":
			unknown++
		case r.Err != nil && there:
			t.Errorf("%s was refused and is there: %v", pair, r.Err)
		case r.Err != nil && fault.KindOf(r.Err) != fault.Unavailable:
			t.Errorf("%s: %v", pair, r.Err)
		}
	}
	return unknown
}

// more waits until so many more were acknowledged.
func (o *outcomes) more(ctx context.Context, t *testing.T, n int) {
	t.Helper()
	for n += o.count(); o.count() < n; {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal("no commits are acknowledged")
		}
	}
}

// watchToEnd watches until a batch of the caller "end", and again whenever the
// store cannot be reached.
func watchToEnd(ctx context.Context, t *testing.T, s *postgres.Store, at store.Position) {
	for ctx.Err() == nil {
		for batch, err := range s.Watch(ctx, at) {
			if err != nil {
				if fault.KindOf(err) != fault.Unavailable {
					t.Errorf("Watch(%v) = %v", at, err)
					return
				}
				break
			}
			if batch.Prev != at {
				t.Errorf("%v follows %v, expected %v", batch.Position, batch.Prev, at)
			}
			if at = batch.Position; batch.Writes[0].Caller == "end" {
				return
			}
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	t.Errorf("watcher ended at %v", at)
}

// writeEnd writes what ends the watchers.
func writeEnd(ctx context.Context, t *testing.T, s *postgres.Store) {
	t.Helper()
	end := create("end", "")
	end.Caller = "end"
	for {
		r := s.Commit(ctx, []store.Txn{end})[0]
		if r.Err == nil {
			return
		}
		if fault.ReasonOf(r.Err) == "outcome_unknown" || ctx.Err() != nil {
			t.Fatal(r.Err)
		}
	}
}

// Sessions of writers are terminated all the time, at any step of a commit. Over
// a direct connection the outcome is always known.
func TestSessionsTerminated(t *testing.T) {
	name := database(t)
	a, b := opened(t, cluster.URL(name)), opened(t, cluster.URL(name))
	_, begin := storetest.State(t, a)
	o := &outcomes{of: map[string]store.Result{}}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() { o.writeOn([]*postgres.Store{a, b}[w%2], fmt.Sprint(w), stop) })
	}
	for range 60 {
		exec(t, name, "SELECT pg_sleep(0.01 * random()); SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'plastron-%-w' AND datname = current_database()")
	}
	close(stop)
	wg.Wait()
	if n := o.check(t, agree(t, begin, a, b)); n != 0 {
		t.Errorf("%d of %d outcomes are not known", n, len(o.of))
	}
	t.Logf("%d commits, %d acknowledged", len(o.of), o.count())
	commit(t, a, create("after", ""))
}

// A database that was there when a server started, and then is busy or goes away for
// a while, ends no start: it is asked again. What is there is made once. R82, R87.
func TestOpenInsists(t *testing.T) {
	name := database(t)
	busy, err := pgconn.Connect(t.Context(), cluster.URL(name))
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close(context.Background())
	do := func(sql string) {
		t.Helper()
		if _, err := busy.Exec(t.Context(), sql).ReadAll(); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	const waiting = "FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
	until := func() { // one waits for the lock
		t.Helper()
		for ctx := limited(t); ; {
			rows := busy.ExecParams(ctx, "SELECT 1 "+waiting, nil, nil, nil, nil).Read()
			if rows.Err != nil {
				t.Fatal(rows.Err)
			}
			if len(rows.Rows) > 0 {
				return
			}
		}
	}
	for _, tt := range []struct {
		open postgres.OpenFunc
		ends bool
	}{{postgres.OpenAtOnce, true}, {postgres.OpenPatient, false}} {
		do(fmt.Sprintf("SELECT pg_advisory_lock(%d)", postgres.CreationLock))
		var opening errgroup.Group
		opening.Go(func() error {
			s, err := tt.open(postgres.Config{ConnectionString: cluster.URL(name)}, t.Context(), logger(t))
			if err != nil {
				return err
			}
			return s.Close()
		})
		until()
		do("SELECT pg_terminate_backend(pid) " + waiting)
		if !tt.ends {
			until() // it has come again
		}
		do(fmt.Sprintf("SELECT pg_advisory_unlock(%d)", postgres.CreationLock))
		if err := opening.Wait(); tt.ends {
			must(t, "Open", err, fault.Unavailable, "database_unreachable")
		} else if err != nil {
			t.Errorf("Open() = %v", err)
		}
	}
}

// relay stands between a store and its database.
type relay struct {
	mu     sync.Mutex
	conns  []net.Conn
	silent atomic.Bool   // nothing is passed on to the store
	deaf   atomic.Bool   // nothing is passed on to the database
	kept   chan struct{} // gets a value when a group was not passed on
}

// startRelay returns a relay and the connection string that leads through it.
func startRelay(t *testing.T, name string) (*relay, string) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.1"))
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{kept: make(chan struct{}, 1)}
	t.Cleanup(func() { l.Close(); r.cut() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", filepath.Join(cluster.Dir, ".s.PGSQL."+cluster.Port))
			if err != nil {
				near.Close()
				continue
			}
			r.mu.Lock()
			r.conns = append(r.conns, near, far)
			r.mu.Unlock()
			go r.pass(far, near, &r.deaf)
			go r.pass(near, far, &r.silent)
		}
	}()
	return r, "postgres:///" + name + "?user=plastron&port=1&host=" + url.QueryEscape(dir)
}

func (r *relay) pass(to, from net.Conn, not *atomic.Bool) {
	defer to.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if not.Load() {
			if bytes.Contains(buf[:n], []byte("COMMIT\x00")) && not == &r.deaf {
				r.kept <- struct{}{}
			}
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// cut closes all connections; new ones work.
func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Close()
	}
	r.conns = nil
}

// A connection is lost before the database hears of a group, and after it has
// committed it. Both times the answer is the truth.
func TestConnectionLost(t *testing.T) {
	name := database(t)
	r, url := startRelay(t, name)
	s, other := opened(t, url), opened(t, cluster.URL(name))
	at := commit(t, s, create("taken", ""))
	send := func(txns ...store.Txn) <-chan []store.Result {
		done := make(chan []store.Result, 1)
		go func() { done <- s.Commit(context.Background(), txns) }()
		return done
	}

	// Failed but written: the group's log row names what held.
	r.silent.Store(true)
	done := send(create("written/1", ""), create("taken", "x"), create("written/2", ""))
	for batch, err := range other.Watch(limited(t), at) {
		if err != nil {
			t.Fatal(err)
		}
		at = batch.Position
		break
	}
	r.silent.Store(false)
	r.cut()
	results := <-done
	for _, i := range []int{0, 2} {
		if results[i].Err != nil || results[i].Position != at {
			t.Errorf("transaction %d is in the log at %v, answered %v, %v", i, at, results[i].Position, results[i].Err)
		}
	}
	must(t, "Commit", results[1].Err, fault.Conflict, "key_changed")

	// Failed and not written, over a connection that has worked: it is sent again.
	at = commit(t, s, create("between", ""))
	r.deaf.Store(true)
	done = send(create("lost", ""))
	select {
	case <-r.kept:
	case <-limited(t).Done():
		t.Fatal("the group was not sent")
	}
	r.deaf.Store(false)
	r.cut()
	if r := (<-done)[0]; r.Err != nil || r.Position.Revision != at.Revision+1 {
		t.Errorf("Commit() = %v at %v, want one revision after %v", r.Err, r.Position, at)
	}
	if rows, now := storetest.State(t, s); now.Revision != at.Revision+1 || rows["lost"].Rev != now.Revision {
		t.Errorf("the store is at %v with %v", now, rows["lost"])
	}
}

// R80, FM24: the database falls silent, and no connection breaks. Who waits is
// told so, all at once and not one after the other, and what was not sent is not
// called unknown.
func TestSilentDatabase(t *testing.T) {
	name := database(t)
	r, url := startRelay(t, name)
	s, err := postgres.OpenForSilence(postgres.Config{ConnectionString: url}, limited(t), logger(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	commit(t, s, create("before", ""))
	r.deaf.Store(true)
	txns := make([]store.Txn, 50) // each is a group
	for i := range txns {
		txns[i].Puts = []store.Put{{Key: "same", Value: []byte{byte(i)}}}
	}
	began := time.Now()
	results := s.Commit(context.Background(), txns)
	took := time.Since(began)
	must(t, "the commit that was sent", results[0].Err, fault.Unavailable, "outcome_unknown")
	for _, r := range results[1:] {
		must(t, "a commit that was not sent", r.Err, fault.Unavailable, "database_unreachable")
	}
	if took > 50*time.Second {
		t.Errorf("refused after %v", took)
	}
	r.deaf.Store(false)
	<-r.kept
	r.cut()
	commit(t, s, create("after", ""))
	if rows, _ := storetest.State(t, s); rows["same"] != (storetest.Row{}) {
		t.Errorf("the group that was not passed on is there: %v", rows["same"])
	}
	t.Logf("refused after %v", took)
}

// R73, FM19: the database is killed under writers on two stores, again and again.
// Both go on by themselves, watchers too.
func TestDatabaseKilled(t *testing.T) {
	if absent != nil {
		t.Skip(absent)
	}
	own, err := parts.StartPostgres(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	a, b := opened(t, own.URL("postgres")), opened(t, own.URL("postgres"))
	_, begin := storetest.State(t, a)
	o := &outcomes{of: map[string]store.Result{}}
	stop := make(chan struct{})
	var writing, watching sync.WaitGroup
	for w := range 50 {
		writing.Go(func() { o.writeOn([]*postgres.Store{a, b}[w%2], fmt.Sprint(w), stop) })
	}
	ctx := limited(t)
	for _, s := range []*postgres.Store{a, b} {
		watching.Go(func() { watchToEnd(ctx, t, s, begin) })
	}
	for range 4 {
		o.more(ctx, t, 200)
		if err := own.Crash(); err != nil {
			t.Fatal(err)
		}
		if err := own.Start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	writing.Wait()
	writeEnd(ctx, t, a)
	watching.Wait()
	unknown := o.check(t, agree(t, begin, a, b))
	t.Logf("%d commits, %d acknowledged, %d unknown", len(o.of), o.count(), unknown)
}

// What refuses Open is no more than "not now" to a store that is open: it goes on
// once that is mended.
func TestLoginLost(t *testing.T) {
	name := database(t)
	exec(t, name, "CREATE ROLE guest_"+name+" LOGIN; GRANT ALL ON SCHEMA public TO guest_"+name)
	s, err := postgres.OpenHasty(postgres.Config{ConnectionString: strings.ReplaceAll(cluster.URL(name), "user=plastron", "user=guest_"+name)}, limited(t), logger(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	at := commit(t, s, create("a", ""))
	exec(t, name, "ALTER ROLE guest_"+name+" NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'guest_"+name+"'")
	await(t, name, "SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'guest_"+name+"'")
	var last error
	for ctx := limited(t); fault.ReasonOf(last) != "database_login" && ctx.Err() == nil; {
		last = s.Commit(ctx, []store.Txn{create("b", "")})[0].Err
	}
	must(t, "Commit", last, fault.Unavailable, "database_login")
	for _, err := range s.Watch(limited(t), at) {
		must(t, "Watch", err, fault.Unavailable, fault.ReasonOf(err))
		break
	}
	exec(t, name, "ALTER ROLE guest_"+name+" LOGIN")
	commit(t, s, create("c", ""))
}
