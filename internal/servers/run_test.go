package servers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// process is one life of a server: its registry and its engine.
type process struct {
	*Servers
	t       *testing.T
	link    *link
	reg     *registry.Registry
	boot    *bootClock
	cancel  context.CancelFunc // kills it
	started chan error
	ended   chan error
	all     sync.WaitGroup

	differed atomic.Int64
	intruded atomic.Int64
}

// bootClock is the boot clock of one machine.
type bootClock struct {
	mu    sync.Mutex
	began time.Time
	slept time.Duration
}

func newBootClock() *bootClock { return &bootClock{began: time.Now().Add(-time.Hour)} }

func (b *bootClock) now() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Since(b.began) + b.slept
}

// sleep lets the machine sleep: timers stand still meanwhile.
func (b *bootClock) sleep(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.slept += d
}

type running struct {
	id    string
	place registry.Place
	alone bool // the store is not shared
	boot  *bootClock
	link  *link
}

func place(host string, inode uint64) registry.Place {
	return registry.Place{Host: host, DataDir: "/" + host, BootID: host, Device: 1, Inode: inode}
}

// launch starts a process; its Start may still be under way.
func launch(t *testing.T, m *memory, l running) *process {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	if l.boot == nil {
		l.boot = newBootClock()
	}
	if l.link == nil {
		l.link = m.link()
	}
	p := &process{t: t, link: l.link, boot: l.boot, cancel: cancel, started: make(chan error, 1), ended: make(chan error, 1)}
	var err error
	if p.reg, err = registry.Open(ctx, p.link, td, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	p.Servers = New(Config{
		TrustDomain: td, ID: l.id, Registry: p.reg, Shared: !l.alone, Lease: time.Hour, Place: l.place, Version: "test", Started: time.Now(),
		Report: func() Report {
			return Report{Addresses: []string{l.place.Host + ":1"}, Agents: 3, Position: p.reg.Position(), Acknowledged: 9, Roster: []uint64{7}}
		},
		Differs: func() { p.differed.Add(1) }, Intruder: func(string) { p.intruded.Add(1) },
		Boot: l.boot.now, Log: slog.New(slog.DiscardHandler),
	})
	p.all.Go(func() { p.reg.Run(ctx) })
	p.all.Go(func() {
		err := p.Start(ctx)
		p.started <- err
		if err == nil {
			p.ended <- p.Run(ctx)
		}
	})
	return p
}

// start launches a process that must take its identity at once.
func start(t *testing.T, m *memory, l running) *process {
	t.Helper()
	p := launch(t, m, l)
	began := time.Now()
	if err := <-p.started; err != nil {
		t.Fatalf("Start() = %v", err)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Fatalf("Start() took %v", took)
	}
	return p
}

// kill ends it at once, stop in order.
func (p *process) kill() {
	p.cancel()
	p.all.Wait()
}

func (p *process) stop() {
	p.t.Helper()
	if err := p.Stop(p.t.Context()); err != nil {
		p.t.Errorf("Stop() = %v", err)
	}
	p.kill()
}

func (p *process) signs(reason string) {
	p.t.Helper()
	if err := p.MaySign(time.Now()); reason == "" && err != nil || reason != "" && fault.ReasonOf(err) != reason {
		p.t.Errorf("MaySign() of %s = %v, want %q", p.cfg.ID, err, reason)
	}
}

func (p *process) staleness(reason string) {
	p.t.Helper()
	if err := p.Stale(); reason == "" && err != nil || reason != "" && fault.ReasonOf(err) != reason {
		p.t.Errorf("Stale() of %s = %v, want %q", p.cfg.ID, err, reason)
	}
}

// between is a while that ends between two beats, which come at whole seconds.
const between = 65500 * time.Millisecond

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// Servers that share a store say every 10 s that they live and how far they
// are, and agree about what they hold.
func TestBeats(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMemory()
		all := []*process{}
		for i, id := range []string{"a", "b", "c"} {
			all = append(all, start(t, m, running{id: id, place: place(id, uint64(i))}))
		}
		before := m.batches()
		time.Sleep(10 * time.Minute)
		if n := m.batches() - before; n < 3*58 || n > 3*61 {
			t.Errorf("%d beats in ten minutes of three servers", n)
		}
		for _, p := range all {
			p.signs("")
			p.staleness("")
			if f := p.Fresh(); f > BeatEvery {
				t.Errorf("Fresh() = %v", f)
			}
			p.reg.View(func(snap *registry.Snapshot) {
				rows := snap.Servers()
				if len(rows) != 3 {
					t.Fatalf("%d rows", len(rows))
				}
				for _, r := range rows {
					if age := time.Since(r.BeatAt); age > BeatEvery || r.Beat < 58 || r.Lease != time.Hour || r.Up < 590*time.Second ||
						r.Agents != 3 || r.Acknowledged != 9 || r.Addresses[0] != r.ID+":1" || r.Reads != registry.Format || r.Stopped {
						t.Errorf("row %+v", r)
					}
				}
			})
			for _, s := range p.Others() {
				if !s.Live || s.Silent > BeatEvery || s.Diverged || s.Ahead != 0 {
					t.Errorf("%s sees %+v", p.cfg.ID, s)
				}
			}
		}
		for _, p := range all {
			p.stop()
		}
	})
}

