package workloadapi

import (
	"sync"
	"time"

	"github.com/plastron/plastron/internal/reason"
)

// Limits bound what one user may take (R49). A zero field means its default,
// which no ordinary machine comes near.
type Limits struct {
	ConnectionsPerUser int     // default 1,000
	Connections        int     // of all users; default 10,000
	CallsPerUser       int     // under way, open streams included; default 4,000
	RatePerUser        float64 // calls begun per second; default 5,000, in bursts of twice that
}

func (l Limits) orDefault() Limits {
	set := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	set(&l.ConnectionsPerUser, 1000)
	set(&l.Connections, 10000)
	set(&l.CallsPerUser, 4000)
	if l.RatePerUser <= 0 {
		l.RatePerUser = 5000
	}
	return l
}

// noUser stands for callers that the kernel does not name.
const noUser = -1

// maxUsers is how many users are remembered before idle ones are forgotten.
const maxUsers = 4096

// users counts what each user has under way.
type users struct {
	limits Limits

	mu          sync.Mutex // guards everything below
	connections int
	byUID       map[int64]*user
}

type user struct {
	connections, calls int
	tokens             float64
	filled             time.Time
}

func newUsers(l Limits) *users { return &users{limits: l, byUID: map[int64]*user{}} }

func (u *users) connect(uid int64) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.connections >= u.limits.Connections {
		return tooMany("the agent has no room for more connections")
	}
	who := u.userLocked(uid)
	if who.connections >= u.limits.ConnectionsPerUser {
		return tooMany("this user has too many connections open")
	}
	u.connections++
	who.connections++
	return nil
}

func (u *users) disconnect(uid int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.connections--
	u.userLocked(uid).connections--
}

func (u *users) begin(uid int64) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	who, now := u.userLocked(uid), time.Now()
	burst := 2 * u.limits.RatePerUser
	who.tokens = min(burst, who.tokens+now.Sub(who.filled).Seconds()*u.limits.RatePerUser)
	who.filled = now
	switch {
	case who.calls >= u.limits.CallsPerUser:
		return tooMany("this user has too many calls under way")
	case who.tokens < 1:
		return tooMany("this user calls too often")
	}
	who.tokens--
	who.calls++
	return nil
}

func (u *users) end(uid int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.userLocked(uid).calls--
}

// userLocked returns the counts of a user. The table is bounded: a user without
// anything under way is forgotten when there are too many.
func (u *users) userLocked(uid int64) *user {
	who := u.byUID[uid]
	if who != nil {
		return who
	}
	if len(u.byUID) >= maxUsers {
		for id, other := range u.byUID {
			if other.connections == 0 && other.calls == 0 {
				delete(u.byUID, id)
			}
		}
	}
	who = &user{tokens: 2 * u.limits.RatePerUser, filled: time.Now()}
	u.byUID[uid] = who
	return who
}

func tooMany(message string) error { return reason.Say(reason.RateLimited, "%s", message) }

// quiet lets lines that callers cause through once a second and counts the rest (R104).
type quiet struct {
	mu         sync.Mutex // guards everything below
	last       time.Time
	suppressed int
}

// due returns how many events a line written now stands for; 0: write none.
func (q *quiet) due() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	if q.suppressed++; now.Sub(q.last) < time.Second {
		return 0
	}
	n := q.suppressed
	q.last, q.suppressed = now, 0
	return n
}

// Bounds on what is remembered of refusals.
const (
	refusalEvery = 10 * time.Minute
	maxRefusals  = 1024
)

// refusals sees to it that each distinct refusal is logged once, and again now
// and then for as long as it goes on, with how often it happened (R104).
type refusals struct {
	mu   sync.Mutex // guards seen
	seen map[refusal]*tally
}

// refusal is what makes one distinct: who is refused, and why.
type refusal struct {
	uid    int64
	reason string
}

type tally struct {
	count  int // since it was last logged
	logged time.Time
}

// due returns how many refusals a line written now stands for; 0: write none.
func (r *refusals) due(what refusal, now time.Time) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.seen[what]
	if t == nil {
		if len(r.seen) >= maxRefusals {
			r.seen = map[refusal]*tally{}
		}
		t = &tally{}
		r.seen[what] = t
	}
	if t.count++; !t.logged.IsZero() && now.Sub(t.logged) < refusalEvery {
		return 0
	}
	n := t.count
	t.count, t.logged = 0, now
	return n
}
