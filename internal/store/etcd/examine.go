package etcd

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Examine looks at a store as a server would find it, calls each for those of some
// keys that are there, and writes nothing. Its errors are those of Open; of
// fault.NotFound the engine is known.
func (c Config) Examine(ctx context.Context, keys []string, each func(key string, value []byte) error) (store.Look, error) {
	limit := defaultLimits()
	limit.attempt = 10 * time.Second // nothing else waits for it
	return c.examine(ctx, limit, keys, each)
}

func (c Config) examine(ctx context.Context, limit limits, keys []string, each func(key string, value []byte) error) (found store.Look, err error) {
	if err := c.Validate(); err != nil {
		return found, err
	}
	life, stop := context.WithCancel(ctx)
	defer stop()
	s := &Store{log: slog.New(slog.DiscardHandler), limit: limit, keys: newKeys(c.prefix()), ctx: life, stop: stop}
	if s.client, err = c.connect(ctx, life, s.limit); err != nil {
		return found, err
	}
	defer s.client.Close()
	get := []clientv3.Op{clientv3.OpGet(s.keys.meta), clientv3.OpGet(s.keys.head, clientv3.WithKeysOnly())}
	for _, key := range keys {
		get = append(get, clientv3.OpGet(s.keys.live+key))
	}
	resp, err := s.ask(ctx, nil, get...)
	if err != nil {
		return found, s.failed(ctx, err, true)
	}
	found.Engine = "etcd at " + c.Address()
	var members store.Remark
	members, found.Bytes = s.members(ctx)
	found.Remarks = append(found.Remarks, members, s.alarms(ctx))
	stored := first(resp, 0)
	if stored == nil {
		return found, fault.New(fault.NotFound, "store_not_found", "there is no store under etcd's prefix %q", s.keys.prefix).
			Fix("see whether the configuration names the right place; a first server makes the store")
	}
	m, err := parseMeta(stored.Value, s.keys.prefix)
	if err != nil {
		return found, err
	}
	found.Epoch, found.Revision = m.epoch, revision(resp, 1)
	r := reader{s: s, rev: resp.Header.Revision}
	for i, key := range keys {
		kv := first(resp, 2+i)
		if kv == nil {
			continue
		}
		value, err := r.value(ctx, kv)
		if err != nil {
			return found, s.failed(ctx, err, true)
		}
		if err := each(key, value); err != nil {
			return found, err
		}
	}
	return found, nil
}

// members asks each member how it is, and returns the size of the largest store.
func (s *Store) members(ctx context.Context) (store.Remark, int64) {
	var away, sick []string
	var bytes, quota int64
	for _, endpoint := range s.client.Endpoints() {
		limited, stop := context.WithTimeout(ctx, s.limit.attempt)
		status, err := s.client.Status(limited, endpoint)
		stop()
		switch {
		case err != nil && explain(err).Reason == "store_denied":
			return store.Remark{About: "members", Found: "the store's user may not ask them how they are"}, 0
		case err != nil:
			away = append(away, endpoint)
		case status.Leader == 0 || status.IsLearner:
			sick = append(sick, endpoint)
		}
		if err == nil {
			bytes, quota = max(bytes, status.DbSize), max(quota, status.DbSizeQuota)
		}
	}
	return judgeMembers(len(s.client.Endpoints()), away, sick, bytes, quota), bytes
}

// judgeMembers judges the members that are configured. Older ones do not tell
// their quota: 0.
func judgeMembers(all int, away, sick []string, bytes, quota int64) store.Remark {
	r := store.Remark{About: "members"}
	switch {
	case len(away) > 0:
		r.Found, r.Fix = fmt.Sprintf("%d of %d do not answer: %s", len(away), all, strings.Join(away, ", ")), "start them; with half of all members away nothing can be written"
	case len(sick) > 0:
		r.Found, r.Fix = fmt.Sprintf("%s of %d have no leader, or no vote yet", strings.Join(sick, ", "), all), "see that they reach the others"
	case quota > 0 && bytes > quota/10*8:
		r.Found, r.Fix = fmt.Sprintf("%d of the %d MiB that etcd may take are used", bytes>>20, quota>>20), "defragment it, or raise --quota-backend-bytes: at the end nothing is written"
	default:
		r.Found = fmt.Sprintf("all %d answer and have a leader; %d MiB on disk", all, bytes>>20)
	}
	return r
}

// alarms asks for what etcd itself raises an alarm about.
func (s *Store) alarms(ctx context.Context) store.Remark {
	limited, stop := context.WithTimeout(ctx, s.limit.attempt)
	defer stop()
	resp, err := s.client.AlarmList(limited)
	if err != nil {
		return store.Remark{About: "alarms", Found: fmt.Sprintf("etcd does not tell them: %s", explain(err).Message)}
	}
	r := store.Remark{About: "alarms", Found: "none"}
	for _, a := range resp.Alarms {
		switch a.Alarm {
		case etcdserverpb.AlarmType_NOSPACE:
			full := explain(rpctypes.ErrNoSpace)
			return store.Remark{About: "alarms", Found: full.Message, Fix: full.Remedy, Fails: true}
		case etcdserverpb.AlarmType_CORRUPT:
			r.Found, r.Fix, r.Fails = fmt.Sprintf("member %x holds other data than the rest", a.MemberID), "replace that member: remove it from the cluster and add it with an empty directory", true
		}
	}
	return r
}
