package registry

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// beginWithin is for how long a store may be away or busy when a server starts:
// others may be starting, too, or the store is failing over.
const beginWithin = 30 * time.Second

// How much is read as one piece of work; a row begins while there is less.
const (
	partRows  = 512
	partBytes = 1 << 20
)

// part is rows on their way: the store fills it, it is read on any processor and
// placed, and then it is filled again.
type part struct {
	raws   []rawRow
	values []byte // those of raws, one after the other
	rows   []storedRow
	ready  chan struct{} // room for one: rows are read
}

type rawRow struct {
	key      string
	revision uint64
	end      int // of its value, in values
}

func newPart() *part {
	return &part{raws: make([]rawRow, 0, partRows), rows: make([]storedRow, 0, partRows), ready: make(chan struct{}, 1)}
}

func (p *part) add(key string, rev uint64, value []byte) {
	p.values = append(p.values, value...)
	p.raws = append(p.raws, rawRow{key, rev, len(p.values)})
}

func (p *part) full() bool { return len(p.raws) >= partRows || len(p.values) >= partBytes }

// read does not keep the values: the memory is used again.
func (p *part) read(td spiffeid.TrustDomain) {
	begin := 0
	for _, raw := range p.raws {
		p.rows = append(p.rows, readStored(td, raw.key, raw.revision, p.values[begin:raw.end]))
		begin = raw.end
	}
	p.ready <- struct{}{}
}

func (p *part) clear() { p.raws, p.values, p.rows = p.raws[:0], p.values[:0], p.rows[:0] }

// begin loads what is in a store that has just been opened, and claims a new one.
func (r *Registry) begin(ctx context.Context) (*state, error) {
	for began := time.Now(); ; {
		s, err := r.load(ctx)
		if err == nil && !s.claimed() {
			if err = r.claim(ctx); err == nil {
				s, err = r.load(ctx) // with what was written, by us or by another
			}
		}
		if fault.KindOf(err) != fault.Unavailable || time.Since(began) > beginWithin {
			return s, err
		}
		r.log.WarnContext(ctx, "store not loaded", "err", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// load folds all that is stored into a new state. While the store yields rows,
// others are read on all processors, and placed in the store's order.
func (r *Registry) load(ctx context.Context) (*state, error) {
	s := newState(r.td)
	n := runtime.GOMAXPROCS(0) + 2 // which are read, and one that is filled and one that is placed
	free, filled := make(chan *part, n), make(chan *part, n)
	for range n {
		free <- newPart()
	}
	var placing sync.WaitGroup
	placing.Go(func() { s.placeAll(filled, free) })
	filling := <-free
	share := func() {
		filled <- filling
		go filling.read(r.td)
	}
	position, err := r.store.Load(ctx, func(key string, rev uint64, value []byte) error {
		filling.add(key, rev, value)
		if filling.full() {
			share()
			filling = <-free
		}
		return nil
	})
	share()
	close(filled)
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

// placeAll places the rows of parts in turn. Content keys come before the entries
// that they belong to, so they wait: else each would first be one without an entry.
func (s *state) placeAll(filled <-chan *part, free chan<- *part) {
	type content struct {
		hash     [32]byte
		revision uint64
	}
	var contents []content
	for p := range filled {
		<-p.ready
		for i := range p.rows {
			if row := &p.rows[i]; row.kind == kindContent && row.err == nil {
				s.digest.Add(row.keyHash)
				contents = append(contents, content{row.content, row.revision})
			} else {
				s.place(row, nil)
			}
		}
		p.clear()
		free <- p
	}
	for _, c := range contents {
		s.putContent(c.hash, c.revision)
	}
}
