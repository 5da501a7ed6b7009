package workloadapi

import (
	"maps"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/reason"
)

// A user may take so many seconds' worth at once.
const (
	rateBurst  = 2
	bytesBurst = 4
)

// Limits bound what one user may take (R49). A zero field means its default,
// which no ordinary machine comes near.
type Limits struct {
	ConnectionsPerUser int     // default 1,000
	Connections        int     // of all users; default 10,000, and no more than the agent has descriptors for
	CallsPerUser       int     // under way, open streams included; default 4,000
	RatePerUser        float64 // connections opened and requests made per second; default 5,000, in bursts of twice that
	BytesPerUser       float64 // received and sent per second; default 64 MiB, in bursts of four times that
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
	if l.BytesPerUser <= 0 {
		l.BytesPerUser = 64 << 20
	}
	if room := process.Room(); room > 0 {
		l.Connections = min(l.Connections, room)
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
	calls       int
	refused     map[string]uint64 // by the limit
	byUID       map[int64]*user
}

type user struct {
	connections, calls int
	rate, bytes        bucket
}

// bucket is filled by so much a second, up to its size. Bytes may take it below
// zero, since they are counted when they have come or gone.
type bucket struct {
	left   float64
	filled time.Time
}

func (b *bucket) fill(perSecond, size float64, now time.Time) {
	b.left = min(size, b.left+max(0, now.Sub(b.filled).Seconds())*perSecond)
	b.filled = now
}

func newUsers(l Limits) *users {
	return &users{
		limits: l, byUID: map[int64]*user{},
		refused: map[string]uint64{"connections": 0, "calls": 0, "rate": 0, "bytes": 0}, // all are shown
	}
}

func (u *users) connect(uid int64) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.connections >= u.limits.Connections {
		return u.tooManyLocked("connections", "the agent has no room for more connections")
	}
	who := u.userLocked(uid)
	if who.connections >= u.limits.ConnectionsPerUser {
		return u.tooManyLocked("connections", "this user has too many connections open")
	}
	if err := u.takeLocked(who); err != nil {
		return err
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
	who := u.userLocked(uid)
	if who.calls >= u.limits.CallsPerUser {
		return u.tooManyLocked("calls", "this user has too many calls under way")
	}
	if err := u.takeLocked(who); err != nil {
		return err
	}
	u.calls++
	who.calls++
	return nil
}

// goOn counts one more request of a call.
func (u *users) goOn(uid int64) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.takeLocked(u.userLocked(uid))
}

func (u *users) takeLocked(who *user) error {
	now := time.Now()
	who.rate.fill(u.limits.RatePerUser, rateBurst*u.limits.RatePerUser, now)
	who.bytes.fill(u.limits.BytesPerUser, bytesBurst*u.limits.BytesPerUser, now)
	switch {
	case who.rate.left < 1:
		return u.tooManyLocked("rate", "this user calls too often")
	case who.bytes.left < 0:
		return u.tooManyLocked("bytes", "this user sends or is sent too much")
	}
	who.rate.left--
	return nil
}

func (u *users) end(uid int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.calls--
	u.userLocked(uid).calls--
}

// moved counts bytes of a connection. A user who is a whole burst in debt has its
// connection closed: it sends without calling.
func (u *users) moved(uid int64, n int) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	who := u.userLocked(uid)
	if who.bytes.left -= float64(n); who.bytes.left > -bytesBurst*u.limits.BytesPerUser {
		return nil
	}
	who.bytes.fill(u.limits.BytesPerUser, bytesBurst*u.limits.BytesPerUser, time.Now())
	if who.bytes.left > -bytesBurst*u.limits.BytesPerUser {
		return nil
	}
	return u.tooManyLocked("bytes", "this user sends or is sent too much")
}

// userLocked returns the counts of a user. The table is bounded: users without
// anything under way are forgotten when there are too many.
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
	now := time.Now()
	who = &user{rate: bucket{rateBurst * u.limits.RatePerUser, now}, bytes: bucket{bytesBurst * u.limits.BytesPerUser, now}}
	u.byUID[uid] = who
	return who
}

func (u *users) tooManyLocked(what, message string) error {
	u.refused[what]++
	return reason.Say(reason.RateLimited, "%s", message)
}

// Stats is what the socket has under way, and what has happened since the start.
type Stats struct {
	Connections, Calls int               // now; open streams are calls
	OverLimit          map[string]uint64 // by the limit: connections, calls, rate or bytes
	Refusals           map[string]uint64 // of calls, by reason
	SlowReaders        uint64            // connections closed because nobody read
	Attested           uint64            // times that the attestors were asked what a process is
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	u := s.users
	u.mu.Lock()
	defer u.mu.Unlock()
	return Stats{
		Connections: u.connections, Calls: u.calls, OverLimit: maps.Clone(u.refused), Refusals: s.refusals.reasons(),
		SlowReaders: s.slow.Load(), Attested: s.attested.Load(),
	}
}
