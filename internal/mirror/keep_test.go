package mirror_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
)

// life is one life of an agent's mirror, which may have restored the one before.
type life struct {
	*mirror.Mirror
	trusted  *bundle.Bundle // as the agent knows it last
	changed  int
	narrowed int
	restored mirror.Restored
	stop     func()
}

func live(t *testing.T, s *mirrortest.Server, kept []byte, trusted *bundle.Bundle) *life {
	t.Helper()
	l := &life{trusted: trusted}
	l.Mirror = mirror.New(mirror.Config{TrustDomain: s.TD, Link: s, Version: "test", Log: slog.New(slog.DiscardHandler),
		OwnBundle: func(b *bundle.Bundle) { l.trusted = b },
		Changed: func(narrowed bool) {
			l.changed++
			if narrowed {
				l.narrowed++
			}
		}})
	if kept != nil {
		var err error
		if l.restored, err = l.Restore(kept, trusted); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- l.Run(ctx) }()
	l.stop = func() { cancel(); <-done }
	return l
}

// keep ends a life and returns what is left of it.
func (l *life) keep(t *testing.T) []byte {
	t.Helper()
	kept, err := l.Keep()
	if err != nil {
		t.Fatal(err)
	}
	l.stop()
	return kept
}

// R56: what has not expired is served from the first moment of the next life, with
// the server away. When it is back nothing is fetched or signed anew.
func TestRestore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mirrortest.New(t)
		s.PutBundle("other.test", &syncv1.Bundle{TrustDomain: "other.test", Sequence: 1})
		federated := s.Grant("a", "/a", "unix:uid:1")
		federated.FederatesWith = []string{"other.test"}
		s.Put(federated, s.Rule("r", "/user/{unix.user}", "unix:uid:1"))
		ann := selectors("unix:uid:1")
		ann.Values = map[string]string{"unix.user": "ann"}

		first := live(t, s, nil, nil)
		sub := first.Subscribe(ann)
		before := mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) == 2 })
		tok := token(t, first.Mirror, "a", "x")
		sub.Close()
		s.Down(true)
		kept, trusted := first.keep(t), first.trusted
		if first.changed == 0 || first.narrowed != 0 {
			t.Errorf("changed %d times, narrowed %d times", first.changed, first.narrowed)
		}

		time.Sleep(10 * time.Minute)
		calls := s.Calls()
		second := live(t, s, kept, trusted)
		defer func() { second.stop() }()
		if want := (mirror.Restored{Grants: 2, X509SVIDs: 2, JWTSVIDs: 1}); second.restored != want {
			t.Errorf("restored %+v, want %+v", second.restored, want)
		}
		<-second.Synced()
		sub = second.Subscribe(ann)
		defer sub.Close()
		now := sub.View()
		if mirrortest.Describe(now) != mirrortest.Describe(before) || len(now.Federated) != 1 || !now.Synced {
			t.Errorf("restored %s, want %s", mirrortest.Describe(now), mirrortest.Describe(before))
		}
		mirrortest.Verify(t, now, time.Now())
		if got, err := second.JWT(t.Context(), entry.Matched{GrantID: "a"}, []string{"x"}); err != nil || got.Token != tok {
			t.Errorf("JWT() = %v", err)
		}
		time.Sleep(5 * time.Minute)
		s.Down(false)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if after := s.Calls(); !second.Stats().Following || after.Signed != calls.Signed || after.JWT != calls.JWT {
			t.Errorf("after the server's return: %+v, before %+v", after, calls)
		}
		// Half of the life over, which began before the restart: renewed.
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if after := s.Calls(); after.Signed != calls.Signed+2 {
			t.Errorf("%d SVIDs were signed after half of their lives, want 2", after.Signed-calls.Signed)
		}
	})
}

