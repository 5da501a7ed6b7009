package mirror_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
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

// bubble runs a test with a server and a running mirror, on a clock of its own.
func bubble(t *testing.T, f func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror), change ...func(*mirror.Config)) {
	synctest.Test(t, func(t *testing.T) {
		s := mirrortest.New(t)
		cfg := mirror.Config{TrustDomain: s.TD, Link: s, Version: "test", Log: slog.New(slog.DiscardHandler)}
		for _, c := range change {
			c(&cfg)
		}
		m := mirror.New(cfg)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- m.Run(ctx) }()
		defer func() { cancel(); <-done }()
		f(t, s, m)
	})
}

// selectors are what is known of a caller without facts.
func selectors(texts ...string) entry.Facts {
	var out entry.Facts
	for _, text := range texts {
		s, err := entry.ParseSelector(text)
		if err != nil {
			panic(err)
		}
		out.Selectors = append(out.Selectors, s)
	}
	return out
}

func ids(v mirror.View) string {
	var out []string
	for _, id := range v.Identities {
		out = append(out, id.ID.Path())
	}
	return strings.Join(out, " ")
}

// woken reports whether the subscription was signalled since last asked.
func woken(s *mirror.Subscription) bool {
	synctest.Wait()
	select {
	case <-s.Changed():
		return true
	default:
		return false
	}
}

func TestGrantsComeAndGo(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		sub := m.Subscribe(selectors("unix:uid:1", "unix:gid:1"))
		defer sub.Close()
		other := m.Subscribe(selectors("unix:uid:2"))
		defer other.Close()
		<-m.Synced()
		synctest.Wait()
		woken(sub)
		woken(other)

		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		v := mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		mirrortest.Verify(t, v, time.Now())
		woken(sub)        // the view may have been seen before its wake
		if woken(other) { // RG16
			t.Error("someone who is not affected was woken")
		}
		// More selectors than the caller shows: not his.
		s.Put(s.Grant("b", "/b", "unix:uid:1", "unix:gid:2"))
		if woken(sub) {
			t.Error("woken for a grant that does not match")
		}
		// A grant that begins to match, one that changes, one that ends.
		s.Put(s.Grant("b", "/b", "unix:uid:1", "unix:gid:1"))
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a /b" })
		before := sub.View().Identities[1].Chain
		g := s.Grant("b", "/b", "unix:uid:1")
		g.DnsNames = []string{"b.example.org"}
		s.Put(g)
		mirrortest.Until(t, sub, func(v mirror.View) bool { return string(v.Identities[1].Chain) != string(before) })
		s.Remove("a")
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/b" })
		// Another ID under the same grant: the old SVID goes at once.
		s.Put(s.Grant("b", "/c", "unix:uid:1"))
		v = mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) != "/b" })
		if ids(v) != "" && ids(v) != "/c" {
			t.Errorf("identities %q", ids(v))
		}
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/c" })
		if woken(other) {
			t.Error("someone who is not affected was woken")
		}
		if c := s.Calls(); c.Follow != 1 {
			t.Errorf("%d streams were opened", c.Follow)
		}
	})
}

// A federated bundle wakes exactly those whose grants name it.
func TestFederation(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		foreign := mirrortest.New(t)
		g := s.Grant("a", "/a", "unix:uid:1")
		g.FederatesWith = []string{"foreign.test"}
		s.Put(g, s.Grant("b", "/b", "unix:uid:2"))
		a, b := m.Subscribe(selectors("unix:uid:1")), m.Subscribe(selectors("unix:uid:2"))
		defer a.Close()
		defer b.Close()
		mirrortest.Until(t, a, func(v mirror.View) bool { return ids(v) == "/a" })
		mirrortest.Until(t, b, func(v mirror.View) bool { return ids(v) == "/b" })
		woken(a)
		woken(b)
		_ = foreign
		// R59: one bad key costs only itself.
		s.PutBundle("foreign.test", &syncv1.Bundle{TrustDomain: "foreign.test",
			X509Authorities: []*syncv1.X509Authority{{Asn1: []byte("rubbish")}}, JwtAuthorities: []*syncv1.JWTAuthority{{KeyId: "k", PublicKey: []byte("x")}}})
		v := mirrortest.Until(t, a, func(v mirror.View) bool { return len(v.Federated) == 1 })
		if v.Federated[0].TrustDomain.Name() != "foreign.test" || len(v.Federated[0].X509) != 0 {
			t.Errorf("federated %+v", v.Federated[0])
		}
		if woken(b) || len(b.View().Federated) != 0 {
			t.Error("a bundle reached someone whose grants do not name it")
		}
		s.PutBundle("foreign.test", nil)
		mirrortest.Until(t, a, func(v mirror.View) bool { return len(v.Federated) == 0 })
	})
}

