package etcd

import (
	"context"
	"encoding/binary"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// etcd's default limit is 128 operations or comparisons in each level of a
// transaction and those above it. Lists that are longer become trees.
const (
	maxOps     = 128
	branch     = 40          // of a tree; three levels of it stay below maxOps
	flat       = maxOps - 2  // operations beside w and head in a flat list
	compared   = maxOps - 3  // conditions beside a flat list; w and head are compared, and w may be put
	overTree   = maxOps - 82 // conditions beside a tree
	perKey     = 32          // bytes that the protocol adds to a key, at most
	partLease  = 120         // seconds that a part may wait for its transaction
	smallValue = 64          // bytes of a value that no part would make smaller
)

// weigh returns about how many bytes a transaction has in a request.
func weigh(t *store.Txn, k keys) (bytes int) {
	bytes = len(t.Caller)
	for i := range t.Conditions { // once to compare, once to read
		bytes += 2 * (len(k.live) + len(t.Conditions[i].Key) + perKey)
	}
	for i := range t.Puts { // in k/ and in the record
		bytes += len(k.live) + 2*(len(t.Puts[i].Key)+perKey) + len(t.Puts[i].Value)
	}
	for _, key := range t.Deletes {
		bytes += len(k.live) + 2*(len(key)+perKey)
	}
	return bytes
}

// narrow tells whether so many conditions and changes go into one request.
func narrow(conditions, changes int) bool {
	return conditions <= overTree || conditions <= compared && changes <= flat
}

// fits returns how many of a group's transactions go into one request: at least
// one, whatever its size.
func fits(group []store.Txn, k keys, limit int) int {
	bytes, conditions, changes := 0, 0, 0
	for i := range group {
		bytes += weigh(&group[i], k)
		conditions += len(group[i].Conditions)
		changes += len(group[i].Puts) + len(group[i].Deletes)
		if i > 0 && (bytes > limit || !narrow(conditions, changes)) {
			return i
		}
	}
	return len(group)
}

// tree makes one operation list of any length fit into a transaction.
func tree(ops []clientv3.Op) []clientv3.Op {
	for limit := maxOps; len(ops) > limit; limit = branch {
		var up []clientv3.Op
		for len(ops) > 0 {
			n := min(branch, len(ops))
			up = append(up, clientv3.OpTxn(nil, ops[:n:n], nil))
			ops = ops[n:]
		}
		ops = up
	}
	return ops
}

// commitGroup commits transactions that are judged on the same state, and
// answers each. It returns an error when etcd does not answer.
func (s *Store) commitGroup(group []store.Pending) error {
	ctx, done := context.WithTimeout(s.ctx, s.limit.commit)
	defer done()
	for i := range group {
		if err := group[i].Given(); err != nil {
			group[i].Answer(s.position(), err)
		}
	}
	var err error
	if one := group[0].Txn; len(group) == 1 && (weigh(one, s.keys) > s.limit.request || !narrow(len(one.Conditions), len(one.Puts)+len(one.Deletes))) {
		err = s.commitLarge(ctx, group)
	} else {
		for err == nil && open(group) > 0 { // each round answers one at least
			p := s.plan(group)
			err = s.send(ctx, p, group)
		}
	}
	if err == nil {
		return nil
	}
	for i := range group {
		if !group[i].Answered {
			group[i].Answer(s.position(), err)
		}
	}
	if fault.ReasonOf(err) == "outcome_unknown" {
		return fault.New(fault.Unavailable, "store_timeout", "etcd did not answer in time; nothing was written").
			Fix("see that more than half of its members run and reach each other").Because(err)
	}
	return err
}

func open(group []store.Pending) (n int) {
	for i := range group {
		if !group[i].Answered {
			n++
		}
	}
	return n
}

// plan is one etcd transaction without what send adds.
type plan struct {
	seq    uint64
	epoch  store.Epoch
	writes bool
	when   []clientv3.Cmp
	then   []clientv3.Op
	read   []clientv3.Op // what when is about
}

// plan makes the transaction of what is not answered yet.
func (s *Store) plan(group []store.Pending) *plan {
	p := s.newPlan()
	var writes []store.Write
	for i := range group {
		t := group[i].Txn
		if group[i].Answered {
			continue
		}
		p.compare(s.keys, t)
		for j := range t.Puts {
			p.then = append(p.then, clientv3.OpPut(s.keys.live+t.Puts[j].Key, inline(t.Puts[j].Value)))
		}
		writes = s.finish(p, t, writes)
	}
	p.record(s.keys, writes)
	return p
}

func (s *Store) newPlan() *plan {
	s.seq++
	s.mu.Lock()
	defer s.mu.Unlock()
	return &plan{seq: s.seq, epoch: s.loaded}
}

// compare adds a transaction's conditions.
func (p *plan) compare(k keys, t *store.Txn) {
	for _, c := range t.Conditions {
		p.when = append(p.when, clientv3.Compare(clientv3.ModRevision(k.live+c.Key), "=", int64(c.Revision)))
		p.read = append(p.read, clientv3.OpGet(k.live+c.Key, clientv3.WithKeysOnly()))
	}
}

// finish adds what every transaction has: its deletes, and its part of the record.
func (s *Store) finish(p *plan, t *store.Txn, writes []store.Write) []store.Write {
	for _, key := range t.Deletes {
		p.then = append(p.then, clientv3.OpDelete(s.keys.live+key))
	}
	if len(t.Puts)+len(t.Deletes) == 0 {
		return writes
	}
	return append(writes, outline(t.Write()))
}

// record adds head, if there is something to write.
func (p *plan) record(k keys, writes []store.Write) {
	if p.writes = len(writes) > 0; p.writes {
		p.then = append(p.then, clientv3.OpPut(k.head, string(newRecord(time.Now(), writes))))
	}
}

// outcome is what etcd said to a plan.
type outcome struct {
	ok   bool
	at   uint64            // where it is or, if not ok, the position at which it was judged
	revs map[string]uint64 // if not ok: of the keys in read
}

// send brings a plan to etcd, and answers the items that are decided by it: all,
// or those whose conditions failed.
func (s *Store) send(ctx context.Context, p *plan, group []store.Pending) error {
	out, err := s.settle(ctx, p)
	if err != nil {
		return err
	}
	at := store.Position{Epoch: p.epoch, Revision: out.at}
	for i := range group {
		it := &group[i]
		if it.Answered {
			continue
		}
		if out.ok {
			it.Answer(at, nil)
		} else if err := judge(it.Txn, out.revs); err != nil && len(p.read) > 0 { // else its conditions are judged beforehand
			it.Answer(at, err)
		}
	}
	return nil
}

// judge returns a conflict if one of the transaction's conditions does not hold.
func judge(t *store.Txn, revs map[string]uint64) error {
	for i := range t.Conditions {
		c := &t.Conditions[i]
		if at := revs[c.Key]; at != c.Revision {
			return fault.New(fault.Conflict, "key_changed", "key %q is at revision %d, expected %d", c.Key, at, c.Revision).
				Fix("read it again and retry")
		}
	}
	return nil
}

// settle brings a plan to etcd and returns what became of it. It is sent again
// while the answer stays away. After an error it is not there and never will be,
// unless the reason is "outcome_unknown".
func (s *Store) settle(ctx context.Context, p *plan) (outcome, error) {
	unsure := false // an attempt may have arrived, or may still
	giveUp := func(err error) (outcome, error) {
		if unsure {
			err = fault.New(fault.Unavailable, "outcome_unknown", "etcd did not answer while it was written to").
				Fix("look whether the change is there once etcd answers again").Because(err)
		}
		return outcome{}, err
	}
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		at := s.position()
		if at.Epoch != p.epoch {
			return giveUp(fault.New(fault.Unavailable, "epoch_changed", "the store has a new epoch, %s; nothing was written", at.Epoch).
				Fix("load it again and retry"))
		}
		if err := s.putFence(ctx); err != nil {
			return giveUp(err)
		}
		resp, sent, err := s.try(ctx, p, at.Revision, unsure)
		if err == nil {
			out, known, err := s.read(ctx, p, resp, unsure)
			if known || err != nil {
				return out, err
			}
			if unsure && s.fence == 0 { // w was removed, and with it the trace of what arrived
				return giveUp(nil)
			}
			continue
		}
		if full := explain(err); p.writes && full.Reason == "store_full" {
			there, known := s.arrived(ctx, p)
			if there.ok {
				return there, nil
			}
			unsure = unsure || !known
			return giveUp(full)
		}
		if refused(err) {
			return giveUp(explain(err))
		}
		unsure = unsure || sent && p.writes
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return giveUp(explain(err))
		}
	}
}

