package serverapi_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/kube"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverlink"
)

// machine is an agent as far as pods are concerned: it follows the server, has
// signed what its pods need, and holds the copy of what it was granted.
type machine struct {
	mirror *mirror.Mirror
	node   string
}

// link makes of a client what a mirror wants.
type link struct{ *serverlink.Client }

func (l link) Follow(ctx context.Context) (mirror.Stream, error) { return l.Client.Follow(ctx) }

func (r *rig) machine(ctx context.Context, running *sync.WaitGroup, h holder, node string) *machine {
	r.t.Helper()
	client, err := serverlink.New(serverlink.Config{Route: serverlink.NewRoute(r.addr), TrustDomain: td, Certificate: func() *tls.Certificate { return &h.cert },
		Roots: func() (roots []*x509.Certificate) {
			r.registry.View(func(s *registry.Snapshot) {
				if b, err := s.Bundle(td); err == nil {
					roots = b.Roots()
				}
			})
			return roots
		}})
	if err != nil {
		r.t.Fatal(err)
	}
	f := &machine{mirror.New(mirror.Config{TrustDomain: td, Link: link{client}, Log: slog.New(slog.DiscardHandler)}), node}
	running.Go(func() {
		defer client.Close()
		f.mirror.Run(ctx)
	})
	return f
}

// shows is what an agent finds out of a process in a pod.
func shows(p kube.Pod) entry.Facts {
	facts := entry.Facts{Values: statedOf(p)}
	facts.Values["k8s.node"] = p.Spec.NodeName
	for _, value := range []string{"ns:" + p.Meta.Namespace, "sa:" + p.Spec.ServiceAccount, "pod-name:" + p.Meta.Name, "pod-uid:" + p.Meta.UID, "pod-label:app:" + p.Meta.Labels["app"]} {
		facts.Selectors = append(facts.Selectors, entry.Selector{Type: "k8s", Value: value})
	}
	return facts
}

// One rule for a cluster whose pods come and go, 100 a second: each has its SVID soon
// after its first call, no entry is made for any, the API server is asked once for
// each, and when they are gone nothing is left of them but what is bounded.
func TestPodChurn(t *testing.T) {
	const perSecond, life, accounts = 100, 2 * time.Second, 20
	pods, machines := 300, 5
	if os.Getenv("PLASTRON_SOAK") != "" {
		pods, machines = 5000, 50
	}
	clusters, with := newRegion(t)
	r, east := newRig(t, with), clusters["east"]
	r.create(&spiretypes.Entry{ParentId: wireID("/spire/server"), SpiffeId: wireID("/cluster/east"), Selectors: []*spiretypes.Selector{{Type: "k8s_psat", Value: "cluster:east"}}})
	made, err := rulev1.NewRulesClient(r.admin).Create(t.Context(), &rulev1.CreateRequest{Rules: []*rulev1.Rule{{
		ParentId: "spiffe://example.org/cluster/east", IdTemplate: "spiffe://example.org/ns/{k8s.ns}/sa/{k8s.sa}",
		Selectors: []*rulev1.Selector{{Type: "k8s", Value: "ns:shop"}, {Type: "k8s", Value: "pod-label:app:web"}}}}})
	if err != nil || made.Results[0].Refusal != nil {
		t.Fatal(made, err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	var agents []*machine
	for i := range machines {
		node := fmt.Sprint("m", i)
		east.AddNode(node, nil)
		h, err := r.join(east, node, "east")
		if err != nil {
			t.Fatal(err)
		}
		agents = append(agents, r.machine(ctx, &running, h, node))
	}
	for _, a := range agents {
		select {
		case <-a.mirror.Synced():
		case <-time.After(deadline):
			t.Fatal("an agent does not get in step")
		}
	}
	entries := func() int32 {
		t.Helper()
		count, err := entryv1.NewEntryClient(r.admin).CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return count.Count
	}
	asked, nodesAsked, before, goroutines := east.Calls("get pods"), east.Calls("get nodes"), entries(), runtime.NumGoroutine()
	heap := func() int {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	held := heap()

	var mu sync.Mutex
	var took []time.Duration
	var live sync.WaitGroup
	start := time.Now()
	for i := range pods {
		<-time.After(time.Until(start.Add(time.Duration(i) * time.Second / perSecond)))
		live.Go(func() {
			a := agents[i%len(agents)]
			account := fmt.Sprint("web-", i%accounts)
			p := east.AddPod(kubeapi.Pod{Namespace: "shop", Name: fmt.Sprint("pod-", i), ServiceAccount: account, Node: a.node, Labels: map[string]string{"app": "web"}})
			began := time.Now()
			sub := a.mirror.Subscribe(shows(p))
			defer sub.Close()
			late := time.After(deadline)
			for {
				v := sub.View()
				if len(v.Identities) == 1 {
					if got := v.Identities[0].ID.Path(); got != "/ns/shop/sa/"+account {
						t.Errorf("pod %d is %s", i, got)
					}
					break
				}
				select {
				case <-sub.Changed():
				case <-late:
					t.Errorf("pod %d has no SVID: %s: %+v", i, mirrortest.Describe(v), a.mirror.Why(ctx, shows(p), true).Grants)
					return
				}
			}
			mu.Lock()
			took = append(took, time.Since(began))
			mu.Unlock()
			select { // it lives a little
			case <-time.After(life):
			case <-ctx.Done():
			}
			east.DeletePod("shop", p.Meta.Name)
		})
	}
	came := time.Since(start)
	live.Wait()
	if len(took) != pods {
		t.Fatalf("%d of %d pods had an SVID", len(took), pods)
	}
	slices.Sort(took)
	t.Logf("%d pods in %v on %d nodes: first SVID after %v (median), %v (p99), %v (last)", pods, came, machines, took[pods/2], took[pods*99/100], took[pods-1])

	if n := entries() - before; n != 0 {
		t.Errorf("%d entries were made", n)
	}
	// Once for each, and again only where an answer came too late on a busy machine.
	if n := east.Calls("get pods") - asked; n < pods || n > pods*3/2 {
		t.Errorf("the API server was asked for pods %d times, want %d", n, pods)
	}
	if n := east.Calls("get nodes") - nodesAsked; n > 10*machines { // once a minute, and some at once
		t.Errorf("the API server was asked for nodes %d times", n)
	}
	if n := countInTrail(t, r, `"kind":"issuance"`, `"trust":"server"`, `"k8s.pod_uid"`); n < pods || n > pods*3/2 { // R14
		t.Errorf("%d SVIDs are on record, want %d", n, pods)
	}
	if n := r.api.Looked(); n > pods {
		t.Errorf("%d pods are remembered", n)
	}
	for _, a := range agents {
		if st := a.mirror.Stats(); st.Subscribers != 0 || st.X509SVIDs > mirror.DefaultCacheSize {
			t.Errorf("an agent holds %+v", st)
		}
	}
	until(t, "the goroutines of pods are gone", func() bool { return runtime.NumGoroutine() <= goroutines+100 }) // connections to the API server stay for a minute
	t.Logf("held for each pod that is gone, by server, agents and fakes together: %d bytes", (heap()-held)/pods)
	stop()
	running.Wait()
}