// What is kept is checked like what a server says (R36); nothing expired, and
// nothing of an authority that is not trusted any more, comes back (R35, R55).
func TestRestoreLeavesOut(t *testing.T) {
	type kept struct {
		Format      int
		TrustDomain string
		Position    []byte
		Bodies      [][]byte
		SVIDs       []map[string]any
		Tokens      []map[string]any
	}
	foreign := func(t *testing.T, k *kept) {
		other := mirrortest.New(t) // the same name, other authorities
		other.Put(other.Grant("a", "/a", "unix:uid:1"))
		l := live(t, other, nil, nil)
		sub := l.Subscribe(selectors("unix:uid:1"))
		mirrortest.Until(t, sub, func(v mirror.View) bool { return ids(v) == "/a" })
		sub.Close()
		var theirs kept
		if err := json.Unmarshal(l.keep(t), &theirs); err != nil {
			t.Fatal(err)
		}
		k.SVIDs = theirs.SVIDs
	}
	for name, row := range map[string]struct {
		then      func(s *mirrortest.Server)            // after the first life has ended
		change    func(t *testing.T, k *kept)           // of what was kept
		trusted   func(b *bundle.Bundle) *bundle.Bundle // as it is known when restoring
		sleep     time.Duration
		x509, jwt int
	}{
		"as it was":      {x509: 1, jwt: 1},
		"JWT expired":    {sleep: 6 * time.Minute, x509: 1},
		"all expired":    {sleep: 2 * time.Hour},
		"clock put back": {sleep: -time.Minute},
		"another key":    {change: func(t *testing.T, k *kept) { k.SVIDs[0]["Key"] = k.SVIDs[1]["Key"]; k.SVIDs = k.SVIDs[:1] }, jwt: 1},
		"another's SVID": {change: func(t *testing.T, k *kept) {
			k.SVIDs[0]["Grant"], k.SVIDs[1]["Grant"] = k.SVIDs[1]["Grant"], k.SVIDs[0]["Grant"]
		}, jwt: 1},
		"another's token":      {change: func(t *testing.T, k *kept) { k.Tokens[0]["Grant"] = "b" }, x509: 2},
		"another audience":     {change: func(t *testing.T, k *kept) { k.Tokens[0]["Audience"] = []string{"y"} }, x509: 2},
		"facts for an entry":   {change: func(t *testing.T, k *kept) { k.SVIDs[0]["Facts"] = map[string]string{"x": "y"}; k.SVIDs = k.SVIDs[:1] }, jwt: 1},
		"another authority":    {change: foreign, jwt: 1},
		"no grants":            {change: func(t *testing.T, k *kept) { k.Bodies = k.Bodies[len(k.Bodies)-1:] }},
		"all authorities gone": {trusted: func(b *bundle.Bundle) *bundle.Bundle { return &bundle.Bundle{TrustDomain: b.TrustDomain} }},
		"X.509 authority tainted": {trusted: func(b *bundle.Bundle) *bundle.Bundle {
			b = b.Clone()
			b.X509[0].Tainted = true
			return b
		}, jwt: 1},
		"JWT authority gone": {trusted: func(b *bundle.Bundle) *bundle.Bundle {
			b = b.Clone()
			b.JWT = nil
			return b
		}, x509: 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := mirrortest.New(t)
				s.Put(s.Grant("a", "/a", "unix:uid:1"), s.Grant("b", "/b", "unix:uid:2"))
				first := live(t, s, nil, nil)
				sub := first.Subscribe(selectors("unix:uid:1", "unix:uid:2"))
				mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) == 2 })
				sub.Close()
				s.SetTTL(5 * time.Minute)
				token(t, first.Mirror, "a", "x")
				s.Down(true)
				raw, trusted := first.keep(t), first.trusted

				var k kept
				if err := json.Unmarshal(raw, &k); err != nil || len(k.SVIDs) != 2 || len(k.Tokens) != 1 {
					t.Fatal(err, len(k.SVIDs), len(k.Tokens))
				}
				if k.SVIDs[0]["Grant"] != "a" {
					k.SVIDs[0], k.SVIDs[1] = k.SVIDs[1], k.SVIDs[0]
				}
				if row.change != nil {
					row.change(t, &k)
				} else {
					k.SVIDs = k.SVIDs[:1]
				}
				raw, err := json.Marshal(k)
				if err != nil {
					t.Fatal(err)
				}
				if row.trusted != nil {
					trusted = row.trusted(trusted)
				}
				if row.sleep > 0 {
					time.Sleep(row.sleep)
				} else if row.sleep < 0 {
					for _, v := range append(k.SVIDs, k.Tokens...) {
						v["IssuedAt"] = time.Now().Add(-row.sleep)
					}
					raw, _ = json.Marshal(k)
				}
				second := live(t, s, raw, trusted)
				defer func() { second.stop() }()
				if r := second.restored; r.X509SVIDs != row.x509 || r.JWTSVIDs != row.jwt {
					t.Errorf("restored %+v, want %d and %d", r, row.x509, row.jwt)
				}
				for _, uid := range []string{"unix:uid:1", "unix:uid:2"} {
					sub := second.Subscribe(selectors(uid))
					mirrortest.Verify(t, sub.View(), time.Now())
					sub.Close()
				}
				// Whatever was left out, the server's return mends it.
				s.Down(false)
				sub = second.Subscribe(selectors("unix:uid:1"))
				defer sub.Close()
				time.Sleep(20 * time.Second)
				synctest.Wait()
				v := sub.View()
				if ids(v) != "/a" || !second.Stats().Following {
					t.Errorf("with the server back: %s, %+v", mirrortest.Describe(v), second.Stats())
				}
				mirrortest.Verify(t, v, time.Now())
				if row.trusted != nil && !bytes.Equal(v.Bundle.X509, first.trusted.X509DER()) {
					t.Error("the server's bundle did not come back")
				}
			})
		})
	}
}

