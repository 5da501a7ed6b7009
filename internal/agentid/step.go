package agentid

import (
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// Machine is the whole state. It is not safe for concurrent use.
type Machine struct {
	Settings

	now  time.Time     // of the last step
	boot time.Duration // of the last step
	seed uint64
	fx   *Effects // of the step under way

	own      *Own          // in use, or kept for a better clock; nil: none yet
	trusted  bool          // roots are held
	asked    bool          // the configured source was asked, and no server has been tried since
	askedAt  time.Duration // boot clock
	refused  error         // the server's word against own
	standing Standing      // of own's authority
	held     bool          // there was an SVID in this life: failures are waited out
	again    bool          // the server wants a new attestation

	renewAt   time.Time     // by the wall clock
	renewBoot time.Duration // by the boot clock; 0: only the wall clock counts
	endBoot   time.Duration // boot clock: when own ends, as it looked when it was adopted
	foreign   time.Duration // boot clock: since when what answers is not ours; 0: it is
	job       Kind          // under way
	failures  int           // of Bootstrap, Attest and Renew, in a row
	notBefore time.Duration // boot clock: none of these before
	hinted    bool          // it is the server that said so
	ousted    int           // refusals in a row of SVIDs that were quite new
	ownSince  time.Duration // boot clock: when own was adopted
	unsaved   bool
	unsaveds  int           // failed Saves in a row
	saveAt    time.Duration // boot clock

	redialAt   time.Duration // boot clock; 0: not asked for
	redialTo   string
	stop       error
	stopForget bool
}

// NewMachine returns a machine with what an earlier life has stored.
func NewMachine(s Settings, own *Own, trusted bool) *Machine {
	if s.RebootstrapDelay <= 0 {
		s.RebootstrapDelay = DefaultRebootstrapDelay
	}
	return &Machine{Settings: s, own: own, trusted: trusted}
}

// Step takes what happened and returns what to do.
func (m *Machine) Step(e Event) Effects {
	first := m.now.IsZero()
	m.now, m.boot, m.seed = e.Now, e.Boot, e.Seed
	fx := Effects{}
	m.fx = &fx
	if first && m.own != nil {
		m.held = true
		m.schedule()
	}
	switch what := e.What.(type) {
	case Slept:
		m.failures, m.notBefore, m.saveAt = 0, 0, 0
		fx.Redial = true // the connection is most likely dead, and silence would tell only in a minute or more
	case Done:
		m.job = None
		m.done(what)
	case Ended:
		if foreign(what.Err) && m.foreign == 0 {
			m.foreign = max(m.boot, 1)
		}
		if m.asked && m.boot-m.askedAt >= m.RebootstrapDelay {
			m.asked = false // what the source gave then was of no use, perhaps now
		}
		if m.own != nil && what.Serial == m.own.Serial {
			m.refuse(what.Err)
		}
	case Accepted:
		m.foreign, m.asked = 0, false
		if !m.hinted { // what failed because no server was there need not wait any more
			m.failures, m.notBefore = 0, 0
		}
	case BundleChanged:
		m.trusted, m.unsaved = true, true
		if m.standing = what.Authority; m.standing != Held && m.own != nil {
			m.renewWithin(soon)
		}
	case Renewal:
		m.renewWithin(clamp(what.Within))
	case Reattestation:
		if m.own != nil {
			m.note(false, "the server asks for a new attestation", nil)
			m.again = true
		}
	case Reconnection:
		m.redialAt, m.redialTo = m.boot+m.spread(0, clamp(what.Within), 1)+1, what.Address
	}
	m.decide()
	return fx
}

// decide finds what to do now, and when to look again.
func (m *Machine) decide() {
	fx := m.fx
	if m.redialAt != 0 && m.boot >= m.redialAt {
		fx.Redial, fx.Address = true, m.redialTo
		m.redialAt, m.redialTo = 0, ""
	}
	if m.stop != nil {
		fx.Stop, fx.Forget = m.stop, m.stopForget
		return
	}
	if m.job == None {
		fx.Job = m.choose()
		m.job = fx.Job.Kind
	}
	fx.Wait = m.wait()
}

// choose is the table of what an agent does, from what is worst to what can wait.
func (m *Machine) choose() Job {
	ready := m.boot >= m.notBefore
	switch {
	case ready && !m.trusted, ready && m.mayAsk():
		return Job{Kind: Bootstrap}
	case ready && (m.ended() || m.again):
		// An SVID that only our clock says is over is one that a server may still accept.
		return Job{Kind: Attest, NewKey: m.refused != nil && m.failures == 0, Probe: m.own != nil && m.refused == nil, Volatile: m.own != nil}
	case ready && m.own != nil && m.due():
		return Job{Kind: Renew, Volatile: m.remaining() < m.life()/4}
	case m.unsaved && m.own != nil && m.boot >= m.saveAt:
		m.unsaved = false
		return Job{Kind: Save}
	}
	return Job{}
}

// mayAsk reports whether the configured source is to be asked for other roots
// than those that the agent has learnt.
func (m *Machine) mayAsk() bool {
	if m.foreign == 0 || m.asked || !m.Source || m.Rebootstrap == Never {
		return false
	}
	return m.ended() || m.due() || m.boot-m.foreign >= m.RebootstrapDelay
}

// done takes the outcome of a job.
func (m *Machine) done(d Done) {
	if d.Err != nil {
		m.failed(d.Kind, d.Err)
		return
	}
	switch d.Kind {
	case Bootstrap:
		m.trusted, m.unsaved, m.notBefore = true, true, 0
		m.asked, m.askedAt = true, m.boot
		m.fx.Redial = true // every connection is judged by the new roots
	case Save:
		m.unsaveds = 0
	case Attest, Renew:
		m.own, m.held, m.refused, m.again, m.standing = d.Own, true, nil, false, Held
		m.ownSince, m.foreign, m.asked, m.failures, m.notBefore = m.boot, 0, false, 0, 0
		m.schedule()
		m.fx.Redial = true // so that the new SVID is the one in use
		message := "own SVID renewed"
		if d.Kind == Attest {
			message = "own SVID obtained"
		}
		m.fx.Notes = append(m.fx.Notes, Note{Message: message, Next: m.untilRenewal()})
	}
}

// failed decides what a failure means.
func (m *Machine) failed(kind Kind, err error) {
	if kind == Save {
		m.unsaved = true
		m.unsaveds++
		m.saveAt = m.boot + m.backoff(m.unsaveds, attestFloor, attestCeiling)
		if m.unsaveds == 1 {
			m.note(true, "the bundle was not stored, the agent goes on with what it holds in memory", err)
		}
		return
	}
	if foreign(err) && m.foreign == 0 {
		m.foreign = max(m.boot, 1)
	}
	switch {
	case fault.ReasonOf(err) == ReasonBanned:
		m.refuse(err)
		return
	case kind == Renew && Lost(err):
		m.refuse(err)
		return
	case kind == Attest && m.refusedForGood(err):
		m.end(err)
		return
	case kind == Bootstrap && !m.trusted && !passing(err):
		m.stop = err
		return
	}
	if m.standing == Gone && m.refused == nil && m.own != nil && m.failures >= 2 {
		// A server that does not know the authority any more breaks off the
		// connection before it can say so.
		m.refuse(fault.New(fault.Denied, ReasonGone, "the authority of the agent's SVID is not in the bundle any more").Because(err))
	}
	m.failures++
	if kind == Bootstrap && m.trusted {
		m.asked, m.askedAt = m.ended() || m.due(), m.boot // if there is something to try first, it is with what is held
	} else if foreign(err) {
		m.asked = false
	}
	floor, ceiling := attestFloor, attestCeiling
	if kind == Renew {
		floor, ceiling = renewFloor, renewCeiling
	}
	wait := m.backoff(m.failures, floor, ceiling)
	if kind == Renew { // several attempts are to fit into what is left
		wait = max(min(wait, m.remaining()/8), floor)
	}
	hint := fault.AfterOf(err)
	m.hinted = hint > 0
	wait = max(wait, hint)
	m.notBefore = m.boot + wait
	m.fx.Notes = append(m.fx.Notes, Note{Message: sentence(kind), Warn: true, Err: err, Next: wait})
}

// refusedForGood reports whether an attestation that failed so is not tried again.
func (m *Machine) refusedForGood(err error) bool {
	switch {
	case passing(err):
		return false
	case foreign(err):
		// At a first start someone is there to read it. Later it may be an impostor, a
		// wrong clock or a restored server, and all of these can end.
		return !m.held && !m.mayAskAfter()
	}
	// While the SVID in use is good, evidence that is refused may be mended; and if
	// it is over by the wall clock alone, so may that (R107).
	return m.ended() && (m.own == nil || m.refused != nil || m.boot >= m.endBoot)
}

// mayAskAfter reports whether the configured source is still to be asked, after a
// server that is not ours.
func (m *Machine) mayAskAfter() bool {
	return m.Source && !m.asked && m.Rebootstrap != Never
}

// refuse takes a server's word against the SVID in use.
func (m *Machine) refuse(err error) {
	if fault.ReasonOf(err) == ReasonBanned {
		// A ban ends the credential: it must not come back with the next start.
		m.stop, m.stopForget = stopped(err, "ask the operator of the server why this node is banned"), true
		return
	}
	if m.refused != nil || !Lost(err) && fault.ReasonOf(err) != ReasonGone {
		return
	}
	m.refused, m.failures = err, 0
	m.note(true, "the server does not accept the agent's SVID, attesting again", err)
	// If another node proves to be this one, each takes the other's place, and not
	// at full speed.
	if m.boot-m.ownSince > 2*attestCeiling || m.own.Stored {
		m.ousted = 0
	}
	if m.ousted++; m.ousted > 1 {
		m.notBefore = m.boot + m.backoff(m.ousted-1, attestFloor, attestCeiling)
	} else {
		m.notBefore = 0
	}
}

// end stops an agent whose attestation was refused.
func (m *Machine) end(err error) {
	if !m.held {
		m.stop = err
		return
	}
	why := err
	if m.refused != nil {
		why = fault.New(fault.KindOf(m.refused), fault.ReasonOf(m.refused), "%v", m.refused).Because(err)
	}
	m.stop = stopped(why, m.Remedy)
}

// Lost reports whether the server says that the agent's own credential is no
// longer good.
func Lost(err error) bool {
	switch fault.ReasonOf(err) {
	case ReasonExpired, ReasonNotAttested, ReasonNotActive, ReasonMustReattest, ReasonBanned:
		return fault.KindOf(err) == fault.Denied || fault.KindOf(err) == fault.Unauthenticated
	}
	return false
}

// foreign reports whether what answers is not a server of ours.
func foreign(err error) bool {
	r := fault.ReasonOf(err)
	return r == ReasonUntrusted || r == ReasonWrongRoot || r == ReasonClock
}

// passing reports whether a failure may end by itself.
func passing(err error) bool {
	k := fault.KindOf(err)
	return k == fault.Unavailable || k == fault.Exhausted
}

func sentence(k Kind) string {
	switch k {
	case Bootstrap:
		return "no roots from the configured source, trying again"
	case Attest:
		return "attestation failed, trying again"
	}
	return "own SVID was not renewed, trying again"
}

// ended reports whether there is no SVID that is any good: none, one that the
// server refuses, or one that is over by our clock.
func (m *Machine) ended() bool {
	return m.own == nil || m.refused != nil || !m.now.Before(m.own.NotAfter)
}

func (m *Machine) remaining() time.Duration { return m.own.NotAfter.Sub(m.now) }
func (m *Machine) life() time.Duration      { return m.own.NotAfter.Sub(m.own.NotBefore) }

// due reports whether the SVID is to be renewed, by either clock: the wall clock
// may have been wrong when it was signed, or be wrong now.
func (m *Machine) due() bool {
	return !m.now.Before(m.renewAt) || m.renewBoot != 0 && m.boot >= m.renewBoot
}

// schedule plans the renewal at half of the life that is left, a tenth of that
// earlier or later. Of a stored SVID the first half may be over.
func (m *Machine) schedule() {
	left := max(m.remaining(), 0) // a slow disk or a set clock may have used it up
	wait := m.spread(left/2-left/20, left/2+left/20, 2)
	if m.own.Stored && left < m.life()/2 {
		wait = m.spread(0, min(left/4, soon), 2)
	}
	m.renewAt = m.now.Add(wait)
	m.renewBoot, m.endBoot = m.boot+wait, m.boot+min(left, m.life())
	if m.own.Stored && m.now.Before(m.own.NotBefore) {
		m.renewBoot = 0 // how much of its life is over cannot be told
	}
}

// renewWithin plans the renewal within a time, unless it comes sooner anyway.
func (m *Machine) renewWithin(window time.Duration) {
	if m.own == nil {
		return
	}
	wait := m.spread(0, min(window, max(m.remaining(), 0)/2), 2)
	if wait < m.untilRenewal() {
		m.renewAt, m.renewBoot = m.now.Add(wait), m.boot+wait
	}
}

func (m *Machine) untilRenewal() time.Duration {
	wait := m.renewAt.Sub(m.now)
	if m.renewBoot != 0 {
		wait = min(wait, m.renewBoot-m.boot)
	}
	return max(wait, 0)
}

// wait says how long a decision holds if nothing happens.
func (m *Machine) wait() time.Duration {
	wait := time.Hour
	by := func(boot time.Duration) { wait = min(wait, boot-m.boot) }
	if m.redialAt != 0 {
		by(m.redialAt)
	}
	if m.job == None {
		switch {
		case m.boot < m.notBefore:
			by(m.notBefore)
		case m.own != nil:
			wait = min(wait, m.untilRenewal(), m.remaining())
			if m.foreign != 0 && !m.asked {
				by(m.foreign + m.RebootstrapDelay)
			}
		}
		if m.unsaved {
			by(m.saveAt)
		}
	}
	return max(wait, time.Millisecond)
}

func (m *Machine) note(warn bool, message string, err error) {
	m.fx.Notes = append(m.fx.Notes, Note{Message: message, Warn: warn, Err: err})
}

// backoff is the wait after so many failures, spread over its upper half (R110).
func (m *Machine) backoff(failures int, floor, ceiling time.Duration) time.Duration {
	d := min(floor<<min(failures-1, 16), ceiling)
	return m.spread(d/2, d, 0)
}

// spread picks a time between two from the step's seed (splitmix64).
func (m *Machine) spread(from, to time.Duration, n uint64) time.Duration {
	if to <= from {
		return from
	}
	z := m.seed + (n+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return from + time.Duration((z^z>>31)%uint64(to-from+1))
}

func clamp(window time.Duration) time.Duration { return min(max(window, 0), windowMost) }
