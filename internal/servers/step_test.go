package servers

import (
	"fmt"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
)

// noon is the right time when the boot clock stands at 0.
func noon() time.Time { return time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC) }

func here() registry.Place {
	return registry.Place{Host: "a", DataDir: "/a", BootID: "boot", Device: 1, Inode: 2}
}

func newTestMachine(id, instance string, began time.Duration) *machine {
	return newMachine(settings{id: id, shared: true, lease: time.Hour, instance: []byte(instance), began: began})
}

// round writes a beat and folds it at once.
func round(t *testing.T, m *machine, stored *registry.Server, boot time.Duration) *registry.Server {
	t.Helper()
	row, err := m.next(stored, registry.Server{Place: here()}, noon().Add(boot), boot)
	if err != nil {
		t.Fatalf("next() = %v", err)
	}
	m.fold(&row, boot, true)
	return &row
}

// Who may take an identity, and when (R68).
func TestJudge(t *testing.T) {
	row := func(change func(*registry.Server)) *registry.Server {
		r := &registry.Server{ID: "s", Instance: []byte("old"), Beat: 7, Lease: time.Hour, Place: here()}
		r.Place.BootID = "another"
		change(r)
		return r
	}
	none := func(*registry.Server) {}
	for _, tt := range []struct {
		name    string
		alone   bool
		row     *registry.Server
		then    *registry.Server // found half a minute later
		removed bool             // found then
		until   time.Duration
		reason  string
	}{
		{name: "nobody was here"},
		{name: "nobody ever said who it is", row: row(func(r *registry.Server) { r.Instance = nil })},
		{name: "it stopped in order", row: row(func(r *registry.Server) { r.Stopped = true })},
		{name: "it lived in this very directory", row: row(func(r *registry.Server) { r.Place = here() })},
		{name: "the store is locked", alone: true, row: row(none)},
		{name: "the machine was started anew", row: row(none), until: 1000*time.Second + time.Hour + 7200*time.Millisecond + time.Second},
		{name: "another directory", row: row(func(r *registry.Server) { r.Place = here(); r.Place.Inode = 3 }), until: 1000*time.Second + time.Hour + 7200*time.Millisecond + time.Second},
		{name: "a place that is not known is no place", row: row(func(r *registry.Server) { r.Place = registry.Place{} }), until: 1000*time.Second + time.Hour + 7200*time.Millisecond + time.Second},
		{name: "an absurd lease", row: row(func(r *registry.Server) { r.Lease = -time.Hour }), until: 1001 * time.Second},
		{name: "it lives", row: row(none), then: row(func(r *registry.Server) { r.Beat++ }), reason: "server_id_in_use"},
		{name: "one more starts", row: row(none), then: row(func(r *registry.Server) { r.Beat, r.Instance = 8, []byte("third") }), reason: "server_id_in_use"},
		{name: "it stops", row: row(none), then: row(func(r *registry.Server) { r.Beat, r.Stopped = 8, true })},
		{name: "its row is removed", row: row(none), removed: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newTestMachine("s", "new", 1000*time.Second)
			m.shared = !tt.alone
			v := m.judge(tt.row, here(), 1000*time.Second)
			if tt.then != nil || tt.removed {
				v = m.judge(tt.then, here(), 1030*time.Second)
			}
			if v.until != tt.until || tt.reason == "" != (v.err == nil) || tt.reason != "" && fault.ReasonOf(v.err) != tt.reason {
				t.Fatalf("judge() = %v, %v, want %v, %q", v.until, v.err, tt.until, tt.reason)
			}
			if v.until == 0 {
				return
			}
			if err := m.maySign(noon(), 1010*time.Second); fault.ReasonOf(err) != "lease_of_former_life" {
				t.Errorf("maySign() while waiting = %v", err)
			}
			if v = m.judge(tt.row, here(), tt.until-1); v.until != tt.until {
				t.Errorf("judge() just before = %v", v)
			}
			if v = m.judge(tt.row, here(), tt.until); v.until != 0 || v.err != nil {
				t.Errorf("judge() when the lease is over = %v", v)
			}
		})
	}
}

