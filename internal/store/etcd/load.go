package etcd

import (
	"context"
	"encoding/hex"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/store"
)

// A page of a snapshot aims at so many bytes.
const (
	pageBytes = 4 << 20
	firstPage = 64
	maxPage   = 8192
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
	limit := int64(firstPage)
	for from, more := s.keys.live, true; more; {
		resp, err := r.get(bound, from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(s.keys.live)), clientv3.WithLimit(limit))
		if err != nil {
			return store.Position{}, s.told(ctx, err)
		}
		size := 1
		for _, kv := range resp.Kvs {
			value, err := r.value(bound, kv)
			if err != nil {
				return store.Position{}, s.told(ctx, err)
			}
			if err := ctx.Err(); err != nil {
				return store.Position{}, s.failed(ctx, err, false)
			}
			if err := f(string(kv.Key[len(s.keys.live):]), uint64(kv.ModRevision), value); err != nil {
				return store.Position{}, err
			}
			size += len(kv.Key) + len(kv.Value)
			from = string(kv.Key) + "\x00"
		}
		more = resp.More
		limit = min(2*limit, maxPage, max(1, pageBytes*int64(len(resp.Kvs))/int64(size)))
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

func (r *reader) get(ctx context.Context, key string, options ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, done := context.WithTimeout(ctx, 10*r.s.limit.attempt)
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