// try sends a plan once, and tells whether it left for a server.
func (s *Store) try(ctx context.Context, p *plan, head uint64, unsure bool) (*clientv3.TxnResponse, bool, error) {
	when := append([]clientv3.Cmp{
		clientv3.Compare(clientv3.ModRevision(s.keys.writer), "=", s.fence),
		clientv3.Compare(clientv3.ModRevision(s.keys.head), ">", int64(head)-1),
	}, p.when...)
	then := []clientv3.Op{clientv3.OpGet(s.keys.head, clientv3.WithKeysOnly())}
	if p.writes {
		then = tree(append(p.then, clientv3.OpPut(s.keys.writer, sequence(p.seq))))
	}
	otherwise := append([]clientv3.Op{clientv3.OpGet(s.keys.writer), clientv3.OpGet(s.keys.head, clientv3.WithKeysOnly())}, p.read...)
	if unsure {
		// What is answered now must not be undone by an attempt that is still under
		// way: move w on, unless that attempt has.
		otherwise = append(otherwise, clientv3.OpTxn(when[:1:1], []clientv3.Op{clientv3.OpPut(s.keys.writer, sequence(0))}, nil))
	}
	ctx, done := context.WithTimeout(ctx, s.limit.attempt)
	defer done()
	ctx, sent := noteSent(ctx)
	resp, err := s.client.Txn(clientv3.WithRequireLeader(ctx)).If(when...).Then(then...).Else(otherwise...).Commit()
	return resp, sent.Load(), err
}

