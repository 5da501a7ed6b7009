package mirror_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/plastron/plastron/internal/reason"
)

// process is what is known of a process of a user that shows unix:uid:1.
func process(user, program string) entry.Facts {
	facts := selectors("unix:uid:1")
	facts.Values = map[string]string{"unix.uid": "1", "unix.user": user, "unix.program": program}
	return facts
}

func TestRules(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetTTL(time.Hour)
		s.Put(s.Rule("r", "/user/{unix.user}/{unix.program}", "unix:uid:1"), s.Grant("e", "/e", "unix:uid:2"))
		<-m.Synced()
		synctest.Wait()
		if c := s.Calls(); c.Signed != 1 {
			t.Fatalf("%d SVIDs were signed before anyone asked, want that of the entry", c.Signed)
		}
		if w := m.Why(t.Context(), process("ann", "web"), true); w.Ready() != 0 || len(w.Grants) != 1 || w.Grants[0].ID.Path() != "/user/ann/web" ||
			w.Reason != reason.NotSignedYet {
			t.Errorf("before the process asked: %+v", w)
		}
		// Each process has its own; the same facts share one.
		web, again, api := m.Subscribe(process("ann", "web")), m.Subscribe(process("ann", "web")), m.Subscribe(process("ann", "api"))
		defer api.Close()
		v := mirrortest.Until(t, web, func(v mirror.View) bool { return ids(v) == "/user/ann/web" })
		mirrortest.Verify(t, v, time.Now())
		if f := v.Matched[0].Facts; len(f) != 2 || f["unix.user"] != "ann" || f["unix.program"] != "web" {
			t.Errorf("facts %v", f)
		}
		if w := m.Why(t.Context(), process("ann", "web"), true); w.Ready() != 1 || w.Reason != nil {
			t.Errorf("after it asked: %+v", w)
		}
		mirrortest.Until(t, again, func(v mirror.View) bool { return ids(v) == "/user/ann/web" })
		mirrortest.Until(t, api, func(v mirror.View) bool { return ids(v) == "/user/ann/api" })
		if c := s.Calls(); c.Signed != 3 || m.Stats().X509SVIDs != 3 {
			t.Errorf("%d SVIDs were signed, %d are held, want 3", c.Signed, m.Stats().X509SVIDs)
		}
		// A fact that is missing or does not fit gives nothing, and the trace says which.
		odd, none := m.Subscribe(process("ann", "a b")), m.Subscribe(selectors("unix:uid:1"))
		for sub, reason := range map[*mirror.Subscription]string{odd: entry.FactInvalid, none: entry.FactMissing} {
			if v := sub.View(); len(v.Matched) != 0 || v.Pending != 0 || len(v.Trace.Facts) != 1 || v.Trace.Facts[0].Reason != reason {
				t.Errorf("%s, %+v, want %s", mirrortest.Describe(v), v.Trace.Facts, reason)
			}
			sub.Close()
		}
		// Renewed while it is used, kept but not renewed when it is not.
		before := s.Calls().Signed
		time.Sleep(40 * time.Minute)
		synctest.Wait()
		if n := s.Calls().Signed - before; n != 3 {
			t.Errorf("%d SVIDs were renewed at half life, want 3", n)
		}
		web.Close()
		again.Close()
		time.Sleep(20 * time.Minute)
		if back := m.Subscribe(process("ann", "web")); ids(back.View()) != "/user/ann/web" {
			t.Errorf("lately used, but not held: %s", mirrortest.Describe(back.View()))
		} else {
			back.Close()
		}
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		if n := m.Stats().X509SVIDs; n != 2 {
			t.Errorf("%d SVIDs are held, want those of the entry and of the used process", n)
		}
		// Without the rule nothing is left of it, and streams hear so.
		s.Remove("r")
		mirrortest.Until(t, api, func(v mirror.View) bool { return ids(v) == "" && len(v.Matched) == 0 })
		if n := m.Stats().X509SVIDs; n != 1 {
			t.Errorf("%d SVIDs are held after the rule was removed, want 1", n)
		}
	})
}

// A change of a rule that keeps its template keeps the SVIDs until new ones are
// there; another template ends them at once.
func TestRuleChanges(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Rule("r", "/user/{unix.user}", "unix:uid:1"))
		sub := m.Subscribe(process("ann", "web"))
		defer sub.Close()
		first := mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/user/ann" })
		g := s.Rule("r", "/user/{unix.user}", "unix:uid:1")
		g.X509SvidTtl, g.Hint = 600, "h"
		s.Refuse("r", "not_now")
		s.Put(g)
		mirrortest.Until(t, sub, func(v mirror.View) bool {
			return len(v.Identities) == 1 && v.Identities[0].Hint == "h" && string(v.Identities[0].Chain) == string(first.Identities[0].Chain)
		})
		s.Refuse("r", "")
		mirrortest.Until(t, sub, func(v mirror.View) bool {
			return len(v.Identities) == 1 && v.Identities[0].ExpiresAt.Before(time.Now().Add(11*time.Minute))
		})
		s.Put(s.Rule("r", "/people/{unix.user}", "unix:uid:1"))
		v := mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) != "/user/ann" })
		if ids(v) != "" && ids(v) != "/people/ann" {
			t.Errorf("identities %q", ids(v))
		}
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/people/ann" })
		// The id passes to an entry and back.
		s.Put(s.Grant("r", "/entry", "unix:uid:1"))
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/entry" })
		s.Put(s.Rule("r", "/user/{unix.user}", "unix:uid:1"))
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/user/ann" })
	})
}

