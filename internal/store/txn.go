package store

import (
	"github.com/plastron/plastron/internal/fault"
)

// Limits of one transaction, so that the work of a commit and the size of a log
// row are bounded before either begins.
const (
	MaxCaller  = 4096
	MaxTxnKeys = 16384   // conditions, puts and deletes together
	MaxTxnSize = 8 << 20 // keys, values and caller together
)

// Validate refuses (fault.Invalid) a transaction that no engine may take: over
// a limit, with an empty key, or that names a key twice among its conditions or
// twice among its changes. Engines call it before anything else.
func (t *Txn) Validate() error {
	if len(t.Caller) > MaxCaller {
		return fault.New(fault.Invalid, "caller_too_long", "the caller's name has %d bytes, the limit is %d", len(t.Caller), MaxCaller)
	}
	if n := len(t.Conditions) + len(t.Puts) + len(t.Deletes); n > MaxTxnKeys {
		return fault.New(fault.Invalid, "too_many_keys", "the transaction names %d keys, the limit is %d", n, MaxTxnKeys).
			Fix("split it into smaller transactions")
	}
	conditions := newKeySet(len(t.Conditions))
	for i := range t.Conditions {
		if err := conditions.add(t.Conditions[i].Key); err != nil {
			return err
		}
	}
	changes := newKeySet(len(t.Puts) + len(t.Deletes))
	for i := range t.Puts {
		if err := changes.add(t.Puts[i].Key); err != nil {
			return err
		}
		if n := len(t.Puts[i].Value); n > MaxValue {
			return fault.New(fault.Invalid, "value_too_large", "the value of key %q has %d bytes, the limit is %d", t.Puts[i].Key, n, MaxValue)
		}
	}
	for _, key := range t.Deletes {
		if err := changes.add(key); err != nil {
			return err
		}
	}
	if n := t.size(); n > MaxTxnSize {
		return fault.New(fault.Invalid, "txn_too_large", "the transaction has %d bytes, the limit is %d", n, MaxTxnSize).
			Fix("split it into smaller transactions")
	}
	return nil
}

// keySet finds a key named twice. Most transactions name a handful of keys, for
// which comparing all is cheaper than a map.
type keySet struct {
	few  []string
	many map[string]struct{}
}

func newKeySet(n int) keySet {
	if n > 8 {
		return keySet{many: make(map[string]struct{}, n)}
	}
	return keySet{few: make([]string, 0, 8)}
}

func (s *keySet) add(key string) error {
	if key == "" {
		return fault.New(fault.Invalid, "key_empty", "a key is empty")
	}
	if len(key) > MaxKey {
		return fault.New(fault.Invalid, "key_too_long", "key %q… has %d bytes, the limit is %d", key[:64], len(key), MaxKey)
	}
	twice := false
	if s.many != nil {
		_, twice = s.many[key]
		s.many[key] = struct{}{}
	} else {
		for _, k := range s.few {
			twice = twice || k == key
		}
		s.few = append(s.few, key)
	}
	if twice {
		return fault.New(fault.Invalid, "key_twice", "key %q is named twice in one transaction", key)
	}
	return nil
}

// size is what a transaction adds to its group.
func (t *Txn) size() int {
	n := len(t.Caller)
	for i := range t.Puts {
		n += len(t.Puts[i].Key) + len(t.Puts[i].Value)
	}
	for _, key := range t.Deletes {
		n += len(key)
	}
	return n
}

// Groups cuts valid transactions, in order, into the runs that one group commit
// each may hold: at most MaxGroup transactions and MaxGroupSize bytes (a single
// larger transaction stands alone), and no key that one of them writes is read
// or written by another. So every transaction of a group is judged on the same
// state, and one that conflicts with an earlier one never overtakes it: it
// comes in a later group. Two that only read the same key may share a group.
func Groups(txns []Txn) [][]Txn {
	var groups [][]Txn
	written := make(map[string]bool) // by the group so far; false: only read
	start, size := 0, 0
	for i := range txns {
		t := &txns[i]
		n := t.size()
		if i > start && (i-start == MaxGroup || size+n > MaxGroupSize || t.touches(written)) {
			groups = append(groups, txns[start:i:i])
			start, size = i, 0
			clear(written)
		}
		size += n
		for j := range t.Conditions {
			if key := t.Conditions[j].Key; !written[key] {
				written[key] = false
			}
		}
		for j := range t.Puts {
			written[t.Puts[j].Key] = true
		}
		for _, key := range t.Deletes {
			written[key] = true
		}
	}
	if start < len(txns) {
		groups = append(groups, txns[start:len(txns):len(txns)])
	}
	return groups
}

// touches reports whether t reads a key that is written, or writes one that is
// read or written.
func (t *Txn) touches(written map[string]bool) bool {
	for i := range t.Conditions {
		if written[t.Conditions[i].Key] {
			return true
		}
	}
	for i := range t.Puts {
		if _, ok := written[t.Puts[i].Key]; ok {
			return true
		}
	}
	for _, key := range t.Deletes {
		if _, ok := written[key]; ok {
			return true
		}
	}
	return false
}

// Write returns the transaction's part of a batch. It shares the values.
func (t *Txn) Write() Write {
	w := Write{Caller: t.Caller, Changes: make([]Change, 0, len(t.Puts)+len(t.Deletes))}
	for i := range t.Puts {
		w.Changes = append(w.Changes, Change{Key: t.Puts[i].Key, Value: t.Puts[i].Value})
	}
	for _, key := range t.Deletes {
		w.Changes = append(w.Changes, Change{Key: key, Deleted: true})
	}
	return w
}
