package etcd

import (
	"context"
	"encoding/hex"
	"errors"
	"iter"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		if ctx.Err() != nil {
			return
		}
		bound, done, err := s.use(ctx)
		if err != nil {
			yield(store.Batch{}, err)
			return
		}
		defer done()
		w := watcher{s: s, at: after, yield: yield}
		for err == nil {
			err = w.run(bound)
		}
		if errors.Is(err, errStopped) || ctx.Err() != nil {
			return
		}
		yield(store.Batch{}, s.told(ctx, err))
	}
}

// watcher is one call of Watch.
type watcher struct {
	s     *Store
	at    store.Position // of the last batch yielded
	skip  bool           // what follows was compacted away; by others, if at is the newest
	yield func(store.Batch, error) bool
}

// errStopped says that the consumer wants no more.
var errStopped = errors.New("stopped")

// begin finds the revision of etcd's from which to watch.
func (w *watcher) begin(ctx context.Context) (int64, error) {
	v, err := w.s.look(ctx, false)
	switch {
	case err != nil:
		return 0, err
	case v.at.Epoch != w.at.Epoch:
		return 0, otherEpoch(v.at.Epoch, w.at.Epoch)
	case v.at == w.at && w.skip:
		return v.now + 1, nil
	case w.at.Revision > v.at.Revision:
		return 0, fault.New(fault.Precondition, "position_unknown", "the store is at revision %d and has not reached %d", v.at.Revision, w.at.Revision)
	}
	w.s.mu.Lock()
	loaded, foreign := w.s.snapshot, w.s.foreign
	w.s.mu.Unlock()
	if loaded.at == w.at && foreign > w.at.Revision && foreign <= uint64(loaded.now) && !w.skip {
		return loaded.now + 1, nil // what strangers wrote was loaded
	}
	// From the beginning is from the creation of meta, which is not compacted away
	// while something after it is not.
	rev := int64(w.at.Revision)
	if rev == 0 {
		resp, err := w.s.ask(ctx, nil, clientv3.OpGet(w.s.keys.meta, clientv3.WithKeysOnly()))
		if err != nil {
			return 0, err
		}
		if rev = 1; first(resp, 0) != nil {
			rev = first(resp, 0).CreateRevision
		}
	}
	resp, err := w.s.ask(ctx, nil, clientv3.OpGet(w.s.keys.head, clientv3.WithKeysOnly(), clientv3.WithRev(rev)))
	if errors.Is(err, rpctypes.ErrCompacted) && v.at == w.at {
		return v.now + 1, nil // by others, beyond head: nothing is lost
	} else if errors.Is(err, rpctypes.ErrCompacted) {
		return w.s.behind(ctx, w.at.Revision)
	}
	if err == nil && revision(resp, 0) != w.at.Revision {
		err = fault.New(fault.Precondition, "position_unknown", "the log has no batch at revision %d", w.at.Revision)
	}
	return rev + 1, err
}

func otherEpoch(now, was store.Epoch) error {
	return fault.New(fault.Precondition, "epoch_changed", "the store has epoch %s, not %s", now, was)
}

// run watches until something is in the way; nil asks to begin again.
func (w *watcher) run(ctx context.Context) error {
	from, err := w.begin(ctx)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer stop()
	// The first call waits for a server, so it must not run here.
	opened := make(chan clientv3.WatchChan, 1)
	go func() {
		opened <- w.s.client.Watch(ctx, w.s.keys.prefix, clientv3.WithPrefix(), clientv3.WithRev(from))
	}()
	tick := time.NewTicker(w.s.limit.stale / 5)
	defer tick.Stop()
	var events clientv3.WatchChan
	ready := time.Now()
	for {
		select {
		case events = <-opened:
		case resp, ok := <-events:
			if !ok {
				return context.Canceled // with ctx or the store
			}
			ready = time.Now()
			if err := resp.Err(); errors.Is(err, rpctypes.ErrCompacted) {
				w.skip = true
				return nil
			} else if err != nil {
				return err
			}
			if err := w.pass(resp.Events); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			conn := w.s.client.ActiveConnection()
			if state := conn.GetState(); state == connectivity.Ready {
				ready = time.Now()
			} else if state == connectivity.Idle {
				conn.Connect()
			}
			if time.Since(ready) > w.s.limit.stale {
				return fault.New(fault.Unavailable, "store_unreachable", "etcd cannot be reached").Fix("check the endpoints, and that etcd runs there")
			}
		}
	}
}

// pass yields the batches in events, which hold whole revisions, in order.
func (w *watcher) pass(events []*clientv3.Event) error {
	for len(events) > 0 {
		n := 1
		for n < len(events) && events[n].Kv.ModRevision == events[0].Kv.ModRevision {
			n++
		}
		b, err := w.batch(events[:n])
		if err != nil {
			return err
		}
		if b.Writes != nil {
			w.s.saw(b.Position)
			if !w.yield(b, nil) {
				return errStopped
			}
			w.at, w.skip = b.Position, false
		}
		events = events[n:]
	}
	return nil
}

// current tells whether meta says the epoch that is watched.
func (w *watcher) current(stored []byte) bool {
	m, err := parseMeta(stored, w.s.keys.prefix)
	return err == nil && m.epoch == w.at.Epoch
}

// batch makes a batch of one revision's events, or one without writes if they
// are no batch.
func (w *watcher) batch(events []*clientv3.Event) (b store.Batch, err error) {
	k := &w.s.keys
	rev := uint64(events[0].Kv.ModRevision)
	values := make(map[string][]byte, len(events))
	parts := make(map[string][]byte)
	var head []byte
	touched := false
	for _, e := range events {
		key, put := string(e.Kv.Key), e.Type == mvccpb.Event_PUT
		switch {
		case key == k.head && put:
			head = e.Kv.Value
		case key == k.meta:
			if put && w.current(e.Kv.Value) { // made, or renewed before what comes now
				continue
			}
			return b, fault.New(fault.Precondition, "epoch_changed", "the store is no longer that of epoch %s", w.at.Epoch)
		case strings.HasPrefix(key, k.live):
			touched = true
			if put {
				values[key[len(k.live):]] = e.Kv.Value
			}
		case strings.HasPrefix(key, k.parts) && put:
			parts[key[len(k.parts):]] = e.Kv.Value
		}
	}
	if head == nil && !touched {
		return b, nil
	}
	bad := func(err error) (store.Batch, error) {
		w.s.mu.Lock()
		w.s.foreign = rev
		w.s.mu.Unlock()
		return store.Batch{}, corrupt("revision %d was not written by Plastron", rev).Because(err)
	}
	if head == nil {
		return bad(errors.New("no record"))
	}
	b.WriterTime, b.Writes, err = parseRecord(head)
	if err != nil {
		return bad(err)
	}
	for i := range b.Writes {
		for j := range b.Writes[i].Changes {
			c := &b.Writes[i].Changes[j]
			if c.Deleted {
				continue
			}
			value, there := values[c.Key]
			if !there {
				return bad(errors.New("a value is missing"))
			}
			var in *place
			if c.Value, in, err = parseValue(value); in != nil {
				c.Value, err = in.of(parts[hex.EncodeToString([]byte(in.part))])
			}
			if err != nil {
				return bad(err)
			}
		}
	}
	b.Prev, b.Position = w.at, store.Position{Epoch: w.at.Epoch, Revision: rev}
	return b, nil
}
