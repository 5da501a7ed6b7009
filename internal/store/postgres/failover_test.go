//go:build linux

package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/storetest"
	"github.com/plastron/plastron/test/parts"
)

// replicated starts a primary and its replica.
func replicated(t *testing.T, settings ...string) (primary, replica *parts.Postgres) {
	t.Helper()
	if absent != nil {
		t.Skip(absent)
	}
	primary, err := parts.StartPostgres(limited(t), settings...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { primary.Close() })
	replica, err = primary.Replica(limited(t), "replica")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { replica.Close() })
	return primary, replica
}

// value asks a cluster, and not by way of a store.
func value(t *testing.T, p *parts.Postgres, sql string) string {
	t.Helper()
	c, err := pgconn.Connect(limited(t), p.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(context.Background())
	r := c.ExecParams(limited(t), sql, nil, nil, nil, nil).Read()
	if r.Err != nil || len(r.Rows) != 1 {
		t.Fatalf("%s: %d rows, %v", sql, len(r.Rows), r.Err)
	}
	return string(r.Rows[0][0])
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// R73: the primary is killed under writers and its synchronous replica promoted.
// Nothing that was acknowledged is lost, the log goes on in the same epoch, and
// watchers see it whole. When the old primary comes back and takes writes, nobody
// gives it any.
func TestFailover(t *testing.T) {
	old, replica := replicated(t, "synchronous_standby_names=replica")
	urls := parts.URLs("postgres", old, replica)
	a, b := opened(t, urls), opened(t, urls)
	_, begin := storetest.State(t, a)
	o := &outcomes{of: map[string]store.Result{}}
	stop := make(chan struct{})
	var writing, watching sync.WaitGroup
	for w := range 20 {
		writing.Go(func() { o.writeOn([]*postgres.Store{a, b}[w%2], fmt.Sprint(w), stop) })
	}
	ctx := limited(t)
	for _, s := range []*postgres.Store{a, b} {
		watching.Go(func() { watchToEnd(ctx, t, s, begin) })
	}
	o.more(ctx, t, 200)
	try(t, old.Kill())
	try(t, replica.Promote(ctx))
	promoted := time.Now()
	o.more(ctx, t, 1)
	t.Logf("the first write is acknowledged %v after the promotion", time.Since(promoted))
	o.more(ctx, t, 200)

	// It does not know of its replica any more, or its commits would hang.
	old.Forget()
	try(t, old.Start(ctx))
	const state = "SELECT concat(epoch, ' ', rev) FROM plastron_head"
	left := value(t, old, state)
	for range 3 {
		o.more(ctx, t, 50)
		try(t, replica.Exec(ctx, "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'plastron-%'"))
	}
	o.more(ctx, t, 50)
	c := opened(t, urls) // one that knows nothing of what was
	commit(t, c, create("c", ""))
	close(stop)
	writing.Wait()
	writeEnd(ctx, t, a)
	watching.Wait()
	rows := agree(t, begin, a, b, c)
	t.Logf("%d commits, %d acknowledged, %d unknown", len(o.of), o.count(), o.check(t, rows))
	if now := value(t, old, state); now != left {
		t.Errorf("the old primary was written to: %s, was %s", now, left)
	}
	try(t, replica.Crash())
	_, err := a.Load(ctx, func(string, uint64, []byte) error { return nil })
	must(t, "Load", err, fault.Unavailable, "database_stale")
	if now := value(t, old, state); now != left {
		t.Errorf("the old primary was written to: %s, was %s", now, left)
	}
}

// R21: the replica that is promoted has not got everything that was acknowledged,
// which an asynchronous one need not. The stores notice it and draw one new epoch
// between them.
func TestFailoverWithLoss(t *testing.T) {
	old, replica := replicated(t)
	urls := parts.URLs("postgres", old, replica)
	a, b := opened(t, urls), opened(t, urls)
	_, begin := storetest.State(t, a)
	kept := commit(t, a, create("kept", ""))
	try(t, old.Sent(limited(t)))
	try(t, replica.Crash())
	lost := commit(t, a, create("lost", ""))
	for _, s := range []*postgres.Store{a, b} {
		storetest.Replay(t, s, begin, lost) // both have seen it
	}
	try(t, old.Kill())
	try(t, replica.Start(limited(t)))
	try(t, replica.Promote(limited(t)))

	for _, s := range []*postgres.Store{a, b} {
		for ctx := limited(t); ; {
			err := s.Commit(ctx, []store.Txn{{Puts: []store.Put{{Key: "blind"}}}})[0].Err
			if fault.ReasonOf(err) == "epoch_changed" {
				break
			}
			if fault.KindOf(err) != fault.Unavailable || ctx.Err() != nil {
				t.Fatalf("Commit() = %v before the store was loaded", err)
			}
		}
		for ctx := limited(t); ; {
			var err error
			for _, err = range s.Watch(ctx, lost) {
				break
			}
			if fault.ReasonOf(err) == "epoch_changed" {
				break
			}
			if fault.KindOf(err) != fault.Unavailable || ctx.Err() != nil {
				t.Fatalf("Watch(%v) = %v", lost, err)
			}
		}
	}
	rows, now := storetest.State(t, a)
	if _, there := rows["lost"]; there || len(rows) != 1 || now.Epoch == kept.Epoch || now.Revision != kept.Revision {
		t.Errorf("at %v with %v, was at %v", now, rows, lost)
	}
	if _, other := storetest.State(t, b); other != now {
		t.Errorf("one store is at %v, the other at %v", now, other)
	}
	next := commit(t, a, create("after", ""))
	storetest.Replay(t, b, now, next)
}

func TestSynchronousReplica(t *testing.T) {
	primary, replica := replicated(t, "synchronous_standby_names=replica")
	t.Run("Hangs", func(t *testing.T) { testReplicaHangs(t, primary, replica) })
	t.Run("FailoverBehindPooler", func(t *testing.T) { testFailoverBehindPooler(t, primary, replica) })
}

// A synchronous replica hangs, so commits wait for it. When a session is ended
// that waits, or the wait is cancelled, the database has committed and shows what
// its replica may not have: none of that is acknowledged before it has (R73).
func testReplicaHangs(t *testing.T, primary, replica *parts.Postgres) {
	s := opened(t, primary.URL("postgres"))
	for i, end := range []string{"pg_cancel_backend", "pg_terminate_backend"} {
		t.Run(end, func(t *testing.T) {
			_, begin := storetest.State(t, s)
			try(t, replica.Freeze())
			done := make(chan store.Result, 1)
			go func() { done <- s.Commit(context.Background(), []store.Txn{create(fmt.Sprint(i), "")})[0] }()
			waiting := "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'plastron-%-w' AND wait_event = 'SyncRep'"
			try(t, primary.Until(limited(t), waiting))
			value(t, primary, "SELECT "+end+"(pid) FROM pg_stat_activity WHERE application_name LIKE 'plastron-%-w' AND wait_event = 'SyncRep'")
			try(t, primary.Until(limited(t), fmt.Sprintf("SELECT rev - %d FROM plastron_head", begin.Revision))) // it is shown
			try(t, primary.Until(limited(t), waiting))                                                           // and waited for
			select {
			case r := <-done:
				t.Errorf("acknowledged with %v while the replica hangs", r)
			default:
			}
			try(t, replica.Thaw())
			if r := <-done; r.Err != nil || r.Position.Revision != begin.Revision+1 {
				t.Errorf("Commit() = %v, %v", r.Position, r.Err)
			}
		})
	}
}

// A pooler before the primary is pointed to the replica. What was under way when
// the primary died may be unknown, since the pooler may still hold it; nothing
// acknowledged is lost.
func testFailoverBehindPooler(t *testing.T, old, replica *parts.Postgres) {
	pooler, err := parts.StartPgbouncer(limited(t), old)
	if _, missing := errors.AsType[*parts.MissingError](err); missing && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	try(t, err)
	defer pooler.Close()
	try(t, old.Exec(limited(t), "postgres", "CREATE DATABASE pooled"))
	s := opened(t, pooler.URL("pooled"))
	_, begin := storetest.State(t, s)
	o := &outcomes{of: map[string]store.Result{}}
	stop := make(chan struct{})
	var writing, watching sync.WaitGroup
	for w := range 10 {
		writing.Go(func() { o.writeOn(s, fmt.Sprint(w), stop) })
	}
	ctx := limited(t)
	watching.Go(func() { watchToEnd(ctx, t, s, begin) })
	o.more(ctx, t, 100)
	try(t, old.Kill())
	try(t, replica.Promote(ctx))
	try(t, pooler.Point(replica))
	promoted := time.Now()
	o.more(ctx, t, 1)
	t.Logf("the first write is acknowledged %v after the promotion", time.Since(promoted))
	o.more(ctx, t, 100)
	close(stop)
	writing.Wait()
	writeEnd(ctx, t, s)
	watching.Wait()
	direct := opened(t, replica.URL("pooled"))
	t.Logf("%d commits, %d acknowledged, %d unknown", len(o.of), o.count(), o.check(t, agree(t, begin, s, direct)))
}