// R35, R56, RG35: with the server away what is unexpired is served, what ends is
// taken away shortly before, and all comes back by itself.
func TestServerAway(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetTTL(time.Hour)
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		v := mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		end := v.Identities[0].ExpiresAt
		s.Down(true)
		time.Sleep(time.Until(end) - 5*time.Second - time.Millisecond)
		if got := sub.View(); ids(got) != "/a" {
			t.Fatal("it was taken away too early")
		}
		woken(sub)
		time.Sleep(2 * time.Millisecond)
		if got := sub.View(); ids(got) != "" || got.Pending != 1 {
			t.Fatalf("shortly before its end: %s", mirrortest.Describe(got))
		}
		if !woken(sub) {
			t.Error("nobody was told that it ended")
		}
		s.Put(s.Grant("b", "/b", "unix:uid:1")) // meanwhile
		s.Down(false)
		back := time.Now()
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a /b" })
		if d := time.Since(back); d > 10*time.Second {
			t.Errorf("in step again after %v", d)
		}
		// RG77: the attempts were spread out.
		if c := s.Calls(); c.Follow > 1300 || c.X509 > 600 {
			t.Errorf("attempts in an hour: %+v", c)
		}
	})
}

// Renewal at half life, soonest first, with a new key each time (R48), for a TTL
// of 6 s and over two rotations: at no moment is there no valid SVID (R58).
func TestShortLives(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetTTL(6 * time.Second)
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		keys := map[string]bool{}
		for i := range 600 {
			time.Sleep(100 * time.Millisecond)
			v := sub.View()
			if len(v.Identities) != 1 {
				t.Fatalf("after %d: %s", i, mirrortest.Describe(v))
			}
			if left := time.Until(v.Identities[0].ExpiresAt); left < 600*time.Millisecond {
				t.Fatalf("after %d: %v left", i, left)
			}
			mirrortest.Verify(t, v, time.Now())
			keys[string(v.Identities[0].Key)] = true
			if i == 200 || i == 400 {
				s.Rotate()
			}
		}
		if len(keys) < 15 || len(keys) > 30 {
			t.Errorf("%d different keys in a minute", len(keys))
		}
	})
}

func TestIdle(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		for i := range 20 {
			s.Put(s.Grant(fmt.Sprint(i), fmt.Sprintf("/%d", i), fmt.Sprintf("unix:uid:%d", i)))
		}
		<-m.Synced()
		time.Sleep(time.Minute)
		before := s.Calls()
		time.Sleep(4 * time.Minute) // less than the time between reports
		if after := s.Calls(); after.X509 != before.X509 || after.Follow != before.Follow || after.Messages > before.Messages+1 {
			t.Errorf("idle: %+v, before %+v", after, before)
		}
	})
}

// Everything exact is signed before anyone asks, in batches, up to the cache size.
func TestPresigning(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		var grants []*syncv1.Grant
		for i := range 60 {
			g := s.Grant(fmt.Sprintf("g%03d", i), fmt.Sprintf("/%d", i), fmt.Sprintf("unix:uid:%d", i))
			g.CreatedAt += int64(i)
			grants = append(grants, g)
		}
		grants[7].DisableX509SvidPrefetch = true
		grants[8].StoreSvid = true
		grants[9].ParentId = "spiffe://example.org/spire/server" // an alias grants nothing to workloads
		s.Put(grants...)
		<-m.Synced()
		time.Sleep(time.Second)
		if c := s.Calls(); c.Signed != 40 || m.Stats().X509SVIDs != 40 {
			t.Errorf("signed %d, held %d, want 40", c.Signed, m.Stats().X509SVIDs)
		}
		// Past the size, who asks is served all the same, and first.
		sub := m.Subscribe(selectors("unix:uid:59"))
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/59" })
		if n := m.Stats().X509SVIDs; n != 40 {
			t.Errorf("held %d, want 40", n)
		}
		sub.Close()
		// Not ahead of time, but on demand.
		sub = m.Subscribe(selectors("unix:uid:7"))
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/7" })
		sub.Close()
		for _, uid := range []string{"unix:uid:8", "unix:uid:9"} {
			sub = m.Subscribe(selectors(uid))
			if v := sub.View(); len(v.Matched) != 0 {
				t.Errorf("%s: %s", uid, mirrortest.Describe(v))
			}
			sub.Close()
		}
	}, func(c *mirror.Config) { c.CacheSize = 40 })
}

