package servers

import (
	"context"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// memory is a store that servers share, in memory.
type memory struct {
	mu      sync.Mutex
	epoch   store.Epoch
	rows    map[string]row
	log     []store.Batch
	changed chan struct{}
	loads   int
}

type row struct {
	revision uint64
	value    []byte
}

func newMemory() *memory {
	return &memory{epoch: store.NewEpoch(), rows: map[string]row{}, changed: make(chan struct{})}
}

func (m *memory) position() store.Position {
	return store.Position{Epoch: m.epoch, Revision: uint64(len(m.log))}
}

// commit applies one transaction; each is a batch of its own.
func (m *memory) commit(txn *store.Txn) store.Result {
	if err := txn.Validate(); err != nil {
		return store.Result{Err: err}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range txn.Conditions {
		if m.rows[c.Key].revision != c.Revision {
			return store.Result{Position: m.position(), Err: fault.New(fault.Conflict, "conflict", "%s was changed", c.Key)}
		}
	}
	if len(txn.Puts)+len(txn.Deletes) == 0 {
		return store.Result{Position: m.position()}
	}
	b := store.Batch{Prev: m.position(), WriterTime: time.Now(), Writes: []store.Write{txn.Write()}}
	m.log = append(m.log, store.Batch{})
	b.Position = m.position()
	m.log[len(m.log)-1] = b
	for _, p := range txn.Puts {
		m.rows[p.Key] = row{b.Position.Revision, p.Value}
	}
	for _, key := range txn.Deletes {
		delete(m.rows, key)
	}
	close(m.changed)
	m.changed = make(chan struct{})
	return store.Result{Position: b.Position}
}

// batches counts the commits.
func (m *memory) batches() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.log)
}

// link is one server's way to the store, which may be cut.
type link struct {
	store.Store // nil: what a registry does not use
	*memory
	mu      sync.Mutex
	writes  string // "": as they should; else the reason why they fail, or "deaf": they arrive, and the answer does not
	blind   bool   // nothing is seen of the log
	loses   bool   // the next change of a bundle, once
	moved   chan struct{}
	commits int
}

func (m *memory) link() *link { return &link{memory: m, moved: make(chan struct{})} }

func (l *link) set(writes string, blind bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writes, l.blind = writes, blind
	close(l.moved)
	l.moved = make(chan struct{})
}

func (l *link) state() (writes string, blind bool, moved chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.writes, l.blind, l.moved
}

func (l *link) Load(_ context.Context, f func(string, uint64, []byte) error) (store.Position, error) {
	l.memory.mu.Lock()
	defer l.memory.mu.Unlock()
	l.memory.loads++
	var keys []string
	for key := range l.rows {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		if err := f(key, l.rows[key].revision, l.rows[key].value); err != nil {
			return store.Position{}, err
		}
	}
	return l.position(), nil
}

func (l *link) Commit(_ context.Context, txns []store.Txn) []store.Result {
	results := make([]store.Result, len(txns))
	for i := range txns {
		switch writes, _, _ := l.state(); writes {
		case "":
			l.commits++
			results[i] = l.commit(&txns[i])
		case "deaf":
			l.commit(&txns[i])
			results[i].Err = fault.New(fault.Unavailable, "outcome_unknown", "nobody knows")
		default:
			results[i].Err = fault.New(fault.Unavailable, writes, "it cannot be written")
		}
	}
	return results
}

func (l *link) Watch(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		for at := after.Revision; ; {
			_, blind, moved := l.state()
			l.memory.mu.Lock()
			changed := l.changed
			var more []store.Batch
			if !blind {
				more = slices.Clone(l.log[at:])
			}
			l.memory.mu.Unlock()
			for _, b := range more {
				if l.lose(b) {
					b.Writes = []store.Write{{Caller: b.Writes[0].Caller}}
				}
				if !yield(b, nil) {
					return
				}
				at++
			}
			if len(more) > 0 {
				continue
			}
			select {
			case <-changed:
				if blind {
					select { // nothing to do until it is not
					case <-moved:
					case <-ctx.Done():
						return
					}
				}
			case <-moved:
			case <-ctx.Done():
				return
			}
		}
	}
}

// lose reports whether a batch is to arrive without what it changes.
func (l *link) lose(b store.Batch) (lost bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lost = l.loses && strings.HasPrefix(b.Writes[0].Changes[0].Key, "/bundle/")
	l.loses = l.loses && !lost
	return lost
}