// A server whose state is not what the others have notices it, and loads afresh (R78).
// Those that are right keep what they have, as long as they are more.
func TestStraying(t *testing.T) {
	for _, servers := range []int{2, 3, 4} {
		bubble(t, func(t *testing.T) {
			m := newMemory()
			all := []*process{}
			for i, id := range []string{"a", "b", "c", "d"}[:servers] {
				all = append(all, start(t, m, running{id: id, place: place(id, uint64(i))}))
			}
			time.Sleep(between)
			loads := m.loads
			all[0].link.mu.Lock()
			all[0].link.loses = true
			all[0].link.mu.Unlock()
			_, err := all[1].reg.Update(t.Context(), "test", func(tx *registry.Tx) error {
				return tx.PutBundle(&bundle.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("partner"), Sequence: 1})
			})
			if err != nil {
				t.Fatal(err)
			}
			holds := func(p *process) (holds bool) {
				p.reg.View(func(s *registry.Snapshot) {
					_, err := s.Bundle(spiffeid.RequireTrustDomainFromString("partner"))
					holds = err == nil
				})
				return holds
			}
			synctest.Wait()
			if holds(all[0]) || !holds(all[1]) {
				t.Fatal("the store did not lie, or to all")
			}
			time.Sleep(2 * BeatEvery)
			if !holds(all[0]) {
				t.Error("the server that strays does not come back")
			}
			time.Sleep(10 * time.Minute)
			again := m.loads - loads
			if again != 1 && servers > 2 || again > 2 {
				t.Errorf("%d servers loaded afresh %d times", servers, again)
			}
			told := int64(0)
			for _, p := range all {
				told += p.differed.Load()
				for _, s := range p.Others() {
					if s.Diverged {
						t.Errorf("%s still sees another state at %s", p.cfg.ID, s.Row.ID)
					}
				}
			}
			if told == 0 {
				t.Error("nobody was told")
			}
			for _, p := range all {
				p.stop()
			}
		})
	}
}

// Without others that could ask, idle costs nothing; who asks for beats gets one a second at most.
func TestAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMemory()
		p := start(t, m, running{id: "a", place: place("a", 1), alone: true})
		before := m.batches()
		time.Sleep(24 * time.Hour)
		p.signs("")
		p.staleness("")
		if n := m.batches() - before; n != 0 {
			t.Errorf("%d writes in an idle day", n)
		}
		for range 100 {
			p.Poke()
			time.Sleep(100 * time.Millisecond)
		}
		if n := m.batches() - before; n < 9 || n > 11 {
			t.Errorf("%d writes in ten seconds", n)
		}
		// A store that cannot be written takes nothing away: nobody else changes anything.
		p.link.set("disk_full", false)
		p.Poke()
		time.Sleep(24 * time.Hour)
		p.signs("")
		p.staleness("")
		p.kill()
		// What was killed is followed at once: the store's own lock says that it is gone.
		p = start(t, m, running{id: "a", place: place("elsewhere", 2), alone: true})
		p.stop()
		p.signs("server_stopping")
	})
}

