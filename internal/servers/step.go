package servers

import (
	"bytes"
	"cmp"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
)

const (
	// BeatEvery is how often a server says that it lives, if others could ask.
	BeatEvery = 10 * time.Second
	// StaleAfter is how long a server grants new things without having seen its
	// own beat come back from the store (R77).
	StaleAfter = time.Minute
	// MinLease is the shortest lease: a server goes on for as long as it counts as fresh.
	MinLease = StaleAfter

	pokeEvery   = time.Second // the least time between beats that were asked for
	liveFor     = 3*BeatEvery + 5*time.Second
	maxLease    = 366 * 24 * time.Hour // of others, whatever their row says
	maxSkew     = 30 * time.Second     // of the own clock, to sign (R108)
	maxSkewHere = 5 * time.Second      // to remove what others left (R70)
	maxSamples  = 3
	healEvery   = time.Minute
	maxDelay    = 2 * BeatEvery // of a beat whose clock counts
	maxAttempts = 4096
	hearFirst   = BeatEvery + 2*time.Second // for the first of the others to be heard after the start
	hearMore    = time.Second               // for the rest of them after the first
)

// settings are what does not change while a server runs.
type settings struct {
	id       string
	shared   bool // others can use the store at the same time
	lease    time.Duration
	instance []byte
	began    time.Duration // when the instance began, on the boot clock
}

// machine is everything that the decisions follow from. All of its times that
// are durations are of the boot clock.
type machine struct {
	settings
	former   *sighting // of the row as it was before this life took it
	waits    bool      // for the lease of that
	first    uint64    // the beat with which this life takes or took the row
	attempts []attempt // own beats that may still come back, oldest first
	beat     uint64    // the newest own beat that came back; 0: none yet
	from     time.Duration
	stopped  bool
	rival    *registry.Server // what took the row from this life
	peers    map[string]*sighting
	heard    bool                          // that the others live
	hearBy   time.Duration                 // till then the start waits for them
	expelled *registry.Expulsion           // of this server
	outcasts map[string]registry.Expulsion // of others
	past     past
	healed   time.Duration // when the state was last loaded afresh because of others; 0: never

	// What Run does next.
	asks     uint64        // how often the others were asked for a beat
	poked    bool          // a beat is wanted soon
	begunAt  time.Duration // when a beat was last tried
	failures int           // since the last that went well
	looked   time.Duration // when it was last looked for what vanished servers left
	evictAt  time.Duration // when outcasts are to be looked at; 0: not
}

// attempt is an own beat that was sent.
type attempt struct {
	beat  uint64
	at    time.Time // as the row says it
	begun time.Duration
}

// sighting is the row of another instance.
type sighting struct {
	row      registry.Server
	seen     time.Duration // when this beat was first seen
	zeroes   []time.Time   // what the writer's clock said when the boot clock stood at 0, or less
	compared bool          // its digest with the own one at the same position
	differs  bool          // they were not the same
	told     bool          // that they are not
}

func newMachine(s settings) *machine {
	return &machine{settings: s, peers: map[string]*sighting{}, outcasts: map[string]registry.Expulsion{}}
}

// verdict says what to do about the row that was found at the start.
type verdict struct {
	until time.Duration // wait till then, unless the row changes; 0: take it
	err   error         // somebody else lives there
}

// judge decides at the start whether the identity is free. row is nil if there
// is none; place is where this life keeps its identity, locked.
func (m *machine) judge(row *registry.Server, place registry.Place, boot time.Duration) verdict {
	was := m.former
	m.waits = false
	if row == nil {
		m.former = nil
		return verdict{}
	}
	moved := was != nil && (was.row.Beat != row.Beat || !bytes.Equal(was.row.Instance, row.Instance))
	if was == nil || moved {
		m.former = &sighting{row: *row, seen: boot}
	}
	switch {
	case len(row.Instance) == 0, row.Stopped, !m.shared, row.Place.Same(place):
		return verdict{}
	case moved:
		return verdict{err: inUse(fault.Precondition, row, place)}
	}
	if until := m.former.ends(); boot < until {
		m.waits = true
		return verdict{until: until}
	}
	return verdict{}
}

// ends is when what was seen may surely sign no more. Clocks of machines run at
// slightly different speeds.
func (s *sighting) ends() time.Duration {
	lease := min(max(s.row.Lease, 0), maxLease)
	return s.seen + lease + lease/500 + time.Second
}

