package registry

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// MaxRoster is how many agents a roster names; one that is left out counts as attached nowhere.
const MaxRoster = 100_000

const rosterEntry = 8 // bytes

// AgentHash stands for an agent in rosters. It is the beginning of a hash of the
// path: whoever can make an ID whose hash begins like another's, by 2^64 attempts,
// can have that agent counted as if it had acknowledged what it has not.
func AgentHash(agent spiffeid.ID) uint64 { return hashPath(agent.Path()) }

func hashPath(path string) uint64 {
	h := sha256.Sum256([]byte(path))
	return binary.BigEndian.Uint64(h[:])
}

// PutRoster writes down which agents are attached to a server: hashes, ascending. A
// roster that is stored like that already is not written again.
func (tx *Tx) PutRoster(server string, agents []uint64) error {
	m := &statev1.Roster{Agents: make([]byte, 0, rosterEntry*len(agents))}
	for _, h := range agents {
		m.Agents = binary.BigEndian.AppendUint64(m.Agents, h)
	}
	if err := checkRoster(m.Agents); err != nil || server == "" {
		return fault.New(fault.Invalid, "roster_invalid", "the roster of %q is not in order, too long or of no server", server).Because(err)
	}
	_, payload, err := tx.get(kindRoster, server, "roster")
	if stored, broken := readRoster(payload); err == nil && broken == nil && string(stored) == string(m.Agents) {
		return nil
	}
	return tx.put(kindRoster, server, m)
}

// DeleteRoster deletes what a server that will not come back said of its agents.
func (tx *Tx) DeleteRoster(server string) error { return tx.delete(kindRoster, server, "roster") }

// readRoster returns the hashes, 8 bytes each.
func readRoster(payload []byte) ([]byte, error) {
	var m statev1.Roster
	if err := proto.Unmarshal(payload, &m); err != nil {
		return nil, err
	}
	return m.Agents, checkRoster(m.Agents)
}

func checkRoster(agents []byte) error {
	if len(agents)%rosterEntry != 0 || len(agents) > rosterEntry*MaxRoster {
		return fmt.Errorf("the roster has %d bytes", len(agents))
	}
	for i := rosterEntry; i < len(agents); i += rosterEntry {
		if string(agents[i-rosterEntry:i]) >= string(agents[i:i+rosterEntry]) {
			return fmt.Errorf("the roster is not in order")
		}
	}
	return nil
}

// silence is for how long a server is believed to live that has not said so: more than
// its beats are apart, and by as much more as clocks may differ (R108).
const silence = time.Minute

// Live reports whether a server goes on, as far as its row tells. One without a lease
// is the only one of its store, and writes its row when there is something to say.
func (s *Server) Live(now time.Time) bool {
	return !s.Stopped && (s.Lease == 0 || now.Sub(s.BeatAt) < silence)
}

// Attachment is what the servers say of an agent.
type Attachment struct {
	Server string // that it is attached to
	// Acknowledged is up to where the agent holds what it is granted. Changes that do
	// not affect it count as held. Revision 0: nothing is known in the present epoch.
	Acknowledged store.Position
}

// Attachments is what the rows of servers that live say of their agents. It may be kept.
type Attachments struct{ servers []said }

// said is what one server says.
type said struct {
	server   string
	agents   []byte         // of the roster
	position store.Position // what all agents but the laggards hold
	laggards map[uint64]uint64
}

// Attachments reads the rows. It costs as much as the rosters are long.
func (v *Snapshot) Attachments(now time.Time) Attachments {
	var a Attachments
	for _, server := range v.Servers() {
		if !server.Live(now) {
			continue
		}
		agents, err := readRoster(v.s.values[kindRoster][server.ID].payload)
		if err != nil || len(agents) == 0 {
			continue
		}
		s := said{server.ID, agents, store.Position{Epoch: v.s.position.Epoch}, map[uint64]uint64{}}
		if server.Position.Epoch == s.position.Epoch {
			s.position.Revision = server.Acknowledged
			for _, l := range server.Laggards {
				s.laggards[hashPath(strings.TrimPrefix(l.Agent, v.s.td.IDString()))] = l.Acknowledged
			}
		}
		a.servers = append(a.servers, s)
	}
	return a
}