// A full disk does not keep a server that owns its store from starting.
func TestAloneStartsWithoutWriting(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMemory()
		start(t, m, running{id: "a", place: place("a", 1), alone: true}).kill()
		l := m.link()
		l.set("disk_full", false)
		p := start(t, m, running{id: "a", place: place("a", 1), alone: true, link: l})
		p.signs("")
		before := m.batches()
		time.Sleep(between)
		l.set("", false)
		time.Sleep(BeatEvery)
		if m.batches() != before+1 {
			t.Errorf("%d writes once there is room again, want one", m.batches()-before)
		}
		p.kill()
	})
}

// A store that is busy for a moment when a server starts, as when many start at
// once, or that fails over, ends no start; one that stays away ends it.
func TestStartMeetsTrouble(t *testing.T) {
	for _, tt := range []struct {
		writes, reason string
		blind          bool
	}{
		{"database_busy", "database_busy", false},
		{"", "committed_not_visible", true},
		{"deaf", "outcome_unknown", true},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m := newMemory()
				start(t, m, running{id: "first", place: place("first", 9)}).stop()
				l := m.link()
				l.set(tt.writes, tt.blind)
				p := launch(t, m, running{id: "a", place: place("a", 1), link: l})
				time.Sleep(startPatience - time.Second)
				p.signs("server_starting")
				l.set("", false)
				time.Sleep(5 * time.Second)
				p.signs("")
				if err := <-p.started; err != nil {
					t.Errorf("Start() = %v", err)
				}
				p.stop()

				l = m.link()
				l.set(tt.writes, tt.blind)
				p = launch(t, m, running{id: "b", place: place("b", 1), link: l})
				began := time.Now()
				err := <-p.started
				if took := time.Since(began); fault.KindOf(err) != fault.Unavailable || took < startPatience || took > startPatience+10*time.Second {
					t.Errorf("Start() = %v after %v", err, took)
				}
				p.signs("server_starting")
				p.kill()
			})
		})
	}
}

// A life that stopped, or that lived in the very directory that is locked now,
// is followed at once; any other when its lease is over (R68).
func TestNextLife(t *testing.T) {
	const wait = time.Hour + 7200*time.Millisecond + time.Second
	for _, tt := range []struct {
		name  string
		end   func(*process)
		place registry.Place
		wait  time.Duration
	}{
		{"stopped, elsewhere", (*process).stop, place("elsewhere", 9), 0},
		{"killed, in place", (*process).kill, place("a", 1), 0},
		{"killed, elsewhere", (*process).kill, place("elsewhere", 9), wait},
		{"killed, another directory of this machine", (*process).kill, place("a", 9), wait},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m := newMemory()
				was := start(t, m, running{id: "a", place: place("a", 1)})
				time.Sleep(between)
				tt.end(was)
				began := time.Now()
				is := launch(t, m, running{id: "a", place: tt.place})
				if tt.wait > 0 {
					time.Sleep(30 * time.Minute)
					is.signs("lease_of_former_life")
				}
				if err := <-is.started; err != nil {
					t.Fatalf("Start() = %v", err)
				}
				if took := time.Since(began); took < tt.wait || took > tt.wait+2*time.Second {
					t.Errorf("it began to sign after %v, want %v", took, tt.wait)
				}
				is.signs("")
				is.stop()
			})
		})
	}
}

