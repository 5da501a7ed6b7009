package mirror_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
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

// R131: each mistake has its own reason, and Why names what differs.
func TestWhy(t *testing.T) {
	const other = "unix:gid:9"
	grant := func(texts ...string) func(*mirrortest.Server) {
		return func(s *mirrortest.Server) { s.Put(s.Grant("a", "/a", texts...)) }
	}
	for name, row := range map[string]struct {
		seed  func(s *mirrortest.Server)
		hint  string
		then  func(s *mirrortest.Server) // after the first look
		after time.Duration
		want  *fault.Error
		says  string // in its message
	}{
		"nothing at all":            {seed: func(*mirrortest.Server) {}, want: reason.NoGrant},
		"two selectors differ":      {seed: grant("unix:uid:2", "unix:gid:2"), want: reason.NoGrant},
		"another kind of selector":  {seed: grant("k8s:ns:web"), want: reason.NoGrant},
		"one of two differs":        {seed: grant("unix:uid:1", "unix:gid:2"), want: reason.SelectorMismatch, says: "the grant a asks for unix:gid:2, and the process shows unix:gid:1"},
		"the only one differs":      {seed: grant("unix:uid:2"), want: reason.SelectorMismatch, says: "unix:uid:1"},
		"one of two has no like":    {seed: grant("unix:uid:1", "k8s:ns:web"), want: reason.SelectorMismatch, says: "nothing of the kind"},
		"parent":                    {seed: grant("unix:uid:2"), hint: "parent_mismatch", want: reason.ParentMismatch},
		"alias":                     {seed: func(*mirrortest.Server) {}, hint: "alias_mismatch", want: reason.AliasMismatch},
		"a nonsensical hint":        {seed: grant("unix:uid:2"), hint: "no_grant", want: reason.SelectorMismatch},
		"a near grant beats a hint": {seed: grant("unix:uid:1", "unix:gid:2"), hint: "parent_mismatch", want: reason.SelectorMismatch},
		"ended": {seed: func(s *mirrortest.Server) {
			g := s.Grant("a", "/a", "unix:uid:1")
			g.ExpiresAt = time.Now().Add(time.Minute).Unix()
			s.Put(g)
		}, after: 2 * time.Minute, want: reason.GrantExpired, says: "2000-01-01T00:01:00Z"},
		"refused": {seed: func(s *mirrortest.Server) { s.Refuse("a", "audit_failed"); grant("unix:uid:1")(s) },
			want: reason.SigningRefused, says: "audit_failed"},
		"not yet": {seed: func(s *mirrortest.Server) { s.RotateUnpublished(); grant("unix:uid:1")(s) },
			want: reason.NotSignedYet, says: "bundle"},
		"server away before the SVID was there": {
			seed: func(s *mirrortest.Server) { s.RotateUnpublished(); grant("unix:uid:1")(s) },
			then: func(s *mirrortest.Server) { s.Down(true); s.Publish() }, after: time.Minute, want: reason.NotSignedYet},
		"server's clock an hour ahead": {seed: func(s *mirrortest.Server) { s.SetSkew(time.Hour); grant("unix:uid:1")(s) },
			after: 10 * time.Second, want: reason.ClockSkew, says: "signed at 2000-01-01T01:00:"},
		"server's clock a day behind": {seed: func(s *mirrortest.Server) { s.SetSkew(-24 * time.Hour); grant("unix:uid:1")(s) },
			after: 10 * time.Second, want: reason.ClockSkew, says: "signed at 1999-12-31T00:00:"},
		"federated bundle": {seed: func(s *mirrortest.Server) {
			g := s.Grant("a", "/a", "unix:uid:1")
			g.FederatesWith = []string{"foreign.test", s.TD.Name()}
			s.Put(g)
		}, want: reason.FederatedBundleMissing, says: "foreign.test"},
		"fine": {seed: grant("unix:uid:1")},
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
				row.seed(s)
				<-m.Synced()
				synctest.Wait()
				if row.then != nil {
					row.then(s)
				}
				time.Sleep(row.after)
				synctest.Wait()
				facts := selectors("unix:uid:1", other, "unix:gid:1")
				var w mirror.Why
				for range 3 {
					w = m.Why(t.Context(), facts, false)
				}
				if asked > 1 {
					t.Errorf("the server was asked %d times", asked)
				}
				if row.want == nil {
					if w.Reason != nil || w.Ready() != 1 {
						t.Errorf("Why() = %+v", w)
					}
					return
				}
				if w.Reason == nil || w.Reason.Reason != row.want.Reason || !strings.Contains(w.Reason.Message, row.says) || w.Reason.Remedy != row.want.Remedy {
					t.Errorf("Why() = %v, want %s with %q", w.Reason, row.want.Reason, row.says)
				}
			}, func(c *mirror.Config) {
				c.Hint = func(context.Context, []entry.Selector) (string, error) { asked++; return row.hint, nil }
			})
		})
	}
}

