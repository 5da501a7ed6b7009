package etcd

import (
	"context"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// sight is what a look at the store found.
type sight struct {
	at      store.Position
	metaRev int64
	now     int64 // etcd's revision
}

// look reads meta and head, and compares them with what was known: a store that
// lives in another cluster, or has gone back in time, gets a new epoch. While
// opening it creates what is missing.
func (s *Store) look(ctx context.Context, opening bool) (sight, error) {
	s.looking.Lock()
	defer s.looking.Unlock()
	for {
		known := s.position() // before asking: the commit loop and watchers go on
		resp, err := s.ask(ctx, nil, clientv3.OpGet(s.keys.meta), clientv3.OpGet(s.keys.head, clientv3.WithKeysOnly()))
		if err != nil {
			return sight{}, s.failed(ctx, err, opening)
		}
		cluster, head := resp.Header.ClusterId, revision(resp, 1)
		stored := first(resp, 0)
		if stored == nil {
			if !opening {
				return sight{}, fault.New(fault.Unavailable, "store_missing", "the store under etcd's prefix %q was removed", s.keys.prefix).
					Fix("restore a backup and restart the servers")
			}
			if s.exists {
				return sight{}, fault.New(fault.NotFound, "store_not_found", "there is no store under etcd's prefix %q", s.keys.prefix).
					Fix("see whether the configuration names the right place")
			}
			if err := s.create(ctx, cluster); err != nil {
				return sight{}, s.failed(ctx, err, opening)
			}
			continue
		}
		m, err := parseMeta(stored.Value, s.keys.prefix)
		if err != nil {
			return sight{}, err
		}
		s.mu.Lock()
		reason := ""
		switch {
		case m.cluster != cluster:
			reason = "copied"
		case m.epoch == known.Epoch && head < known.Revision:
			reason = "restored"
		case m.epoch != s.meta.epoch:
			s.meta, s.head = m, head
		default:
			s.meta, s.head = m, max(s.head, head)
		}
		s.mu.Unlock()
		if reason == "" {
			return sight{store.Position{Epoch: m.epoch, Revision: head}, stored.ModRevision, resp.Header.Revision}, nil
		}
		m = meta{store.NewEpoch(), cluster}
		// Without their w keys no server finishes what it began in the old epoch.
		done, err := s.ask(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(s.keys.meta), "=", stored.ModRevision)},
			clientv3.OpPut(s.keys.meta, m.text()), clientv3.OpDelete(s.keys.writers, clientv3.WithPrefix()))
		if err != nil {
			return sight{}, s.failed(ctx, err, opening)
		}
		if done.Succeeded {
			s.log.Warn("store has a new epoch", "dir", s.keys.prefix, "reason", reason, "epoch", m.epoch.String(), "revision", head)
			if opening {
				s.Opened = Opened{NewEpoch: true, Reason: reason}
			}
		}
	}
}

// create makes the store, unless another server is quicker.
func (s *Store) create(ctx context.Context, cluster uint64) error {
	m := meta{store.NewEpoch(), cluster}
	all := clientv3.Compare(clientv3.CreateRevision(s.keys.prefix), "=", 0).WithPrefix()
	resp, err := s.ask(ctx, []clientv3.Cmp{all}, clientv3.OpPut(s.keys.meta, m.text()))
	if err != nil {
		return err
	}
	if resp.Succeeded {
		s.Opened = Opened{NewEpoch: true, Reason: "created"}
		return nil
	}
	resp, err = s.ask(ctx, nil, clientv3.OpGet(s.keys.meta))
	if err == nil && first(resp, 0) == nil {
		return foreign(s.keys.prefix)
	}
	return err
}

// ask sends a small transaction with a deadline.
func (s *Store) ask(ctx context.Context, when []clientv3.Cmp, then ...clientv3.Op) (*clientv3.TxnResponse, error) {
	ctx, done := context.WithTimeout(ctx, s.limit.attempt)
	defer done()
	return s.client.Txn(clientv3.WithRequireLeader(ctx)).If(when...).Then(then...).Commit()
}

// failed makes of a failed call's error what its caller is told: that the store
// was closed, that the caller gave up, or what is wrong with etcd.
func (s *Store) failed(ctx context.Context, err error, opening bool) error {
	switch {
	case s.ctx.Err() != nil:
		return store.Closed()
	case ctx.Err() != nil:
		return fault.New(fault.Unavailable, "canceled", "the call was given up").Because(ctx.Err())
	case opening:
		return lasting(err)
	}
	return explain(err)
}

// putFence puts the key w if it is not known. Only the commit loop calls it.
func (s *Store) putFence(ctx context.Context) error {
	for s.fence == 0 {
		v, err := s.look(ctx, false)
		if err != nil {
			return err
		}
		resp, err := s.ask(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(s.keys.meta), "=", v.metaRev)},
			clientv3.OpPut(s.keys.writer, sequence(0)))
		if err != nil {
			return s.failed(ctx, err, false)
		}
		if resp.Succeeded {
			s.fence = resp.Header.Revision
		}
	}
	return nil
}
