package servers

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
)

// keyed publishes a real authority of each kind for a server, as that server does.
func keyed(t *testing.T, p *process, server string) (spki []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	until := now.Add(24 * time.Hour)
	root, err := svid.SelfSignedCA(td, key, now, until)
	if err != nil {
		t.Fatal(err)
	}
	if spki, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		t.Fatal(err)
	}
	token, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(token.Public())
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.reg.Update(t.Context(), "test", func(tx *registry.Tx) error {
		b, err := tx.Bundle(td)
		if err != nil {
			b = &bundle.Bundle{TrustDomain: td}
		}
		slot := registry.Slot{Name: "A", State: registry.SlotActive, NotBefore: now, NotAfter: until, LastExpiry: until, PublishedAt: now}
		ca, signer := slot, slot
		ca.AuthorityID, ca.Certificate, ca.PublicKey = "ca of "+server, root, spki
		signer.AuthorityID, signer.PublicKey = fmt.Sprintf("key of %s %x", server, public[len(public)-4:]), public
		b = b.WithX509(bundle.X509Authority{ASN1: root}).WithJWT(bundle.JWTAuthority{KeyID: signer.AuthorityID, PublicKey: public, ExpiresAt: until})
		return errors.Join(tx.PutBundle(b),
			tx.PutAuthority(registry.Authority{Server: server, Kind: "x509", Slots: []registry.Slot{ca}}),
			tx.PutAuthority(registry.Authority{Server: server, Kind: "jwt", Slots: []registry.Slot{signer}}))
	})
	if err != nil {
		t.Fatal(err)
	}
	return spki
}

// stands says how a server's keys stand in the bundle: how many roots and keys there
// are, how many of both are tainted, and how many are remembered as revoked.
func (p *process) stands() (text string) {
	p.reg.View(func(snap *registry.Snapshot) {
		b, err := snap.Bundle(td)
		if err != nil {
			p.t.Fatal(err)
		}
		tainted := 0
		for _, a := range b.X509 {
			if a.Tainted {
				tainted++
			}
		}
		for _, k := range b.JWT {
			if k.Tainted {
				tainted++
			}
		}
		text = fmt.Sprintf("%d roots, %d keys, %d tainted, %d revoked, %d authorities, %d servers", len(b.X509), len(b.JWT), tainted, len(b.Revoked),
			len(snap.Authorities("")), len(snap.Servers()))
	})
	return text
}

// An expelled server signs no more and ends; its row goes at once, its authorities are
// tainted and after their time revoked, by whoever is there; it never comes back, under
// whatever it writes, though it has the store's password. R68, R69, R130
func TestExpel(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMemory()
		a := start(t, m, running{id: "a", place: place("a", 1)})
		b := start(t, m, running{id: "b", place: place("b", 2)})
		c := start(t, m, running{id: "c", place: place("c", 3)})
		keyed(t, a, "a")
		keyed(t, b, "b")
		bad := keyed(t, c, "c")
		time.Sleep(time.Minute)
		expect := func(what, want string) {
			t.Helper()
			for _, p := range []*process{a, b} {
				if got := p.stands(); got != want {
					t.Errorf("%s: %s holds %s, want %s", what, p.cfg.ID, got, want)
				}
			}
		}
		expect("at first", "3 roots, 3 keys, 0 tainted, 0 revoked, 6 authorities, 3 servers")
		x, err := a.Expel(t.Context(), "op", "c", time.Minute)
		if err != nil || x.Caller != "op" || x.RevokeAt.Sub(x.At) != time.Minute {
			t.Fatalf("Expel() = %+v, %v", x, err)
		}
		if err := <-c.ended; fault.ReasonOf(err) != "server_expelled" {
			t.Errorf("the expelled server ended with %v", err)
		}
		c.signs("server_expelled")
		synctest.Wait()
		expect("at once", "3 roots, 3 keys, 2 tainted, 0 revoked, 6 authorities, 2 servers")
		if n := len(a.Others()); n != 1 {
			t.Errorf("%d others", n)
		}
		if _, err := a.Expel(t.Context(), "op", "a", 0); fault.ReasonOf(err) != "server_is_self" {
			t.Errorf("itself: %v", err)
		}
		a.kill() // another finishes what it began
		time.Sleep(50 * time.Second)
		if got := b.stands(); got != "3 roots, 3 keys, 2 tainted, 0 revoked, 6 authorities, 2 servers" {
			t.Errorf("before its time: %s", got)
		}
		time.Sleep(15 * time.Second)
		if got := b.stands(); got != "2 roots, 2 keys, 0 tainted, 2 revoked, 4 authorities, 2 servers" {
			t.Errorf("after its time: %s", got)
		}
		// It cannot start, and who writes in its name all the same is thrown out again.
		if again := launch(t, m, running{id: "c", place: place("c", 3)}); true {
			if err := <-again.started; fault.ReasonOf(err) != "server_expelled" {
				t.Errorf("it starts: %v", err)
			}
			again.kill()
		}
		intruders := b.intruded.Load()
		_, err = b.reg.Update(t.Context(), "attacker", func(tx *registry.Tx) error {
			return errors.Join(tx.PutServer(registry.Server{ID: "c", Instance: []byte("x"), Beat: 99, Lease: time.Hour, BeatAt: time.Now()}),
				tx.PutRoster("c", []uint64{7, 8}))
		})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		b.reg.View(func(snap *registry.Snapshot) {
			if _, err := snap.Server("c"); err == nil {
				t.Error("the row that it wrote is there")
			}
		})
		if slices.ContainsFunc(b.Others(), func(o Other) bool { return o.Row.ID == "c" }) {
			t.Error("what it says counts")
		}
		if result := m.commit(&store.Txn{Caller: "attacker", Puts: []store.Put{{Key: "/server/c", Value: []byte("?")}}}); result.Err != nil {
			t.Fatal(result.Err)
		}
		keyed(t, b, "c") // a spoilt row does not protect it
		synctest.Wait()
		time.Sleep(3 * time.Second)
		if got := b.stands(); got != "2 roots, 2 keys, 0 tainted, 4 revoked, 4 authorities, 2 servers" {
			t.Errorf("after it wrote: %s", got)
		}
		b.reg.View(func(snap *registry.Snapshot) {
			if _, err := snap.Server("c"); err == nil {
				t.Error("its row is there")
			}
			if own, _ := snap.Bundle(td); !own.IsRevoked(sha256.Sum256(bad)) {
				t.Error("its authority can come back")
			}
		})
		if b.intruded.Load() == intruders {
			t.Error("nobody was told")
		}
	})
}