func TestBatches(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		var grants []*syncv1.Grant
		for i := range 520 {
			grants = append(grants, s.Grant(fmt.Sprintf("g%03d", i), fmt.Sprintf("/%d", i), "unix:uid:1"))
		}
		s.Put(grants...)
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		v := mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) == 520 })
		if v.Identities[0].GrantID != "g000" || v.Identities[519].GrantID != "g519" {
			t.Error("identities are not in order of age and id")
		}
		if c := s.Calls(); c.X509 != 2 {
			t.Errorf("%d calls for 520 SVIDs", c.X509)
		}
	})
}

// R36, R59: what the server signs is verified; a bad item costs only itself.
func TestBadItems(t *testing.T) {
	spoil := map[string]func(serverlink.X509Result) serverlink.X509Result{
		"nothing":       func(r serverlink.X509Result) serverlink.X509Result { r.Chain = nil; return r },
		"rubbish":       func(r serverlink.X509Result) serverlink.X509Result { r.Chain = [][]byte{[]byte("x")}; return r },
		"a flipped bit": func(r serverlink.X509Result) serverlink.X509Result { r.Chain[0][len(r.Chain[0])-1] ^= 1; return r },
	}
	for name, f := range spoil {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
				n := 0
				s.Spoil(func(r serverlink.X509Result) serverlink.X509Result {
					if n++; n == 1 {
						return f(r)
					}
					return r
				})
				s.Put(s.Grant("a", "/a", "unix:uid:1"), s.Grant("b", "/b", "unix:uid:1"))
				sub := m.Subscribe(selectors("unix:uid:1"))
				defer sub.Close()
				mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) == 1 })
				if v := sub.View(); v.Pending != 1 {
					t.Errorf("%s", mirrortest.Describe(v))
				}
				v := mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) == 2 })
				mirrortest.Verify(t, v, time.Now())
			})
		})
	}
	t.Run("another identity", func(t *testing.T) {
		bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
			var first [][]byte
			s.Spoil(func(r serverlink.X509Result) serverlink.X509Result {
				if first == nil {
					first = r.Chain
					return r
				}
				r.Chain = first
				return r
			})
			s.Put(s.Grant("a", "/a", "unix:uid:1"), s.Grant("b", "/b", "unix:uid:1"))
			sub := m.Subscribe(selectors("unix:uid:1"))
			defer sub.Close()
			mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) == 1 && v.Pending == 0 })
			if v := sub.View(); ids(v) != "/a" {
				t.Errorf("identities %q", ids(v))
			}
		})
	})
}

func TestRefusal(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Refuse("b", "grant_ended")
		s.Put(s.Grant("a", "/a", "unix:uid:1"), s.Grant("b", "/b", "unix:uid:1"))
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		// Nobody waits for what is refused.
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" && v.Pending == 0 })
		s.Refuse("b", "")
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a /b" })
	})
}

// R58, R63: an SVID whose authority has not come yet is not handed out; one
// whose authority goes is withdrawn with it.
func TestAuthorities(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.RotateUnpublished()
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		time.Sleep(time.Second / 4)
		if v := sub.View(); ids(v) != "" || v.Pending != 1 {
			t.Fatalf("before its authority: %s", mirrortest.Describe(v))
		}
		s.Publish()
		v := mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		mirrortest.Verify(t, v, time.Now())

		// R69: tainted, it is replaced at once; revoked, it goes at once.
		old := string(v.Identities[0].Chain)
		s.Rotate()
		woken(sub)
		if v := sub.View(); string(v.Identities[0].Chain) != old {
			t.Error("a rotation alone replaced an SVID")
		}
		s.Taint()
		v = mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" && string(v.Identities[0].Chain) != old })
		mirrortest.Verify(t, v, time.Now())
		s.Rotate()
		s.Down(true)
		s.Revoke()
		s.Down(false)
		for range 100 {
			mirrortest.Verify(t, sub.View(), time.Now())
			time.Sleep(10 * time.Millisecond)
		}
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" && len(v.Bundle.Keys.X509) == 1 })
		mirrortest.Verify(t, sub.View(), time.Now())
	})
}

