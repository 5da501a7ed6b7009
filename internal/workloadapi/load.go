package workloadapi

import (
	"context"
	"errors"
	"maps"
	"sync"

	"github.com/plastron/plastron/internal/fault"
)

// Load is what callers have under way, and how often they were refused since the start.
type Load struct {
	Connections, Calls int               // open streams are calls
	Refusals           map[string]uint64 // by reason
}

// maxReasons bounds how many reasons are told apart: some come from the server.
const maxReasons = 100

// outcomes counts refused calls by reason.
type outcomes struct {
	mu sync.Mutex // guards by
	by map[string]uint64
}

// count takes note of how a call ended, and returns that.
func (t *outcomes) count(err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	reason := fault.ReasonOf(err)
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.by[reason]; !known && len(t.by) >= maxReasons {
		reason = "other"
	}
	t.by[reason]++
	return err
}

// Load says how busy the server is.
func (s *Server) Load() (l Load) {
	s.users.mu.Lock()
	l.Connections = s.users.connections
	for _, u := range s.users.byUID {
		l.Calls += u.calls
	}
	s.users.mu.Unlock()
	s.outcomes.mu.Lock()
	l.Refusals = maps.Clone(s.outcomes.by)
	s.outcomes.mu.Unlock()
	return l
}