// A copy of a data directory whose original lives is refused within two beats,
// and the original goes on (R68).
func TestClone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMemory()
		original := start(t, m, running{id: "a", place: place("a", 1)})
		time.Sleep(between)
		clone := launch(t, m, running{id: "a", place: place("b", 2)})
		began := time.Now()
		err := <-clone.started
		if f, ok := errors.AsType[*fault.Error](err); !ok || f.Reason != "server_id_in_use" || f.Kind != fault.Precondition ||
			!strings.Contains(f.Message, `host "a"`) || !strings.Contains(f.Message, "/a") || !strings.Contains(f.Remedy, "/b") {
			t.Fatalf("Start() of the clone = %v", err)
		}
		if took := time.Since(began); took > 2*BeatEvery {
			t.Errorf("the clone noticed after %v", took)
		}
		clone.kill()
		time.Sleep(time.Hour)
		original.signs("")
		original.stop()
	})
}

// Who finds that it was replaced signs nothing from that moment on, and ends (R68).
func TestReplaced(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMemory()
		was := start(t, m, running{id: "a", place: place("a", 1)})
		time.Sleep(between)
		// A machine that was copied while it ran looks like the directory itself.
		is := start(t, m, running{id: "a", place: place("a", 1)})
		synctest.Wait()
		was.signs("server_id_in_use")
		if err := <-was.ended; fault.ReasonOf(err) != "server_id_in_use" {
			t.Errorf("Run() = %v", err)
		}
		if err := was.Stop(t.Context()); err != nil {
			t.Errorf("Stop() = %v", err)
		}
		was.kill()
		time.Sleep(time.Hour)
		is.signs("")
		is.stop()
	})
}

// Without the store a server is stale after a minute, and signs until its lease
// is over; afterwards it catches up without loading anything (R68, R77).
func TestOutage(t *testing.T) {
	for _, tt := range []struct {
		writes string
		blind  bool
	}{
		{"store_unavailable", true}, // the store is away
		{"disk_full", false},        // it can be read alone
		{"", true},                  // it can be written, and is not seen
		{"deaf", true},
	} {
		t.Run(fmt.Sprintf("%q, %v", tt.writes, tt.blind), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m := newMemory()
				p := start(t, m, running{id: "a", place: place("a", 1)})
				other := start(t, m, running{id: "b", place: place("b", 2)})
				time.Sleep(between)
				loads := m.loads
				p.link.set(tt.writes, tt.blind)
				since := p.Fresh()
				time.Sleep(StaleAfter - since)
				p.staleness("")
				time.Sleep(time.Millisecond)
				p.staleness("state_stale")
				p.signs("")
				if err := p.MayPrune(time.Now()); fault.ReasonOf(err) != "state_stale" {
					t.Errorf("MayPrune() = %v", err)
				}
				time.Sleep(time.Hour - StaleAfter - 2*time.Millisecond)
				p.signs("")
				time.Sleep(time.Millisecond)
				p.signs("lease_ended")
				time.Sleep(5 * time.Hour)
				other.signs("")
				other.staleness("")
				p.link.set("", false)
				time.Sleep(BeatEvery)
				p.signs("")
				p.staleness("")
				if m.loads != loads {
					t.Errorf("it was loaded %d times", m.loads-loads)
				}
				p.stop()
				other.stop()
			})
		})
	}
}

// A machine that sleeps past its lease wakes up without the right to sign, and
// gets it back with the next beat (R68).
func TestSleep(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMemory()
		p := start(t, m, running{id: "a", place: place("a", 1)})
		time.Sleep(between)
		p.boot.sleep(30 * time.Minute)
		p.signs("")
		p.staleness("state_stale")
		p.boot.sleep(30 * time.Minute)
		p.signs("lease_ended")
		time.Sleep(BeatEvery)
		p.signs("")
		p.staleness("")
		p.stop()
	})
}

// Who starts hears the others' clocks within a second or two, not after ten.
func TestStartHears(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMemory()
		a := start(t, m, running{id: "a", place: place("a", 1)})
		b := start(t, m, running{id: "b", place: place("b", 2)})
		b.mu.Lock()
		heard := len(b.machine.peers["a"].zeroes)
		b.mu.Unlock()
		if heard == 0 {
			t.Error("b signs without having heard a")
		}
		b.kill()
		time.Sleep(2 * time.Second)
		// One that is dead delays by a second if another answers, else by one beat.
		start(t, m, running{id: "c", place: place("c", 3)}).kill()
		a.kill()
		began := time.Now()
		d := launch(t, m, running{id: "d", place: place("d", 4)})
		if err := <-d.started; err != nil || time.Since(began) > hearFirst+time.Second {
			t.Errorf("Start() = %v after %v", err, time.Since(began))
		}
		d.kill()
	})
}

