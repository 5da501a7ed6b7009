package servers

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
)

// hears is a machine that has lived for up, with a fresh beat of its own.
func hears(t *testing.T, up time.Duration, now time.Time) (*machine, time.Duration) {
	t.Helper()
	boot := 100 * time.Hour
	m := newTestMachine("m", "i", boot-up)
	m.judge(nil, here(), boot)
	row, err := m.next(nil, registry.Server{}, now, boot)
	if err != nil {
		t.Fatal(err)
	}
	m.fold(&row, boot, true)
	return m, boot
}

// A server whose clock is more than 30 s from the median of the live servers
// signs nothing; of an even number, the one of the two in the middle that has
// lived longer has the right time (R108). To remove what others left it has to
// be right within 5 s (R70).
func TestClock(t *testing.T) {
	const s = time.Second
	type other struct {
		ahead time.Duration
		up    time.Duration
		row   registry.Server
		later time.Duration // heard so long ago
	}
	const longer, shorter = 2 * time.Hour, time.Minute // than the own hour
	for _, tt := range []struct {
		name  string
		other []other
		sign  bool
		prune bool
	}{
		{"alone", nil, true, true},
		{"two agree", []other{{ahead: s, up: longer}}, true, true},
		{"two, the other has lived longer", []other{{ahead: 31 * s, up: longer}}, false, false},
		{"two, the other has lived longer, behind", []other{{ahead: -31 * s, up: longer}}, false, false},
		{"two, the other has lived longer, within bounds", []other{{ahead: 30 * s, up: longer}}, true, false},
		{"two, to prune", []other{{ahead: -5 * s, up: longer}}, true, true},
		{"two, not to prune", []other{{ahead: -6 * s, up: longer}}, true, false},
		{"two, the other is younger", []other{{ahead: 31 * s, up: shorter}}, true, true},
		{"two, the other is silent", []other{{ahead: time.Hour, up: longer, later: 36 * s}}, true, true},
		{"two, the other has stopped", []other{{ahead: time.Hour, up: longer, row: registry.Server{Stopped: true}}}, true, true},
		{"three, one is off", []other{{ahead: time.Hour, up: longer}, {ahead: s, up: longer}}, true, true},
		{"three, this one is off", []other{{ahead: 60 * s, up: shorter}, {ahead: 61 * s, up: shorter}}, false, false},
		{"three, this one lies between", []other{{ahead: -60 * s, up: longer}, {ahead: 60 * s, up: longer}}, true, true},
		{"four, two and two", []other{{ahead: 60 * s, up: shorter}, {ahead: 60 * s, up: shorter}, {up: longer}}, true, true},
		{"four, two and two, they have lived longer", []other{{ahead: 60 * s, up: longer}, {ahead: 61 * s, up: shorter}, {up: shorter}}, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			now := noon()
			m, boot := hears(t, time.Hour, now)
			for i, o := range tt.other {
				row := o.row
				row.ID, row.Instance, row.Beat, row.Up = fmt.Sprint("o", i), []byte("x"), 1, o.up
				row.BeatAt = now.Add(o.ahead - o.later)
				m.fold(&row, boot-o.later, true)
			}
			err := m.maySign(now, boot)
			if tt.sign != (err == nil) || err != nil && fault.ReasonOf(err) != "clock_off" {
				t.Errorf("maySign() = %v", err)
			}
			if err != nil {
				// Both clocks are named.
				right := m.clock(now, boot)
				for _, text := range []string{"12:00:00", now.Add(-right.ahead).Format("15:04:05"), right.by} {
					if !strings.Contains(err.Error(), text) {
						t.Errorf("%q does not name %s", err, text)
					}
				}
			}
			if err := m.mayPrune(now, boot); tt.prune != (err == nil) {
				t.Errorf("mayPrune() = %v", err)
			}
		})
	}
}

// A clock that is set while the server runs is noticed with the next signature,
// whichever way; that of another with its next beat, or its third.
func TestClockIsSet(t *testing.T) {
	m, boot := hears(t, time.Minute, noon())
	beats := uint64(0)
	other := func(ahead time.Duration) {
		boot += time.Second
		beats++
		m.fold(&registry.Server{ID: "o", Instance: []byte("x"), Beat: beats, BeatAt: noon().Add(boot - 100*time.Hour + ahead), Up: time.Hour}, boot, true)
	}
	own := func(ahead time.Duration, ok bool) {
		t.Helper()
		if err := m.maySign(noon().Add(boot-100*time.Hour+ahead), boot); ok != (err == nil) {
			t.Errorf("maySign() = %v", err)
		}
	}
	other(0)
	own(0, true)
	own(time.Minute, false)
	own(-time.Minute, false)
	own(0, true)
	other(time.Minute)
	own(0, false)
	own(time.Minute, true)
	other(0)
	other(0)
	own(0, false)
	other(0)
	own(0, true)
	// Beats that were under way while this server saw nothing say nothing of clocks.
	boot += time.Hour
	other(-55 * time.Minute)
	other(-55 * time.Minute)
	other(-55 * time.Minute)
	if ahead := m.clock(noon().Add(boot-100*time.Hour), boot).ahead; ahead != 0 {
		t.Errorf("after an outage the clock seems %v ahead", ahead)
	}
}

// Replicas that hold something else at the same position are noticed (R78).
func TestDigests(t *testing.T) {
	m, boot := hears(t, time.Minute, noon())
	epoch := store.NewEpoch()
	at := func(revision uint64) store.Position { return store.Position{Epoch: epoch, Revision: revision} }
	for i := range uint64(1000) {
		m.past.note(at(i), [32]byte{byte(i)})
	}
	beat := uint64(0)
	for _, tt := range []struct {
		at     store.Position
		digest byte
		want   bool
	}{
		{at(999), 999 % 256, false},
		{at(999), 1, true},
		{at(900), 900 % 256, false},
		{at(900), 1, true},
		{at(100), 1, true},  // too long ago to say: as it was
		{at(2000), 1, true}, // not there yet
		{at(998), 998 % 256, false},
		{store.Position{}, 1, false},
	} {
		beat++
		m.fold(&registry.Server{ID: "o", Instance: []byte("x"), Beat: beat, Position: tt.at, Digest: [32]byte{tt.digest}}, boot, true)
		if got := m.others(noon(), boot)[0].Diverged; got != tt.want {
			t.Errorf("at %v with %d: diverged %v", tt.at, tt.digest, got)
		}
	}
}