// A grant's own end is honoured without a word from the server (R8).
func TestGrantEnds(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		g := s.Grant("a", "/a", "unix:uid:1")
		g.ExpiresAt = time.Now().Add(time.Minute).Unix()
		s.Put(g)
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		woken(sub)
		time.Sleep(time.Minute)
		if v := sub.View(); len(v.Matched) != 0 || !woken(sub) {
			t.Errorf("after its end: %s", mirrortest.Describe(v))
		}
	})
}

// With the wall clock put back nothing lives longer than it would have (R35, R107):
// what has ended by the clock that cannot be set is not handed out.
func TestClockPutBack(t *testing.T) {
	start := time.Now()
	var back atomic.Int64 // how far the other clock is ahead of the wall clock
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetTTL(10 * time.Minute)
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		matched := entry.Matched{GrantID: "a"}
		if _, err := m.JWT(t.Context(), matched, []string{"x"}); err != nil {
			t.Fatal(err)
		}
		s.Down(true)
		back.Store(int64(8 * time.Minute))
		if v := sub.View(); ids(v) != "/a" {
			t.Errorf("eight minutes of ten: %s", mirrortest.Describe(v))
		}
		time.Sleep(3 * time.Minute)
		if v := sub.View(); ids(v) != "" {
			t.Errorf("after eleven minutes of ten: %s", mirrortest.Describe(v))
		}
		if jwt, err := m.JWT(t.Context(), matched, []string{"x"}); err == nil {
			t.Errorf("after eleven minutes of ten: a token of %s", jwt.ID)
		}
		s.Down(false)
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
	}, func(c *mirror.Config) {
		c.Boot = func() time.Duration { return time.Since(start) + time.Duration(back.Load()) }
	})
}

// A store restored from a backup: hashes are compared, nothing is refused, and
// when they are equal nothing is sent again.
func TestNewEpoch(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		v := mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		signed := s.Calls().Signed
		s.Restore()
		time.Sleep(5 * time.Second)
		if got := sub.View(); ids(got) != "/a" || string(got.Identities[0].Chain) != string(v.Identities[0].Chain) || s.Calls().Signed != signed {
			t.Errorf("after a restore to the same state: %s", mirrortest.Describe(got))
		}
		s.Put(s.Grant("b", "/b", "unix:uid:1"))
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a /b" })
	})
}

// A server that does not keep up with the one before is not followed: what was
// taken away does not come back. One that says so for longer than a server may
// serve without its store was restored, and is.
func TestServerBehind(t *testing.T) { // R77
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Grant("a", "/a", "unix:uid:1"), s.Grant("b", "/b", "unix:uid:1"))
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a /b" })
		back := s.Rollback()
		s.Remove("a")
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/b" })
		back()
		time.Sleep(50 * time.Second)
		if v := sub.View(); ids(v) != "/b" {
			t.Errorf("behind: %s", mirrortest.Describe(v))
		}
		s.Put(s.Grant("c", "/c", "unix:uid:1")) // it has caught up
		s.Remove("a")
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/b /c" })
		s.Remove("c")
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/b" })
		back()
		time.Sleep(50 * time.Second)
		if v := sub.View(); ids(v) != "/b" {
			t.Errorf("behind once more: %s", mirrortest.Describe(v))
		}
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a /b" })
	})
}

