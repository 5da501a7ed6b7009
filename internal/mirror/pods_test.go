package mirror_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/plastron/plastron/internal/serverlink"
)

// cluster is a server that knows pods: for those that it is told to, it refuses.
type cluster struct {
	*mirrortest.Server

	mu      sync.Mutex
	refuses map[string]string // reason by pod uid
	asked   map[string]int    // by pod uid
}

func (c *cluster) refuse(uid, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuses[uid] = reason
}

func (c *cluster) times(uid string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked[uid]
}

func (c *cluster) judge(facts map[string]string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked[facts[entry.FactPodUID]]++
	return c.refuses[facts[entry.FactPodUID]]
}

func (c *cluster) X509(ctx context.Context, items []serverlink.X509Item) ([]serverlink.X509Result, error) {
	results, err := c.Server.X509(ctx, items)
	for i := range results {
		if reason := c.judge(items[i].Facts); reason != "" {
			results[i] = serverlink.X509Result{Err: fault.New(fault.Denied, reason, "refused")}
		}
	}
	return results, err
}

func (c *cluster) JWT(ctx context.Context, grantID string, facts map[string]string, audience []string) (serverlink.JWTResult, error) {
	switch reason := c.judge(facts); reason {
	case "":
		return c.Server.JWT(ctx, grantID, facts, audience)
	case entry.FactsUnavailable:
		return serverlink.JWTResult{}, fault.New(fault.Unavailable, reason, "not now")
	default:
		return serverlink.JWTResult{}, fault.New(fault.Denied, reason, "refused")
	}
}

func pod(uid string) entry.Facts {
	facts := selectors("k8s:ns:shop", "k8s:pod-uid:"+uid)
	facts.Values = map[string]string{"k8s.ns": "shop", "k8s.sa": "web", "k8s.pod": "web-" + uid, "k8s.pod_uid": uid, "k8s.node": "n1", "k8s.container": "c"}
	return facts
}

// inCluster runs a test in a bubble with a verified rule for the namespace shop.
func inCluster(t *testing.T, cacheSize int, f func(t *testing.T, c *cluster, m *mirror.Mirror)) {
	c := &cluster{refuses: map[string]string{}, asked: map[string]int{}}
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		rule := s.Rule("r", "/ns/{k8s.ns}/sa/{k8s.sa}", "k8s:ns:shop")
		rule.Trust = ""
		s.SetTTL(time.Hour)
		s.Put([]*syncv1.Grant{rule}...)
		<-m.Synced()
		synctest.Wait()
		f(t, c, m)
	}, func(cfg *mirror.Config) {
		c.Server = cfg.Link.(*mirrortest.Server)
		cfg.Link, cfg.CacheSize = c, cacheSize
	})
}

const podID = "/ns/shop/sa/web"

func hasPodID(v mirror.View) bool { return ids(v) == podID }

// Each pod has an SVID of its own, with a key of its own, and is named when it is
// renewed: it lives as long as its pod does, and no longer than that.
func TestPodsOfOneAccount(t *testing.T) {
	inCluster(t, 0, func(t *testing.T, c *cluster, m *mirror.Mirror) {
		one, two := m.Subscribe(pod("1")), m.Subscribe(pod("2"))
		first, second := mirrortest.Until(t, one, hasPodID), mirrortest.Until(t, two, hasPodID)
		if string(first.Identities[0].Key) == string(second.Identities[0].Key) {
			t.Error("two pods share a key")
		}
		want := map[string]string{"k8s.ns": "shop", "k8s.sa": "web", "k8s.pod": "web-1", "k8s.pod_uid": "1"}
		if got := fmt.Sprint(first.Matched[0].Facts); got != fmt.Sprint(want) {
			t.Errorf("facts %v, want %v", got, want)
		}
		if c.times("1") != 1 || c.times("2") != 1 {
			t.Errorf("asked %v", c.asked)
		}
		if w := m.Why(t.Context(), pod("1"), true); len(w.Grants) != 1 || w.Grants[0].FactsBy != "server" || w.Grants[0].State != mirror.Ready {
			t.Errorf("why: %+v", w.Grants)
		}
		// The first pod goes; the second lives on, and renews in its own name.
		one.Close()
		c.refuse("1", "pod_unknown")
		for range 5 {
			time.Sleep(time.Hour)
			if v := two.View(); !hasPodID(v) {
				t.Fatalf("the pod that lives on has %s", mirrortest.Describe(v))
			}
		}
		if c.times("1") != 1 || c.times("2") < 6 {
			t.Errorf("asked %v", c.asked)
		}
		// One that is refused takes nothing from those that come after it.
		gone := m.Subscribe(pod("1"))
		defer gone.Close()
		mirrortest.Until(t, gone, func(v mirror.View) bool { return v.Pending == 0 && len(v.Identities) == 0 })
		three := m.Subscribe(pod("3"))
		defer three.Close()
		began := time.Now()
		mirrortest.Until(t, three, hasPodID)
		if took := time.Since(began); took > 0 {
			t.Errorf("the next pod waited %v", took)
		}
		two.Close()
	})
}

// While the server cannot tell, a pod waits a moment; what is there goes on, and soon
// after the server can tell again the pod has its SVID.
func TestPodsWhileFactsAreUnavailable(t *testing.T) {
	inCluster(t, 0, func(t *testing.T, c *cluster, m *mirror.Mirror) {
		jwt := func(uid string) error {
			facts := pod(uid).Values
			delete(facts, "k8s.node")
			delete(facts, "k8s.container")
			_, err := m.JWT(t.Context(), entry.Matched{GrantID: "r", Facts: facts}, []string{"x"})
			return err
		}
		lives := m.Subscribe(pod("1"))
		defer lives.Close()
		mirrortest.Until(t, lives, hasPodID)
		if err := jwt("1"); err != nil {
			t.Fatal(err)
		}
		c.refuse("2", entry.FactsUnavailable)
		sub := m.Subscribe(pod("2"))
		defer sub.Close()
		synctest.Wait()
		if v := sub.View(); v.Pending != 1 {
			t.Errorf("it does not wait: %s", mirrortest.Describe(v))
		}
		if err := jwt("2"); fault.ReasonOf(err) != entry.FactsUnavailable {
			t.Errorf("a token: %v", err)
		}
		time.Sleep(3 * time.Hour)
		if v := sub.View(); v.Pending != 0 {
			t.Errorf("it waits for ever: %s", mirrortest.Describe(v))
		}
		if v := lives.View(); !hasPodID(v) {
			t.Errorf("the other has %s", mirrortest.Describe(v))
		}
		c.refuse("2", "")
		began := time.Now()
		mirrortest.Until(t, sub, hasPodID)
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

// Pods that come and go leave no more behind than the cache has room for.
func TestPodsLeaveNothingBehind(t *testing.T) {
	inCluster(t, 10, func(t *testing.T, c *cluster, m *mirror.Mirror) {
		for i := range 300 {
			sub := m.Subscribe(pod(fmt.Sprint(i)))
			mirrortest.Until(t, sub, hasPodID)
			sub.Close()
		}
		time.Sleep(time.Minute)
		if st := m.Stats(); st.X509SVIDs > 10 || st.Subscribers != 0 || st.Grants != 1 {
			t.Errorf("held: %+v", st)
		}
		time.Sleep(2 * time.Hour)
		if st := m.Stats(); st.X509SVIDs != 0 {
			t.Errorf("held: %+v", st)
		}
		for i := range 300 {
			if n := c.times(fmt.Sprint(i)); n != 1 {
				t.Fatalf("pod %d was asked for %d times", i, n)
			}
		}
	})
}