// authorities gives a server keys of both kinds, as if it had made them.
func (p *process) authorities(until time.Time) {
	p.t.Helper()
	_, err := p.reg.Update(p.t.Context(), "test", func(tx *registry.Tx) error {
		b, err := tx.Bundle(td)
		if err != nil {
			b = &bundle.Bundle{TrustDomain: td}
		}
		root := registry.Slot{Name: "A", State: registry.SlotActive, Certificate: []byte("root of " + p.cfg.ID), NotAfter: until, LastExpiry: until}
		key := registry.Slot{Name: "A", State: registry.SlotActive, AuthorityID: "key of " + p.cfg.ID, PublicKey: []byte("k"), NotAfter: until, LastExpiry: until}
		b = b.WithX509(bundle.X509Authority{ASN1: root.Certificate}).WithJWT(bundle.JWTAuthority{KeyID: key.AuthorityID, PublicKey: key.PublicKey, ExpiresAt: until})
		return errors.Join(tx.PutBundle(b),
			tx.PutAuthority(registry.Authority{Server: p.cfg.ID, Kind: "x509", Slots: []registry.Slot{root}}),
			tx.PutAuthority(registry.Authority{Server: p.cfg.ID, Kind: "jwt", Slots: []registry.Slot{key}}))
	})
	if err != nil {
		p.t.Fatal(err)
	}
}

// left says what is stored of servers.
func (p *process) left() (roots, keys, authorities, rows int) {
	p.reg.View(func(snap *registry.Snapshot) {
		b, err := snap.Bundle(td)
		if err != nil {
			p.t.Fatal(err)
		}
		roots, keys, authorities, rows = len(b.X509), len(b.JWT), len(snap.Authorities("")), len(snap.Servers())
	})
	return roots, keys, authorities, rows
}

// A server that is replaced 200 times, with a new data directory each time,
// leaves a bundle of bounded size: what is gone is removed after the last
// document under it (R65, R70).
func TestReplacements(t *testing.T) {
	for _, end := range []string{"stop", "kill"} {
		t.Run(end, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m := newMemory()
				stays := start(t, m, running{id: "stays", place: place("stays", 1)})
				stays.authorities(time.Now().AddDate(1, 0, 0))
				most := 0
				for i := range 200 {
					p := launch(t, m, running{id: fmt.Sprint("s", i), place: place(fmt.Sprint("h", i), uint64(i))})
					if err := <-p.started; err != nil {
						t.Fatal(err)
					}
					p.authorities(time.Now().Add(80 * time.Minute))
					time.Sleep(10 * time.Minute)
					if end == "stop" {
						p.stop()
					} else {
						p.kill()
					}
					roots, keys, authorities, rows := stays.left()
					most = max(most, roots, keys, authorities/2, rows)
					if i > 10 && (roots < 8 || keys < 8) {
						t.Fatalf("after %d: %d roots and %d keys, less than may still be used", i, roots, keys)
					}
				}
				if most > 14 {
					t.Errorf("up to %d roots, keys or rows", most)
				}
				time.Sleep(30 * time.Hour)
				if roots, keys, authorities, rows := stays.left(); roots != 1 || keys != 1 || authorities != 2 || rows != 1 {
					t.Errorf("in the end %d roots, %d keys, %d authorities, %d rows", roots, keys, authorities, rows)
				}
				m.mu.Lock()
				for key := range m.rows {
					if strings.HasPrefix(key, "/roster/") && key != "/roster/stays" {
						t.Errorf("%s is left", key)
					}
				}
				m.mu.Unlock()
				stays.stop()
			})
		})
	}
}
