package etcd

import (
	"context"
	"encoding/hex"
	"errors"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Compact implements store.Store. etcd compacts all its keys, not only those of
// the store; what was compacted by others stays compacted.
func (s *Store) Compact(ctx context.Context, before uint64) error {
	bound, done, err := s.use(ctx)
	if err != nil {
		return err
	}
	defer done()
	v, err := s.look(bound, false)
	if err != nil {
		return s.told(ctx, err)
	}
	before = min(before, v.at.Revision)
	if before == 0 {
		return nil
	}
	limited, stop := context.WithTimeout(bound, s.limit.commit)
	defer stop()
	if _, err := s.client.Compact(clientv3.WithRequireLeader(limited), int64(before)); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		return s.told(ctx, err)
	}
	// Who has compacted more meanwhile tidies up, too.
	if err := s.tidy(bound, before); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		return s.told(ctx, err)
	}
	return nil
}

// tidy removes the w keys that were last put before a revision (a store that
// still needs its own puts it again) and the parts that no live key needs.
func (s *Store) tidy(ctx context.Context, before uint64) error {
	if err := s.remove(ctx, s.keys.writers, func(key string, rev int64) bool { return key != s.keys.writer && rev <= int64(before) }, 0); err != nil {
		return err
	}
	resp, err := s.ask(ctx, nil, clientv3.OpGet(s.keys.parts, clientv3.WithPrefix(), clientv3.WithCountOnly()))
	if err != nil || resp.Responses[0].GetResponseRange().Count == 0 {
		return err
	}
	// A part is needed by keys of the transaction that took it off its lease, or by
	// none ever again. So what is off its lease now and not needed now can go.
	r := reader{s: s, rev: resp.Header.Revision}
	needed := make(map[string]bool)
	err = r.each(ctx, func(kv *mvccpb.KeyValue) error {
		if _, in, err := parseValue(kv.Value); err == nil && in != nil {
			needed[s.keys.parts+hex.EncodeToString([]byte(in.part))] = true
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.remove(ctx, s.keys.parts, func(key string, _ int64) bool { return !needed[key] }, r.rev)
}

// remove deletes those of a prefix's keys, as they are at a revision (0: now),
// that unwanted tells and that are on no lease, unless they change meanwhile.
func (s *Store) remove(ctx context.Context, prefix string, unwanted func(key string, rev int64) bool, rev int64) error {
	r := reader{s: s, rev: rev}
	resp, err := r.get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	for _, kv := range resp.Kvs {
		key := string(kv.Key)
		if kv.Lease != 0 || !unwanted(key, kv.ModRevision) {
			continue
		}
		if _, err := s.ask(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", kv.ModRevision)}, clientv3.OpDelete(key)); err != nil {
			return err
		}
	}
	return nil
}