// What is told of each grant, and of the link.
func TestWhyDetails(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetSkew(3 * time.Second)
		time.Sleep(10 * time.Second)
		older := s.Grant("old", "/old", "unix:uid:1")
		older.Hint, older.CreatedAt = "h", older.CreatedAt-1
		younger := s.Grant("young", "/young", "unix:uid:1")
		younger.Hint = "h"
		s.Put(older, younger, s.Grant("near", "/near", "unix:uid:1", "unix:gid:7"))
		<-m.Synced()
		synctest.Wait()
		w := m.Why(t.Context(), selectors("unix:uid:1", "unix:gid:1"), true)
		if len(w.Grants) != 2 || w.Grants[0].State != mirror.Ready || w.Grants[0].GrantID != "old" || w.Grants[0].ExpiresAt.IsZero() ||
			w.Grants[1].State != mirror.Shadowed || w.Grants[1].By != "old" || w.Reason != nil {
			t.Errorf("Why() = %+v", w)
		}
		if len(w.Near) != 1 || w.Near[0].Missing.String() != "unix:gid:7" || w.Near[0].Have[0].String() != "unix:gid:1" {
			t.Errorf("near misses: %+v", w.Near)
		}
		if y := w.Sync; !y.Synced || !y.Connected || !y.SkewKnown || (y.Skew-3*time.Second).Abs() > time.Millisecond || !y.Heard.Equal(time.Now()) || y.Err != nil || y.Position == nil {
			t.Errorf("Sync = %+v", y)
		}
		s.Down(true)
		time.Sleep(time.Minute)
		w = m.Why(t.Context(), selectors("unix:uid:1"), true)
		if y := w.Sync; y.Connected || time.Since(y.Heard) < time.Minute || fault.ReasonOf(y.Err) != "server_unavailable" {
			t.Errorf("Sync without a server = %+v", y)
		}
	})
}

// A process that is refused all the time, or a host full of them, does not make
// its agent ask the server all the time (R100).
func TestHintsAreBounded(t *testing.T) {
	asked := 0
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		<-m.Synced()
		synctest.Wait()
		for i := range 1000 {
			m.Why(t.Context(), selectors("unix:uid:"+strings.Repeat("1", i+1)), false)
		}
		if asked != 20 {
			t.Errorf("asked %d times in a burst, want 20", asked)
		}
		time.Sleep(time.Hour)
		facts := selectors("unix:uid:1")
		for range 100 {
			if w := m.Why(t.Context(), facts, false); w.Reason.Reason != "no_grant" {
				t.Fatal(w.Reason)
			}
			time.Sleep(time.Second)
		}
		if asked < 30 || asked > 31 {
			t.Errorf("asked %d times more in 100 s, want one in 10 s", asked-20)
		}
		many := make([]entry.Selector, 257)
		for i := range many {
			many[i] = entry.Selector{Type: "unix", Value: "supplementary_gid:" + strings.Repeat("1", i+1)}
		}
		before := asked
		m.Why(t.Context(), entry.Facts{Selectors: many}, true)
		if asked != before {
			t.Error("the server was asked about 257 selectors")
		}
	}, func(c *mirror.Config) {
		c.Hint = func(context.Context, []entry.Selector) (string, error) { asked++; return "", errors.New("no") }
	})
}

// R107: a token that is not valid by our clock says so.
func TestJWTSkew(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetSkew(time.Hour)
		time.Sleep(10 * time.Second)
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		<-m.Synced()
		synctest.Wait()
		if _, err := m.JWT(t.Context(), entry.Matched{GrantID: "a"}, []string{"x"}); fault.ReasonOf(err) != "clock_skew" {
			t.Errorf("JWT() = %v", err)
		}
	})
}

// Until the first sync nothing is said of grants.
func TestWhyNotSynced(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		synctest.Wait()
		if w := m.Why(t.Context(), selectors("unix:uid:1"), true); w.Reason != reason.NotSynced {
			t.Errorf("Why() = %v", w.Reason)
		}
	}, func(c *mirror.Config) { c.Link.(*mirrortest.Server).Down(true) })
}

// Of many near misses the oldest are told, and one that hardly misses goes first.
func TestManyNearMisses(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		var grants []*syncv1.Grant
		for i := range 100 {
			g := s.Grant(fmt.Sprintf("weak-%02d", i), "/w", "unix:uid:2")
			g.CreatedAt += int64(i)
			grants = append(grants, g)
		}
		strong := s.Grant("strong", "/s", "unix:uid:1", "unix:gid:2")
		strong.CreatedAt += 1000
		s.Put(append(grants, strong)...)
		<-m.Synced()
		synctest.Wait()
		w := m.Why(t.Context(), selectors("unix:uid:1", "unix:gid:1"), false)
		if len(w.Near) != 20 || w.Near[0].GrantID != "weak-00" || w.Near[18].GrantID != "weak-18" || w.Near[19].GrantID != "strong" ||
			!strings.Contains(w.Reason.Message, "strong") {
			t.Errorf("%v, %+v", w.Reason, w.Near)
		}
		// What was said a moment ago is void when something has changed.
		s.Put(s.Grant("mine", "/m", "unix:uid:1"))
		synctest.Wait()
		if w := m.Why(t.Context(), selectors("unix:uid:1", "unix:gid:1"), false); w.Reason != nil || w.Ready() != 1 {
			t.Errorf("%v, %d ready", w.Reason, w.Ready())
		}
	})
}