// Except leaves out what one server says.
func (a Attachments) Except(server string) Attachments {
	return Attachments{slices.DeleteFunc(slices.Clone(a.servers), func(s said) bool { return s.server == server })}
}

// Of says where an agent is attached. One that moves is attached to two servers for a
// while: then it is the one to which it has acknowledged more.
func (a Attachments) Of(agent spiffeid.ID) (at Attachment, attached bool) {
	return a.of(AgentHash(agent))
}

// Has reports whether an agent is attached, by its AgentHash.
func (a Attachments) Has(hash uint64) bool {
	return slices.ContainsFunc(a.servers, func(s said) bool { return s.has(hash) })
}

func (a Attachments) of(hash uint64) (at Attachment, attached bool) {
	for i := range a.servers {
		s := &a.servers[i]
		if !s.has(hash) {
			continue
		}
		acknowledged := s.position
		if lag, lags := s.laggards[hash]; lags {
			acknowledged.Revision = lag
		}
		if !attached || acknowledged.Revision > at.Acknowledged.Revision {
			at, attached = Attachment{s.server, acknowledged}, true
		}
	}
	return at, attached
}

func (s *said) has(hash uint64) bool {
	_, found := sort.Find(len(s.agents)/rosterEntry, func(i int) int {
		return cmp.Compare(hash, binary.BigEndian.Uint64(s.agents[rosterEntry*i:]))
	})
	return found
}

// Certified is an agent that is not banned and has a certificate.
type Certified struct {
	Hash  uint64 // AgentHash
	Until time.Time
	Polls bool // as in Unacknowledged

	td   spiffeid.TrustDomain
	path string
}

// ID is the agent's.
func (c *Certified) ID() spiffeid.ID {
	return spiffeid.RequireFromPath(c.td, c.path) // it was checked on its way in
}

// Certified yields those agents in the order of IDs. It reads no row.
func (v *Snapshot) Certified(now time.Time) iter.Seq[Certified] {
	return func(yield func(Certified) bool) {
		for n := range v.s.nodes.after("") {
			if n.live && n.until > now.Unix() && !yield(Certified{n.hash, timeOf(n.until), !n.follows, v.s.td, n.path}) {
				return
			}
		}
	}
}

// Unacknowledged is an agent that may hold less than what was committed at some position.
type Unacknowledged struct {
	ID           spiffeid.ID
	Server       string // to which it is attached; empty: to none that is live
	Acknowledged uint64 // as in Attachment; 0: nothing is known
	Until        time.Time
	// Polls: it has never followed a server, or has asked one since. SPIRE's agents are
	// such, and one of ours is until it follows for the first time. How far it is can
	// only be told by time: it asks every few seconds and is never listed as attached.
	Polls bool
}

// Unacknowledged returns the agents, in the order of IDs, that could present an SVID
// to others or verify one, since they are not banned and have a certificate until
// then, and of which no live server says that they hold what is theirs at that position.
//
// It looks at every node once, without reading its row: ask it while something waits,
// not all the time.
func (v *Snapshot) Unacknowledged(at store.Position, now time.Time) []Unacknowledged {
	attachments := v.Attachments(now)
	var out []Unacknowledged
	for n := range v.s.nodes.after("") {
		if !n.live || n.until <= now.Unix() {
			continue
		}
		a, attached := attachments.of(n.hash)
		if attached && at.Epoch == a.Acknowledged.Epoch && a.Acknowledged.Revision >= at.Revision {
			continue
		}
		out = append(out, Unacknowledged{
			ID:     spiffeid.RequireFromPath(v.s.td, n.path), // it was checked on its way in
			Server: a.Server, Acknowledged: a.Acknowledged.Revision, Until: timeOf(n.until), Polls: !n.follows,
		})
	}
	return out
}

// FromServers reports whether a batch holds what servers say of themselves or of their agents.
func FromServers(b store.Batch) bool {
	for _, w := range b.Writes {
		for _, c := range w.Changes {
			if k, _ := split(c.Key); k == kindServer || k == kindRoster {
				return true
			}
		}
	}
	return false
}
