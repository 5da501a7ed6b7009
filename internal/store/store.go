// Package store is the seam to durable storage: a small ordered log of changes
// to a flat key space. It decides what a transaction, a position and a batch
// are; engines (store/sqlite and later others) make them durable. It knows
// nothing of entries, nodes or bundles: values are bytes.
//
// What must always hold: a transaction is applied whole or not at all; what
// Commit acknowledged survives a crash; the order of batches is the order of
// commits, without a hole and without a duplicate.
package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"iter"
	"time"
)

// Limits that every engine enforces. Sizes are in bytes.
const (
	MaxKey       = 1024
	MaxValue     = 1 << 20
	MaxGroup     = 64      // transactions in one group commit
	MaxGroupSize = 1 << 20 // keys and values of one group, unless a single transaction is larger
)

// Epoch identifies one life of a store. A new one is drawn when the store is
// created, restored from a backup or copied.
type Epoch [16]byte

// NewEpoch draws a random epoch.
func NewEpoch() Epoch {
	var e Epoch
	rand.Read(e[:]) // never fails (crypto/rand)
	return e
}

// String returns the first four bytes in hex; enough to tell two apart in a log.
func (e Epoch) String() string { return hex.EncodeToString(e[:4]) }

// Position is a point in the log. Within an epoch revisions only grow;
// positions of different epochs cannot be compared.
type Position struct {
	Epoch    Epoch
	Revision uint64
}

// String returns "epoch:revision".
func (p Position) String() string { return fmt.Sprintf("%s:%d", p.Epoch, p.Revision) }

// Condition asks that key was last written at Revision, or, when Revision is 0,
// that it is absent.
type Condition struct {
	Key      string
	Revision uint64
}

// Put sets a key.
type Put struct {
	Key   string
	Value []byte
}

// Txn is a set of changes to distinct keys, applied all or none.
type Txn struct {
	Caller     string // who asks, for the audit trail; carried in the batch
	Conditions []Condition
	Puts       []Put
	Deletes    []string // deleting an absent key is not an error
}

// Result is the outcome of one transaction.
type Result struct {
	// Position is where the transaction is in the log or, after a conflict, the
	// position at which the condition was judged.
	Position Position
	// Err is nil if the transaction is durable. fault.Conflict: a condition did
	// not hold. fault.Invalid: see Txn.Validate. fault.Unavailable: the store
	// could not be written, or ctx ended. Nothing of the transaction is in the
	// log then, with one exception: after fault.Unavailable with the reason
	// "outcome_unknown" it may be, or may still come.
	Err error
}

// Change is one key's change.
type Change struct {
	Key     string
	Value   []byte // nil when Deleted
	Deleted bool
}

// Write is the part of a batch that one transaction made.
type Write struct {
	Caller  string
	Changes []Change
}

// Batch is one group commit. All its changes have the revision of Position;
// its writes touch disjoint keys.
type Batch struct {
	Prev       Position // the position of the batch before; equal epochs
	Position   Position
	WriterTime time.Time // the wall clock of the server that wrote it
	Writes     []Write
}

// Stats is what an engine tells of itself.
type Stats struct {
	Engine  string    // its name in configuration files
	Bytes   int64     // on its disk; with etcd those of a member of the whole cluster
	Begin   Position  // batches after it, up to End, are in the log: a watcher may begin here
	End     Position  // the newest
	Batches uint64    // how many these are
	Oldest  time.Time // when the first of them was written, by its writer's clock; zero if there is none
}

// Store is an ordered key-value log. All methods may be called concurrently.
type Store interface {
	// Load calls f for each live key in byte order, with the revision that wrote
	// it, from one consistent snapshot, and returns the snapshot's position.
	// value is only valid during the call. f must not call the store.
	Load(ctx context.Context, f func(key string, rev uint64, value []byte) error) (Position, error)

	// Commit applies transactions in order and returns one result for each. It
	// groups neighbours whose read and written keys are disjoint (see Groups) and
	// returns when all are durable or refused, or ctx ends. The transactions must
	// not be changed afterwards. One without changes is judged and adds no batch;
	// its position is where it was judged.
	Commit(ctx context.Context, txns []Txn) []Result

	// Watch yields every batch after the position, in order, and then waits for
	// more, until ctx is done (no error is yielded then) or the consumer stops.
	// It yields an error and ends when the position is of another epoch
	// (fault.Precondition, reason "epoch_changed"), was compacted away
	// (fault.Precondition, "compacted") or lies in the future
	// (fault.Precondition, "position_unknown"): the consumer loads afresh. Any
	// other error (fault.Unavailable, "closed" after Close) says that it cannot go
	// on now; watching again from the last position may work. Watchers may share
	// the values' memory: nobody changes them.
	Watch(ctx context.Context, after Position) iter.Seq2[Batch, error]

	// Compact drops the log's batches up to and including revision before. Live
	// keys are untouched. Several may do it at once.
	Compact(ctx context.Context, before uint64) error

	// Compactable returns the newest revision that was written before a time, by
	// its writer's clock, and that at least keep batches follow; 0 if there is none
	// in the log.
	Compactable(ctx context.Context, keep uint64, before time.Time) (uint64, error)

	// Stats measures the store.
	Stats(ctx context.Context) (Stats, error)

	// Close releases the store. Commits under way are finished first; every later
	// call answers fault.Unavailable, "closed".
	Close() error
}

// Look is what was found of a store that was looked at without opening it.
type Look struct {
	Position
	Bytes   int64
	Engine  string // what it is and where, "PostgreSQL 15.14 at 10.0.0.7:5432"
	Remarks []Remark
}

// Remark is one thing about an engine that its operator should know.
type Remark struct {
	About string // one word: "connections"
	Found string // one line, without a secret
	Fix   string // empty: all is well, or nobody can tell
	Fails bool   // with a Fix: a server cannot do its work like this
}