// The lease is counted from before the beat was sent, by the boot clock, and
// only by beats that came back (R68).
func TestLease(t *testing.T) {
	const minute = time.Minute
	m := newTestMachine("s", "i", 0)
	sign := func(boot time.Duration, reason string) {
		t.Helper()
		// The wall clock plays no part, if nobody else's says otherwise.
		for _, now := range []time.Time{noon().Add(boot), noon().AddDate(-30, 0, 0), noon().AddDate(30, 0, 0)} {
			if err := m.maySign(now, boot); reason == "" != (err == nil) || reason != "" && fault.ReasonOf(err) != reason {
				t.Errorf("maySign() at %v (%v) = %v, want %q", boot, now, err, reason)
			}
		}
	}
	sign(0, "server_starting")
	m.judge(nil, here(), 0)
	row, err := m.next(nil, registry.Server{}, noon(), 0)
	if err != nil {
		t.Fatal(err)
	}
	sign(minute, "server_starting") // sent, and not back
	m.fold(&row, 2*minute, true)
	sign(2*minute, "")
	sign(59*minute, "")
	sign(60*minute, "lease_ended")
	// One that is sent and does not come back changes nothing, two that come back late do as much as they can.
	lost, _ := m.next(&row, registry.Server{}, noon(), 40*minute)
	sign(60*minute, "lease_ended")
	again, _ := m.next(&row, registry.Server{}, noon().Add(time.Second), 50*minute)
	if lost.Beat != again.Beat {
		t.Errorf("beats %d and %d after the same row", lost.Beat, again.Beat)
	}
	m.fold(&lost, 70*minute, true)
	sign(99*minute, "")
	sign(100*minute, "lease_ended")
	m.fold(&lost, 101*minute, true)
	sign(101*minute, "lease_ended")
	// The store is back after hours: the right comes back.
	row = *round(t, m, &lost, 500*minute)
	sign(501*minute, "")
	m.stopped = true
	if row, err = m.next(&row, registry.Server{}, noon(), 502*minute); err != nil || !row.Stopped {
		t.Errorf("the last row: %v, %v", row, err)
	}
	sign(502*minute, "server_stopping")
}

// Another life in the own row ends this one; a store that was put back does not (R68).
func TestRival(t *testing.T) {
	for _, tt := range []struct {
		name  string
		row   registry.Server
		fence bool
	}{
		{"another instance", registry.Server{Instance: []byte("x"), Beat: 13}, true},
		{"another instance at the same beat", registry.Server{Instance: []byte("x"), Beat: 12}, true},
		{"another instance, as this one began", registry.Server{Instance: []byte("x"), Beat: 11}, true},
		{"a former instance, from a backup", registry.Server{Instance: []byte("x"), Beat: 10}, false},
		{"a former beat, from a backup", registry.Server{Instance: []byte("i"), Beat: 11}, false},
		{"a copy of this process", registry.Server{Instance: []byte("i"), Beat: 13}, true},
		{"another server", registry.Server{ID: "t", Instance: []byte("x"), Beat: 13}, false},
	} {
		for _, how := range []string{"folded", "found"} {
			t.Run(fmt.Sprintf("%s, %s", tt.name, how), func(t *testing.T) {
				m := newTestMachine("s", "i", 0)
				former := &registry.Server{ID: "s", Instance: []byte("former"), Beat: 10, Stopped: true}
				m.judge(former, here(), 0)
				last := round(t, m, round(t, m, former, 0), time.Second)
				tt.row.BeatAt = noon().Add(time.Minute)
				if tt.row.ID != "" {
					m.fold(&tt.row, time.Minute, true)
				} else if tt.row.ID = "s"; how == "folded" {
					m.fold(&tt.row, time.Minute, true)
				} else if next, err := m.next(&tt.row, registry.Server{}, noon(), time.Minute); tt.fence != (err != nil) {
					t.Errorf("next() = %v", err)
				} else if err == nil && next.Beat <= last.Beat {
					t.Errorf("the beat %d follows %d", next.Beat, last.Beat)
				}
				err := m.maySign(noon(), time.Minute)
				if tt.fence != (fault.ReasonOf(err) == "server_id_in_use") {
					t.Errorf("maySign() = %v, want a refusal: %v", err, tt.fence)
				}
				if !tt.fence && tt.row.ID == "s" {
					round(t, m, &tt.row, 2*time.Minute)
					if err := m.maySign(noon(), 30*time.Minute); err != nil {
						t.Errorf("maySign() after the next beat = %v", err)
					}
				} else if _, err := m.next(last, registry.Server{}, noon(), 2*time.Minute); tt.fence && err == nil {
					t.Error("a server that was replaced writes its row")
				}
			})
		}
	}
}

// A beat of a former life that was under way when it was killed arrives late: who
// follows in its place judges anew, and takes over all the same (R68).
func TestLateBeat(t *testing.T) {
	m := newTestMachine("s", "i", 0)
	former := &registry.Server{ID: "s", Instance: []byte("former"), Beat: 10, Lease: time.Hour, Place: here()}
	m.judge(former, here(), 0)
	if _, err := m.next(former, registry.Server{}, noon(), 0); err != nil {
		t.Fatal(err)
	}
	late := *former
	late.Beat++
	if _, err := m.next(&late, registry.Server{}, noon(), 0); fault.ReasonOf(err) != "server_row_moved" {
		t.Fatalf("next() = %v", err)
	}
	m.fold(&late, 0, true)
	if v := m.judge(&late, here(), time.Second); v != (verdict{}) {
		t.Fatalf("judge() = %v", v)
	}
	row := round(t, m, &late, time.Second)
	if err := m.maySign(noon(), time.Minute); err != nil || row.Beat != 12 {
		t.Errorf("maySign() = %v after beat %d", err, row.Beat)
	}
}
