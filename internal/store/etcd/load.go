package etcd

import (
	"context"
	"encoding/hex"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/store"
)

// A page of a snapshot aims at so many bytes. etcd counts all keys that are left for
// each page, so there must not be many pages.
const (
	pageBytes = 32 << 20
	firstPage = 64
	growth    = 8 // of the pages, at most
	maxPage   = 1 << 17
)

// Load implements store.Store. The snapshot is read in pages, all of one
// revision of etcd's.
func (s *Store) Load(ctx context.Context, f func(key string, rev uint64, value []byte) error) (store.Position, error) {
	if err := ctx.Err(); err != nil {
		return store.Position{}, s.failed(ctx, err, false)
	}
	bound, done, err := s.use(ctx)
	if err != nil {
		return store.Position{}, err
	}
	defer done()
	v, err := s.look(bound, false)
	if err != nil {
		return store.Position{}, s.told(ctx, err)
	}
	r := reader{s: s, rev: v.now}
	var refused error
	err = r.each(bound, func(kv *mvccpb.KeyValue) error {
		value, err := r.value(bound, kv)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		refused = f(string(kv.Key[len(s.keys.live):]), uint64(kv.ModRevision), value)
		return refused
	})
	switch {
	case refused != nil:
		return store.Position{}, refused
	case err != nil:
		return store.Position{}, s.told(ctx, err)
	}
	s.mu.Lock()
	s.loaded, s.snapshot = v.at.Epoch, v
	s.mu.Unlock()
	return v.at, nil
}

// use returns a context that ends with ctx or with the store.
func (s *Store) use(ctx context.Context) (context.Context, context.CancelFunc, error) {
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return nil, nil, store.Closed()
	}
	ctx, stop := context.WithCancel(ctx)
	undo := context.AfterFunc(s.ctx, stop)
	return ctx, func() { undo(); stop() }, nil
}

// told is failed for errors that may have passed through it with a context made
// by use.
func (s *Store) told(ctx context.Context, err error) error {
	if s.ctx.Err() != nil || ctx.Err() != nil {
		return s.failed(ctx, err, false)
	}
	return explain(err)
}

// reader reads at one revision.
type reader struct {
	s    *Store
	rev  int64
	name string // of the part read last: neighbours share it
	part []byte
}

// each calls f with the live keys, in order and in pages.
func (r *reader) each(ctx context.Context, f func(*mvccpb.KeyValue) error) error {
	limit := int64(firstPage)
	for from, more := r.s.keys.live, true; more; {
		resp, err := r.get(ctx, from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(r.s.keys.live)), clientv3.WithLimit(limit))
		if err != nil {
			return err
		}
		size := 1
		for _, kv := range resp.Kvs {
			if err := f(kv); err != nil {
				return err
			}
			size += len(kv.Key) + len(kv.Value)
			from = string(kv.Key) + "\x00"
		}
		more = resp.More
		limit = min(growth*limit, maxPage, max(1, pageBytes*int64(len(resp.Kvs))/int64(size)))
	}
	return nil
}

func (r *reader) get(ctx context.Context, key string, options ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, done := context.WithTimeout(ctx, 20*r.s.limit.attempt) // etcd may be busy with a page
	defer done()
	return r.s.client.Get(clientv3.WithRequireLeader(ctx), key, append(options, clientv3.WithRev(r.rev))...)
}

func (r *reader) value(ctx context.Context, kv *mvccpb.KeyValue) ([]byte, error) {
	value, in, err := parseValue(kv.Value)
	if err == nil && in != nil {
		if r.name != in.part {
			resp, err := r.get(ctx, r.s.keys.parts+hex.EncodeToString([]byte(in.part)))
			if err != nil {
				return nil, err
			}
			if len(resp.Kvs) != 1 {
				return nil, corrupt("a part is missing")
			}
			r.name, r.part = in.part, resp.Kvs[0].Value
		}
		value, err = in.of(r.part)
	}
	if err != nil {
		return nil, corrupt("key %q", kv.Key[len(r.s.keys.live):]).Because(err)
	}
	return value, nil
}
