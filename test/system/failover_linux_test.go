package system_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/test/parts"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// acked are the entries that servers acknowledged to writers.
type acked struct {
	mu  sync.Mutex
	ids []string
}

// write creates entries on one server until ctx is done.
func (a *acked) write(ctx context.Context, d *deployment, parent, name string) {
	api := d.entries()
	for n := 0; ctx.Err() == nil; n++ {
		id := fmt.Sprintf("%s-%d", name, n)
		e := &spiretypes.Entry{Id: id, ParentId: wireID(parent), SpiffeId: wireID("spiffe://example.org/" + id),
			Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:4242"}}}
		resp, err := api.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
		if err != nil || resp.Results[0].Status.Code != 0 {
			pause(ctx)
			continue
		}
		a.mu.Lock()
		a.ids = append(a.ids, id)
		a.mu.Unlock()
	}
}

func (a *acked) all() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ids[:len(a.ids):len(a.ids)]
}

// more waits for so many more acknowledged entries.
func (a *acked) more(t *testing.T, n int) {
	t.Helper()
	before := len(a.all())
	eventually(t, "writes", func() bool { return len(a.all()) >= before+n })
}

// fetches makes new connections to an agent and fetches on each, until ctx is done.
func (d *deployment) fetches(ctx context.Context, done, failed *atomic.Int64) {
	for ctx.Err() == nil {
		out, cancel := context.WithTimeout(withHeader(context.Background()), patience)
		conn := dialUnix(d.t, d.workloadSocket())
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(out, &workload.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		cancel()
		conn.Close()
		done.Add(1)
		if err != nil && failed.Add(1) < 10 {
			d.t.Errorf("FetchX509SVID: %v", err)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// PostgreSQL fails over under two servers, their agents and writers, twice: to a
// synchronous replica, which has all that was acknowledged (R73), and then to one
// that was left behind, which is as a restore from a backup: a new epoch, in which
// outstanding tokens are void (R21), and agents compare hashes and go on. Not one
// fetch fails in all that time.
func TestDatabaseFailover(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	first, err := parts.StartPostgres(ctx, "synchronous_standby_names=second")
	need(t, err)
	t.Cleanup(func() { first.Close() })
	second, err := first.Replica(ctx, "second")
	need(t, err)
	t.Cleanup(func() { second.Close() })
	third, err := first.Replica(ctx, "third")
	need(t, err)
	t.Cleanup(func() { third.Close() })

	var servers []*deployment
	var agents []string
	for range 2 {
		d := newDeployment(t)
		d.dataStore = fmt.Sprintf(`DataStore "sql" { plugin_data { database_type = "postgres" connection_string = %q } }`,
			parts.URLs("postgres", first, second, third))
		servers, agents = append(servers, d), append(agents, d.start())
	}
	for i, d := range servers {
		d.createEntry(agents[i], fmt.Sprintf("/web%d", i), nil, mine())
		// This one has to be renewed meanwhile; where a failover takes longer it lapses.
		d.createEntry(agents[i], fmt.Sprintf("/brief%d", i), func(e *spiretypes.Entry) { e.X509SvidTtl = 20 }, mine())
		d.waitServed()
	}
	unused, _ := servers[0].token()
	if err := first.Sent(ctx); err != nil {
		t.Fatal(err)
	}
	if err := third.Crash(); err != nil { // it is behind from now on
		t.Fatal(err)
	}

	background, stop := context.WithCancel(ctx)
	defer stop()
	var done, failed atomic.Int64
	var fetching, writing sync.WaitGroup
	for _, d := range servers {
		fetching.Go(func() { d.fetches(background, &done, &failed) })
	}
	writers, stopWriters := context.WithCancel(background)
	defer stopWriters()
	var written acked
	for i, d := range servers {
		for w := range 3 {
			writing.Go(func() { written.write(writers, d, agents[i], fmt.Sprintf("w%d-%d", i, w)) })
		}
	}
	written.more(t, 30)
	epoch := servers[0].epoch()

	// To the synchronous one.
	for _, f := range []func() error{first.Kill, func() error { return second.Promote(ctx) }} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	promoted := time.Now()
	written.more(t, 1)
	t.Logf("the first write after %v", time.Since(promoted))
	written.more(t, 30)
	for i, d := range servers { // written on one, served by the agent of the other
		path := fmt.Sprintf("/after%d", i)
		d.createEntryAtLast(agents[1-i], path)
		servers[1-i].hasPath(path)
		if now := d.epoch(); now != epoch {
			t.Errorf("server %d has epoch %s, was %s", i, now, epoch)
		}
	}
	stopWriters()
	writing.Wait()
	for i, d := range servers {
		eventually(t, fmt.Sprintf("server %d shows all that was acknowledged", i), func() bool {
			has := map[string]bool{}
			list, err := d.entries().ListEntries(ctx, &entryv1.ListEntriesRequest{})
			if err != nil {
				return false
			}
			for _, e := range list.Entries {
				has[e.Id] = true
			}
			return !slices.ContainsFunc(written.all(), func(id string) bool { return !has[id] })
		})
	}

	// To the one that was left behind.
	for _, f := range []func() error{second.Kill, func() error { return third.Start(ctx) }, func() error { return third.Promote(ctx) }} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range servers {
		eventually(t, "a new epoch", func() bool { return d.epoch() != epoch })
	}
	if one, two := servers[0].epoch(), servers[1].epoch(); one != two {
		t.Errorf("one server has epoch %s, the other %s", one, two)
	}
	for i, d := range servers {
		path := fmt.Sprintf("/later%d", i)
		d.createEntryAtLast(agents[1-i], path)
		servers[1-i].hasPath(path)
		eventually(t, "what was lost is withdrawn", func() bool {
			return !strings.Contains(servers[1-i].run("agent", "api", "fetch", "x509", "-socketPath", servers[1-i].workloadSocket()), "/after")
		})
		d.hasPath(fmt.Sprintf("/brief%d", i)) // renewed, whatever it went through
	}
	stop()
	fetching.Wait()
	t.Logf("%d entries acknowledged, %d fetches, %d failed", len(written.all()), done.Load(), failed.Load())

	late := servers[0].beside()
	late.writeBundle()
	if out := late.runAgentExpectingRefusal(unused); !strings.Contains(out, "token") {
		t.Errorf("a token of the old epoch was answered:\n%s", out)
	}
}

// createEntryAtLast creates an entry for processes like this one, as soon as the
// server's store is there again: another server may have found it earlier.
func (d *deployment) createEntryAtLast(parent, path string) {
	d.t.Helper()
	kind, value, _ := strings.Cut(mine(), ":")
	e := &spiretypes.Entry{ParentId: wireID(parent), SpiffeId: wireID("spiffe://" + d.trustDomain + path), Selectors: []*spiretypes.Selector{{Type: kind, Value: value}}}
	eventually(d.t, path+" is created", func() bool {
		resp, err := d.entries().BatchCreateEntry(d.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
		if err == nil {
			err = itemError(resp.Results[0].Status, nil)
		}
		switch status.Code(err) {
		case codes.OK, codes.AlreadyExists: // an answer that got lost may have been a yes
			return true
		case codes.Unavailable, codes.Aborted:
			return false
		}
		d.t.Fatalf("create %s: %v", path, err)
		return false
	})
}

// epoch of the store, as a server's status shows it.
func (d *deployment) epoch() string {
	d.t.Helper()
	for line := range strings.Lines(d.run("server", "status", "-socketPath", d.adminSocket())) {
		if at, ok := strings.CutPrefix(line, "Position"); ok {
			epoch, _, _ := strings.Cut(strings.Trim(at, ": \n"), ":")
			return epoch
		}
	}
	d.t.Fatal("status shows no position")
	return ""
}
