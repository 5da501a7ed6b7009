package system_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

// churn creates and deletes entries of several agents while the server comes and
// goes, and remembers what it ever asked for.
type churn struct {
	d      *deployment
	agents []string

	mu    sync.Mutex // guards everything below
	asked []map[string]bool
	done  int // changes that the server acknowledged
}

// run goes on until ctx is done. No SPIFFE ID is used twice; every third entry
// is for a selector that nobody here shows.
func (c *churn) run(ctx context.Context) {
	api := c.d.entries()
	rnd := rand.New(rand.NewPCG(1, 2))
	var live []string
	for n := 0; ctx.Err() == nil; n++ {
		call, cancel := context.WithTimeout(ctx, 2*time.Second)
		var err error
		if len(live) > 20 || len(live) > 0 && rnd.IntN(2) == 0 {
			i := rnd.IntN(len(live))
			if _, err = api.BatchDeleteEntry(call, &entryv1.BatchDeleteEntryRequest{Ids: live[i : i+1]}); err == nil {
				live = slices.Delete(live, i, i+1)
			}
		} else {
			agent := rnd.IntN(len(c.agents))
			id, selector := fmt.Sprintf("spiffe://example.org/a%d/%d", agent, n), mine()
			if n%3 == 0 {
				selector = "unix:uid:4242"
			} else {
				c.mu.Lock()
				c.asked[agent][id] = true // before: an answer that is lost may have been a yes
				c.mu.Unlock()
			}
			kind, value, _ := strings.Cut(selector, ":")
			e := &spiretypes.Entry{Id: fmt.Sprint("e", n), ParentId: wireID(c.agents[agent]), SpiffeId: wireID(id), Selectors: []*spiretypes.Selector{{Type: kind, Value: value}}}
			if _, err = api.BatchCreateEntry(call, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}}); err == nil {
				live = append(live, e.Id)
			}
		}
		cancel()
		if err != nil {
			pause(ctx)
			continue
		}
		c.mu.Lock()
		c.done++
		c.mu.Unlock()
	}
}

// watch listens to one agent until ctx is done, and returns what it should not
// have been given. latest is told the IDs of each message. It asks anew after some
// messages: that the first answer must not have ended when it was asked for holds
// however late it is read.
func (c *churn) watch(ctx context.Context, agent int, api workload.SpiffeWorkloadAPIClient, latest func([]string)) (wrong []string) {
	for ctx.Err() == nil {
		asked := time.Now()
		one, stop := context.WithCancel(withHeader(ctx))
		stream, err := api.FetchX509SVID(one, &workload.X509SVIDRequest{})
		for n := 0; err == nil && n < 10; n++ {
			var msg *workload.X509SVIDResponse
			if msg, err = stream.Recv(); err != nil {
				break
			}
			var ids []string
			for _, s := range msg.Svids {
				ids = append(ids, s.SpiffeId)
				c.mu.Lock()
				granted := c.asked[agent][s.SpiffeId]
				c.mu.Unlock()
				leaf, perr := x509.ParseCertificates(s.X509Svid)
				switch {
				case !granted:
					wrong = append(wrong, s.SpiffeId+" was never granted")
				case perr != nil:
					wrong = append(wrong, perr.Error())
				case n == 0 && !asked.Before(leaf[0].NotAfter): // R35
					wrong = append(wrong, fmt.Sprintf("%s ended at %v and was asked for at %v", s.SpiffeId, leaf[0].NotAfter, asked))
				case !slices.ContainsFunc(leaf[0].URIs, func(u *url.URL) bool { return u.String() == s.SpiffeId }):
					wrong = append(wrong, s.SpiffeId+" is not what its certificate says")
				}
			}
			latest(ids)
		}
		stop()
		if err != nil {
			latest(nil) // nothing is served just now
			pause(ctx)
		}
	}
	return wrong
}

// pause is what a client makes before it tries again.
func pause(ctx context.Context) {
	select {
	case <-time.After(50 * time.Millisecond):
	case <-ctx.Done():
	}
}

// The server is killed at random moments while entries come and go. No agent
// serves what expired or what it was never granted, and in the end each serves
// exactly what the server has. R35, R46, R56, R73. make soak kills 100 times.
func TestServerKilledAtRandom(t *testing.T) {
	t.Parallel()
	kills := 8
	if os.Getenv("PLASTRON_SOAK") != "" {
		kills = 100
	}
	d := newDeployment(t)
	d.serverOptions = `default_x509_svid_ttl = "20s"`
	agents := []*deployment{d, nil}
	c := &churn{d: d, agents: []string{d.start()}}
	for i := range agents {
		if i > 0 {
			agents[i] = d.beside()
			token, id := agents[i].token()
			agents[i].startAgent(token)
			c.agents = append(c.agents, id)
		}
		c.asked = append(c.asked, map[string]bool{})
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	churning, stopChurn := context.WithCancel(ctx)
	defer stopChurn()
	var churned, watched sync.WaitGroup
	churned.Go(func() { c.run(churning) })
	var mu sync.Mutex // guards latest and messages
	latest, messages := make([][]string, len(agents)), 0
	wrong := make([][]string, len(agents))
	for i, a := range agents {
		api := a.workloadAPI()
		watched.Go(func() {
			wrong[i] = c.watch(ctx, i, api, func(ids []string) {
				mu.Lock()
				defer mu.Unlock()
				slices.Sort(ids)
				latest[i] = ids
				messages++
			})
		})
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	var slowest time.Duration
	went := func() (changes, heard int) { // on
		c.mu.Lock()
		defer c.mu.Unlock()
		mu.Lock()
		defer mu.Unlock()
		return c.done, messages
	}
	for range kills {
		changes, heard := went()
		eventually(t, "changes and messages", func() bool {
			c, m := went()
			return c > changes && m > heard
		})
		<-time.After(time.Duration(rnd.IntN(1500)) * time.Millisecond) // the random moment
		d.server.stop(syscall.SIGKILL)
		began := time.Now()
		d.startServer()
		slowest = max(slowest, time.Since(began))
	}
	stopChurn()
	churned.Wait()

	began := time.Now()
	for i := range agents {
		eventually(t, fmt.Sprintf("agent %d serves what the server has", i), func() bool {
			list, err := d.entries().ListEntries(ctx, &entryv1.ListEntriesRequest{}) // each time: a change whose answer was not waited for may come late
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for _, e := range list.Entries {
				if id := "spiffe://example.org" + e.SpiffeId.Path; strings.HasPrefix(e.SpiffeId.Path, fmt.Sprintf("/a%d/", i)) && c.asked[i][id] {
					want = append(want, id)
				}
			}
			slices.Sort(want)
			mu.Lock()
			defer mu.Unlock()
			return slices.Equal(latest[i], want)
		})
	}
	converged := time.Since(began)
	cancel()
	watched.Wait()
	for i, w := range wrong {
		if len(w) > 0 {
			t.Errorf("agent %d served %d times what it must not, first %s", i, len(w), w[0])
		}
	}
	t.Logf("%d kills, %d changes, %d messages; the slowest start took %v; all agents in step %v after the last change",
		kills, c.done, messages, slowest.Round(time.Millisecond), converged.Round(time.Millisecond))
}