// A restored server, or another one, counts revisions from further back: what it
// changes is signed anew all the same.
func TestRevisionGoesBack(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		g := s.Grant("a", "/a", "unix:uid:1")
		for range 5 {
			s.Put(g)
		}
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		time.Sleep(5 * time.Second) // it may have been signed for an earlier revision first
		old, signed := sub.View().Identities[0], s.Calls().Signed
		s.Restore()
		g.DnsNames = []string{"a.test"}
		s.Put(g)
		mirrortest.Until(t, sub, func(v mirror.View) bool { return string(v.Identities[0].Chain) != string(old.Chain) })
		time.Sleep(5 * time.Second)
		if n := s.Calls().Signed - signed; n != 1 {
			t.Errorf("%d signatures more, want one for the new content", n)
		}
	})
}

// Divergence, gaps, and messages that make no sense lead to a fresh comparison;
// what is held stays in use.
func TestStartsOver(t *testing.T) {
	bad := map[string]func(s *mirrortest.Server) *syncv1.ServerMessage{
		"another hash": func(s *mirrortest.Server) *syncv1.ServerMessage {
			return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Current{Current: &syncv1.Current{Position: s.Position(), Hash: make([]byte, 32)}}}
		},
		"a gap": func(s *mirrortest.Server) *syncv1.ServerMessage {
			p := s.Position()
			p.Revision += 5
			return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: &syncv1.Delta{Previous: p, Position: p}}}
		},
		"a delta that does not add up": func(s *mirrortest.Server) *syncv1.ServerMessage {
			return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: &syncv1.Delta{Previous: s.Position(), Position: s.Position(), Hash: make([]byte, 32)}}}
		},
		"too much at once": func(s *mirrortest.Server) *syncv1.ServerMessage {
			return &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: &syncv1.Delta{Previous: s.Position(), Position: s.Position(), Bodies: [][]byte{make([]byte, 64<<20+1)}}}}
		},
	}
	for name, message := range bad {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
				s.Put(s.Grant("a", "/a", "unix:uid:1"))
				sub := m.Subscribe(selectors("unix:uid:1"))
				defer sub.Close()
				mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
				before := s.Calls()
				s.Send(message(s))
				synctest.Wait()
				if v := sub.View(); ids(v) != "/a" {
					t.Errorf("meanwhile: %s", mirrortest.Describe(v))
				}
				time.Sleep(5 * time.Second)
				s.Put(s.Grant("b", "/b", "unix:uid:1"))
				mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a /b" })
				if after := s.Calls(); after.Follow != before.Follow+1 {
					t.Errorf("%d streams were opened, want one more than %d", after.Follow, before.Follow)
				}
			})
		})
	}
}

// R59: a malformed grant is counted and otherwise ignored.
func TestMalformedGrants(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		foreign := s.Grant("x", "/x", "unix:uid:1")
		foreign.SpiffeId = "spiffe://other.test/x"
		reserved := s.Grant("y", "/spire/agent/y", "unix:uid:1")
		everyone := s.Grant("z", "/z") // no selector
		s.Put(foreign, reserved, everyone, s.Grant("a", "/a", "unix:uid:1"))
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		time.Sleep(time.Minute)
		if v := sub.View(); len(v.Matched) != 1 || s.Calls().Follow != 1 {
			t.Errorf("%s, %+v", mirrortest.Describe(v), s.Calls())
		}
		s.Remove("x", "y", "z")
		s.Put(s.Grant("b", "/b", "unix:uid:1"))
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a /b" })
	})
}

