package system_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
)

// Three servers on one database, with agents at two of them: what is written at one is
// pushed by the others, receipts count the agents of all, each server lists all, and
// the same entry is created once.
func TestServersOfOneStore(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	database := startPostgres(t)
	if err := database.Exec(ctx, "postgres", "CREATE DATABASE several"); err != nil {
		t.Fatal(err)
	}
	servers := make([]*deployment, 3)
	for i := range servers {
		servers[i] = newDeployment(t)
		servers[i].dataStore = postgresBlock(database, "several")
		servers[i].launchServer()
	}
	a, b, c := servers[0], servers[1], servers[2]
	var agents []string
	for _, d := range servers {
		d.waitHealthy("server")
	}
	for _, d := range []*deployment{a, b} {
		token, id := d.token()
		d.startAgent(token)
		agents = append(agents, id)
	}

	// Each server lists all three, itself first, and they hold the same.
	for i, d := range servers {
		eventually(t, fmt.Sprintf("server %d lists all", i), func() bool {
			self, others := d.list()
			attached := self.Attached.Agents
			for _, o := range others {
				attached += o.Attached.Agents
				if s := o.Seen; s.State != statusv1.Seen_STATE_LIVE || s.Agreement != statusv1.Seen_AGREEMENT_SAME || !s.ClockKnown || !s.Leased {
					return false
				}
			}
			return self.Seen.Self && len(others) == 2 && attached == 2
		})
	}

	// A hundred at each server create the same entry: one does.
	var callers sync.WaitGroup
	made := make(chan *entryv1.BatchCreateEntryResponse_Result, 300)
	begin := make(chan struct{})
	for _, d := range servers {
		api := d.entries()
		for range 100 {
			callers.Go(func() {
				<-begin
				resp, err := api.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{ParentId: wireID(agents[0]),
					SpiffeId: wireID("spiffe://example.org/same"), Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:4711"}}}}})
				if err != nil {
					t.Errorf("BatchCreateEntry() = %v", err)
					return
				}
				made <- resp.Results[0]
			})
		}
	}
	close(begin)
	callers.Wait()
	close(made)
	count, ids := map[codes.Code]int{}, map[string]bool{}
	for r := range made {
		count[codes.Code(r.Status.Code)]++
		ids[r.GetEntry().GetId()] = true
	}
	if count[codes.OK] != 1 || count[codes.AlreadyExists] != 299 || len(ids) != 1 {
		t.Errorf("300 creators got %v and %d entries", count, len(ids))
	}

	// The third is killed; it shows further down.
	lost, _ := c.list()
	c.server.stop(syscall.SIGKILL)
	killed := time.Now()

	// What is written at A is pushed to an agent at B.
	a.createEntry(agents[1], "/first", nil, mine())
	b.waitServed()
	stream, err := b.workloadAPI().FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	created := make(chan time.Time, 1)
	go func() {
		a.createEntry(agents[1], "/pushed", nil, mine())
		created <- time.Now()
	}()
	pushed := make(chan error, 1)
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil || slices.ContainsFunc(m.Svids, func(s *workload.X509SVID) bool { return strings.HasSuffix(s.SpiffeId, "/pushed") }) {
				pushed <- err
				return
			}
		}
	}()
	select {
	case err := <-pushed:
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("on the agent's stream %v after the creation was acknowledged", time.Since(<-created))
	case <-time.After(patience):
		t.Fatal("what is written at one server does not come to an agent of another")
	}

	// A receipt counts both agents, whichever server is asked.
	for i, d := range []*deployment{a, b} {
		var entries []map[string]any
		for _, agent := range agents {
			entries = append(entries, map[string]any{"parent_id": agent, "spiffe_id": fmt.Sprintf("spiffe://example.org/both%d", i),
				"selectors": []map[string]string{{"type": "unix", "value": "uid:4712"}}})
		}
		file, err := json.Marshal(map[string]any{"entries": entries})
		if err != nil {
			t.Fatal(err)
		}
		d.write("entries.json", string(file))
		out := d.run("server", "entry", "create", "-socketPath", d.adminSocket(), "-data", d.path("entries.json"), "-wait", "120s")
		if !strings.Contains(out, "in force on 2/2 agents") {
			t.Errorf("server %d: %s", i, out)
		}
		t.Logf("server %d: %s", i, out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:])
	}
	_, others := a.list()
	for i, d := range []*deployment{a, b} {
		show := a.run("server", "agent", "show", "-socketPath", a.adminSocket(), "-spiffeID", agents[i])
		self, _ := d.list()
		if !strings.Contains(show, "Attached to       : server "+self.Id) {
			t.Errorf("agent %d is at %s, but A says:\n%s", i, self.Id, show)
		}
	}

	// The one that was killed is shown silent, the other is not.
	for deadline := time.After(10 * time.Minute); ; {
		right := 0
		for _, o := range others {
			if silent := o.Seen.State == statusv1.Seen_STATE_SILENT; silent == (o.Id == lost.Id) && (silent || o.Seen.State == statusv1.Seen_STATE_LIVE) {
				right++
			}
		}
		if right == 2 {
			break
		}
		select {
		case <-deadline:
			t.Fatalf("the server that was killed is not shown silent, or another is: %v", others)
		case <-time.After(time.Second):
			_, others = a.list()
		}
	}
	t.Logf("shown silent %v after it was killed:\n%s", time.Since(killed), a.run("server", "list", "-socketPath", a.adminSocket()))
}

// list asks a server for all of them.
func (d *deployment) list() (self *statusv1.ServerStatus, others []*statusv1.ServerStatus) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), patience)
	defer cancel()
	got, err := statusv1.NewServerClient(dialUnix(d.t, d.adminSocket())).List(ctx, &statusv1.ListRequest{})
	if err != nil {
		d.t.Fatal(err)
	}
	return got.Servers[0], got.Servers[1:]
}
