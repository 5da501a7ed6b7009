package rpc

import (
	"sync"
	"time"
)

// Quiet lets lines that callers cause through once a second and counts the rest (R104).
type Quiet struct {
	mu         sync.Mutex // guards everything below
	last       time.Time
	suppressed int
}

// Due returns how many events a line written now stands for; 0: write none.
func (q *Quiet) Due() int {
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