// A refusal concerns one pair only, and nobody waits for it (R59).
func TestRuleRefused(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Rule("full", "/full/{unix.program}", "unix:uid:1"), s.Rule("r", "/user/{unix.user}", "unix:uid:1"))
		s.Refuse("full", "rule_pairs_exhausted")
		sub := m.Subscribe(process("ann", "web"))
		v := mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/user/ann" && v.Pending == 0 })
		if len(v.Matched) != 2 {
			t.Errorf("%s", mirrortest.Describe(v))
		}
		// Who comes and goes does not have it asked for each time.
		sub.Close()
		synctest.Wait()
		before := s.Calls().X509
		for range 100 {
			m.Subscribe(process("ann", "web")).Close()
		}
		synctest.Wait()
		if n := s.Calls().X509 - before; n > 1 {
			t.Errorf("the server was asked %d times", n)
		}
		s.Refuse("full", "")
		sub = m.Subscribe(process("ann", "web"))
		defer sub.Close()
		mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) == 2 })
	})
}

// SVIDs of rules take part in the cache like others.
func TestRuleEviction(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Rule("r", "/p/{unix.program}", "unix:uid:1"))
		<-m.Synced()
		for i := range 20 {
			sub := m.Subscribe(process("ann", string(rune('a'+i))))
			mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) == 1 })
			sub.Close()
			time.Sleep(time.Second)
		}
		m.Subscribe(selectors()).Close()
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := m.Stats().X509SVIDs; n > 5 {
			t.Errorf("%d SVIDs are held, the cache has room for 5", n)
		}
		before := s.Calls().Signed
		last := m.Subscribe(process("ann", "t"))
		defer last.Close()
		if ids(last.View()) != "/p/t" || s.Calls().Signed != before {
			t.Error("the one that was used last is not held")
		}
	}, func(c *mirror.Config) { c.CacheSize = 5 })
}

func TestRuleJWT(t *testing.T) { // R52
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Rule("r", "/user/{unix.user}", "unix:uid:1"))
		<-m.Synced()
		synctest.Wait()
		get := func(user string) (mirror.JWT, error) {
			return m.JWT(t.Context(), entry.Matched{GrantID: "r", Facts: map[string]string{"unix.user": user}}, []string{"x"})
		}
		ann, err := get("ann")
		bob, errBob := get("bob")
		if err != nil || errBob != nil || ann.ID.Path() != "/user/ann" || bob.ID.Path() != "/user/bob" || ann.Token == bob.Token {
			t.Errorf("%v, %v; %v, %v", ann, err, bob, errBob)
		}
		if again, err := get("ann"); err != nil || again.Token != ann.Token || s.Calls().JWT != 2 {
			t.Errorf("%v, %v, %d calls", again, err, s.Calls().JWT)
		}
		for _, user := range []string{"", "a b"} {
			if tok, err := get(user); fault.KindOf(err) != fault.Denied {
				t.Errorf("%q: %v, %v", user, tok, err)
			}
		}
		s.Remove("r")
		synctest.Wait()
		if tok, err := get("ann"); fault.KindOf(err) != fault.Denied {
			t.Errorf("after the rule was removed: %v, %v", tok, err)
		}
	})
}

// A rule that is broken, or that a newer server made, gives nobody anything.
func TestMalformedRules(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		var bad []*syncv1.Grant
		for id, change := range map[string]func(*syncv1.Grant){
			"template": func(g *syncv1.Grant) { g.IdTemplate = "spiffe://example.org/user/{unix.user" },
			"foreign":  func(g *syncv1.Grant) { g.IdTemplate, g.IdPrefix = "spiffe://other.org/user/{unix.user}", "" },
			"prefix":   func(g *syncv1.Grant) { g.IdPrefix = "spiffe://example.org/other/" },
			"reserved": func(g *syncv1.Grant) { g.IdTemplate, g.IdPrefix = "spiffe://example.org/spire/agent/{unix.user}", "" },
			"wide":     func(g *syncv1.Grant) { g.IdTemplate, g.IdPrefix = "spiffe://example.org/{unix.user}", "" },
			"trust":    func(g *syncv1.Grant) { g.Trust = "nobody" },
			"nobody":   func(g *syncv1.Grant) { g.Trust = "" },
			"all":      func(g *syncv1.Grant) { g.Selectors = nil },
			"admin":    func(g *syncv1.Grant) { g.Admin = true },
			"server":   func(g *syncv1.Grant) { g.ParentId = "spiffe://example.org/spire/server" },
		} {
			g := s.Rule(id, "/user/{unix.user}", "unix:uid:1")
			change(g)
			bad = append(bad, g)
		}
		s.Put(bad...)
		s.Put(s.Rule("good", "/user/{unix.user}", "unix:uid:1"))
		sub := m.Subscribe(process("ann", "web"))
		defer sub.Close()
		v := mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) > 0 })
		if len(v.Matched) != 1 || v.Matched[0].GrantID != "good" || m.Stats().Grants != len(bad)+1 {
			t.Errorf("%s of %d grants", mirrortest.Describe(v), m.Stats().Grants)
		}
	})
}