// With time given, what was expelled can still be revoked at once; and where nobody
// else has a key, nothing is revoked.
func TestExpelAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMemory()
		a := start(t, m, running{id: "a", place: place("a", 1)})
		keyed(t, a, "c") // left by a server that is not there any more
		if _, err := a.Expel(t.Context(), "op", "c", 0); err != nil {
			t.Fatal(err)
		}
		if got := a.stands(); got != "1 roots, 1 keys, 0 tainted, 0 revoked, 2 authorities, 1 servers" {
			t.Errorf("the only keys: %s", got)
		}
		keyed(t, a, "a")
		time.Sleep(3 * time.Second)
		if got := a.stands(); got != "1 roots, 1 keys, 0 tainted, 2 revoked, 2 authorities, 1 servers" {
			t.Errorf("with keys of another: %s", got)
		}
		keyed(t, a, "d")
		if _, err := a.Expel(t.Context(), "op", "d", time.Hour); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Expel(t.Context(), "op", "d", 2*time.Hour); err != nil { // does not make it later
			t.Fatal(err)
		}
		x, err := a.Expel(t.Context(), "op", "d", 0)
		if err != nil || x.RevokeAt.After(time.Now()) {
			t.Fatalf("Expel() = %+v, %v", x, err)
		}
		if got := a.stands(); got != "1 roots, 1 keys, 0 tainted, 4 revoked, 2 authorities, 1 servers" {
			t.Errorf("sooner: %s", got)
		}
	})
}

// What becomes of each key of a server that is expelled.
func TestBanish(t *testing.T) {
	at := noon()
	x := registry.Expulsion{Server: "c", At: at, RevokeAt: at.Add(time.Minute)}
	key := func(id string, published time.Time) registry.Slot {
		return registry.Slot{AuthorityID: id, PublicKey: []byte("public " + id), PublishedAt: published, NotAfter: at.Add(time.Hour)}
	}
	in := func(slots ...registry.Slot) *bundle.Bundle {
		b := &bundle.Bundle{TrustDomain: td}
		for _, s := range append(slots, key("other", at)) {
			b = b.WithJWT(bundle.JWTAuthority{KeyID: s.AuthorityID, PublicKey: s.PublicKey, ExpiresAt: s.NotAfter})
		}
		return b
	}
	old, later, intended := key("old", at.Add(-time.Hour)), key("later", at.Add(time.Second)), registry.Slot{Name: "B", State: registry.SlotIntended}
	for name, tt := range map[string]struct {
		slots   []registry.Slot
		bundle  *bundle.Bundle
		now     time.Time
		tainted []string
		left    []string
		gone    bool // the rows of its authorities
	}{
		"in its time":              {[]registry.Slot{old}, in(old), at, []string{"old"}, []string{"old", "other"}, false},
		"published after that":     {[]registry.Slot{old, later}, in(old, later), at, []string{"old"}, []string{"old", "other"}, false},
		"not in the bundle":        {[]registry.Slot{old}, in(), at, nil, []string{"other"}, false},
		"its time is over":         {[]registry.Slot{old, later}, in(old, later), at.Add(time.Minute), nil, []string{"other"}, true},
		"never made":               {[]registry.Slot{intended}, in(), at.Add(time.Hour), nil, []string{"other"}, true},
		"the key id of another's":  {[]registry.Slot{{AuthorityID: "other", PublicKey: []byte("mine"), PublishedAt: at}}, in(), at, nil, []string{"other"}, false},
		"another's, in the end":    {[]registry.Slot{{AuthorityID: "other", PublicKey: []byte("mine"), PublishedAt: at}}, in(), at.Add(time.Hour), nil, []string{"other"}, true},
		"there would be none left": {[]registry.Slot{key("other", at)}, in(), at.Add(time.Hour), nil, []string{"other"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, _ := banish(x, estate{bundle: tt.bundle, authorities: []registry.Authority{{Server: "c", Kind: "jwt", Slots: tt.slots}}}, tt.now)
			var left, tainted []string
			for _, k := range got.bundle.JWT {
				if left = append(left, k.KeyID); k.Tainted {
					tainted = append(tainted, k.KeyID)
				}
			}
			if !slices.Equal(left, tt.left) || !slices.Equal(tainted, tt.tainted) || (len(got.kinds) > 0) != tt.gone {
				t.Errorf("left %v, tainted %v, rows %v; want %v, %v, gone %v", left, tainted, got.kinds, tt.left, tt.tainted, tt.gone)
			}
		})
	}
}