func inUse(kind fault.Kind, row *registry.Server, place registry.Place) *fault.Error {
	return fault.New(kind, "server_id_in_use", "the identity of this server, %s, is in use by another process: on host %q, in %s, since %s",
		row.ID, row.Place.Host, row.Place.DataDir, row.StartedAt.UTC().Format(time.RFC3339)).
		Fix("if %s is a copy of that directory, give this server a new data_dir, or remove server-id and keys.json in it and move audit.log elsewhere: then it starts as a new server", place.DataDir)
}

// next makes the row of the next beat out of the stored one (nil: none) and of
// what the server has to say. It refuses what would overwrite another life.
func (m *machine) next(stored *registry.Server, say registry.Server, now time.Time, boot time.Duration) (registry.Server, error) {
	if err := m.check(stored); err != nil {
		return registry.Server{}, err
	}
	last := m.beat
	if stored != nil {
		last = max(last, stored.Beat)
	}
	row := say
	row.ID, row.Instance, row.Beat, row.BeatAt = m.id, m.instance, last+1, now.UTC().Truncate(time.Millisecond)
	row.Up, row.Stopped = boot-m.began, m.stopped
	if row.Lease = 0; m.shared {
		row.Lease = m.lease
	}
	if m.beat == 0 {
		m.first = row.Beat
	}
	m.attempts = append(m.attempts, attempt{row.Beat, row.BeatAt, boot})
	if extra := len(m.attempts) - maxAttempts; extra > 0 {
		m.attempts = slices.Delete(m.attempts, 0, extra)
	}
	return row, nil
}

// errMoved says that the row is not the one that was judged.
func errMoved() error {
	return fault.New(fault.Conflict, "server_row_moved", "the row of this server changed meanwhile")
}

// check says whether the stored row may be overwritten.
func (m *machine) check(stored *registry.Server) error {
	if m.expelled != nil {
		return m.expelled.Fault()
	}
	if m.rival != nil {
		return m.fenced()
	}
	switch {
	case m.beat == 0: // what judge allowed is to follow on the row that it saw
		same := stored == nil && m.former == nil ||
			stored != nil && m.former != nil && stored.Beat == m.former.row.Beat && bytes.Equal(stored.Instance, m.former.row.Instance)
		if !same && (stored == nil || m.attempt(stored) < 0) {
			return errMoved()
		}
	case stored != nil && m.foreign(stored):
		m.rival = stored
		return m.fenced()
	}
	return nil
}

// attempt returns the index of the attempt that a row is, or -1.
func (m *machine) attempt(row *registry.Server) int {
	if !bytes.Equal(row.Instance, m.instance) {
		return -1
	}
	return slices.IndexFunc(m.attempts, func(a attempt) bool { return a.beat == row.Beat && a.at.Equal(row.BeatAt) })
}

// foreign reports whether a row in the place of the own one was written by
// somebody else after this life began. One that is older than this life, or than
// its newest beat, comes with a store that was put back to an earlier state.
func (m *machine) foreign(row *registry.Server) bool {
	if !bytes.Equal(row.Instance, m.instance) {
		return row.Beat >= m.first
	}
	// The own instance: a copy of this very process, as of a virtual machine that
	// was copied while it ran, unless it is a beat that was sent from here.
	return row.Beat > m.beat && m.attempt(row) < 0
}

func (m *machine) fenced() error {
	return fault.New(fault.Unavailable, "server_id_in_use", "another process has taken over the identity of this server, %s: on host %q, in %s, since %s",
		m.id, m.rival.Place.Host, m.rival.Place.DataDir, m.rival.StartedAt.UTC().Format(time.RFC3339)).
		Fix("if data_dir was copied, give one of the two a new data_dir, or remove server-id and keys.json in it and move audit.log elsewhere: then it starts as a new server")
}

