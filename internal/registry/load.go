package registry

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
)

// loadPart is how many rows are read as one piece of work.
const loadPart = 512

// load folds all that is stored into a new state. While the store yields rows,
// others are read on all processors, and placed in the store's order.
func (r *Registry) load(ctx context.Context) (*state, error) {
	s := newState(r.td)
	parts := make(chan chan []storedRow, runtime.GOMAXPROCS(0)) // bounds what is in work
	var placing sync.WaitGroup
	placing.Go(func() {
		for part := range parts {
			for _, row := range <-part {
				s.place(&row, nil)
			}
		}
	})
	type raw struct {
		key      string
		revision uint64
		value    []byte
	}
	var raws []raw
	share := func() {
		part, mine := make(chan []storedRow, 1), raws
		parts <- part
		go func() {
			rows := make([]storedRow, len(mine))
			for i, raw := range mine {
				rows[i] = readStored(r.td, raw.key, raw.revision, raw.value)
			}
			part <- rows
		}()
		raws = make([]raw, 0, loadPart)
	}
	position, err := r.store.Load(ctx, func(key string, rev uint64, value []byte) error {
		if raws = append(raws, raw{key, rev, slices.Clone(value)}); len(raws) == loadPart {
			share()
		}
		return nil
	})
	share()
	close(parts)
	placing.Wait()
	if err != nil {
		return nil, fmt.Errorf("load the registry: %w", err)
	}
	s.position = position
	if err := s.foreign(); err != nil {
		return nil, err
	}
	if err := s.copied(); err != nil {
		return nil, err
	}
	if err := s.newer(); err != nil {
		return nil, err
	}
	for key, bad := range s.bad {
		r.log.WarnContext(ctx, "stored row left aside", "id", key, "revision", bad.revision, "err", bad.err)
	}
	return s, nil
}
