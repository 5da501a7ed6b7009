package authority

import (
	"fmt"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
)

const (
	// DefaultMaxWait is how long a prepared key waits for who is silent.
	DefaultMaxWait = 24 * time.Hour
	// joinWait is how long a server waits that has no other key: it serves nobody
	// meanwhile.
	joinWait = time.Minute
	// syncInterval is that of agents which ask instead of being told.
	syncInterval = 5 * time.Second
	// belowWait is for servers below this one, those below them, and agents that ask:
	// each looks every 5 s for what changed above it.
	belowWait = 3 * syncInterval
	// maxNames is how many are named of those who are not ready.
	maxNames = 20
)

// Peers is who could meet a document that is signed by a new key.
type Peers struct {
	Others  bool      // another server lives: bundles can be had without this one
	Missing []Missing // who is not known to have the bundle
}

// Missing is one of those who are not known to have the bundle.
type Missing struct {
	Name   string    // the agent's or server's id
	Server string    // the server that it is attached to; empty: none
	Until  time.Time // from when on it does not count: its certificate has ended; zero: it always does
	ByTime bool      // it never acknowledges, and has the bundle after a time
	Below  bool      // likewise, sooner: these are servers below this one
}

// serverGone is how long after its last beat a server does not count any more.
const serverGone = time.Minute

// Known is who could meet a document that this server signs and is not known to
// have what was committed up to a position, as the rows of all servers tell: other
// servers that live, agents with a certificate, and, as one each, the servers below
// this one and the trust domains that federate with it, which fetch the bundle now
// and then.
func Known(s *registry.Snapshot, self string, at store.Position, now time.Time) (p Peers) {
	for _, server := range s.Servers() {
		// One without a lease has a store for itself: it is this one, in another life.
		if server.ID == self || server.Lease == 0 || !server.Live(now) {
			continue
		}
		p.Others = true
		if server.Position.Epoch != at.Epoch || server.Position.Revision < at.Revision {
			p.Missing = append(p.Missing, Missing{Name: server.ID, Server: server.ID, Until: server.BeatAt.Add(serverGone)})
		}
	}
	for _, a := range s.Unacknowledged(at, now) {
		p.Missing = append(p.Missing, Missing{Name: a.ID.String(), Server: a.Server, Until: a.Until, ByTime: a.Polls})
	}
	for d := range s.Downstreams() {
		if now.Before(d.NotAfter) {
			p.Missing = append(p.Missing, Missing{Name: "servers below this one and their agents", ByTime: true, Below: true})
			break
		}
	}
	if s.BundleCount() > 1 {
		p.Missing = append(p.Missing, Missing{Name: "trust domains that federate with this one", ByTime: true})
	}
	return p
}

// waiting reports whether a key waits until it is ready.
func waiting(s registry.Slot) bool { return s.State == registry.SlotPrepared && s.ReadyAt.IsZero() }

// spreadAt is when everyone who asks for the bundle now and then has had the time
// to see a prepared key (R64), less for keys of a short life.
func (m *machine) spreadAt(s registry.Slot) time.Time {
	hint := m.Bundle.RefreshHint
	if hint == 0 {
		hint = DefaultRefreshHint
	}
	return s.PublishedAt.Add(min(max(2*syncInterval, 3*hint), life(s)/12))
}

// hasAt is when one that is missing has a prepared key's bundle although it does not
// say so; zero: nobody knows.
func (m *machine) hasAt(p Missing, s registry.Slot) time.Time {
	switch {
	case p.Below && m.name == X509 && m.nested():
		return s.PublishedAt // nothing to have: a root above this server is not its key
	case p.Below:
		return s.PublishedAt.Add(min(belowWait, life(s)/12))
	case p.ByTime:
		return m.spreadAt(s)
	}
	return time.Time{}
}

// awaited returns who a prepared key waits for, and until when at the latest.
func (m *machine) awaited(s registry.Slot) (missing []Missing, until time.Time) {
	longest := s.PublishedAt.Add(m.MaxWait)
	active := m.at(registry.SlotActive)
	if active < 0 {
		longest = s.PublishedAt.Add(min(m.MaxWait, joinWait, life(s)/6))
	} else if last := latestAt(m.slots[active]); last.Before(longest) {
		// A key that was published late gets the time that a new server's gets.
		longest = earlier(later(last, s.PublishedAt.Add(joinWait)), m.slots[active].NotAfter)
	}
	for _, p := range m.Peers.Missing {
		if active < 0 && p.Server == "" && !m.Peers.Others {
			continue // who is away cannot learn of the key from anyone else
		}
		end := longest
		if at := m.hasAt(p, s); !at.IsZero() {
			end = earlier(end, at)
		}
		if !p.Until.IsZero() {
			end = earlier(end, p.Until)
		}
		if !m.reached(end) {
			missing, until = append(missing, p), later(until, end)
		}
	}
	return missing, until
}

// pass notes who has not acknowledged a key that goes on, and could still meet it.
func (m *machine) pass(s *registry.Slot) {
	for _, p := range m.Peers.Missing {
		if at := m.hasAt(p, *s); !at.IsZero() && m.reached(at) {
			continue
		}
		if p.Until.IsZero() || m.Now.Before(p.Until) {
			m.passed = append(m.passed, p)
		}
	}
	s.Unready = uint32(len(m.passed))
}

func notReady(id string, missing []Missing, until, now time.Time) error {
	return fault.New(fault.Precondition, "authority_not_acknowledged", "%d do not have %q yet: %s", len(missing), id, names(missing)).
		Fix("try again; they are waited for until %s at the latest, and `plastron server authority rotate` with -force does not wait", until.UTC().Format(time.RFC3339)).
		NotBefore(until.Sub(now))
}

func names(missing []Missing) string {
	var list []string
	for _, p := range missing[:min(len(missing), maxNames)] {
		list = append(list, p.Name)
	}
	text := strings.Join(list, ", ")
	if more := len(missing) - len(list); more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