// What cannot be read changes nothing.
func TestRestoreRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mirrortest.New(t)
		first := live(t, s, nil, nil)
		<-first.Synced()
		synctest.Wait()
		good, trusted := first.keep(t), first.trusted
		for name, bad := range map[string]string{
			"rubbish": "rubbish", "nothing": "{}", "another format": `{"Format":2,"TrustDomain":"example.org"}`,
			"another trust domain": `{"Format":1,"TrustDomain":"other.test"}`, "no bundle": `{"Format":1,"TrustDomain":"example.org"}`,
			"a position that is none": `{"Format":1,"TrustDomain":"example.org","Position":"/////w=="}`,
		} {
			m := mirror.New(mirror.Config{TrustDomain: s.TD, Link: s, Log: slog.New(slog.DiscardHandler), Changed: func(bool) {}})
			if r, err := m.Restore([]byte(bad), trusted); err == nil || m.Stats() != (mirror.Stats{}) {
				t.Errorf("%s: %+v, %v", name, r, err)
			}
			if _, err := m.Restore(good, nil); err == nil {
				t.Error("it was restored without a bundle to judge it by")
			}
			if kept, err := m.Keep(); kept != nil || err != nil {
				t.Errorf("%s: something is kept: %v", name, err)
			}
			if _, err := m.Restore(good, trusted); err != nil {
				t.Errorf("%s: what is good is refused after it: %v", name, err)
			}
		}
	})
}

// What must not be used any more is told apart from what only came.
func TestNarrowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mirrortest.New(t)
		l := live(t, s, nil, nil)
		defer l.stop()
		<-l.Synced()
		for name, row := range map[string]struct {
			do       func()
			narrowed bool
		}{
			"a grant comes": {func() { s.Put(s.Grant(time.Now().String(), "/n", "unix:uid:1")) }, false},
			"a bundle comes": {func() {
				s.PutBundle(time.Now().Format("x20060102150405")+".test", &syncv1.Bundle{TrustDomain: "x.test"})
			}, false},
			"the keys change": {func() { s.RotateJWT() }, true},
			"a grant changes": {func() {
				s.Put(s.Grant("c", "/c", "unix:uid:1"))
				synctest.Wait()
				s.Put(s.Grant("c", "/d", "unix:uid:1"))
			}, true},
			"a grant goes away": {func() { s.Put(s.Grant("g", "/g", "unix:uid:1")); synctest.Wait(); s.Remove("g") }, true},
		} {
			time.Sleep(time.Minute)
			synctest.Wait()
			changed, narrowed := l.changed, l.narrowed
			row.do()
			time.Sleep(time.Second)
			synctest.Wait()
			if l.changed == changed || (l.narrowed > narrowed) != row.narrowed {
				t.Errorf("%s: changed %d times, narrowed %d times", name, l.changed-changed, l.narrowed-narrowed)
			}
		}
	})
}
