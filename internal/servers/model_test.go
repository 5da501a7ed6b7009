package servers

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
)

var (
	oneSeed = flag.Uint64("seed", 0, "run this seed alone, and print what happens")
	seeds   = flag.Int("seeds", 200, "how many seeds to run")
)

// world is one row in a log, and the lives that fight for it.
type world struct {
	r     *rand.Rand
	now   time.Duration // the time that nobody can see
	rows  []registry.Server
	lives []*life
	trace []string
}

// life is a process under the one identity: its machine, how far it has
// followed the log, and what it has sent that did not arrive yet.
type life struct {
	*machine
	name   string
	place  registry.Place
	offset time.Duration // of its boot clock
	speed  float64       // of its boot clock
	pos    int           // rows of the log that it has seen
	dead   bool
	sent   []sent
}

type sent struct {
	row  registry.Server
	when int // it is good if the log has so many rows
}

func (l *life) boot(now time.Duration) time.Duration {
	return l.offset + time.Duration(float64(now)*l.speed)
}

func (l *life) stored(w *world) *registry.Server {
	if l.pos == 0 {
		return nil
	}
	row := w.rows[l.pos-1]
	return &row
}

func (w *world) say(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf("%v ", w.now)+fmt.Sprintf(format, args...))
}

// begin starts a life: in a directory of its own, which may be a copy, or in
// that of one that is dead.
func (w *world) begin() {
	n := len(w.lives)
	l := &life{
		name:  fmt.Sprint(n),
		place: registry.Place{BootID: "boot", Inode: uint64(100 + n)}, offset: time.Duration(w.r.Int64N(int64(1000 * time.Hour))),
		speed: 1 + (w.r.Float64()-0.5)/1000, pos: len(w.rows),
	}
	if n > 0 && w.r.IntN(2) == 0 {
		other := w.lives[w.r.IntN(n)]
		locked := slices.ContainsFunc(w.lives, func(l *life) bool { return !l.dead && l.place == other.place })
		if !locked {
			l.place, l.offset, l.speed = other.place, other.offset, other.speed
		}
	}
	l.machine = newMachine(settings{id: "s", shared: true, lease: time.Hour, instance: []byte(l.name), began: l.boot(w.now)})
	w.lives = append(w.lives, l)
	w.say("%s starts in %d", l.name, l.place.Inode)
}

func (w *world) step() {
	if d := w.r.IntN(100); d < 60 {
		w.now += time.Duration(w.r.Int64N(int64(10 * time.Second)))
	} else if d == 60 {
		w.now += time.Duration(w.r.Int64N(int64(70 * time.Minute)))
	}
	var alive []*life
	for _, l := range w.lives {
		if !l.dead {
			alive = append(alive, l)
		}
	}
	if len(alive) < 1 || len(alive) < 4 && w.r.IntN(30) == 0 {
		w.begin()
		return
	}
	l := alive[w.r.IntN(len(alive))]
	boot := l.boot(w.now)
	switch w.r.IntN(12) {
	case 0, 1, 2, 3: // follow the log
		for upTo := l.pos + w.r.IntN(len(w.rows)-l.pos+1); l.pos < upTo; l.pos++ {
			row := w.rows[l.pos]
			l.fold(&row, boot, true)
		}
	case 4, 5, 6, 7: // try to live
		if l.beat == 0 {
			v := l.judge(l.stored(w), l.place, boot)
			if v.err != nil {
				w.say("%s is refused: %s", l.name, fault.ReasonOf(v.err))
				l.dead = true
				return
			}
			if v.until > boot {
				return
			}
		}
		row, err := l.next(l.stored(w), registry.Server{Place: l.place}, noon().Add(w.now), boot)
		if err != nil {
			w.say("%s writes nothing: %s", l.name, fault.ReasonOf(err))
			l.dead = fault.ReasonOf(err) == "server_id_in_use"
			return
		}
		l.sent = append(l.sent, sent{row, l.pos})
	case 8, 9, 10: // something arrives at the store, in any order, or is lost
		if len(l.sent) == 0 {
			return
		}
		i := w.r.IntN(len(l.sent))
		s := l.sent[i]
		l.sent = append(l.sent[:i:i], l.sent[i+1:]...)
		if w.r.IntN(5) > 0 && s.when == len(w.rows) {
			w.rows = append(w.rows, s.row)
			w.say("%s has written beat %d (stopped: %v)", l.name, s.row.Beat, s.row.Stopped)
		}
	case 11:
		switch w.r.IntN(20) {
		case 0:
			l.dead = true // what it has sent may arrive still
			w.say("%s dies", l.name)
		case 1:
			l.stopped = true
			w.say("%s stops", l.name)
		}
	}
}

// Whatever is late, lost or dead, and however fast clocks run: of the processes
// with one identity one signs at most (R68), and in the end one can.
func TestModel(t *testing.T) {
	first, last := uint64(1), uint64(*seeds)
	if *oneSeed != 0 {
		first, last = *oneSeed, *oneSeed
	}
	signed := 0
	for seed := first; seed <= last; seed++ {
		w := &world{r: rand.New(rand.NewPCG(seed, 0))}
		for range 2000 {
			w.step()
			var who []string
			for _, l := range w.lives {
				if !l.dead && l.maySign(noon().Add(w.now), l.boot(w.now)) == nil {
					who = append(who, l.name)
				}
			}
			signed += len(who)
			if len(who) > 1 {
				t.Fatalf("seed %d: %v may sign at once\n%s", seed, who, trace(w))
			}
		}
		if *oneSeed != 0 {
			t.Log(trace(w))
		}
	}
	if share := float64(signed) / float64(2000*(last-first+1)); share < 0.3 {
		t.Errorf("somebody could sign for %.2f of the time only", share)
	}
}

func trace(w *world) (out string) {
	for _, line := range w.trace[max(0, len(w.trace)-60):] {
		out += line + "\n"
	}
	return out
}
