package etcd

import (
	"context"
	"encoding/binary"
	"errors"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Stats implements store.Store.
func (s *Store) Stats(ctx context.Context) (store.Stats, error) {
	st := store.Stats{Engine: "etcd"}
	err := s.within(ctx, func(ctx context.Context) error {
		v, err := s.look(ctx, false)
		if err != nil {
			return err
		}
		st.End, st.Begin = v.at, store.Position{Epoch: v.at.Epoch}
		if st.Bytes, err = s.size(ctx); err != nil {
			return err
		}
		newest, err := s.headAt(ctx, 0)
		if err != nil || newest == nil {
			return err
		}
		begin, err := s.begin(ctx, v)
		if err != nil {
			return err
		}
		st.Batches = uint64(newest.Version)
		if begin != nil {
			st.Begin.Revision = uint64(begin.ModRevision)
			st.Batches -= uint64(begin.Version)
		}
		if st.Batches == 0 {
			return nil
		}
		oldest, err := s.oldest(ctx, begin, newest)
		if err == nil {
			st.Oldest, err = writtenAt(oldest)
		}
		return err
	})
	return st, err
}

// size is that of the first member that answers.
func (s *Store) size(ctx context.Context) (bytes int64, err error) {
	for _, endpoint := range s.client.Endpoints() {
		limited, stop := context.WithTimeout(ctx, s.limit.attempt)
		status, failed := s.client.Status(limited, endpoint)
		stop()
		if failed == nil {
			return status.DbSize, nil
		}
		err = failed
	}
	return 0, err
}

// Compactable implements store.Store. Revisions have gaps, but the version of
// head counts its batches, so that the one is found by halves.
func (s *Store) Compactable(ctx context.Context, keep uint64, before time.Time) (found uint64, err error) {
	err = s.within(ctx, func(ctx context.Context) error {
		v, err := s.look(ctx, false)
		if err != nil {
			return err
		}
		found = 0
		newest, err := s.headAt(ctx, 0)
		if err != nil || newest == nil || uint64(newest.Version) <= keep {
			return err
		}
		begin, err := s.begin(ctx, v)
		if err != nil {
			return err
		}
		low := newest.CreateRevision - 1 // dropped, or before the first
		if begin != nil {
			low = begin.ModRevision
		}
		for high := newest.ModRevision; low < high; {
			mid := low + (high-low+1)/2
			at, err := s.headAt(ctx, mid)
			if err != nil {
				return err
			}
			old := at != nil && uint64(at.Version) <= uint64(newest.Version)-keep
			if old {
				t, err := writtenAt(at)
				if err != nil {
					return err
				}
				old = t.Before(before)
			}
			if old {
				low, found = mid, uint64(at.ModRevision)
			} else {
				high = mid - 1
			}
		}
		if begin != nil && found <= uint64(begin.ModRevision) {
			found = 0
		}
		return nil
	})
	return found, err
}

// compactions is how many compactions by others may overtake one reading.
const compactions = 10

// within runs f as long as ctx and the store live, and again when others have
// compacted what it was reading.
func (s *Store) within(ctx context.Context, f func(ctx context.Context) error) error {
	bound, done, err := s.use(ctx)
	if err != nil {
		return err
	}
	defer done()
	limited, stop := context.WithTimeout(bound, s.limit.commit)
	defer stop()
	err = f(limited)
	for range compactions {
		if !errors.Is(err, rpctypes.ErrCompacted) {
			break
		}
		err = f(limited)
	}
	if err != nil {
		return s.told(ctx, err)
	}
	return nil
}

// headAt reads head as it was at a revision (0: now); nil if it was not there.
func (s *Store) headAt(ctx context.Context, rev int64) (*mvccpb.KeyValue, error) {
	resp, err := s.client.Get(clientv3.WithRequireLeader(ctx), s.keys.head, clientv3.WithRev(rev))
	if err != nil || len(resp.Kvs) == 0 {
		return nil, err
	}
	return resp.Kvs[0], nil
}

// begin is head as it was where a watcher may begin at the earliest: what is
// before that is compacted, or of another epoch. Nil: at revision 0.
func (s *Store) begin(ctx context.Context, v sight) (*mvccpb.KeyValue, error) {
	rev, err := s.compacted(ctx)
	if err != nil {
		return nil, err
	}
	return s.headAt(ctx, max(rev, v.metaRev))
}

// compacted is up to which revision etcd has no history; below it nothing can be
// read. Only a watcher is told: head was written, so one from the beginning gets
// either its first change or that.
func (s *Store) compacted(ctx context.Context) (int64, error) {
	ctx, stop := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer stop()
	for resp := range s.client.Watch(ctx, s.keys.head, clientv3.WithRev(1)) {
		err := resp.Err()
		if errors.Is(err, rpctypes.ErrCompacted) {
			return resp.CompactRevision, nil
		}
		if err != nil || len(resp.Events) > 0 {
			return 0, err
		}
	}
	return 0, context.Cause(ctx)
}

// oldest is head as the first batch after another left it.
func (s *Store) oldest(ctx context.Context, after, newest *mvccpb.KeyValue) (*mvccpb.KeyValue, error) {
	if after == nil {
		return s.headAt(ctx, newest.CreateRevision)
	}
	ctx, stop := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer stop()
	for resp := range s.client.Watch(ctx, s.keys.head, clientv3.WithRev(after.ModRevision+1)) {
		if err := resp.Err(); err != nil {
			return nil, err
		}
		if len(resp.Events) > 0 {
			return resp.Events[0].Kv, nil
		}
	}
	return nil, context.Cause(ctx)
}

// writtenAt is the writer's time of a batch.
func writtenAt(head *mvccpb.KeyValue) (time.Time, error) {
	if len(head.Value) < recordHeader || head.Value[0] != format {
		return time.Time{}, corrupt("head is not a record")
	}
	return time.Unix(0, int64(binary.BigEndian.Uint64(head.Value[1:]))).UTC(), nil
}

// behind tells a watcher at a revision of which etcd's history is gone from where
// it can go on, if no batch is among what is gone.
func (s *Store) behind(ctx context.Context, at uint64) (int64, error) {
	gone, err := s.compacted(ctx)
	if err != nil {
		return 0, err
	}
	head, err := s.headAt(ctx, gone)
	if err != nil {
		return 0, err
	}
	if rev := head.GetModRevision(); uint64(rev) != at {
		return 0, fault.New(fault.Precondition, "compacted", "the log after revision %d is gone", at)
	}
	return gone + 1, nil
}
