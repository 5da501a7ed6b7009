package etcd

import (
	"context"
	"crypto/rand"
	"encoding/hex"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// wideRounds is how often a transaction with more conditions than one request compares
// is tried while others write.
const wideRounds = 8

// commitLarge commits a transaction that is too large for one request, or has
// more conditions than one can compare.
func (s *Store) commitLarge(ctx context.Context, alone []store.Pending) error {
	it := &alone[0]
	t := it.Txn
	values := make([]string, len(t.Puts))
	var keep []clientv3.Op
	if weigh(t, s.keys) > s.limit.request {
		lease, err := s.client.Grant(ctx, partLease)
		if err != nil {
			return explain(err)
		}
		// Whatever became of the transaction: what it did not take off the lease goes.
		defer func() {
			ctx, done := context.WithTimeout(s.ctx, s.limit.attempt)
			defer done()
			if _, err := s.client.Revoke(ctx, lease.ID); err != nil {
				s.log.Warn("store lease not revoked, it will expire", "err", explain(err))
			}
		}()
		if keep, err = s.putParts(ctx, t, lease.ID, values); err != nil {
			return explain(err)
		}
	} else {
		for i := range t.Puts {
			values[i] = inline(t.Puts[i].Value)
		}
	}
	few := narrow(len(t.Conditions), len(t.Puts)+len(t.Deletes)+len(keep))
	bytes := 0
	for i := range t.Puts {
		bytes += len(s.keys.live) + 2*(len(t.Puts[i].Key)+perKey) + len(values[i])
	}
	shell := store.Txn{Caller: t.Caller, Deletes: t.Deletes}
	if few {
		shell.Conditions = t.Conditions
	}
	if bytes += weigh(&shell, s.keys); bytes > s.limit.request {
		it.Answer(s.position(), fault.New(fault.Invalid, "txn_too_large", "the transaction's keys have about %d bytes in etcd, the limit is %d", bytes, s.limit.request).
			Fix("split it into smaller transactions"))
		return nil
	}
	for round := 1; ; round++ {
		p := s.newPlan()
		if few {
			p.compare(s.keys, t)
		} else {
			revs, at, err := s.revisions(ctx, t)
			if err != nil {
				return s.failed(ctx, err, false)
			}
			if err := judge(t, revs); err != nil {
				it.Answer(store.Position{Epoch: p.epoch, Revision: at}, err)
				return nil
			}
			// Every write moves head: while it stays, what was judged holds.
			p.when = []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(s.keys.head), "=", int64(at))}
		}
		for i := range t.Puts {
			p.then = append(p.then, clientv3.OpPut(s.keys.live+t.Puts[i].Key, values[i]))
		}
		p.then = append(p.then, keep...)
		p.record(s.keys, s.finish(p, t, nil))
		if err := s.send(ctx, p, alone); err != nil || it.Answered {
			return err
		}
		if round == wideRounds { // the rest of the queue waits
			it.Answer(s.position(), fault.New(fault.Conflict, "store_moved", "others wrote %d times to the store while %d conditions were judged", round, len(t.Conditions)).
				Fix("read again and retry"))
			return nil
		}
	}
}

// putParts puts a transaction's values, as few parts that hang on a lease, and
// fills in what its keys will say. It returns the operations that take the parts
// off the lease.
func (s *Store) putParts(ctx context.Context, t *store.Txn, lease clientv3.LeaseID, values []string) (keep []clientv3.Op, err error) {
	var part []byte
	var in []int // the values in part
	flush := func() error {
		if len(in) == 0 {
			return nil
		}
		var id [16]byte
		rand.Read(id[:]) // never fails (crypto/rand)
		offset := 0
		for _, i := range in {
			n := len(t.Puts[i].Value)
			values[i] = place{string(id[:]), uint32(offset), uint32(n)}.String()
			offset += n
		}
		key := s.keys.parts + hex.EncodeToString(id[:])
		ctx, done := context.WithTimeout(ctx, s.limit.attempt)
		defer done()
		_, err := s.client.Put(clientv3.WithRequireLeader(ctx), key, string(part), clientv3.WithLease(lease))
		keep = append(keep, clientv3.OpPut(key, "", clientv3.WithIgnoreValue()))
		part, in = part[:0], in[:0]
		return err
	}
	for i := range t.Puts {
		value := t.Puts[i].Value
		if len(value) <= smallValue {
			values[i] = inline(value)
			continue
		}
		if len(part)+len(value) > store.MaxValue {
			if err := flush(); err != nil {
				return nil, err
			}
		}
		part, in = append(part, value...), append(in, i)
	}
	return keep, flush()
}

// revisions reads what a transaction's conditions are about, and the position,
// at one moment.
func (s *Store) revisions(ctx context.Context, t *store.Txn) (map[string]uint64, uint64, error) {
	revs := make(map[string]uint64)
	var at uint64
	var now int64
	for rest := t.Conditions; len(rest) > 0; {
		n := min(len(rest), maxOps-1)
		ops := make([]clientv3.Op, 0, n+1)
		for _, c := range rest[:n] {
			ops = append(ops, clientv3.OpGet(s.keys.live+c.Key, clientv3.WithKeysOnly(), clientv3.WithRev(now)))
		}
		resp, err := s.ask(ctx, nil, append(ops, clientv3.OpGet(s.keys.head, clientv3.WithKeysOnly(), clientv3.WithRev(now)))...)
		if err != nil {
			return nil, 0, err
		}
		for i := range n {
			revs[rest[i].Key] = revision(resp, i)
		}
		at = revision(resp, n)
		if now == 0 {
			now = resp.Header.Revision
		}
		rest = rest[n:]
	}
	return revs, at, nil
}