// arrived looks for a plan that etcd refused for want of space: the one that takes
// it over its quota is refused, and applied all the same. What is not there when
// that was answered does not come.
func (s *Store) arrived(ctx context.Context, p *plan) (there outcome, known bool) {
	resp, err := s.ask(ctx, nil, clientv3.OpGet(s.keys.writer))
	if err != nil || resp.Header.ClusterId != s.cluster() || first(resp, 0) == nil {
		return outcome{}, false
	}
	if w := first(resp, 0); string(w.Value) == sequence(p.seq) {
		s.fence = w.ModRevision
		there = outcome{ok: true, at: uint64(w.ModRevision)}
		s.saw(store.Position{Epoch: p.epoch, Revision: there.at})
	}
	return there, true
}

func sequence(n uint64) string { return string(binary.BigEndian.AppendUint64(nil, n)) }

// read makes an outcome of an answer. known is false when the plan has to be
// sent again because w was not what it should be, or the store not where.
func (s *Store) read(ctx context.Context, p *plan, resp *clientv3.TxnResponse, unsure bool) (out outcome, known bool, err error) {
	now := uint64(resp.Header.Revision)
	if resp.Header.ClusterId != s.cluster() {
		// The endpoints lead to another cluster since the last look at it.
		if _, err := s.look(ctx, false); err != nil || !p.writes {
			return out, false, err
		}
		return out, false, fault.New(fault.Unavailable, "outcome_unknown", "etcd was replaced by another cluster while it was written to").
			Fix("load the store again")
	}
	if resp.Succeeded {
		out = outcome{ok: true, at: now}
		if p.writes {
			s.fence = resp.Header.Revision
			s.saw(store.Position{Epoch: p.epoch, Revision: now})
		} else {
			out.at = revision(resp, 0)
		}
		return out, true, nil
	}
	was := s.fence
	s.fence = int64(revision(resp, 0))
	mine := s.fence != was && s.fence != 0 && string(first(resp, 0).Value) == sequence(p.seq)
	if mine {
		out = outcome{ok: true, at: uint64(s.fence)}
	} else {
		out = outcome{at: revision(resp, 1), revs: make(map[string]uint64)}
		for i := range p.read {
			if kv := first(resp, 2+i); kv != nil {
				out.revs[string(kv.Key[len(s.keys.live):])] = uint64(kv.ModRevision)
			}
		}
	}
	at := s.position()
	lost := s.fence != was
	if unsure && !lost {
		s.fence = resp.Header.Revision
	}
	if mine {
		s.saw(store.Position{Epoch: p.epoch, Revision: out.at})
		return out, true, nil
	}
	if lost || out.at < at.Revision {
		_, err := s.look(ctx, false)
		return out, false, err
	}
	return out, true, nil
}

// first returns the key that the i-th operation has read, or nil.
func first(resp *clientv3.TxnResponse, i int) *mvccpb.KeyValue {
	if i < len(resp.Responses) {
		if kvs := resp.Responses[i].GetResponseRange().GetKvs(); len(kvs) > 0 {
			return kvs[0]
		}
	}
	return nil
}

func revision(resp *clientv3.TxnResponse, i int) uint64 {
	if kv := first(resp, i); kv != nil {
		return uint64(kv.ModRevision)
	}
	return 0
}
