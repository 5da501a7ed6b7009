package mirror_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
)

// Workloads' keys are of the configured type. After a change of it what an earlier
// life has kept is served until it is replaced, which happens at once.
func TestWorkloadKeyTypes(t *testing.T) {
	kindOf := func(v mirror.View) string {
		t.Helper()
		key, err := x509.ParsePKCS8PrivateKey(v.Identities[0].Key)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(v.Identities[0].Chain)
		if err != nil {
			t.Fatal(err)
		}
		if !key.(crypto.Signer).Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(leaf.PublicKey) {
			t.Error("the key is not the certificate's")
		}
		switch key := key.(type) {
		case *ecdsa.PrivateKey:
			return key.Curve.Params().Name
		case *rsa.PrivateKey:
			return fmt.Sprint("RSA ", key.N.BitLen())
		}
		return "unknown"
	}
	for kind, want := range map[keys.Type]string{"": "P-256", keys.ECP256: "P-256", keys.ECP384: "P-384", keys.RSA2048: "RSA 2048"} {
		bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
			s.Put(s.Grant("a", "/a", "unix:uid:1"))
			sub := m.Subscribe(selectors("unix:uid:1"))
			defer sub.Close()
			v := mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
			if got := kindOf(v); got != want {
				t.Errorf("%q: a key of %s, want %s", kind, got, want)
			}
			kept, err := m.Keep()
			if err != nil {
				t.Fatal(err)
			}
			s.Down(true)
			next := live(t, s, kept, v.Bundle.Keys) // with P-256
			defer next.stop()
			sub2 := next.Subscribe(selectors("unix:uid:1"))
			defer sub2.Close()
			if got := kindOf(sub2.View()); got != want {
				t.Errorf("restored a key of %s, want %s", got, want)
			}
			s.Down(false)
			mirrortest.Until(t, sub2, func(v mirror.View) bool { return ids(v) == "/a" && kindOf(v) == "P-256" })
		}, func(c *mirror.Config) { c.KeyType, c.Changed = kind, func(bool) {} })
	}
}

// The limit counts SVIDs: one for all who share it, those of subscribers in any
// case, and nothing that is only kept besides them past it.
func TestCacheLimit(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		held := func(want int, when string) {
			t.Helper()
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if n := m.Stats().X509SVIDs; n != want {
				t.Errorf("%s: %d SVIDs are held, want %d", when, n, want)
			}
		}
		for i := range 10 {
			g := s.Grant(fmt.Sprintf("g%d", i), fmt.Sprintf("/%d", i), "unix:uid:1", fmt.Sprintf("unix:gid:%d", i))
			g.DisableX509SvidPrefetch = i >= 8
			s.Put(g)
		}
		held(4, "nobody asks")
		all := []string{"unix:uid:1"}
		for i := range 10 {
			all = append(all, fmt.Sprintf("unix:gid:%d", i))
		}
		var subs []*mirror.Subscription
		for range 5 { // of one set of selectors, and each of another that has the same grants
			subs = append(subs, m.Subscribe(selectors(all...)))
			subs = append(subs, m.Subscribe(selectors(append(all, fmt.Sprintf("unix:supplementary_gid:%d", len(subs)))...)))
		}
		held(10, "ten have all")
		for _, sub := range subs[1:] {
			sub.Close()
		}
		held(10, "one has all")
		few := m.Subscribe(selectors("unix:uid:1", "unix:gid:9"))
		defer few.Close()
		subs[0].Close()
		held(4, "one has one that is signed on demand")
		if v := few.View(); ids(v) != "/9" {
			t.Errorf("it has %s", mirrortest.Describe(v))
		}
	}, func(c *mirror.Config) { c.CacheSize = 4 })
}

// Chains, keys and bundles are held once, however many are given them.
func TestViewsShareTheirBytes(t *testing.T) {
	s := mirrortest.New(t)
	for range 40 { // a bundle of 20 kB
		s.Rotate()
	}
	s.Put(s.Grant("a", "/a", "unix:uid:1"))
	l := live(t, s, nil, nil)
	defer l.stop()
	first := l.Subscribe(selectors("unix:uid:1"))
	defer first.Close()
	bundle := len(mirrortest.Until(t, first, func(v mirror.View) bool { return ids(v) == "/a" }).Bundle.X509)

	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	const n = 2000
	for name, facts := range map[string]func(i int) entry.Facts{
		"shared selectors":       func(int) entry.Facts { return selectors("unix:uid:1") },
		"selectors of their own": func(i int) entry.Facts { return selectors("unix:uid:1", fmt.Sprintf("unix:supplementary_gid:%d", i)) },
	} {
		before := heap()
		subs, views := make([]*mirror.Subscription, n), make([]mirror.View, n)
		for i := range n {
			subs[i] = l.Subscribe(facts(i))
			views[i] = subs[i].View()
		}
		each := (int64(heap()) - int64(before)) / n
		t.Logf("%s: %d B for each of %d subscribers and its view, the bundle being %d B", name, each, n, bundle)
		if each > int64(bundle)/4 {
			t.Errorf("%s: %d B for each subscriber, and the bundle alone has %d B", name, each, bundle)
		}
		for i := range n {
			if &views[i].Bundle.X509[0] != &views[0].Bundle.X509[0] || &views[i].Identities[0].Chain[0] != &views[0].Identities[0].Chain[0] {
				t.Fatal("a view has bytes of its own")
			}
			subs[i].Close()
		}
		runtime.KeepAlive(views)
	}
}
