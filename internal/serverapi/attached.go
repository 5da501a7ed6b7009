package serverapi

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/servers"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// awayFor is how long an agent without a stream still counts as attached here, so that
// one that connects again, to this server or to another, is not written down twice.
const awayFor = 30 * time.Second

// departure is an agent that has no stream any more.
type departure struct {
	at   time.Time
	held store.Position
}

// Report is what this server tells the others of its agents: those that follow it, and
// those that have been away for less than 30 s. If more than a hundred of them lag, the
// hundred that are furthest behind are named.
func (f *Followers) Report(now time.Time) servers.Report {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sweepLocked(now)
	r := servers.Report{Agents: len(f.byAgent), Ends: f.endsLocked()}
	held := make(map[spiffeid.ID]uint64, len(f.byAgent)+len(f.left))
	f.registry.View(func(s *registry.Snapshot) {
		r.Position = s.Position()
		for id, gone := range f.left {
			held[id] = revisionIn(r.Position, gone.held)
		}
		for id := range f.byAgent {
			held[id] = f.heldLocked(id, s)
		}
	})
	r.Acknowledged = r.Position.Revision
	for id, revision := range held {
		r.Roster = append(r.Roster, registry.AgentHash(id))
		if revision < r.Position.Revision {
			r.Laggards = append(r.Laggards, registry.Laggard{Agent: id.String(), Acknowledged: revision})
		}
	}
	slices.Sort(r.Roster)
	r.Roster = slices.Compact(r.Roster)
	r.Roster = r.Roster[:min(len(r.Roster), registry.MaxRoster)]
	if len(r.Laggards) > registry.MaxLaggards {
		slices.SortFunc(r.Laggards, func(a, b registry.Laggard) int {
			return cmp.Or(cmp.Compare(a.Acknowledged, b.Acknowledged), cmp.Compare(a.Agent, b.Agent))
		})
		r.Acknowledged = r.Laggards[registry.MaxLaggards].Acknowledged
		r.Laggards = r.Laggards[:registry.MaxLaggards]
	}
	slices.SortFunc(r.Laggards, func(a, b registry.Laggard) int { return cmp.Compare(a.Agent, b.Agent) })
	return r
}

// Outage is what would end first if all servers were gone from now on.
func (s *Server) Outage(now time.Time) Outage { return s.followers.Outage(now) }

func (s *Server) poke() {
	if s.cfg.Poke != nil {
		s.cfg.Poke()
	}
}

// heldLocked is up to where an agent that follows here holds what it is granted.
func (f *Followers) heldLocked(agent spiffeid.ID, s *registry.Snapshot) (revision uint64) {
	for _, row := range f.byAgent[agent] {
		revision = max(revision, revisionIn(s.Position(), row.holds(s)))
	}
	return revision
}

// where says where agents are attached: here as it is now, elsewhere as the rows say.
func (f *Followers) where(agents []spiffeid.ID, now time.Time) []registry.Attachment {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := make([]registry.Attachment, len(agents))
	f.registry.View(func(s *registry.Snapshot) {
		elsewhere := f.seen(s, now).elsewhere
		for i, agent := range agents {
			if len(f.byAgent[agent]) == 0 {
				at[i], _ = elsewhere.Of(agent)
				continue
			}
			at[i] = registry.Attachment{Server: f.server, Acknowledged: store.Position{Epoch: s.Position().Epoch, Revision: f.heldLocked(agent, s)}}
		}
	})
	return at
}

// holds is the position at which the agent has what it is granted: the snapshot's, if
// nothing of it has changed since what it acknowledged.
func (row *following) holds(s *registry.Snapshot) store.Position {
	if told, all := row.follower.Told(s); all && reaches(row.position, told) {
		return s.Position()
	}
	return row.position
}

// revisionIn is the revision of a position, bounded by where the log is; 0 in another epoch.
func revisionIn(at, p store.Position) uint64 {
	if p.Epoch != at.Epoch {
		return 0
	}
	return min(p.Revision, at.Revision)
}

// sweepLocked forgets who has been away for long. It looks at all of them, so it does
// so now and then.
func (f *Followers) sweepLocked(now time.Time) {
	if now.Sub(f.swept) < awayFor/6 {
		return
	}
	f.swept = now
	maps.DeleteFunc(f.left, func(_ spiffeid.ID, d departure) bool { return now.Sub(d.at) >= awayFor })
}

// seen is what other servers say of agents, and what is known of the agents themselves.
type seen struct {
	snapshot  *registry.Snapshot
	elsewhere registry.Attachments
}

func (f *Followers) seen(s *registry.Snapshot, now time.Time) seen {
	return seen{s, s.Attachments(now).Except(f.server)}
}

// out reports whether an agent is banned or not attested.
func (s seen) out(agent spiffeid.ID) bool {
	n, err := s.snapshot.Node(agent)
	return err != nil || n.Banned
}

// holdsLocked reports whether an agent acknowledged a position, to whichever server,
// or is out and no server has a stream of it.
func (f *Followers) holdsLocked(agent spiffeid.ID, p store.Position, seen seen) bool {
	rows := f.byAgent[agent]
	if slices.ContainsFunc(rows, func(r *following) bool { return reaches(r.position, p) }) || reaches(f.left[agent].held, p) {
		return true
	}
	at, attached := seen.elsewhere.Of(agent)
	return attached && reaches(at.Acknowledged, p) || !attached && len(rows) == 0 && seen.out(agent)
}

// serverOfLocked names the server to which an agent is attached; empty: to none.
func (f *Followers) serverOfLocked(agent spiffeid.ID, seen seen) string {
	if len(f.byAgent[agent]) > 0 {
		return f.server
	}
	at, _ := seen.elsewhere.Of(agent)
	return at.Server
}

// batch hears from the registry what has changed. It says whether agents that had a
// stream until lately are out, and so not attached any more.
func (f *Followers) batch(b store.Batch) (gone bool) {
	if b.Prev == (store.Position{}) || registry.FromServers(b) {
		f.settleByRows(time.Now())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := 0; i < len(b.Writes) && len(f.left) > 0; i++ {
		touched, err := f.registry.Touched(registry.Committed{Position: b.Position, Write: i})
		if err != nil {
			break // the log was not followed; then they stay for as long as others
		}
		f.registry.View(func(s *registry.Snapshot) {
			for _, agent := range touched {
				if _, left := f.left[agent]; left && (seen{snapshot: s}).out(agent) {
					delete(f.left, agent)
					gone = true
				}
			}
		})
	}
	return gone
}

// settleByRows ends the waits for agents of which other servers now say that they hold
// what is waited for.
func (f *Followers) settleByRows(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.waits) == 0 {
		return
	}
	f.registry.View(func(s *registry.Snapshot) {
		seen := f.seen(s, now)
		for agent := range f.waits {
			f.settleLocked(agent, func(missing store.Position) bool { return f.holdsLocked(agent, missing, seen) })
		}
	})
}