// fold takes note of a row that came through the log (live) or with a state that
// was loaded. Who has just started is answered with a beat, so that it learns
// what the time is, and so is who asks for one.
func (m *machine) fold(row *registry.Server, boot time.Duration, live bool) {
	if row.ID == m.id {
		m.foldOwn(row)
		return
	}
	if m.outcast(row.ID) {
		m.evictAt = boot // it has no business here
		return
	}
	p := m.peers[row.ID]
	fresh := p == nil || !bytes.Equal(p.row.Instance, row.Instance)
	if !fresh && p.row.Beat == row.Beat {
		return
	}
	if fresh {
		p = &sighting{}
		m.peers[row.ID] = p
	}
	asks := live && (fresh || row.Asks != p.row.Asks)
	p.row, p.seen = *row, boot
	// What comes now was written after the own beat that came last, so it cannot
	// have been under way for longer than that is ago.
	if live && m.beat > 0 && m.fresh(boot) <= maxDelay {
		p.zeroes = append(p.zeroes, row.BeatAt.Add(-boot))
		p.zeroes = p.zeroes[max(0, len(p.zeroes)-maxSamples):]
		if !m.heard {
			m.heard, m.hearBy = true, min(m.hearBy, boot+hearMore)
		}
	}
	if digest, known := m.past.digest(row.Position); known {
		p.compared, p.differs = true, digest != row.Digest
		p.told = p.told && p.differs
	}
	m.poked = m.poked || asks && !row.Stopped
}

func (m *machine) foldOwn(row *registry.Server) {
	i := m.attempt(row)
	switch {
	case m.rival != nil:
	case i >= 0:
		a := m.attempts[i]
		if m.beat == 0 {
			m.hearBy = a.begun + hearFirst
		}
		m.beat, m.from = a.beat, a.begun
		m.attempts = slices.DeleteFunc(m.attempts, func(other attempt) bool { return other.beat <= a.beat })
	case m.beat > 0 && m.foreign(row):
		m.rival = row
	}
}

// forget takes note of a row that is gone. The own one is simply written again.
func (m *machine) forget(id string) { delete(m.peers, id) }

// fresh is how long ago the view of the trust domain was surely complete.
func (m *machine) fresh(boot time.Duration) time.Duration {
	if !m.shared || m.beat == 0 {
		return 0
	}
	return boot - m.from
}

// leaseLeft is for how long this server may still sign; it is never 0 or less
// with a store that one process holds.
func (m *machine) leaseLeft(boot time.Duration) time.Duration {
	if !m.shared {
		return maxLease
	}
	if m.beat == 0 {
		return 0
	}
	return m.lease - (boot - m.from)
}

// maySign says why this server may not sign, or nil.
func (m *machine) maySign(now time.Time, boot time.Duration) error {
	switch {
	case m.expelled != nil:
		return m.expelled.Fault()
	case m.rival != nil:
		return m.fenced()
	case m.stopped:
		return fault.New(fault.Unavailable, "server_stopping", "the server is shutting down")
	case m.waits:
		return m.waiting(boot)
	case m.leaseLeft(boot) <= 0 && m.beat == 0:
		return fault.New(fault.Unavailable, "server_starting", "the server is starting")
	case m.leaseLeft(boot) <= 0:
		return fault.New(fault.Unavailable, "lease_ended", "this server has not reached its store for %s, so its right to sign has ended", (boot - m.from).Round(time.Second)).
			Fix("see to the store and to the network between; the right comes back with the store")
	}
	return m.checkClock(now, boot, maxSkew)
}

// waiting is what is said while the lease of a former life runs out.
func (m *machine) waiting(boot time.Duration) *fault.Error {
	row := &m.former.row
	return fault.New(fault.Unavailable, "lease_of_former_life", "a former life of this server (on host %q, in %s) may sign for %s more, so this one signs nothing until then",
		row.Place.Host, row.Place.DataDir, max(0, m.former.ends()-boot).Round(time.Second)).
		Fix("wait; a server that is stopped in order hands over at once, and so does one that is started again on the same machine without a reboot")
}

// stale says that this server may not see what others change, or nil.
func (m *machine) stale(boot time.Duration) error {
	if age := m.fresh(boot); age > StaleAfter {
		return fault.New(fault.Unavailable, "state_stale", "this server has not seen a change come back from its store for %s, so it grants nothing that it has not granted before", age.Round(time.Second)).
			Fix("see to the store and to the network between; another server of the trust domain may have what is missing here")
	}
	return nil
}

// reading is the own clock against those of the others.
type reading struct {
	own   time.Time
	ahead time.Duration // of the right time
	by    string        // the server whose clock is taken for right
}

func (r reading) err(most time.Duration) error {
	if r.ahead.Abs() <= most {
		return nil
	}
	return fault.New(fault.Unavailable, "clock_off", "this machine's clock says %s, but by that of server %s it is %s",
		r.own.UTC().Format(time.RFC3339), r.by, r.own.Add(-r.ahead).UTC().Format(time.RFC3339)).
		Fix("set this machine's clock and keep it set (NTP); if it is right, the others' are wrong")
}