func TestJWT(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetTTL(5 * time.Minute)
		once := s.Grant("j", "/j", "unix:uid:1")
		once.JwtSvidIncludeJti = true
		s.Put(s.Grant("a", "/a", "unix:uid:1"), once)
		<-m.Synced()
		synctest.Wait()
		get := func(grant string, audience ...string) string {
			t.Helper()
			tok, err := m.JWT(t.Context(), entry.Matched{GrantID: grant}, audience)
			if err != nil {
				t.Fatal(err)
			}
			return tok.Token
		}
		first := get("a", "x", "y")
		if get("a", "y", "x") != first || get("a", "x", "y", "x") != first || s.Calls().JWT != 1 {
			t.Error("the same set of audiences was signed twice")
		}
		// R52, RG48: another set is another token.
		for _, audience := range [][]string{{"x"}, {"xy"}, {"x", "y", "z"}, {"\x01x", "y"}} {
			if get("a", audience...) == first {
				t.Errorf("audience %q got the token of another", audience)
			}
		}
		if one, other := get("j", "x"), get("j", "x"); one == other {
			t.Error("a token with a jti was handed out twice")
		}
		// Half of its life over: renewed; with the server away the good one is given.
		s.Down(true)
		time.Sleep(3 * time.Minute)
		if get("a", "x", "y") != first {
			t.Error("a good token was withheld")
		}
		s.Down(false)
		time.Sleep(5 * time.Second) // it is followed again
		second := get("a", "x", "y")
		if second == first {
			t.Error("not renewed after half of its life")
		}
		// A new revision of the grant: a new token. A tainted key: none of its tokens.
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		synctest.Wait()
		third := get("a", "x", "y")
		if third == second {
			t.Error("a token of an older revision was given")
		}
		s.RotateJWT()
		synctest.Wait()
		if get("a", "x", "y") != third {
			t.Error("a rotation alone threw a token away")
		}
		s.Taint()
		synctest.Wait()
		if get("a", "x", "y") == third {
			t.Error("a token of a tainted key was given")
		}
		// R35: near its end and with the server away there is none.
		s.Down(true)
		time.Sleep(5*time.Minute - 4*time.Second)
		if tok, err := m.JWT(t.Context(), entry.Matched{GrantID: "a"}, []string{"x", "y"}); err == nil {
			t.Errorf("got %v", tok.ID)
		}
		s.Remove("a")
		s.Down(false)
		time.Sleep(5 * time.Second)
		if _, err := m.JWT(t.Context(), entry.Matched{GrantID: "a"}, []string{"x"}); fault.KindOf(err) != fault.Denied {
			t.Errorf("a grant that is gone: %v", err)
		}
	})
}

func TestDirectivesAndNotices(t *testing.T) {
	directives := make(chan *syncv1.Directive, 1)
	ended := make(chan error, 10)
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		<-m.Synced()
		synctest.Wait()
		s.Send(&syncv1.ServerMessage{Message: &syncv1.ServerMessage_Directive{Directive: &syncv1.Directive{
			Directive: &syncv1.Directive_Renew{Renew: &syncv1.Renew{WithinMs: 5}}}}})
		synctest.Wait()
		if d := <-directives; d.GetRenew().GetWithinMs() != 5 {
			t.Errorf("directive %v", d)
		}
		s.Cut()
		synctest.Wait()
		if len(ended) != 1 {
			t.Errorf("%d ends were told", len(ended))
		}
	}, func(c *mirror.Config) {
		// Made outside the bubble on purpose: the mirror must not block on them.
		c.Directive = func(d *syncv1.Directive) { directives <- d }
		c.StreamEnded = func(err error) { ended <- err }
	})
}

// R50: subscribers leave nothing behind.
func TestSubscribersLeaveNothing(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		<-m.Synced()
		var subs []*mirror.Subscription
		for i := range 100 {
			subs = append(subs, m.Subscribe(selectors("unix:uid:1", fmt.Sprintf("unix:gid:%d", i%10))))
		}
		if n := m.Stats().Subscribers; n != 100 {
			t.Errorf("%d subscribers", n)
		}
		for _, sub := range slices.Backward(subs) {
			sub.Close()
			sub.Close() // twice is once
		}
		if n := m.Stats().Subscribers; n != 0 {
			t.Errorf("%d subscribers after all left", n)
		}
	})
}

// R98: what arrives is bounded, and rubbish of any kind breaks nothing.
func TestRubbish(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		sub := m.Subscribe(selectors("unix:uid:1"))
		defer sub.Close()
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		for _, msg := range []*syncv1.ServerMessage{
			{}, {Message: &syncv1.ServerMessage_Inventory{}}, {Message: &syncv1.ServerMessage_Delta{}}, {Message: &syncv1.ServerMessage_Current{}},
			{Message: &syncv1.ServerMessage_Inventory{Inventory: &syncv1.Inventory{More: true, Items: []*syncv1.Item{{Kind: 77, Id: "q"}}}}},
		} {
			s.Send(msg)
			time.Sleep(10 * time.Second)
		}
		body := make([]byte, 100)
		rand.Read(body)
		s.Raw("g/rubbish", body)
		time.Sleep(10 * time.Second)
		if v := sub.View(); ids(v) != "/a" {
			t.Errorf("%s", mirrortest.Describe(v))
		}
	})
}
