package mirror_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/plastron/plastron/internal/serverlink"
)

// silent is a server that does not answer requests for tokens.
type silent struct {
	*mirrortest.Server
	mute chan struct{} // closed: from now on
}

func (s *silent) JWT(ctx context.Context, grantID string, facts map[string]string, audience []string) (serverlink.JWTResult, error) {
	select {
	case <-s.mute:
		<-ctx.Done()
		return serverlink.JWTResult{}, ctx.Err()
	default:
	}
	return s.Server.JWT(ctx, grantID, facts, audience)
}

func token(t *testing.T, m *mirror.Mirror, grant string, audience ...string) string {
	t.Helper()
	began := time.Now()
	got, err := m.JWT(t.Context(), entry.Matched{GrantID: grant}, audience)
	if err != nil {
		t.Fatal(err)
	}
	if waited := time.Since(began); waited > 0 {
		t.Errorf("the caller waited %v", waited)
	}
	return got.Token
}

// What is asked for is renewed before it ends, and nobody waits for the server
// while a good token exists, even if the server does not answer at all.
func TestTokensAreRenewedWithoutTheirCallers(t *testing.T) {
	link := &silent{mute: make(chan struct{})}
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetTTL(10 * time.Minute)
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		<-m.Synced()
		synctest.Wait()
		first := token(t, m, "a", "x")
		time.Sleep(6 * time.Minute)
		signed := s.Calls().JWT
		second := token(t, m, "a", "x")
		if second == first || signed != 2 || s.Calls().JWT != 2 {
			t.Errorf("%d tokens were signed before half of the life was over and one was asked for, want 2", signed)
		}
		close(link.mute)
		for range 8 {
			time.Sleep(time.Minute)
			if token(t, m, "a", "x") != second {
				t.Error("it is another token")
			}
		}
	}, func(c *mirror.Config) {
		link.Server, c.Link = c.Link.(*mirrortest.Server), link
	})
}

// Asks that nobody repeats end with their tokens.
func TestForgottenTokensAreNotRenewed(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetTTL(10 * time.Minute)
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		<-m.Synced()
		synctest.Wait()
		token(t, m, "a", "x")
		time.Sleep(time.Hour)
		if n := s.Calls().JWT; n > 3 {
			t.Errorf("%d tokens were signed of which one was asked for", n)
		}
		if n := m.Report(0).JWTSVIDs; n != 0 {
			t.Errorf("%d tokens are held", n)
		}
	})
}

// R52: within the sync that taints or removes a key, what it signed is gone, and
// signed anew before anyone asks. A grant that changes or goes takes its tokens along.
func TestTokensFollowTheirKeysAndGrants(t *testing.T) {
	for name, end := range map[string]func(*mirrortest.Server){"tainted": (*mirrortest.Server).Taint, "removed": (*mirrortest.Server).Revoke} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
				s.Put(s.Grant("a", "/a", "unix:uid:1"), s.Grant("b", "/b", "unix:uid:1"))
				<-m.Synced()
				synctest.Wait()
				first := token(t, m, "a", "x")
				token(t, m, "b", "x")
				s.RotateJWT()
				synctest.Wait()
				s.Down(true)
				s.Down(false) // so that the next sync is a comparison
				end(s)
				time.Sleep(5 * time.Second)
				signed := s.Calls().JWT
				if token(t, m, "a", "x") == first || signed != 4 || s.Calls().JWT != 4 {
					t.Errorf("%d tokens were signed, want 2 anew", signed)
				}
				s.Put(s.Grant("a", "/a", "unix:uid:1"))
				s.Remove("b")
				synctest.Wait()
				if n, held := s.Calls().JWT, m.Report(0).JWTSVIDs; n != 5 || held != 1 {
					t.Errorf("%d tokens were signed and %d are held, want 5 and 1", n, held)
				}
			})
		})
	}
}

// With the server away what is known is served until it ends, and after its
// return it is renewed at once (R56).
func TestTokensOutliveTheServer(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.SetTTL(10 * time.Minute)
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		<-m.Synced()
		synctest.Wait()
		first := token(t, m, "a", "x")
		s.Down(true)
		for range 9 {
			time.Sleep(time.Minute)
			if token(t, m, "a", "x") != first {
				t.Error("another token, and no server")
			}
		}
		time.Sleep(2 * time.Minute)
		if _, err := m.JWT(t.Context(), entry.Matched{GrantID: "a"}, []string{"x"}); err == nil { // R35
			t.Error("an expired token was handed out")
		}
		s.Down(false)
		time.Sleep(10 * time.Second)
		if n := m.Report(0).JWTSVIDs; n != 1 {
			t.Errorf("%d tokens are held after the server's return, want 1", n)
		}
	})
}

// The cache is bounded, and who asks for ever new audiences does so at its own cost.
func TestTokensAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Grant("a", "/a", "unix:uid:1"), s.Grant("b", "/b", "unix:uid:2"))
		<-m.Synced()
		synctest.Wait()
		first := token(t, m, "a", "x")
		for i := range 50 {
			token(t, m, "b", fmt.Sprint(i))
		}
		if n := m.Report(0).JWTSVIDs; n != 4 {
			t.Errorf("%d tokens are held, want 4", n)
		}
		if token(t, m, "a", "x") != first {
			t.Error("one identity took the place of another")
		}
	}, func(c *mirror.Config) { c.JWTCacheSize = 4 })
}

// broken is a server whose first answer for a token is more than a bug can bear.
type broken struct {
	*mirrortest.Server
	calls int
}

func (b *broken) JWT(ctx context.Context, grantID string, facts map[string]string, audience []string) (serverlink.JWTResult, error) {
	if b.calls++; b.calls == 1 {
		panic("a bug")
	}
	return b.Server.JWT(ctx, grantID, facts, audience)
}

// A panic while a token is signed costs the call that it comes in: who asks for the
// same later does not wait for it (R99).
func TestTokenAfterAPanic(t *testing.T) {
	bubble(t, func(t *testing.T, s *mirrortest.Server, m *mirror.Mirror) {
		s.Put(s.Grant("a", "/a", "unix:uid:1"))
		<-m.Synced()
		synctest.Wait()
		func() {
			defer func() {
				if recover() == nil {
					t.Error("nothing panicked")
				}
			}()
			token(t, m, "a", "x")
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := m.JWT(ctx, entry.Matched{GrantID: "a"}, []string{"x"}); err != nil {
			t.Errorf("JWT() = %v", err)
		}
	}, func(c *mirror.Config) { c.Link = &broken{Server: c.Link.(*mirrortest.Server)} })
}