// checkClock says that the own clock is off by more than a time, or nil.
func (m *machine) checkClock(now time.Time, boot, most time.Duration) error {
	zero := now.Add(-boot)
	for _, p := range m.peers {
		if m.alive(p, boot) && len(p.zeroes) > 0 && p.zero().Sub(zero).Abs() > most {
			return m.clock(now, boot).err(most)
		}
	}
	return nil // whichever clock is right, it is not further away
}

// zero is what the writer's clock said when the boot clock stood at 0, at least.
func (p *sighting) zero() time.Time { return slices.MaxFunc(p.zeroes, time.Time.Compare) }

// clock compares the clocks of all live servers.
func (m *machine) clock(now time.Time, boot time.Duration) reading {
	type clock struct {
		id     string
		offset time.Duration // to the own clock
		up     time.Duration
	}
	zero := now.Add(-boot)
	clocks := []clock{{m.id, 0, boot - m.began}}
	for id, p := range m.peers {
		if m.alive(p, boot) && len(p.zeroes) > 0 {
			clocks = append(clocks, clock{id, p.zero().Sub(zero), p.row.Up + boot - p.seen})
		}
	}
	slices.SortFunc(clocks, func(a, b clock) int { return cmp.Or(cmp.Compare(a.offset, b.offset), cmp.Compare(a.id, b.id)) })
	right := clocks[len(clocks)/2]
	if len(clocks)%2 == 0 {
		if other := clocks[len(clocks)/2-1]; other.up > right.up || other.up == right.up && other.id < right.id {
			right = other
		}
	}
	return reading{own: now, ahead: -right.offset, by: right.id}
}

// alive reports whether another server was heard lately.
func (m *machine) alive(p *sighting, boot time.Duration) bool {
	return m.shared && !p.row.Stopped && boot-p.seen <= liveFor
}

// Other is what this server knows of another.
type Other struct {
	Row      registry.Server
	Live     bool          // it was heard lately, and did not stop
	Silent   time.Duration // since its beat was first seen here
	Clock    bool          // its clock is known
	Ahead    time.Duration // its clock less the own one
	Compared bool          // with this server, at the same position
	Diverged bool          // there it held something else
}

func (m *machine) others(now time.Time, boot time.Duration) []Other {
	var out []Other
	for _, p := range m.peers {
		o := Other{Row: p.row, Live: m.alive(p, boot), Silent: boot - p.seen, Compared: p.compared, Diverged: p.differs}
		if o.Clock = len(p.zeroes) > 0; o.Clock {
			o.Ahead = p.zero().Sub(now.Add(-boot))
		}
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b Other) int { return cmp.Compare(a.Row.ID, b.Row.ID) })
	return out
}

// hearing is for how long to wait for the other servers' clocks before the own
// one is trusted: they answer to a start with a beat.
func (m *machine) hearing(boot time.Duration) time.Duration {
	if !m.shared {
		return 0
	}
	silent := false
	for _, p := range m.peers {
		silent = silent || !p.row.Stopped && len(p.zeroes) == 0
	}
	if !silent {
		return 0
	}
	return max(0, m.hearBy-boot)
}

// act is what Run is to do.
type act int

const (
	rest act = iota
	write
	clear
	evict
)

// due says what is to be done now, or for how long there is nothing.
func (m *machine) due(boot time.Duration) (act, time.Duration) {
	next := m.looked + pruneEvery
	what := clear
	sooner := func(at time.Duration) {
		if at < next {
			what, next = write, at
		}
	}
	if m.shared {
		sooner(m.begunAt + BeatEvery)
	}
	if m.poked && m.failures == 0 {
		sooner(m.begunAt + pokeEvery)
	}
	if m.failures > 0 {
		sooner(m.begunAt + min(pokeEvery<<min(m.failures-1, 8), BeatEvery))
	}
	if m.evictAt != 0 && m.evictAt <= next {
		what, next = evict, m.evictAt
	}
	if boot < next {
		return rest, next - boot
	}
	return what, 0
}

// try takes note that a beat is about to be written.
func (m *machine) try(boot time.Duration) { m.begunAt, m.poked = boot, false }

// tried takes note of how that went. What surely was not written will not come back.
func (m *machine) tried(err error) {
	switch reason := fault.ReasonOf(err); {
	case err == nil, reason == "committed_not_visible":
		m.failures = 0
		return
	case reason != "outcome_unknown":
		m.attempts = slices.DeleteFunc(m.attempts, func(a attempt) bool { return a.begun >= m.begunAt })
	}
	m.failures++
}
