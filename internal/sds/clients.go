package sds

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/process"
)

// Bounds on what is remembered and shown of clients.
const (
	maxPast  = 20 // clients that are gone, and refused what they got last
	maxShown = 20
	maxList  = 5 // names of one client
)

// Client is a client with trouble: it refused what it got, or asks for names that
// stand for nothing. Its texts are its own words: quote them.
type Client struct {
	PID      int
	UID      uint32
	Node     string
	Names    []string // that it asks for, at most 5
	Missing  []Missing
	Rejected string    // why it refused; empty: it did not
	Version  string    // that it refused
	At       time.Time // of that, or else since when it asks for what is missing
	Open     bool      // its stream is
}

// Missing is a name that stands for nothing, and the code of the reason.
type Missing struct{ Name, Reason string }

// Stats says what goes on, and what has gone on since the start.
type Stats struct {
	Streams  int // open now
	Missing  int // of those, how many ask for names that stand for nothing
	Answers  uint64
	Rejected uint64
}

// clients knows the clients with trouble. A stream whose handler has returned is in
// it no more, although for a moment somebody may still listen to it.
type clients struct {
	mu       sync.Mutex // guards everything below
	stats    Stats
	troubled map[*stream]*Client
	past     []Client // oldest first
}

func (c *clients) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Streams++
}

// end forgets a stream. That its client refused something is remembered a while.
func (c *clients) end(st *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Streams--
	st.ended = true
	t := c.troubled[st]
	delete(c.troubled, st)
	if t == nil || t.Rejected == "" {
		return
	}
	t.Open, t.Missing = false, nil
	c.past = append(c.past, *t)
	c.past = c.past[max(0, len(c.past)-maxPast):]
}

// accepted forgets what a client refused before, on this stream or on one that it
// had before.
func (c *clients) accepted(st *stream, who *process.Process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.past) > 0 && who != nil {
		_, names := st.asked()
		c.past = slices.DeleteFunc(c.past, func(p Client) bool { return p.PID == who.PID && slices.Equal(p.Names, names) })
	}
	t := c.troubled[st]
	if t == nil {
		return
	}
	if t.Rejected, t.Version = "", ""; len(t.Missing) == 0 {
		delete(c.troubled, st)
	}
}

// troubleLocked returns the client of a stream, to be filled in.
func (c *clients) troubleLocked(st *stream, who *process.Process) *Client {
	t := c.troubled[st]
	if t == nil {
		t = &Client{Open: true, At: time.Now()}
		if who != nil {
			t.PID, t.UID = who.PID, who.UID
		}
		c.troubled[st] = t
	}
	t.Node, t.Names = st.asked()
	return t
}

// rejected records and logs that a client does not take the last answer.
func (s *Service) rejected(st *stream, who *process.Process, why string) {
	c := &s.clients
	c.mu.Lock()
	c.stats.Rejected++
	if st.ended {
		c.mu.Unlock()
		return
	}
	t := c.troubleLocked(st, who)
	t.Rejected, t.Version, t.At = why, st.sent(), time.Now()
	about := *t
	c.mu.Unlock()
	if n := s.quiet.Due(); n > 0 {
		s.cfg.Log.Warn("secrets rejected by the client", "uid", about.UID, "pid", about.PID, "id", strings.Join(about.Names, " "), "err", why, "count", n)
	}
}

// missing records and logs which names of the answer that is about to leave stand
// for nothing.
func (s *Service) missing(st *stream, who *process.Process, lost []missing) {
	c := &s.clients
	c.mu.Lock()
	c.stats.Answers++
	if t := c.troubled[st]; len(lost) == 0 {
		if t != nil {
			if t.Missing = nil; t.Rejected == "" {
				delete(c.troubled, st)
			}
		}
		c.mu.Unlock()
		return
	}
	t := c.troubleLocked(st, who)
	t.Missing = nil
	for _, l := range lost[:min(len(lost), maxList)] {
		t.Missing = append(t.Missing, Missing{cut(l.name), l.why.Reason})
	}
	about := *t
	c.mu.Unlock()
	if n := s.quiet.Due(); n > 0 {
		first := about.Missing[0]
		s.cfg.Log.Info("secret not given", "uid", about.UID, "pid", about.PID, "id", first.Name, "reason", first.Reason, "count", n)
	}
}

// Troubled returns clients with trouble, the newest first, at most 20.
func (s *Service) Troubled() []Client {
	c := &s.clients
	c.mu.Lock()
	defer c.mu.Unlock()
	out := slices.Clone(c.past)
	for _, t := range c.troubled {
		out = append(out, *t)
	}
	slices.SortFunc(out, func(a, b Client) int { return cmp.Or(b.At.Compare(a.At), a.PID-b.PID) })
	return out[:min(len(out), maxShown)]
}

// Stats returns the counters.
func (s *Service) Stats() Stats {
	s.clients.mu.Lock()
	defer s.clients.mu.Unlock()
	st := s.clients.stats
	for _, t := range s.clients.troubled {
		if len(t.Missing) > 0 {
			st.Missing++
		}
	}
	return st
}
